"""train(): the one place where adapter, InfoBatch and model meet."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.adapters import Adapter, Batch, Losses
from pretrain.config.schema import Config
from pretrain.core.rng import SampleRNG, fold_seed
from pretrain.data.images import on_device
from pretrain.data.sources import Source
from pretrain.distributed import launch
from pretrain.training.optim import warmup_cosine
from pretrain.training.run import Run
from pretrain.training.setup import setup

GLANCE = 16  # steps between looks at what an accelerator has computed; a look waits for it


def train(
    config: Config,
    adapter: Adapter,
    model: nn.Module,
    source: Source,
    *,
    evaluators: Sequence[Callable[[nn.Module], dict[str, Any]]],
    draw: Callable[[nn.Module], Tensor] | None,
) -> tuple[Run, dict[str, Any]]:
    """Train and evaluate; resumable at every step, the same run on any number of processes.

    Args:
        config: the run's settings.
        adapter: turns the model and a batch into losses.
        model: the network, initialised.
        source: what it is trained on.
        evaluators: called with the averaged model now and then, by every process; an `Observer` follows the training.
        draw: called likewise; a picture, uint8 [H, W, C], of what the averaged model does; None: there is none to see.

    Returns:
        The run, which holds its directory as long as it exists, and what it came to.

    Raises:
        UserError: something that the user gave can't be used.
        SystemExit: with status `pretrain.training.run.STOPPED`, told to stop by a signal; a checkpoint is written.
    """
    accelerator = launch.start(config.output_dir, config.precision, config.tracker)
    with launch.heartbeat(accelerator) as heartbeat, launch.StopSignal() as stop:
        run = setup(config, adapter, model, source, accelerator, stop, evaluators, draw)
        heartbeat.where = run.where
        with run:
            if run.is_fresh:
                run.evaluate(0)
                run.checkpoint(must=True)  # a directory that can't hold a checkpoint is known of now, not hours later
            for epoch in run.state.infobatch.epochs():
                run.begin_epoch()
                for micro in micro_batches(run, epoch):
                    losses = forward_backward(run, epoch, micro)
                    if micro.ends_step:
                        optimizer_step(run, epoch, micro, losses)
                run.end_epoch(epoch)
            return run, run.finish()


class MicroBatch(NamedTuple):
    """What a process pushes through the network at once: all, or a part, of an optimizer step's samples.

    Attributes:
        batch: on the device, augmented, every sample with its level.
        share: of the step's samples that these are, on all processes together.
        ends_step: whether the optimizer is to move after it.
        before: progress of the training when the step began.
    """

    batch: Batch
    share: float
    ends_step: bool
    before: float


def micro_batches(run: Run, epoch: int) -> Iterator[MicroBatch]:
    """What is left of an epoch, in the plan's order."""
    infobatch, images, device = run.state.infobatch, run.source.train, run.accelerator.device
    due, window, before = 0, 0, 0.0  # samples that the step is still to see, and all of its, over all processes
    for loaded, problems in run.batches:
        if not due:
            left, full = infobatch.length - infobatch.seen, run.config.batch_size
            # A few images must not make a step of their own: an optimizer like AdamW takes it for a whole one.
            due = window = left if left < 1.5 * full else full
            before = infobatch.progress
            # For what the network itself draws: dropout and its like.
            torch.manual_seed(fold_seed(run.config.seed, run.state.step, run.accelerator.process_index))
        count = infobatch.global_batch_size(loaded.index)
        due -= count
        batch = run.state.nan_guard.admit(loaded._replace(level=infobatch.level(loaded.index)), problems)
        batch = images.augmented(on_device(batch, device), epoch)
        yield MicroBatch(batch, count / window, not due, before)


def forward_backward(run: Run, epoch: int, micro: MicroBatch) -> Losses:
    """Losses of a micro-batch, remembered, weighted, and their gradient added to the step's."""
    infobatch, batch = run.state.infobatch, micro.batch
    with nullcontext() if micro.ends_step else run.accelerator.no_sync(run.model):
        losses = run.objective(run.model, batch, SampleRNG(run.config.seed, epoch, index=batch.index))
        loss = infobatch(losses.loss, batch.index, losses.score)
        for observer in run.state.observers:
            observer.observe(batch, infobatch.progress)
        run.accelerator.backward(loss * micro.share)
    return losses


def optimizer_step(run: Run, epoch: int, micro: MicroBatch, losses: Losses) -> None:
    """Move the parameters by what the step's micro-batches have gathered, then look, report, stop or save.

    The order is part of what a resume relies on: clip, check that numbers are finite, agree on it, set the learning
    rate at the step's middle, step, average, take a snapshot, report, and then stop or write a checkpoint.
    """
    config, state, infobatch = run.config, run.state, run.state.infobatch
    device = run.accelerator.device
    within = infobatch.seen < infobatch.length
    by_number = config.checkpoint.every and (state.step + 1) % config.checkpoint.every == 0
    look = device.type == "cpu" or state.step % GLANCE == 0 or by_number or not within

    stretch = infobatch.size / infobatch.length  # what weights that make up for skipped samples are on average
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), config.optim.clip * stretch or math.inf)
    if norm is not None and run.accelerator.scaler is None:  # which looks after that itself
        state.nan_guard.gradient(run.model, norm)
    told, due = run.inspect(epoch) if look else (0, False)

    middle = (micro.before + infobatch.progress) / 2  # no step has a rate of 0
    rate = config.peak_lr * warmup_cosine(middle, config.optim.warmup) * stretch**config.optim.compensation
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad()
    state.ema.update(state.model, infobatch.progress)
    state.step += 1
    with run.reporter.display.warn_on_error("writing a snapshot of the averages"):
        run.snapshots.take(state.step)
    state.seconds = run.reporter.clock()
    if look:
        if run.writer.idle:
            run.writer.report()
        run.reporter.step(state, epoch, losses.loss)
    if told:
        run.leave(told, epoch)
    if within and (by_number or due):
        run.checkpoint()

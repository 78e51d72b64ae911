"""The training loop: adapter, InfoBatch and model meet in `train`."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.adapters import Adapter, Batch, Losses
from pretrain.config.schema import Config, flat
from pretrain.core.rng import SampleRNG, fold_seed
from pretrain.data.images import on_device
from pretrain.data.sources import Source
from pretrain.distributed import launch
from pretrain.distributed.agreement import require_same_settings
from pretrain.distributed.sharding import full
from pretrain.training.dry_run import TIMED_STEPS, estimate
from pretrain.training.optim import warmup_cosine
from pretrain.training.run import Run
from pretrain.training.setup import setup

SYNC_EVERY = 16  # steps between synchronizations with an accelerator; a CPU needs none


def train(
    config: Config,
    adapter: Adapter,
    model: nn.Module,
    source: Source,
    *,
    evaluators: Sequence[Callable[[nn.Module], dict[str, Any]]],
    preview: Callable[[nn.Module], Tensor | None] | None,
) -> tuple[Run, dict[str, Any]]:
    """Train and evaluate a model; a stopped run continues from any step, and any number of processes make one run.

    Args:
        config: settings of the run.
        adapter: the objective; turns the model and a batch into losses.
        model: the network, initialized.
        source: the data set.
        evaluators: called with the EMA model every `evaluate.every` epochs, at the end, and with `evaluate.at_start`
            before the training, on all ranks; one that is an `Observer` also receives every batch.
        preview: called likewise, except before the training; returns a picture of what the EMA model does, uint8
            [H, W, C]. None: no pictures.

    Returns:
        The run, which locks its directory while it exists, and the summary (see `summarise`).

    Raises:
        UserError: settings, data or files can't be used.
        SystemExit: with status `pretrain.training.run.EXIT_STOPPED` after a signal to stop; a checkpoint was written.
            With status 0 after a dry run.
    """
    tracker = None if config.dry_run else config.tracker
    accelerator = launch.start(config.output_dir, config.precision, tracker)
    settings = flat(vars(config) | config.to_dict() | {"output_dir": config.output_dir})
    del settings["data.source"]  # a path, which may differ; `setup` compares its content
    require_same_settings({f"--{name.replace('_', '-')}": value for name, value in settings.items()})
    with ExitStack() as stack:
        stop_signal = stack.enter_context(launch.StopSignal())
        heartbeat = stack.enter_context(launch.heartbeat(accelerator, stop_signal))
        if config.dry_run:
            config = replace(config, output_dir=Path(stack.enter_context(TemporaryDirectory())) / "run")
        run = setup(config, adapter, model, source, accelerator, stop_signal, evaluators, preview)
        run.heartbeat, heartbeat.position = heartbeat, run.position
        with run:
            if config.dry_run:
                seconds = mean_step_seconds(run, TIMED_STEPS)
                run.reporter.display.print_summary(estimate(run, seconds))
                raise SystemExit(0)
            if run.is_new:
                if config.evaluate.at_start:
                    run.evaluate(0)
                run.checkpoint(wait=True)  # a folder without space for a checkpoint is reported now, not hours later
            for epoch in run.state.infobatch.epochs():
                run.begin_epoch()
                for micro in micro_batches(run, epoch):
                    losses = forward_backward(run, epoch, micro)
                    if micro.ends_step:
                        optimizer_step(run, epoch, micro, losses)
                run.end_epoch(epoch)
            return run, run.finish()


def mean_step_seconds(run: Run, count: int) -> float:
    """Train `count` steps and one more before, which is not timed; fewer if the first epoch has fewer."""
    times = []
    epoch = next(run.state.infobatch.epochs())
    run.begin_epoch()
    began = time.perf_counter()
    for micro in micro_batches(run, epoch):
        losses = forward_backward(run, epoch, micro)
        if micro.ends_step:
            optimizer_step(run, epoch, micro, losses)
            losses.loss.sum().item()  # waits for the device
            times.append(time.perf_counter() - began)
            began = time.perf_counter()
            if len(times) > count:
                break
    timed = times[1:] or times
    return sum(timed) / len(timed)


class MicroBatch(NamedTuple):
    """The samples of one forward and backward pass of a process: all or a part of an optimizer step's.

    Attributes:
        batch: on the device, augmented, with the samples' levels.
        share: of the step's samples that are in this micro-batch, over all processes.
        ends_step: whether it is the step's last one.
        start: progress of the training at the beginning of the step.
    """

    batch: Batch
    share: float
    ends_step: bool
    start: float


def micro_batches(run: Run, epoch: int) -> Iterator[MicroBatch]:
    """The rest of the epoch's samples, in the order of its plan."""
    infobatch, images, device = run.state.infobatch, run.source.train, run.accelerator.device
    missing, step_size, start = 0, 0, 0.0  # samples of the step that are still to come, and all of them, over all ranks
    for loaded, problems in run.batches:
        if not missing:
            left, size = infobatch.length - infobatch.seen, run.config.batch_size
            # Less than half a batch joins the step before it: AdamW would make a full-sized step of a few images.
            missing = step_size = left if left < 1.5 * size else size
            start = infobatch.progress
            # For random layers of the network, such as dropout.
            torch.manual_seed(fold_seed(run.config.seed, run.state.step, run.accelerator.process_index))
        count = infobatch.global_batch_size(loaded.index)
        missing -= count
        batch = run.state.nonfinite.filter(loaded._replace(level=infobatch.level(loaded.index)), problems)
        batch = images.augmented(on_device(batch, device), epoch)
        yield MicroBatch(batch, count / step_size, not missing, start)


def forward_backward(run: Run, epoch: int, micro: MicroBatch) -> Losses:
    """Compute a micro-batch's losses, pass them to InfoBatch, and accumulate the gradient of their weighted mean."""
    infobatch, batch = run.state.infobatch, micro.batch
    with nullcontext() if micro.ends_step else run.accelerator.no_sync(run.model):
        losses = run.objective(run.model, batch, SampleRNG(run.config.seed, epoch, index=batch.index))
        loss = infobatch(losses.loss, batch.index, losses.score)
        for observer in run.state.observers:
            observer.observe(batch, infobatch.progress)
        run.accelerator.backward(loss * micro.share)
    return losses


def optimizer_step(run: Run, epoch: int, micro: MicroBatch, losses: Losses) -> None:
    """Update the parameters by the accumulated gradient; then report, and write a checkpoint or stop if that is due.

    A resumed run repeats an uninterrupted one bit for bit only with this order: clip the gradient, check that it is
    finite, agree on that over all ranks, set the learning rate (of the middle of the step), step, update the EMAs, take
    a snapshot of them, report, then stop or write a checkpoint.

    Args:
        run: the run.
        epoch: the current epoch, from 0.
        micro: the last micro-batch of the step.
        losses: of this micro-batch, for the display.
    """
    config, state, infobatch = run.config, run.state, run.state.infobatch
    device = run.accelerator.device
    inside_epoch = infobatch.seen < infobatch.length
    save_by_steps = config.checkpoint.every and (state.step + 1) % config.checkpoint.every == 0
    sync = device.type == "cpu" or state.step % SYNC_EVERY == 0 or save_by_steps or not inside_epoch

    mean_weight = infobatch.size / infobatch.length  # of this epoch's samples; it scales the norm of the gradient
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), config.optim.clip * mean_weight or math.inf)
    if norm is not None and run.accelerator.scaler is None:  # a GradScaler skips such steps itself
        state.nonfinite.zero_bad_gradient(run.model, full(norm))
    stop, save_by_time = run.inspect(epoch) if sync else (0, False)

    middle = (micro.start + infobatch.progress) / 2  # so that no step has learning rate 0
    lr = config.peak_lr * warmup_cosine(middle, config.optim.warmup) * mean_weight**config.optim.compensation
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    if run.accelerator.scaler is not None:
        state.nonfinite.count_skipped(run.optimizer.step_was_skipped)
    run.optimizer.zero_grad()
    state.ema.update(state.model, infobatch.progress)
    state.step += 1
    with run.reporter.display.warn_on_error("writing a snapshot of the EMAs"):
        run.snapshots.take(state.step)
    state.seconds = run.reporter.training_seconds()
    if sync:
        if run.writer.idle:
            run.writer.wait()
        run.reporter.step(state, epoch, losses.loss)
    if stop:
        run.exit_on_signal(stop, epoch)
    if inside_epoch and (save_by_steps or save_by_time):
        run.checkpoint()

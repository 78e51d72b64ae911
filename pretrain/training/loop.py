"""train(): the one place where adapter, InfoBatch and model meet."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from pretrain.adapters import Adapter, Batch
from pretrain.checkpoint import ema_snapshots, run_dir, storage
from pretrain.checkpoint.async_writer import Writer
from pretrain.checkpoint.ema import EMACollection
from pretrain.config.build import scheduler
from pretrain.config.schema import Config, flat
from pretrain.core.console import Display, duration
from pretrain.core.errors import UserError
from pretrain.core.files import replacing
from pretrain.core.rng import SampleRNG, key
from pretrain.data.fingerprint import fingerprints
from pretrain.data.images import on_device
from pretrain.data.loader import EpochSampler, RestartingLoader, make_loader
from pretrain.data.preload import preload
from pretrain.data.sources import Source
from pretrain.distributed import launch
from pretrain.distributed.heartbeat import Heartbeat
from pretrain.evaluation.online_probe import OnlineProbe
from pretrain.export import hub, model_card
from pretrain.training import micro_batches, plots, replay_step
from pretrain.training.flops import peak
from pretrain.training.metrics_log import MetricsLog
from pretrain.training.nan_guard import NanGuard
from pretrain.training.optim import adamw, warmup_cosine
from pretrain.training.setup import changes, check, compiled, profile_objective, recompute
from pretrain.training.state import TrainState
from pretrain.training.summary import in_words, summarise
from pretrain.training.trackers import Trackers


def program_name() -> str:
    """What this program was started as."""
    return f"python {Path(sys.argv[0]).name}" if sys.argv[0].endswith(".py") else sys.argv[0]


STOPPED = 75  # exit status of a run that was told to stop and can go on (EX_TEMPFAIL)
GLANCE = 16  # steps between looks at what an accelerator has computed; a look waits for it


def train(
    config: Config,
    adapter: Adapter,
    model: nn.Module,
    source: Source,
    *,
    evaluators: Sequence[Callable[[nn.Module], dict[str, Any]]],
    draw: Callable[[nn.Module], Tensor] | None,
    export: Callable[[nn.Module], str],
) -> None:
    """Train, evaluate, export; resumable at every step, the same run on any number of launch.

    Args:
        config: the run's settings.
        adapter: turns the model and a batch into losses.
        model: the network, initialised.
        source: what it is trained on.
        evaluators: called with the averaged model now and then, by every process; an `OnlineProbe` looks on.
        draw: called likewise; a picture, uint8 [H, W, C], of what the averaged model does; None: there is none to see.
        export: writes the averaged model and says how it is opened.

    Raises:
        UserError: something that the user gave can't be used.
        SystemExit: with status `STOPPED`, told to stop by a signal; a checkpoint is written.
    """
    if config.push_to_hub:
        hub.check(config.push_to_hub)
    accelerator = launch.start(config)
    with launch.watch(accelerator) as watch, launch.Stop() as stop:
        _train(config, adapter, model, source, accelerator, watch, stop, evaluators, draw, export)


def _train(
    config: Config,
    adapter: Adapter,
    model: nn.Module,
    source: Source,
    accelerator: Any,
    watch: Heartbeat,
    stop: launch.Stop,
    evaluators: Sequence[Callable[[nn.Module], dict[str, Any]]],
    draw: Callable[[nn.Module], Tensor] | None,
    export: Callable[[nn.Module], str],
) -> None:
    """`train`, while the processes look after each other."""
    main, device, size = accelerator.is_main_process, accelerator.device, len(source.train)
    micro_batch = launch.micro_batch(config, accelerator.num_processes)
    with launch.together(accelerator):
        resumed = run_dir.resume_from(config)
    state = resumed.state if resumed else None

    # The parts.
    display = Display(main)
    infobatch = scheduler(config, size, display.say)
    visit = profile_objective(config, adapter, model, source)
    if config.recompute:
        recompute(model)
    averages = EMACollection(model, config.average.halflife, config.average.lengths)
    optimizer = adamw(model, config.optim)
    training = TrainState(model, averages, optimizer, infobatch, accelerator.scaler)
    marks = fingerprints(source)
    probe = next((each for each in evaluators if isinstance(each, OnlineProbe)), None)
    with storage.restoring(resumed):
        if state is not None and resumed is not None:
            check(resumed.path, state, marks, source)
            training.restore(state, config, resumed.path)
            source.train.bad |= {*state.values["bad_images"]}
            source.test.bad |= {*state.values.get("bad_heldout_images", [])}
        guard = NanGuard(infobatch, source.train, device, state.values if state else {})
        if probe is not None:
            probe.attach(training.model, infobatch.progress, device, state.tensors.get("probe") if state else None)
    averages.to(device)
    if config.compile:
        compiled(model, device)
    model, optimizer = accelerator.prepare(model, optimizer)
    with launch.together(accelerator):  # before it is tried how many images the rest of the memory holds
        training.seconds += preload(source.train, device, display.say, lambda: bool(stop.signal))
    if config.micro_batch == "auto":

        def step(batch: Batch) -> None:
            batch = source.train.augmented(batch, 0)
            with accelerator.no_sync(model):
                accelerator.backward(adapter(model, batch, SampleRNG(config.seed, index=batch.index)).loss.mean())

        with launch.together(accelerator):
            fit = micro_batches.most(step, training.model, micro_batch, source.shape, source.classes)
        micro_batch = -launch.most(-fit)[0]
        display.say(f"--micro-batch auto: {micro_batch} images at once")
    batches = RestartingLoader(lambda: make_loader(source.train, EpochSampler(infobatch), micro_batch), display.say)

    # The folder; nobody writes before everybody has looked.
    if len(launch.union({resumed.path.name} if resumed else set(), accelerator)) > 1:
        raise UserError("--resume: not all processes can read the newest checkpoint; name the one to go on from")
    with launch.together(accelerator):
        lock = run_dir.prepare(config, resumed) if main else None  # held as long as this function runs
    journal = MetricsLog(
        config.output_dir / "journal.jsonl", state.values["journal"] if state else 0, main, display.say
    )
    writer = Writer(config.output_dir / "checkpoints", config.checkpoint, resumed and resumed.path, display.say)
    snapshots = ema_snapshots.Snapshots(
        config.output_dir / "averages", averages, config.average.snapshots, config.epochs, training.step, writes=main
    )
    trackers = Trackers(accelerator, flat(config.to_dict()), main, display.say)
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    display.say(
        f"{type(adapter).__name__} on {size:,} images {'x'.join(map(str, source.shape))} of {config.data.source}, "
        f"{parameters / 1e6:.2f} M parameters, {visit.flops / 1e9:.3g} GFLOP a visit, "
        f"policy {config.policy}, {accelerator.num_processes} x {device.type}"
    )
    if resumed is not None and state is not None:
        for path, why in resumed.skipped.items():
            display.say(f"not used: {path.name}: {why}")
        place = f"epoch {infobatch.epoch + 1}, step {training.step}"
        display.say(f"going on from {resumed.path}: {place}{changes(state, config)}")

    def save(*, must: bool = False) -> None:
        source.train.bad |= launch.union(source.train.bad, accelerator)
        state = training.state(config, journal.position, sorted(source.train.bad))
        state.values["bad_heldout_images"] = sorted(source.test.bad)
        state.tensors["data"] = marks
        state.values["images"] = {"shape": source.shape, "classes": source.classes, "autoencoder": source.made_by}
        state.values.update(guard.state())
        if probe is not None:
            state.tensors["probe"] = probe.state()
        with launch.together(accelerator):
            if main:
                writer.save(training.step, state, journal.flush)
            if main and must:
                writer.report(must=True)

    def show(name: str, picture: Tensor, file: str | None = None) -> None:
        path = config.output_dir / "pictures" / f"{file or name}.png"
        with display.trying(f"writing {path}"), replacing(path) as part:
            Image.fromarray(picture.squeeze(-1).numpy()).save(part, "PNG")
        trackers.show(name, picture.numpy(), training.step)

    def inspect(epoch: int) -> tuple[int, bool]:
        """What is to be done after this step, agreed on by all: the signal to stop by, and whether to save."""
        step = f"epoch {epoch + 1}, step {training.step + 1}"
        with launch.together(accelerator):
            guard.refuse()
        found = guard.found()
        told, clock, bad = launch.most(stop.signal, writer.due, bool(found))
        if bad:
            sentence = guard.set_aside(launch.union(found, accelerator))
            display.say(f"warning: {step}: {sentence}; left out from now on")
        if verdict := guard.verdict():
            visits = sorted(launch.union({*guard.recent}, accelerator))
            with launch.together(accelerator):
                if main:
                    replay_step.record(config.output_dir, training.model, visits, epoch=epoch)
                raise UserError(f"{step}: {verdict}; lower --optim.lr, or {replay_step.how(config.output_dir)}")
        guard.recent.clear()
        return told, bool(clock)

    def evaluate(epoch: int) -> None:
        found = {name: value for evaluator in evaluators for name, value in evaluator(averages.model).items()}
        source.test.bad |= launch.union(source.test.bad, accelerator)
        scalars = {name: value for name, value in found.items() if not isinstance(value, list)}
        journal.write("evaluation", epoch=epoch, **found)
        trackers.log(scalars, training.step)
        picture = draw(averages.model) if draw is not None and epoch else None
        if main:
            if picture is not None:
                show("pictures", picture, f"epoch-{epoch:04d}")
            if "heldout_loss_by_level" in found:
                show("loss-by-level", plots.loss_by_level(journal.read("evaluation")))
            display.say(f"epoch {epoch}/{config.epochs}  " + "  ".join(f"{k} {v:.4f}" for k, v in scalars.items()))
        accelerator.wait_for_everyone()

    watch.where = lambda: f"epoch {infobatch.epoch + 1}, step {training.step}"
    with display, writer, batches:
        if state is None:
            evaluate(0)
            save(must=True)  # a folder that can't hold a checkpoint is known of now, not hours later
        for epoch in infobatch.epochs():
            if infobatch.seen == 0 and training.step != (state.values["step"] if state else 0):
                save()
            skipped = 1 - infobatch.length / size
            stretch = size / infobatch.length  # what weights that make up for who is skipped are on average
            began, seconds, first = time.monotonic(), training.seconds, infobatch.seen
            before = infobatch.progress  # the running optimizer step
            due = window = 0  # samples that it is still to see, over all processes
            for batch, problems in batches:
                if not due:
                    left = infobatch.length - infobatch.seen
                    # A few images must not make a step of their own: an optimizer like AdamW takes it for a whole one.
                    due = window = left if left < 1.5 * config.batch_size else config.batch_size
                    before = infobatch.progress
                    # For what the network itself draws: dropout and its like.
                    torch.manual_seed(key(config.seed, training.step, accelerator.process_index))
                count = infobatch.counted(batch.index)
                due -= count
                batch = guard.admit(batch._replace(level=infobatch.level(batch.index)), problems)
                batch = source.train.augmented(on_device(batch, device), epoch)
                with accelerator.no_sync(model) if due else nullcontext():
                    losses = adapter(model, batch, SampleRNG(config.seed, epoch, index=batch.index))
                    loss = infobatch(losses.loss, batch.index, losses.score)
                    if probe is not None:
                        probe.learn(batch, infobatch.progress)
                    accelerator.backward(loss * (count / window))
                if due:
                    continue
                within = infobatch.seen < infobatch.length
                by_number = config.checkpoint.every and (training.step + 1) % config.checkpoint.every == 0
                look = device.type == "cpu" or training.step % GLANCE == 0 or by_number or not within
                norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.clip * stretch or math.inf)
                if norm is not None and accelerator.scaler is None:  # which looks after that itself
                    guard.gradient(model, norm)
                told, clock = inspect(epoch) if look else (0, False)
                middle = (before + infobatch.progress) / 2  # of the step: no step has a rate of 0
                rate = config.peak_rate * warmup_cosine(middle, config.optim.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate * stretch**config.optim.compensation
                optimizer.step()
                optimizer.zero_grad()
                averages.update(training.model, infobatch.progress)
                training.step += 1
                with display.trying("writing a snapshot of the averages"):
                    snapshots.take(training.step)
                training.seconds = seconds + time.monotonic() - began
                if look:
                    if writer.idle:
                        writer.report()
                    speed = (infobatch.seen - first) / (training.seconds - seconds)
                    display.step(
                        epoch + 1, config.epochs, infobatch.progress, speed, losses.loss.mean().item(), skipped
                    )
                if told:
                    save(must=True)
                    display.say(
                        f"stopped by {signal.Signals(told).name} in epoch {epoch + 1} after step {training.step}; "
                        f"go on with: {program_name()} --resume "
                        f"--output-dir {quote(str(config.output_dir))}"
                    )
                    trackers.finish()
                    raise SystemExit(STOPPED)
                if within and (by_number or clock):
                    save()
            training.count_visits()
            record = {
                "epoch": epoch + 1,
                "step": training.step,
                "visited": infobatch.visited + infobatch.seen,
                "credited": (epoch + 1) * size,
                "skipped": skipped,
                "reliability": infobatch.reliability,
                "at_random": infobatch.at_random,
                visit.remembered: infobatch.mean(),
                "lr": optimizer.param_groups[0]["lr"],
            }
            journal.write("epoch", **record, seconds=training.seconds)
            trackers.log(record, training.step)
            display.say(
                f"epoch {epoch + 1}/{config.epochs}  {visit.remembered} {record[visit.remembered]:.4f}  "
                f"{infobatch.seen:,} visited, {skipped:.1%} skipped  {duration(training.seconds)}"
            )
            if (epoch + 1) % config.evaluate.every == 0 or epoch + 1 == config.epochs:
                evaluate(epoch + 1)
    save(must=True)
    sheet = plots.visits(training.visits, infobatch.score, source) if main else None
    if sheet is not None:
        show("visits", sheet)
    summary: dict[str, Any] = {}
    if main:
        each = peak(torch.cuda.get_device_name(device), config.precision) if device.type == "cuda" else None
        summary = summarise(
            config,
            size=size,
            visited=infobatch.visited,
            progress=infobatch.progress,
            steps=training.step,
            seconds=training.seconds,
            model=training.model,
            bad_images=source.train.bad | source.test.bad,
            evaluations=journal.read("evaluation"),
            flops=visit.flops,
            peak=each and each * accelerator.num_processes,
        )
        try:
            summary["open_model_with"] = export(averages.model)
            model_card.write(config, summary)
            with replacing(config.output_dir / "summary.json") as part:
                part.write_text(json.dumps(summary, indent=2) + "\n")
        except (OSError, SafetensorError) as error:
            raise UserError(f"the model can't be written: {error}; the training is done, --resume writes it") from None
        display.summary(in_words(summary))
    accelerator.wait_for_everyone()
    trackers.finish()
    if main and config.push_to_hub:  # nobody waits for it, and the run is whole whatever becomes of it
        try:
            display.say(f"uploaded     {hub.push(config.push_to_hub, config, summary)}")
        except UserError as refusal:
            display.say(f"error: {refusal}")
    del lock

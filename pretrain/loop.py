"""train(): the one place where adapter, InfoBatch and model meet, and the one that knows accelerate."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
import yaml
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import ProjectConfiguration
from PIL import Image
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from pretrain import checkpoint, run
from pretrain.adapter import Adapter
from pretrain.average import Average
from pretrain.config import Config, flat
from pretrain.cost import train_flops
from pretrain.data import Source, Visits, loader, on_device
from pretrain.display import Display, duration
from pretrain.errors import Refused
from pretrain.infobatch import InfoBatch
from pretrain.journal import Journal
from pretrain.rng import Draws, key
from pretrain.schedule import warmup_cosine

STOPPED = 75  # exit status of a run that was told to stop and can go on (EX_TEMPFAIL)
GLANCE = 16  # steps between looks at what an accelerator has computed; a look waits for it


class Stop:
    """While it is entered, notes SIGINT and SIGTERM; a second one acts as if nobody listened."""

    def __enter__(self) -> "Stop":
        self.signal = 0
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.signal = number
        signal.signal(number, self.before[number])


def accelerate(config: Config) -> Accelerator:
    """This process's accelerator.

    Raises:
        Refused: the launcher started another number of processes than accelerate sees, or the tracker is not there.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    folder = ProjectConfiguration(project_dir=str(config.output_dir), logging_dir=str(config.output_dir / "trackers"))
    try:
        accelerator = Accelerator(
            cpu=world > 1 and not torch.cuda.is_available(),  # without it, two independent runs
            mixed_precision=config.precision,
            log_with=config.tracker,
            project_config=folder,
        )
    except ValueError as error:
        raise Refused(" ".join(str(error).split())) from None
    if accelerator.num_processes != (asked := _asked_for()):
        raise Refused(
            f"the launcher was asked for {asked} processes and started {accelerator.num_processes}; on CPUs use "
            f"`torchrun --nproc_per_node {asked}` or `accelerate launch --multi_gpu --num_processes {asked}`"
        )
    if config.tracker and not accelerator.log_with:
        raise Refused(f"--tracker {config.tracker}: its package is not installed; pip install {config.tracker}")
    return accelerator


def _asked_for() -> int:
    """How many processes the launcher was asked for.

    `accelerate launch --cpu --num_processes 2` starts one and leaves no trace of the two but its command line.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    parent = psutil.Process().parent()
    command = parent.cmdline() if parent is not None and "ACCELERATE_USE_CPU" in os.environ else []
    if "launch" not in command:
        return 1
    asked, _ = launch_command_parser().parse_known_args(command[command.index("launch") + 1 :])
    if asked.num_processes is None and asked.config_file is not None:
        return int(yaml.safe_load(Path(asked.config_file).read_text()).get("num_processes") or 1)
    return asked.num_processes or 1


def train(
    config: Config,
    adapter: Adapter,
    model: nn.Module,
    source: Source,
    *,
    evaluators: Sequence[Callable[[nn.Module], dict[str, Any]]],
    draw: Callable[[nn.Module], Tensor] | None,
    export: Callable[[nn.Module], str],
) -> dict[str, Any]:
    """Train, evaluate, export; resumable at every step, the same run on any number of processes.

    Args:
        config: the run's settings.
        adapter: turns the model and a batch into losses.
        model: the network, initialised.
        source: what it is trained on.
        evaluators: called with the averaged model now and then.
        draw: picture, uint8 [H, W, C], of what the averaged model does; None: there is nothing to see.
        export: writes the averaged model and says how it is opened.

    Returns:
        The summary that is written to summary.json.

    Raises:
        Refused: something that the user gave can't be used.
        SystemExit: with status `STOPPED`, told to stop by a signal; a checkpoint is written.
    """
    accelerator = accelerate(config)
    world, main = accelerator.num_processes, accelerator.is_main_process
    share, rest = divmod(config.batch_size, world)
    micro_batch = min(config.micro_batch or share, share)
    if rest or not share or share % micro_batch:
        raise Refused(
            f"--batch-size {config.batch_size} must be a multiple of {world} processes"
            + (f" times --micro-batch {micro_batch}" if share and not rest else "")
        )
    folder, size = config.output_dir, len(source.train)
    resumed = run.resume_from(config)
    state = None if resumed is None else checkpoint.load(resumed)
    if state is not None:
        _same_run(state.values, config, size, resumed)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    if main:
        run.prepare(config, resumed is not None)
    journal = Journal(folder / "journal.jsonl", state.values["journal"] if state else 0) if main else None

    infobatch = InfoBatch(
        size,
        epochs=config.epochs,
        policy=config.policy,
        ratio=config.pruning.ratio,
        anneal=config.pruning.anneal,
        smoothing=config.pruning.smoothing,
        seed=config.seed,
        rank=accelerator.process_index,
        world=world,
        merge=lambda table: _maximum(table, accelerator),
    )
    flops = train_flops(adapter, model, source.shape, source.classes)
    average = Average(model, config.optim.average)
    groups = param_groups_weight_decay(model, config.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas)
    step, seconds = 0, 0.0
    if state is not None:
        checkpoint.fill(model, state.tensors["model"], resumed)
        checkpoint.fill(average.model, state.tensors["average"], resumed)
        optimizer.load_state_dict(checkpoint.unpack_optimizer(state.tensors["optimizer"], state.values["optimizer"]))
        infobatch.load_state_dict({**state.tensors["infobatch"], **state.values["infobatch"]})
        step, seconds, average.progress = state.values["step"], state.values["seconds"], state.values["average"]
        if accelerator.scaler is not None and state.values["scaler"]:
            accelerator.scaler.load_state_dict(state.values["scaler"])
    average.model.to(accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    if config.tracker:
        accelerator.init_trackers("run", {k: str(v) for k, v in flat(config.to_dict()).items()})
    display = Display(main)

    def save() -> None:
        memory = infobatch.state_dict()
        if main:
            tensors, packed_groups = checkpoint.pack_optimizer(optimizer.optimizer.state_dict())
            values = {
                "step": step,
                "seconds": seconds,
                "average": average.progress,
                "journal": journal.position,
                "optimizer": packed_groups,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "infobatch": {name: value for name, value in memory.items() if not isinstance(value, Tensor)},
                "size": size,
                "config": config.to_dict(),
            }
            files = {
                "model": bare.state_dict(),
                "average": average.model.state_dict(),
                "optimizer": tensors,
                "infobatch": {name: value for name, value in memory.items() if isinstance(value, Tensor)},
            }
            checkpoint.save(folder / "checkpoints", step, checkpoint.State(files, values), config.checkpoint.keep)
        accelerator.wait_for_everyone()

    def evaluate(epoch: int) -> None:
        if main:
            found = {name: value for evaluator in evaluators for name, value in evaluator(average.model).items()}
            journal.write("evaluation", epoch=epoch, **found)
            scalars = {name: value for name, value in found.items() if not isinstance(value, list)}
            accelerator.log(scalars, step=step)
            if draw is not None and epoch:
                picture = draw(average.model).squeeze(-1).numpy()
                Image.fromarray(picture).save(folder / "pictures" / f"epoch-{epoch:04d}.png")
            display.say(f"epoch {epoch}/{config.epochs}  " + "  ".join(f"{k} {v:.4f}" for k, v in scalars.items()))
        accelerator.wait_for_everyone()

    parameters = sum(p.numel() for p in bare.parameters())
    display.say(
        f"{type(adapter).__name__} on {size:,} images {'x'.join(map(str, source.shape))} of {config.data.source}, "
        f"{parameters / 1e6:.2f} M parameters, policy {config.policy}, {world} x {accelerator.device.type}"
    )
    if resumed is not None:
        display.say(f"going on from {resumed}: epoch {infobatch.epoch + 1}, step {step}{_changes(state, config)}")
    batches = loader(source.train, Visits(infobatch), micro_batch)
    fresh = resumed is None
    with display, Stop() as stop:
        if fresh:
            evaluate(0)
        for epoch in infobatch.epochs():
            if not fresh and infobatch.seen == 0:
                save()
            fresh = False
            skipped = 1 - infobatch.length / size
            began, first, begun_with = time.monotonic(), infobatch.seen, seconds
            window = None  # visits before this optimizer step, and in it; over all processes
            for batch, problems in batches:
                source.train.settle(problems)
                if window is None:
                    window = infobatch.seen, min(config.batch_size, infobatch.length - infobatch.seen)
                    torch.manual_seed(key(config.seed, step, accelerator.process_index))  # for dropout and its like
                before, n = window
                visits = min(len(batch.index) * world, infobatch.length - infobatch.seen)
                whole = infobatch.seen + visits == before + n
                batch = on_device(batch._replace(level=infobatch.level(batch.index)), accelerator.device)
                with nullcontext() if whole else accelerator.no_sync(model):
                    losses = adapter(model, batch, Draws(config.seed, epoch, index=batch.index))
                    loss = infobatch(losses.loss, batch.index, losses.score)
                    accelerator.backward(loss * (visits / n))
                if not whole:
                    continue
                look = accelerator.device.type == "cpu" or step % GLANCE == 0 or infobatch.seen == infobatch.length
                if look:
                    _check(infobatch, source, epoch, step)
                if config.optim.clip:
                    accelerator.clip_grad_norm_(model.parameters(), config.optim.clip)
                for group in optimizer.param_groups:
                    group["lr"] = config.optim.lr * warmup_cosine(infobatch.progress, config.optim.warmup)
                optimizer.step()
                optimizer.zero_grad()
                average.update(bare, infobatch.progress)
                step, window = step + 1, None
                seconds = begun_with + time.monotonic() - began
                if look:
                    speed = (infobatch.seen - first) / (seconds - begun_with)
                    display.step(epoch + 1, config.epochs, infobatch.progress, speed, loss.item(), skipped)
                if told := _agreed(stop, accelerator):
                    save()
                    display.live.stop()
                    display.say(
                        f"stopped by {signal.Signals(told).name} in epoch {epoch + 1} after step {step}; go on with: "
                        f"python {Path(sys.argv[0]).name} --resume --output-dir {folder}"
                    )
                    accelerator.end_training()
                    raise SystemExit(STOPPED)
                if config.checkpoint.every and step % config.checkpoint.every == 0 and infobatch.seen < infobatch.length:
                    save()
            mean = infobatch.mean()
            if main:
                record = {
                    "epoch": epoch + 1,
                    "step": step,
                    "visited": infobatch.visited + infobatch.seen,
                    "credited": (epoch + 1) * size,
                    "skipped": skipped,
                    "loss": mean,
                    "lr": optimizer.param_groups[0]["lr"],
                }
                journal.write("epoch", **record, seconds=seconds)
                accelerator.log(record, step=step)
                display.say(
                    f"epoch {epoch + 1}/{config.epochs}  loss {mean:.4f}  {infobatch.seen:,} visited, {skipped:.1%} skipped  "
                    f"{duration(seconds)}"
                )
            if (epoch + 1) % config.evaluate.every == 0 or epoch + 1 == config.epochs:
                evaluate(epoch + 1)
    save()
    summary: dict[str, Any] = {}
    if main:
        summary = _summary(config, source, infobatch.visited, seconds, flops, step, parameters, journal)
        summary["pictures"], summary["model"] = str(folder / "pictures"), str(folder / "model")
        summary["open_model_with"] = export(average.model)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        display.summary(_words(summary, draw is not None))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return summary


def _maximum(table: Tensor, accelerator: Accelerator) -> Tensor:
    """The element-wise maximum over all processes."""
    if accelerator.num_processes == 1:
        return table
    shared = table.to(accelerator.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return shared.to(table.device)


def _agreed(stop: Stop, accelerator: Accelerator) -> int:
    """The signal that told any process to stop, 0 if none did; the same answer on all of them."""
    if accelerator.num_processes == 1:
        return stop.signal
    return int(_maximum(torch.tensor(stop.signal), accelerator))


def _check(infobatch: InfoBatch, source: Source, epoch: int, step: int) -> None:
    """Stop before a loss that is not finite reaches the parameters (on an accelerator: soon after)."""
    try:
        infobatch.check()
    except FloatingPointError as error:
        raise Refused(
            f"epoch {epoch + 1}, step {step}: {error}; look at these samples of {source.train.name}, or lower --optim.lr",
            local=True,
        ) from None


def _same_run(values: dict[str, Any], config: Config, size: int, path: Path | None) -> None:
    """Refuse a checkpoint whose scores or parameters mean something else here."""
    for name in ("model", "adapter"):
        theirs, ours = values["config"][name], config.to_dict()[name]
        if theirs != ours:
            differing = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
            raise Refused(
                f"--resume {path}: the checkpoint is of another {name} ({name}.{differing[0]} is "
                f"{theirs.get(differing[0])!r} there, {ours.get(differing[0])!r} here); leave these settings out"
            )
    if values["size"] != size:
        raise Refused(f"--resume {path}: the checkpoint is of {values['size']} images, --data has {size} now")


def _changes(state: checkpoint.State, config: Config) -> str:
    """The settings that are not what they were, in words."""
    old, new = flat(state.values["config"]), flat(config.to_dict())
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if new[name] != old.get(name)]
    return f"; changed since: {', '.join(changed)}" if changed else ""


def _summary(
    config: Config,
    source: Source,
    visited: int,
    seconds: float,
    flops: int,
    step: int,
    parameters: int,
    journal: Journal,
) -> dict[str, Any]:
    """What the run did, in numbers."""
    size, evaluations = len(source.train), journal.read("evaluation")
    full = size * config.epochs
    quality = [{k: v for k, v in record.items() if k not in ("kind", "epoch")} for record in evaluations]
    return {
        "adapter": config.adapter.name,
        "policy": config.policy,
        "epochs": config.epochs,
        "dataset_size": size,
        "visited": visited,
        "full_visits": full,
        "saved_fraction": 1 - visited / full,
        "steps": step,
        "seconds": seconds,
        "images_per_second": visited / seconds if seconds else None,
        "parameters": parameters,
        "train_flops": flops * visited,
        "full_train_flops": flops * full,
        "bad_images": sorted(source.train.bad | source.test.bad),
        "quality_before": quality[0] if quality else {},
        "quality": quality[-1] if quality else {},
    }


def _words(summary: dict[str, Any], drawn: bool) -> list[tuple[str, str]]:
    """The summary for a person."""
    before, after = summary["quality_before"], summary["quality"]
    rows = [
        (
            "visited",
            f"{summary['visited']:,} images; everybody in {summary['epochs']} epochs would have been "
            f"{summary['full_visits']:,}: {summary['saved_fraction']:.1%} saved",
        ),
        ("time", f"{duration(summary['seconds'])} of training, {summary['images_per_second'] or 0:,.0f} images/s"),
        ("cost", f"{summary['train_flops']:.3g} training FLOPs instead of {summary['full_train_flops']:.3g}"),
    ]
    for name, value in after.items():
        if not isinstance(value, list):
            rows.append(("quality", f"{name} {value:.4f} (before training {before[name]:.4f})"))
    if summary["bad_images"]:
        rows.append(("bad images", f"{len(summary['bad_images'])} skipped, the first: {summary['bad_images'][0]}"))
    if drawn:
        rows.append(("pictures", summary["pictures"]))
    return [*rows, ("model", summary["model"]), ("open with", summary["open_model_with"])]

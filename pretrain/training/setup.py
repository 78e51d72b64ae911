"""From settings and objects to a run that can begin, or go on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Adapter, Batch
from pretrain.checkpoint import run_dir, storage
from pretrain.checkpoint.async_writer import Writer
from pretrain.checkpoint.ema import EMACollection
from pretrain.checkpoint.ema_snapshots import Snapshots
from pretrain.config import registry
from pretrain.config.build import build_infobatch
from pretrain.config.schema import Config, flat
from pretrain.core.console import Display
from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write
from pretrain.core.rng import SampleRNG
from pretrain.data.fingerprint import describe_changes, fingerprints
from pretrain.data.loader import EpochSampler, RestartingLoader, make_loader
from pretrain.data.preload import preload
from pretrain.data.sources import Source
from pretrain.distributed.collectives import all_gather_set, max_over_ranks, raise_on_all_ranks
from pretrain.distributed.launch import StopSignal
from pretrain.training.flops import SampleCost, profile_sample
from pretrain.training.micro_batches import find_micro_batch_size, micro_batch_size
from pretrain.training.nan_guard import NanGuard
from pretrain.training.optim import build_optimizer
from pretrain.training.references import with_references
from pretrain.training.reporter import Reporter
from pretrain.training.run import Run
from pretrain.training.state import Observer, TrainState

BACKEND = "inductor"  # of torch.compile


def setup(
    config: Config,
    adapter: Adapter,
    model: nn.Module,
    source: Source,
    accelerator: Any,
    stop: StopSignal,
    evaluators: Sequence[Callable[[nn.Module], dict[str, Any]]],
    draw: Callable[[nn.Module], Tensor] | None,
) -> Run:
    """Build, restore, distribute, read the data, and take hold of the run's directory; see `train` for the arguments.

    Raises:
        UserError: something that the user gave can't be used.
    """
    main, device = accelerator.is_main_process, accelerator.device
    micro_batch = micro_batch_size(config, accelerator.num_processes)
    with raise_on_all_ranks():
        resumed = run_dir.resume_from(config)
    display = Display(main)
    if source.report is not None:
        display.print(str(source.report))
    infobatch = build_infobatch(config, len(source.train), display.print)
    objective = with_references(config, adapter, source, device, display.print)
    cost = profile_objective(config, objective, model, source)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    state = TrainState(
        model,
        EMACollection(model, config.ema.halflife, config.ema.sigma_rel),
        build_optimizer(model, config.optim),
        infobatch,
        NanGuard(infobatch, source.train, device),
        accelerator.scaler,
        [evaluator for evaluator in evaluators if isinstance(evaluator, Observer)],
        source,
        fingerprints(source),
    )
    for observer in state.observers:
        observer.attach(model, device)
    with storage.restoring(resumed):
        if resumed is not None:
            check_data(resumed.path, resumed.state, state.fingerprints, source)
            state.load_state_dict(resumed.state, config, resumed.path)
    state.ema.to(device)
    if config.compile:
        compiled(model, device)
    model, optimizer = accelerator.prepare(model, state.optimizer)
    with raise_on_all_ranks():  # before it is tried how many images the rest of the memory holds
        state.seconds += preload(source.train, device, display.print, lambda: bool(stop.signal))
    if config.micro_batch == "auto":
        micro_batch = _tried(config, objective, model, state, accelerator, micro_batch)
        display.print(f"--micro-batch auto: {micro_batch} images at once")
    lock = _directory(config, source, resumed, main)
    reporter = Reporter(
        config, accelerator, display, cost.remembered, resumed.state.values["metrics"] if resumed else 0
    )
    run = Run(
        config,
        adapter,
        objective,
        source,
        accelerator,
        model,
        optimizer,
        state,
        RestartingLoader(lambda: make_loader(source.train, EpochSampler(infobatch), micro_batch), display.print),
        Writer(config.output_dir / "checkpoints", config.checkpoint, resumed and resumed.path, display.print),
        Snapshots(config.output_dir / "ema", state.ema, config.ema.snapshots, config.epochs, state.step, writes=main),
        reporter,
        evaluators,
        draw,
        stop,
        lock,
        cost.flops,
        is_fresh=resumed is None,
    )
    _announce(run, resumed)
    return run


def _tried(config: Config, adapter: Adapter, model: nn.Module, state: TrainState, accelerator: Any, most: int) -> int:
    """The images that every process's memory has room for at once."""
    images = state.source.train

    def step(batch: Batch) -> None:
        batch = images.augmented(batch, 0)
        with accelerator.no_sync(model):
            accelerator.backward(adapter(model, batch, SampleRNG(config.seed, index=batch.index)).loss.mean())

    with raise_on_all_ranks():
        fit = find_micro_batch_size(step, state.model, most, state.source.shape, state.source.classes)
    return -max_over_ranks(-fit)[0]


def _directory(config: Config, source: Source, resumed: storage.Found | None, main: bool) -> run_dir.Lock | None:
    """The lock of the run's directory, on rank 0; nobody writes before everybody has looked."""
    if len(all_gather_set({resumed.path.name} if resumed else set())) > 1:
        raise UserError("--resume: not all processes can read the newest checkpoint; name the one to go on from")
    with raise_on_all_ranks():
        if not main:
            return None
        lock = run_dir.prepare(config, resumed)
        _write_report(config.output_dir, source)
        return lock


def _write_report(folder: Path, source: Source) -> None:
    """Store how the data set was interpreted, and the names of its classes, as data.json."""
    try:
        with atomic_write(folder / "data.json") as file:
            report = source.report.to_dict() if source.report is not None else {}
            file.write_text(json.dumps(report | {"class_names": source.class_names}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output-dir {folder}: can't be written to: {error}") from None


def _announce(run: Run, resumed: storage.Found | None) -> None:
    config, source, say = run.config, run.source, run.reporter.display.print
    parameters = sum(parameter.numel() for parameter in run.state.model.parameters())
    say(
        f"{type(run.adapter).__name__} on {len(source.train):,} images {'x'.join(map(str, source.shape))} of "
        f"{config.data.source}, {parameters / 1e6:.2f} M parameters, {run.flops / 1e9:.3g} GFLOP a sample, "
        f"policy {config.policy}, {run.accelerator.num_processes} x {run.accelerator.device.type}"
    )
    if resumed is not None:
        for path, why in resumed.skipped.items():
            say(f"not used: {path.name}: {why}")
        say(f"going on from {resumed.path}: {run.where()}{changes(resumed.state, config)}")


def profile_objective(config: Config, adapter: Adapter, model: nn.Module, source: Source) -> SampleCost:
    """What a visit costs. Adapter and model meet here for the first time.

    Parameters that the loss does not reach are frozen: several processes would wait for their gradients.
    """
    try:
        cost = profile_sample(adapter, model, source.shape, source.classes)
    except ValueError as error:
        raise UserError(f"--adapter {config.adapter.name}: {error}") from None
    except (TypeError, AttributeError) as error:
        if {config.adapter.name, config.model.name} - {*registry.names("adapter"), *registry.names("model")}:
            raise  # the user's own code: the traceback says where
        raise UserError(
            f"--adapter {config.adapter.name} has no use for --model {config.model.name}: {error}"
        ) from None
    for parameter in cost.unreached:
        parameter.requires_grad_(False)
    return cost


def checkpoint_activations(model: nn.Module) -> None:
    """Have a network compute activations again in the backward pass (gradient checkpointing, Chen et al. 2016).

    Raises:
        UserError: it has no switch for that.
    """
    switch = getattr(model, "enable_gradient_checkpointing", None)
    if switch is None:
        raise UserError(
            f"--gradient-checkpointing: the network, a {type(model).__name__}, has no method "
            "enable_gradient_checkpointing(); leave it out, or give the network one"
        )
    switch()


def compiled(model: nn.Module, device: torch.device) -> None:
    """Have a network compiled as it is called; its parameters keep their names, and copies of it are as they were.

    Every shape of a batch is compiled for itself, the last ones of the epochs too, up to `torch._dynamo`'s limit of
    eight; what is beyond runs uncompiled.

    Raises:
        UserError: nothing can be compiled here, for want of a C++ compiler or of Triton.
    """
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.zeros(2, device=device))
    except Exception as error:  # whatever is wrong with the compilers
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"--compile: torch can't compile on this machine ({said}); leave it out") from None
    model.compile(dynamic=False, backend=BACKEND)


def changes(state: storage.State, config: Config) -> str:
    """The settings that are not what they were, in words."""
    old, new = flat(state.values["config"]), flat(config.to_dict())
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if new[name] != old.get(name)]
    return f"; changed since: {', '.join(changed)}" if changed else ""


def check_data(path: Path, state: storage.State, now: dict[str, Tensor], source: Source) -> None:
    """Compare with the state of the checkpoint `path`.

    Raises:
        UserError: the data set is another one now.
    """
    made_by, given = state.values["images"].get("autoencoder"), source.train.data.source
    if made_by != source.made_by:
        kind = (
            "latents of another autoencoder" if made_by and source.made_by else "no latents" if made_by else "latents"
        )
        raise UserError(f"--resume {path}: --data {given} holds {kind} now; bring back what the run began with")
    if what := describe_changes(state.tensors["data"], now, source):
        raise UserError(
            f"--resume {path}: the data set has changed: {what}; scores belong to images by their number, "
            "so bring it back, or start anew"
        )

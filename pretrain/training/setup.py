"""From settings, model and data to a `Run` that can start or continue."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Adapter, Batch
from pretrain.checkpoint import run_dir, storage
from pretrain.checkpoint.async_writer import CheckpointWriter
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
from pretrain.distributed.agreement import require_same_data
from pretrain.distributed.collectives import all_gather_set, max_over_ranks, raise_on_all_ranks
from pretrain.distributed.launch import StopSignal
from pretrain.distributed.sharding import is_sharded, shard
from pretrain.infobatch.sampler import InfoBatch
from pretrain.training.blocking import build_blocking
from pretrain.training.flops import SampleCost, profile_sample
from pretrain.training.micro_batches import find_micro_batch_size, micro_batch_size
from pretrain.training.nonfinite import NonFinite
from pretrain.training.optim import build_optimizer
from pretrain.training.references import with_references
from pretrain.training.reporter import Reporter
from pretrain.training.run import Run
from pretrain.training.state import Observer, TrainState, code_hashes

BACKEND = "inductor"  # of torch.compile
OF_TRAINING = ("pruning.", "blocking.", "optim.", "infobatch", "batch_size", "data.flip", "data.crop")


def setup(
    config: Config,
    adapter: Adapter,
    model: nn.Module,
    source: Source,
    accelerator: Any,
    stop_signal: StopSignal,
    evaluators: Sequence[Callable[[nn.Module], dict[str, Any]]],
    preview: Callable[[nn.Module], Tensor | None] | None,
) -> Run:
    """Build a run: its state, restored from a checkpoint if it is resumed, the data in memory, its directory locked.

    Nothing is written to the directory before all checks have passed. All ranks call it.

    Args:
        config, adapter, model, source, evaluators, preview: see `train`.
        accelerator: from `launch.start`.
        stop_signal: ends the preloading of images early.

    Raises:
        UserError: settings, data or files can't be used.
    """
    main, device = accelerator.is_main_process, accelerator.device
    micro_batch = micro_batch_size(config, accelerator.num_processes)
    hashes = same_data(source)
    with raise_on_all_ranks():
        resumed = run_dir.resume_from(config)
    display = Display(main)
    if source.report is not None:
        display.print(str(source.report))
    infobatch = build_infobatch(config, len(source.train), display.print, source.weights)
    cost = profile_objective(config, adapter, model, source)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    observers = [evaluator for evaluator in evaluators if isinstance(evaluator, Observer)]
    blocking = build_blocking(config, adapter, model, lambda: infobatch.progress)
    observers += [blocking] if blocking else []
    state = _initial_state(config, model, infobatch, source, hashes, accelerator, observers)
    with storage.restoring(resumed):
        if resumed is not None:
            check_epochs(resumed, config)
            check_data(resumed.path, resumed.state, state.fingerprints, source)
            state.load_state_dict(resumed.state, config, resumed.path)
    state.ema.to(device)
    if config.compile:
        compile_model(model, device)
    model, optimizer = _prepare(state, accelerator)
    with raise_on_all_ranks():  # before --micro-batch auto, which measures the memory that is left
        state.seconds += preload(source.train, device, display.print, lambda: bool(stop_signal.signal))
    objective, flops = with_references(config, adapter, source, device, cost.flops, display.print)
    state.flops = (flops, flops)
    if config.micro_batch == "auto":
        micro_batch = _largest_micro_batch(config, objective, model, state, accelerator, micro_batch)
        display.print(f"--micro-batch auto: {micro_batch} images per forward pass and process")
    if blocking:
        objective, state.flops = blocking.around(objective, state.model, source, flops, flops - cost.flops)
    lock = _lock_directory(config, source, resumed, main)
    metrics_length = resumed.state.values["metrics"] if resumed else 0
    reporter = Reporter(config, accelerator, display, cost.loss_name, metrics_length)
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
        CheckpointWriter(config.output_dir / "checkpoints", config.checkpoint, resumed and resumed.path, display.print),
        Snapshots(config.output_dir / "ema", state.ema, config.ema.snapshots, config.epochs, state.step, writes=main),
        reporter,
        evaluators,
        preview,
        stop_signal,
        lock,
        is_new=resumed is None or (state.step == 0 and resumed.state.values["metrics"] == 0),
    )
    _log_start(run, resumed)
    return run


def _initial_state(
    config: Config,
    model: nn.Module,
    infobatch: InfoBatch,
    source: Source,
    hashes: dict[str, Tensor],
    accelerator: Any,
    observers: Sequence[Observer],
) -> TrainState:
    ema = EMACollection(model, config.ema.halflife, config.ema.sigma_rel)
    if config.shard and accelerator.num_processes > 1:
        shard(model, accelerator.device)
        ema.shard_like(model)
    state = TrainState(
        model,
        ema,
        build_optimizer(model, config.optim),
        infobatch,
        NonFinite(infobatch, source.train, accelerator.device),
        accelerator.scaler,
        observers,
        source,
        hashes,
    )
    for observer in observers:
        observer.attach(model, accelerator.device)
    return state


def _prepare(state: TrainState, accelerator: Any) -> tuple[nn.Module, Any]:
    """The network and the optimizer as training uses them: on the device, in the run's precision, synchronized."""
    if not is_sharded(state.model):
        return accelerator.prepare(state.model, state.optimizer)
    # Already on the device, and synchronized; otherwise accelerate would wrap it in DistributedDataParallel.
    model = accelerator.prepare_model(state.model, device_placement=False, evaluation_mode=True)
    return model, accelerator.prepare_optimizer(state.optimizer)


def _largest_micro_batch(
    config: Config, adapter: Adapter, model: nn.Module, state: TrainState, accelerator: Any, limit: int
) -> int:
    """The largest micro-batch, at most `limit`, that fits into the memory of every process."""
    images = state.source.train

    def step(batch: Batch) -> None:
        batch = images.augmented(batch, 0)
        with accelerator.no_sync(model):
            accelerator.backward(adapter(model, batch, SampleRNG(config.seed, index=batch.index)).loss.mean())

    with raise_on_all_ranks():
        size = find_micro_batch_size(step, state.model, limit, state.source.shape, state.source.classes)
    return -max_over_ranks(-size)[0]


def _lock_directory(
    config: Config, source: Source, resumed: storage.FoundCheckpoint | None, main: bool
) -> run_dir.Lock | None:
    """Lock and prepare the run's directory, on rank 0, after all ranks have found the same checkpoint in it."""
    if len(all_gather_set({resumed.path.name if resumed else ""})) > 1:
        raise UserError("--resume: not all processes can read the newest checkpoint; name the one to resume from")
    if resumed is not None:
        with storage.restoring(resumed):
            check_finished(resumed, config)
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


def _log_start(run: Run, resumed: storage.FoundCheckpoint | None) -> None:
    config, source, log = run.config, run.source, run.reporter.display.print
    parameters = sum(parameter.numel() for parameter in run.state.model.parameters())
    world, gflops = run.accelerator.num_processes, run.state.flops[0] / 1e9
    processes = f"{world} {'process' if world == 1 else 'processes'} on {run.accelerator.device.type}"
    log(
        f"{type(run.adapter).__name__} on {len(source.train):,} images of {'x'.join(map(str, source.shape))} "
        f"({source.train.data.source}), {parameters / 1e6:.2f} M parameters, {gflops:.3g} training GFLOPs per sample, "
        f"{config.optim.name} with learning rate {config.peak_lr:g}, policy {config.policy}, {processes}"
    )
    if resumed is not None:
        for path, why in resumed.skipped.items():
            log(f"checkpoint not used: {path.name}: {why}")
        end = is_finished(resumed, config)
        where = f"the run is finished; more epochs continue it, --epochs {2 * config.epochs}" if end else run.position()
        log(f"resuming from {resumed.path}: {where}{changed_settings(resumed.state, config)}")


def profile_objective(config: Config, adapter: Adapter, model: nn.Module, source: Source) -> SampleCost:
    """Run the adapter and the model once, on one sample, to count the FLOPs.

    Parameters that the loss does not depend on are frozen, because DistributedDataParallel waits for their gradients.

    Raises:
        UserError: adapter and model don't fit together, or the adapter does not return one loss per sample.
    """
    try:
        cost = profile_sample(adapter, model, source.shape, source.classes)
    except ValueError as error:
        raise UserError(f"--adapter {config.adapter.name}: {error}") from None
    except (TypeError, AttributeError) as error:
        if {config.adapter.name, config.model.name} - {*registry.names("adapter"), *registry.names("model")}:
            raise  # code of the user's own needs its traceback
        raise UserError(
            f"--adapter {config.adapter.name} can't train --model {config.model.name}: {error}; mae is for networks of "
            "train_mae.py, the other objectives are for those of train_diffusion.py"
        ) from None
    for parameter in cost.unused:
        parameter.requires_grad_(False)
    return cost


def checkpoint_activations(model: nn.Module) -> None:
    """Switch on gradient checkpointing (Chen et al. 2016): activations are recomputed in the backward pass.

    Raises:
        UserError: the network has no method `enable_gradient_checkpointing`.
    """
    switch = getattr(model, "enable_gradient_checkpointing", None)
    if switch is None:
        raise UserError(
            f"--gradient-checkpointing: the network, a {type(model).__name__}, has no method "
            "enable_gradient_checkpointing(); leave the setting out, or add the method"
        )
    switch()


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile a network in place by torch.compile; names of parameters and copies made before stay as they are.

    Each shape of a batch, such as that of an epoch's last one, is compiled separately, up to `torch._dynamo`'s limit of
    eight; further shapes run uncompiled.

    Raises:
        UserError: torch.compile does not work here, for example without a C++ compiler or Triton.
    """
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.zeros(2, device=device))
    except Exception as error:  # each backend has its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"--compile: torch can't compile on this machine ({reason}); leave it out") from None
    model.compile(dynamic=False, backend=BACKEND)


def changed_settings(state: storage.State, config: Config) -> str:
    """A message about settings and files of code that differ from those of a checkpoint; "" if there are none."""
    old, new = flat(state.values["config"]), flat(config.to_dict())
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if new[name] != old.get(name)]
    known = [*state.values["code"].values()]  # of a damaged checkpoint, anything
    changed += [f"the code of {name}" for name, digest in code_hashes(config).items() if digest not in known]
    return f"; changed since the checkpoint: {', '.join(changed)}" if changed else ""


def same_data(source: Source) -> dict[str, Tensor]:
    """Return the fingerprints of the data, and check that they are the same on all ranks, which all call it.

    Raises:
        UserError: they are not.
    """
    hashes = fingerprints(source)
    for kind, images in (("train", source.train), ("test", source.test)):
        words = "training images" if kind == "train" else "validation images"
        if (sample := require_same_data(images.data.source, hashes[kind], words)) is not None:
            raise UserError(
                f"the processes have different data: --data {images.data.source}: the {words} differ, for example "
                f"{images.name_of(sample)}; give all processes the same data"
            )
    return hashes


def check_epochs(resumed: storage.FoundCheckpoint, config: Config) -> None:
    """Check that the checkpoint has no more epochs than the run is to have.

    Raises:
        UserError: it has.
    """
    position = resumed.state.values["infobatch"]
    begun = position["epoch"] + (position["seen"] > 0)
    if begun > config.epochs:
        raise UserError(
            f"--resume {resumed.path}: --epochs {config.epochs}, but the run is in epoch {begun} already; give at "
            f"least {begun}, or start another run"
        )


def is_finished(resumed: storage.FoundCheckpoint, config: Config) -> bool:
    """Whether a checkpoint is that of the end of a run."""
    return resumed.state.values["infobatch"]["epoch"] >= config.epochs


def check_finished(resumed: storage.FoundCheckpoint, config: Config) -> None:
    """Check that a finished run has the settings that it was trained with: nothing is trained with others.

    Raises:
        UserError: it has others.
    """
    if not is_finished(resumed, config):
        return
    old, new = flat(resumed.state.values["config"]), flat(config.to_dict())
    old["pruning.policy"], new["pruning.policy"] = Path(old["pruning.policy"]).name, Path(new["pruning.policy"]).name
    changed = [n for n in new if n in old and n.startswith(OF_TRAINING) and new[n] != old[n]]
    if changed:
        name = changed[0]
        raise UserError(
            f"--resume {resumed.path}: the run is finished, so nothing would be trained with "
            f"--{name.replace('_', '-')} {new[name]} (it was {old[name]}); add --epochs, or start another run"
        )


def check_data(path: Path, state: storage.State, now: dict[str, Tensor], source: Source) -> None:
    """Compare the data set with the one of a checkpoint.

    Args:
        path: of the checkpoint, for error messages.
        state: of the checkpoint.
        now: fingerprints of the data set, see `pretrain.data.fingerprint`.
        source: the data set.

    Raises:
        UserError: they differ.
    """
    made_by, name = state.values["images"].get("autoencoder"), source.train.data.source
    if made_by != source.made_by:
        kind = (
            "latents of another autoencoder" if made_by and source.made_by else "no latents" if made_by else "latents"
        )
        raise UserError(f"--resume {path}: --data {name} has {kind} now; restore the data that the run began with")
    if state.values["images"].get("subset") != (source.subset and source.subset.digest):
        given = f"--data.subset {source.subset.file}" if source.subset else "no --data.subset"
        raise UserError(
            f"--resume {path}: {given}, and the run began with another subset of the data or with all of it; scores "
            "belong to images by their index, so give what it began with, or start a new run"
        )
    if what := describe_changes(state.tensors["data"], now, source):
        raise UserError(
            f"--resume {path}: the data set has changed: {what}; scores belong to images by their index, "
            "so restore it, or start a new run"
        )

"""Loading a finished or stopped run from its folder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from pretrain.adapters import Adapter
from pretrain.checkpoint import storage
from pretrain.checkpoint.ema_snapshots import reconstruct
from pretrain.config.build import build_model
from pretrain.config.cli import parse
from pretrain.config.limits import require_in_range
from pretrain.config.schema import Config, Data
from pretrain.core.errors import UserError, warn
from pretrain.core.files import expand, read_json
from pretrain.data.autoencoder import SUBFOLDERS, Autoencoder, open_autoencoder
from pretrain.data.fingerprint import describe_changes, fingerprints
from pretrain.data.sources import Source, is_cache, open_data


@dataclass(frozen=True)
class LoadedRun:
    """A run, as of one of its checkpoints.

    Attributes:
        folder: of the run.
        config: its settings.
        adapter: the objective.
        model: the network with the parameters of an EMA, on the CPU, in evaluation mode.
        shape: (C, H, W) of the images, or of their latents.
        classes: number of classes that the network is conditioned on; 0: none.
        state: of the checkpoint.
    """

    folder: Path
    config: Config
    adapter: Adapter
    model: nn.Module
    shape: tuple[int, int, int]
    classes: int
    state: storage.State

    @cached_property
    def source(self) -> Source:
        """The run's data set, opened on first use.

        Raises:
            UserError: it is missing, or has changed.
        """
        if self.state.values["images"].get("opened_by_program"):
            raise UserError(
                f"{self.folder}: the run's images were opened by a program of its own, not by --data; evaluate the "
                "model in that program"
            )
        try:
            source = open_data(self.config.data, self.config.seed)
        except UserError as error:
            raise UserError(f"{self.folder}: the run's data can't be opened: {error}", local=error.local) from None
        if source.shape != self.shape or source.made_by != self.state.values["images"].get("autoencoder"):
            kind = "images of another shape" if source.shape != self.shape else "latents of another autoencoder"
            raise UserError(
                f"{self.folder}: the run's data, {self.config.data.source}, are {kind} now; restore the data that it "
                "was trained on"
            )
        if changes := describe_changes(self.state.tensors["data"], fingerprints(source), source):
            warn(f"{self.folder}: the run's data, {self.config.data.source}, have changed since: {changes}")
        return source

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, from the run's data.json; empty if the network has no classes, or it has no names."""
        try:
            found = read_json(self.folder / "data.json")["class_names"]
        except (OSError, ValueError, TypeError, KeyError):
            return ()
        right = isinstance(found, list) and len(found) == self.classes and all(isinstance(name, str) for name in found)
        return tuple(found) if right else ()

    @cached_property
    def whole_source(self) -> Source:
        """The run's data set with all of its training images, also if it was trained on a subset.

        Raises:
            UserError: it is missing, or has changed.
        """
        if self.config.data.subset is None or self.state.values["images"].get("opened_by_program"):
            return self.source
        return open_data(replace(self.config.data, subset=None), self.config.seed)

    def other_source(self, settings: Mapping[str, Any]) -> Source:
        """Another data set, with its images in the size and channels of the run's.

        Labels are numbered by the classes that the network is conditioned on, if it is; else by the data set's.

        Args:
            settings: `source`, and those of `Data` that differ from their defaults. The run's are `flip`, `crop`,
                `held_out`, `on_bad_image` and `workers`, where they are not given.

        Raises:
            UserError: it can't be opened, or its images can't be brought to the run's shape.
        """
        name, own, made_by = settings["source"], self.config.data, self.state.values["images"].get("autoencoder")
        if is_cache(name) != (made_by is not None):
            theirs, ours = ("latents", "images") if made_by is None else ("no latents", "latents")
            raise UserError(f"--data {name}: it holds {theirs}, and the run was trained on {ours}; give {ours}")
        if self.classes and not self.class_names:
            raise UserError(
                f"--data {name}: the network is conditioned on classes, and the run's data.json does not name them; "
                "restore it"
            )
        kept = {key: getattr(own, key) for key in ("held_out", "on_bad_image", "workers")}
        if made_by is None:
            channels, height, width = self.shape
            kept |= {"size": height if height == width else None, "channels": channels}
            kept |= {"flip": own.flip, "crop": own.crop}
        try:
            require_in_range({f"data.{key}": value for key, value in settings.items()})
            data = Data(**kept | dict(settings))
        except ValueError as error:
            raise UserError(f"--{error}") from None
        found = open_data(data, self.config.seed, self.class_names if self.classes else None)
        if found.made_by != made_by:
            raise UserError(f"--data {name}: its latents are of another autoencoder than those of the run; encode them")
        if found.shape != self.shape:
            theirs, ours = ("x".join(map(str, shape)) for shape in (found.shape, self.shape))
            raise UserError(
                f"--data {name}: its images are {theirs}, those of the run {ours}; give images of that size"
            )
        if self.classes and found.class_names != self.class_names:  # latents, whose labels are numbers already
            raise UserError(f"--data {name}: its classes are not those of the run in their order; encode such images")
        return found

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """The decoder of the model's latents: the data set's, or, if that is missing, the exported model's.

        Returns:
            None for a model of images.

        Raises:
            UserError: it is missing, or is another one.
        """
        made_by = self.state.values["images"].get("autoencoder")
        if made_by is None:
            return None
        folders = [expand(self.config.data.source) / "vae"]
        folders += [self.folder / "model" / name for name in SUBFOLDERS]
        for folder in (folder for folder in folders if (folder / "config.json").is_file()):
            if (found := open_autoencoder(folder)).fingerprint == made_by:
                return found
        raise UserError(
            f"{self.folder}: the run was trained on latents, and their autoencoder is in none of "
            f"{', '.join(map(str, folders))}; restore it there"
        )


def load_run(folder: Path, sigma_rel: float | None = None) -> LoadedRun:
    """Load the newest undamaged checkpoint of a run; print a warning about newer ones that are damaged.

    Args:
        folder: of the run.
        sigma_rel: of the power-function EMA to load, reconstructed from the run's snapshots; None: the exponential EMA.

    Raises:
        UserError: there is no checkpoint, or none can be read, or sigma_rel is out of its range.
    """
    found = storage.newest_whole(folder / "checkpoints")
    if found is None or not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: it is not the folder of a run with a checkpoint; name a run's --output-dir")
    recipe = ["--config", str(folder / "config.yaml")]
    config = parse(recipe, adapter="flow", model="unet", recipe=folder / "config.yaml", output_dir=str(folder), help="")
    path, state, skipped = found
    for newer, why in skipped.items():
        warn(f"{newer.name} is not used: {why}; using {path.name}")
    with storage.restoring(found):
        channels, height, width = state.values["images"]["shape"]
        shape, classes = (channels, height, width), state.values["images"]["classes"] if config.class_conditional else 0
        model = build_model(config, shape, classes).eval()
        try:
            parameters = state.read("ema") if sigma_rel is None else reconstruct(folder, sigma_rel)[0]
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"--sigma-rel: {error}") from None
        storage.load_parameters(model, parameters, path)
    return LoadedRun(folder, config, config.component("adapter"), model, shape, classes, state)

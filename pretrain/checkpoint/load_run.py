"""A run that was trained, opened again."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from pretrain.adapters import Adapter
from pretrain.checkpoint import storage
from pretrain.checkpoint.ema_snapshots import reconstruct
from pretrain.config.build import build_model
from pretrain.config.cli import parse
from pretrain.config.schema import Config
from pretrain.core.errors import UserError, warn
from pretrain.data.autoencoder import SUBFOLDERS, Autoencoder, open_autoencoder
from pretrain.data.sources import Source, open_data


@dataclass(frozen=True)
class LoadedRun:
    """What a run's folder holds.

    Attributes:
        folder: where it lies.
        config: its settings.
        adapter: the objective.
        model: the network with the averaged parameters, in evaluation mode.
        shape: (C, H, W) of the images, or of their latents.
        classes: that the network knows; 0: none.
        state: the checkpoint that the parameters are from.
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
        """The data, opened when it is asked for.

        Raises:
            UserError: it is not there any more, or is another one.
        """
        try:
            source = open_data(self.config.data, self.config.seed)
        except UserError as refusal:
            raise UserError(f"{self.folder}: the run's data can't be had: {refusal}", local=refusal.local) from None
        if source.shape != self.shape or source.made_by != self.state.values["images"].get("autoencoder"):
            kind = "images of another shape" if source.shape != self.shape else "latents of another autoencoder"
            raise UserError(
                f"{self.folder}: the run's data, {self.config.data.source}, are {kind} now; put back what it was "
                "trained on"
            )
        return source

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """What decodes the model's latents: that of the data, or, where they are gone, of the exported model.

        Raises:
            UserError: it is not there any more, or is another one.
        """
        made_by = self.state.values["images"].get("autoencoder")
        if made_by is None:
            return None
        folders = [Path(self.config.data.source).expanduser() / "vae"]
        folders += [self.folder / "model" / name for name in SUBFOLDERS]
        for folder in (folder for folder in folders if (folder / "config.json").is_file()):
            if (found := open_autoencoder(folder)).fingerprint == made_by:
                return found
        raise UserError(
            f"{self.folder}: the run is of latents, and the autoencoder that made them is not in any of "
            f"{', '.join(map(str, folders))}; put it back there"
        )


def load_run(folder: Path, sigma_rel: float | None = None) -> LoadedRun:
    """The newest checkpoint of the run in `folder` that is whole; newer ones that are not are warned of.

    Args:
        folder: the run's.
        sigma_rel: of the power-function EMA to open, made from the run's snapshots; None: the plain average.

    Raises:
        UserError: there is none, or it can't be read.
    """
    found = storage.newest_whole(folder / "checkpoints")
    if found is None or not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: there is no run with a checkpoint there; name the --output-dir of one")
    recipe = ["--config", str(folder / "config.yaml")]
    config = parse(recipe, adapter="flow", model="unet", recipe=folder / "config.yaml", output_dir=str(folder), help="")
    path, state, skipped = found
    for newer, why in skipped.items():
        warn(f"{newer.name} is not used: {why}; going by {path.name}")
    with storage.restoring(found):
        channels, height, width = state.values["images"]["shape"]
        shape, classes = (channels, height, width), state.values["images"]["classes"] if config.class_conditional else 0
        model = build_model(config, shape, classes).eval()
        try:
            average = state.tensors["ema"] if sigma_rel is None else reconstruct(folder, sigma_rel)[0]
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"--sigma-rel: {error}") from None
        storage.fill(model, average, path)
    return LoadedRun(folder, config, config.component("adapter"), model, shape, classes, state)

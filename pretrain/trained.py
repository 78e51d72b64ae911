"""A run that was trained, opened again."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pretrain import checkpoint
from pretrain.adapter import Adapter
from pretrain.command_line import parse
from pretrain.config import Config
from pretrain.errors import Refused
from pretrain.sources import Source, open_data
from pretrain.training import build


@dataclass(frozen=True)
class Trained:
    """What a run's folder holds.

    Attributes:
        config: its settings.
        adapter: the objective.
        model: the network with the averaged parameters, in evaluation mode.
        source: the data.
        state: the checkpoint that the parameters are from.
    """

    config: Config
    adapter: Adapter
    model: nn.Module
    source: Source
    state: checkpoint.State


def open_run(folder: Path) -> Trained:
    """The newest checkpoint of the run in `folder`.

    Raises:
        Refused: there is none, or it can't be read.
    """
    path = checkpoint.newest(folder / "checkpoints")
    if path is None or not (folder / "config.yaml").is_file():
        raise Refused(f"{folder}: there is no run with a checkpoint there; name the --output-dir of one")
    recipe = ["--config", str(folder / "config.yaml")]
    config = parse(recipe, adapter="flow", model="unet", recipe=folder / "config.yaml", output_dir=str(folder), help="")
    source = open_data(config.data, config.seed)
    model = build(config, source.shape, source.classes if config.conditional else 0).eval()
    state = checkpoint.load(path)
    checkpoint.fill(model, state.tensors["average"], path)
    return Trained(config, config.part("adapter"), model, source, state)

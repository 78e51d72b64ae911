"""A run that starts from weights: --model.init."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from pretrain.checkpoint import storage
from pretrain.config.schema import Config
from pretrain.core.console import Display
from pretrain.export import denoiser_weights, mae_weights


def start_from_weights(config: Config, model: nn.Module, adapter: object) -> None:
    """Initialize the network of a new run from the weights that its settings name, if any, and print what was taken.

    A run that is resumed has its weights in its checkpoint, and the file may be gone.

    Args:
        config: of the run.
        model: its new network, a masked autoencoder if it has an `encoder`.
        adapter: its objective.

    Raises:
        UserError: the weights can't be read, or are of another network.
    """
    starts = config.resume == "auto" and storage.newest(config.output_dir / "checkpoints") is None
    section, flag = config.model, "--model"
    if base := getattr(section, "base", None):  # of an N:M sparse network
        section, flag = getattr(section, str(base), None), f"{flag}.{base}"
    init: Any = getattr(section, "init", None)
    if not init or not (config.resume is None or starts):
        return
    if hasattr(model, "encoder"):
        message = mae_weights.start_from(model, Path(init), config.model.encoder)
    else:
        message = denoiser_weights.start_from(model, adapter, Path(init), f"{flag}.init")
    Display(os.environ.get("RANK", "0") == "0").print(message)

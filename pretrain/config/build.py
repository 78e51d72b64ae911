"""From settings to objects: the network and the scheduler of epochs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pretrain.adapters import Prepares
from pretrain.config import registry
from pretrain.config.schema import Config, Pruning
from pretrain.core.errors import UserError
from pretrain.core.rng import fold_seed
from pretrain.infobatch.sampler import InfoBatch


def build_model(config: Config, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The config's network with the parameters that its seed gives, and those of the adapter, if it has some.

    Raises:
        UserError: it doesn't fit the images.
    """
    torch.manual_seed(fold_seed(config.seed))
    try:
        model = config.part("model").build(shape, classes)
    except ValueError as error:
        raise UserError(str(error)) from None
    adapter = config.part("adapter")
    return adapter.prepare(model) if isinstance(adapter, Prepares) else model


def build_infobatch(config: Config, size: int, warn: Callable[[str], Any]) -> InfoBatch:
    """What plans a run's epochs.

    Args:
        config: the run's.
        size: samples.
        warn: called with what the user should know.

    Raises:
        UserError: the policy can't be had with these settings.
    """
    pruning = config.pruning if config.infobatch else Pruning()  # a recipe's budget is not for full training
    settings = {"prune_ratio": pruning.prune_ratio, "over": pruning.over}
    policy = registry.policy(config.policy)
    try:
        return InfoBatch(
            size,
            epochs=config.epochs,
            policy=policy,
            budget=pruning.budget,
            anneal=pruning.anneal,
            smoothing=pruning.smoothing,
            seed=config.seed,
            warn=warn,
            **{name: value for name, value in settings.items() if value is not None},
        )
    except ValueError as error:
        raise UserError(f"--pruning.policy {config.policy}: {error}") from None

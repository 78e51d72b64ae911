"""From settings to objects: the network and InfoBatch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Prepares
from pretrain.config import registry
from pretrain.config.schema import Config, Pruning
from pretrain.core.errors import UserError
from pretrain.core.rng import fold_seed
from pretrain.infobatch.policies import with_settings
from pretrain.infobatch.sampler import InfoBatch


def build_model(config: Config, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network, initialized by the run's seed, in the adapter's module if that has parameters.

    Args:
        config: of the run.
        shape: (C, H, W) of an image or latent.
        classes: number of labels that condition it; 0: none.

    Raises:
        UserError: the network can't have these settings for such images or this objective.
    """
    torch.manual_seed(fold_seed(config.seed))
    part, adapter = config.component("model"), config.component("adapter")
    try:
        if hasattr(part, "check_adapter"):
            part.check_adapter(adapter)
        model = part.build(shape, classes)
    except ValueError as error:
        raise UserError(str(error)) from None
    return adapter.prepare(model) if isinstance(adapter, Prepares) else model


def check_policy(config: Config) -> None:
    """Check the policy and its settings, before images are read.

    Raises:
        UserError: there is no such policy, or it can't have these settings.
    """
    pruning, policy = _pruning(config), registry.load_policy(config.policy)
    try:
        with_settings(policy, pruning.budget is not None, _settings(pruning))
    except ValueError as error:
        raise UserError(f"--pruning.policy {config.policy}: {error}") from None


def _pruning(config: Config) -> Pruning:
    """The settings of the policy: the recipe's concern pruned training only."""
    return config.pruning if config.infobatch else Pruning()


def _settings(pruning: Pruning) -> dict[str, Any]:
    """The settings that only some policies have, as far as they are given."""
    settings = {"prune_ratio": pruning.prune_ratio, "over": pruning.over}
    return {name: value for name, value in settings.items() if value is not None}


def build_infobatch(config: Config, size: int, warn: Callable[[str], Any], weights: Tensor | None = None) -> InfoBatch:
    """The InfoBatch of a run.

    Args:
        config: of the run.
        size: number of training images.
        warn: called with messages for the user.
        weights: float32 [size]; what each image counts for. None: all alike.

    Raises:
        UserError: the policy can't have these settings.
    """
    best = getattr(config.component("adapter"), "infobatch", {}).get("pruning.policy")
    if config.infobatch and config.policy == best == "full":
        warn(
            f"--infobatch uses every sample: for {config.adapter.name} with these settings no policy is known that "
            "saves more than shorter training (docs/policies.md); to prune nevertheless, give --pruning.policy"
        )
    pruning = _pruning(config)
    policy = registry.load_policy(config.policy)
    try:
        return InfoBatch(
            size,
            epochs=config.epochs,
            policy=policy,
            budget=pruning.budget,
            anneal=pruning.anneal,
            smoothing=pruning.smoothing,
            seed=config.seed,
            weights=weights,
            warn=warn,
            **_settings(pruning),
        )
    except ValueError as error:
        raise UserError(f"--pruning.policy {config.policy}: {error}") from None

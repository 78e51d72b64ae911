"""AdamW and its learning rate."""

import math

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from pretrain.config.schema import Optim


def adamw(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """The optimizer of the parameters that are trained; vectors, such as biases, do not decay."""
    vectors = [name for name, parameter in model.named_parameters() if parameter.squeeze().ndim <= 1]
    groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=vectors)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)


def warmup_cosine(progress: float, warmup: float) -> float:
    """Share of the peak rate at `progress` in [0, 1]: a linear rise over `warmup`, then half a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

"""AdamW and the schedule of its learning rate."""

import math

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from pretrain.config.schema import Optim


def adamw(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW for the parameters that require a gradient; biases, norms and other vectors have no weight decay."""
    vectors = [name for name, parameter in model.named_parameters() if parameter.squeeze().ndim <= 1]
    groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=vectors)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)


def warmup_cosine(progress: float, warmup: float) -> float:
    """Factor of the peak learning rate: a linear rise from 0 to 1, then a cosine decay to 0.

    Args:
        progress: of the training, in [0, 1].
        warmup: share of the training in which it rises, in [0, 1).
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

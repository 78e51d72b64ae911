"""What a visit costs."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.adapter import Adapter, Batch, Losses
from pretrain.rng import Draws


class Visit(NamedTuple):
    """What one visit comes to.

    Attributes:
        flops: floating-point operations of its forward and backward pass: counted, not estimated; a multiply-add is
            two, and what is not a matrix product or a convolution is not counted.
        unreached: parameters that the loss does not depend on.
        remembered: "score" where the adapter returns one, else "loss".
    """

    flops: int
    unreached: list[nn.Parameter]
    remembered: str


def first_visit(adapter: Adapter, model: nn.Module, shape: tuple[int, int, int], classes: int) -> Visit:
    """What one visit comes to, by running the adapter once on one black image.

    The parameters' gradients are left empty.

    Raises:
        ValueError: the adapter does not return one loss per sample.
    """
    device = next(model.parameters()).device
    one = torch.zeros(1, dtype=torch.int64, device=device)
    image = torch.zeros(1, *shape, device=device)
    batch = Batch(image, one if classes else one - 1, one, torch.full((1,), 0.5, device=device))
    with FlopCounterMode(display=False) as counter:
        losses = adapter(model, batch, Draws(0, index=one))
        if not isinstance(losses, Losses) or losses.loss.shape != (1,):
            given = (
                f"a loss of shape {tuple(losses.loss.shape)}" if isinstance(losses, Losses) else type(losses).__name__
            )
            raise ValueError(f"it must return Losses with one loss per sample, shape (1,) for one image; got {given}")
        losses.loss.sum().backward()
    unreached = [parameter for parameter in model.parameters() if parameter.grad is None and parameter.requires_grad]
    model.zero_grad(set_to_none=True)
    return Visit(counter.get_total_flops(), unreached, "loss" if losses.score is None else "score")

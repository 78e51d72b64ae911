"""What a visit costs."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.adapter import Adapter, Batch
from pretrain.rng import Draws


def train_flops(adapter: Adapter, model: nn.Module, shape: tuple[int, int, int], classes: int) -> int:
    """Floating-point operations of one image's forward and backward pass; a multiply-add counts as two.

    Counted, not estimated, by running the adapter once on one black image; what is not a matrix product or a
    convolution is not counted. The parameters' gradients are left empty.
    """
    device = next(model.parameters()).device
    one = torch.zeros(1, dtype=torch.int64, device=device)
    image = torch.zeros(1, *shape, device=device)
    batch = Batch(image, one if classes else one - 1, one, torch.full((1,), 0.5, device=device))
    with FlopCounterMode(display=False) as counter:
        adapter(model, batch, Draws(0, index=one)).loss.sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()

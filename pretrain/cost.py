"""What a visit costs."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.adapter import Adapter, Batch, Losses
from pretrain.rng import Draws


def first_visit(
    adapter: Adapter, model: nn.Module, shape: tuple[int, int, int], classes: int
) -> tuple[int, list[nn.Parameter]]:
    """Floating-point operations of one image's forward and backward pass, and the parameters that it doesn't reach.

    Counted, not estimated, by running the adapter once on one black image; a multiply-add counts as two, and what is
    not a matrix product or a convolution is not counted. The parameters' gradients are left empty.

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
    return counter.get_total_flops(), unreached

"""How many images a process pushes through the network at once."""

from collections.abc import Callable

import torch
from torch import nn

from pretrain.adapters import Batch
from pretrain.config.schema import Config
from pretrain.core.errors import UserError, is_out_of_memory

COPIES = 3  # of the parameters, that a trial leaves room for: the optimizer's two, and one to work with


def micro_batch_size(config: Config, world: int) -> int:
    """Images that each process pushes through at once; where that is to be found out, the most it could be.

    Raises:
        UserError: the optimizer step's images are not that many times a whole number on each process.
    """
    share, rest = divmod(config.batch_size, world)
    size = min(config.micro_batch, share) if isinstance(config.micro_batch, int) else share
    if rest or not share:
        raise UserError(
            f"--batch-size {config.batch_size} can't be shared by {world} processes; give a multiple of {world}"
        )
    if share % size:
        raise UserError(
            f"--micro-batch {size} does not divide the {share} images of --batch-size that each process has; "
            f"give a divisor of {share}, or auto"
        )
    return size


def find_micro_batch_size(
    step: Callable[[Batch], None], model: nn.Module, share: int, shape: tuple[int, ...], classes: int
) -> int:
    """The most images that can be pushed through at once: all of a share, or half of it, a quarter, ...

    Each size is tried on black images. What a trial does to gradients and buffers is undone.

    Args:
        step: forward and backward pass of a batch.
        model: what it is of, where it is to be trained.
        share: images of an optimizer step on this process; what is returned divides it.
        shape: of an image, (C, H, W).
        classes: how many, 0 for none.

    Raises:
        UserError: there is no room for a single one.
    """
    device = next(model.parameters()).device
    buffers = [buffer.clone() for buffer in model.buffers()]

    def fits(size: int) -> bool:
        index = torch.arange(size, device=device)
        label = index % classes if classes else torch.full_like(index, -1)
        try:
            kept = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(COPIES)]
            image = torch.zeros(size, *shape, device=device)
            step(Batch(image, label, index, torch.full((size,), 0.5, device=device)))
            del kept
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
        return True

    size = share
    while not fits(size):
        if size == 1:
            raise UserError(
                "--micro-batch auto: memory runs out with a single image at once; train with --gradient-checkpointing "
                "or a smaller network"
            )
        size = next(n for n in range(size // 2, 0, -1) if share % n == 0)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the sizes that did not fit
    return size

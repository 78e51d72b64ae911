"""The micro-batch size: images per forward pass and process."""

from collections.abc import Callable

import torch
from torch import nn

from pretrain.adapters import Batch
from pretrain.config.schema import Config
from pretrain.core.errors import UserError, is_out_of_memory

PARAMETER_COPIES = 3  # that a trial leaves memory for: AdamW's two moments, and temporary tensors of its step


def micro_batch_size(config: Config, world: int) -> int:
    """The micro-batch size that the settings ask for; with `auto` the largest one possible.

    Args:
        config: settings of the run.
        world: number of processes.

    Raises:
        UserError: the batch size is not a multiple of the number of processes, or the micro-batch size does not divide
            a process's share of it.
    """
    share, remainder = divmod(config.batch_size, world)
    size = min(config.micro_batch, share) if isinstance(config.micro_batch, int) else share
    if remainder or not share:
        raise UserError(
            f"--batch-size {config.batch_size} can't be divided among {world} processes; give a multiple of {world}"
        )
    if share % size:
        raise UserError(
            f"--micro-batch {size} does not divide the {share} images of --batch-size that each process has; "
            f"give a divisor of {share}, or auto"
        )
    return size


def find_micro_batch_size(
    step: Callable[[Batch], None], model: nn.Module, share: int, shape: tuple[int, int, int], classes: int
) -> int:
    """The largest micro-batch that fits into memory, by trying `share`, half of it, a quarter, ... on black images.

    Gradients and buffers of the model are restored after each trial.

    Args:
        step: forward and backward pass of a batch.
        model: the network, on its device.
        share: images of an optimizer step on this process; the result divides it.
        shape: of an image, (C, H, W).
        classes: number of classes, 0 for none.

    Raises:
        UserError: not even one image fits.
    """
    device = next(model.parameters()).device
    buffers = [buffer.clone() for buffer in model.buffers()]

    def fits(size: int) -> bool:
        index = torch.arange(size, device=device)
        label = index % classes if classes else torch.full_like(index, -1)
        try:
            reserved = [
                torch.empty_like(parameter) for parameter in model.parameters() for _ in range(PARAMETER_COPIES)
            ]
            image = torch.zeros(size, *shape, device=device)
            step(Batch(image, label, index, torch.full((size,), 0.5, device=device)))
            del reserved
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
                "--micro-batch auto: memory runs out with a single image; train with --gradient-checkpointing or a "
                "smaller network"
            )
        size = next(n for n in range(size // 2, 0, -1) if share % n == 0)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the sizes that did not fit
    return size

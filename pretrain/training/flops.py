"""FLOPs of a sample, and the peak FLOP/s of devices."""

import copy
import re
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.adapters import Adapter, Batch, Losses
from pretrain.core.rng import SampleRNG

# Dense peak of the tensor cores in TFLOP/s with float32 accumulation, (bf16 and fp16, TF32), by the name of the device
# without "NVIDIA". From NVIDIA's data sheets (GeForce: the white papers of the architectures).
PEAK_TFLOPS = {
    r"A100[ -].*": (312.0, 156.0),
    r"H100 80GB HBM3": (989.4, 494.7),
    r"H100 PCIe": (756.0, 378.0),
    r"H200": (989.4, 494.7),
    r"L4": (121.0, 60.0),
    r"L40S": (362.0, 183.0),
    r"GeForce RTX 3090": (71.0, 35.6),
    r"GeForce RTX 4090": (165.2, 82.6),
}
SMALL = 5_000_000  # parameters of a network that is run to count its FLOPs


class SampleCost(NamedTuple):
    """What one training sample costs.

    Attributes:
        flops: floating-point operations of its forward and backward pass, counted by `FlopCounterMode`: matrix products
            and convolutions, a multiply-add as two; without the recomputation of gradient checkpointing.
        unused: parameters that the loss does not depend on.
        loss_name: "score" if the adapter returns scores, else "loss".
    """

    flops: int
    unused: list[nn.Parameter]
    loss_name: str


def profile_sample(adapter: Adapter, model: nn.Module, shape: tuple[int, int, int], classes: int) -> SampleCost:
    """Measure the cost of a sample by running the adapter on one black image, in training mode.

    A copy of a small network runs on its own device, which takes milliseconds; of a larger one, or if that fails, on
    torch's meta device, where any size takes seconds and no memory. An adapter or network that needs the values of
    tensors runs on the model's device itself. Gradients of the model are None afterwards.

    Args:
        adapter: the objective.
        model: the network.
        shape: of an image, (C, H, W).
        classes: number of classes, 0 for none.

    Raises:
        ValueError: the adapter does not return one loss per sample.
    """
    small = sum(p.numel() for p in model.parameters()) <= SMALL
    found = None
    for copied in (copy.deepcopy, on_meta_device) if small else (on_meta_device,):
        # With a copy of the adapter, too: noise schedulers of diffusers move their tables to the device of the images.
        with suppress(Exception):  # missing values, or memory; another error will be raised again below
            found = _run(copy.deepcopy(adapter), copied(model).train(), shape, classes)
            break
    if found is None:
        mode = model.training
        try:
            found = _run(adapter, model.train(), shape, classes)
        finally:
            model.train(mode)
    flops, unused, loss_name = found
    return SampleCost(flops, [p for name, p in model.named_parameters() if name in unused], loss_name)


def on_meta_device(model: nn.Module) -> nn.Module:
    """A copy of a network on the meta device, which has no values and needs no memory."""
    with torch.no_grad():
        parameters = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
        return copy.deepcopy(model, {**parameters, **{id(b): b.to("meta") for b in model.buffers()}})


def black_image(shape: tuple[int, int, int], classes: int, device: torch.device) -> Batch:
    """A batch of one black image."""
    one = torch.zeros(1, dtype=torch.int64, device=device)
    image = torch.zeros(1, *shape, device=device)
    return Batch(image, one if classes else one - 1, one, torch.full((1,), 0.5, device=device))


def _run(adapter: Adapter, model: nn.Module, shape: tuple[int, int, int], classes: int) -> tuple[int, set[str], str]:
    """FLOPs, names of unused parameters, and the name of the loss, see `SampleCost`."""
    batch = black_image(shape, classes, next(model.parameters()).device)
    # Attention by matrix products: the counter does not know all fused kernels, for example that of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = adapter(model, batch, SampleRNG(0, index=batch.index))
        if not isinstance(losses, Losses) or losses.loss.shape != (1,):
            got = f"a loss of shape {tuple(losses.loss.shape)}" if isinstance(losses, Losses) else type(losses).__name__
            raise ValueError(f"it must return Losses with one loss per sample, shape (1,) for one image; got {got}")
        losses.loss.sum().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None and p.requires_grad}
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops(), unused, "loss" if losses.score is None else "score"


def peak_flops(device: str, precision: str) -> float | None:
    """Peak FLOP/s of a device for matrix products of a precision; None if it is not in `PEAK_TFLOPS`.

    For float32 it is that of TF32, which convolutions use by default and matrix products may use.

    Args:
        device: from `torch.cuda.get_device_name`.
        precision: "no" (float32), "fp16" or "bf16".
    """
    name = device.removeprefix("NVIDIA ")
    if "MIG" in name:  # a part of a device
        return None
    found = [peaks for pattern, peaks in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)]
    return found[0][precision == "no"] * 1e12 if found else None

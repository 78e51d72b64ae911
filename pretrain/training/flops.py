"""What a visit costs, and how fast devices could be."""

import copy
import re
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.adapters import Adapter, Batch, Losses
from pretrain.core.rng import SampleRNG

# Dense peaks of tensor cores in TFLOP/s, with float32 accumulation: in bf16 and fp16, and in TF32. By NVIDIA's data
# sheets (of GeForce cards: the architecture's white paper) of what torch.cuda.get_device_name() says, without "NVIDIA".
PEAKS = {
    r"A100[ -].*": (312.0, 156.0),
    r"H100 80GB HBM3": (989.4, 494.7),
    r"H100 PCIe": (756.0, 378.0),
    r"H200": (989.4, 494.7),
    r"L4": (121.0, 60.0),
    r"L40S": (362.0, 183.0),
    r"GeForce RTX 3090": (71.0, 35.6),
    r"GeForce RTX 4090": (165.2, 82.6),
}


class SampleCost(NamedTuple):
    """What one visit comes to.

    Attributes:
        flops: floating-point operations of its forward and backward pass: counted, not estimated; a multiply-add is
            two; what is not a matrix product or a convolution is not counted, nor what gradient checkpointing repeats.
        unreached: parameters that the loss does not depend on.
        remembered: "score" where the adapter returns one, else "loss".
    """

    flops: int
    unreached: list[nn.Parameter]
    remembered: str


def profile_sample(adapter: Adapter, model: nn.Module, shape: tuple[int, int, int], classes: int) -> SampleCost:
    """What one visit comes to, by running the adapter once on one black image, without values where that goes.

    On torch's meta device a network of any size takes seconds and no memory. An adapter or a network that asks for
    values is run as it is. It is a visit in training, whatever mode the network is in. The parameters' gradients are
    left empty.

    Raises:
        ValueError: the adapter does not return one loss per sample.
    """
    try:  # also the adapter's copy: diffusers' noise schedules move their tables to where the images are for good
        flops, unreached, remembered = _run(copy.deepcopy(adapter), without_values(model).train(), shape, classes)
    except Exception:  # whatever else is wrong will be so again
        mode = model.training
        try:
            flops, unreached, remembered = _run(adapter, model.train(), shape, classes)
        finally:
            model.train(mode)
    return SampleCost(flops, [p for name, p in model.named_parameters() if name in unreached], remembered)


def profile_config(part: Any, adapter: Adapter, shape: tuple[int, int, int], classes: int) -> SampleCost:
    """What one visit of a model's config would come to; the network is never allocated.

    Args:
        part: the model's config.
        adapter: the objective.
        shape: of an image, (C, H, W).
        classes: how many, 0 for none.
    """
    with torch.device("meta"):
        model = part.build(shape, classes)
    return profile_sample(adapter, model, shape, classes)


def without_values(model: nn.Module) -> nn.Module:
    """A copy on the meta device, made without copying a value."""
    with torch.no_grad():
        parameters = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
        return copy.deepcopy(model, {**parameters, **{id(b): b.to("meta") for b in model.buffers()}})


def _run(adapter: Adapter, model: nn.Module, shape: tuple[int, int, int], classes: int) -> tuple[int, set[str], str]:
    """FLOPs, names of unreached parameters, and what is remembered."""
    device = next(model.parameters()).device
    one = torch.zeros(1, dtype=torch.int64, device=device)
    image = torch.zeros(1, *shape, device=device)
    batch = Batch(image, one if classes else one - 1, one, torch.full((1,), 0.5, device=device))
    # As plain matrix products: the counter does not know every fused attention, that of the CPU for one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = adapter(model, batch, SampleRNG(0, index=one))
        if not isinstance(losses, Losses) or losses.loss.shape != (1,):
            given = (
                f"a loss of shape {tuple(losses.loss.shape)}" if isinstance(losses, Losses) else type(losses).__name__
            )
            raise ValueError(f"it must return Losses with one loss per sample, shape (1,) for one image; got {given}")
        losses.loss.sum().backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None and p.requires_grad}
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops(), unreached, "loss" if losses.score is None else "score"


def peak(device: str, precision: str) -> float | None:
    """FLOP/s that a device could do at most in matrix products of a precision; None where that is not known here.

    Of float32 it is that of TF32, which convolutions use and matrix products may, so that no share of it is above 1.

    Args:
        device: what `torch.cuda.get_device_name` says.
        precision: "no", "fp16" or "bf16".
    """
    name = device.removeprefix("NVIDIA ")
    known = [rates for pattern, rates in PEAKS.items() if re.fullmatch(pattern, name) and "MIG" not in name]
    return known[0][precision == "no"] * 1e12 if known else None

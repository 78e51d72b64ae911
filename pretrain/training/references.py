"""The references of posterior-mean targets: all training images, on the device that trains."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pretrain.adapters import Adapter
from pretrain.adapters._posterior import References
from pretrain.config.schema import Config
from pretrain.core.rng import SampleRNG
from pretrain.data.images import on_device
from pretrain.data.sources import Source

MAX_BYTES = 4 * 1024**3  # of references as float32
MAX_COST = 0.1  # of the network's FLOPs
BATCH = 256  # images read at once
PROBES, LEVELS = 64, 32  # images, and levels of each, for the message about where the references matter
AMBIGUOUS = 0.01  # posterior probability of other images above which they matter


def with_references(
    config: Config, adapter: Any, source: Source, device: torch.device, flops: int, log: Callable[[str], Any]
) -> tuple[Adapter, int]:
    """The objective in training: the adapter, bound to references if its `posterior_mean` is set and they can help.

    The expected gradient is the same with and without them.

    Args:
        config: settings of the run.
        adapter: the objective; with `posterior_mean` it has `path(level)` and takes `references` by keyword.
        source: the data set.
        device: that trains.
        flops: of the network, forward and backward, for a sample.
        log: called with a message about the level from which on other images matter, or why there are no references.

    Returns:
        The objective, and its FLOPs for a sample: `flops`, and those of the posterior mean.
    """
    if not getattr(adapter, "posterior_mean", False):
        return adapter, flops
    cost = _flops(source)
    images, flip, said = source.train, source.train.data.flip, "although --adapter.posterior-mean is set"
    if obstacle := _obstacle(source, cost / flops if flops else math.inf):
        best = getattr(replace(adapter, posterior_mean=False), "infobatch", {}).get("pruning.policy")
        nothing = best == "full" != config.policy
        more = "; without them choosing levels saved nothing: give --pruning.policy full" if nothing else ""
        log(f"targets are not posterior means, {said}: {obstacle}{more}")
        return adapter, flops
    parts = [on_device(batch, device) for batch in images.batches(range(len(images)), BATCH)]
    image, label = torch.cat([part.image for part in parts]), torch.cat([part.label for part in parts])
    if config.class_conditional and (label < 0).any():  # to the network they look like those of dropped labels
        log(f"targets are not posterior means, {said}: {int((label < 0).sum()):,} images have no label")
        return adapter, flops
    if flip:
        image, label = torch.cat([image, image.flip(-1)]), label.repeat(2)
    references = References.of(image, label if config.class_conditional else None)
    log(_where_it_acts(adapter, references, image, label, flip))
    return partial(adapter, references=references), flops + cost


def _flops(source: Source) -> int:
    """FLOPs of a sample's posterior mean: products of its image, and of its weights, with all references."""
    return 4 * math.prod(source.shape) * len(source.train) * (1 + source.train.data.flip)


def _obstacle(source: Source, share: float) -> str:
    """Why posterior means are not possible or cost too much; "" if they are possible.

    Args:
        source: the data set.
        share: of the posterior mean's FLOPs in the network's.
    """
    if source.autoencoder:
        return "latents are sampled anew in every epoch"
    if source.weights is not None:
        return "the images of --data.subset have different weights"
    if source.train.data.crop < 1:
        return "images are cropped at random"
    count = len(source.train)
    size = _flops(source)  # is the references' size in bytes, too, as float32
    if size > MAX_BYTES:
        return (
            f"{count:,} images are {size / 1024**3:.1f} GiB as float32, and at most {MAX_BYTES / 1024**3:.0f} are kept"
        )
    if share > MAX_COST:
        return f"over {count:,} images they would cost {share:.0%} of the network's FLOPs, for little"
    return ""


def _where_it_acts(adapter: Any, references: References, image: torch.Tensor, label: torch.Tensor, flip: bool) -> str:
    probe = torch.linspace(0, len(image) - 1, PROBES, device=image.device).long()
    many = f"{len(image) // 2:,} images and their mirror images" if flip else f"{len(image):,} images"
    for step in range(LEVELS):
        rng = SampleRNG(0, step, index=probe)
        signal, noise = adapter.path(torch.full((PROBES,), (step + 0.5) / LEVELS, device=image.device))
        noisy = signal.view(-1, 1, 1, 1) * image[probe] + noise.view(-1, 1, 1, 1) * rng.normal(*image.shape[1:])
        weights = references.weights(noisy, signal, noise, label[probe])
        if 1 - weights[torch.arange(PROBES), probe].mean() > AMBIGUOUS:
            return (
                f"posterior-mean targets over {many}: from level {step / LEVELS:.2f} on (0: no noise, 1: most) a noisy "
                "image could come from several of them, and the target is their weighted mean, which has less variance"
            )
    return f"posterior-mean targets over {many} change nothing: no noisy image could come from another"

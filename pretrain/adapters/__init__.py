"""The seam: an adapter turns a model and a batch into one loss per sample.

An adapter is a frozen dataclass in a file of its own. Its fields are its hyperparameters and its section
of the config; it keeps no state, and all its randomness comes from `rng`. `adapters/` has ours, and
`--adapter path/to/mine.py` takes anybody's.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from pretrain.core.rng import SampleRNG


class Batch(NamedTuple):
    """What a step looks at."""

    image: Tensor  # float32 [B, C, H, W] in [-1, 1], or latents
    label: Tensor  # int64 [B]; -1 where there is none
    index: Tensor  # int64 [B]; which samples; negative: the slot does not count
    level: Tensor  # float32 [B] in [0, 1); where on the difficulty axis, given by the plan


class Losses(NamedTuple):
    """What an adapter returns."""

    loss: Tensor  # float32 [B]; one per sample: not averaged, not weighted
    score: Tensor | None = None  # float32 [B], not negative; what to remember where it is not the loss itself


class Adapter(Protocol):
    """An objective."""

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """One forward pass. `rng` draws per sample, so losses depend on (seed, epoch, index) alone."""
        ...


@runtime_checkable
class Generative(Protocol):
    """An adapter whose model makes images: it names the diffusers scheduler that undoes its noise."""

    def scheduler(self) -> Any:
        """A fresh scheduler; the model is called as ``model(x, timestep, label)`` with its timesteps."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """An adapter that learns something of its own: it puts the network into a module that holds those parameters."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """What is trained, from the fresh network, which it may be; called as the network is."""
        ...


def drop_labels(label: Tensor, probability: float, rng: SampleRNG) -> Tensor:
    """Labels with a share replaced by -1, no label: what classifier-free guidance needs (Ho and Salimans, 2022)."""
    return label.masked_fill(rng.uniform() < probability, -1)


def bare(model: nn.Module) -> Any:
    """The network inside DistributedDataParallel or torch.compile, whose attributes those hide."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)

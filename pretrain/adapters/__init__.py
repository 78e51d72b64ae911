"""The interface of objectives: an adapter turns a model and a batch into one loss per sample.

An adapter is a frozen dataclass in a file of its own. Its fields are its hyperparameters and its section of the config;
it has no state, and all its random numbers come from `rng`. A class variable or property `infobatch` may hold the
settings that `--infobatch` alone means for it. This folder has four, and `--adapter path/to/mine.py` takes another
(docs/objectives.md).
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from pretrain.core.padding import is_padding
from pretrain.core.rng import SampleRNG


class Batch(NamedTuple):
    """A batch of samples.

    A level is a quantile u in [0, 1) of the noise level (diffusion) or of the mask ratio (masked autoencoders); each
    adapter maps it to its own axis, for example to the timestep u * T.

    Attributes:
        image: float32 [B, C, H, W] in [-1, 1], or latents.
        label: int64 [B]; -1 for no label.
        index: int64 [B]; the samples, or padding (pretrain/core/padding.py).
        level: float32 [B] in [0, 1).
    """

    image: Tensor
    label: Tensor
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  # tuples have a method of this name
    level: Tensor

    @property
    def mask(self) -> Tensor:
        """True for samples, False for padding: bool [B]."""
        return ~is_padding(self.index)

    def without_padding(self) -> "Batch":
        """The batch with its samples only. Synchronizes with the device."""
        return Batch(*(field[self.mask] for field in self))


class Losses(NamedTuple):
    """What an adapter returns.

    Attributes:
        loss: float32 [B]; one per sample, neither averaged over samples nor weighted.
        score: float32 [B], not negative; stored as the score instead of the loss.
    """

    loss: Tensor
    score: Tensor | None = None


class Adapter(Protocol):
    """An objective."""

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """One forward pass.

        Args:
            model: called with tensors; may be wrapped by DistributedDataParallel or torch.compile (see `bare`).
            batch: on the model's device.
            rng: random numbers per sample, a function of (seed, epoch, index).
        """
        ...


@runtime_checkable
class Generative(Protocol):
    """An adapter whose model generates images by a noise scheduler of diffusers."""

    def scheduler(self) -> Any:
        """A new scheduler of diffusers; the model is called as ``model(x, timestep, label)`` with its timesteps."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """An adapter with parameters of its own, in a module around the network."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """The module to train, from the new network; it has the network's signature, and may be the network itself."""
        ...


def drop_labels(label: Tensor, probability: float, rng: SampleRNG) -> Tensor:
    """Labels, int64 [B], a share replaced by -1, no label, for classifier-free guidance (Ho and Salimans, 2022)."""
    return label.masked_fill(rng.uniform() < probability, -1)


def bare(model: nn.Module) -> Any:
    """The network inside DistributedDataParallel or torch.compile, which hide its attributes."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)

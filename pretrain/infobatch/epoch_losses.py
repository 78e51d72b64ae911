"""The losses of the current epoch, stored as the steps compute them."""

# torch does not declare all types of tolist, split and from_numpy.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
from torch import Tensor

from pretrain.core.padding import is_padding, sample_of

UNSEEN = -torch.inf  # no loss yet; the neutral element of the maximum over ranks
NEGATIVE = "scores must not be negative, so pass a `score` beside a loss that can be"
HINT = (
    "do all indices come from this sampler (sampler=infobatch, Indexed(data) outside of any Subset), each passed once?"
)


class NotFinite(FloatingPointError):
    """A loss is NaN or infinite.

    Args:
        message: of the error.
        index: the samples concerned.
    """

    def __init__(self, message: str, index: list[int]) -> None:
        super().__init__(message)
        self.index = index


class EpochLosses:
    """One loss per sample, on the device that computes them; writing does not synchronize with it.

    Args:
        size: samples, N.

    Attributes:
        loss: float32 [N + 1]; `UNSEEN` where there is none, infinite where it was not finite. Losses of padding go to
            the last entry.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.loss = torch.full((size + 1,), UNSEEN, dtype=torch.float32)
        self._finite, self._wrong, self._negative = torch.tensor(True), torch.tensor(False), torch.tensor(False)
        self._differ, self._several = torch.tensor(False), False  # two losses of a batch; batches of two or more

    def to(self, device: torch.device) -> None:
        """Move it to a device."""
        self.loss, self._finite = self.loss.to(device), self._finite.to(device)
        self._wrong, self._negative = self._wrong.to(device), self._negative.to(device)
        self._differ = self._differ.to(device)

    def write(self, loss: Tensor, index: Tensor) -> None:
        """Store losses.

        Args:
            loss: float32 [B].
            index: int64 [B]; samples, or padding.

        Raises:
            ValueError: an index is out of range, or has a loss in this epoch already, or a loss is negative (on an
                accelerator `check` raises it).
        """
        padding = is_padding(index)
        outside = sample_of(index) >= self.size
        slot = torch.where(outside | padding, self.size, index)
        ordered = slot.sort().values
        twice = (ordered[1:] == ordered[:-1]) & (ordered[1:] < self.size)
        again = self.loss[slot] != UNSEEN  # the last entry is cleared below
        self._wrong |= (outside | again).any() | twice.any()
        if loss.device.type == "cpu" and self._wrong:
            self._wrong.fill_(False)
            if outside.any():
                raise ValueError(f"there is no sample {index[outside][0].item()}, there are {self.size}; {HINT}")
            named = slot[again] if again.any() else ordered[1:][twice]
            raise ValueError(f"sample {named[0].item()} was scored twice in one epoch; {HINT}")
        finite = loss.isfinite()
        negative = (loss < 0) & finite & ~padding
        self._negative |= negative.any()
        if loss.device.type == "cpu" and self._negative:
            self._negative.fill_(False)
            first = int(negative.int().argmax())
            raise ValueError(f"the loss of sample {index[first].item()} is {loss[first].item():.3g}; {NEGATIVE}")
        self._finite &= (finite | padding).all()
        self._differ |= (loss != loss[:1]).any()
        self._several |= len(loss) > 1
        self.loss[slot] = torch.where(finite, loss, torch.inf)  # infinity survives the maximum over ranks
        self.loss[-1] = UNSEEN

    def check(self) -> None:
        """Raise if a loss or an index so far was wrong. Synchronizes with the device.

        Raises:
            NotFinite: a loss was not finite; names the samples.
            ValueError: an index was out of range or came twice, or a loss was negative.
        """
        if self._negative:
            raise ValueError(f"a loss was negative; {NEGATIVE}")
        if self._wrong:
            raise ValueError(f"an index was not in [0, {self.size}), or a sample was scored twice; {HINT}")
        bad = self.loss.isposinf()
        if not self._finite or bad.any():
            bad = bad.nonzero().squeeze(1).tolist()
            more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
            raise NotFinite(f"the loss of sample {', '.join(map(str, bad[:10]))}{more} is not finite", bad)

    def look_like_means(self) -> bool:
        """Whether losses that were written at once were equal, always, and others not. Synchronizes with the device."""
        if not self._several or self._differ:
            return False
        known = self.loss[self.loss != UNSEEN]
        return bool((known != known[:1]).any())

    def discard(self, index: list[int]) -> None:
        """Remove the losses of these samples from this epoch; their scores will stay as they were."""
        self.loss[torch.tensor(index, dtype=torch.int64, device=self.loss.device)] = UNSEEN
        self._finite.fill_(True)

    def clear(self) -> None:
        """Remove all, for the next epoch, or before a state is restored after an error."""
        self.loss.fill_(UNSEEN)
        self._finite.fill_(True)
        for flag in (self._wrong, self._negative, self._differ):
            flag.fill_(False)
        self._several = False

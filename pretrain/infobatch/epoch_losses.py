"""The losses of the running epoch, as they come back from the steps."""

import torch
from torch import Tensor

UNSEEN = -torch.inf  # a loss that has not come back; the neutral element of the maximum over ranks
WHOSE = "do all indices come from this sampler, each handed back once?"


class NotFinite(FloatingPointError):
    """A loss is NaN or infinite.

    Args:
        sentence: the message.
        index: the samples whose loss it is.
    """

    def __init__(self, sentence: str, index: list[int]) -> None:
        super().__init__(sentence)
        self.index = index


class EpochLosses:
    """One loss a sample, on the device that computes them, written without waiting for it.

    Args:
        size: samples, N.

    Attributes:
        loss: float32 [N + 1]; `UNSEEN` where none came back, infinite where it was not finite. The last one is where
            what does not count is put.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.loss = torch.full((size + 1,), UNSEEN)
        self._finite, self._wrong = torch.tensor(True), torch.tensor(False)

    def to(self, device: torch.device) -> None:
        """Move it to a device."""
        self.loss, self._finite, self._wrong = (item.to(device) for item in (self.loss, self._finite, self._wrong))

    def write(self, loss: Tensor, index: Tensor, sample: Tensor) -> None:
        """Note losses, float32 [B], of samples.

        Args:
            loss: one each.
            index: int64 [B]; negative where it does not count.
            sample: int64 [B]; the sample of each index, also of one that does not count.

        Raises:
            ValueError: an index that no sample has, or one that was scored before (on an accelerator `check` says so).
        """
        outside = sample >= self.size
        slot = torch.where(outside | (index < 0), self.size, index)
        ordered = slot.sort().values
        twice = (ordered[1:] == ordered[:-1]) & (ordered[1:] < self.size)
        again = self.loss[slot] != UNSEEN  # the last slot never keeps anything, see below
        self._wrong |= (outside | again).any() | twice.any()
        if loss.device.type == "cpu" and self._wrong:
            self._wrong.fill_(False)
            if outside.any():
                raise ValueError(f"there is no sample {index[outside][0].item()}, there are {self.size}; {WHOSE}")
            named = slot[again] if again.any() else ordered[1:][twice]
            raise ValueError(f"sample {named[0].item()} was scored twice in one epoch; {WHOSE}")
        good = loss.isfinite()
        self._finite &= (good | (index < 0)).all()
        self.loss[slot] = torch.where(good, loss, torch.inf)  # infinite: what a maximum over ranks keeps
        self.loss[-1] = UNSEEN

    def check(self) -> None:
        """Raise if something was wrong. Waits for the device.

        Raises:
            NotFinite: a loss was not finite; names the samples.
            ValueError: an index came that no sample has, or one came twice.
        """
        if self._wrong:
            raise ValueError(f"an index was not in [0, {self.size}), or a sample was scored twice; {WHOSE}")
        bad = self.loss.isposinf()
        if not self._finite or bad.any():
            bad = bad.nonzero().squeeze(1).tolist()
            more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
            raise NotFinite(f"the loss of sample {', '.join(map(str, bad[:10]))}{more} is not finite", bad)

    def forget(self, index: list[int]) -> None:
        """Take losses of this epoch back, as if these samples had not been visited; their scores stay as they were."""
        self.loss[torch.tensor(index, dtype=torch.int64, device=self.loss.device)] = UNSEEN
        self._finite.fill_(True)

    def clear(self) -> None:
        """Begin another epoch."""
        self.loss.fill_(UNSEEN)

"""Losses and gradients that are not finite: samples that cause them are excluded; too many of them stop the run."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Batch
from pretrain.core.errors import UserError
from pretrain.data.images import Images
from pretrain.distributed.sharding import local
from pretrain.infobatch.epoch_losses import NotFinite
from pretrain.infobatch.sampler import InfoBatch

MAX_STREAK = 3  # consecutive steps with a gradient that is not finite, after which the run stops
MAX_SKIPPED = 40  # consecutive steps that a GradScaler skips: its scale, 2^16 and halved each time, is 1e-7 by then
MAX_EXCLUDED = 0.01  # share of the samples, but at least one sample; the run stops if more are excluded


class NonFinite:
    """Keeps numbers that are not finite out of the parameters, and samples that cause them out of the batches.

    Args:
        infobatch: of the run; it has the losses.
        images: to train on.
        device: of the gradients.

    Attributes:
        excluded: the samples that are excluded.
        recent: index and level of this rank's samples since the last `Run.inspect`.
    """

    def __init__(self, infobatch: InfoBatch, images: Images, device: torch.device) -> None:
        self.infobatch, self.images = infobatch, images
        self.excluded: set[int] = set()
        self.recent: list[tuple[int, float]] = []
        self._pending: UserError | None = None
        self._streak = self._longest = torch.tensor(0, device=device)
        self._skipped = 0

    def state_dict(self) -> dict[str, Any]:
        """The excluded samples, and the current number of consecutive bad steps. Synchronizes with the device."""
        return {"excluded": sorted(self.excluded), "streak": int(self._streak)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: the excluded samples are no indices.
        """
        excluded = state["excluded"]
        if not all(type(index) is int and index >= 0 for index in excluded):
            raise ValueError("the excluded samples are no indices")
        self.excluded = {*excluded}
        self._streak = self._longest = torch.tensor(state["streak"], device=self._streak.device)

    def filter(self, batch: Batch, problems: Iterable[str]) -> Batch:
        """Replace excluded samples of a batch by padding with blank images, and handle images that can't be read.

        An error about an image is stored for `raise_pending`, so that no rank leaves the others within a step.

        Args:
            batch: from the loader; images may be on another device than indices.
            problems: messages about its images that can't be read.
        """
        try:
            self.images.handle(problems)
        except UserError as error:
            self._pending = self._pending or error
        self.recent += zip(batch.index.tolist(), batch.level.tolist(), strict=True)
        if not self.excluded:
            return batch
        out = torch.isin(batch.index, torch.tensor(sorted(self.excluded)))
        blank = out.to(batch.image.device, non_blocking=True)
        image = batch.image.masked_fill(blank.view(-1, *[1] * (batch.image.ndim - 1)), 0)
        return batch._replace(
            image=image, label=batch.label.masked_fill(blank, -1), index=torch.where(out, ~batch.index, batch.index)
        )

    def zero_bad_gradient(self, model: nn.Module, norm: Tensor) -> None:
        """Set a gradient that is not finite to 0: AdamW then moves by its momentum alone. Does not synchronize.

        Args:
            model: with the gradient, after its reduction over ranks.
            norm: of the gradient; a scalar.
        """
        bad = ~norm.isfinite()
        if bad.device.type != "cpu" or bad:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    local(parameter.grad).masked_fill_(bad, 0.0)
        self._streak = torch.where(bad, self._streak + 1, 0)
        self._longest = torch.maximum(self._longest, self._streak)

    def count_skipped(self, skipped: bool) -> None:
        """Tell of an optimizer step whether the GradScaler skipped it, since a gradient was not finite."""
        self._skipped = self._skipped + 1 if skipped else 0

    def raise_pending(self) -> None:
        """Raise the first error about an image since the last `Run.inspect`, if there was one.

        Raises:
            UserError: an image can't be read.
        """
        if self._pending is not None:
            raise self._pending

    def bad_samples(self) -> set[int]:
        """This rank's samples of the current epoch whose loss is not finite. Synchronizes with the device."""
        try:
            self.infobatch.check()
        except NotFinite as error:
            return {*error.index}
        return set()

    def exclude(self, index: set[int]) -> str:
        """Exclude samples from now on; all ranks call it with the same.

        Returns:
            A message that names up to three of them.
        """
        self.infobatch.losses.discard(sorted(index))
        names = [f"sample {number} ({self.images.name_of(number)})" for number in sorted(index)]
        self.excluded |= index
        self.images.skipped |= {f"{name}: its loss is not finite" for name in names}
        more = f" and of {len(names) - 3} more" if len(names) > 3 else ""
        return f"the loss of {', '.join(names[:3])}{more} is not finite"

    def reason_to_stop(self) -> str:
        """Why the run must stop, or "" if it need not; the same on all ranks. Synchronizes with the device."""
        if (longest := int(self._longest)) >= MAX_STREAK:
            return f"the gradients of {longest} steps in a row are not finite"
        if self._skipped >= MAX_SKIPPED:
            return f"the gradients of {self._skipped} steps in a row are not finite, however small their scale"
        if len(self.excluded) > max(1, int(MAX_EXCLUDED * len(self.images))):
            return (
                f"the losses of {len(self.excluded)} of {len(self.images)} samples are not finite, more than "
                f"{MAX_EXCLUDED:.0%}"
            )
        return ""

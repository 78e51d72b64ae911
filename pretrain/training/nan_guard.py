"""Bad numbers: a sample whose loss is not finite is named and set aside; a run that is full of them stops."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Batch
from pretrain.core.errors import UserError
from pretrain.data.images import Images
from pretrain.infobatch.epoch_losses import NotFinite
from pretrain.infobatch.sampler import InfoBatch

STREAK = 3  # steps in a row whose gradient is not finite, and the run stops
SHARE = 0.01  # of the samples, or one; where more are set aside the run stops


class NanGuard:
    """Keeps what is not finite away from the parameters, and what is to blame out of the batches.

    Args:
        infobatch: of the run; its losses are looked at.
        images: that it is trained on.
        device: of the gradients.
    """

    def __init__(self, infobatch: InfoBatch, images: Images, device: torch.device) -> None:
        self.infobatch, self.images = infobatch, images
        self.aside: set[int] = set()
        self.refusal: UserError | None = None  # that this process met since the last look
        self.recent: list[tuple[int, float]] = []  # index and level of the visits since then
        self._streak = self._longest = torch.tensor(0, device=device)

    def state_dict(self) -> dict[str, Any]:
        """Which samples are left out, and the bad steps in a row. Waits for the device."""
        return {"set_aside": sorted(self.aside), "streak": int(self._streak)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.aside = {*state["set_aside"]}
        self._streak = self._longest = torch.tensor(state["streak"], device=self._streak.device)

    def admit(self, batch: Batch, problems: Iterable[str]) -> Batch:
        """The batch without those who were set aside: their slots are blank and don't count.

        What the user wants done about images that can't be read is done; a refusal waits for `look`, so that no process
        leaves the others in the middle of a step.
        """
        try:
            self.images.handle(problems)
        except UserError as refusal:
            self.refusal = self.refusal or refusal
        self.recent += zip(batch.index.tolist(), batch.level.tolist(), strict=True)
        if not self.aside:
            return batch
        out = torch.isin(batch.index, torch.tensor(sorted(self.aside)))
        blank = out.to(batch.image.device, non_blocking=True)  # where images are kept, which indices are not
        image = batch.image.masked_fill(blank.view(-1, *[1] * (batch.image.ndim - 1)), 0)
        return batch._replace(
            image=image, label=batch.label.masked_fill(blank, -1), index=torch.where(out, ~batch.index, batch.index)
        )

    def gradient(self, model: nn.Module, norm: Tensor) -> None:
        """A gradient that is not finite counts as zero: AdamW goes on by its momentum. Nobody waits for the device.

        Args:
            model: whose gradients are the same on every process.
            norm: of them all.
        """
        bad = ~norm.isfinite()
        if bad.device.type != "cpu" or bad:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(bad, 0.0)
        self._streak = torch.where(bad, self._streak + 1, 0)
        self._longest = torch.maximum(self._longest, self._streak)

    def refuse(self) -> None:
        """Raise what was refused since the last look."""
        if self.refusal is not None:
            raise self.refusal

    def found(self) -> set[int]:
        """The samples of this process whose loss was not finite. Waits for the device."""
        try:
            self.infobatch.check()
        except NotFinite as error:
            return {*error.index}
        return set()

    def set_aside(self, index: set[int]) -> str:
        """Leave samples out from now on, on all processes alike; in words, for the user."""
        self.infobatch.losses.discard(sorted(index))
        names = [f"sample {number} ({self.images.name_of(number)})" for number in sorted(index)]
        self.aside |= index
        self.images.skipped |= {f"{name}: its loss is not finite" for name in names}
        more = f" and of {len(names) - 3} more" if len(names) > 3 else ""
        return f"the loss of {', '.join(names[:3])}{more} is not finite"

    def verdict(self) -> str:
        """Why the run has to stop; empty if it need not. The same on all processes."""
        if (longest := int(self._longest)) >= STREAK:
            return f"the gradients of {longest} steps in a row are not finite"
        most = max(1, int(SHARE * len(self.images)))
        if len(self.aside) > most:
            return (
                f"the losses of {len(self.aside)} of {len(self.images)} samples are not finite, more than {SHARE:.0%}"
            )
        return ""

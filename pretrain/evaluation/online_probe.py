"""A linear probe that follows an encoder while it is pretrained, from features that the training computes anyway."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Batch, bare
from pretrain.checkpoint.ema import exponential_decay
from pretrain.core.rng import SampleRNG
from pretrain.distributed.collectives import all_reduce_sum, rank_and_world_size
from pretrain.evaluation.context import EvalContext, labelled, over

HALFLIFE = 0.05  # of what was seen, as a share of the training: old features are another encoder's
RIDGE = 1e-3  # of the features' mean square


def make(subject: EvalContext, names: list[str]) -> "OnlineProbe":
    """The evaluator of this file's metric."""
    labelled(subject, names)
    return OnlineProbe(subject)


class OnlineProbe:
    """Accuracy of a ridge regression from pooled features to classes, on held-out images masked as in training.

    A regression needs no steps of its own: sums of products of the detached features with themselves and with the
    labels say it all, are added up over processes when they are asked for, and are a function of the visits, so a
    resumed run has those of an uninterrupted one.

    Args:
        subject: what is trained.
    """

    name = "online-probe"  # of its file in a checkpoint

    def __init__(self, subject: EvalContext) -> None:
        self.subject, self.progress = subject, 0.0
        self.sums: Tensor
        self.seen: Tensor | None = None

    def attach(self, model: nn.Module, device: torch.device) -> None:
        """Follow `model`, the bare network in training, from now on; copies made of it later would be followed, too."""
        encoder: Any = model.encoder
        width = encoder.embed_dim + 1
        self.sums = torch.zeros(width, width + self.subject.source.classes, device=device)
        self._watch(model)

    def _watch(self, model: nn.Module) -> Any:
        encoder: Any = bare(model).encoder

        def note(module: nn.Module, arguments: Any, tokens: Tensor) -> None:
            self.seen = encoder.pool(tokens.detach()).float()

        return encoder.norm.register_forward_hook(note)

    @torch.no_grad()
    def observe(self, batch: Batch, progress: float) -> None:
        """Take in the batch that was encoded last; what was seen before fades.

        Args:
            batch: unlabelled images and slots that do not count are left out.
            progress: of the training after it.
        """
        assert self.seen is not None
        if progress > self.progress:
            self.sums *= exponential_decay(HALFLIFE)(self.progress, progress)
        counts = ((batch.label >= 0) & batch.mask).float()[:, None]
        x = torch.cat([self.seen, torch.ones_like(counts)], dim=1)
        y = batch.label[:, None] == torch.arange(self.subject.source.classes, device=batch.label.device)
        self.sums += (x * counts).T @ torch.cat([x, y.float()], dim=1)
        self.progress = progress

    def state_dict(self) -> dict[str, Tensor]:
        """What a resume needs; all processes must call it."""
        return {"sums": all_reduce_sum(self.sums.clone())}

    def load_state_dict(self, state: Mapping[str, Tensor], progress: float) -> None:
        """Go on from a `state_dict` at this progress of the training."""
        if rank_and_world_size()[0] == 0:  # those of all processes are added up
            self.sums.copy_(state["sums"])
        self.progress = progress

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The share of held-out images told rightly; before any visit, that of the first class."""
        test, device = self.subject.source.test, next(model.parameters()).device
        watching, kept = self._watch(model), self.seen

        def rows(batch: Batch) -> tuple[Tensor, Tensor]:
            draws = SampleRNG(0, index=batch.index)
            self.subject.adapter(model, batch._replace(level=draws.uniform()), draws)
            assert self.seen is not None
            return self.seen, batch.label

        try:
            feature, label = over(test, range(len(test)), device, rows)
        finally:
            watching.remove()
            self.seen = kept
        sums = self.state_dict()["sums"].double().cpu()
        square, product = sums[:, : len(sums)], sums[:, len(sums) :]
        ridge = RIDGE * square.diagonal().mean().clamp(min=1e-12)
        weight = torch.linalg.solve(square + ridge * torch.eye(len(square), dtype=torch.float64), product)
        guess = (feature.double() @ weight[:-1] + weight[-1]).argmax(1)
        return {"online_probe_accuracy": (guess == label)[label >= 0].double().mean().item()}

"""A linear probe of an encoder during its pretraining, from the features that the training computes anyway."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Batch, bare
from pretrain.checkpoint.ema import exponential_decay
from pretrain.core.rng import SampleRNG
from pretrain.distributed.collectives import all_reduce_sum, rank_and_world_size
from pretrain.evaluation.context import EvalContext, accuracy, map_images

HALF_LIFE = 0.05  # of a sample's weight, as a share of the training: the encoder of old features has changed since
RIDGE = 1e-3  # times the mean square of the features


def make(context: EvalContext, names: list[str]) -> "OnlineProbe":
    """The evaluator of the metric online-probe."""
    return OnlineProbe(context)


class OnlineProbe:
    """Accuracy of a ridge regression from pooled features to labels on validation images, masked as in training.

    The sums of x xᵀ and x yᵀ over the samples of the training determine the regression. They need no gradient, and
    are added over the processes only when they are used. They depend on the samples alone, so a resumed run has the
    same as an uninterrupted one.

    Args:
        context: what is evaluated.
    """

    name = "online-probe"  # of its file in a checkpoint

    def __init__(self, context: EvalContext) -> None:
        self.context, self.progress = context, 0.0
        self.sums: Tensor
        self.feature: Tensor | None = None

    def attach(self, model: nn.Module, device: torch.device) -> None:
        """Observe a model from now on.

        Args:
            model: the bare network that is trained; later copies of it would be observed, too.
            device: where the features are.
        """
        encoder: Any = model.encoder
        width = encoder.embed_dim + 1
        self.sums = torch.zeros(width, width + self.context.source.classes, device=device)
        self._hook(model)

    def _hook(self, model: nn.Module) -> Any:
        encoder: Any = bare(model).encoder

        def store(module: nn.Module, arguments: Any, tokens: Tensor) -> None:
            self.feature = encoder.pool(tokens.detach()).float()

        return encoder.norm.register_forward_hook(store)

    @torch.no_grad()
    def observe(self, batch: Batch, progress: float) -> None:
        """Add the last encoded batch to the sums, after decaying them.

        Args:
            batch: padding, images without a label, and features that are not finite are ignored.
            progress: of the training after the batch.
        """
        assert self.feature is not None
        if progress > self.progress:
            self.sums *= exponential_decay(HALF_LIFE)(self.progress, progress)
        finite = self.feature.isfinite().all(dim=1)  # 0 times NaN is NaN
        weight = ((batch.label >= 0) & batch.mask & finite).float()[:, None]
        x = torch.cat([self.feature.masked_fill(~finite[:, None], 0.0), torch.ones_like(weight)], dim=1)
        y = batch.label[:, None] == torch.arange(self.context.source.classes, device=batch.label.device)
        self.sums += (x * weight).T @ torch.cat([x, y.float()], dim=1)
        self.progress = progress

    def state_dict(self) -> dict[str, Tensor]:
        """The state for a checkpoint; all processes must call it."""
        return {"sums": all_reduce_sum(self.sums.clone())}

    def load_state_dict(self, state: Mapping[str, Tensor], progress: float) -> None:
        """Restore a `state_dict`, of this progress of the training."""
        if rank_and_world_size()[0] == 0:  # the sums of all processes are added up
            self.sums.copy_(state["sums"])
        self.progress = progress

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The accuracy on the labelled validation images; before the first batch, that of predicting class 0.

        Raises:
            UserError: none of them can be read.
        """
        test, device = self.context.source.test, next(model.parameters()).device
        handle, stored = self._hook(model), self.feature

        def encode(batch: Batch) -> tuple[Tensor, Tensor]:
            rng = SampleRNG(0, index=batch.index)
            self.context.adapter(model, batch._replace(level=rng.uniform()), rng)
            assert self.feature is not None
            return self.feature, batch.label

        try:
            feature, label = map_images(test, range(len(test)), device, encode)
        finally:
            handle.remove()
            self.feature = stored
        sums = self.state_dict()["sums"].double().cpu()
        square, product = sums[:, : len(sums)], sums[:, len(sums) :]
        ridge = RIDGE * square.diagonal().mean().clamp(min=1e-12)
        weight = torch.linalg.solve(square + ridge * torch.eye(len(square), dtype=torch.float64), product)
        predicted = (feature.double() @ weight[:-1] + weight[-1]).argmax(1)
        return {"online_probe_accuracy": accuracy(predicted, label)}

"""The accuracy of a linear classifier of an encoder's frozen features."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pretrain.core.rng import fold_seed, generator
from pretrain.evaluation.context import EvalContext, accuracy, mean_over_seeds
from pretrain.evaluation.knn import labelled_features

BASE_LR = 0.1  # of LARS, for a batch size of 256 (He et al. 2022, table 10)
MAX_BATCH_SIZE = 16384
MIN_STEPS_PER_EPOCH = 16  # so that a small data set is learned, too


def make(context: EvalContext, names: list[str]) -> "LinearProbe":
    """The evaluator of the metric linear-probe."""
    return LinearProbe(context)


@dataclass(frozen=True)
class LinearProbe:
    """Accuracy of a linear classifier after a batch norm without parameters, trained by LARS (He et al. 2022, A.1).

    Unlike there, images are not augmented, and features are computed once.

    Attributes:
        context: what is evaluated.
    """

    context: EvalContext

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The accuracy on the labelled validation images, see `mean_over_seeds`.

        Raises:
            UserError: none of them can be read.
        """
        device, (train, test) = next(model.parameters()).device, self.context.source[:2]
        feature, label = (column.to(device) for column in labelled_features(model, train, range(len(train))))
        queries, test_label = (column.to(device) for column in labelled_features(model, test, range(len(test))))

        def measure(seed: int) -> dict[str, float]:
            head = fit(feature, label, self.context.source.classes, self.context.settings.probe_epochs, seed)
            with torch.no_grad():
                return {"linear_probe_accuracy": accuracy(head(queries).argmax(1), test_label)}

        return mean_over_seeds(measure, self.context.settings.seeds)


def fit(feature: Tensor, label: Tensor, classes: int, epochs: int, seed: int) -> nn.Module:
    """Train a linear classifier.

    Args:
        feature: float32 [N, D].
        label: int64 [N].
        classes: number of classes.
        epochs: passes over the features.
        seed: of the initial weights and the order.

    Returns:
        A module from features to logits [N, classes], in evaluation mode.
    """
    width, batch_size = feature.shape[1], min(MAX_BATCH_SIZE, max(2, len(feature) // MIN_STEPS_PER_EPOCH))
    linear: Any = nn.utils.skip_init(nn.Linear, width, classes, device=feature.device)
    head = nn.Sequential(nn.BatchNorm1d(width, eps=1e-6, affine=False, device=feature.device), linear)
    nn.init.normal_(linear.weight, std=0.01, generator=torch.Generator(feature.device).manual_seed(fold_seed(seed)))
    nn.init.zeros_(linear.bias)
    steps = epochs * (len(feature) // batch_size)
    optimizer = create_optimizer_v2(head, "lars", lr=BASE_LR * batch_size / 256, weight_decay=0.0, momentum=0.9)
    schedule = CosineLRScheduler(optimizer, steps, warmup_t=steps // 9, t_in_epochs=False)
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(len(feature), generator=generator(seed, epoch)).to(feature.device)
        for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
            schedule.step_update(step)
            cross_entropy(head(feature[chosen]), label[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return head.eval()

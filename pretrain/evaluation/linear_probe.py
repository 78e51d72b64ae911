"""How well a linear map of an encoder's frozen features tells classes apart."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pretrain.core.rng import fold_seed, generator
from pretrain.evaluation.context import EvalContext, labelled, over_seeds
from pretrain.evaluation.knn import encoded

RATE = 0.1  # of LARS, for 256 images a step (He et al. 2022, table 10)
MOST = 16384  # images of a step
STEPS = 16  # of an epoch, at least, so that few images are learned from, too


def make(subject: EvalContext, names: list[str]) -> "LinearProbe":
    """The evaluator of this file's metric."""
    labelled(subject, names)
    return LinearProbe(subject)


@dataclass(frozen=True)
class LinearProbe:
    """Accuracy of a linear classifier after a batch norm without parameters, trained by LARS (He et al. 2022, A.1).

    Features are computed once, of the images as they are: no augmentation, unlike there.

    Attributes:
        subject: what is evaluated.
    """

    subject: EvalContext

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The share of held-out images told rightly."""
        device, (train, test) = next(model.parameters()).device, self.subject.source[:2]
        feature, label = (column.to(device) for column in encoded(model, train, range(len(train))))
        asked, asked_label = (column.to(device) for column in encoded(model, test, range(len(test))))

        def measure(seed: int) -> dict[str, float]:
            head = fit(feature, label, self.subject.source.classes, self.subject.settings.probe_epochs, seed)
            with torch.no_grad():
                right = head(asked).argmax(1) == asked_label
            return {"linear_probe_accuracy": right.double().mean().item()}

        return over_seeds(measure, self.subject.settings.seeds)


def fit(feature: Tensor, label: Tensor, classes: int, epochs: int, seed: int) -> nn.Module:
    """A head, in evaluation mode, trained on features [N, D] and labels int64 [N]."""
    width, batch = feature.shape[1], min(MOST, max(2, len(feature) // STEPS))
    linear: Any = nn.utils.skip_init(nn.Linear, width, classes, device=feature.device)
    head = nn.Sequential(nn.BatchNorm1d(width, eps=1e-6, affine=False, device=feature.device), linear)
    nn.init.normal_(linear.weight, std=0.01, generator=torch.Generator(feature.device).manual_seed(fold_seed(seed)))
    nn.init.zeros_(linear.bias)
    steps = epochs * (len(feature) // batch)
    optimizer = create_optimizer_v2(head, "lars", lr=RATE * batch / 256, weight_decay=0.0, momentum=0.9)
    schedule = CosineLRScheduler(optimizer, steps, warmup_t=steps // 9, t_in_epochs=False)
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(len(feature), generator=generator(seed, epoch)).to(feature.device)
        for chosen in order[: len(order) // batch * batch].split(batch):
            schedule.step_update(step)
            cross_entropy(head(feature[chosen]), label[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return head.eval()

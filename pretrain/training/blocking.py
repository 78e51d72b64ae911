"""Partial Forward Blocking: a part of each batch leaves the network after its first blocks.

Wu, Guo, Zuo, Sang and Gao, "Partial forward blocking: a novel data pruning paradigm for lossless training
acceleration" (ICCV 2025). All samples of a batch go through the network's first blocks; those in a dense region of the
features there stop, the others go on. The paper's text could be had in part only: that the first samples after blocking
begins are the centres, and that the features' channels are averaged in groups, are this project's choice, and its
bandwidth is Silverman's rule with the number of centres.

A network takes part if its `forward` has the keyword `choose`, see `Choose`.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import adaptive_avg_pool1d
from torch.utils.flop_counter import FlopCounterMode

from pretrain.adapters import Adapter, Batch, Losses, bare
from pretrain.config.schema import Blocking, Config
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data.sources import Source
from pretrain.distributed.collectives import all_gather_rows
from pretrain.training.flops import black_image, on_meta_device

# Called by a network after its first blocks with features, float32 [B, D], of the batch; returns the samples that go
# on, int64 [K], in increasing order. The network returns the outputs of these alone.
Choose = Callable[[Tensor], Tensor]

CHANNELS = 32  # of the reduced features
CENTRES = 100
STEP = 0.01  # of a centre towards the mean of the samples assigned to it
MAX_ALPHA = 0.01  # of the random term of the importance
ACTIVE = (16 / 300, 260 / 300)  # progress from and until which samples are blocked, as published
FLOOR = 0.2  # of the mean inclusion probability


class FeatureDensity:
    """Gaussian kernel density of features around moving centres, and the importance of samples by it.

    Attributes:
        centre: float32 [CENTRES, D].
        assigned: float64 [CENTRES]; samples that were assigned to each centre; 0 for centres that are not set yet.
    """

    def __init__(self) -> None:
        self.centre, self.assigned = torch.zeros(CENTRES, 0), torch.zeros(CENTRES, dtype=torch.float64)

    @property
    def is_set(self) -> bool:
        """Whether all centres have a value: until then every sample goes on."""
        return bool(self.assigned[-1] > 0)

    def update(self, feature: Tensor) -> None:
        """Move each centre towards the mean of the features, float32 [K, D], that are nearest to it.

        The first features become the centres.
        """
        if not self.centre.shape[1]:
            self.centre = torch.zeros(CENTRES, feature.shape[1])
        if not self.is_set:
            begin = int((self.assigned > 0).sum())
            new, feature = feature[: CENTRES - begin], feature[CENTRES - begin :]
            self.centre[begin : begin + len(new)], self.assigned[begin : begin + len(new)] = new, 1
            if not len(feature):
                return
        nearest = torch.cdist(feature, self.centre).argmin(dim=1)
        count = torch.bincount(nearest, minlength=CENTRES)
        total = torch.zeros_like(self.centre).index_add_(0, nearest, feature)
        found = count > 0
        mean = total[found] / count[found, None]
        self.centre[found] = self.centre[found].lerp(mean, STEP)
        self.assigned += count

    def importance(self, feature: Tensor, alpha: float) -> Tensor:
        """1 / (density + alpha), float64 [B], of features, float32 [B, D]; the largest density of the batch is 1."""
        centre, count, width = self.centre.double(), len(self.centre), self.centre.shape[1]
        bandwidth = (4 / ((width + 2) * count)) ** (1 / (width + 4)) * centre.std(dim=0).clamp(min=1e-12)
        distance = torch.cdist(feature.double() / bandwidth, centre / bandwidth).square() / 2
        density = (self.assigned.log() - distance).logsumexp(dim=1)
        return 1 / ((density - density.max()).exp() + alpha)


def probabilities_above_floor(size: Tensor, count: int) -> Tensor:
    """Probabilities min(1, floor + c size), float64 [B], whose sum is `count`; `FLOOR` of the mean is the floor.

    Args:
        size: float64 [B], positive.
        count: K, at most B.
    """
    floor, low, high = FLOOR * count / len(size), 0.0, 1 / float(size.min())
    for _ in range(100):  # bisection: the sum increases with c
        middle = (low + high) / 2
        if (floor + middle * size).clamp(max=1).sum() < count:
            low = middle
        else:
            high = middle
    return (floor + high * size).clamp(max=1)


def systematic_sample(probability: Tensor, order: Tensor, start: float) -> Tensor:
    """Draw samples with given inclusion probabilities; exactly as many as their sum, a whole number.

    Args:
        probability: float64 [B].
        order: int64 [B]; a random permutation.
        start: uniform in [0, 1).

    Returns:
        The drawn samples, int64 [K].
    """
    end = probability[order].cumsum(0)
    end[-1] = end[-1].round()
    steps = (end - start).ceil()
    return order[steps.diff(prepend=torch.zeros(1, dtype=steps.dtype).sub(start).ceil()) > 0]


class PartialForwardBlocking:
    """An objective in training that runs a part of each batch through the network's first blocks only.

    The samples of a forward pass are chosen over all processes together, so that any number of processes chooses the
    same. With "topk" the most important ones go on and the loss is their mean, as published: it is biased. With
    "unbiased" sample i goes on with probability p_i, which increases with the square root of its importance, and its
    loss is multiplied by 1 / p_i: given the random numbers of the forward pass, the expected gradient is that of all.
    A blocked sample's score is the mean over the blocked ones, estimated from the others' scores and weights, so that
    the mean of all scores estimates the mean loss.

    Args:
        objective: the adapter; it must call the model once.
        settings: share of the samples that is blocked, and the method.
        progress: returns the progress of the training.

    Attributes:
        blocked: samples that this object has blocked so far, over all processes.
    """

    name = "blocking"  # of its file in a checkpoint

    def __init__(self, objective: Adapter, settings: Blocking, progress: Callable[[], float]) -> None:
        self.objective, self.settings, self.progress = objective, settings, progress
        self.density, self.blocked = FeatureDensity(), 0

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """The losses of a batch; those of blocked samples are 0."""
        chosen: list[tuple[Tensor, Tensor]] = []

        def choose(feature: Tensor) -> Tensor:
            chosen.append(self._choose(feature.detach().float(), batch, rng))
            return chosen[-1][0]

        network: Any = _Choosing(model, choose)
        losses = self.objective(network, batch, rng)
        kept, weight = chosen[0]
        score = (losses.loss if losses.score is None else losses.score).detach()
        known = score[kept]
        stands_for = (weight[kept] - 1).clamp(min=0) * known.isfinite()  # blocked samples; a bad loss for none
        total, count = all_gather_rows([known.nan_to_num(0, 0, 0) * stands_for, stands_for])
        mean = (total.sum() / count.sum().clamp(min=1e-12)).to(score)
        return Losses(losses.loss * weight, mean.expand_as(score).index_copy(0, kept, known))

    def _choose(self, feature: Tensor, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Tensor]:
        """The samples of this process that go on, int64 [K], and the weight of each sample, float32 [B]."""
        feature = adaptive_avg_pool1d(feature, min(CHANNELS, feature.shape[1]))
        index, features, random = all_gather_rows([batch.index, feature, rng.uniform(3)])
        order = index.argsort()[int((index < 0).sum()) :]  # without padding, in an order of the samples alone
        if not len(order):  # padding alone, whose losses don't count
            return torch.arange(len(feature), device=feature.device), torch.zeros(len(feature), device=feature.device)
        index, features, random = index[order], features[order], random[order]
        finite = features.isfinite().all(dim=1)  # of others the loss tells, and they must not reach the centres
        features = features.masked_fill(~finite[:, None], 0.0)
        kept, weight = self._select(features, random)
        self.blocked += len(features) - len(kept)
        if self.progress() >= ACTIVE[0]:  # features of a network that has learned nothing would be poor centres
            self.density.update(features[kept[finite[kept]]])
        own = torch.searchsorted(index, batch.index.cpu()).clamp(max=len(index) - 1)
        mine = index[own] == batch.index.cpu()  # False for padding
        position = (mine & torch.isin(own, kept)).nonzero().flatten()
        position = position if len(position) else torch.zeros(1, dtype=torch.int64)  # of weight 0: no empty batch
        weight = torch.where(mine, weight[own], 0.0).float()
        return position.to(feature.device), weight.to(feature.device)

    def _select(self, feature: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
        """Which of all samples go on, int64 [K], and their weights, float64 [N], 0 for the others."""
        size = len(feature)
        count = max(1, round((1 - self.settings.share) * size))
        if count == size or not (self.density.is_set and ACTIVE[0] <= self.progress() < ACTIVE[1]):
            return torch.arange(size), torch.ones(size, dtype=torch.float64)
        importance = self.density.importance(feature, MAX_ALPHA * float(random[0, 0]))
        if self.settings.method == "topk":
            kept, probability = importance.topk(count).indices, torch.tensor(count / size, dtype=torch.float64)
        else:
            probability = probabilities_above_floor(importance.sqrt(), count)
            kept = systematic_sample(probability, random[:, 1].argsort(), float(random[0, 2]))
        weight = torch.zeros(size, dtype=torch.float64)
        weight[kept] = (1 / probability).expand(size)[kept]
        return kept, weight

    def around(
        self, objective: Adapter, model: nn.Module, source: Source, flops: int, of_references: int
    ) -> tuple["PartialForwardBlocking", tuple[int, int]]:
        """This object around another form of its objective; the FLOPs of a sample that goes on, and of a blocked one.

        Args:
            objective: for example the adapter bound to references.
            model: the bare network.
            source: of the images.
            flops: of a sample that goes on.
            of_references: those of them for posterior means, which blocked samples have, too.
        """
        one = black_image(source.shape, source.classes, torch.device("meta"))
        blocked = blocked_flops(self.objective, model, one) + of_references
        self.objective = objective
        return self, (flops, blocked)

    def attach(self, model: nn.Module, device: torch.device) -> None:
        """Nothing: the density stays on the CPU."""

    def observe(self, batch: Batch, progress: float) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """The centres, the numbers of samples assigned to them, and the number of samples that were blocked."""
        density = {"centre": self.density.centre.clone(), "assigned": self.density.assigned.clone()}
        return density | {"blocked": torch.tensor(self.blocked)}

    def load_state_dict(self, state: dict[str, Tensor], progress: float) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: it has another number of centres.
        """
        centre, assigned = state["centre"], state["assigned"]
        if centre.ndim != 2 or len(centre) != CENTRES or assigned.shape != (CENTRES,):
            raise ValueError(f"the density's centres are not {CENTRES}, but of shape {tuple(centre.shape)}")
        self.density.centre, self.density.assigned = centre.clone(), assigned.clone()
        self.blocked = int(state["blocked"])


class _Choosing:
    """A network as an adapter calls it, with `choose`; outputs of samples that do not go on are 0.

    Attributes of the network are available, also in DistributedDataParallel.
    """

    def __init__(self, model: nn.Module, choose: Choose) -> None:
        self.module, self.choose = bare(model), choose
        self._call = model

    def __call__(self, *arguments: Any) -> Tensor:
        kept: list[Tensor] = []

        def choose(feature: Tensor) -> Tensor:
            kept.append(self.choose(feature))
            return kept[-1]

        output = self._call(*arguments, choose=choose)
        empty = output.new_zeros(len(arguments[0]), *output.shape[1:])
        return empty.index_copy(0, kept[0], output)


class _Blocked(Exception):
    """Ends a forward pass after the first blocks."""


def blocked_flops(adapter: Callable[..., Any], model: nn.Module, one: Any) -> int:
    """FLOPs of a sample that is blocked: its forward pass through the first blocks.

    The backward pass there, which autograd runs for the whole batch, is not counted: of this sample it is one of zeros.

    Args:
        adapter: the objective.
        model: the bare network.
        one: a batch of one sample, on torch's meta device.
    """

    def stop(feature: Tensor) -> Tensor:
        raise _Blocked

    network: Any = _Choosing(on_meta_device(model).train(), stop)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), suppress(_Blocked):
        adapter(network, one, SampleRNG(0, index=one.index))
    return counter.get_total_flops()


def build_blocking(
    config: Config, adapter: Adapter, model: nn.Module, progress: Callable[[], float]
) -> PartialForwardBlocking | None:
    """Partial Forward Blocking as the settings say, or None.

    Args:
        config: settings of the run.
        adapter: the objective.
        model: the network.
        progress: returns the progress of the training.

    Raises:
        UserError: the network can't be left after its first blocks.
    """
    if not config.blocking.share:
        return None
    if "choose" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"--blocking.share: the forward of a {type(model).__name__}, which --adapter {config.adapter.name} trains, "
            "has no argument `choose`, as those of a DiT and a MaskedAutoencoder have; leave it out"
        )
    return PartialForwardBlocking(adapter, config.blocking, progress)

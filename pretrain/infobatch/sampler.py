"""InfoBatch: which samples an epoch uses, at what level, and with what weight.

One object is the sampler, holds the scores and weighs the losses. It works in any training loop:

    infobatch = InfoBatch(data, epochs=100)
    loader = DataLoader(Indexed(data), 256, sampler=infobatch)
    for epoch in infobatch.epochs():
        for index, image, label in loader:
            losses = F.cross_entropy(model(image), label, reduction="none")
            infobatch(losses, index).backward()

The method is that of Qin et al., "InfoBatch: Lossless training speed up by unbiased dynamic data pruning" (ICLR
2024); `policy="importance"` is ours (docs/concepts.md).
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from pretrain.core.padding import is_padding, sample_of
from pretrain.core.rng import fold_seed
from pretrain.distributed import collectives
from pretrain.infobatch.budget import Budget
from pretrain.infobatch.checks import as_index, check_agreement, check_losses, check_rank, checked_state
from pretrain.infobatch.epoch_losses import HINT, UNSEEN, EpochLosses
from pretrain.infobatch.indexed import length
from pretrain.infobatch.plan import Plan
from pretrain.infobatch.policies import Policy, SamplingRule, ScoreStats, checked, full, uses_raw_losses, with_settings
from pretrain.infobatch.sample_weights import SampleWeights
from pretrain.infobatch.scores import ScoreStore

MIN_RELIABILITY = 0.3  # of scores; below it samples are drawn uniformly


class InfoBatch(Sampler[int]):
    """Sampler and loss weighting of unbiased dynamic data pruning.

    Args:
        data: a map-style data set, or the number of its samples, N.
        epochs: epochs of the whole run, E.
        policy: a name in `pretrain.infobatch.policies.POLICIES`, or a function like those there.
        budget: share of the N * E samples of full training that the run uses, in (0, 1], kept exactly; for policies
            that take one.
        anneal: share of the epochs, the last ones, that use every sample, rounded up; None: 0.125, or 0 with a budget.
        smoothing: weight of a sample's old score in its new one, in [0, 1).
        seed: of all random draws; no global generator is read or seeded.
        weights: [N], positive; of each sample in the loss and in `mean`, times those of the plan; plans and scores
            don't depend on them. Their mean scales the loss. None: 1.
        rank, world: of this process; each gets its share of one order. None: those of `torch.distributed`.
        merge: element-wise maximum over ranks, in place or not, of float32 on the losses' device or int64 on the CPU;
            called where an epoch starts and ends, in `mean` and `synchronize`. None: that of `torch.distributed`.
        warn: called on rank 0 with a message if the scores turn out to carry no signal.
        settings: of the policy, such as `prune_ratio`.

    Attributes:
        epoch: the current epoch, from 0.
        seen: samples of this epoch whose losses were passed, over all ranks.
        used_before: the same, over the epochs before this one.
        dropped: samples that were planned in the epochs before this one and whose losses were never passed.
        ignores_scores: whether this epoch's samples are drawn uniformly because the scores are not reliable.

    Raises:
        ValueError: an argument is out of its range, or the policy has no such setting.
        TypeError: `data` is not a map-style data set.
    """

    def __init__(
        self,
        data: int | Sized | Dataset[Any],
        *,
        epochs: int,
        policy: str | Policy = "infobatch",
        budget: float | None = None,
        anneal: float | None = None,
        smoothing: float = 0.7,
        seed: int = 0,
        weights: Tensor | Sequence[float] | None = None,
        rank: int | None = None,
        world: int | None = None,
        merge: Callable[[Tensor], Tensor] | None = None,
        warn: Callable[[str], Any] = warnings.warn,
        **settings: Any,
    ) -> None:
        self._data = None if isinstance(data, Integral) else data
        size = int(data) if isinstance(data, Integral) else length(data)
        self._found_rank = rank is None
        anneal = (0.125 if budget is None else 0.0) if anneal is None else anneal
        if (rank is None) != (world is None):
            raise ValueError(f"rank and world belong together, got rank {rank} and world {world}")
        if rank is None or world is None:
            rank, world = collectives.rank_and_world_size()
        for name, value, good, allowed in (
            ("size", size, size >= 1, ">= 1"),
            ("epochs", epochs, isinstance(epochs, Integral) and epochs >= 1, "a whole number >= 1"),
            ("budget", budget, budget is None or 0 < budget <= 1, "in (0, 1]"),
            ("anneal", anneal, 0 <= anneal <= 1, "in [0, 1]"),
            ("smoothing", smoothing, 0 <= smoothing < 1, "in [0, 1)"),
            ("rank", rank, 0 <= rank < world, f"in [0, {world})"),
        ):
            if not good:
                raise ValueError(f"{name} must be {allowed}, got {value}")
        self.size, self.total_epochs, self.seed, self.weights = size, epochs, seed, SampleWeights(weights, size)
        self.rank, self.world, self.merge, self.warn = rank, world, merge or collectives.all_reduce_max, warn
        self.first_full = epochs - math.ceil(anneal * epochs - 1e-9)  # less what floats add
        self.budget = None if budget is None else Budget(budget, size, epochs, self.first_full)
        self.policy = with_settings(policy, budget is not None, settings)

        self.epoch = self.seen = self.used_before = self.dropped = 0
        self._largest_step, self._merged = 0, True  # of this epoch; whether `losses` has those of all ranks
        self._rest: np.ndarray | None = None  # samples that were left at a resume, if not the last ones of the plan
        self.raw = uses_raw_losses(policy)
        self.scores = ScoreStore(size, 0.0 if self.raw else smoothing, self.raw)
        self.ignores_scores, self.losses = False, EpochLosses(size)
        self._score = self.scores.score  # on the losses' device; the same storage on a CPU
        self._plan: Plan | None = None
        rule = self._rule(self.score[:1], 0.5)  # so that wrong settings of a policy raise now
        if self.budget is not None:
            self.budget.check(first_epoch_full=rule.unseen == 1)

    # -- epochs and progress -----------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """This epoch's plan."""
        if self._plan is None:
            why = "no epoch has been planned" if self.epoch < self.total_epochs else f"all {self.epoch} epochs are over"
            raise ValueError(f"{why}; loop with `for epoch in infobatch.epochs():`")
        return self._plan

    @property
    def length(self) -> int:
        """Samples of this epoch's plan, over all ranks."""
        return self.plan.length

    @property
    def score(self) -> Tensor:
        """float32 [N]; each sample's score: its loss relative to the expected one (about 1 on average), or under a
        policy on raw losses the last loss itself; NaN where there is none yet."""
        return self.scores.score

    @property
    def reliability(self) -> float | None:
        """Share of a difference between scores that the next losses show again, in [0, 1]; None: not known yet."""
        return self.scores.reliability.reliability

    @property
    def samples_used(self) -> int:
        """Samples of the whole run so far whose losses were passed, over all ranks: what the run has cost."""
        return self.used_before + self.seen

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]; learning rates and other schedules are functions of it."""
        within = self.seen / self.length if self._plan is not None else 0.0
        return (self.epoch + within) / self.total_epochs

    def epochs(self) -> Iterator[int]:
        """Plan each epoch and yield its number; after a resume it continues inside the epoch.

        Raises:
            ValueError: the length of the data set has changed, no loss was passed in an epoch, or ranks have different
                plans.
        """
        while self.epoch < self.total_epochs:
            self._check_ranks()
            yield self.epoch
            self._close()

    def _check_ranks(self) -> None:
        """Plan the epoch, and raise if the process group is another one now, or this plan is not that of all ranks."""
        if self._found_rank:
            check_rank((self.rank, self.world), collectives.rank_and_world_size())
        if self._plan is None:
            self._draw()
        if self.world > 1:
            check_agreement(fold_seed(self.plan.fingerprint(), self.epoch, self.seen, *self.weights.mark), self.merge)

    def _rule(self, score: Tensor, share: float) -> SamplingRule:
        """What the policy returns for an epoch that may use `share` of the samples."""
        return checked(self.policy(score, self._stats(), **({} if self.budget is None else {"share": share})))

    def _stats(self) -> ScoreStats:
        mean, reliability = self.scores.levels.mean, self.reliability
        return ScoreStats(mean / mean.mean(), 1.0 if reliability is None or self.raw else reliability)

    def _draw(self) -> None:
        """Make this epoch's plan, a function of the scores, the seed and the epoch alone."""
        if self._data is not None and length(self._data) != self.size:
            raise ValueError(
                f"the data set had {self.size} samples and has {length(self._data)} now; scores belong to indices, so "
                "start a new run"
            )
        share = 1.0 if self.budget is None else self.budget.share_of(self.epoch, self.used_before)
        rule = self._rule(self.score, share)
        if self.epoch >= self.first_full:  # annealing: every sample, with levels drawn as before
            rule = full(self.score, self._stats())._replace(density=rule.density)
        reliability = self.reliability
        by_score = not self.raw and len(rule.keep) > 1 and bool((rule.keep < 1 - 1e-6).any())
        unreliable = by_score and reliability is not None and reliability < MIN_RELIABILITY
        if unreliable and not self.ignores_scores and self.rank == 0:
            levels = ", levels by importance" if rule.density is not None else ""
            self.warn(
                f"per-sample scores carry no signal here (reliability {reliability:.2f} of 1): from epoch "
                f"{self.epoch + 1} on samples are drawn uniformly{levels}; scores are used again if it reaches "
                f"{MIN_RELIABILITY}"
            )
        self.ignores_scores = unreliable
        uniform = bool((rule.keep == rule.keep[0]).all())  # then scores make no difference anyway
        self._plan = Plan(rule, self.score, (self.seed, self.epoch), ignore_scores=unreliable and not uniform)

    # -- the sampler -------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Samples left in this epoch for this rank; the same on every rank."""
        return math.ceil((self.length - self.seen) / self.world)

    def __iter__(self) -> Iterator[int]:
        """This rank's share of what is left of the epoch; iterating twice gives the same indices.

        In every step all ranks together use the samples that one process would. If the last round is short, a rank
        yields padding: ``~i``, negative, for some sample i.

        Raises:
            ValueError: the epoch's samples have been used, so that a loop over the loader would not make a step.
        """
        plan, first, count, rest = self.plan, self.seen + self.rank, len(self), self._rest
        if self._largest_step and not count:
            raise ValueError(
                f"epoch {self.epoch} is over, all of its {self.length} samples have a loss; loop with `for epoch in "
                "infobatch.epochs():`, and evaluate with a loader that has another sampler"
            )

        def indices() -> Iterator[int]:
            if rest is None:
                yield from plan.samples(first, self.world)
            else:
                yield from rest[first - plan.length + len(rest) :: self.world].tolist()
            if first + (count - 1) * self.world >= plan.length:
                yield ~next(plan.samples(0))

        return indices()

    def global_batch_size(self, index: Tensor | Sequence[int]) -> int:
        """Samples of this step over all ranks, without padding, if this rank's batch is `index`, int64 [B]."""
        return min(len(as_index(index)) * self.world, self.length - self.seen)

    def level(self, index: Tensor | Sequence[int]) -> Tensor:
        """float32 [B] in [0, 1); the levels of samples (or padding), int64 [B], in this epoch."""
        return self.plan.level_of(sample_of(as_index(index)))

    # -- losses and scores -------------------------------------------------------------------------

    def weight(self, index: Tensor | Sequence[int]) -> Tensor:
        """The weights of samples of this step, for a second loss beside the one that is passed to `__call__`.

        ``(infobatch.weight(index) * second).mean()`` is weighted as `__call__`, later in the step, weights the first.

        Args:
            index: int64 [B]; the sampler's indices of these samples, padding included.

        Returns:
            float32 [B], 0 for padding, on the index's device.

        Raises:
            ValueError: a sample's loss was passed already (noticed on a CPU).
        """
        index = as_index(index)
        if self.losses.loss.device.type == index.device.type == "cpu":
            own = index[~is_padding(index)].clamp(max=self.size)  # padding repeats a sample, whose loss may be known
            if (self.losses.loss[own] != UNSEEN).any():
                raise ValueError("weight(index) must be called before the losses of these samples are passed")
        scale = len(index) * self.world / max(self.global_batch_size(index), 1)
        return scale * self._weight(index.to(self._score.device)).to(index.device)

    def _weight(self, index: Tensor) -> Tensor:
        """float32 [B]; the weights of the plan times those of the samples, 0 for padding."""
        sample = sample_of(index).clamp(max=self.size - 1)  # an index out of range raises elsewhere
        return self.weights.times(self.plan.weight_of(sample, self._score[sample]) * ~is_padding(index), sample)

    def __call__(self, loss: Tensor, index: Tensor | Sequence[int], score: Tensor | None = None) -> Tensor:
        """Store the losses for the scores and return the weighted mean loss.

        Args:
            loss: [B]; one per sample, neither averaged nor weighted, not negative unless `score` is given.
            index: int64 [B], or a sequence of ints; the sampler's indices of these samples, padding included.
            score: [B], not negative; stored instead of the loss.

        Returns:
            A scalar: the sum of weight * loss over this rank's samples, divided by the number of samples over all ranks
            and multiplied by `world`, so that DistributedDataParallel's average of gradients over ranks is the gradient
            of the global mean, also if ranks have different numbers of samples. It is not divided by the sum of the
            weights, which would be biased.

        Raises:
            ValueError: not one loss per index, losses that are no floating-point tensor, more losses than the epoch's
                plan has samples, a negative loss without a score, or an index that is out of range or was passed before
                in this epoch (on an accelerator `check` raises the last three).
        """
        index = as_index(index)
        check_losses(loss, index, score)
        if not len(index):  # all samples of the batch were filtered out
            return loss.sum()
        n = self.global_batch_size(index)
        if n <= 0:
            raise ValueError(f"epoch {self.epoch} has {self.length} samples, and all of them have a loss; {HINT}")
        if self.losses.loss.device != loss.device:
            self.losses.to(loss.device)
            self._score = self.score.to(loss.device)
        index = index.to(loss.device, non_blocking=True)
        stored = loss.detach().float()
        if score is not None:
            stored = torch.where(stored.isfinite(), score.detach().float(), math.nan)
        self.losses.write(stored, index)
        self.seen += n
        self._largest_step, self._merged = max(self._largest_step, n), self.world == 1
        return (torch.where(is_padding(index), 0, loss) * self._weight(index)).sum() * (self.world / n)

    def check(self) -> None:
        """Raise if a loss or an index so far was wrong. Synchronizes with the device; nothing else in a step does.

        Raises:
            NotFinite: a loss was not finite; names the samples.
            ValueError: an index was out of range or was passed twice.
        """
        self.losses.check()

    def mean(self) -> float:
        """Weighted mean of this epoch's losses so far, an estimate of the mean over the data set.

        The same on every rank and after a resume; all ranks must call it.
        """
        self._merge()
        return self.scores.mean(self.losses.loss[:-1].cpu(), self.plan, self.weights)

    def _close(self) -> None:
        """End the epoch: turn the losses of all ranks into scores."""
        if not self.seen:
            raise ValueError(
                f"epoch {self.epoch} ends and no loss was passed for any of its {self.length} samples; call "
                "infobatch(losses, index) in every step, and with drop_last use no batch larger than an epoch"
            )
        self._merge()
        self.check()
        loss = self.losses.loss[:-1].cpu()
        outside = self.plan.first_outside(loss != UNSEEN)
        if outside is not None:
            raise ValueError(f"sample {outside} was scored in epoch {self.epoch}, which does not use it; {HINT}")
        if self.rank == 0 and self.losses.look_like_means():
            self.warn(
                f"epoch {self.epoch + 1}: the losses of each batch were all equal, so they seem to be its mean; pass "
                "one loss per sample (reduction='none')"
            )
        self.scores.update(loss, self.plan)
        allowed = self._largest_step or self.seen  # no step since a resume: the checkpoint followed the last one
        if (missing := self.length - self.seen) > allowed and self.rank == 0:
            self.warn(
                f"epoch {self.epoch + 1}: no loss was passed for {missing:,} of {self.length:,} samples; unless the "
                "loop ended early on purpose, something else shards or skips samples, too: don't pass the loader to "
                "accelerator.prepare, set use_distributed_sampler=False in Lightning, skip no batches after a resume"
            )
        self.used_before += self.seen
        self.dropped += missing
        self.epoch += 1
        self._begin()
        self._score = self.score.to(self.losses.loss.device)

    def _begin(self) -> None:
        """Forget the current epoch."""
        self.seen, self._plan, self._rest, self._largest_step, self._merged = 0, None, None, 0, True
        self.losses.clear()

    def _merge(self) -> None:
        self.losses.loss = self.merge(self.losses.loss)
        if self.world > 1:  # a loop may have left out some samples on one rank alone
            self.seen = int(self.merge(torch.tensor([self.seen])))
        self._merged = True

    # -- the state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state that the rest of the run depends on; 4 bytes per sample between epochs, 8 inside one.

        Any rank may call it at any time: it does not communicate. Inside an epoch of several processes call
        `synchronize` on all of them before; otherwise the state has the losses of this rank alone.
        """
        return {
            "epoch": self.epoch,
            "seen": self.seen,
            "used_before": self.used_before,
            "dropped": self.dropped,
            "score": self.score.clone(),
            "levels": self.scores.levels.sums.clone(),
            "reliability": self.scores.reliability.sums.clone(),
            "loss": self.losses.loss[: self.size if self.seen else 0].cpu().clone(),
            "merged": self._merged,
            "plan": self.plan.fingerprint() if self.seen else 0,
        } | self.weights.state_dict()

    def synchronize(self) -> None:
        """Merge this epoch's losses of all ranks, for `state_dict`; all ranks must call it."""
        if self.seen and not self._merged:
            self._merge()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, on any number of processes.

        Inside an epoch the samples without a loss are left, also if the loop had skipped some of them.

        Raises:
            ValueError: it is no such state, or one of a data set of another size, of other `weights`, of more epochs,
                or inside an epoch with another plan. This object is then as it was before.
        """
        before = self.state_dict()
        try:
            self._load(checked_state(state, before, self.total_epochs, None if self._largest_step else self.warn))
        except Exception:  # whatever is wrong with the state, nothing of it stays
            self._load(before)
            raise

    def _load(self, state: dict[str, Any]) -> None:
        inside = self._plan is not None  # a loop over `epochs`
        self._begin()
        self.epoch, self.seen = state["epoch"], state["seen"]
        self.used_before, self.dropped = state["used_before"], state["dropped"]
        self.scores.score.copy_(state["score"])
        self._score = self.score.to(self.losses.loss.device)
        self.scores.levels.restore(state["levels"])
        self.scores.reliability.sums = state["reliability"].clone()
        if self.seen or (inside and self.epoch < self.total_epochs):
            self._draw()
        if not self.seen:
            return
        self._merged = self.world == 1 or state["merged"]
        self.losses.loss[:-1] = state["loss"].to(self.losses.loss.device)
        if self.plan.fingerprint() != state["plan"] or self.seen > self.length:
            raise ValueError(
                "the state lies inside an epoch whose plan would be another one now; continue with the same seed, "
                "policy, settings, budget, anneal and epochs, or from a state at the start of an epoch"
            )
        left, in_order = self.plan.left(self.losses.loss[:-1] != UNSEEN, self.seen)
        if not in_order:
            if not state["merged"]:
                raise ValueError(
                    "the state has the losses of one rank only, and not in the sampler's order, so which samples are "
                    "left is not known; continue from a state at the start of an epoch"
                )
            self._rest = left
            self.seen = self.length - len(left)
        if not state["merged"] and self.rank == 0:
            self.warn(
                "the state has the losses of one rank only; the samples that other ranks used in its epoch keep "
                "their old scores; call infobatch.synchronize() on all ranks before state_dict()"
            )

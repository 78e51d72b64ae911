"""InfoBatch: which samples an epoch uses, at what level, and with what weight.

One object is the sampler, the clock (`progress`) and the memory (scores). It works alone in any loop:

    infobatch = InfoBatch(data, epochs=100)
    loader = DataLoader(Indexed(data), 256, sampler=infobatch)
    for epoch in infobatch.epochs():
        for index, image, label in loader:
            losses = F.cross_entropy(model(image), label, reduction="none")
            infobatch(losses, index).backward()

The method is that of Qin et al., "InfoBatch: Lossless training speed up by unbiased dynamic data pruning" (ICLR
2024); `policy="importance"` is ours (docs/method.md).
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sized
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from pretrain.distributed import collectives
from pretrain.infobatch.budget import Budget
from pretrain.infobatch.epoch_losses import UNSEEN, WHOSE, EpochLosses
from pretrain.infobatch.indexed import length
from pretrain.infobatch.plan import Plan
from pretrain.infobatch.policies import Policy, SamplingRule, ScoreStats, checked, full, uses_raw_losses, with_settings
from pretrain.infobatch.scores import ScoreStore

MIN_RELIABILITY = 0.3  # reliability of scores below which they choose no better than chance


class InfoBatch(Sampler[int]):
    """Plans epochs, hands out indices, remembers scores and weighs losses.

    Args:
        data: the data set, or the number of its samples, N.
        epochs: epochs in the whole run, E.
        policy: a name in `pretrain.infobatch.policies.POLICIES`, or a function like those there.
        budget: share of all visits, N * E, that the run spends, in (0, 1], to the visit; for policies that keep to one.
        anneal: share of the epochs, the last ones, that use every sample, rounded up; 0.125 if None, 0 with a budget.
        smoothing: what a sample's score keeps of its past at a visit, in [0, 1).
        seed: of the plans; no global generator is read or seeded.
        rank, world: this process and how many there are; each is handed its share of one global order.
        merge: element-wise maximum of a tensor over all ranks, in place or not; called by all of them at
            an epoch's end and by `state_dict`. A maximum, because merging twice then changes nothing.
            What is not given of these is that of `torch.distributed`.
        warn: called on rank 0 with a sentence, when the scores turn out to be of no use.
        settings: the policy's own, such as `prune_ratio`.

    Raises:
        ValueError: an argument is out of its range, or the policy has no such setting.
        TypeError: `data` has no length.
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
        rank: int | None = None,
        world: int | None = None,
        merge: Callable[[Tensor], Tensor] | None = None,
        warn: Callable[[str], Any] = warnings.warn,
        **settings: Any,
    ) -> None:
        self._data = None if isinstance(data, Integral) else data
        size = int(data) if isinstance(data, Integral) else length(data)
        anneal = (0.125 if budget is None else 0.0) if anneal is None else anneal
        if (rank is None) != (world is None):
            raise ValueError(f"rank and world belong together, got rank {rank} and world {world}")
        if rank is None or world is None:
            rank, world = collectives.rank_and_world_size()
        for name, value, good, allowed in (
            ("size", size, size >= 1, ">= 1"),
            ("epochs", epochs, epochs >= 1, ">= 1"),
            ("budget", budget, budget is None or 0 < budget <= 1, "in (0, 1]"),
            ("anneal", anneal, 0 <= anneal <= 1, "in [0, 1]"),
            ("smoothing", smoothing, 0 <= smoothing < 1, "in [0, 1)"),
            ("rank", rank, 0 <= rank < world, f"in [0, {world})"),
        ):
            if not good:
                raise ValueError(f"{name} must be {allowed}, got {value}")
        self.size, self.total_epochs, self.seed = size, epochs, seed
        self.rank, self.world, self.merge, self.warn = rank, world, merge or collectives.all_reduce_max, warn
        self.first_full = epochs - math.ceil(anneal * epochs - 1e-9)  # less what floats add
        self.budget = None if budget is None else Budget(budget, size, epochs, self.first_full)
        self.policy = with_settings(policy, budget is not None, settings)

        self.epoch = 0
        self.seen = 0  # visits of this epoch whose losses came back, over all ranks
        self.visited = 0  # the same, over the epochs before this one
        self.dropped = 0  # visits planned in the epochs before this one whose losses never came back
        self.raw = uses_raw_losses(policy)
        self.memory = ScoreStore(size, 0.0 if self.raw else smoothing, self.raw)
        self.at_random = False  # whether this epoch's choice leaves the scores out, because they tell too little
        self.ledger = EpochLosses(size)
        self._score = self.memory.score  # on the losses' device; the same memory on a CPU
        self._plan: Plan | None = None
        rule = self._rule(torch.full((1,), math.nan), 0.5)  # a policy that refuses its settings does so now
        if self.budget is not None:
            self.budget.check(whole_first=rule.unseen == 1)

    # -- the clock ---------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """This epoch's plan."""
        if self._plan is None:
            raise ValueError("no epoch has been planned; loop with `for epoch in infobatch.epochs():`")
        return self._plan

    @property
    def length(self) -> int:
        """Visits planned for this epoch, over all ranks."""
        return self.plan.length

    @property
    def score(self) -> Tensor:
        """float32 [N]; how badly each sample is learned, about 1 on average; NaN where never visited."""
        return self.memory.score

    @property
    def reliability(self) -> float | None:
        """Share of a difference between scores that the next visits show again, in [0, 1]; None: not known yet."""
        return self.memory.repeats.reliability

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]; schedules are functions of it."""
        within = self.seen / self.length if self._plan is not None else 0.0
        return (self.epoch + within) / self.total_epochs

    def epochs(self) -> Iterator[int]:
        """Draw each epoch's plan and yield the epoch's number; goes on inside an epoch after a resume.

        Raises:
            ValueError: the data set's length is not what it was, or an epoch ends without a loss handed over.
        """
        while self.epoch < self.total_epochs:
            if self._plan is None:
                self._draw()
            yield self.epoch
            self._close()

    def _rule(self, score: Tensor, share: float) -> SamplingRule:
        """The policy's answer, in an epoch that may visit `share` of the samples."""
        return checked(self.policy(score, self._known(), **({} if self.budget is None else {"share": share})))

    def _known(self) -> ScoreStats:
        usual, reliability = self.memory.levels.usual, self.reliability
        return ScoreStats(usual / usual.mean(), 1.0 if reliability is None or self.raw else reliability)

    def _draw(self) -> None:
        """This epoch's plan: a function of what is remembered, the seed and the epoch alone."""
        if self._data is not None and length(self._data) != self.size:
            raise ValueError(
                f"the data set had {self.size} samples and has {length(self._data)} now; scores belong to samples by "
                "their number, so start anew"
            )
        share = 1.0 if self.budget is None else self.budget.of(self.epoch, self.visited)
        rule = self._rule(self.score, share)
        if self.epoch >= self.first_full:  # nobody is skipped; levels are no less well chosen than before
            rule = full(self.score, self._known())._replace(density=rule.density)
        known = self.reliability
        scored = not self.raw and len(rule.keep) > 1 and bool((rule.keep < 1 - 1e-6).any())
        at_random = scored and known is not None and known < MIN_RELIABILITY
        if at_random and not self.at_random and self.rank == 0:
            levels = ", levels by importance" if rule.density is not None else ""
            self.warn(
                f"per-sample scores carry no signal here (reliability {known:.2f} of 1): from epoch {self.epoch + 1} "
                f"on samples are drawn uniformly{levels}; scores are used again if that reaches {MIN_RELIABILITY}"
            )
        self.at_random = at_random
        equal = bool((rule.keep == rule.keep[0]).all())  # then the choice leaves the scores out by itself
        self._plan = Plan(rule, self.score, (self.seed, self.epoch), at_random=at_random and not equal)

    # -- the sampler -------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Visits left in this epoch for this rank; the same on every rank."""
        return math.ceil((self.length - self.seen) / self.world)

    def __iter__(self) -> Iterator[int]:
        """This rank's share of what is left of the epoch; asking twice gives the same answer.

        Global step by global step the ranks together visit what one process would. Where the last round
        is short, a rank is handed a slot that does not count: ``~i``, negative, for some sample i.
        """
        plan, first, count = self.plan, self.seen + self.rank, len(self)

        def visits() -> Iterator[int]:
            yield from plan.visits(first, self.world)
            if first + (count - 1) * self.world >= plan.length:
                yield ~next(plan.visits(0))

        return visits()

    def counted(self, index: Tensor) -> int:
        """Samples that this batch and those of the other ranks beside it are together."""
        return min(len(index) * self.world, self.length - self.seen)

    def level(self, index: Tensor) -> Tensor:
        """float32 [B] in [0, 1): where this epoch's plan visits the samples `index`, int64 [B]."""
        return self.plan.level_of(torch.where(index < 0, ~index, index))

    # -- the memory --------------------------------------------------------------------------------

    def __call__(self, loss: Tensor, index: Tensor, score: Tensor | None = None) -> Tensor:
        """Remember the scores and return the weighted mean loss, the one product of loss and weight.

        Args:
            loss: [B]; one per sample, not averaged, not weighted.
            index: int64 [B]; which samples, as the sampler gave them. Negative: does not count.
            score: [B], not negative; what to remember where it is not the loss itself.

        Returns:
            A scalar: the sum of weight * loss over this rank's samples, divided by the number of samples
            over all ranks and multiplied by `world`, so that an average of gradients over ranks is the
            gradient of the global mean, also where the ranks' shares differ. Never divided by the weights.

        Raises:
            ValueError: not one loss per index, more losses than the epoch's plan has visits, or an index that no
                sample has or that was scored before in this epoch (on an accelerator `check` raises it).
        """
        if loss.ndim != 1 or loss.shape != index.shape:
            raise ValueError(
                f"InfoBatch needs one loss per sample: got losses of shape {tuple(loss.shape)} for indices of "
                f"shape {tuple(index.shape)}; is the loss reduced? Use reduction='none' and average over all but "
                "the first axis"
            )
        n = self.counted(index)
        if n <= 0:
            raise ValueError(f"epoch {self.epoch} has {self.length} visits, and all of them have been scored")
        if self.ledger.loss.device != loss.device:
            self.ledger.to(loss.device)
            self._score = self.score.to(loss.device)
        index = index.to(loss.device, non_blocking=True)
        sample = torch.where(index < 0, ~index, index)
        remembered = loss.detach().float()
        if score is not None:
            remembered = torch.where(remembered.isfinite(), score.detach().float(), math.nan)
        self.ledger.write(remembered, index, sample)
        self.seen += n
        sample = sample.clamp(max=self.size - 1)  # an accelerator says later that there is no such one
        weight = self.plan.weight_of(sample, self._score[sample]) * (index >= 0)
        return (torch.where(index < 0, 0, loss) * weight).sum() * (self.world / n)

    def check(self) -> None:
        """Raise if something was wrong with the losses so far. Waits for the device; nothing else in a step does.

        Raises:
            NotFinite: naming the samples.
            ValueError: an index came that no sample has, or one came twice.
        """
        self.ledger.check()

    def mean(self) -> float:
        """Mean over the data set of what was remembered this epoch, by the visits so far and their weights.

        The same on every rank and after a resume; call it on all ranks.
        """
        self._merge()
        return self.memory.mean(self.ledger.loss[:-1].cpu(), self.plan)

    def _close(self) -> None:
        """End the epoch: turn the losses that came back, on any rank, into scores."""
        if not self.seen:
            raise ValueError(
                f"epoch {self.epoch} ends and no loss was handed over; call infobatch(losses, index) in every step"
            )
        self._merge()
        self.check()
        loss = self.ledger.loss[:-1].cpu()
        stranger = self.plan.stranger(loss != UNSEEN)
        if stranger is not None:
            raise ValueError(f"sample {stranger} was scored in epoch {self.epoch}, which does not visit it; {WHOSE}")
        self.memory.take(loss, self.plan)
        self.visited += self.seen
        self.dropped += self.length - self.seen
        self.epoch, self.seen, self._plan = self.epoch + 1, 0, None
        self.ledger.clear()
        self._score = self.score.to(self.ledger.loss.device)

    def _merge(self) -> None:
        self.ledger.loss = self.merge(self.ledger.loss)

    # -- the state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the rest of the run depends on, equal on all ranks; call it on all of them.

        4 bytes a sample between epochs, 8 inside one.
        """
        if self.seen:
            self._merge()
        return {
            "epoch": self.epoch,
            "seen": self.seen,
            "visited": self.visited,
            "dropped": self.dropped,
            "score": self.score.clone(),
            "levels": self.memory.levels.sums.clone(),
            "repeats": self.memory.repeats.sums.clone(),
            "loss": self.ledger.loss[: self.size if self.seen else 0].cpu().clone(),
            "plan": self.plan.fingerprint() if self.seen else 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, on any number of processes.

        Raises:
            ValueError: the state is of a data set of another size, or inside an epoch that was planned otherwise.
        """
        if len(state["score"]) != self.size:
            raise ValueError(f"the state is of {len(state['score'])} samples, the data set has {self.size}")
        self.epoch, self.seen, self._plan = state["epoch"], state["seen"], None
        self.visited, self.dropped = state["visited"], state["dropped"]
        self.memory.score.copy_(state["score"])
        self._score = self.score.to(self.ledger.loss.device)
        self.memory.levels.restore(state["levels"])
        self.memory.repeats.sums = state["repeats"].clone()
        self.ledger.clear()
        if self.seen:
            self.ledger.loss[:-1] = state["loss"].to(self.ledger.loss.device)
            self._draw()
            if self.plan.fingerprint() != state["plan"]:
                raise ValueError(
                    "the state lies inside an epoch whose plan would be another one now; go on with the same seed, "
                    "policy, its settings, budget, anneal and epochs, or from a state at the start of an epoch"
                )

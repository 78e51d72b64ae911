"""InfoBatch: who is visited in an epoch, at what level, and what each visit counts for.

One object is the sampler (whom to visit), the clock (`progress`) and the memory (scores). It knows
nothing of models, data or accelerators, and works alone in anybody's loop:

    infobatch = InfoBatch(len(data), epochs=100)
    loader = DataLoader(Indexed(data), 256, sampler=infobatch)
    for epoch in infobatch.epochs():
        for index, image, label in loader:
            losses = F.cross_entropy(model(image), label, reduction="none")
            infobatch(losses, index).backward()

The method is that of Qin et al., "InfoBatch: Lossless training speed up by unbiased dynamic data
pruning" (ICLR 2024), corrected in two places: a loss is compared with what is usual at its level, and
scores are smoothed over visits. docs/method.md has the mathematics.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from pretrain.levels import Usual
from pretrain.policies import POLICIES, Plan, Policy
from pretrain.rng import Draws, generator

UNSEEN = -math.inf  # a loss not received this epoch; the neutral element of the maximum over ranks
ROTATION = (math.sqrt(5) - 1) / 2  # visits of one sample, this far apart, spread evenly over the levels


class NotFinite(FloatingPointError):
    """A loss is NaN or infinite.

    Args:
        sentence: the message.
        index: the samples whose loss it is.
    """

    def __init__(self, sentence: str, index: list[int]) -> None:
        super().__init__(sentence)
        self.index = index


class InfoBatch(Sampler[int]):
    """Plans epochs, hands out indices, remembers scores and weighs losses.

    Args:
        size: samples in the data set, N.
        epochs: epochs in the whole run, E.
        policy: a name in `pretrain.policies.POLICIES`, or a function like those there.
        ratio: share skipped among well-learned samples, in [0, 1).
        anneal: share of the epochs, the last ones, in which everybody is visited, in [0, 1]; rounded up.
        smoothing: what a sample's score keeps of its past at a visit, in [0, 1).
        seed: of the plans; no global generator is read or seeded.
        rank, world: this process and how many there are; each is handed its share of one global order.
        merge: element-wise maximum of a tensor over all ranks, in place or not; called by all of them at
            an epoch's end and by `state_dict`. A maximum, because merging twice then changes nothing.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        size: int,
        *,
        epochs: int,
        policy: str | Policy = "infobatch",
        ratio: float = 0.5,
        anneal: float = 0.125,
        smoothing: float = 0.7,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        merge: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        if isinstance(policy, str):
            if policy not in POLICIES:
                raise ValueError(f"there is no policy {policy!r}; there are {', '.join(POLICIES)}")
            policy = POLICIES[policy]
        for name, value, good in (
            ("size", size, size >= 1),
            ("epochs", epochs, epochs >= 1),
            ("ratio", ratio, 0 <= ratio < 1),
            ("anneal", anneal, 0 <= anneal <= 1),
            ("smoothing", smoothing, 0 <= smoothing < 1),
            ("rank", rank, 0 <= rank < world),
        ):
            if not good:
                allowed = {"size": ">= 1", "epochs": ">= 1", "anneal": "in [0, 1]", "rank": f"in [0, {world})"}
                raise ValueError(f"{name} must be {allowed.get(name, 'in [0, 1)')}, got {value}")
        self.size, self.total_epochs, self.seed = size, epochs, seed
        self.policy, self.ratio, self.anneal, self.smoothing = policy, ratio, anneal, smoothing
        self.rank, self.world, self.merge = rank, world, merge

        self.epoch = 0
        self.seen = 0  # visits of this epoch whose losses came back, over all ranks
        self.visited = 0  # the same, over the epochs before this one
        self.score = torch.full((size,), math.nan)  # float32 [N]; NaN where never visited
        self.usual = Usual()  # losses by level
        # One slot more than there are samples: it takes what does not count (weight 0, never a score).
        self._loss = torch.full((size + 1,), UNSEEN)
        self._finite = torch.tensor(True)
        self._plan: Plan | None = None

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
        return len(self.plan.order)

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]; schedules are functions of it."""
        within = self.seen / self.length if self._plan is not None else 0.0
        return (self.epoch + within) / self.total_epochs

    def epochs(self) -> Iterator[int]:
        """Draw each epoch's plan and yield the epoch's number; goes on inside an epoch after a resume."""
        while self.epoch < self.total_epochs:
            self._draw()
            yield self.epoch
            self._close()

    def _draw(self) -> None:
        """This epoch's plan: a function of the scores, the seed and the epoch alone."""
        first_full = self.total_epochs - math.ceil(self.anneal * self.total_epochs - 1e-9)
        policy = self.policy if self.epoch < first_full else POLICIES["full"]
        start = Draws(self.seed, index=torch.arange(self.size)).uniform(1)[:, 0].double()
        level = ((start + self.epoch * ROTATION) % 1.0).float().clamp_(max=1 - 2**-24)
        self._plan = policy(self.score, level, ratio=self.ratio, rng=generator(self.seed, self.epoch))
        self._weight = torch.cat([self._plan.weight, torch.zeros(1)]).to(self._loss.device)

    # -- the sampler -------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Visits left in this epoch for this rank; the same on every rank."""
        return math.ceil((self.length - self.seen) / self.world)

    def __iter__(self) -> Iterator[int]:
        """This rank's share of what is left of the epoch; asking twice gives the same answer.

        Global step by global step the ranks together visit what one process would. Where the last round
        is short, a rank is handed a slot that does not count: ``~i``, negative, for some sample i.
        """
        order, start = self.plan.order, self.seen
        share = order[start + self.rank :: self.world]
        padding = [~int(order[0])] * (len(self) - len(share))

        def visits() -> Iterator[int]:
            for chunk in share.split(1 << 16):
                yield from chunk.tolist()
            yield from padding

        return visits()

    def counted(self, index: Tensor) -> int:
        """Samples that this batch and those of the other ranks beside it are together."""
        return min(len(index) * self.world, self.length - self.seen)

    def level(self, index: Tensor) -> Tensor:
        """float32 [B] in [0, 1): where this epoch's plan visits the samples `index`, int64 [B]."""
        return self.plan.level[torch.where(index < 0, ~index, index).cpu()].to(index.device)

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
            ValueError: not one loss per index, or more losses than the epoch's plan has visits.
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
        if self._loss.device != loss.device:
            self._loss, self._weight = self._loss.to(loss.device), self._weight.to(loss.device)
            self._finite = self._finite.to(loss.device)
        slot = torch.where(index < 0, self.size, index)
        remembered = (loss if score is None else score).detach().float()
        good = remembered.isfinite() & loss.detach().isfinite()
        self._loss[slot] = torch.where(good, remembered, math.inf)  # infinite: what a maximum over ranks keeps
        self._finite = self._finite & good.all()
        self.seen += n
        return (loss * self._weight[slot]).sum() * (self.world / n)

    def check(self) -> None:
        """Raise if a loss of this epoch was not finite. Waits for the device; nothing else here does.

        Raises:
            NotFinite: naming the samples.
        """
        if not self._finite:
            bad = self._loss[:-1].isposinf().nonzero().squeeze(1).tolist()
            more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
            raise NotFinite(f"the loss of sample {', '.join(map(str, bad[:10]))}{more} is not finite", bad)

    def mean(self) -> float:
        """Mean over the data set of what was remembered this epoch, by the visits so far and their weights.

        The same on every rank and after a resume; call it on all ranks.
        """
        self._loss = self.merge(self._loss)
        loss = self._loss[:-1].cpu()
        visited = loss != UNSEEN
        weight = self.plan.weight[visited].double()
        return ((weight * loss[visited]).sum() / weight.sum()).item()

    def _close(self) -> None:
        """End the epoch: turn the losses that came back, on any rank, into scores."""
        self._loss = self.merge(self._loss)
        self._finite = self._finite & ~self._loss[:-1].isposinf().any()
        self.check()
        loss = self._loss[:-1].cpu()
        visited = (loss != UNSEEN).nonzero().squeeze(1)
        loss, level, weight = loss[visited].double(), self.plan.level[visited], self.plan.weight[visited].double()
        if (loss < 0).any():
            raise ValueError(
                f"scores must not be negative, got {loss.min().item():.3g} for sample "
                f"{visited[loss.argmin()].item()}; hand over a `score` beside a loss that can be negative"
            )
        ratio = loss / self.usual.at(loss, level, weight)
        old = self.score[visited]
        new = torch.where(old.isnan(), ratio.float(), old.lerp(ratio.float(), 1 - self.smoothing))
        self.score[visited] = new
        self.visited += self.seen
        self.epoch, self.seen, self._plan = self.epoch + 1, 0, None
        self._loss.fill_(UNSEEN)

    # -- the state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the rest of the run depends on, equal on all ranks; call it on all of them."""
        self._loss = self.merge(self._loss)
        return {
            "epoch": self.epoch,
            "seen": self.seen,
            "visited": self.visited,
            "score": self.score.clone(),
            "usual": self.usual.sums.clone(),
            "loss": self._loss[:-1].cpu().clone(),
            "plan": self._fingerprint() if self.seen else 0,
        }

    def _fingerprint(self) -> int:
        """A number that another order or other weights would not have."""
        order = self.plan.order
        weight = self.plan.weight[order].view(torch.int32).long()
        return int(((order + 1) * (torch.arange(len(order)) + 1) + weight).sum())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, on any number of processes.

        Raises:
            ValueError: the state is of a data set of another size, or inside an epoch that was planned otherwise.
        """
        if len(state["score"]) != self.size:
            raise ValueError(f"the state is of {len(state['score'])} samples, the data set has {self.size}")
        self.epoch, self.seen, self.visited = state["epoch"], state["seen"], state["visited"]
        self.score, self.usual.sums = state["score"].clone(), state["usual"].clone()
        self._loss[:-1] = state["loss"].to(self._loss.device)
        self._plan = None
        if self.seen:
            self._draw()
            if self._fingerprint() != state["plan"]:
                raise ValueError(
                    "the state lies inside an epoch whose plan would be another one now; go on with the same seed, "
                    "policy, ratio, anneal and epochs, or from a state at the start of an epoch"
                )

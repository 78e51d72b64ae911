"""Denoising at known noise levels as an objective, which also trains the classifier of models/nm.py."""

from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from pretrain.models.nm import NMNetwork
from torch import Tensor, nn

from pretrain.adapters import Batch, Losses, bare
from pretrain.core.rng import SampleRNG

WARMUP, CLASSIFIER_START = 0.1, 0.5  # of the training: all weights before, the classifier decides from then on


@dataclass(frozen=True)
class Restoration:
    """The squared error of the predicted noise, whose standard deviation is uniform and known to the network.

    With a network of `--model.by image` two terms train its classifier p: one for confident choices,
    -sum_(i<j) |p_i - p_j|, and one for choices that are used equally often, sum_k |mean p_k - 1 / K|, beside a squared
    excess over the budget. The loss terms of ClassPruning (Zhou et al., 2022) could not be had, so these are ClassSR's
    (Kong et al., 2021) in their place. The terms of mean p have the gradient at its running mean, so that the loss of a
    sample does not depend on the others in its batch.

    Attributes:
        low: standard deviation of the noise at level 0, in 1/255 of the range of the pixels.
        high: that at level 1.
        confident: weight of the term for confident choices.
        equal: weight of the term for equal use.
        excess: weight of the squared excess of the mean of N / M over the budget.
    """

    low: float = 5.0
    high: float = 50.0
    confident: float = 0.1
    equal: float = 0.1
    excess: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(f"low and high must be ascending and above 0, got {self.low} and {self.high}")
        if min(self.confident, self.equal, self.excess) < 0:
            raise ValueError(
                f"confident, equal and excess must be 0 or more, got {self.confident}, {self.equal} and {self.excess}"
            )

    def noisy(self, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy images, the noise in units of its standard deviation, both [B, C, H, W], and that deviation [B]."""
        sigma = (self.low + (self.high - self.low) * batch.level) * 2 / 255  # images lie in [-1, 1]
        noise = rng.normal(*batch.image.shape[1:])
        return batch.image + rearrange(sigma, "b -> b 1 1 1") * noise, noise, sigma

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG, progress: float = 1.0) -> Losses:
        """One forward pass at time 1000 level; the score is the squared error alone.

        Args:
            model: a denoiser.
            batch: the images and levels.
            rng: random numbers per sample.
            progress: of the training, in [0, 1], for the networks of models/nm.py, see `early_choice`. The temperature
                of a classifier's choices falls with it.
        """
        x, noise, _ = self.noisy(batch, rng)
        inputs, network = (x, 1000 * batch.level, batch.label), bare(model)
        choice = self.early_choice(network, batch, rng, progress) if model.training else None
        if isinstance(network, NMNetwork) and network.classifier is not None and model.training and choice is None:
            gumbel = -(-rng.uniform(len(network.choices)).clamp(min=2.0**-25).log()).log()
            output, p = model(*inputs, gumbel=gumbel, temperature=5 * 0.1**progress)
            extra = self.choice_loss(p, network.usage, torch.tensor(network.costs, device=p.device), network.budget)
        else:
            output, extra = model(*inputs) if choice is None else model(*inputs, choice=choice), 0
        error = reduce((output - noise).square(), "b c h w -> b", "mean")
        return Losses(error + extra, score=error.detach())

    def early_choice(self, network: nn.Module, batch: Batch, rng: SampleRNG, progress: float) -> Tensor | None:
        """All weights in the first tenth of the training; then, with a classifier, random choices up to the middle.

        Returns:
            int64 [B]; None: the choice is the network's.
        """
        if not isinstance(network, NMNetwork):
            return None
        if progress < WARMUP and network.group in network.choices:
            return torch.full_like(batch.label, network.choices.index(network.group))
        if network.classifier is not None and progress < CLASSIFIER_START:
            return (rng.uniform() * len(network.choices)).long()
        return None

    def choice_loss(self, p: Tensor, usage: Tensor, cost: Tensor, budget: float) -> Tensor:
        """The classifier's terms, float32 [B], of probabilities p [B, K], their running mean [K] and N / M [K]."""
        between = (p[:, :, None] - p[:, None]).abs().sum(dim=(1, 2)) / 2
        equal = p @ (usage - 1 / len(usage)).sign()
        excess = 2 * (usage @ cost - budget).clamp(min=0) * (p @ cost)
        return self.excess * excess + self.equal * equal - self.confident * between

"""Group relative policy optimization (GRPO) of a causal language model as an objective, with pruned completions.

GRPO is that of Shao et al., "DeepSeekMath" (2024): G completions per prompt are sampled, and the advantage of a
completion is its reward relative to those of its group. Pruning within a group follows two papers. CPPO (Lin et al.,
"CPPO: Accelerating the training of group relative policy optimization-based reasoning models", NeurIPS 2025) keeps the
completions with the largest absolute advantages, which is biased. DPPO (Zhu et al., "DPPO", ICML 2026) draws them and
weighs the kept ones by one over their probability, which is not. DPPO's full text and code could not be had: its rule,
and the packing of sequences, follow the abstract and a summary.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from language_adapter import Instruction, means
from language_data import collate
from torch import Tensor, nn

from pretrain.adapters import Losses
from pretrain.core.rng import SampleRNG
from pretrain.infobatch.policies import inclusion_probabilities

RULES = ("all", "random", "cppo", "dppo", "proportional", "nonzero")
EPS = 1e-4  # added to the standard deviation of the rewards
FLOOR = 0.1  # least inclusion probability of rule proportional, so that no weight is above 10
WIDTH = 64  # tokens of a row of packed sequences


class Rollouts(NamedTuple):
    """A batch of prompts, each with a group of G completions; sequences are padded on the right."""

    tokens: Tensor  # int64 [Q, G, L]; prompt, completion with its end token, padding
    prompt: Tensor  # int64 [Q]; tokens of the prompt
    length: Tensor  # int64 [Q, G]; tokens of prompt and completion
    old: Tensor  # float32 [Q, G, L - 1]; log probability of the next token when it was sampled; 0 outside completions
    reward: Tensor  # float32 [Q, G]
    index: Tensor  # int64 [Q]; the prompts


def advantages(reward: Tensor) -> Tensor:
    """Rewards relative to their group: (R - mean) / (standard deviation + EPS), the latter over G, not G - 1.

    Args:
        reward: [Q, G].

    Returns:
        float32 [Q, G]; exactly 0 in a group whose rewards are all equal.
    """
    reward = reward.float()
    centred = reward - reward.mean(dim=1, keepdim=True)
    equal = reward.amax(dim=1, keepdim=True) == reward.amin(dim=1, keepdim=True)
    return (centred / (reward.std(dim=1, correction=0, keepdim=True) + EPS)).masked_fill(equal, 0)


def probabilities(size: Tensor, rule: str, share: float) -> Tensor:
    """float64 [Q, G]; inclusion probabilities of the rules random and proportional, for |A| [Q, G] and their share."""
    size = size.double().clamp(min=1e-6) if rule == "proportional" else torch.ones_like(size, dtype=torch.float64)
    return inclusion_probabilities(size, 1 - share, min(FLOOR, 1 - share))


def systematic(probability: Tensor, start: Tensor) -> Tensor:
    """Draw with given inclusion probabilities: those in whose interval of the cumulative sum lies start + an integer.

    Args:
        probability: [Q, G] in (0, 1].
        start: [Q] in [0, 1), uniform.

    Returns:
        bool [Q, G]; the sum of a row is that of its probabilities, rounded up or down.
    """
    end = probability.double().cumsum(dim=1) - start.double()[:, None]
    begin = torch.cat([-start.double()[:, None], end[:, :-1]], dim=1)
    return (end.ceil() > begin.ceil()) | (probability >= 1)


def kept(advantage: Tensor, rule: str, share: float, rng: SampleRNG) -> tuple[Tensor, Tensor]:
    """Which completions of each group are used, and their weights.

    The rules, each of which keeps about (1 - share) G completions unless it says otherwise:

    - all: every completion; ignores the share.
    - random: a uniform subset; weight 1 / (1 - share).
    - cppo: the ceil((1 - share) G) largest |A|, with weight 1. **Biased**: the objective is another one.
    - dppo: |A| below the group's mean is dropped with probability `share`, else weighs 1 / (1 - share); others are all
      kept with weight 1.
    - proportional: probability p in proportion to |A|, at least `FLOOR`; weight 1 / p.
    - nonzero: all with A != 0; ignores the share. Without a KL term the others have no gradient, so nothing is lost.

    Args:
        advantage: [Q, G].
        rule: one of `RULES`.
        share: of the completions that are dropped, in [0, 1).
        rng: random numbers of the prompts.

    Returns:
        bool [Q, G], and float32 [Q, G], 0 where dropped.
    """
    size = advantage.abs()
    if rule == "all" or rule == "nonzero":
        mask = torch.ones_like(size, dtype=torch.bool) if rule == "all" else size > 0
        return mask, mask.float()
    if rule == "cppo":
        count = math.ceil((1 - share) * size.shape[1] - 1e-9)
        mask = torch.zeros_like(size, dtype=torch.bool)
        mask.scatter_(1, size.argsort(dim=1, descending=True, stable=True)[:, :count], True)
        return mask, mask.float()
    if rule == "dppo":
        below = size < size.mean(dim=1, keepdim=True) - 1e-6  # not by the rounding of a mean of equal numbers
        mask = ~below | (rng.uniform(size.shape[1]) >= share)
        return mask, torch.where(below, 1 / (1 - share), 1.0) * mask
    probability = probabilities(size, rule, share)
    mask = systematic(probability, rng.uniform())
    return mask, (mask / probability).float()


@dataclass(frozen=True)
class GroupPolicy:
    """GRPO's clipped objective, one loss per prompt; the score is the mean |A| of its group.

    A prompt whose completions are all right or all wrong has score 0, and InfoBatch's policy `infobatch` uses it less
    often. The loss of a prompt is the sum of weight * loss over the kept completions divided by G, the number sampled,
    never by the number kept. There is no KL term to a reference model.

    Attributes:
        rule: how completions are chosen, one of `RULES`; see `kept`.
        share: of the completions that are dropped, in [0, 1).
        clip: epsilon; the ratio of probabilities counts up to 1 - epsilon and 1 + epsilon.
    """

    rule: str = "all"
    share: float = 0.5
    clip: float = 0.2

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule}")
        if not 0 <= self.share < 1:
            raise ValueError(f"share must be in [0, 1), got {self.share}")

    def chosen(self, batch: Rollouts, rng: SampleRNG) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages, the mask of the kept completions and their weights, each [Q, G]."""
        advantage = advantages(batch.reward)
        return advantage, *kept(advantage, self.rule, self.share, rng)

    def __call__(self, model: nn.Module, batch: Rollouts, rng: SampleRNG) -> Losses:
        """One forward pass of the kept completions; if none is kept, the losses are 0 and have no gradient."""
        advantage, mask, weight = self.chosen(batch, rng)
        score, groups = advantage.abs().mean(dim=1), mask.shape[1]
        loss = torch.zeros_like(score)
        if mask.any():
            prompt = mask.nonzero()[:, 0]
            tokens, length, gain = batch.tokens[mask], batch.length[mask], advantage[mask]
            start = batch.prompt[prompt]
            lengths = zip(length.tolist(), start.tolist(), strict=True)
            items = [(i, tokens[i, :end], first) for i, (end, first) in enumerate(lengths)]
            packed = collate(items, WIDTH).to(tokens.device)
            logits, target, sequence = Instruction(packed=True).logits(model, packed)
            sequence, order = sequence.sort(stable=True)  # rows are packed in another order
            log_probability = -F.cross_entropy(logits, target, reduction="none")[order]
            step = torch.arange(1, tokens.shape[1], device=tokens.device)  # position of the token that is predicted
            old = batch.old[mask][(step >= start[:, None]) & (step < length[:, None])]
            ratio, gain = (log_probability - old).exp(), gain[sequence]
            value = torch.minimum(ratio * gain, ratio.clamp(1 - self.clip, 1 + self.clip) * gain)
            each = -means(value, sequence, len(items))
            loss = loss.index_add(0, prompt, weight[mask] * each / groups)
        return Losses(loss, score)

"""Instruction tuning of a causal language model as an objective."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.adapters import Losses
from pretrain.core.rng import SampleRNG


class Sequences(NamedTuple):
    """A batch of instructions with answers."""

    tokens: Tensor  # int64 [B, L]; instruction, answer, padding tokens
    answer: Tensor  # bool [B, L]; mask of the answers' tokens
    index: Tensor  # int64 [B]; the samples


@dataclass(frozen=True)
class Instruction:
    """Cross entropy of the answer's tokens, averaged over each answer: one loss per sequence."""

    def tokens(self, model: nn.Module, batch: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the next tokens, [B, L - 1, V], the next tokens, and the mask of the answers, [B, L - 1]."""
        returned: Any = model(batch.tokens)
        return returned.logits[:, :-1].float(), batch.tokens[:, 1:], batch.answer[:, 1:]

    def __call__(self, model: nn.Module, batch: Sequences, rng: SampleRNG) -> Losses:
        """One forward pass; uses no rng."""
        logits, target, answer = self.tokens(model, batch)
        loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        return Losses((loss * answer).sum(dim=1) / answer.sum(dim=1).clamp(min=1))

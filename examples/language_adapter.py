"""Instruction tuning of a causal language model as an objective."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.adapters import Losses
from pretrain.core.rng import SampleRNG


class Sequences(NamedTuple):
    """A batch of B instructions with answers in R rows: one a row, padded, or several, packed."""

    tokens: Tensor  # int64 [R, L]
    sequence: Tensor  # int64 [R, L]; which of the batch a token belongs to, 0 to B - 1; -1 is padding
    position: Tensor  # int64 [R, L]; of a token in its sequence
    answer: Tensor  # bool [R, L]; mask of the answers' tokens, of their end tokens, too
    index: Tensor  # int64 [B]; the samples

    def to(self, device: torch.device) -> "Sequences":
        """The same on a device."""
        return Sequences(*(field.to(device) for field in self))


@dataclass(frozen=True)
class Instruction:
    """Cross entropy of the answer's tokens, averaged over each answer: one loss per sequence.

    Attributes:
        packed: whether rows hold several sequences. Then the model gets their positions, and a 4-dimensional attention
            mask by which tokens see earlier ones of their own sequence only; transformers 4 and 5 pass it on unchanged
            to the attention implementations "sdpa", the default, and "eager". Else there is no mask: padding is on the
            right, where causal attention doesn't see it.
    """

    packed: bool = False

    def logits(self, model: nn.Module, batch: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """Of all A tokens of answers: their logits, float32 [A, V], the tokens, and their sequences, int64 [A]."""
        settings: dict[str, Any] = {"use_cache": False}
        if self.packed:
            settings |= {"position_ids": batch.position, "attention_mask": attention_mask(model, batch.sequence)}
        returned: Any = model(batch.tokens, **settings)
        answer = batch.answer[:, 1:]
        return returned.logits[:, :-1][answer].float(), batch.tokens[:, 1:][answer], batch.sequence[:, 1:][answer]

    def __call__(self, model: nn.Module, batch: Sequences, rng: SampleRNG | None = None) -> Losses:
        """One forward pass; uses no rng."""
        logits, target, sequence = self.logits(model, batch)
        return Losses(means(F.cross_entropy(logits, target, reduction="none"), sequence, len(batch.index)))


def means(values: Tensor, sequence: Tensor, count: int) -> Tensor:
    """Means [count] of values [A] over the tokens of each sequence."""
    zeros = values.new_zeros(count)
    return zeros.index_add(0, sequence, values) / zeros.index_add(0, sequence, torch.ones_like(values))


def attention_mask(model: Any, sequence: Tensor) -> Tensor:
    """What is added to attention scores, [R, 1, L, L]: 0 for earlier tokens of the same sequence, else the minimum."""
    dtype = model.get_input_embeddings().weight.dtype
    seen = (sequence[:, :, None] == sequence[:, None, :]).tril()  # padding sees padding, so that no row is empty
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]

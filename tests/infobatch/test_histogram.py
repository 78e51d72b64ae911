"""The histogram of scores and its quantiles against numpy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.core.rng import generator
from pretrain.infobatch.policies import histogram


def scores(size: int, seed: int, unseen: float = 0.2) -> Tensor:
    """Of all sizes, some equal, some nought, some never visited."""
    rng = generator(seed)
    score = torch.rand(size, generator=rng) ** 3 * 4
    score = torch.where(torch.rand(size, generator=rng) < 0.2, score.round(decimals=1), score)
    return score.masked_fill(torch.rand(size, generator=rng) < unseen, math.nan)


@given(st.integers(1, 400), st.integers(0, 99))
@settings(deadline=None)
def test_histogram_counts_everybody_seen(size: int, seed: int) -> None:
    score = scores(size, seed)
    count, middle = histogram(score)
    assert count.sum() == (~score.isnan()).sum()
    assert (count * middle).sum().item() == pytest.approx(score.nansum().item(), rel=5e-3, abs=1e-9)

"""The histogram of scores and its quantiles against numpy."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.core.rng import generator
from pretrain.infobatch import histogram as module
from pretrain.infobatch.histogram import CELLS, FIRST_NOT_FINITE, cell_start, histogram, quantiles

chunks = st.sampled_from([7, 64, 1 << 20])  # scores processed at a time
STARTS = (np.arange(FIRST_NOT_FINITE, dtype=np.uint32) << 16).view(np.float32)  # the least score of every finite cell


def scores(size: int, seed: int) -> Tensor:
    """float32 [size] over many orders of magnitude; some 0, -0, equal, or NaN."""
    rng = generator(seed)
    score = torch.rand(size, generator=rng) * 10 ** torch.randint(-12, 6, (size,), generator=rng).float()
    kind = torch.randint(12, (size,), generator=rng)
    score[kind == 0], score[kind == 1], score[kind == 2], score[kind == 3] = 0.0, -0.0, 0.75, torch.nan
    return score


@given(st.integers(1, 400), st.integers(0, 999), chunks)
@settings(deadline=None)
def test_histogram_counts_every_score(size: int, seed: int, chunk: int) -> None:
    score = scores(size, seed)
    known = score[~score.isnan()].numpy()
    with patch.object(module, "CHUNK", chunk):
        count, middle = histogram(score)
    cell = np.searchsorted(STARTS, known, side="right") - 1
    assert count.tolist() == np.bincount(cell, minlength=CELLS).tolist()
    assert (count * middle).sum().item() == pytest.approx(known.astype(np.float64).sum(), rel=5e-3, abs=1e-9)
    assert (middle[:FIRST_NOT_FINITE].numpy() > STARTS).all() and not middle[FIRST_NOT_FINITE:].any()
    assert cell_start(middle[cell]).tolist() == STARTS[cell].tolist()


@given(st.integers(1, 400), st.integers(0, 999), st.lists(st.floats(0, 1, exclude_max=True), max_size=5), chunks)
@settings(deadline=None)
def test_quantiles_are_elements_of_the_sorted_scores(size: int, seed: int, q: list[float], chunk: int) -> None:
    score = scores(size, seed).abs()  # -0 has a test of its own
    known = np.sort(score[~score.isnan()].numpy())
    q = [0.0, 0.5, *q]
    with patch.object(module, "CHUNK", chunk):
        found = quantiles(score, tuple(q))
    assert found.tolist() == ([known[int(each * len(known))] for each in q] if len(known) else [0.0] * len(q))


def test_quantiles_of_unknown_scores_are_zero() -> None:
    assert quantiles(torch.full((9,), math.nan), (0.0, 0.7)).tolist() == [0, 0]


def test_quantiles_take_negative_zero_for_zero() -> None:
    """The negative logarithm of a probability of 1 is such a loss."""
    assert quantiles(torch.tensor([-0.0, 1.0, 2.0, -0.0]), (0.0, 0.25, 0.5, 0.75)).tolist() == [0, 0, 1, 2]

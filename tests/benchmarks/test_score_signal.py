"""benchmarks/score_signal.py on generated losses whose parts are known."""

import numpy as np
import pytest
import score_signal


def losses(level: float, sample: float, both: float, draw: float, shape=(400, 16, 8)) -> np.ndarray:
    rng = np.random.default_rng(0)
    s, u, r = shape
    parts = (1, u, 1), (s, 1, 1), (s, u, 1), (s, u, r)
    sizes = level, sample, both, draw
    return 10 + sum(size * rng.standard_normal(part) for size, part in zip(sizes, parts, strict=True))


def test_shares_of_the_variance_are_the_true_ones() -> None:
    x = losses(3.0, 1.0, 0.5, 2.0)
    level = x.mean((0, 2)).var(ddof=1)  # of these 16 levels
    parts = np.array([level, 1.0, 0.25, 4.0])
    assert [*score_signal.shares(x).values()] == pytest.approx(parts / parts.sum(), abs=0.03)


def test_the_correlation_of_k_visits_is_spearman_and_browns() -> None:
    found = score_signal.correlations(losses(0, 1.0, 0, 2.0), (1, 4, 10))
    alone = 1 / (1 + 4)  # share of a single loss's variance that is due to the sample
    expected = [(k * alone / (1 + (k - 1) * alone)) ** 0.5 for k in (1, 4, 10)]
    assert [*found.values()] == pytest.approx(expected, abs=0.04)


def test_the_share_decided_by_the_level() -> None:
    assert score_signal.decided_by_level(losses(5.0, 0, 0, 0.01)) > 0.95
    assert score_signal.decided_by_level(losses(0, 1.0, 0, 1.0)) < 0.01

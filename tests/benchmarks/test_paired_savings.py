"""benchmarks/proof.py: cost ratios of generated runs whose true ratio is known."""

import json
from pathlib import Path

import numpy as np
import proof
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

COSTS = (1.0, 0.85, 0.75, 0.65, 0.55, 0.45)


def record(arm: str, seed: int, cost: float, loss: float, **more) -> dict:
    family = arm.partition("@")[0]
    costs = {"samples_used": 1000 * cost, "flops": 1e9 * cost, "seconds": 10 * cost}
    return {"arm": arm, "family": family, "seed": seed, "cost": costs, "quality": {"validation_loss": loss}} | more


def made_up(rng: np.random.Generator, ratio: float, noise: float, seeds: int = 3) -> list[proof.Arm]:
    """Full training whose loss is 1 / cost, and an arm that needs `ratio` of its cost; runs differ by `noise`."""

    def runs(arm: str, cost: float, loss: float) -> list[dict]:
        return [record(arm, seed, cost, loss + noise * rng.standard_normal()) for seed in range(seeds)]

    records = [run for cost in COSTS for run in runs(f"shortened@{cost}" if cost < 1 else "full", cost, 1 / cost)]
    return proof.arms_of([*records, *runs("arm", 0.65 * ratio, 1 / 0.65)])


def cost_ratio(arms: list[proof.Arm]) -> proof.Ratio:
    curve = proof.curve_of(arms, "validation_loss", "flops")
    (arm,) = (arm for arm in arms if arm.name == "arm")
    return proof.ratio(proof.redrawn(arms, "validation_loss"), arm, curve, "validation_loss", "flops")


@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.3])
def test_the_cost_ratio_is_the_true_one(ratio: float) -> None:
    found = cost_ratio(made_up(np.random.default_rng(0), ratio, 0.0, seeds=1))
    assert found.value == pytest.approx(ratio, abs=1e-6) and found.bound == ""
    assert np.isnan(found.low)  # one run has no spread


def test_intervals_have_their_coverage() -> None:
    """95 %: of 300 comparisons of three seeds each, fewer than 9 % miss."""
    missed = 0
    for trial in range(300):
        found = cost_ratio(made_up(np.random.default_rng(trial), 1.0, 0.02))
        missed += not found.low <= 1.0 <= found.high
    assert 0.01 < missed / 300 < 0.09


@pytest.mark.parametrize(("loss", "bound", "value"), [(0.9, "<", 0.65), (3.0, ">", 0.65 / 0.45)])
def test_beyond_the_curve_the_ratio_is_a_bound(loss: float, bound: str, value: float) -> None:
    records = [record(f"shortened@{c}" if c < 1 else "full", 0, c, 1 / c) for c in COSTS]
    found = cost_ratio(proof.arms_of([*records, record("arm", 0, 0.65, loss)]))
    assert (found.bound, found.value) == (bound, pytest.approx(value))


def test_full_training_counts_at_its_best_learning_rate() -> None:
    records = [record(f"shortened@{c}", 0, c, 1 / c) for c in COSTS]
    records += [record(f"shortened@{c} fast", 0, c, 0.9 / c) for c in COSTS]
    records += [record(f"shortened@{c} slow", 0, c, 1.1 / c) for c in COSTS]
    curve = proof.curve_of(proof.arms_of(records), "validation_loss", "samples_used")
    assert [arm.name for arm in curve] == [f"shortened@{c} fast" for c in sorted(COSTS)]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_isotonic_regression_never_falls_and_moves_nothing_without_need(values: list[float]) -> None:
    points = np.array([values, sorted(values)])
    fitted = proof.rising(points)
    assert (np.diff(fitted, axis=1) >= -1e-9).all()
    assert fitted.mean(axis=1) == pytest.approx(points.mean(axis=1))
    assert fitted[1] == pytest.approx(points[1])
    # At least as close as the running maximum, which is one of the rising sequences.
    assert ((fitted[0] - points[0]) ** 2).sum() <= ((np.maximum.accumulate(points[0]) - points[0]) ** 2).sum() + 1e-9


def test_the_table_is_made_from_the_records_alone(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    rng = np.random.default_rng(0)
    for cost in COSTS:
        for seed in range(3):
            for arm in (f"shortened@{cost}" if cost < 1 else "full", f"pruned@{cost}"):
                loss = (1 if "pruned" in arm else 1.1) / cost + 0.01 * rng.standard_normal()
                levels = {
                    "validation_loss_by_level": [loss, loss / 2],
                    "knn_accuracy": 0.9 - 0.1 * loss,
                    "validation_loss": loss,
                }
                made = record(arm, seed, cost, loss, quality=levels)
                (tmp_path / "records" / f"{arm}-{seed}.json").write_text(json.dumps(made))
    text = proof.report(tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("| pruned@0.75 "))
    assert "0.750" in row and "0.91 [" in row
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "-9." in text.partition("by level")[2]  # a tenth less at every level
    saved = next(line for line in text.splitlines() if line.startswith("| pruned |"))
    assert float(saved.split("|")[2].split()[0]) == pytest.approx(1 / 1.1, abs=0.02)
    (tmp_path / "table.md").unlink()
    assert proof.report(tmp_path) == text

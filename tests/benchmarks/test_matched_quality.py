"""benchmarks/matched_quality.py and proof.py: ratios of generated runs whose true ratio is known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matched_quality
import numpy as np
import proof
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matched_quality import Curve, Ratio

COSTS = (1.0, 0.85, 0.75, 0.65, 0.55, 0.45)
RATES = {0.001: 1.04, 0.002: 1.0, 0.004: 1.04}  # learning rate: loss relative to the best rate's
PRUNED = ("--pruning.policy", "random")
METRIC = "validation_loss"


def record(arm: str, seed: int, cost: float, loss: float, *flags: str, **quality: Any) -> dict[str, Any]:
    family = arm.partition("@")[0]
    costs = {"samples_used": 1000 * cost, "flops": 1e9 * cost, "seconds": 10 * cost}
    return {"arm": arm, "family": family, "seed": seed, "flags": list(flags), "cost": costs} | {
        "quality": {METRIC: loss, **quality}
    }


def ordinary(loss: Callable[[int, float], float], seeds: int, *flags: str, name: str = "shortened") -> list[dict]:
    """Ordinary training at every length and learning rate; `loss` gives a run's of its seed and its true loss."""
    return [
        record(f"{name}@{cost} {rate}", seed, cost, loss(seed, worse / cost), "--optim.lr", str(rate), *flags)
        for cost in COSTS
        for rate, worse in RATES.items()
        for seed in range(seeds)
    ]


def noisy(rng: np.random.Generator, noise: float, common: float) -> Callable[[int, float], float]:
    """Losses that differ by `noise` between runs, and by `common` between seeds, alike in all arms."""
    of_seed = common * rng.standard_normal(100)
    return lambda seed, loss: loss + of_seed[seed] + noise * rng.standard_normal()


def bench(rng: np.random.Generator, true: float, noise: float, common: float, seeds: int) -> list[dict]:
    """Ordinary training whose loss is 1 / cost at its best learning rate, and an arm that needs `true` of its cost."""
    loss = noisy(rng, noise, common)
    arm = [record("arm", seed, 0.65 * true, loss(seed, 1 / 0.65), *PRUNED) for seed in range(seeds)]
    return ordinary(loss, seeds) + arm


def ratio_of(records: list[dict], *arms: str) -> Ratio:
    found = proof.Results(records)
    curve = found.curve(found.baseline, METRIC)
    own = [each for each in found.arms if each.name in (arms or ["arm"])]
    assert curve is not None
    return matched_quality.ratio(own, found.draws[METRIC], curve, METRIC)


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matched_quality, "DRAWS", 400)


# -- ratios and intervals -----------------------------------------------------------------------


@given(st.floats(0.3, 2.0))
@settings(max_examples=30, deadline=None)
def test_without_noise_the_ratio_is_the_true_one(true: float) -> None:
    found = ratio_of(bench(np.random.default_rng(0), true, 0.0, 0.0, seeds=1))
    assert found.value == pytest.approx(true, abs=1e-6) and found.sides[0] == 0
    assert np.isnan(found.low) and str(found) == f"{found.value:.2f}"  # nothing was repeated


@given(st.floats(0.3, 1.0), st.floats(0.9, 1.1), st.floats(1.01, 1.5))
@settings(max_examples=30, deadline=None)
def test_of_several_learning_rates_the_best_one_counts_at_its_own_cost(true: float, cost: float, worse: float) -> None:
    records = bench(np.random.default_rng(0), true, 0.0, 0.0, seeds=1)
    records.append(record("arm lr*2", 0, 0.65 * true * cost, worse / 0.65, *PRUNED))
    assert ratio_of(records, "arm", "arm lr*2") == ratio_of(records, "arm")


@given(st.floats(0.3, 1.5), st.floats(0.4, 0.9), st.floats(1.0, 1.1))
@settings(max_examples=30, deadline=None)
def test_the_baseline_has_the_better_batch_size(true: float, better: float, more: float) -> None:
    """Batches of 16 have `better` times the loss; an optimizer's own FLOPs make the run `more` times as expensive."""
    records = bench(np.random.default_rng(0), 1.0, 0.0, 0.0, seeds=1)
    small = ordinary(lambda _, loss: better * loss, 1, "--batch-size", "16", name="small")
    arm = record("both", 0, 0.65 * true, better / 0.65, *PRUNED, "--batch-size", "32")
    for run in (arm, *small):
        run["cost"]["flops"] *= more
    assert ratio_of([*records, *small, arm], "both").value == pytest.approx(true, abs=1e-6)
    rows = section(proof.tables(proof.Results([*records, *small, arm]), {}), "Ordinary training")[2:]
    assert len(rows) == len(COSTS) and all("at 0.002 in batches of 16" in row[3] for row in rows)


def test_the_ratio_at_the_batch_size_of_full_training_is_there_too() -> None:
    """In batches of 32 the arms need less than 0.7 of the cost; beside batches of 16, which need 0.65, more."""
    records = [*ordinary(lambda _, loss: loss, 1), record("full", 0, 1.0, 1.0, "--optim.lr", "0.002")]
    records += [record(f"arm@{cost}", 0, 0.7 * cost, 0.98 / cost, *PRUNED) for cost in COSTS]
    records = [run | {"flags": ["--batch-size", "32", *run["flags"]]} for run in records]
    small = ordinary(lambda _, loss: 0.65 * loss, 1, "--batch-size", "16", name="small")
    assert "In batches of" not in proof.tables(proof.Results(records), {})
    text = proof.tables(proof.Results(records + small), {})
    rows = {row[0]: row[4] for row in section(text, "Ratio to shortened training with AdamW")}
    alone = dict(section(text, "In batches of 32 alone: ratio"))
    assert (rows["arm@1.0"], alone["arm@0.75"]) == ("1.05", "0.68")
    sizes = dict(section(text, "FLOPs for the quality of full training in batches of 32 with AdamW"))
    assert sizes["in batches of 16"].endswith("0.65")
    titles = ("FLOPs for the quality of full training with", "In batches of 32 alone: FLOPs")
    rows, alone = (dict(section(text, title)) for title in titles)
    assert (rows["arm"], alone["arm"]) == ("≥0.70", "0.69")


@given(st.floats(0.3, 3.0), st.sampled_from(COSTS))
@settings(max_examples=30, deadline=None)
def test_without_noise_the_gain_is_the_distance_to_the_curve(loss: float, cost: float) -> None:
    found = proof.Results(
        [*bench(np.random.default_rng(0), 1.0, 0.0, 0.0, seeds=1), record("own", 0, cost, loss, *PRUNED)]
    )
    (own,) = (arm for arm in found.arms if arm.name == "own")
    assert float(found.gain([own], found.base, METRIC)) == pytest.approx(1 / cost - loss, abs=6e-4)


@pytest.mark.parametrize(("true", "seeds"), [(0.7, 5), (1.0, 3)])
def test_a_planted_ratio_is_found_and_intervals_have_their_coverage(true: float, seeds: int, few_draws: None) -> None:
    """95 %; 1.0 is a policy that is equal to random."""
    found = [ratio_of(bench(np.random.default_rng(t), true, 0.02, 0.04, seeds)) for t in range(120)]
    missed = np.mean([not ratio.low <= true <= ratio.high for ratio in found])
    assert 0 < missed < 0.1
    assert np.mean([ratio.value for ratio in found]) == pytest.approx(true, abs=0.01)
    assert true == 1 or all(ratio.high < 1 for ratio in found)


def test_where_learning_rates_are_equally_good_intervals_err_upwards(
    few_draws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Selecting among them flatters the baseline: a ratio is overstated rather than understated."""
    for rate in RATES:
        monkeypatch.setitem(RATES, rate, 1.0)
    found = [ratio_of(bench(np.random.default_rng(t), 1.0, 0.02, 0.04, 3)) for t in range(80)]
    assert np.mean([ratio.high < 1 for ratio in found]) < 0.025
    assert np.mean([ratio.low > 1 for ratio in found]) < 0.25


def test_an_arm_with_the_runs_of_another_has_its_ratio() -> None:
    rng = np.random.default_rng(0)
    records = bench(rng, 1.0, 0.02, 0.02, 3)
    twin = [run | {"arm": "twin", "family": "twin"} for run in records if run["arm"] == "arm"]
    one, two = (ratio_of(records + twin, name) for name in ("arm", "twin"))
    assert one.value == pytest.approx(two.value) and one.sides == two.sides
    assert (one.low, one.high) == pytest.approx((two.low, two.high), abs=0.01)


def test_joint_resampling_makes_intervals_narrower_where_seeds_have_a_common_effect(few_draws: None) -> None:
    """The same runs with their seeds exchanged within each arm have wider intervals."""
    narrower = []
    for trial in range(20):
        rng = np.random.default_rng(trial)
        records = bench(rng, 0.7, 0.02, 0.06, seeds=5)
        joint = ratio_of(records)
        exchanged = {name: rng.permutation(5) for name in sorted({run["arm"] for run in records})}
        apart = ratio_of([run | {"seed": int(exchanged[run["arm"]][run["seed"]])} for run in records])
        assert joint.value == pytest.approx(apart.value)
        narrower.append((joint.high - joint.low) / (apart.high - apart.low))
    assert np.mean(narrower) < 0.6


def test_an_arm_with_few_seeds_is_resampled_with_those_of_the_others() -> None:
    """One run has an interval from the spread of the other arms' runs; seeds may differ between arms."""
    records = bench(np.random.default_rng(0), 0.7, 0.02, 0.04, seeds=5)
    one = ratio_of([run for run in records if run["arm"] != "arm" or run["seed"] == 2])
    five = ratio_of(records)
    assert one.high - one.low > five.high - five.low > 0


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True))
@settings(max_examples=15, deadline=None)
def test_an_arm_with_few_seeds_is_compared_with_the_same_seeds_of_the_others(own: list[int]) -> None:
    """However much better than others these seeds are."""
    records = bench(np.random.default_rng(0), 0.7, 0.0, 0.3, seeds=5)
    found = ratio_of([run for run in records if run["arm"] != "arm" or run["seed"] in own])
    assert found.value == pytest.approx(0.7, abs=1e-6)


def test_arms_without_a_common_seed_are_compared_by_their_means() -> None:
    records = bench(np.random.default_rng(0), 0.7, 0.0, 0.0, seeds=3)
    moved = [run | {"seed": run["seed"] + 10 * (run["arm"] == "arm")} for run in records]
    assert ratio_of(moved).value == pytest.approx(0.7, abs=1e-6)


def test_learning_rates_are_selected_anew_in_every_draw() -> None:
    found = proof.Results(bench(np.random.default_rng(0), 0.7, 0.05, 0.0, seeds=3))
    curve = found.curve(found.baseline, METRIC)
    assert curve is not None and len(curve.cost) == len(COSTS)
    selected = set()
    for point, group in enumerate(matched_quality.by_length(found.baseline, METRIC)):
        draws = np.stack([found.draws[METRIC][arm.name] for arm in group])
        np.testing.assert_array_equal(curve.quality[:, point], draws.min(axis=0))
        selected |= set(draws.argmin(axis=0))
    assert selected == {0, 1, 2}


# -- where a curve stops ------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "value", "low", "high"), [(0.8, "≤", "≤", "≤"), (3.0, "≥", "≥", "≥")])
def test_beyond_the_curve_the_ratio_is_a_bound(loss: float, value: str, low: str, high: str) -> None:
    rng = np.random.default_rng(0)
    arm = [record("arm", seed, 0.65, loss + 0.01 * rng.standard_normal(), *PRUNED) for seed in range(3)]
    found = ratio_of(ordinary(noisy(rng, 0.01, 0), 3) + arm)
    assert [{-1: "≤", 0: "", 1: "≥"}[side] for side in found.sides] == [value, low, high]
    assert str(found) == f"{value}{0.65 if loss < 1 else 0.65 / 0.45:.2f}"


@pytest.mark.parametrize(("loss", "end"), [(1.01, 1), (1 / 0.45 - 0.01, 2)])
def test_an_end_of_the_interval_is_marked_where_draws_lie_beyond_the_curve(loss: float, end: int) -> None:
    rng = np.random.default_rng(1)
    errors = [-0.05, 0.0, 0.05]  # the arm's mean is `loss`
    arm = [record("arm", seed, 0.65, loss + errors[seed], *PRUNED) for seed in range(3)]
    signs = iter(rng.choice([-1, 1], 100).repeat(3))  # one for each arm, whose mean is exact
    found = ratio_of(ordinary(lambda seed, loss: loss + 0.02 * (seed - 1) * next(signs), 3) + arm)
    assert [bool(side) for side in found.sides] == [False, end == 1, end == 2]
    assert str(found).count("≤" if end == 1 else "≥") == 1


@given(
    st.integers(1, 6).flatmap(lambda n: st.lists(st.floats(-5, 5), min_size=n, max_size=n)),
    st.floats(-6, 6),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_the_cost_for_a_quality_is_on_the_curve_and_at_its_end_beyond_it(
    points: list[float], quality: float, lower: bool
) -> None:
    cost = np.arange(1.0, len(points) + 1)
    (needed,), (side,) = matched_quality.cost_for(np.array([quality]), Curve(cost, np.array([points])), lower)
    sign = -1 if lower else 1
    fitted = matched_quality.rising(sign * np.array([points]))[0]
    if side:
        assert needed == (cost[-1] if side > 0 else cost[0])
        assert sign * quality > fitted[-1] if side > 0 else sign * quality < fitted[0]
    elif len(points) > 1:
        assert np.interp(needed, cost, fitted) == pytest.approx(sign * quality, abs=1e-6)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_isotonic_regression_never_falls_and_moves_nothing_without_need(values: list[float]) -> None:
    points = np.array([values, sorted(values)])
    fitted = matched_quality.rising(points)
    assert (np.diff(fitted, axis=1) >= -1e-9).all()
    assert fitted.mean(axis=1) == pytest.approx(points.mean(axis=1))
    assert fitted[1] == pytest.approx(points[1])
    # At least as close as the running maximum, which is one of the rising sequences.
    assert ((fitted[0] - points[0]) ** 2).sum() <= ((np.maximum.accumulate(points[0]) - points[0]) ** 2).sum() + 1e-9


# -- baselines ----------------------------------------------------------------------------------


def section(text: str, title: str) -> list[list[str]]:
    """The rows of a table."""
    (found,) = (part for part in text.split("\n## ") if part.startswith(title))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines() if line[:2] == "| "]


@pytest.mark.parametrize("stated", ["flags", "command", "recipe"])
def test_there_are_two_baselines(stated: str, tmp_path: Path) -> None:
    """Muon needs half of AdamW's cost, and pruning 0.7 of Muon's."""

    def exact(seed: int, loss: float) -> float:
        return loss + 0.001 * seed

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim:\n  name: muon\n" if stated == "recipe" else "epochs: 3\n")
    flags = ["--optim.name", "muon"] if stated == "flags" else []
    more = ["--optim.name=muon"] if stated == "command" else []
    muon = ordinary(lambda seed, loss: exact(seed, loss / 2), 2, *flags, name="muon")
    muon += [record("both", seed, 0.7 * 0.65, exact(seed, 0.5 / 0.65), *PRUNED, *flags) for seed in range(2)]
    command = " ".join(["python train_mae.py --config", str(recipe), *more])
    adamw = [record("pruned", seed, 0.7 * 0.65, exact(seed, 1 / 0.65), *PRUNED) for seed in range(2)]
    records = ordinary(exact, 2) + adamw + [run | {"command": command} for run in muon]
    text = proof.tables(proof.Results(records), {})
    first = {row[0]: row for row in section(text, "Ratio to shortened training with AdamW")}
    second = {row[0]: row for row in section(text, "Ratio to shortened training with the same optimizer")}
    assert first["pruned"][4].startswith("0.70") and "pruned" not in second
    assert first["both"][4].startswith(f"≤{0.7 * 0.65:.2f}") and second["both"][1].startswith(
        "0.70"
    )  # better than all of AdamW's
    assert first["muon@0.45 0.002"][4].startswith("0.50")  # 1 / 0.9, for 0.45
    assert "muon@0.55 0.002" not in second and "shortened@0.55 0.002" not in first
    assert {row[0] for row in section(text, "Ordinary training")} == {"training", "---", "adamw", "muon"}


def test_a_best_learning_rate_at_an_edge_is_marked() -> None:
    records = ordinary(lambda seed, loss: loss, 1)
    records = [run for run in records if run["arm"] not in ("shortened@0.65 0.004", "shortened@0.55 0.001")]
    records = [run for run in records if "@0.85" not in run["arm"] or "0.001" in run["arm"]]
    rows = section(proof.tables(proof.Results(records), {}), "Ordinary training")[2:]
    assert [row[3].endswith("†") for row in rows] == [False, True, False, True, True, False]
    assert rows[0][2] == "0.001, 0.002, 0.004" and rows[0][3] == "1.000 at 0.002"


def test_the_share_of_full_training_is_found_at_the_best_learning_rates() -> None:
    """A family that needs 0.7 of the cost; one that stops before; one of a single length."""
    rng = np.random.default_rng(0)
    loss = noisy(rng, 0.002, 0.0)
    records = ordinary(loss, 3)
    for family, costs in {"long": COSTS, "short": COSTS[3:], "single": COSTS[:1]}.items():
        for cost in costs:
            for rate, worse in RATES.items():
                name = f"{family}@{cost} {rate}"
                flags = (*PRUNED, "--optim.lr", str(rate))
                records += [record(name, seed, 0.7 * cost, loss(seed, worse / cost), *flags) for seed in range(3)]
    rows = dict(section(proof.tables(proof.Results(records), {}), "FLOPs for the quality")[2:])
    assert rows["long"].startswith("0.70 [") or rows["long"].startswith("≥0.70 [")
    assert rows["short"] == f"≥{0.7 * 0.65:.2f}"
    assert rows["single"] in ("≤0.70 (one length)", "≥0.70 (one length)")


def test_predictions_are_judged() -> None:
    records = bench(np.random.default_rng(0), 0.7, 0.01, 0.0, seeds=5)
    for value, verdict in ((0.5, "too low"), (0.7, "agrees"), (0.9, "too high")):
        figures = [[value, value - 0.01, value + 0.01]] * 2
        rows = section(proof.tables(proof.Results(records), {"arm": figures}), "Variance of the gradient")
        assert rows[2][0] == "arm" and rows[2][4] == verdict


def test_tables_and_figure_are_made_from_the_records_alone(tmp_path: Path, capsys) -> None:
    """All noise levels count alike in the mean log loss; a tenth less loss at each is a ratio of 1 / 1.1."""
    (tmp_path / "records").mkdir()
    rng = np.random.default_rng(0)
    for cost in COSTS:
        for seed in range(3):
            for arm, factor, flags in ((f"shortened@{cost}", 1.1, ()), (f"pruned@{cost}", 1.0, PRUNED)):
                loss = factor / cost + 0.01 * rng.standard_normal()
                quality = {"validation_loss_by_level": [loss, loss / 100], "frechet_distance": 10 * loss}
                made = record(arm, seed, cost, loss, *flags, **quality)
                made["command"] = "python train_diffusion.py --adapter ddpm --adapter.noise-schedule linear"
                (tmp_path / "records" / f"{arm}-{seed}.json").write_text(json.dumps(made))
    text = proof.report(tmp_path)
    assert "objective ddpm, linear noise schedule" in text
    head, _, *rows = section(text, "Ratio to shortened training with AdamW")
    assert head[3::2] == ["validation loss", "mean log loss", "Fréchet distance"]
    (row,) = (row for row in rows if row[0] == "pruned@0.75")
    assert row[2] == "0.750" and all(cell.startswith("0.91 [") for cell in row[4::2])
    assert "-9." in text.partition("by level")[2]
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    (tmp_path / "table.md").unlink()
    proof.main((tmp_path / "records", tmp_path))  # a folder without records is named
    assert (tmp_path / "table.md").read_text() == text
    assert "has no records" in capsys.readouterr().out

"""The instruments in benchmarks/: what they tell of made-up runs whose truth is known, and whole comparisons."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import compare
import gradient_variance
import numpy as np
import proof
import pytest
import score_signal
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.errors import exit_on_user_error

COSTS = (1.0, 0.85, 0.75, 0.65, 0.55, 0.45)


def record(arm: str, seed: int, cost: float, loss: float, **more) -> dict:
    family = arm.partition("@")[0]
    costs = {"samples_used": 1000 * cost, "flops": 1e9 * cost, "seconds": 10 * cost}
    return {"arm": arm, "family": family, "seed": seed, "cost": costs, "quality": {"heldout_loss": loss}} | more


def made_up(rng: np.random.Generator, ratio: float, noise: float, seeds: int = 3) -> list[proof.Arm]:
    """Ordinary training whose loss is 1 / cost, and an arm that needs `ratio` of it; runs differ by `noise`."""

    def runs(arm: str, cost: float, loss: float) -> list[dict]:
        return [record(arm, seed, cost, loss + noise * rng.standard_normal()) for seed in range(seeds)]

    records = [run for cost in COSTS for run in runs(f"shortened@{cost}" if cost < 1 else "full", cost, 1 / cost)]
    return proof.arms_of([*records, *runs("arm", 0.65 * ratio, 1 / 0.65)])


def told(arms: list[proof.Arm]) -> proof.Ratio:
    curve = proof.curve_of(arms, "heldout_loss", "flops")
    (arm,) = (arm for arm in arms if arm.name == "arm")
    return proof.ratio(proof.redrawn(arms, "heldout_loss"), arm, curve, "heldout_loss", "flops")


@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.3])
def test_the_cost_ratio_is_what_it_is(ratio: float) -> None:
    found = told(made_up(np.random.default_rng(0), ratio, 0.0, seeds=1))
    assert found.value == pytest.approx(ratio, abs=1e-6) and found.bound == ""
    assert np.isnan(found.low)  # one run tells nothing of its spread


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """95 %: of 300 comparisons of three seeds each, fewer than 9 % miss."""
    missed = 0
    for trial in range(300):
        found = told(made_up(np.random.default_rng(trial), 1.0, 0.02))
        missed += not found.low <= 1.0 <= found.high
    assert 0.01 < missed / 300 < 0.09


@pytest.mark.parametrize(("loss", "bound", "value"), [(0.9, "<", 0.65), (3.0, ">", 0.65 / 0.45)])
def test_beyond_the_curve_the_ratio_is_a_bound(loss: float, bound: str, value: float) -> None:
    records = [record(f"shortened@{c}" if c < 1 else "full", 0, c, 1 / c) for c in COSTS]
    found = told(proof.arms_of([*records, record("arm", 0, 0.65, loss)]))
    assert (found.bound, found.value) == (bound, pytest.approx(value))


def test_ordinary_training_is_taken_at_its_best_learning_rate() -> None:
    records = [record(f"shortened@{c}", 0, c, 1 / c) for c in COSTS]
    records += [record(f"shortened@{c} fast", 0, c, 0.9 / c) for c in COSTS]
    records += [record(f"shortened@{c} slow", 0, c, 1.1 / c) for c in COSTS]
    curve = proof.curve_of(proof.arms_of(records), "heldout_loss", "samples_used")
    assert [arm.name for arm in curve] == [f"shortened@{c} fast" for c in sorted(COSTS)]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_isotonic_regression_never_falls_and_moves_nothing_without_need(values: list[float]) -> None:
    points = np.array([values, sorted(values)])
    fitted = proof.rising(points)
    assert (np.diff(fitted, axis=1) >= -1e-9).all()
    assert fitted.mean(axis=1) == pytest.approx(points.mean(axis=1))
    assert fitted[1] == pytest.approx(points[1])
    # The best there is: no constant added to a stretch of it, that keeps it rising, brings it nearer.
    assert ((fitted[0] - points[0]) ** 2).sum() <= ((np.maximum.accumulate(points[0]) - points[0]) ** 2).sum() + 1e-9


def test_the_table_is_made_from_the_records_alone(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    rng = np.random.default_rng(0)
    for cost in COSTS:
        for seed in range(3):
            for arm in (f"shortened@{cost}" if cost < 1 else "full", f"pruned@{cost}"):
                loss = (1 if "pruned" in arm else 1.1) / cost + 0.01 * rng.standard_normal()
                levels = {
                    "heldout_loss_by_level": [loss, loss / 2],
                    "knn_accuracy": 0.9 - 0.1 * loss,
                    "heldout_loss": loss,
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


# -- score_signal.py -------------------------------------------------------------------------------


def losses(level: float, sample: float, both: float, draw: float, shape=(400, 16, 8)) -> np.ndarray:
    rng = np.random.default_rng(0)
    s, u, r = shape
    parts = (1, u, 1), (s, 1, 1), (s, u, 1), (s, u, r)
    sizes = level, sample, both, draw
    return 10 + sum(size * rng.standard_normal(part) for size, part in zip(sizes, parts, strict=True))


def test_shares_of_the_variance_are_what_they_are() -> None:
    x = losses(3.0, 1.0, 0.5, 2.0)
    level = x.mean((0, 2)).var(ddof=1)  # of these 16 levels
    parts = np.array([level, 1.0, 0.25, 4.0])
    assert [*score_signal.shares(x).values()] == pytest.approx(parts / parts.sum(), abs=0.03)


def test_the_correlation_of_k_visits_is_spearman_and_browns() -> None:
    found = score_signal.correlations(losses(0, 1.0, 0, 2.0), (1, 4, 10))
    alone = 1 / (1 + 4)  # share of one visit's variance that is the sample's
    expected = [(k * alone / (1 + (k - 1) * alone)) ** 0.5 for k in (1, 4, 10)]
    assert [*found.values()] == pytest.approx(expected, abs=0.04)


def test_who_decides_is_told() -> None:
    assert score_signal.decided_by_level(losses(5.0, 0, 0, 0.01)) > 0.95
    assert score_signal.decided_by_level(losses(0, 1.0, 0, 1.0)) < 0.01


# -- gradient_variance.py --------------------------------------------------------------------------


def test_the_predicted_variance_is_that_of_the_estimate() -> None:
    """Against the thing itself: epochs of a made-up problem, each sample kept or not, at a level drawn or not."""
    rng = torch.Generator().manual_seed(0)
    s, d, width = 60, 32, 5
    level = (torch.arange(d) / d + 0.5 / d).expand(s, -1).double()
    size = (0.2 + 3 * level) * (0.3 + torch.rand(s, 1, generator=rng).double())
    g = size[..., None] * torch.randn(s, d, width, generator=rng).double() + 0.5
    square = g.square().sum(-1)[..., None].expand(-1, -1, 2)
    mean = g.mean((0, 1)).square().sum().expand(2)
    gradients = gradient_variance.Gradients(torch.arange(s), level, size, square, mean, mean)
    keep = 0.2 + 0.8 * torch.rand(s, generator=rng).double()
    density = torch.tensor([0.3, 0.8, 1.2, 1.7]).double()
    share = keep.mean().item()
    estimate = gradient_variance.Estimate(keep, share, density)
    predicted = (gradient_variance.second_moment(gradients, estimate).mean(0) - mean)[0].item()

    chance = (density[(level[0] * 4).long()] / d).expand(s, -1)
    at = torch.multinomial(chance, 20_000, replacement=True, generator=rng)  # [S, epochs]
    kept = torch.rand(s, 20_000, generator=rng).double() < keep[:, None]
    weight = kept / keep[:, None] / density[(level[0] * 4).long()][at]
    estimates = (weight[..., None] * g.gather(1, at[..., None].expand(-1, -1, width))).mean(0)
    # A sum over samples of independent terms; the formula is per visit, as if samples were drawn anew.
    between = g.mean(1).square().sum(-1).mean() - mean[0]
    measured = estimates.var(dim=0).sum().item() * s * share + share * (between + mean[0]).item() - mean[0].item()
    assert measured == pytest.approx(predicted, rel=0.05)


def test_what_is_kept_in_proportion_spends_the_share() -> None:
    size = torch.rand(500).double() ** 4 + 1e-6
    p = gradient_variance.proportional(size, 0.4)
    assert p.mean().item() == pytest.approx(0.4, abs=1e-6) and p.max() <= 1
    inside = p < 1
    assert (p[inside] / size[inside]).std() < 1e-6 * (p[inside] / size[inside]).mean()


# -- compare.py ------------------------------------------------------------------------------------

SMALL = ["--epochs", "4", "--data.limit", "96", "--data.held-out", "64", "--batch-size", "16", "--model.channels", "8"]


def command(folder: Path, *more: str) -> list[str]:
    recipe = ROOT / "benchmarks" / "recipes" / "epsilon.yaml"
    program = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), "--config", str(recipe)]
    return [*program, "--output-dir", str(folder), "--images", "64", "--steps", "2", *SMALL, *more]


def test_a_killed_comparison_goes_on_and_an_arm_that_is_secretly_random_comes_out_as_random(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(
        "import torch\nfrom pretrain.infobatch.policies import SamplingRule\n\n\n"
        "def clever(score, known, *, share):\n"
        "    return SamplingRule(torch.empty(0), torch.full((1,), share, dtype=torch.float64), share)\n"
    )
    arms = ["--arms", "random", f"clever=--pruning.policy {planted} --pruning.budget 0.65", "full"]
    killed = command(tmp_path / "out", *arms, "--seeds", "0", "1", "--compensations", "0")
    first = subprocess.Popen(killed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    records = tmp_path / "out" / "records"
    for _ in range(1200):
        if records.is_dir() and len(list(records.glob("*.json"))) == 1:
            break
        assert first.poll() is None, first.stdout.read() if first.stdout else ""
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    (done,) = records.glob("*.json")
    before = done.stat().st_mtime_ns
    second = subprocess.run(killed, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert done.stat().st_mtime_ns == before
    found = {path.stem: json.loads(path.read_text()) for path in records.glob("*.json")}
    assert len(found) == 6
    for seed in (0, 1):
        random, clever = found[f"random@0.65-seed{seed}"], found[f"clever-seed{seed}"]
        assert (
            clever["quality"] == random["quality"] and clever["cost"]["samples_used"] == random["cost"]["samples_used"]
        )
        assert random["cost"]["samples_used"] == round(0.65 * 96 * 4) and "frechet_distance" in random["quality"]
    assert found["random@0.65-seed0"]["quality"] != found["random@0.65-seed1"]["quality"]
    assert "| clever |" in second.stdout and (tmp_path / "out" / "figure.png").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--arms", "ful"], "there are full, shortened"),
        (["--arms", "mine=--pruning.policy nothing"], "did you mean"),
        (["--arms", "full", "--epochs", "0"], "at least 1"),
        (["--features", "missing.safetensors", "--arms", "full"], "missing.safetensors"),
    ],
)
def test_what_can_not_be_compared_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", command(tmp_path / "out", *more)[1:])
    with pytest.raises(SystemExit) as stopped, exit_on_user_error():
        compare.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("runs/*"))


def test_processes_together_compare_as_one_does(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for folder, launcher in (("one", [sys.executable]), ("two", torchrun)):
        program = command(tmp_path / folder, "--arms", "full", "random", "--seeds", "0", "--compensations", "0")[1:]
        run = subprocess.run([*launcher, *program], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    for name in ("full-seed0", "random@0.65-seed0"):
        one, two = (json.loads((tmp_path / f / "records" / f"{name}.json").read_text()) for f in ("one", "two"))
        assert two["processes"] == 2 and one["cost"]["samples_used"] == two["cost"]["samples_used"]
        assert two["quality"]["heldout_loss"] == pytest.approx(one["quality"]["heldout_loss"], rel=1e-4)

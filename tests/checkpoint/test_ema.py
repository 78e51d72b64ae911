"""EMAs are functions of progress, are resumed exactly, and those of other lengths are reconstructed from snapshots."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PRUNED
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import common, final, refused, same, train
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from pretrain.checkpoint import ema_snapshots
from pretrain.checkpoint.ema import EMACollection, exponent, exponential_decay, power_decay
from pretrain.checkpoint.ema_snapshots import Snapshot, Snapshots, combination, overlap, reconstruct
from pretrain.checkpoint.storage import newest
from pretrain.config.cli import parse
from pretrain.config.schema import EMASettings
from pretrain.core.errors import UserError

LENGTHS = (0.05, 0.1)
KEPT = {
    "exponential": exponential_decay(0.1),
    "long": exponential_decay(0.7),
    "short": power_decay(0.02),
    "power": power_decay(0.2),
}


class Network(nn.Module):
    """A parameter that tests set, and a buffer."""

    def __init__(self, size: int = 50) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def go(self, value: torch.Tensor) -> None:
        self.weight.copy_(value)
        self.count += 1


@pytest.mark.parametrize("length", [0.001, 0.02, 0.05, 0.1, 0.2, 0.28])
def test_sigma_rel_is_the_standard_deviation_of_the_weights(length: float) -> None:
    gamma = exponent(length)
    t = (np.arange(200_000) + 0.5) / 200_000
    weight = (gamma + 1) * t**gamma / len(t)
    mean = (weight * t).sum()
    assert weight.sum() == pytest.approx(1, rel=1e-4)
    assert ((weight * (t - mean) ** 2).sum()) ** 0.5 == pytest.approx(length, rel=1e-3)


def test_the_papers_exponents() -> None:
    """Karras et al. 2024: 5 % is gamma 16.97, 10 % is 6.94."""
    assert (exponent(0.05), exponent(0.1)) == pytest.approx((16.97, 6.94), abs=0.005)


@pytest.mark.parametrize("name", KEPT)
@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=6, unique=True))
def test_ema_decays_compose(name: str, points: list[float]) -> None:
    kept, points = KEPT[name], [point + 1e-3 for point in sorted(points)]
    each = [kept(before, now) for before, now in pairwise(points)]
    assert np.prod(each) == pytest.approx(kept(points[0], points[-1]), rel=1e-9, abs=1e-300)
    assert all(0 <= share <= 1 for share in each) and kept(0.0, points[0]) == 0  # the initial parameters have no weight


def test_ema_decays_are_the_papers() -> None:
    kept = exponential_decay(0.1)
    assert [kept(p, p + 0.1) for p in (0.2, 0.5, 0.9)] == pytest.approx([0.5] * 3)
    for p in (0.01, 0.05, 0.15):  # the half-life is half of the progress made
        assert kept(p, p + 1e-6) == pytest.approx(0.5 ** (1e-6 / (p / 2)), abs=1e-8)
    gamma = exponent(0.1)
    for t in (1, 2, 10, 1000):  # Karras et al. 2024, in equal steps
        assert power_decay(0.1)((t - 1) / 1000, t / 1000) == pytest.approx((1 - 1 / t) ** (gamma + 1))


def walk(steps: int, size: int = 50, seed: int = 0) -> tuple[list[float], torch.Tensor]:
    """Progress in irregular steps up to 1, and a random walk over it."""
    rng = torch.Generator().manual_seed(seed)
    passed = torch.rand(steps, generator=rng, dtype=torch.float64) ** 3 + 0.05
    progress = (passed.cumsum(0) / passed.sum()).tolist()
    return progress, (torch.randn(steps, size, generator=rng) * (passed[:, None] / passed.sum()).sqrt().float()).cumsum(
        0
    ) + 5


def followed(lengths, points: list[float], values: torch.Tensor, cut: int = 1) -> EMACollection:
    """EMAs of a walk, each of whose steps is split into `cut` parts."""
    network = Network(values.shape[1])
    averages = EMACollection(network, 0.05, lengths)
    for before, now, value in zip([0.0, *points], points, values, strict=False):
        network.go(value)
        for part in range(1, cut + 1):
            averages.update(network, before + (now - before) * part / cut)
    return averages


def test_emas_are_the_integrals_of_their_weights() -> None:
    """By the integral over the parameters between the steps."""
    points, values = walk(300)
    averages = followed(LENGTHS, points, values)
    edges = np.array([0.0, *points])
    for length, average in averages.powers.items():
        weight = torch.from_numpy(np.diff(edges ** (exponent(length) + 1))).float()
        torch.testing.assert_close(average.model.weight, weight @ values, rtol=1e-5, atol=1e-5)
    weight = torch.from_numpy(np.diff(0.5 ** ((1 - edges) / 0.05))).float()  # except for the first tenth
    torch.testing.assert_close(averages.model.weight, weight @ values, rtol=1e-4, atol=1e-3)
    assert averages.model.count == 300 and not averages.model.training
    assert all(not parameter.requires_grad for parameter in averages.model.parameters())


def test_emas_do_not_depend_on_the_number_of_steps() -> None:
    """An epoch that skips nine tenths of its samples moves an EMA as far as a full one."""
    points, values = walk(40)
    few, many = (followed(LENGTHS, points, values, cut) for cut in (1, 10))
    for name, average in few.all().items():
        torch.testing.assert_close(average.model.weight, many.all()[name].model.weight, rtol=1e-5, atol=1e-5)


def test_progress_that_is_rescaled_changes_no_power_ema() -> None:
    """A power-function EMA of a run that is extended from 2 epochs to 5 is that of a run of 5 epochs."""
    points, values = walk(60)
    network = Network()
    averages = EMACollection(network, 0.05, LENGTHS)
    for number, (point, value) in enumerate(zip(points, values, strict=True)):
        network.go(value)
        if number == 30:
            averages.progress *= 2 / 5
        averages.update(network, point * (2 / 5 if number >= 30 else 1))
    for length, average in followed(LENGTHS, points, values).powers.items():
        torch.testing.assert_close(averages.powers[length].model.weight, average.model.weight, rtol=1e-5, atol=1e-5)


def test_a_collection_continues_from_its_state_to_the_bit_and_refuses_that_of_other_lengths() -> None:
    points, values = walk(60)
    network, whole = Network(), followed(LENGTHS, points, values)
    first, rest = followed(LENGTHS, points[:25], values[:25]), EMACollection(network, 0.05, LENGTHS)
    rest.load_state_dict(first.state_dict())
    for point, value in zip(points[25:], values[25:], strict=True):
        network.go(value)
        rest.update(network, point)
    assert rest.progress == whole.progress
    for name, ema in whole.all().items():
        assert torch.equal(ema.model.weight, rest.all()[name].model.weight)
    for lengths, named in (((), "0.05 0.1"), ((0.05,), "0.05 0.1"), ((*LENGTHS, 0.2), "0.05 0.1")):
        with pytest.raises(ValueError, match=f"--ema.sigma-rel are {named}; leave"):
            EMACollection(network, 0.05, lengths).load_state_dict(whole.state_dict())


@settings(max_examples=50, deadline=None)
@given(*[st.floats(0.02, 0.25)] * 2, *[st.floats(0.1, 1.0)] * 2)
def test_overlap_is_the_integral(one: float, other: float, until: float, end: float) -> None:
    t = (np.arange(100_000) + 0.5) / 100_000
    both = np.array([[exponent(one), until], [exponent(other), end]])
    weighed = [(gamma + 1) / T * (t / T) ** gamma * (t <= T) for gamma, T in both]
    found = overlap(*both)
    assert found == pytest.approx((weighed[0] * weighed[1]).mean(), rel=5e-3, abs=1e-6)
    assert found == pytest.approx(overlap(both[1], both[0]), rel=1e-12)


def every(count: int, lengths=LENGTHS) -> list[Snapshot]:
    return [Snapshot(length, (n + 1) / count) for length in lengths for n in range(count)]


@settings(max_examples=50, deadline=None)
@given(st.floats(0.02, 0.25), st.integers(1, 40))
def test_constant_parameters_are_reconstructed(length: float, count: int) -> None:
    weights, _ = combination(every(count), Snapshot(length, 1.0))
    assert weights.sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("count", [1, 7, 32])
def test_a_stored_snapshot_is_reconstructed_exactly(count: int) -> None:
    snapshots = every(count)
    for number, snapshot in enumerate(snapshots):
        weights, error = combination(snapshots, snapshot)
        assert weights == pytest.approx(np.eye(len(snapshots))[number], abs=1e-6) and error < 1e-6


@pytest.mark.parametrize(("length", "most"), [(0.03, 0.04), (0.04, 0.011), (0.07, 0.004), (0.15, 0.0095)])
def test_the_default_snapshots_have_the_documented_error(length: float, most: float) -> None:
    _, error = combination(every(EMASettings().snapshots), Snapshot(length, 1.0))
    assert most / 2 < error < most


def written(folder: Path, count: int, tracked) -> tuple[EMACollection, Path]:
    """Snapshots of a long walk, and EMAs of further lengths over the same walk."""
    points, values = walk(1000)
    network, other = Network(), Network()
    averages, beside = EMACollection(network, 0.05, LENGTHS), EMACollection(other, 0.05, tracked)
    folder.mkdir()
    snapshots = Snapshots(folder / "ema", averages, count, 7, 0, writes=True)
    for step, (point, value) in enumerate(zip(points, values, strict=True)):
        network.go(value)
        other.go(value)
        averages.update(network, point)
        beside.update(other, point)
        snapshots.take(step + 1)
    assert len(list((folder / "ema").iterdir())) == 2 * count
    return beside, folder


def test_emas_of_other_lengths_are_reconstructed(tmp_path: Path) -> None:
    """Compared with tracked EMAs: stored lengths exactly, others nearly, and the better the more snapshots there are
    (Karras et al. 2024, section 3.2).
    """
    tracked = (*LENGTHS, 0.04, 0.07, 0.12, 0.15)
    off = {}
    for count in (8, 32):
        beside, run = written(tmp_path / str(count), count, tracked)
        for length, average in beside.powers.items():
            tensors, error = reconstruct(run, length)
            assert tensors.keys() == average.model.state_dict().keys() and tensors["count"] == 1000
            off[count, length] = (tensors["weight"] - average.model.weight).square().mean().sqrt().item()
            if length in LENGTHS:
                torch.testing.assert_close(tensors["weight"], average.model.weight, rtol=1e-6, atol=1e-6)
                assert error < 1e-6
        # For scale: the distance between the EMAs of the two stored lengths.
        one, other = (beside.powers[length].model.weight for length in LENGTHS)
        apart = (one - other).square().mean().sqrt().item()
        for length in tracked[2:]:
            assert off[count, length] < {8: 0.05, 32: 0.002}[count] * apart, (count, length, off[count, length] / apart)
    assert all(off[32, length] < off[8, length] / 4 for length in tracked[2:])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "ema").iterdir())}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, pictures: Path) -> Path:
    """An uninterrupted pruned run with a checkpoint at every step and five snapshots of two EMAs."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    words = ["--checkpoint.every", 1, "--checkpoint.keep", 1000, *PRUNED, "--ema.sigma-rel", *LENGTHS]
    train("train_diffusion.py", *common(pictures, folder), *words, "--ema.snapshots", 5)
    return folder


def test_snapshots_are_evenly_spaced_in_progress(averaged: Path) -> None:
    found = {}
    for path in sorted((averaged / "ema").iterdir()):
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["snapshot"])
        found.setdefault(about["sigma_rel"], []).append(about["epochs"] / 4)
    assert found.keys() == {*LENGTHS} and found[0.05] == found[0.1] and len(found[0.05]) == 5
    for number, progress in enumerate(found[0.05], 1):
        assert number / 5 <= progress + 1e-9 < number / 5 + 12 / 32 / 4  # 12 images a step, 32 an epoch at least
    assert found[0.05][-1] == 1.0
    for length in LENGTHS:
        last = load_file(sorted((averaged / "ema").glob(f"*-sigma_rel-{length}.safetensors"))[-1])
        assert all(torch.equal(value, final(averaged, f"ema-{length}")[name]) for name, value in last.items())


def test_power_emas_change_nothing_else(averaged: Path, pictures: Path, tmp_path: Path) -> None:
    train("train_diffusion.py", *common(pictures, tmp_path / "run"), *PRUNED)
    assert same(averaged, tmp_path / "run") and not (tmp_path / "run" / "ema").exists()


def test_snapshots_of_a_resumed_run_are_the_same(averaged: Path, tmp_path: Path) -> None:
    """Bit for bit, although some were written after the checkpoint, or only partly."""
    steps = sorted((averaged / "checkpoints").iterdir())
    for step in steps[:-1:9]:
        folder = tmp_path / step.name
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copytree(step, folder / "checkpoints" / step.name)
        shutil.copytree(averaged / "ema", folder / "ema")
        for name in ("config.yaml", "metrics.jsonl"):
            shutil.copy(averaged / name, folder / name)
        (folder / "ema" / "step-00000001-length-0.05.part").write_text("half")
        (folder / "ema" / "step-00000999-length-0.05.safetensors").write_text("of another past")
        train("train_diffusion.py", "--resume", "--output-dir", folder)
        assert same(averaged, folder) and files(averaged) == files(folder), step
        for length in LENGTHS:
            one, other = (final(run, f"ema-{length}") for run in (averaged, folder))
            assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_ema_command_writes_loadable_parameters(averaged: Path, tmp_path: Path, capsys) -> None:
    config = parse(
        ["--config", str(averaged / "config.yaml")], adapter="", model="", recipe=averaged, output_dir="", help=""
    )
    network = config.component("model").build((1, 12, 12), 0)
    for length in (0.05, 0.075):
        out = tmp_path / f"{length}.safetensors"
        ema_snapshots.main(averaged, length, out)
        network.load_state_dict(load_file(out))
        stored = final(averaged, "ema-0.05")
        assert all(torch.allclose(v, stored[k], atol=1e-6) for k, v in load_file(out).items()) == (length == 0.05)
    assert "the EMA of sigma_rel 0.05; relative error of its weight function 0.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("length", "message"), [(0.5, "above 0 and at most 0.28, got 0.5"), (0.1, "there are no snapshots")]
)
def test_the_ema_command_raises(length: float, message: str, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        ema_snapshots.main(finished, length, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_broken_snapshot_raises(averaged: Path, tmp_path: Path) -> None:
    shutil.copytree(averaged / "ema", tmp_path / "ema")
    next((tmp_path / "ema").iterdir()).write_text("no tensors")
    with pytest.raises(UserError, match="can't be read"):
        reconstruct(tmp_path, 0.1)


def test_a_run_is_resumed_with_more_epochs_but_no_other_sigma_rel(averaged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    last = newest(averaged / "checkpoints")
    assert last is not None
    shutil.copytree(last, folder / "checkpoints" / last.name)
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(averaged / name, folder / name)
    shutil.copytree(averaged / "ema", folder / "ema")
    words = ["--resume", "--output-dir", folder]
    assert "--ema.sigma-rel are 0.05 0.1; leave" in refused(
        "train_diffusion.py", *words, "--epochs", 6, "--ema.sigma-rel", 0.05
    )
    train("train_diffusion.py", *words, "--epochs", 6)
    assert {*files(averaged)} < {*files(folder)}  # the old ones and those of the new epochs
    tensors, error = reconstruct(folder, 0.05)
    stored = final(folder, "ema-0.05")
    assert all(torch.allclose(value, stored[name], atol=1e-6) for name, value in tensors.items()) and error < 1e-6

"""benchmarks/peers.py: the bare loop trains our networks, ratios are those of the records, recorded runs are kept."""

import json
import random
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import bare_loop
import peer_arms
import peers
import psutil
import pytest
import torch
from conftest import ROOT
from peer_inputs import prepare, write_images
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

import train_diffusion
import train_mae
from pretrain.config.build import build_model
from pretrain.config.cli import parse
from pretrain.core.errors import UserError

NETWORKS = ("unet", "dit", "mae")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> tuple[Path, tuple[int, int, int]]:
    """Images of 12 x 12, more than there are, and configs."""
    folder = tmp_path_factory.mktemp("peers") / "data"
    return folder, write_images(folder, str(pictures), 64)


def network(name: str, data: tuple[Path, tuple[int, int, int]]) -> tuple[Any, Any]:
    """Our program's network, and the description of it that all programs receive."""
    folder, shape = data
    described = prepare(folder, name, "small", shape, 8, 0, False)
    start = (train_mae if name == "mae" else train_diffusion).START
    return build_model(parse(described.flags, **start, output_dir="", help=""), shape, 0), described


def loss_of(name: str, model: Any, image: torch.Tensor) -> torch.Tensor:
    if name == "mae":
        return bare_loop.mask_loss(model, image)
    return bare_loop.noise_loss(bare_loop.DDPMScheduler().alphas_cumprod, model, image)


def test_the_published_table_is_that_of_the_published_records() -> None:
    folder = ROOT / "benchmarks" / "speed"
    records = [json.loads(path.read_text()) for path in (folder / "records").glob("*.json")]
    assert peers.table(sorted(records, key=peers.order_of)) == (folder / "table.md").read_text()


@pytest.mark.parametrize("name", NETWORKS)
def test_our_program_trains_the_objective_of_the_others_with_their_optimizer(
    name: str, data: tuple[Path, tuple[int, int, int]]
) -> None:
    """Its default recipe has flow matching with posterior-mean targets, and Muon."""
    start = (train_mae if name == "mae" else train_diffusion).START
    config = parse(network(name, data)[1].flags, **start, output_dir="", help="")
    assert config.adapter.name == ("mae" if name == "mae" else "ddpm") and config.optim.name == "adamw"
    assert not getattr(config.component("adapter"), "posterior_mean", False)
    assert not config.ema.sigma_rel and not config.blocking.share and not config.class_conditional


def test_the_bare_loop_is_short() -> None:
    assert len((ROOT / "benchmarks" / "bare_loop.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("name", NETWORKS)
def test_the_bare_loop_trains_with_the_flops_of_our_program(name: str, data: tuple[Path, tuple[int, int, int]]) -> None:
    model, described = network(name, data)
    image = torch.rand(1, *described.shape) * 2 - 1
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(name, model, image).backward()
    assert counter.get_total_flops() == described.flops
    model.zero_grad()
    optimized: list[torch.optim.Optimizer] = []
    hook = register_optimizer_step_post_hook(lambda own, *_: optimized.append(own))
    images = (torch.rand(16, described.shape[0], 1, 1) * 255).expand(-1, *described.shape).to(torch.uint8)

    def loss() -> float:
        torch.manual_seed(1)
        with torch.no_grad():
            return statistics.mean(loss_of(name, model, images / 127.5 - 1).item() for _ in range(8))

    before = loss()
    first = [p.detach().clone() for p in model.parameters()]
    ema = bare_loop.train(model, images, 8, 20, mae=name == "mae")
    hook.remove()
    assert loss() < 0.95 * before and len(optimized) == 20
    trained = sum(p.numel() for group in optimized[0].param_groups for p in group["params"])
    assert trained == described.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for old, average, new in zip(first, ema.parameters(), model.parameters(), strict=True):
        moved = torch.linalg.vector_norm(new - old)
        assert torch.linalg.vector_norm(average - old) <= moved * 0.1 + 1e-6  # 20 steps of an average over 1000


def test_images_are_written_once_and_repeated_if_there_are_too_few(
    data: tuple[Path, tuple[int, int, int]], pictures: Path
) -> None:
    folder, shape = data
    files = sorted(folder.glob("images/train/*/*.png"))
    assert len(files) == 64 and shape == (3, 12, 12) and len([*folder.glob("images/test/*/*.png")]) == 4
    before = files[0].stat().st_mtime_ns
    assert write_images(folder, str(pictures), 64) == shape and files[0].stat().st_mtime_ns == before
    for found, count in ((folder, 65), (pictures, 64)):
        with pytest.raises(UserError, match=f"does not hold the {count} images of .*; remove it, or give another"):
            write_images(found, str(pictures), count)


def record(network: str, arm: str, repetition: int, **values: Any) -> dict[str, Any]:
    common = {"parameters": 10**6, "flops": 10**8, "machine": "x", "torch": "y", "settings": {"steps": 50}, "mfu": None}
    return {"network": network, "arm": arm, "repetition": repetition, "compiled": "compiled" in arm} | common | values


def test_the_table_has_the_median_of_the_ratios_within_each_repetition() -> None:
    draw = random.Random(0)
    for _ in range(20):
        speed = {(arm, n): draw.uniform(10, 90) for arm in ("bare loop", "this project") for n in range(5)}
        records = [
            record("dit", arm, n, images=640, seconds=640 / value, cpu_seconds=64 / value)
            | {"startup_seconds": value, "memory_bytes": value * peers.MIB}
            for (arm, n), value in speed.items()
        ]
        records += [records[0] | {"arm": "this project", "repetition": 9, "seconds": 1e9}]  # without a bare loop
        relative = [speed["this project", n] / speed["bare loop", n] for n in range(5)]
        line = next(line for line in peers.table(records).splitlines() if line.startswith("| this project |"))
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[1] == "6"
        assert cells[3] == peers.spread(relative) and cells[5] == peers.spread([1 / ratio for ratio in relative])
        low, high = min(relative), max(relative)
        assert cells[3] == f"{statistics.median(relative):#.3g} [{low:#.3g}, {high:#.3g}]"


def test_a_compiled_program_is_compared_with_the_compiled_loop() -> None:
    costs = {"cpu_seconds": 1.0, "startup_seconds": 1.0, "memory_bytes": 1.0, "images": 100}
    seconds = {"bare loop": 1.0, "bare loop, compiled": 0.5, "this project": 2.0, "this project, compiled": 2.0}
    records = [record("mae", arm, 0, seconds=value, **costs) for arm, value in seconds.items()]
    text = peers.table(records)
    assert "| this project | 1 | 50.0 [50.0, 50.0] | 0.500 [0.500, 0.500] |" in text
    assert "| this project, compiled | 1 | 50.0 [50.0, 50.0] | 0.250 [0.250, 0.250] |" in text
    assert "MFU" not in text and "MFU" in peers.table([each | {"mfu": 0.5} for each in records])


def fake_run(made: list[str], fail: str = "") -> Any:
    """Instead of `peers.execute`: write what a run's process would."""

    def execute(command: list[str], log: Path, environment: dict[str, str]) -> tuple[int, int]:
        spec = json.loads(Path(command[-1]).read_text())
        made.append(log.stem)
        assert environment["OMP_NUM_THREADS"] == "1"
        log.write_text("ImportError: it is missing\n")
        if spec["kind"] == fail:
            return 1, 0
        times = {"startup_seconds": 2.0, "device_bytes": None, "seconds": 1.0, "cpu_seconds": 1.0, "images": 8}
        Path(spec["record"]).write_text(json.dumps(times))
        return 0, 10

    return execute


def test_projects_without_a_checkout_are_left_out_and_records_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pictures: Path
) -> None:
    settings = peers.Settings(
        tmp_path, str(pictures), ("unet", "mae"), "small", 4, warmup=2, steps=2, repetitions=2, compile=False
    )
    made: list[str] = []
    monkeypatch.setattr(peers, "execute", fake_run(made))
    monkeypatch.setattr(peers, "CUDA", False)
    peers.main(settings)
    shown = capsys.readouterr().out
    for name in ("diffusers", "mae", "transformers"):
        assert f"{name} is left out; to compare with it, give --{name} and a checkout" in shown
    assert len(made) == len({*made}) == 2 * 2 * 3 and (tmp_path / "table.md").read_text() in shown
    (tmp_path / "records" / "mae-bare-loop-1.json").unlink()
    made.clear()
    peers.main(settings)
    assert made == ["mae-bare-loop-1"]
    with pytest.raises(UserError, match=r"--threads 2: the records in .* have 1; give the same, or another"):
        peers.main(peers.Settings(tmp_path, str(pictures), ("unet",), "small", 4, 2, 2, 2, threads=2))


def test_a_program_that_fails_is_named_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pictures: Path
) -> None:
    script = tmp_path / "mae" / "engine_pretrain.py"
    script.parent.mkdir()
    script.touch()
    made: list[str] = []
    monkeypatch.setattr(peers, "execute", fake_run(made, fail="mae"))
    settings = peers.Settings(
        tmp_path / "out", str(pictures), ("mae",), "small", 4, 2, 2, 2, compile=False, mae=script.parent
    )
    with pytest.raises(SystemExit) as stopped:
        peers.main(settings)
    shown = capsys.readouterr().out
    assert (
        stopped.value.code == 1 and "facebookresearch/mae: it ended with status 1: ImportError: it is missing" in shown
    )
    assert len(made) == 2 * 3 + 1 and "| this project | 2 |" in shown


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": 1}, "--warmup 1: it must be at least 2; give a larger one"),
        ({"batch_size": 0}, "--batch-size 0: it must be at least 1"),
        ({"diffusers": Path("missing")}, "--diffusers missing: it has no examples/.*; name a checkout"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        peers.main(peers.Settings(tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


def test_the_clock_times_the_steps_between_the_first_and_the_last_and_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(1000, 2000, 10))
    monkeypatch.setattr(peer_arms.time, "time", lambda: float(next(now)))
    monkeypatch.setattr(peer_arms.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(peer_arms, "cpu_seconds", lambda process: 5.0)
    monkeypatch.setattr(peer_arms.os, "_exit", sys.exit)
    spec = peer_arms.Spec(
        "bare", False, [], "", (3, 8, 8), "", str(tmp_path / "record"), 4, 3, 5, False, False, 0, None, {}
    )
    clock = peer_arms.StepClock(spec, 900.0)
    with pytest.raises(SystemExit):
        for _ in range(20):
            clock.after_step()
    found = json.loads((tmp_path / "record").read_text())
    assert clock.count == 8 and found == {
        "startup_seconds": 100.0, "device_bytes": None, "seconds": 10.0, "cpu_seconds": 0.0, "images": 20
    }  # fmt: skip


def test_no_process_of_a_run_outlives_it_and_its_memory_is_measured(tmp_path: Path) -> None:
    child = "import time; block = b'x' * (200 * 2**20); print(flush=True); time.sleep(600)"
    run = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(float(os.environ['WAIT']))\n"
        "sys.exit(3)"
    )
    command = [sys.executable, "-c", run]
    status, peak = peers.execute(command, tmp_path / "log", {"WAIT": "2"})
    assert status == 3 and 200 * peers.MIB < peak < 300 * peers.MIB
    pid = int((tmp_path / "log").read_text())
    with suppress(psutil.NoSuchProcess):
        process, end = psutil.Process(pid), time.monotonic() + 30
        while process.status() != psutil.STATUS_ZOMBIE:  # which no process may have reaped yet
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.mark.slow
def test_our_program_and_the_bare_loop_run(tmp_path: Path, pictures: Path) -> None:
    settings = peers.Settings(tmp_path, str(pictures), ("dit",), "small", 8, 2, 2, 1, compile=False)
    peers.main(settings)
    for record in peers.read_records(settings):
        assert record["images"] >= 16 and record["seconds"] > 0 and record["memory_bytes"] > 100 * peers.MIB
        assert record["startup_seconds"] > record["seconds"]
    assert "| this project, --infobatch | 1 |" in (tmp_path / "table.md").read_text()

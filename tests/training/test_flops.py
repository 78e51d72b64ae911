"""FLOPs of training are counted without running it and reported correctly; gradient checkpointing and compilation."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PRUNED
from pretrain.models.dit import DiTConfig
from pretrain.models.mae import MAEConfig
from pretrain.models.unet import UNetConfig
from programs import common, profile_config, same, train
from torch.utils.flop_counter import FlopCounterMode

from pretrain.adapters.ddpm import DDPM
from pretrain.adapters.flow import Flow
from pretrain.adapters.mae import MAE
from pretrain.checkpoint.storage import State
from pretrain.config.schema import Optim
from pretrain.core.errors import UserError
from pretrain.training import flops, setup
from pretrain.training.setup import checkpoint_activations
from pretrain.training.summary import summarise, summary_rows

PARTS = {
    "unet": (UNetConfig(channels=(8, 16), layers=1, head_dim=4), Flow()),
    "dit": (DiTConfig(patch=2, width=16, depth=2, heads=2), DDPM()),
    "dit rope": (DiTConfig(patch=2, width=16, depth=2, heads=2, position="rope", qk_norm=True), Flow()),
    "mae": (MAEConfig("vit_tiny_patch16_224", 2, 16, 1, 2, 16, 1, 2), MAE()),
}


@pytest.mark.parametrize(
    ("size", "patch", "multiply_adds"),
    [
        ("S", 8, 0.36e9),
        ("B", 4, 5.56e9),
        ("XL", 2, 118.64e9),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (("S", 2, 6.06e9), ("L", 2, 80.71e9), ("XL", 8, 7.34e9))
        ),
    ],
)
def test_dit_flops_are_the_papers(size, patch: int, multiply_adds: float) -> None:
    """Peebles and Xie 2023, table 4: "Gflops" of a forward pass there are multiply-adds."""
    with torch.device("meta"):
        model = DiTConfig(size=size, patch=patch).build((4, 32, 32), 1000)
        inputs = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=0.02)
    visit = profile_config(DiTConfig(size=size, patch=patch), Flow(), (4, 32, 32), 1000)
    assert visit.flops == pytest.approx(3 * counter.get_total_flops(), rel=0.01)


def test_flops_of_a_network_larger_than_memory() -> None:
    """97 billion parameters, 390 GB."""
    config = DiTConfig(width=2**14, depth=20, heads=128)
    assert profile_config(config, Flow(), (4, 32, 32), 0).flops > 6 * 12 * 20 * 2**28 * 256  # 6 per token and weight


@pytest.mark.parametrize("name", PARTS)
def test_flops_on_the_meta_device_are_the_actual_ones(name: str) -> None:
    part, adapter = PARTS[name]
    model = part.build((3, 8, 12), 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    visit = flops.profile_sample(adapter, model, (3, 8, 12), 4)
    counted, unreached, _ = flops._run(adapter, model, (3, 8, 12), 4)  # also: the adapter still works with values
    assert (visit.flops, len(visit.unused)) == (counted, len(unreached)) and counted > 0
    assert visit == profile_config(part, adapter, (3, 8, 12), 4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_attention_is_counted() -> None:
    """Twice as many patches cost more than twice as much: two products of queries, keys and values are square."""
    part, width, depth = DiTConfig(patch=1, width=16, depth=2, heads=2), 16, 2
    few, many = (profile_config(part, Flow(), (1, 8, side), 0).flops for side in (8, 16))
    embedding = profile_config(part, Flow(), (1, 1, 1), 0).flops - 6 * (12 * width**2 * depth + 2 * width)
    assert many - 2 * few + embedding == pytest.approx(3 * depth * 4 * width * (128**2 - 2 * 64**2), rel=0.05)


def test_flops_of_an_adapter_that_reads_values() -> None:
    @dataclass(frozen=True)
    class Looking(Flow):
        def __call__(self, model, batch, rng):
            assert float(batch.level.sum()) == 0.5
            return super().__call__(model, batch, rng)

    part, _ = PARTS["dit"]
    model = part.build((3, 8, 12), 4)
    assert flops.profile_sample(Looking(), model, (3, 8, 12), 4) == flops.profile_sample(Flow(), model, (3, 8, 12), 4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("device", "bf16", "no"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce GT 1030", None, None),
    ],
)
def test_peak_flops_of_known_devices(device: str, bf16: float | None, no: float | None) -> None:
    assert flops.peak_flops(device, "bf16") == flops.peak_flops(device, "fp16") == bf16
    assert flops.peak_flops(device, "no") == no


def test_the_summary_says_mfu_where_the_peak_is_known(finished: Path) -> None:
    written = json.loads((finished / "summary.json").read_text())
    assert written["mfu"] is None and "MFU" not in str(summary_rows(written))
    config: Any = SimpleNamespace(epochs=4, policy="full", adapter=SimpleNamespace(name="flow"), output_dir=finished)
    config.optim, config.batch_size = Optim(), 12
    values = {
        "infobatch": {"used_before": 200, "seen": 100},
        "progress": 1.0,
        "step": 7,
        "seconds": 2.0,
        "flops": [10**9] * 2,
        "images": {},
    }
    state = State({"infobatch": {"score": torch.ones(100)}}, values | {"bad_images": [], "bad_heldout_images": []})
    summary = summarise(config, state, model=torch.nn.Linear(2, 2), evaluations=[], peak=3e11)
    assert summary["mfu"] == pytest.approx(300 * 1e9 / 2 / 3e11) == 0.5
    assert "150 images/s, 50.0% of the devices' peak (MFU)" in str(summary_rows(summary | {"open_model_with": ""}))


def test_gradient_checkpointing_changes_nothing(pictures: Path, finished: Path, tmp_path: Path) -> None:
    """Bit for bit, with the same FLOPs; it can be switched on or off on resume."""
    words = [*common(pictures, tmp_path / "run"), *PRUNED, "--micro-batch", 6, "--gradient-checkpointing"]
    train("train_diffusion.py", *words)
    assert same(finished, tmp_path / "run")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (finished, tmp_path / "run")]
    assert summaries[0]["train_flops"] == summaries[1]["train_flops"]
    train(
        "train_diffusion.py", "--resume", "--output-dir", tmp_path / "run", "--epochs", 5, "--no-gradient-checkpointing"
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_diffusion.py", "train_mae.py"])
def test_compilation_changes_nothing(script: str, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    """Bit for bit if the compiler only traces; state names do not change, so it can be switched on or off on resume."""
    torch.compiler.reset()
    monkeypatch.setattr(setup, "BACKEND", "eager")
    graphs: list[object] = []
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: graphs.append(how) or real(self, **how))
    probe = ["--evaluate.metrics", "loss,online-probe"] if script == "train_mae.py" else []
    for name in ("plain", "compiled"):
        words = [*common(pictures, tmp_path / name, 3), *PRUNED, *probe]
        train(script, *words, *(["--compile"] if name == "compiled" else []))
    assert graphs == [{"dynamic": False, "backend": "eager"}]
    assert same(tmp_path / "plain", tmp_path / "compiled")
    for name in ("plain", "compiled"):
        flag = "--compile" if name == "plain" else "--no-compile"
        train(script, "--resume", "--output-dir", tmp_path / name, "--epochs", 4, flag)
    assert same(tmp_path / "plain", tmp_path / "compiled")


def test_a_machine_that_can_not_compile_raises(monkeypatch) -> None:
    monkeypatch.setattr(setup, "BACKEND", "no-such-backend")
    with pytest.raises(
        UserError, match=r"^--compile: torch can't compile on this machine \(InvalidBackend.*leave it out$"
    ):
        setup.compile_model(torch.nn.Linear(1, 1), torch.device("cpu"))


def test_a_network_without_gradient_checkpointing_raises() -> None:
    with pytest.raises(
        UserError, match="--gradient-checkpointing: the network, a Linear, has no method enable_gradient_checkpointing"
    ):
        checkpoint_activations(torch.nn.Linear(1, 1))

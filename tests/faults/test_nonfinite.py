"""Non-finite numbers reach no parameter; their samples are named and left out, or the run stops."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import PRUNED, read_metrics
from programs import common, final, refused, same, train

from pretrain.adapters import Batch
from pretrain.core.errors import UserError
from pretrain.infobatch.sampler import InfoBatch
from pretrain.training import nonfinite, replay_step

OWN = '''
from dataclasses import dataclass
import torch
from pretrain.adapters import Losses
from pretrain.adapters.flow import Flow as Ours

@dataclass(frozen=True)
class Broken(Ours):
    """Poisons the loss, and so the gradient, of some samples."""

    below: int = 8

    def __call__(self, model, batch, rng):
        loss = super().__call__(model, batch, rng).loss
        poisoned = (7 <= batch.index) & (batch.index < self.below)
        return Losses(loss * torch.where(poisoned, float("nan"), 1.0))
'''


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    (tmp_path / "broken.py").write_text(OWN)
    return tmp_path / "broken.py"


def test_a_sample_with_a_nan_loss_is_named_and_left_out(pictures: Path, tmp_path: Path, broken: Path, capsys) -> None:
    words = [*common(pictures, tmp_path / "run"), *PRUNED, "--adapter", broken]
    train("train_diffusion.py", *words, "--checkpoint.every", 1, "--checkpoint.keep", 99)
    message = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert (
        len(message) == 1 and "the loss of sample 7 (" in message[0] and ".png) is not finite; excluded" in message[0]
    )
    for name in ("model", "ema", "optimizer"):
        assert all(value.isfinite().all() for value in final(tmp_path / "run", name).values())
    score = final(tmp_path / "run", "infobatch")["score"]
    assert score.isnan().nonzero().tolist() == [[7]] and score.nan_to_num().isfinite().all()
    (bad,) = json.loads((tmp_path / "run" / "summary.json").read_text())["bad_images"]
    assert bad.startswith("sample 7 (")
    folder = tmp_path / "resumed"  # right after it: the sample stays left out
    shutil.copytree(tmp_path / "run", folder)
    for step in sorted((folder / "checkpoints").iterdir())[6:]:
        shutil.rmtree(step)
    train("train_diffusion.py", "--resume", "--output-dir", folder)
    assert same(tmp_path / "run", folder) and read_metrics(tmp_path / "run") == read_metrics(folder)
    assert "warning" not in capsys.readouterr().out


def test_too_many_nan_losses_stop_the_run_and_the_step_is_replayed(
    pictures: Path, tmp_path: Path, broken: Path
) -> None:
    words = [*common(pictures, tmp_path / "run"), "--adapter", broken, "--adapter.below", 30]
    sentence = refused("train_diffusion.py", *words)
    assert "of 43 samples are not finite, more than 1%" in sentence and "pretrain replay" in sentence
    found = replay_step.replay(tmp_path / "run")
    bad = [index for index, loss in zip(found.index, found.loss, strict=True) if loss != loss]
    assert 1 < len(bad) < 12 == len(found.index) and all(7 <= index < 30 for index in bad)
    assert found.module == "" and found.gradients  # the network's outputs are finite: it is the adapter
    assert all(value.isfinite().all() for value in final(tmp_path / "run").values())
    with pytest.raises(UserError, match="only a run that stopped because of numbers that are not finite"):
        replay_step.replay(tmp_path)


def test_non_finite_gradients_in_three_steps_stop_the_run(pictures: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Losses are finite, one parameter's gradient is not, in three steps, which see a gradient of 0."""
    norms: list[torch.Tensor] = []
    gradient = nonfinite.NonFinite.zero_bad_gradient

    def broken(self, model, norm):
        norms.append(norm)
        next(model.parameters()).grad.fill_(float("inf"))
        gradient(self, model, torch.tensor(float("inf")))
        assert not any(value.grad is not None and value.grad.any() for value in model.parameters())

    monkeypatch.setattr(nonfinite.NonFinite, "zero_bad_gradient", broken)
    sentence = refused("train_diffusion.py", *common(pictures, tmp_path / "run"))
    assert "step 3: the gradients of 3 steps in a row are not finite" in sentence and len(norms) == 3
    replay_step.main([str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "12 samples, the losses of 0 are not finite" in out and "gradients that are not finite: 0" in out


def test_a_diverging_run_stops_and_its_step_is_replayed(pictures: Path, tmp_path: Path) -> None:
    words = [*common(pictures, tmp_path / "run"), "--optim.lr", 1e30, "--optim.clip", 0, "--optim.warmup", 0]
    sentence = refused("train_diffusion.py", *words, "--model.dropout", 0.1)
    assert "not finite" in sentence
    found = replay_step.replay(tmp_path / "run")
    assert found.module and found.differs == "model.dropout 0.1"
    assert all(value.isfinite().all() for value in final(tmp_path / "run", "ema").values())


def test_left_out_samples_are_padding_on_a_device() -> None:
    """On the meta device; their indices are on the CPU."""
    images: Any = SimpleNamespace(handle=lambda problems: None)
    ours = nonfinite.NonFinite(InfoBatch(5, epochs=1), images, torch.device("cpu"))
    ours.load_state_dict({"excluded": [1], "streak": 0})
    image, label = torch.zeros(3, 1, 2, 2, dtype=torch.uint8, device="meta"), torch.zeros(3, dtype=int, device="meta")
    batch = ours.filter(Batch(image, label, torch.tensor([0, 1, 2]), torch.zeros(3)), [])
    assert batch.index.tolist() == [0, ~1, 2] and batch.image.device.type == batch.label.device.type == "meta"


def test_a_grad_scaler_that_skips_every_step_stops_the_run() -> None:
    """Under fp16 gradients that overflow at a large scale are usual at the start; at any scale they are not."""
    found = nonfinite.NonFinite(InfoBatch(9, epochs=2), MagicMock(), torch.device("cpu"))
    for skipped in [*[True] * (nonfinite.MAX_SKIPPED - 1), False, *[True] * (nonfinite.MAX_SKIPPED - 1)]:
        found.count_skipped(skipped)
        assert not found.reason_to_stop()
    found.count_skipped(True)
    assert "however small their scale" in found.reason_to_stop()

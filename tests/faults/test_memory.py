"""Out of memory: one sentence, or with `auto` the micro-batch size that fits, and an unchanged run."""

from pathlib import Path

import pytest
import torch
from conftest import PRUNED, read_metrics
from programs import common, refused, same, train

from pretrain.adapters.ddpm import DDPM
from pretrain.core.errors import exit_on_user_error
from pretrain.data.preload import preload
from pretrain.training import flops, setup
from pretrain.training.micro_batches import find_micro_batch_size


@pytest.mark.parametrize("room", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_automatic_micro_batch_size_changes_nothing(
    room: int, pictures: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    call, seen, order = DDPM.__call__, [], []

    def crowded(self, model, batch, draws):
        losses = call(self, model, batch, draws)
        if not torch.is_grad_enabled():
            return losses
        order.append("tried" if batch.image.device.type == "cpu" else "counted")
        if len(batch.image) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 1")
        seen.append(len(batch.image))
        return losses

    fits = max(size for size in (12, 6, 3, 1) if size <= room)  # 12, and half of what did not fit
    train("train_diffusion.py", *common(pictures, tmp_path / "fixed"), *PRUNED, "--micro-batch", fits)
    monkeypatch.setattr(DDPM, "__call__", crowded)
    monkeypatch.setattr(flops, "SMALL", 0)  # FLOPs are counted on the meta device
    monkeypatch.setattr(setup, "preload", lambda *given: order.append("images kept") or preload(*given))
    train("train_diffusion.py", *common(pictures, tmp_path / "auto"), *PRUNED, "--micro-batch", "auto")
    assert f"--micro-batch auto: {fits} images per forward pass" in capsys.readouterr().out
    assert max(seen) == fits and order[:3] == ["counted", "images kept", "tried"]  # both use the same memory
    assert same(tmp_path / "fixed", tmp_path / "auto") and read_metrics(tmp_path / "fixed") == read_metrics(
        tmp_path / "auto"
    )


def test_trying_micro_batch_sizes_does_not_change_the_model() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tried = []

    def step(batch) -> None:
        tried.append(len(batch.image))
        model(batch.image + torch.randn(batch.image.shape)).sum().backward()
        if len(batch.image) > 10:
            raise torch.OutOfMemoryError

    assert find_micro_batch_size(step, model, 60, (1, 5, 5), 3) == 6 and tried == [
        60,
        30,
        15,
        6,
    ]  # 6: what divides 60 and is half of 15
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(1 << 50),  # torch's error on a CPU
        lambda: bytearray(1 << 60),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0")),
    ],
)
def test_out_of_memory_is_one_sentence(allocate, capsys) -> None:
    with pytest.raises(SystemExit) as exit, exit_on_user_error():
        next(iter(allocate()))
    message = capsys.readouterr().err
    assert (
        exit.value.code == 2 and message.count("\n") == 1 and "memory ran out" in message and "--micro-batch" in message
    )


def test_another_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="mine"), exit_on_user_error():
        raise RuntimeError("mine")


def test_one_image_that_does_not_fit_is_refused(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    call = DDPM.__call__

    def full(self, model, batch, draws):
        losses = call(self, model, batch, draws)
        if losses.loss.device.type != "meta":
            raise torch.OutOfMemoryError
        return losses

    monkeypatch.setattr(DDPM, "__call__", full)
    words = [*common(pictures, tmp_path / "run"), "--micro-batch", "auto"]
    assert "memory runs out with a single image" in refused("train_diffusion.py", *words)
    assert not (tmp_path / "run").exists()

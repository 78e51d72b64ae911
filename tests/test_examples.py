"""The examples run as they are and do what they claim."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, draw_images
from pretrain.models.nm import NMConfig
from rank_worker import at_call, run_example
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "examples"))  # as for a script that is started there

import classification
import classification_adapter
import hf_trainer
import lightning_module
import plain_loop
import restoration
import restoration_adapter
import toy
from fit import Training

import train_diffusion
from pretrain import InfoBatch
from pretrain.adapters import Batch
from pretrain.config.cli import parse
from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG, generator
from tests.faults.trainers import CONTEXT, free_port

# Warnings of these libraries; ours must not warn.
quiet = pytest.mark.filterwarnings("ignore:::lightning", "ignore:::torch.utils.data", "ignore:::transformers")


def run(*words: object) -> str:
    """The last line of a script's output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = (sys.executable, *words)
    done = subprocess.run([*map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def promises(line: str) -> int:
    """Samples used by a run, which must learn and prune."""
    found = re.fullmatch(r"([\d,]+) samples used instead of ([\d,]+), accuracy (.*)", line)
    assert found, line
    visited, full = (int(number.replace(",", "")) for number in found.groups()[:2])
    assert 0.55 * full < visited < 0.8 * full and float(found[3]) > 0.95
    return visited


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        model = plain_loop.main()
    promises(shown.getvalue().splitlines()[-1])
    return model.state_dict()


def same(model: torch.nn.Module, parameters: dict[str, Any]) -> bool:
    return all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())


def test_plain_loop_is_stopped_and_resumed(plain: dict[str, Any], tmp_path: Path, capsys) -> None:
    file = tmp_path / "checkpoint.pt"
    plain_loop.main(checkpoint=file, stop_after=133)
    assert re.search(r"stopped in epoch \d+ after \d+ of its", capsys.readouterr().out)
    assert same(plain_loop.main(checkpoint=file), plain)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stopped_after_any_step_a_new_process_continues_bit_identically(tmp_path: Path) -> None:
    """Three epochs, the second pruned; at any step."""
    whole = tmp_path / "whole.pt"
    run("examples/plain_loop.py", "--epochs", 3, "--save", whole)
    expected = torch.load(whole, weights_only=True)
    for stop_after in range(1, 1000):
        file, save = tmp_path / f"{stop_after}.pt", tmp_path / "resumed.pt"
        words = ["examples/plain_loop.py", "--epochs", 3, "--checkpoint", file, "--save", save]
        if "stopped" not in run(*words, "--stop-after", stop_after):
            break
        run(*words)
        found = torch.load(save, weights_only=True)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert stop_after > 45


def forked(name: str, processes: int, folder: Path, /, kill_at: int = 0, **arguments: object) -> str:
    """The last line that rank 0 of an example prints, without a launcher; or all ranks are killed."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    common |= {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}  # as torchrun does
    ranks = []
    for rank in range(processes):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = folder / f"output-{processes}-{rank}.txt"
        ranks.append(CONTEXT.Process(target=run_example, args=(name, arguments, environment, output, kill_at)))
        ranks[-1].start()
    for process in ranks:
        process.join(100)
    statuses = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert statuses == [-signal.SIGKILL if kill_at else 0] * processes
    return "" if kill_at else (folder / f"output-{processes}-0.txt").read_text().splitlines()[-1]


def test_ddp_on_two_processes_is_one_run(tmp_path: Path) -> None:
    lines = [forked("ddp", processes, tmp_path, save=str(tmp_path / str(processes))) for processes in (1, 2)]
    one, two = (torch.load(tmp_path / str(n), weights_only=True) for n in (1, 2))
    promises(lines[0])
    assert lines[0] == lines[1]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-4)


def as_plain(found: torch.nn.Module, plain: dict[str, Any]) -> None:
    """Up to the rounding of a learning rate."""
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)


@quiet
def test_hf_trainer_is_the_plain_loop(plain: dict[str, Any], tmp_path: Path, capsys) -> None:
    arguments = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 2}
    trainer = hf_trainer.main(folder=str(tmp_path), **arguments)
    as_plain(trainer.model.net, plain)
    assert trainer.infobatch.epoch == 20
    promises(capsys.readouterr().out.splitlines()[-1])


@quiet
def test_lightning_is_the_plain_loop(plain: dict[str, Any], tmp_path: Path, capsys) -> None:
    lightning_module.main(folder=str(tmp_path))
    promises(capsys.readouterr().out.splitlines()[-1])
    module = lightning_module.Classifier()
    module.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    as_plain(module.net, plain)


ACCUMULATED = {
    "hf_trainer": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 16},
    "lightning_module": {"accumulate_grad_batches": 2, "batch_size": 16},
}


@quiet
@pytest.mark.parametrize("name", ACCUMULATED)
def test_the_trainers_end_inside_an_epoch_and_continue(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """With accumulated gradients and evaluations: to the same bits, samples used and validation losses."""
    arguments, main = {"epochs": 4, **ACCUMULATED[name]}, sys.modules[name].main
    whole = main(folder=str(tmp_path / "whole"), **arguments)
    shown = capsys.readouterr().out.splitlines()

    def fail() -> None:
        raise KeyError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(InfoBatch, "__call__", at_call(100, fail))  # inside the second epoch
        with pytest.raises(KeyError, match="broken"):
            main(folder=str(tmp_path / "broken"), **arguments)
    resumed = main(folder=str(tmp_path / "broken"), resume=True, **arguments)
    assert resumed.infobatch.dropped == whole.infobatch.dropped == 0
    if name == "hf_trainer":
        assert same(resumed.model, whole.model.state_dict())
        losses = [[r["eval_loss"] for r in run.state.log_history if "eval_loss" in r] for run in (whole, resumed)]
        assert losses[0] == losses[1] and len(losses[0]) == 4
    else:
        assert same(resumed.net, whole.net.state_dict())
    end = capsys.readouterr().out.splitlines()
    assert end[-1] == shown[-1] and (name == "hf_trainer" or end[-2] == shown[-2] != "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCUMULATED)
def test_two_processes_of_a_trainer_are_killed_inside_an_epoch_and_resumed(name: str, tmp_path: Path) -> None:
    """As above, and up to rounding."""
    arguments = {"epochs": 4, **ACCUMULATED[name]} | ({"devices": 2} if name == "lightning_module" else {})
    shown = forked(name, 2, tmp_path, folder=str(tmp_path / "whole"), **arguments)
    forked(name, 2, tmp_path, kill_at=50, folder=str(tmp_path / "killed"), **arguments)
    assert forked(name, 2, tmp_path, folder=str(tmp_path / "killed"), resume=True, **arguments) == shown

    def parameters(folder: Path) -> dict[str, Any]:
        if name == "hf_trainer":
            (last,) = folder.glob("checkpoint-*/model.safetensors")
            return load_file(last)
        return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]

    whole, resumed = parameters(tmp_path / "whole"), parameters(tmp_path / "killed")
    assert len(whole) == 4
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-4, atol=1e-5)


def test_the_toy_has_easy_and_hard_samples() -> None:
    model = plain_loop.main(epochs=3)
    losses = torch.nn.functional.cross_entropy(model(toy.data()[:][0]), toy.data()[:][1], reduction="none")
    assert losses.median() < 0.5 * losses.mean()


# -- tasks -----------------------------------------------------------------------------------------


def message(capsys) -> tuple[int, int]:
    """Samples used and those of full training, from a task's output."""
    found = re.search(r"([\d,]+) samples used instead of ([\d,]+)", capsys.readouterr().out)
    assert found
    visited, full = (int(number.replace(",", "")) for number in found.groups())
    return visited, full


def test_classification(tmp_path: Path, capsys) -> None:
    data = Data(str(draw_images(tmp_path / "images", 160)), held_out=16)
    training = Training(epochs=5, batch_size=16, lr=2e-3)
    assert classification.main(data=data, model="resnet10t", width=0.5, training=training) > 0.8
    visited, full = message(capsys)
    assert visited < full == 5 * 144


def test_restoration(tmp_path: Path, capsys) -> None:
    """InfoBatch prunes it, images get better, and FLOPs are those of the budget."""
    data = Data(str(draw_images(tmp_path / "images", 80, size=11)), held_out=16)
    training = Training(epochs=8, batch_size=16, lr=1e-2, policy="importance", budget=0.8)
    arms = ("dense", "narrow", "2:4", "level", "reversed", "image")
    file = tmp_path / "out" / "found.json"
    found = restoration.main(data=data, arms=arms, width=16, blocks=2, training=training, output=file)
    visited, full = message(capsys)
    assert visited == round(0.8 * full) and json.loads(file.read_text())["arms"] == found
    for values in found.values():
        assert values["psnr_by_level"][2] > values["noisy"][2] + 0.5 and values["noisy"] == found["dense"]["noisy"]
        assert values["psnr"] == pytest.approx(sum(values["psnr_by_level"]) / 3, rel=0.02)
    flops = {arm: values["flops"] / found["dense"]["flops"] for arm, values in found.items()}
    assert 0.5 < flops["2:4"] < 0.6 < flops["level"] < 0.7
    assert flops["reversed"] == pytest.approx(flops["level"], rel=0.06) and flops["image"] < 1.1
    assert flops["level"] < 1.02 * flops["narrow"] < 1.2 * flops["level"]


@pytest.mark.parametrize("policy", ["seta", "ies"])
def test_restoration_with_another_method(policy: str, tmp_path: Path) -> None:
    data = Data(str(draw_images(tmp_path / "images", 24, size=8)), held_out=8)
    training = Training(epochs=2, batch_size=8, policy=policy)
    found = restoration.main(data=data, arms=("dense",), width=8, blocks=1, training=training)
    assert found["dense"]["psnr"] > 0


def test_what_restoration_refuses(tmp_path: Path) -> None:
    data = Data(str(draw_images(tmp_path / "images", 12, size=8)), held_out=4)
    for settings, words in (({"budget": 0.2}, "budget must lie between 0.25 and 1"), ({"width": 6}, "group = 4")):
        with pytest.raises(UserError, match=words):
            restoration.main(data=data, arms=("level",), **settings)
    for settings in ({"low": 0.0}, {"low": 60.0}, {"equal": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            restoration_adapter.Restoration(**settings)


def test_a_restored_images_loss_is_its_own_and_its_score_the_error() -> None:
    """At every stage of the training, also of a network of models/nm.py that is called in the loop by its name."""
    adapter, rng = restoration_adapter.Restoration(), generator(0)
    image = torch.rand(8, 1, 9, 9, generator=rng) * 2 - 1
    batch = Batch(image, torch.full((8,), -1), torch.arange(8), torch.rand(8, generator=rng))
    for by in ("level", "image"):
        torch.manual_seed(0)
        model = NMConfig(by=by).wrap(restoration.ResidualCNN(1, 8, 2), 1).train()
        for progress in (0.0, 0.3, 0.8):
            usage = model.usage.clone() if by == "image" else None
            loss, score = adapter(model, batch, SampleRNG(0, index=batch.index), progress)
            assert score is not None and not score.requires_grad and loss.requires_grad
            assert torch.equal(loss, score) == (by == "level" or progress < 0.5)
            for row in range(8):
                if usage is not None:
                    model.usage.copy_(usage)
                alone = Batch(*(field[row : row + 1] for field in batch))
                found = adapter(model, alone, SampleRNG(0, index=alone.index), progress)
                torch.testing.assert_close(found.score[0], score[row], rtol=1e-4, atol=1e-5)


def test_the_terms_of_a_classifier_have_the_gradient_of_the_batchs() -> None:
    """At the running mean of the probabilities: of confident choices, equal use and the excess over the budget."""
    adapter = restoration_adapter.Restoration(confident=0.3, equal=0.2, excess=1.5)
    for seed in range(20):
        logits = torch.randn(7, 4, generator=generator(seed), requires_grad=True)
        cost, budget = torch.rand(4, generator=generator(seed, 1)), 0.4
        p = logits.softmax(1)
        mean = p.mean(0)
        pairs = sum((p[:, i] - p[:, j]).abs().mean() for i in range(4) for j in range(i))
        whole = 1.5 * (mean @ cost - budget).relu() ** 2 + 0.2 * (mean - 0.25).abs().sum() - 0.3 * pairs
        (expected,) = torch.autograd.grad(whole, logits, retain_graph=True)
        each = adapter.choice_loss(p, mean.detach(), cost, budget)
        torch.testing.assert_close(torch.autograd.grad(each.mean(), logits)[0], expected)


def test_the_restoration_objective_trains_a_classifier_in_the_loop(tmp_path: Path, pictures: Path) -> None:
    words = ["--data", pictures, "--epochs", 1, "--batch-size", 43, "--evaluate.images", 4, "--infobatch"]
    words += ["--model", "nm", "--model.by", "image", "--model.unet.channels", 8, 16, "--model.unet.attention", 0]
    words += ["--adapter", ROOT / "examples" / "restoration_adapter.py", "--output-dir", tmp_path / "run"]
    config = parse([*map(str, words)], **train_diffusion.START, output_dir="", help="")
    train_diffusion.main(config)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_the_classification_score_has_no_label_smoothing() -> None:
    adapter = classification_adapter.Classification(smoothing=0.2)
    batch = Batch(torch.tensor([[9.0, 0.0]]), torch.tensor([0]), torch.tensor([0]), torch.zeros(1))
    loss, score = adapter(torch.nn.Identity(), batch, None)
    assert score is not None and loss.item() > 0.5 > 0.01 > score.item()

"""Trainers of other libraries use InfoBatch's samples exactly, wherever they are stopped and resumed."""

import math
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import ROOT
from loops import (
    BATCH,
    EPOCHS,
    EVERY_STEP,
    LIBRARIES,
    RESUMED,
    SIZE,
    Dicts,
    Looped,
    Net,
    Stateful,
    fit,
    points,
    trainer,
)
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss, ForTokenClassification

from pretrain import Indexed, InfoBatch
from pretrain.integrations.accelerate import prepare_loader
from pretrain.integrations.torchdata import StatefulSampler
from pretrain.integrations.transformers import InfoBatchTrainer, _losses

pytestmark = pytest.mark.filterwarnings(
    *(f"ignore:::{name}" for name in ("lightning", "torch.utils.data", "torchdata", "transformers"))
)


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


# -- Hugging Face's Trainer ------------------------------------------------------------------------


def by_hand(accumulate: int = 1, drop_last: bool = False) -> tuple[nn.Module, list[tuple[int, list[int]]]]:
    """What the Trainer is to do, in plain PyTorch."""
    model, infobatch, steps = Net(), InfoBatch(SIZE, epochs=EPOCHS, seed=42), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = DataLoader(Indexed(points()), BATCH, sampler=infobatch, drop_last=drop_last)
    total = EPOCHS * math.ceil((SIZE // BATCH if drop_last else math.ceil(SIZE / BATCH)) / accumulate)
    due = progress = 0
    for epoch in infobatch.epochs():
        for index, features, label in loader:
            if not due:
                left = infobatch.length - infobatch.seen
                due = window = min(accumulate * BATCH, left - left % BATCH if drop_last else left)
            step = progress * total
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 3) / (total - 3)))
            optimizer.param_groups[0]["lr"] = 0.1 * (step / 3 if step < 3 else cosine)
            losses = F.cross_entropy(model(features)["logits"], label, reduction="none")
            (infobatch(losses, index) * len(index) / window).backward()
            steps.append((epoch, index.tolist()))
            due -= len(index)
            if not due:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                progress = infobatch.progress
    return model, steps


@pytest.mark.parametrize(("accumulate", "drop_last"), [(1, False), (2, False), (3, False), (1, True), (2, True)])
def test_the_trainer_is_the_plain_loop(accumulate: int, drop_last: bool, tmp_path: Path) -> None:
    """Samples, weights, learning rate; no epoch is longer or shorter than its plan."""
    more = {"gradient_accumulation_steps": accumulate, "dataloader_drop_last": drop_last, "save_strategy": "no"}
    run = trainer(tmp_path, **more)
    run.train()
    model, steps = by_hand(accumulate, drop_last)
    assert run.steps == steps
    assert all(len(used) == BATCH for _, used in steps) == drop_last
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert run.infobatch.epoch == EPOCHS and run.state.epoch == EPOCHS
    logged = [record["epoch"] for record in run.state.log_history]
    assert all(0 < one <= two <= EPOCHS for one, two in pairwise(logged))


@pytest.mark.parametrize(("accumulate", "evaluate"), [pytest.param(1, "epoch", marks=pytest.mark.slow), (2, "steps")])
def test_the_trainer_is_killed_anywhere(accumulate: int, evaluate: str, tmp_path: Path) -> None:
    """A checkpoint after every step: one in three continues to the same bits with the samples that are left."""
    more = {"gradient_accumulation_steps": accumulate, "eval_strategy": evaluate, "eval_steps": 2}
    more["per_device_train_batch_size"] = BATCH // accumulate
    whole = trainer(tmp_path / "whole", Net(dropout=0.2), **more)
    whole.train()
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert len(checkpoints) == whole.state.global_step < EPOCHS * math.ceil(SIZE / BATCH)
    for number, checkpoint in [*enumerate(checkpoints)][::3]:
        resumed = trainer(tmp_path / "resumed", Net(dropout=0.2), save_strategy="no", **more)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert same(resumed.model, whole.model), checkpoint.name
        used = len(whole.steps) - len(resumed.steps)
        assert resumed.steps == whole.steps[used:]
        assert used >= number and resumed.infobatch.samples_used == whole.infobatch.samples_used
        assert torch.equal(resumed.infobatch.score, whole.infobatch.score)
        evaluations = [[r for r in t.state.log_history if "eval_loss" in r] for t in (whole, resumed)]
        for one, two in zip(*evaluations, strict=True):
            assert (one["eval_loss"], one["epoch"], one["step"]) == (two["eval_loss"], two["epoch"], two["step"])
    if evaluate == "epoch":
        assert len(evaluations[0]) == EPOCHS


@pytest.mark.parametrize("batch", [5, 3 * BATCH])
def test_the_trainer_resumes_with_other_batches(batch: int, tmp_path: Path) -> None:
    """Inside the first epoch: what is left of it, and all of the others."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed", per_device_train_batch_size=batch, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    first = [[index for epoch, used in run.steps if not epoch for index in used] for run in (whole, resumed)]
    assert first[1] == first[0][2 * BATCH :] and resumed.infobatch.epoch == EPOCHS
    assert not resumed.infobatch.dropped


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("step", [2, 4, 6])
def test_the_trainer_is_stopped_inside_an_epoch_and_after_one(step: int, tmp_path: Path) -> None:
    """An epoch that is not finished stays open in the checkpoint at its end; one object trains twice."""
    run = trainer(tmp_path / "whole", save_strategy="no")
    run.train()
    expected = run.steps
    run = trainer(tmp_path / "stopped", save_strategy="epoch")
    run.add_callback(StopAt(step))
    run.train()
    assert run.steps == expected[:step]
    (checkpoint,) = (tmp_path / "stopped").glob(f"checkpoint-{step}")
    run.steps = []
    run.train(resume_from_checkpoint=True)
    assert run.steps == expected[step:] and run.infobatch.epoch == EPOCHS
    (checkpoint / "infobatch.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no infobatch\.pt"):
        run.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"max_steps": 9}, "got max_steps 9; set num_train_epochs"), ({"num_train_epochs": 1.5}, "whole .*, got 1.5")],
)
def test_the_trainer_refuses_what_contradicts_infobatch(arguments: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path, **arguments)


def test_losses_are_those_of_each_sample_alone() -> None:
    """Whatever the kind of model; tokens without a label are no part of it."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, (6, 7), generator=rng)
    tokens[torch.rand(6, 7, generator=rng) < 0.3] = -100
    tokens[0] = -100
    words = torch.randn(6, 7, 5, generator=rng)
    for shift, kind in ((False, ForTokenClassification), (True, ForCausalLMLoss)):
        losses = _losses(words, tokens, shift, 0.0)
        assert losses[0] == 0
        for row in range(1, 6):
            config = SimpleNamespace(num_labels=5)
            more = {"vocab_size": 5} if shift else {"config": config}
            torch.testing.assert_close(losses[row], kind(words[row : row + 1], tokens[row : row + 1], **more))
    logits = words[:, 0]
    torch.testing.assert_close(
        _losses(logits, tokens[:, 1].abs() % 5, False, 0.1).mean(),
        F.cross_entropy(logits, tokens[:, 1].abs() % 5, label_smoothing=0.1),
    )
    several = (logits > 0).roll(1).float()
    torch.testing.assert_close(
        _losses(logits, several, False, 0.0).mean(), F.binary_cross_entropy_with_logits(logits, several)
    )
    torch.testing.assert_close(
        _losses(logits[:, :1], several[:, 0], False, 0.0).mean(), F.mse_loss(logits[:, 0], several[:, 0])
    )
    with pytest.raises(ValueError, match=r"logits of shape \(6, 7, 5\) .* override sample_losses"):
        _losses(words, tokens[:, 0], False, 0.0)


# -- Lightning -------------------------------------------------------------------------------------


EVERY_EPOCH = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
AFTER_VALIDATION = {"every_n_epochs": 1, "save_on_train_epoch_end": False}


@pytest.mark.parametrize(
    ("save", "evaluate", "accumulate", "drop_last"),
    [
        (EVERY_STEP, 0, 1, False),
        (EVERY_STEP, 1.0, 2, True),
        (EVERY_STEP, 0.5, 1, True),
        (EVERY_EPOCH, 0, 1, False),
        (EVERY_EPOCH, 1.0, 2, False),
        (AFTER_VALIDATION, 1.0, 1, False),
    ],
)
def test_lightning_is_killed_anywhere(save, evaluate: float, accumulate: int, drop_last: bool, tmp_path: Path) -> None:
    """As the Trainer above; a checkpoint after each step, each epoch or each validation."""
    more = {"evaluate": evaluate, "accumulate_grad_batches": accumulate, "drop_last": drop_last}
    whole = fit(tmp_path / "whole", save, **more)
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[-1]))
    assert len(checkpoints) >= EPOCHS and whole.infobatch.epoch == EPOCHS + 1
    assert whole.infobatch.samples_used == sum(len(used) for _, used in whole.steps)
    assert (whole.infobatch.dropped > 0) == drop_last
    for checkpoint in checkpoints:
        resumed = fit(tmp_path / "resumed", {"every_n_epochs": 99}, resume=checkpoint, **more)
        assert resumed.steps == whole.steps[len(whole.steps) - len(resumed.steps) :], checkpoint.name
        assert same(resumed.net, whole.net), checkpoint.name
        assert resumed.infobatch.samples_used == whole.infobatch.samples_used


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_epochs": -1}, "got max_epochs -1; set it"),
        ({"reload_dataloaders_every_n_epochs": 0}, "every_n_epochs 0; set it to 1"),
    ],
)
def test_lightning_is_refused_where_it_contradicts_infobatch(settings: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit(tmp_path, EVERY_STEP, **settings)


def test_lightning_does_not_resume_inside_an_epoch_with_other_batches(tmp_path: Path) -> None:
    fit(tmp_path, EVERY_STEP, max_epochs=1)
    with pytest.raises(ValueError, match="an epoch of 16 samples a step over all processes, got 8"):
        fit(tmp_path, EVERY_STEP, resume=tmp_path / "epoch=0-step=2.ckpt", batch=BATCH // 2)


# -- accelerate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loop_of_accelerate_is_killed_after_any_step(accumulate: int, tmp_path: Path) -> None:
    whole = Looped(tmp_path / "whole", accumulate=accumulate)
    assert whole.infobatch.samples_used == sum(len(used) for _, used in whole.steps)
    for epoch in range(EPOCHS):
        used = sorted(index for number, indices in whole.steps if number == epoch for index in indices)
        assert len({*used}) == len(used)
    checkpoints = sorted((tmp_path / "whole").iterdir())
    assert len(checkpoints) >= len(whole.steps) / accumulate
    for checkpoint in checkpoints:
        number = int(checkpoint.name.removeprefix("step-"))
        resumed = Looped(tmp_path / "resumed", checkpoint, accumulate)
        assert resumed.steps == whole.steps[number:] and same(resumed.net, whole.net), checkpoint.name
        assert resumed.infobatch.samples_used == whole.infobatch.samples_used


def test_a_loader_with_another_sampler_is_refused() -> None:
    loader = DataLoader(points(), 4, shuffle=True)
    with pytest.raises(ValueError, match="must be an InfoBatch, got RandomSampler"):
        prepare_loader(Accelerator(cpu=True), loader)


# -- torchdata -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True, "snapshot_every_n_steps": 3},
        {"num_workers": 1, "drop_last": True, "snapshot_every_n_steps": 2},
    ],
    ids=str,
)
def test_a_loop_with_a_stateful_loader_is_killed_after_any_step(options: dict, tmp_path: Path) -> None:
    """Each sample is used as often as without the break, in the same steps."""
    whole = Stateful(tmp_path / "whole", **options)
    counts = Counter(index for _, used in whole.steps for index in used)
    assert len(counts) == SIZE and min(counts.values()) < max(counts.values()) == EPOCHS
    numbers = range(1, len(whole.steps) + 1)
    for number in random.Random(len(options)).sample(numbers, 4) if options else numbers:  # starting workers takes long
        resumed = Stateful(tmp_path / "resumed", tmp_path / "whole" / f"step-{number:03d}", **options)
        done = Counter(index for _, used in whole.steps[:number] for index in used)
        assert done + Counter(index for _, used in resumed.steps for index in used) == counts, number
        assert resumed.steps == whole.steps[number:] and same(resumed.net, whole.net)
        assert torch.equal(resumed.infobatch.score.nan_to_num(-1), whole.infobatch.score.nan_to_num(-1))


def test_the_state_of_a_stateful_loader_alone_is_refused(tmp_path: Path) -> None:
    """And InfoBatch's alone is enough."""
    whole = Stateful(tmp_path, num_workers=2)
    state = torch.load(tmp_path / "step-006" / "0.pt", weights_only=True)
    infobatch = InfoBatch(SIZE, epochs=EPOCHS, seed=1)
    loader = StatefulDataLoader(Indexed(points()), BATCH, sampler=StatefulSampler(infobatch), num_workers=2)
    loader.load_state_dict(state["loader"])
    next(infobatch.epochs())
    with pytest.raises(ValueError, match=r"loader's state lies in epoch 1 after .* load the state of both"):
        iter(loader)
    infobatch.load_state_dict(state["infobatch"])
    for sampler in (infobatch, StatefulSampler(infobatch)):
        for workers in (0, 2):
            loader = StatefulDataLoader(Indexed(points()), BATCH, sampler=sampler, num_workers=workers)
            left = [used for epoch, used in whole.steps[6:] if epoch == infobatch.epoch]
            assert len(left) == len(loader) and [index.tolist() for index, *_ in loader] == left


def test_a_stateful_loader_that_sets_infobatch_back_is_noticed() -> None:
    """It copied InfoBatch's state where its workers fetched a batch, before the loop had its losses."""
    said: list[str] = []
    infobatch = InfoBatch(SIZE, epochs=EPOCHS, warn=said.append)
    loader = StatefulDataLoader(Indexed(points()), BATCH, sampler=infobatch, num_workers=1)
    next(infobatch.epochs())
    index, *_ = next(iter(loader))
    infobatch(torch.rand(BATCH), index)
    infobatch.load_state_dict(infobatch.state_dict())
    loader.load_state_dict(loader.state_dict())
    assert infobatch.seen == BATCH and not said
    iter(loader)
    assert infobatch.seen == 0 and "restored to 16 samples of epoch 0 and is now set back to 0" in said[0]


# -- several processes -----------------------------------------------------------------------------


def alone(library: str, folder: Path) -> tuple[list[tuple[int, list[int]]], nn.Module]:
    """Steps and network of a run of one process with the batches of two."""
    if library == "transformers":
        run = trainer(folder, save_strategy="no", per_device_train_batch_size=2 * BATCH)
        run.train()
        return run.steps, run.model
    if library == "lightning":
        module = fit(folder, {"every_n_epochs": 99}, batch=2 * BATCH)
        return module.steps, module.net
    loop = {"accelerate": Looped, "torchdata": Stateful}[library](folder, batch=2 * BATCH)
    return loop.steps, loop.net


def test_two_processes_are_one_also_after_a_resume(tmp_path: Path) -> None:
    """The same samples in each step, each on one rank, and the same parameters up to rounding.

    One launch for all libraries, which take long to import.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [*launch, str(ROOT / "tests" / "loops.py"), str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no loss was passed" not in done.stderr
    for library in LIBRARIES:
        steps, model = alone(library, tmp_path / "alone" / library)
        ranks = [torch.load(tmp_path / library / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
        for number, expected in enumerate((steps, steps[RESUMED:])):
            for one, two, (epoch, used) in zip(*(rank["steps"][number] for rank in ranks), expected, strict=True):
                assert one[0] == two[0] == epoch and len(one[1]) == len(two[1]), library
                assert sorted(index for index in one[1] + two[1] if index >= 0) == sorted(used), library
            for rank in ranks:
                for name, value in model.state_dict().items():
                    torch.testing.assert_close(rank["models"][number][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "InfoBatch orders the samples itself"),
        ({"infobatch": {"epochs": 7}}, "infobatch must be a dict of settings without epochs, rank, world"),
        ({"infobatch": InfoBatch(3, epochs=1)}, "infobatch must be a dict of settings .* got InfoBatch"),
    ],
    ids=("sampling_strategy", "epochs", "object"),
)
def test_arguments_of_the_trainer_that_contradict_infobatch_raise(settings: dict, message: str, tmp_path: Path) -> None:
    given = {key: settings.pop(key) for key in ("infobatch",) if key in settings}
    with pytest.raises(ValueError, match=message):
        InfoBatchTrainer(
            Net(), TrainingArguments(str(tmp_path), use_cpu=True, **settings), train_dataset=Dicts(), **given
        )


@pytest.mark.parametrize("content", [b"", b"x" * 50])
def test_a_damaged_state_of_the_trainer_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    trainer(tmp_path, num_train_epochs=1, save_steps=4).train()
    (tmp_path / "checkpoint-4" / "infobatch.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"infobatch\.pt can't be read \(\w+\); resume from another checkpoint$"):
        trainer(tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_lightning_without_the_sampler_or_the_state_of_infobatch_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overfit_batches replaces InfoBatch's sampler, got 2"):
        fit(tmp_path, EVERY_STEP, overfit_batches=2)
    fit(tmp_path, {"every_n_train_steps": 2}, max_epochs=1)
    saved = next(tmp_path.glob("*step=2.ckpt"))
    state = torch.load(saved, weights_only=True)
    state["callbacks"] = {name: value for name, value in state["callbacks"].items() if "InfoBatch" not in name}
    torch.save(state, saved)
    with pytest.raises(ValueError, match="continues after step 2 and the checkpoint has no state of InfoBatch"):
        fit(tmp_path / "b", EVERY_STEP, resume=saved)

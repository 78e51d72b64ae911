"""Trainers of other libraries use InfoBatch's samples exactly, wherever they are stopped and resumed."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from pretrain import Indexed, InfoBatch
from pretrain.integrations.transformers import InfoBatchTrainer

SIZE, BATCH, EPOCHS = 61, 8, 3
pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:::torch.utils.data", "ignore:::transformers")


def points() -> TensorDataset:
    rng = torch.Generator().manual_seed(0)
    label = torch.randint(3, (SIZE,), generator=rng)
    return TensorDataset(torch.randn(SIZE, 4, generator=rng) + label[:, None], label)


class Net(nn.Module):
    """With the interface of a transformers model; dropout draws from the global generator."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = nn.Linear(4, 3), nn.Dropout(dropout)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.linear(self.dropout(features))}


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


# -- Hugging Face's Trainer ------------------------------------------------------------------------


class Dicts:
    def __init__(self) -> None:
        self.data = points()

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(zip(("features", "labels"), self.data[index], strict=True))


class Recorded(InfoBatchTrainer):
    """Knows of each step the epoch and the samples."""

    steps: list[tuple[int, list[int]]]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any) -> Tensor:
        self.steps.append((self.infobatch.epoch, inputs["infobatch_index"].tolist()))
        return super().training_step(model, inputs, *more)


def trainer(folder: Path, model: nn.Module | None = None, **settings: Any) -> Recorded:
    defaults = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    data = Dicts()
    made = Recorded(
        model or Net(), TrainingArguments(str(folder), **defaults | settings), train_dataset=data, eval_dataset=data
    )
    made.steps = []
    return made


def by_hand(accumulate: int = 1, drop_last: bool = False) -> tuple[nn.Module, list[tuple[int, list[int]]]]:
    """What the Trainer is to do, in plain PyTorch."""
    model, infobatch, steps = Net(dropout=0.0), InfoBatch(SIZE, epochs=EPOCHS, seed=42), []
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
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 5) / (total - 5)))
            optimizer.param_groups[0]["lr"] = 0.1 * (step / 5 if step < 5 else cosine)
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
    run = trainer(tmp_path, Net(dropout=0.0), **more)
    run.train()
    model, steps = by_hand(accumulate, drop_last)
    assert run.steps == steps
    assert all(len(used) == BATCH for _, used in steps) == drop_last
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert run.infobatch.epoch == EPOCHS and run.state.epoch == EPOCHS
    logged = [record["epoch"] for record in run.state.log_history]
    assert all(0 < one <= two <= EPOCHS for one, two in pairwise(logged))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("evaluate", ["no", "epoch", "steps"])
def test_the_trainer_is_killed_anywhere(accumulate: int, evaluate: str, tmp_path: Path) -> None:
    """A checkpoint after every step: each continues to the same bits with the samples that are left."""
    more = {"gradient_accumulation_steps": accumulate, "eval_strategy": evaluate, "eval_steps": 3}
    whole = trainer(tmp_path / "whole", **more)
    whole.train()
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert len(checkpoints) == whole.state.global_step < EPOCHS * math.ceil(SIZE / BATCH / accumulate)
    for number, checkpoint in enumerate(checkpoints[:: 1 if evaluate == "epoch" else 3]):
        resumed = trainer(tmp_path / "resumed", save_strategy="no", **more)
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

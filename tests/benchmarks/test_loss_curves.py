"""The curves of docs/normal_losses.md are those of their records."""

import json
from pathlib import Path

import loss_curves
import torch

from pretrain.core.rng import generator


def test_the_document_and_the_figures_are_those_of_the_records(tmp_path: Path) -> None:
    text, curves = loss_curves.DOCUMENT.read_text(), loss_curves.records()
    assert {*curves} == {*loss_curves.RUNS}
    assert loss_curves.written(text, curves) == text
    for name, curve in curves.items():
        assert curve.command == f"python {loss_curves.RUNS[name]} {loss_curves.EVERY_EPOCH}"
        assert f"<!-- curve {name} -->" in text
        loss_curves.draw(curve, tmp_path / "figure.svg")
        assert 1000 < (tmp_path / "figure.svg").stat().st_size < 60_000
        assert (loss_curves.FIGURES / f"{name}.svg").stat().st_size < 60_000


def test_a_run_is_read_in_the_order_of_its_epochs(tmp_path: Path) -> None:
    """Other records and other metrics between the losses change nothing."""
    for seed in range(5):
        losses = torch.rand(7, 2, generator=generator(seed)).tolist()
        lines = [{"kind": "evaluation", "epoch": 0, "validation_loss": 1.0}]
        for epoch, (training, validation) in enumerate(losses, 1):
            lines += [{"kind": "epoch", "epoch": epoch, "loss": training, "lr": 0.1}, {"kind": "other", "loss": 9.0}]
            lines += [{"kind": "evaluation", "epoch": epoch, "validation_loss": validation, "knn_accuracy": 0.5}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = {"environment": {"device": "a CPU", "torch": "2"}, "seconds": 1.5, "samples_used": 70}
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        curve = loss_curves.read_run(tmp_path, "train_mae.py")
        assert curve.training == [round(training, 5) for training, _ in losses]
        assert curve.validation == [1.0, *(round(validation, 5) for _, validation in losses)]
        rows = loss_curves.section("x", curve).splitlines()
        assert len({row.count("|") for row in rows if row.startswith("|")}) == 1
        assert f"| {losses[-1][1]:.3f} |" in rows[-3]

"""Probes of MAE runs on images of any shape equal scikit-learn's on the exported encoder's features."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from programs import train
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from pretrain.evaluation import visualize
from pretrain.evaluation.evaluate import main as evaluate
from pretrain.export import export

SHAPES = {"four channels": (4, 12, 12), "not square, grey": (1, 8, 20)}
CLASSES, TRAIN, TEST = 3, 300, 300


class Run(NamedTuple):
    folder: Path
    images: Path
    shape: tuple[int, int, int]


def draw(folder: Path, shape: tuple[int, int, int], count: int, seed: int) -> None:
    """Noise in all channels; each class has a bar of its own in the last two channels."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 100, (*shape[1:], shape[0]))
        pixels[2 * (number % CLASSES) :][:4, :, -2:] += rng.integers(60, 150)
        path = folder / f"class {number % CLASSES}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8).squeeze()).save(path)


@pytest.fixture(scope="module", params=[pytest.param("four channels", marks=pytest.mark.slow), "not square, grey"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, shape = tmp_path_factory.mktemp("mae"), SHAPES[request.param]
    draw(folder / "images" / "train", shape, TRAIN, 0)
    draw(folder / "images" / "test", shape, TEST, 1)
    channels = ["--data.channels", 4] if shape[0] == 4 else []  # otherwise transparent pixels become white
    words = ["--data", folder / "images", *channels, "--data.flip", "--data.crop", 0.5, "--epochs", 4]
    train("train_mae.py", *words, "--batch-size", 60, "--output-dir", folder / "run", "--evaluate.every", 4)
    return Run(folder / "run", folder / "images", shape)


def features(run: Run, split: str) -> tuple[np.ndarray, list[int]]:
    """Features of the files by the export, without this project."""
    encoder: Any = timm.create_model(f"local-dir:{run.folder / 'model'}", pretrained=True).eval()
    seen = timm.data.resolve_model_data_config(encoder)
    assert tuple(seen["input_size"]) == run.shape
    paths = sorted((run.images / split).rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)).reshape(*run.shape[1:], -1) for path in paths])
    with torch.no_grad():
        found = encoder(torch.from_numpy((pixels / 255 - seen["mean"]) / seen["std"]).float().movedim(-1, 1))
    return found.numpy(), [int(path.parent.name[-1]) for path in paths]


def test_probes_are_what_scikit_learn_finds_on_the_features_of_the_export(run: Run) -> None:
    evaluate([str(run.folder), "--metrics", "knn,linear-probe", "--probe-epochs", "600"])  # until it has converged
    found = json.loads((run.folder / "evaluation.json").read_text())[-1]["found"]
    (known, label), (asked, right) = features(run, "train"), features(run, "test")

    def vote(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / 0.07)

    neighbours = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=vote)
    knn = neighbours.fit(known, label).score(asked, right)
    mean, std = known.mean(0), known.std(0)
    linear = LogisticRegression(max_iter=3000).fit((known - mean) / std, label).score((asked - mean) / std, right)
    assert found["knn_accuracy"] == pytest.approx(knn, abs=1e-12)
    assert found["linear_probe_accuracy"] == pytest.approx(linear, abs=0.05)
    assert 0.4 < knn < 1 and 0.4 < linear < 1


def test_a_repeated_export_is_identical(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Its FLOPs are those of training, which predicts half of the patches."""
    summary = json.loads((run.folder / "summary.json").read_text())
    before = (run.folder / "model" / "model.safetensors").read_bytes()
    export.main(run.folder)
    assert (run.folder / "model" / "model.safetensors").read_bytes() == before
    assert f"{summary['train_flops']:.3g} training FLOPs" in capsys.readouterr().out


def test_probes_and_visualizations_run(run: Run) -> None:
    evaluate([str(run.folder), "--metrics", "attentive-probe,finetune", "--probe-epochs", "1"])
    visualize.main(run.folder, n=6)
    for name in ("reconstructions", "attention", "neighbours", "map"):
        with Image.open(run.folder / "pictures" / f"{name}.png") as picture:
            assert picture.mode == ("L" if run.shape[0] == 1 and name != "map" else "RGB"), "nothing transparent"
            assert len(picture.getcolors(2**20) or []) > 4

"""`pretrain evaluate RUN --data OTHER`: a run measured on a data set that it was not trained on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_images
from PIL import Image
from programs import common, train
from tar_files import shards_of

from pretrain.checkpoint.load_run import load_run
from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.sources import open_data
from pretrain.evaluation.evaluate import main
from pretrain.evaluation.knn import KNN
from pretrain.evaluation.validation_loss import ValidationLoss
from pretrain.export.export import _measured
from pretrain.export.report import read_record


def evaluate(run: Path, *words: object) -> dict:
    """The last record."""
    main([str(run), *map(str, words)])
    return json.loads((run / "evaluation.json").read_text())[-1]


def refused(run: Path, *words: object) -> str:
    with pytest.raises(UserError) as refusal:
        main([str(run), *map(str, words)])
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RGB images of several sizes, of three classes."""
    folder, rng = tmp_path_factory.mktemp("others"), np.random.default_rng(0)
    for number in range(36):
        size = (16, int(rng.integers(16, 24)), 3)
        path = folder / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(80 * (number % 3), 80 * (number % 3) + 90, size).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def conditional(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditional") / "run"
    train("train_diffusion.py", *common(pictures, folder, 1), "--adapter", "flow", "--class-conditional")
    return folder


def test_probes_are_of_the_other_data(mae: Path, others: Path, capsys) -> None:
    """As with the data set opened by hand, in the run's shape; the classes are the data set's own."""
    record = evaluate(mae, "--metrics", "knn,loss,linear-probe,finetune", "--probe-epochs", 2, "--data", others)
    found, trained = record["found"], load_run(mae)
    s = open_data(Data(source=str(others), size=12, channels=1), trained.config.seed)
    assert (s.classes, trained.source.classes) == (3, 2)
    assert found["knn_accuracy"] == KNN(s.train, s.test, 3)(trained.model)["knn_accuracy"]
    with torch.no_grad():
        expected = ValidationLoss(trained.adapter, s.test)(trained.model)
    assert found["validation_loss"] == expected["validation_loss"]
    assert {"linear_probe_accuracy", "finetune_accuracy"} <= {*found}
    assert record["data"] == str(others) and record["data_settings"] == {"source": str(others)}
    assert "3 classes (folders)" in capsys.readouterr().out


def test_settings_are_those_of_the_other_data(mae: Path, pictures: Path, others: Path, tmp_path: Path) -> None:
    rows = [
        {"file_name": str(path.relative_to(others)), "kind": "xy"[n % 2]} for n, path in enumerate(others.glob("*/*"))
    ]
    folder = shutil.copytree(others, tmp_path / "copy")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data", folder, "--data.label", "kind", "--data.held-out", 2, "--data.limit", 20]
    record = evaluate(mae, "--metrics", "knn", *words)
    assert record["data_settings"] == {"source": str(folder), "label": "kind", "held_out": 2, "limit": 20}
    assert record["found"]["knn_accuracy"] in (0.0, 0.5, 1.0)
    shards = shards_of(pictures, tmp_path / "shards")
    assert (
        "knn_accuracy" in evaluate(mae, "--metrics", "knn", "--data", shards / "images-{000000..000002}.tar")["found"]
    )


def test_the_run_itself_is_measured_as_before_and_published(mae: Path, others: Path, tmp_path: Path) -> None:
    run = shutil.copytree(mae, tmp_path / "run")
    own = evaluate(run, "--metrics", "knn")
    assert own["data"] == load_run(run).config.data.source and own["data_settings"] is None
    other = evaluate(run, "--metrics", "knn,linear-probe", "--probe-epochs", 1, "--data", others)["found"]
    measured, _ = _measured(run, own["step"], None)
    assert measured[-1]["knn_accuracy"] == own["found"]["knn_accuracy"]
    assert "linear_probe_accuracy" in other and "linear_probe_accuracy" not in measured[-1]
    assert "linear_probe_accuracy" not in read_record(run, "run").quality


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--data.label x", "--data.label: it belongs to another data set; give its name, too (--data)"),
        ("--data /not/there", "there is no such file or folder"),
        ("--data OTHERS --data.limit 0", "--data.limit must be at least 1, got 0"),
        ("--data OTHERS --data.size 8", "Unrecognized options: --data.size"),
        ("--data OTHERS --data.label nonsense", "--data.label nonsense"),
    ],
)
def test_wrong_settings_are_one_sentence(mae: Path, others: Path, words: str, said: str) -> None:
    assert said in refused(mae, "--metrics", "loss", *words.replace("OTHERS", str(others)).split())


def test_a_probe_without_labels_is_refused(mae: Path, tmp_path: Path) -> None:
    for number in range(8):
        Image.new("L", (12, 12), number).save(tmp_path / f"{number}.png")
    assert f"the images of {tmp_path} have none" in refused(mae, "--metrics", "knn", "--data", tmp_path)
    assert "validation_loss" in evaluate(mae, "--metrics", "loss", "--data", tmp_path)["found"]


def test_generated_images_are_compared_with_the_other_data(flow: Path, others: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("pretrain.evaluation.fid.cached_assets_path", lambda *_: tmp_path)
    record = evaluate(flow, "--metrics", "fid,loss", "--num-images", 8, "--data", others)
    assert "33 images of" in record["notes"][0] and others.name in record["notes"][0]
    assert record["found"]["fid"] != evaluate(flow, "--metrics", "fid", "--num-images", 8)["found"]["fid"]
    assert "--data names others" in refused(flow, "--metrics", "memorization", "--data", others)


def test_classes_of_a_conditional_network(conditional: Path, others: Path, tmp_path: Path) -> None:
    """Labels are the run's by their names; a loss given a class that is not one of them means nothing."""
    said = refused(conditional, "--metrics", "loss", "--data", others)
    assert "needs the class of each validation image, on which the network is conditioned, and 3 of 3" in said
    folder = draw_images(tmp_path / "same", 24)
    for old, new in (("class 0", "x"), ("class 1", "Class 0"), ("x", "class 1")):
        (folder / old).rename(folder / new)  # other pictures, and one name spelled otherwise
    trained = load_run(conditional)
    source = trained.other_source({"source": str(folder)})
    assert source.class_names == trained.class_names == ("class 0", "class 1")
    for images in (source.train, source.test):
        for number in range(len(images)):
            assert images[None, number].label == int("class 1" in images.name_of(number))
    assert "validation_loss" in evaluate(conditional, "--metrics", "loss", "--data", folder)["found"]


def test_images_of_another_shape_are_refused(mae: Path, pictures: Path, tmp_path: Path) -> None:
    for number in range(8):
        Image.new("L", (8, 12), number).save(tmp_path / f"{number}.png")
    trained = load_run(mae)
    wide = type(trained)(**{**vars(trained), "shape": (1, 12, 16)})
    with pytest.raises(UserError, match=r"its images are 1x12x8, those of the run 1x12x16; give images of that size"):
        wide.other_source({"source": str(tmp_path)})


def test_latents_and_images_are_not_mixed(mae: Path, tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "latents.json").write_text("{}")
    assert "it holds latents, and the run was trained on images; give images" in refused(mae, "--data", tmp_path)

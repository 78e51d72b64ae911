"""The command `pretrain coreset`."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import common, refused, train
from safetensors.torch import save_file
from torch.nn.functional import normalize

from pretrain.__main__ import main as command
from pretrain.checkpoint.load_run import load_run
from pretrain.core.errors import UserError
from pretrain.core.rng import generator
from pretrain.data import coresets
from pretrain.data.images import on_device
from pretrain.evaluation import coreset

METHODS = ["random", "kcenter", "graphcut", "stratified"]


def select(source: Path, output: Path, method: str, **settings) -> dict:
    coreset.main(source, settings.pop("keep", 0.4), method, output, **settings)  # type: ignore[arg-type]
    return json.loads(output.read_text())


@pytest.mark.parametrize("method", METHODS)
def test_a_subset_of_a_run_trains(method: str, mae: Path, tmp_path: Path, pictures: Path, capsys) -> None:
    file = tmp_path / "subset.json"
    found = select(mae, file, method, seed=3)
    assert (found["size"], found["method"], found["keep"], found["seed"]) == (43, method, 0.4, 3)
    assert found["biased"] == (method == "kcenter") and len({*found["indices"]}) == 17
    assert ("weights" in found) == (method == "stratified")
    report = capsys.readouterr().out
    assert re.search(rf"17 of 43 training images, selected by {method}, .*biased", report)
    before = file.read_bytes()
    select(mae, file, method, seed=3)
    assert file.read_bytes() == before
    assert select(mae, tmp_path / "other.json", method, seed=4)["indices"] != found["indices"]
    if method == "stratified":
        words = [*common(pictures, tmp_path / "run", 1), "--data.subset", file]
        train("train_mae.py", *words, "--evaluate.metrics", "loss")
        assert report.strip() in capsys.readouterr().out
        again = select(tmp_path / "run", tmp_path / "third.json", "random")  # of all images again, not of the subset
        assert again["size"] == 43 and again["fingerprint"]


def test_features_of_a_run_are_those_that_k_nn_compares(mae: Path, tmp_path: Path) -> None:
    trained = load_run(mae)
    images = trained.source.train
    batch = on_device(next(images.batches(range(43), 43)), torch.device("cpu"))
    with torch.no_grad():
        encoder: Any = trained.model.encoder
        feature = normalize(encoder(batch.image), dim=1)
    expected = coresets.kcenter(feature, 17, 0).index.sort().values.tolist()
    assert select(mae, tmp_path / "subset.json", "kcenter")["indices"] == expected
    np.save(tmp_path / "features.npy", feature.numpy())
    assert select(tmp_path / "features.npy", tmp_path / "of.json", "kcenter")["indices"] == expected


def test_a_subset_of_other_images_is_refused(mae: Path, tmp_path: Path, pictures: Path) -> None:
    document = select(mae, tmp_path / "subset.json", "random")
    document["indices"][0] = next(n for n in range(43) if n not in document["indices"])
    (tmp_path / "subset.json").write_text(json.dumps(document))
    words = [*common(pictures, tmp_path / "run", 1), "--data.subset", tmp_path / "subset.json"]
    assert "it is of other images than those of --data" in refused("train_mae.py", *words)


@pytest.mark.parametrize("method", METHODS)
def test_files_of_features(method: str, tmp_path: Path) -> None:
    """In both formats and any precision; there is no fingerprint, as the images are not known."""
    feature, found = torch.randn(50, 5, generator=generator(0)).half(), []
    np.save(tmp_path / "a.npy", feature.numpy())
    np.save(tmp_path / "b.npy", feature.double().numpy())
    save_file({"x": feature}, tmp_path / "c.safetensors")
    save_file({"features": feature.float(), "label": torch.zeros(50)}, tmp_path / "d.safetensors")
    for name in ("a.npy", "b.npy", "c.safetensors", "d.safetensors"):
        document = select(tmp_path / name, tmp_path / "subset.json", method)
        assert document["fingerprint"] == "" and document["size"] == 50
        found.append((document["indices"], document.get("weights")))
    assert len(found[0][0]) == 20 and found.count(found[0]) == 4


def test_unusable_features_are_one_sentence(tmp_path: Path, flow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = torch.randn(20, 3), torch.randn(20, 3)
    bad[7, 1] = torch.nan
    for name, array in {
        "good": good,
        "bad": bad,
        "flat": good[0],
        "empty": good[:0],
        "complex": good + 1j,
    }.items():
        np.save(tmp_path / f"{name}.npy", array.numpy())
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:100])
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    save_file({"a": good, "b": bad}, tmp_path / "two.safetensors")
    (tmp_path / "features.csv").write_text("1,2")
    for name, message in {
        "bad.npy": "the features of sample 7 are not finite",
        "flat.npy": "must have the shape [N, D], one row per training image, got [3]",
        "empty.npy": "got [0, 3]",
        "complex.npy": "must be real numbers, got complex64",
        "objects.npy": "can't be read",
        "cut.npy": "can't be read",
        "cut.safetensors": "can't be read",
        "two.safetensors": "it has 2 tensors; give one",
        "features.csv": "neither the folder of a run nor a .npy or .safetensors file",
        "none.npy": "neither the folder of a run",
        "": "not the folder of a run with a checkpoint",
    }.items():
        with pytest.raises(UserError) as error:
            select(tmp_path / name, tmp_path / "subset.json", "kcenter")
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="its model has no encoder; give a run"):
        select(flow, tmp_path / "subset.json", "kcenter")
    monkeypatch.setattr(coreset, "MAX_PRODUCTS", 100)
    with pytest.raises(UserError, match="8 of 20 samples with 3 features need"):
        select(tmp_path / "good.npy", tmp_path / "subset.json", "kcenter")
    monkeypatch.setattr(coreset, "COPIES", 10**15)
    with pytest.raises(UserError, match="GiB of memory, and"):
        select(tmp_path / "good.npy", tmp_path / "subset.json", "kcenter")
    assert not (tmp_path / "subset.json").exists()
    assert len(select(flow, tmp_path / "subset.json", "random")["indices"]) == 17  # needs no features


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--keep 0 --method random -o x.json", "--keep must be above 0 and at most 1, got 0"),
        ("--keep 1.5 --method random -o x.json", "got 1.5"),
        ("--keep nan --method random -o x.json", "got nan"),
        ("--keep much --method random -o x.json", "--keep must be a number"),
        ("--keep 0.5 --method best -o x.json", "--method"),
        ("--keep 0.5 --method random", "--output"),
        ("--keep 0.5 --method random --seed -1 -o x.json", "--seed must be 0 or more"),
        ("--keep 0.5 --method random -o none/x.json", "--output none/x.json: it can't be written"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    np.save(tmp_path / "features.npy", np.eye(4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pretrain", "coreset", "features.npy", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        command()
    text = capsys.readouterr().err
    assert ended.value.code == 2 and message in text and text.count("\n") == 1 and text.startswith("error: ")
    assert not (tmp_path / "x.json").exists()

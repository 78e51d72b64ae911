"""`pretrain evaluate`: a run's metrics, computed again."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from conftest import ROOT, read_metrics
from fidelity import by_hand
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.checkpoint.load_run import load_run
from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data.sources import open_data
from pretrain.evaluation import fid, generate
from pretrain.evaluation.context import some_batch, some_images
from pretrain.evaluation.evaluate import main


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of reference statistics."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))  # for processes that are started
    return tmp_path / "assets"


def evaluate(run: Path, *words: object) -> dict:
    """The metrics of the last record."""
    main([str(run), *map(str, words)])
    return json.loads((run / "evaluation.json").read_text())[-1]["found"]


def refused(run: Path, *words: object) -> str:
    with pytest.raises(UserError) as refusal:
        main([str(run), *map(str, words)])
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_evaluation_repeats_the_training_metrics(mae: Path, flow: Path, capsys) -> None:
    for run in (mae, flow):
        last = [record for record in read_metrics(run) if record["kind"] == "evaluation"][-1]
        assert evaluate(run) == {name: value for name, value in last.items() if name not in ("kind", "epoch")}
    assert "knn_accuracy" in capsys.readouterr().out
    record = json.loads((flow / "evaluation.json").read_text())[-1]
    assert record["command"] == f"pretrain evaluate {flow}" and record["step"] == 8


def test_a_level_bin_without_images_has_no_loss(flow: Path, capsys) -> None:
    """Four images at two levels each, in eight bins; the mean of the bins, weighted by their counts, is the loss."""
    found = evaluate(flow, "--metrics", "loss")
    level = torch.cat([SampleRNG(0, index=torch.arange(4)).uniform() + half for half in (0, 0.5)]) % 1
    count = torch.bincount((level * 8).long(), minlength=8).tolist()
    by_level = found["validation_loss_by_level"]
    assert 0 in count and [loss is None for loss in by_level] == [n == 0 for n in count]
    assert sum(n * (loss or 0) for n, loss in zip(count, by_level, strict=True)) / 8 == pytest.approx(
        found["validation_loss"], rel=1e-6
    )
    assert " - " in capsys.readouterr().out


def test_metrics_are_those_of_the_objective(mae: Path, flow: Path) -> None:
    assert [*evaluate(mae, "--metrics", "knn")] == ["knn_accuracy"]
    assert refused(mae, "--metrics", "los").startswith("--metrics los: did you mean loss? There are loss, ")
    assert "a model of Flow has no encoder; available for this run: loss" in refused(flow, "-m", "loss,knn")


def test_distances_are_those_of_torch_fidelity(flow: Path, assets: Path, tmp_path: Path) -> None:
    """On the files that `pretrain.evaluation.generate` makes, and those of the training images."""
    source = load_run(flow).source
    (tmp_path / "real").mkdir()
    for n in range(43):
        shutil.copy(source.train.name_of(n), tmp_path / "real" / f"{n}.png")
    generate.main(flow, num_images=70, steps=2, output_dir=tmp_path / "made")
    found = evaluate(flow, "--metrics", "fid,kid,precision-recall", "--num-images", 70)
    assert found == pytest.approx(by_hand(tmp_path / "made" / "images", tmp_path / "real", 43), rel=1e-4)
    (kept,) = assets.rglob("*.safetensors")
    before = kept.stat().st_mtime_ns
    assert evaluate(flow, "--metrics", "fid", "--num-images", 70)["fid"] == found["fid"]
    assert kept.stat().st_mtime_ns == before  # read, not written
    assert evaluate(flow, "--metrics", "fid", "--num-images", 70, "--max-reference", 20)["fid"] != found["fid"]
    assert len([*assets.rglob("*.safetensors")]) == 2


def test_the_cache_of_reference_features_is_of_these_images(pictures: Path, tmp_path: Path) -> None:
    """One changed image of many is another data set, and so is another size."""
    folder = shutil.copytree(pictures, tmp_path / "data")
    images = [open_data(Data(str(folder), size=size), 0).train for size in (12, 12, 8)]
    keys = [fid._fingerprint(each, range(len(each)), "") for each in images]
    assert keys[0] == keys[1] != keys[2]
    for number in (0, 1, 30):
        file = Path(images[0].name_of(number))
        before = file.read_bytes()
        Image.new("L", (12, 12)).save(file)
        assert fid._fingerprint(open_data(Data(str(folder), size=12), 0).train, range(43), "") != keys[0]
        file.write_bytes(before)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_feature_network_is_read_from_a_file(flow: Path, assets: Path, tmp_path: Path, monkeypatch) -> None:
    class Mean(torch.nn.Module):
        def forward(self, image):
            return torch.nn.functional.adaptive_avg_pool2d(image.float(), 2).flatten(1)

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    found = evaluate(flow, "--metrics", "fid", "--num-images", 8, "--features", tmp_path / "mean.pt", "--seeds", 2)
    assert found["fid"] > 0 and found["fid_std"] > 0
    (tmp_path / "bad.pt").write_bytes(b"no")
    assert "the feature network can't be read" in refused(flow, "-m", "fid", "--features", tmp_path / "bad.pt")
    assert "there is no file nowhere" in refused(flow, "-m", "fid", "--features", "inception=nowhere")

    def offline(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torch_fidelity.utils.create_feature_extractor", offline)
    message = refused(flow, "-m", "fid", "--features", "inception")
    assert "can't be downloaded (Name or service not known); copy them from" in message
    assert message.endswith("give the file: inception=PATH")
    assert "a feature network is small, inception" in refused(flow, "-m", "fid", "--features", "incption")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-images 3", "--num-images 3: fid need at least 4 images"),
        ("--num-images 0", "--num-images must be at least 1, got 0"),
        ("--num-images abc", "--num-images must be a whole number, got 'abc'"),
        ("--nn 3", "Unrecognized options: --nn, 3"),
        ("--reference=", "reference must be images, got an empty name"),
        ("--max-reference 2", "there are 2 reference images, and at least 4 are needed"),
        ("--guidance 2", "--guidance 2 needs a model that was trained with"),
        ("--sampler ddim", "sampler must be one of euler, heun, dpm++ for Flow"),
    ],
)
def test_wrong_options_are_one_sentence(words: str, message: str, flow: Path) -> None:
    assert message in refused(flow, "--metrics", "fid", *words.split())


def test_results_are_printed_if_the_file_is_broken(flow: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(flow, tmp_path / "run")
    for held in ("{", "{}"):
        (tmp_path / "run" / "evaluation.json").write_text(held)
        assert "can't be added to" in refused(tmp_path / "run")
        assert "validation_loss" in capsys.readouterr().out
        assert (tmp_path / "run" / "evaluation.json").read_text() == held


def test_missing_data_are_one_sentence(flow: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(flow, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(pictures), str(tmp_path / "gone")))
    assert "the run's data can't be opened: --data" in refused(tmp_path / "run")


def test_a_missing_package_is_one_sentence(flow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused(flow, "--metrics", "fid").endswith("not installed; pip install torch-fidelity")


@pytest.mark.slow
def test_evaluation_by_several_processes_is_that_of_one(mae: Path, flow: Path, assets: Path) -> None:
    """With images in three batches, and in a single batch, of which one process has none."""
    for run, metrics in (
        (mae, "loss,knn,linear-probe,attentive-probe,finetune"),
        (flow, "fid,kid,precision-recall,loss"),
    ):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words = ["--metrics", metrics, "--num-images", "130", "--probe-epochs", "3"]
        subprocess.run([*launch, "-m", "pretrain", "evaluate", str(run), *words], cwd=ROOT, check=True, timeout=300)
        several = json.loads((run / "evaluation.json").read_text())[-1]
        assert several["processes"] == 2
        for kept in assets.rglob("*.safetensors"):
            kept.unlink()
        assert several["found"] == evaluate(run, *words)


@given(st.integers(1, 3000), st.integers(1, 900), st.integers(2, 10))
@settings(deadline=None, max_examples=40)
def test_some_images_are_of_all_classes_also_if_classes_alternate(count: int, most: int, classes: int) -> None:
    images: Any = range(count)
    chosen = some_images(images, most)
    assert chosen == sorted(set(chosen)) == some_images(images, most) and len(chosen) == min(count, most)
    found, chance = Counter(index % classes for index in chosen), len(chosen) / count
    for label in range(classes):
        size = len(range(label, count, classes))
        assert abs(found[label] - chance * size) <= 5 * (size * chance * (1 - chance)) ** 0.5 + 1e-9


def test_a_batch_has_other_images_if_none_of_the_chosen_ones_can_be_read(finished: Path, monkeypatch) -> None:
    images: Any = load_run(finished).source.train
    whole, chosen = images.batches, some_images(images, 4)
    assert some_batch(images, 4).index.tolist() == chosen
    readable = [index for index in range(len(images)) if index not in chosen]
    monkeypatch.setattr(images, "batches", lambda index, size: whole([n for n in index if n in readable], size))
    assert some_batch(images, 4).index.tolist() == readable[:4]

"""Training on a subset of the training images, by --data.subset."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import PROGRAMS, common, refused, same, train

from pretrain.checkpoint.storage import State
from pretrain.config.build import build_infobatch
from pretrain.config.cli import parse
from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.fingerprint import digest, fingerprints
from pretrain.data.sources import open_data
from pretrain.data.subset import read_subset
from pretrain.training.references import with_references
from pretrain.training.setup import check_data

SIZE = 43  # training images of the fixture `pictures`


def read_metrics(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def written(file: Path, content: object) -> Path:
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("subsets")


@given(st.lists(st.tuples(st.integers(0, 99), st.floats(1e-3, 1e3)), min_size=1, unique_by=lambda one: one[0]))
@settings(deadline=None, max_examples=20)
def test_the_order_of_a_file_and_the_scale_of_its_weights_do_not_matter(
    folder: Path, chosen: list[tuple[int, float]]
) -> None:
    index, weights = ([*column] for column in zip(*chosen, strict=True))
    found = read_subset(written(folder / "one.json", {"indices": index, "weights": weights}), 100)
    scaled = {"indices": index[::-1], "weights": [4 * weight for weight in weights[::-1]]}
    again = read_subset(written(folder / "other.json", scaled), 100)
    assert again.digest == found.digest and found.index.tolist() == sorted(index)
    if found.weights is not None:
        assert found.weights.mean().item() == pytest.approx(1, rel=1e-5)
        mean = sum(weights) / len(weights)
        for place, weight in zip(found.index.tolist(), found.weights.tolist(), strict=True):
            assert weight * mean == pytest.approx(dict(chosen)[place], rel=1e-5)
    plain = read_subset(written(folder / "plain.json", index), 100)
    assert np.array_equal(plain.index, found.index) and plain.weights is None and plain.biased is None
    assert (plain.digest == found.digest) == (found.weights is None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "can't be read as JSON"),
        ("", "can't be read as JSON"),
        ("[" * 100_000, "nested too deeply"),
        ({"index": [1]}, "must be a list of indices, or what `pretrain coreset` wrote"),
        ([], "must be a list of indices"),
        ("7", "must be a list of indices"),
        ([0, SIZE], "from 0 to 42, got 43"),
        ([0, -1], "got -1"),
        ([0, True], "got True"),
        ([0, 1.0], "got 1.0"),
        ([0, "1"], "got '1'"),
        ([10**300], "got 1000000"),
        ([3, 4, 3], "index 3 is given twice"),
        ({"indices": [1, 2], "size": 44}, "of a data set of 44 training images, --data has 43"),
        ({"indices": [1, 2], "fingerprint": "0123456789abcdef"}, "it is of other images than those of --data"),
        ({"indices": [1, 2], "weights": [1]}, "a list of 2 numbers, one for each index, got 1"),
        ({"indices": [1], "weights": 3}, "one for each index, got 3"),
        ('{"indices": [1, 2], "weights": [1, NaN]}', "positive and finite (up to 1e30), got nan"),
        ('{"indices": [1, 2], "weights": [1, Infinity]}', "got inf"),
        ({"indices": [1, 2], "weights": [1, 0]}, "got 0"),
        ({"indices": [1, 2], "weights": [1, -3]}, "got -3"),
        ({"indices": [1, 2], "weights": [1, None]}, "got None"),
        ({"indices": [1, 2], "weights": [1e30, 1e-30]}, "too small beside their mean"),
    ],
)
def test_a_file_that_is_no_subset_is_refused(content: object, message: str, pictures: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "subset.json", content)
    with pytest.raises(UserError) as error:
        open_data(Data(source=str(pictures), subset=str(file)), 0)
    text = str(error.value)
    assert text.startswith(f"--data.subset {file}: ") and message in text and "\n" not in text and len(text) < 500


def test_a_missing_subset_or_an_empty_name_is_refused(pictures: Path, tmp_path: Path) -> None:
    words = common(pictures, tmp_path / "run")
    assert "No such file" in refused("train_diffusion.py", *words, "--data.subset", tmp_path / "none.json")
    assert "names, got an empty one" in refused("train_diffusion.py", *words, "--data.subset", "")
    assert not (tmp_path / "run").exists()


def test_a_subset_is_those_images_and_validation_stays(pictures: Path, tmp_path: Path) -> None:
    whole = open_data(Data(source=str(pictures)), 0)
    chosen = torch.randperm(SIZE)[:20]
    content = {
        "indices": chosen.tolist(),
        "size": SIZE,
        "fingerprint": digest(whole.train, chosen.sort().values.numpy()),
    }
    file = written(tmp_path / "subset.json", content)
    found = open_data(Data(source=str(pictures), subset=str(file)), 0)
    names = [found.train.name_of(n) for n in range(20)]
    assert names == [whole.train.name_of(n) for n in sorted(chosen.tolist())]
    assert np.array_equal(found.test.rows, whole.test.rows)
    limited = Data(source=str(pictures), limit=30, subset=str(file))  # indices are among the images that are left
    with pytest.raises(UserError, match="of a data set of 43 training images, --data has 30"):
        open_data(limited, 0)


@pytest.fixture(scope="session")
def weighted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[object]]:
    """A run on a subset with weights, with a checkpoint at every step; the subset; and the run's settings."""
    folder = tmp_path_factory.mktemp("weighted")
    content = {"indices": [*range(0, 40, 2)], "weights": [1 + n % 3 for n in range(20)], "biased": False}
    file = written(folder / "subset.json", content | {"method": "stratified", "size": SIZE})
    words = [*common(pictures, folder / "run", 3), "--data.subset", file, "--pruning.policy", "infobatch"]
    train("train_diffusion.py", *words, "--checkpoint.every", 1, "--checkpoint.keep", 99)
    return folder / "run", file, words


def test_a_subset_is_reported_and_stored(weighted, pictures: Path, tmp_path: Path) -> None:
    run, file, _ = weighted
    report = json.loads((run / "data.json").read_text())
    assert report["splits"]["train"]["used"] == 20 and report["splits"]["test"]["used"] == 4
    subset = report["subset"]
    assert subset["used"] == 20 and subset["of"] == SIZE and subset["weighted"] and subset["biased"] is False
    assert subset["digest"] == json.loads((run / "summary.json").read_text())["subset"]
    assert f"subset: {file}" in (run / "config.yaml").read_text()
    line = f"subset: {file}: 20 of 43 training images, selected by stratified, weighted, unbiased"
    assert line in str(open_data(Data(source=str(pictures), subset=str(file)), 0).report)
    own = written(tmp_path / "own.json", [5, 6])
    line = "2 of 43 training images, selected by a list of your own, whether it is biased"
    assert line in str(open_data(Data(source=str(pictures), subset=str(own)), 0).report)


def test_a_run_on_a_subset_is_resumed_exactly_and_on_that_subset_only(weighted, tmp_path: Path) -> None:
    run, file, _ = weighted
    shutil.copytree(run, tmp_path / "run")
    for step in sorted((tmp_path / "run" / "checkpoints").iterdir())[3:]:
        shutil.rmtree(step)
    resume, content = ["--resume", "--output-dir", tmp_path / "run"], json.loads(file.read_text())
    for other in (
        [*range(1, 40, 2)],
        content["indices"],  # without weights
        content | {"weights": [*range(1, 21)]},
        content | {"indices": content["indices"][::-1]},  # the weights of other images
    ):
        message = refused("train_diffusion.py", *resume, "--data.subset", written(tmp_path / "other.json", other))
        assert "the run began with another subset of the data or with all of it" in message
    train("train_diffusion.py", *resume)
    assert same(tmp_path / "run", run) and read_metrics(tmp_path / "run") == read_metrics(run)


def test_a_run_on_all_images_is_not_resumed_on_a_subset_nor_the_other_way_round(pictures: Path, tmp_path: Path) -> None:
    """Also where the subset is all images, as its file may change."""
    file = str(written(tmp_path / "subset.json", [*range(SIZE)]))
    sources = [open_data(Data(source=str(pictures), subset=subset), 0) for subset in (None, file)]
    for now in sources:
        for before in sources:
            images = {"autoencoder": None, "subset": before.subset and before.subset.digest}
            state = State({"data": fingerprints(before)}, {"images": images})
            if now is before:
                check_data(tmp_path, state, fingerprints(now), now)
                continue
            with pytest.raises(UserError, match="the run began with another subset of the data or with all of it"):
                check_data(tmp_path, state, fingerprints(now), now)


def test_posterior_means_are_left_out_where_images_have_weights(pictures: Path, tmp_path: Path) -> None:
    """Their prior is the uniform distribution over the images of the subset."""
    index, messages = [*range(20)], []
    for weights, expected in (([1] * 20, "from level"), ([*range(1, 21)], "--data.subset have different weights")):
        file = written(tmp_path / "subset.json", {"indices": index, "weights": weights})
        words = ["--data", str(pictures), "--adapter.posterior-mean", "--data.subset", str(file)]
        config = parse(words, **PROGRAMS["train_diffusion.py"].START | {"adapter": "flow"}, output_dir="x", help="")
        source, adapter = open_data(config.data, 0), config.component("adapter")
        assert config.data.subset == str(file.resolve())
        found, _ = with_references(config, adapter, source, torch.device("cpu"), 10**12, messages.append)
        assert expected in messages[-1] and (found is adapter) == (source.weights is not None)
        infobatch = build_infobatch(config, 20, print, source.weights)
        assert (infobatch.weights.mark == []) == (source.weights is None)

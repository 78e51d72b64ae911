"""Damaged or malicious files are read, or raise a UserError; never anything else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import PROGRAMS, train
from safetensors.torch import load_file, save_file

from pretrain.checkpoint import storage
from pretrain.checkpoint.load_run import load_run
from pretrain.checkpoint.manifest import write_manifest
from pretrain.config.cli import parse
from pretrain.config.schema import Config
from pretrain.core.errors import UserError

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=20_000)

pieces = st.one_of(
    st.binary(max_size=4),
    st.sampled_from(
        [b"*a", b"&a ", b"!!python/name:os.system", b"<<: ", b"? ", b"- ", b": ", b"\n", b"{", b"[", b"\x00", b"1e999"]
    ),
)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """The same with up to five pieces removed, inserted or replaced."""
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(good)))
        good = good[:start] + draw(pieces) + good[start + draw(st.integers(0, 9)) :]
    return good


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=9,
)
SETTINGS = sorted(Config.__dataclass_fields__)


def read(content: bytes, folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(content)
    try:
        config = parse(["--config", str(recipe)], **PROGRAMS["train_mae.py"].START, output_dir="runs/x", help="")
    except UserError as refusal:
        assert "\n" not in str(refusal) and len(str(refusal)) < 2000
    else:
        assert isinstance(config, Config)
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]


class Recipes:
    """Properties of reading recipes, for few examples or many."""

    @staticmethod
    def bytes(data: st.DataObject, folder: Path) -> None:
        read(data.draw(damaged(data.draw(st.sampled_from(RECIPES)).read_bytes())), folder)

    @staticmethod
    def trees(data: st.DataObject, folder: Path) -> None:
        tree = data.draw(st.dictionaries(st.one_of(st.sampled_from(SETTINGS), st.text(max_size=5)), values, max_size=4))
        read(yaml.safe_dump(tree, allow_unicode=True).encode(errors="surrogatepass"), folder)


@pytest.mark.parametrize("kind", [Recipes.bytes, Recipes.trees])
@FEW
@given(data=st.data())
def test_a_damaged_recipe(kind, tmp_path: Path, data: st.DataObject) -> None:
    kind(data, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [Recipes.bytes, Recipes.trees])
@MANY
@given(data=st.data())
def test_many_damaged_recipes(kind, tmp_path: Path, data: st.DataObject) -> None:
    kind(data, tmp_path)


BOMB = "a0: &a0 {x: 1, y: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "*a0 is an alias"),
        ("adapter: &a {b: *a}\n", "*a is an alias"),
        ("a: " + "[" * 5000, "not plain YAML"),
        ("epochs: 3\nepochs: 4\n", "epochs is given twice"),
        ("!!python/object/new:os.system [touch x]\n", "not plain YAML"),
    ],
)
def test_a_malicious_recipe_raises(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as refusal:
        parse(["--config", str(tmp_path / "r.yaml")], **PROGRAMS["train_mae.py"].START, output_dir="x", help="")
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = storage.State({"model": {"a": torch.arange(5.0)}}, {"step": 1, "seconds": 0.5, "epoch": [1, {"b": None}]})
    return storage.save(tmp_path_factory.mktemp("fuzz"), 1, state, keep=1)


def sealed_again(data: st.DataObject, whole: Path, folder: Path) -> None:
    """With a manifest that was recomputed after the damage."""
    path = folder / "step-00000001"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    file = path / data.draw(st.sampled_from(["state.json", "model.safetensors", "manifest.json"]))
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    if file.name != "manifest.json":
        (path / "manifest.json").unlink()
        write_manifest(path, step=1, seconds=0.5)
    try:
        assert isinstance(storage.load(path), storage.State)
    except UserError as refusal:
        assert "\n" not in str(refusal)
    assert [each.name for each in folder.iterdir()] == [path.name]


@FEW
@given(data=st.data())
def test_a_damaged_checkpoint_with_a_valid_manifest(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    sealed_again(data, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@given(data=st.data())
def test_many_damaged_checkpoints(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    sealed_again(data, whole, tmp_path)


def spoilt(data: st.DataObject, tree: Any) -> Any:
    """The same with one value, somewhere, removed or replaced."""
    if not isinstance(tree, (dict, list)) or not tree or data.draw(st.integers(0, 4)) == 0:
        return data.draw(values)
    place = data.draw(st.sampled_from(sorted(tree) if isinstance(tree, dict) else range(len(tree))))
    inner = tree.copy()
    if data.draw(st.integers(0, 4)) == 0:
        del inner[place]
    else:
        inner[place] = spoilt(data, tree[place])
    return inner


tensors = st.one_of(
    st.just(torch.zeros(0)),
    st.just(torch.full((3,), torch.nan)),
    st.just(torch.arange(4)),
    st.builds(torch.zeros, st.lists(st.integers(0, 5), max_size=3)),
)


def made_up_state(data: st.DataObject, finished: Path, folder: Path) -> None:
    """A run's third last checkpoint with a value or tensor replaced, and a valid manifest."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    path = folder / "run" / "checkpoints" / sorted((finished / "checkpoints").iterdir())[-3].name
    shutil.copytree(finished / "checkpoints" / path.name, path)
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(finished / name, folder / "run" / name)
    if data.draw(st.booleans()):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(spoilt(data, state)))
    else:
        file = data.draw(st.sampled_from(sorted(path.glob("*.safetensors"))))
        inside = load_file(file)
        inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(tensors)
        save_file(inside, file)
    (path / "manifest.json").unlink()
    write_manifest(path, step=1, seconds=0.5)
    for go_on in (
        lambda: load_run(folder / "run"),
        lambda: train("train_diffusion.py", "--resume", "--output-dir", folder / "run"),
    ):
        try:
            go_on()
        except UserError as refusal:
            assert "\n" not in str(refusal)
    assert [each.name for each in folder.iterdir()] == ["run"]


@settings(FEW, max_examples=8)
@given(data=st.data())
def test_an_invalid_state_raises(finished: Path, tmp_path: Path, data: st.DataObject) -> None:
    made_up_state(data, finished, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(FEW, max_examples=300)
@given(data=st.data())
def test_many_invalid_states(finished: Path, tmp_path: Path, data: st.DataObject) -> None:
    made_up_state(data, finished, tmp_path)

"""Run folders and recipes from elsewhere: no link is followed, nothing blocks, no code runs."""

import json
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import common, refused, train

from pretrain.checkpoint import run_dir, storage
from pretrain.checkpoint.load_run import load_run
from pretrain.config.cli import parse
from pretrain.config.limits import MAXIMA
from pretrain.config.schema import LAUNCH_ONLY
from pretrain.core import files
from pretrain.core.errors import UserError
from pretrain.export import export
from train_diffusion import START

PLACES = (
    "config.yaml.part",
    "config.yaml",
    "metrics.jsonl",
    ".lock",
    "summary.json",
    "summary.json.part",
    "model/README.md",
    "model/config.json",
    "pictures/epoch-0001.png",
    "pictures/epoch-0002.png.part",
    "pictures",
    "ema",
    "checkpoints",
    "model",
)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train("train_diffusion.py", *common(pictures, run, 1), "--ema.sigma-rel", "0.1", "--ema.snapshots", "2")
    return run


def _parsed(*words: object) -> object:
    return parse([str(word) for word in words], **START, output_dir="runs/x", help="")


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _link(run: Path, place: str, outside: Path) -> None:
    """Put a link to outside in the place of a run's file or folder."""
    path = run / place
    outside.mkdir(exist_ok=True)
    target = outside / place.replace("/", " ")
    if path.is_dir():
        shutil.move(path, target)
    else:
        target.write_bytes(path.read_bytes() if path.is_file() else b"mine")
        path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "words", [["--resume", "--epochs", 2], ["--overwrite", "--epochs", 2]], ids=["resume", "overwrite"]
)
def test_writing_follows_no_link(words: list[object], trained: Path, pictures: Path, tmp_path: Path) -> None:
    """The run is refused in one sentence, or goes on with files of its own."""
    harmless = []
    for number, place in enumerate(PLACES):
        run, outside = tmp_path / f"run{number}", tmp_path / f"outside{number}"
        shutil.copytree(trained, run)
        _link(run, place, outside)
        before = _snapshot(outside)
        message = _prepared(run, *words)
        assert _snapshot(outside) == before, place
        if message == "starts":
            harmless.append(place)
        else:
            assert f"{run / place} is a link" in message and "\n" not in message
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(trained, run)
    for place in harmless:
        _link(run, place, outside)
    assert {"summary.json", "config.yaml.part"} <= {*harmless} or {"summary.json.part"} <= {*harmless}
    before = _snapshot(outside)
    train("train_diffusion.py", *common(pictures, run), *words)
    assert _snapshot(outside) == before


@pytest.mark.parametrize("name", sorted(run_dir.FILES - {"checkpoints", "config.yaml"}))
def test_a_folder_in_the_place_of_a_file_is_refused_before_training(name: str, trained: Path, tmp_path: Path) -> None:
    """And a file in the place of a folder; a link is refused, too, see above."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    if "." in name:
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        path.touch()
    before = _snapshot(run)
    kind = "file" if "." in name else "folder"
    assert f"{path} is not a {kind}; move it away" in _prepared(run, "--resume", "--epochs", 2)
    assert _snapshot(run) == before


def test_a_recipe_of_any_size_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "huge.yaml").touch()
    os.truncate(tmp_path / "huge.yaml", 1 << 40)
    with pytest.raises(UserError, match=r"a recipe has at most 1,048,576 bytes, got 1,099,511,627,776"):
        _parsed("--config", tmp_path / "huge.yaml")


def test_an_export_follows_no_link(trained: Path, tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(trained, run)
    _link(run, "model/README.md", outside)
    before = _snapshot(outside)
    with pytest.raises(UserError, match=r"model/README\.md is a link"):
        export.main(run)
    assert _snapshot(outside) == before


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_pipe_or_device_does_not_block(make: Callable[[Path], None], trained: Path, tmp_path: Path) -> None:
    newest = storage.newest(trained / "checkpoints")
    assert newest is not None
    places = ["metrics.jsonl", ".lock", *(str(path.relative_to(trained)) for path in newest.iterdir())]
    for number, place in enumerate(places):
        run = tmp_path / f"{number}"
        shutil.copytree(trained, run)
        (run / place).unlink()
        make(run / place)
        message: list[str] = []
        thread = threading.Thread(target=lambda run=run, to=message: to.append(_prepared(run, "--resume")), daemon=True)
        thread.start()
        thread.join(60)
        assert message and (message == ["starts"] or f"{place} is a link or not a regular file" in message[0]), (
            place
        )  # by an older one


def _prepared(run: Path, *words: object) -> str:
    """What a training says before it begins; "starts" if it would begin."""
    try:
        config: Any = _parsed(*words, "--output-dir", run)
        run_dir.prepare(config, run_dir.resume_from(config))
    except UserError as error:
        return str(error)
    return "starts"


def test_a_folder_that_is_replaced_while_writing_raises(tmp_path: Path) -> None:
    rng = random.Random(0)
    for case in range(30):
        run, outside = tmp_path / f"run{case}", tmp_path / f"outside{case}"
        (run / "a" / "b").mkdir(parents=True)
        lock = run_dir.Lock(run)
        shutil.copytree(run, outside)
        victim = rng.choice([run, run / "a", run / "a" / "b"])
        victim.rename(tmp_path / f"moved{case}")
        if rng.random() < 0.7:
            victim.symlink_to(outside / victim.relative_to(run))
        before = _snapshot(outside)
        with pytest.raises(OSError), files.atomic_write(run / "a" / "b" / "file") as part:
            part.write_text("x")
        with pytest.raises(OSError):
            os.close(files.open_own(run / "a" / "b" / "other", os.O_RDWR | os.O_CREAT))
        assert _snapshot(outside) == before
        del lock


def test_two_runs_in_one_folder_without_its_lock_file(tmp_path: Path) -> None:
    lock = run_dir.Lock(tmp_path)
    for removed in (False, True):
        if removed:
            (tmp_path / ".lock").unlink()
        child = os.fork()
        if not child:
            try:
                run_dir.Lock(tmp_path)
            except UserError as error:
                os._exit(3 if "is writing to it" in str(error) else 4)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    read, write = os.pipe()
    child = os.fork()
    if not child:  # a worker that outlives its trainer
        os.read(read, 1)
        os._exit(0)
    del lock
    other = os.fork()
    if not other:
        try:
            run_dir.Lock(tmp_path)
        except UserError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
    os.write(write, b"x")
    os.waitpid(child, 0)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_permissions_of_the_umask(mask: int, pictures: Path, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        train("train_diffusion.py", *common(pictures, tmp_path / "run", 1), "--ema.sigma-rel", "0.1")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes and {mode for mode in modes.values()} == {0o666 & ~mask}, modes


def test_flags_in_a_list_raise(tmp_path: Path) -> None:
    rng = random.Random(0)
    for case in range(60):
        flag = rng.choice(["--overwrite", f"--model.name={tmp_path}/evil.py", "-h", "--", "--help", "-1x", "--data=x"])
        items: list[object] = [rng.choice(["loss", "knn"]) for _ in range(rng.randint(0, 3))]
        items.insert(rng.randint(0, len(items)), rng.choice([flag, {flag: 1}, [flag], None]))
        recipe = tmp_path / f"{case}.yaml"
        name, leaf = rng.choice(SECTIONS)
        recipe.write_text(yaml.safe_dump({name: {leaf: items}}))
        with pytest.raises(UserError, match=f"{name}.{leaf} must be a list of plain values"):
            _parsed("--config", recipe)


@pytest.mark.parametrize("name", LAUNCH_ONLY)
def test_launch_settings_in_a_file_raise(name: str, trained: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: {'true' if name == 'overwrite' else 'x'}\n")
    with pytest.raises(UserError, match=f"{name} is taken from the command line only; remove it, and give --"):
        _parsed("--config", recipe)
    recipe.write_text(f"{name}: {'false' if name == 'overwrite' else 'null'}\n")  # as older runs have it
    _parsed("--config", recipe)
    assert name not in yaml.safe_load((trained / "config.yaml").read_text())


@pytest.mark.parametrize("kind", ["adapter", "model", "policy"])
def test_trust_ends_when_the_file_changes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.config import trusted_code

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    file = tmp_path / f"{kind} mine.py"
    for content in ("a = 1", "a = 2", "a = 1 "):
        file.write_text(content)
        with pytest.raises(UserError, match="read it, and if you trust it"):
            trusted_code.require_trust(str(file), f"--{kind}", "recipe.yaml")
        trusted_code.trust(str(file))
        trusted_code.require_trust(str(file), f"--{kind}", "recipe.yaml")
    file.write_text("a = 3")
    with pytest.raises(UserError, match="has changed since you named it"):
        trusted_code.require_trust(str(file), f"--{kind}", "recipe.yaml")
    monkeypatch.setenv("PRETRAIN_TRUST", str(file))
    trusted_code.require_trust(str(file), f"--{kind}", "recipe.yaml")


SECTIONS = [("evaluate", "metrics"), ("ema", "sigma_rel"), ("optim", "betas"), ("model", "channels")]
HUGE = ["--epochs", "--batch-size", "--seed", "--data.size", "--data.workers", "--evaluate.steps", "--evaluate.images"]
HUGE += ["--adapter.timesteps", "--model.channels", "--model.layers", "--checkpoint.every", "--evaluate.num-images"]


@pytest.mark.parametrize("flag", HUGE)
def test_numbers_that_are_too_large_raise(flag: str) -> None:
    rng = random.Random(flag)
    name = flag.removeprefix("--").replace("-", "_")
    largest = MAXIMA.get(name, 10**9)
    for number in [largest + 1, *(largest * 10 ** rng.randint(1, 30) for _ in range(3))]:
        message = refused("train_diffusion.py", flag, 4 * number, "--output-dir", "runs/x")
        assert f"{name} must be at most {largest:,}, got {4 * number}" in message


@pytest.mark.parametrize("place", ["evaluation.json", "checkpoint/manifest.json"])
def test_deeply_nested_json_is_one_sentence(place: str, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = storage.newest(run / "checkpoints")
    assert newest is not None
    for older in {*(run / "checkpoints").iterdir()} - {newest}:
        shutil.rmtree(older)
    (run / place.replace("checkpoint", str(newest))).write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(UserError) as refusal:
        export.main(run)
    assert "\n" not in str(refusal.value)


def test_files_of_file_managers_in_a_checkpoint_are_ignored(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = storage.newest(run / "checkpoints")
    assert newest is not None
    for name in (".DS_Store", "._model.safetensors", "Thumbs.db", "desktop.ini", ".nfs0001"):
        (newest / name).write_bytes(b"\0\1\2")
    assert load_run(run).state.values == json.loads((newest / "state.json").read_text())
    (newest / "more.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not in its manifest"):
        storage.load(newest)

"""Checkpoints on disk: complete or not used; errors of the disk cost only what could not be written."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint import async_writer, storage
from pretrain.checkpoint.run_dir import Lock
from pretrain.config.schema import Checkpoint
from pretrain.core.errors import UserError
from pretrain.training.metrics_log import MetricsLog


def state(step: int, seconds: float = 0.0) -> storage.State:
    tensors = {"model": {"a": torch.full((7,), float(step)), "b": torch.arange(3)}, "ema": {"a": torch.ones(2, 2)}}
    return storage.State(tensors, {"step": step, "seconds": seconds})


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-????????"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2, 3):
        storage.save(folder, step, state(step), keep=9)
    return folder


@contextmanager
def damaged(file: Path, content: bytes | None) -> Iterator[None]:
    """Within the context, the file has other content; None: there is no file."""
    before = file.read_bytes()
    try:
        file.unlink() if content is None else file.write_bytes(content)
        yield
    finally:
        file.write_bytes(before)


def test_a_checkpoint_is_saved_and_loaded(three: Path) -> None:
    found = storage.newest_whole(three)
    assert found is not None and found.path.name == "step-00000003" and not found.skipped
    assert found.state.values == {"step": 3, "seconds": 0.0}
    for file, tensors in state(3).tensors.items():
        assert all(torch.equal(value, found.state.tensors[file][name]) for name, value in tensors.items())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_truncated_or_missing_file_is_noticed(three: Path, data: st.DataObject) -> None:
    """In any file, including the manifest; the previous checkpoint is used instead, and the reason is reported."""
    newest = three / "step-00000003"
    file = data.draw(st.sampled_from(sorted(newest.iterdir())))
    good = file.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "gone", "longer"]))
    place = data.draw(st.integers(0, len(good) - 1))
    flipped = bytes([*good[:place], good[place] ^ 1 << data.draw(st.integers(0, 7)), *good[place + 1 :]])
    content = {"flip": flipped, "cut": good[:place], "gone": None, "longer": good + b"\n"}[kind]
    with damaged(file, content):
        found = storage.newest_whole(three)
        assert found is not None
        if file.name == "manifest.json" and found.path == newest:  # spaces, or a number that does not concern the files
            assert json.loads(good)["files"] == json.loads(file.read_text())["files"]
            return
        assert found.path.name == "step-00000002" and [*found.skipped] == [newest]
        if file.name != "manifest.json":
            assert file.name in found.skipped[newest]


@settings(max_examples=20, deadline=None)
@given(order=st.permutations([1, 2, 3, 4]), newest=st.integers(1, 3))
def test_a_checkpoint_under_the_name_of_another_step_is_not_used(order: list[int], newest: int, three: Path) -> None:
    """Checkpoints exchanged, copied and renamed: the newest one that has its own name is used, the reason reported."""
    with tempfile.TemporaryDirectory() as folder:
        names = {step: Path(folder) / f"step-{order[step - 1]:08d}" for step in range(1, newest + 1)}
        for step, path in names.items():
            shutil.copytree(three / f"step-{step:08d}", path)
        own = max((step for step, path in names.items() if path.name == f"step-{step:08d}"), default=None)
        if own is None:
            with pytest.raises(UserError, match=r"all \d checkpoints are damaged: .*it is the checkpoint of step"):
                storage.newest_whole(Path(folder))
            return
        found = storage.newest_whole(Path(folder))
        assert found is not None and found.path == names[own] and found.state.values["step"] == own
        assert {*found.skipped} == {path for path in names.values() if path.name > found.path.name}
        for step, path in names.items():
            said = found.skipped.get(path, f"it is the checkpoint of step {step} under the name of another one")
            assert said.startswith(f"it is the checkpoint of step {step} under")


def test_a_file_that_is_not_in_the_manifest_is_not_loaded(three: Path) -> None:
    extra = three / "step-00000003" / "more.safetensors"
    shutil.copy(three / "step-00000002" / "model.safetensors", extra)
    try:
        found = storage.newest_whole(three)
        assert found is not None and [*found.skipped.values()] == ["more.safetensors is not in its manifest"]
    finally:
        extra.unlink()


@pytest.mark.parametrize("name", ["../step-00000002/model.safetensors", "/etc/passwd", "a\x00b", ""])
def test_a_manifest_must_not_name_files_elsewhere(name: str, three: Path, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "step-00000003"
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["model.safetensors"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    found = storage.newest_whole(newest.parent)
    assert found is not None and found.path.name == "step-00000002" and "is missing" in found.skipped[newest]


def test_damaged_checkpoints_are_never_ignored_silently(three: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert storage.newest_whole(folder) is None
    shutil.copytree(three, folder)
    for path in folder.glob("*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"all 3 checkpoints are damaged: .*0 bytes, its manifest says"):
        storage.newest_whole(folder)


def test_kept_by_number_and_by_age(tmp_path: Path) -> None:
    for step in range(1, 13):
        storage.save(tmp_path, step, state(step, seconds=1200 * step), keep=2, hours=1)
    assert steps(tmp_path) == [1, 3, 6, 9, 11, 12]  # at 20 min, 1 h, 2 h, 3 h; and the newest two
    storage.save(tmp_path, 7, state(7, 8400), keep=1)
    assert steps(tmp_path) == [7]  # of another past


@pytest.mark.parametrize("keep", range(1, 8))
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    for step in range(1, 10):
        storage.save(tmp_path, step, state(step), keep=keep)
        assert steps(tmp_path) == [*range(max(1, step - keep + 1), step + 1)]


def test_a_kill_at_any_call_of_save_leaves_a_complete_checkpoint(tmp_path: Path, monkeypatch) -> None:
    """The previous checkpoint or the new one is complete, even if both are of the same step."""
    storage.save(tmp_path, 5, state(5), keep=1)
    for step in (5, 6):
        for calls in range(1, 40):
            left = [calls]

            def count(function, left=left):
                def call(*arguments, **more):
                    left[0] -= 1
                    if left[0] < 0:
                        raise KeyboardInterrupt  # `save` does not catch it, so it stands for a kill
                    return function(*arguments, **more)

                return call

            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", count(os.fsync))
                patch.setattr(Path, "rename", count(Path.rename))
                patch.setattr(storage, "save_file", count(storage.save_file))
                patch.setattr(shutil, "rmtree", count(shutil.rmtree))
                try:
                    storage.save(tmp_path, step, state(step), keep=1)
                except KeyboardInterrupt:
                    done = False
                else:
                    done = True
            found = storage.newest_whole(tmp_path)
            assert found is not None and found.state.values["step"] in (5, step)
            if done:
                break
        assert done and calls > 10
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes (EFBIG): a full disk, for one process and without a mount."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_can_not_flush_is_used_and_one_that_fails_is_not(
    number: int, tmp_path: Path, monkeypatch
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log._pending.append({"kind": "epoch"})
    if number == errno.EIO:
        with pytest.raises(OSError, match="step-00000001 can't be written: Input/output error"):
            storage.save(tmp_path, 1, state(1), keep=1)
        with pytest.raises(OSError, match=r"Input/output error: '.*metrics\.jsonl'"):
            log.flush()
        return
    storage.save(tmp_path, 1, state(1), keep=1)
    log.flush()
    assert storage.newest_whole(tmp_path) is not None and log.read("epoch")


@pytest.mark.parametrize(
    ("name", "value"),
    [("seconds", math.nan), ("seconds", math.inf), ("seconds", -1.0), ("progress", math.nan), ("step", -1)],
)
def test_a_state_with_impossible_numbers_is_refused(name: str, value: float, finished: Path) -> None:
    newest = storage.newest(finished / "checkpoints")
    assert newest is not None
    found = storage.FoundCheckpoint(newest, storage.load(newest), {})
    with storage.restoring(found):
        pass
    found.state.values[name] = value
    with pytest.raises(UserError, match=f"not the state of a run .*{name} is {value}"), storage.restoring(found):
        raise AssertionError


def test_a_full_disk_leaves_no_partial_checkpoint_and_keeps_the_old_ones(tmp_path: Path, monkeypatch) -> None:
    storage.save(tmp_path, 1, state(1), keep=1)
    with full_disk(100), pytest.raises(OSError, match=r"step-00000002 can't be written: .*File too large"):
        storage.save(tmp_path, 2, state(2), keep=1)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OSError, match=r"it needs 0\.0 MB, the disk has 0\.0 MB left"):
            storage.save(tmp_path, 2, state(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert storage.newest_whole(tmp_path) is not None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_failed_save_is_reported_and_training_continues(number: int, tmp_path: Path, monkeypatch) -> None:
    messages: list[str] = []
    work = async_writer.CheckpointWriter(tmp_path, Checkpoint(), None, messages.append)

    def broken(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage, "fsync", broken)
    work.save(1, state(1))
    with pytest.raises(UserError, match=f"{os.strerror(number)}; there is no earlier checkpoint"):
        work.wait()
    monkeypatch.undo()
    work.save(1, state(1))
    work.wait(required=True)
    monkeypatch.setattr(storage, "fsync", broken)
    work.save(2, state(2))
    work.wait()
    assert len(messages) == 1 and "the training continues, the last checkpoint is step-00000001" in messages[0]
    work.save(2, state(2))
    with pytest.raises(UserError, match=r"--resume continues from step-00000001"):
        work.wait(required=True)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # POSIX locks are held by processes
        held = Lock(folder)
        os.write(write, b"x")
        signal.pause()
        os._exit(held.handle)
    try:
        os.read(read, 1)
        with pytest.raises(UserError, match=rf"process {child} on .* is writing to it"):
            Lock(folder)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    Lock(folder)

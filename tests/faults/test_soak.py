"""A short soak; and it notices planted bugs."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from safetensors.torch import load_file

from pretrain.checkpoint import manifest, storage
from pretrain.training import loop
from tests.faults import soak
from tests.faults.trainers import PROGRAMS

pytestmark = pytest.mark.slow
DIFFUSION = "train_diffusion.py"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> soak.Soak:
    return soak.Soak(tmp_path_factory.mktemp("soak"), random.Random(5), processes=1)


def soaked(
    undisturbed: soak.Soak,
    faults: list[str],
    count: int,
    first: Callable[[], None] = soak.hung_workers_are_noticed,
    programs: list[str] | None = None,
) -> soak.Soak:
    """Run until there were this many faults."""
    undisturbed.first, undisturbed.programs = first, programs or [*PROGRAMS]
    undisturbed.counts.clear()
    undisturbed.log.write_text("")
    undisturbed.read = 0

    def goes_on() -> bool:
        return sum(undisturbed.counts[fault] for fault in faults) < count

    while goes_on():
        undisturbed.run(faults, goes_on)
    return undisturbed


def test_soak_with_all_kinds_of_faults(undisturbed: soak.Soak) -> None:
    counts = soaked(undisturbed, [*soak.FAULTS], 6).counts
    assert counts["runs to the end"] >= 1 and counts["checkpoints compared"] >= 1


def forgetful() -> None:
    """A resumed run whose parameters are slightly wrong, which no error reports."""
    restored = storage.load_parameters

    def load_parameters(model, tensors, path) -> None:
        restored(model, {name: value.clone() for name, value in tensors.items()}, path)
        next(model.parameters()).data.view(-1)[0] += 1e-6

    storage.load_parameters = load_parameters


def silent_stop() -> None:
    """Exit status 0 after a signal."""
    from pretrain.training import run

    run.EXIT_STOPPED = 0


def _after_a_resume(plant: Callable[[], None]) -> None:
    setup = loop.setup

    def planted(config, *arguments):
        if config.resume:
            plant()
        return setup(config, *arguments)

    loop.setup = planted


def dropout_not_seeded() -> None:
    """A resumed run whose dropout goes on with the random numbers of a new process."""
    _after_a_resume(lambda: setattr(loop, "torch", SimpleNamespace(manual_seed=lambda seed: None)))


def dropout_seeded_alike() -> None:
    """A resumed run whose dropout has the same seed at every step."""
    _after_a_resume(lambda: setattr(loop, "fold_seed", lambda *key: 0))


def sizes_only() -> None:
    """The files of a checkpoint are compared with the sizes in its manifest, not with the hashes."""
    verify, of_file = storage.verify, manifest.describe

    def verified(folder: Path) -> list[str]:
        manifest.describe = lambda file: (file.stat().st_size, mock.ANY)
        try:
            return verify(folder)
        finally:
            manifest.describe = of_file

    storage.verify = verified


PLANTS = [
    (forgetful, "killed", "differences"),
    (silent_stop, "signal", "differs|No such"),
    (dropout_not_seeded, "killed", "differences"),
    (dropout_seeded_alike, "killed", "differences"),
    (sizes_only, "killed", "differences"),
]


@pytest.mark.parametrize(
    ("first", "fault", "message"),
    [pytest.param(*plant, id=plant[0].__name__) for plant in PLANTS],
)
def test_the_soak_notices_a_broken_guarantee(
    first: Callable[[], None], fault: str, message: str, undisturbed: soak.Soak, monkeypatch: pytest.MonkeyPatch
) -> None:
    if first is sizes_only:  # of the damages of a soak, those that only this bug lets through
        monkeypatch.setattr(soak, "DAMAGES", {"value changed": soak.value_changed})
    programs = [DIFFUSION] if first in (dropout_not_seeded, dropout_seeded_alike) else None  # the one with dropout
    with pytest.raises((soak.Broken, FileNotFoundError), match=message):
        soaked(undisturbed, [fault], 30, first, programs)


def test_a_changed_value_is_seen_by_the_hash_alone(undisturbed: soak.Soak, tmp_path: Path) -> None:
    assert soak.DAMAGES["value changed"] is soak.value_changed
    chance = random.Random(0)
    for case in range(20):
        run = undisturbed.undisturbed[chance.choice([*PROGRAMS])]
        original = chance.choice(sorted((run / "checkpoints").glob("step-*[1-9]")))
        copy = shutil.copytree(original, tmp_path / f"{case}" / original.name)
        soak.value_changed(chance.choice(sorted(copy.iterdir())), chance)
        sizes = [{file.name: file.stat().st_size for file in folder.iterdir()} for folder in (original, copy)]
        assert sizes[0] == sizes[1]
        changed = []
        for file in original.glob("*.safetensors"):
            one, other = load_file(file), load_file(copy / file.name)
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert value.isfinite().all() == other[name].isfinite().all()
                changed += [name] * int((value.nan_to_num() != other[name].nan_to_num()).sum())
        assert len(changed) == 1
        with pytest.raises(manifest.Damaged, match="SHA-256"):
            manifest.verify(copy)


def test_a_checkpoint_is_damaged_once(undisturbed: soak.Soak, tmp_path: Path) -> None:
    """Also if the launch between two damages ended before it had noticed the first one."""
    run = shutil.copytree(undisturbed.undisturbed["train_mae.py"], tmp_path / "run")
    for _ in range(60):
        assert undisturbed.damage(run)
    steps = sorted((run / "checkpoints").glob("step-????????"))
    assert [step for step in steps if not _whole(step)] == steps[-1:]
    assert not undisturbed.damage(tmp_path)


def _whole(checkpoint: Path) -> bool:
    try:
        return bool(manifest.verify(checkpoint))
    except manifest.Damaged:
        return False


def test_the_soak_notices_a_partial_file(undisturbed: soak.Soak, tmp_path: Path) -> None:
    program = "train_mae.py"
    shutil.copytree(undisturbed.undisturbed[program], tmp_path / "run")
    undisturbed.compare(program, tmp_path / "run", whole=True)
    (tmp_path / "run" / "pictures" / "x.png.part").touch()
    with pytest.raises(soak.Broken, match="left behind"):
        undisturbed.compare(program, tmp_path / "run", whole=True)

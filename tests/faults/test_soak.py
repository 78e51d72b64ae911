"""A short soak; and it notices planted bugs."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoint import storage
from tests.faults import soak
from tests.faults.trainers import impatient


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> soak.Soak:
    return soak.Soak(tmp_path_factory.mktemp("soak"), random.Random(5), processes=1)


def soaked(undisturbed: soak.Soak, faults: list[str], count: int, first: Callable[[], None] = impatient) -> soak.Soak:
    """Run until there were this many faults."""
    undisturbed.first = first
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
    impatient()
    restored = storage.load_parameters

    def load_parameters(model, tensors, path) -> None:
        restored(model, {name: value.clone() for name, value in tensors.items()}, path)
        next(model.parameters()).data.view(-1)[0] += 1e-6

    storage.load_parameters = load_parameters


def silent_stop() -> None:
    """Exit status 0 after a signal."""
    from pretrain.training import run

    impatient()
    run.EXIT_STOPPED = 0


@pytest.mark.parametrize(
    ("first", "fault", "message"), [(forgetful, "killed", "differences"), (silent_stop, "signal", "differs|No such")]
)
def test_the_soak_notices_a_broken_guarantee(first, fault: str, message: str, undisturbed: soak.Soak) -> None:
    with pytest.raises((soak.Broken, FileNotFoundError), match=message):
        soaked(undisturbed, [fault], 30, first)


def test_the_soak_notices_a_partial_file(undisturbed: soak.Soak, tmp_path: Path) -> None:
    program = "train_mae.py"
    shutil.copytree(undisturbed.undisturbed[program], tmp_path / "run")
    undisturbed.compare(program, tmp_path / "run", whole=True)
    (tmp_path / "run" / "pictures" / "x.png.part").touch()
    with pytest.raises(soak.Broken, match="left behind"):
        undisturbed.compare(program, tmp_path / "run", whole=True)

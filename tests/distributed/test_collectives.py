"""n processes are equivalent to one (law 6), with real processes."""

from pathlib import Path

import pytest
import rank_worker
import torch
from safetensors.torch import load_file

from tests.faults.trainers import CONTEXT


def run(folder: Path, world: int, micro: int, state: str = "") -> list[list[list[int]]]:
    """Steps by rank."""
    folder.mkdir()
    workers = [
        CONTEXT.Process(target=rank_worker.main, args=(rank, world, folder, micro, state)) for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    statuses = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert statuses == [0] * world
    return [
        [[int(word) for word in line.split()] for line in (folder / f"{rank}.txt").read_text().split("\n")]
        for rank in range(world)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, list[list[int]]]:
    folder = tmp_path_factory.mktemp("ranks") / "alone"
    return folder, run(folder, 1, 24)[0]


@pytest.mark.parametrize(("world", "micro"), [(1, 6), (2, 12), (2, 3), (3, 8), (3, 2)])
def test_several_processes_are_one(world: int, micro: int, alone: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    """The same samples a step, equal scores on all ranks, the same parameters; accumulated, with a partial window."""
    folder, steps = alone
    dealt = run(tmp_path / "several", world, micro)
    assert len({len(part) for part in dealt}) == 1
    assert len(dealt[0]) == len(steps)
    for number, step in enumerate(steps):
        assert sorted(index for part in dealt for index in part[number]) == sorted(step)
    one = load_file(folder / "0.safetensors")
    for rank in range(world):
        other = load_file(tmp_path / "several" / f"{rank}.safetensors")
        assert torch.equal(other["score"], load_file(tmp_path / "several" / "0.safetensors")["score"])
        torch.testing.assert_close(other["score"], one["score"], rtol=1e-6, atol=1e-6)
        for name in one.keys() - {"score"}:
            distance = (one[name] - other[name]).norm() / one[name].norm()
            assert distance < 1e-6, name


@pytest.mark.parametrize("world", [2, 3])
def test_a_state_is_resumed_on_another_number_of_processes(world: int, alone, tmp_path: Path) -> None:
    """The rest of the epoch uses the same samples, step by step."""
    folder, steps = alone
    dealt = run(tmp_path / "several", world, 24 // world, str(folder / "state"))
    rest = steps[int(load_file(folder / "state.safetensors")["steps"]) :]
    ends = (
        next(number for number, step in enumerate(rest) if len(step) < 24) + 1
    )  # the next epoch depends on the losses
    assert len(rest) > ends > 1
    for number in range(ends):
        assert sorted(index for part in dealt for index in part[number]) == sorted(rest[number])

"""Processes of one launch must have the same settings, code and data."""

import random
import shutil
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed
from PIL import Image
from programs import common

from pretrain.core.errors import UserError
from pretrain.distributed.agreement import SHOWN, require_same_data, require_same_settings
from tests.faults.trainers import CONTEXT, Trainers

CASES = 40
NAMES = ("seed", "epochs", "batch_size", "optim.lr", "pruning.policy", "prediction", "output_dir", "data.source")


def _settings(case: int, rank: int, folder: Path) -> tuple[dict[str, object], set[str]]:
    """Random settings of a rank, and the names that differ between the two ranks."""
    rng = random.Random(case)
    settings: dict[str, object] = {name: rng.choice([1, 0.5, "x", None, (1, 2), folder / "a"]) for name in NAMES}
    settings["code"] = str(folder / f"{case}-{rank}.py" if case % 5 == 0 else folder / f"{case}.py")
    part = folder / f"{case}-{rank}.part"  # the other rank may read the file meanwhile
    part.write_text(f"# {case}")
    part.rename(str(settings["code"]))  # the same code in both, unless the paths differ
    differing = {*rng.sample(NAMES, rng.choice([0, 1, 2, 5]))}
    if rank:
        settings |= {name: ("other", name) for name in differing}
    return settings, differing | ({"code"} if case % 5 == 0 else set())


def _compare(rank: int, folder: Path, results: Connection) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    results_here: list[object] = []
    for case in range(CASES):
        try:
            require_same_settings(_settings(case, rank, folder)[0])
            results_here.append("")
        except UserError as error:
            results_here.append(str(error))
    for case in range(CASES):
        rng = torch.Generator().manual_seed(case)
        hashes = torch.randint(-(2**31), 2**31, (17,), generator=rng).int()
        if rank and case % 3:
            hashes[case % 17] += 1
        try:
            results_here.append(require_same_data("x", hashes if case % 4 or not rank else hashes[1:]))
        except UserError as error:
            results_here.append(str(error))
    results.send(results_here)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_differing_settings_and_data_are_named_on_both_ranks(tmp_path: Path) -> None:
    ends = [CONTEXT.Pipe() for _ in range(2)]
    workers = [CONTEXT.Process(target=_compare, args=(rank, tmp_path, ends[rank][1])) for rank in range(2)]
    for worker in workers:
        worker.start()
    assert ends[0][0].poll(120) and ends[1][0].poll(120)
    one, other = ends[0][0].recv(), ends[1][0].recv()
    for worker in workers:
        worker.join(30)
    assert one == other
    for case in range(CASES):
        differing = sorted(f"{name} is" for name in _settings(case, 0, tmp_path)[1])
        assert bool(one[case]) == bool(differing), case
        assert all(name in one[case] for name in differing[:SHOWN])
    for case in range(CASES):
        found = one[CASES + case]
        assert (
            "17 training images on rank 0 and 16 on rank 1" in found
            if case % 4 == 0
            else (found == (case % 17 if case % 3 else None))
        )


@pytest.mark.parametrize("what", ["--output-dir", "--adapter.prediction", "data"])
def test_a_launch_of_processes_that_differ_is_refused(what: str, pictures: Path, tmp_path: Path) -> None:
    """Nothing is trained or written, and no process waits for another."""
    words = common(pictures, tmp_path / "run", 2)
    each: list[list[object]] = [[], []]
    if what.startswith("--"):
        each[1] = [
            what,
            {"--epochs": 3, "--output-dir": tmp_path / "other", "--adapter.prediction": "v_prediction"}[what],
        ]
    else:
        shutil.copytree(pictures, tmp_path / "data")
        image = sorted((tmp_path / "data").rglob("*.png"))[5]
        if what == "data":
            Image.new("L", (12, 12), 7).save(image)
        else:
            image.unlink()
        each[1] = ["--data", tmp_path / "data"]
    with Trainers("train_diffusion.py", words, tmp_path / "out.txt", processes=2, each=each) as trainers:
        assert trainers.wait() == [2, 2], (tmp_path / "out.txt").read_text()
    output = (tmp_path / "out.txt").read_text()
    assert output.count("error: ") == 1 and "Traceback" not in output
    assert what in output or "--data" in output
    assert not (tmp_path / "run").exists() and not (tmp_path / "other").exists()

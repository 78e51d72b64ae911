"""The cost of InfoBatch itself: planning an epoch, a step, the end of an epoch, checkpoints, memory.

    python benchmarks/planning.py                     # 1.28 and 100 million samples, about 5 minutes
    python benchmarks/planning.py --sizes 1280000     # a minute
    python benchmarks/planning.py --sizes 10000 1000000 100000000 --processes 1 2 4    # how the cost grows

The predecessor is the published package (github.com/NUS-HPC-AI-Lab/InfoBatch), unchanged, if `import infobatch` finds
it. Each row is measured in processes of its own, for their peak memory; of several, connected by gloo, the numbers are
the largest of any process. Planning is the median of several calls; a step is a mean, with the accelerator's work
included. On a shared machine compare only within one call of this program.
"""

import importlib.util
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from pretrain import InfoBatch

BATCH = 256
COLUMNS = {  # of the tables: key of the numbers, and factor to the unit; docs of `main` define them
    "plan, s": ("planning", 1),
    "index, us": ("visit", 1e6),
    "step, us": ("step", 1e6),
    "mean, us": ("mean", 1e6),
    "close, s": ("closing", 1),
    "save, s": ("save", 1),
    "load, s": ("load", 1),
    "peak, GB": ("peak", 1),
    "before, GB": ("base", 1),
    "device, GB": ("device", 1),
    "lasting, B each": ("bytes", 1),
    "state, B each": ("state", 1),
}
OURS = {"infobatch": {}, "quantile": {}, "importance": {"budget": 0.7}}


def median_seconds(call: Callable[[], object], times: int) -> float:
    """Median seconds of a call; a first call is not counted."""
    seconds = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def peak_gigabytes() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def mean_seconds(call: Callable[[], object], times: int, device: str) -> float:
    """Mean seconds of a call with the accelerator's work; a first call is not counted."""
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - begun) / times


def measure_ours(policy: str, size: int, device: str) -> dict[str, float]:
    """All numbers of a policy, by the keys of `main`'s JSON; the losses of the first epoch are random numbers.

    Args:
        policy: a key of `OURS`.
        size: samples in the data set.
        device: of the losses.
    """
    before = peak_gigabytes()
    infobatch = InfoBatch(size, epochs=8, policy=policy, **OURS[policy])
    epochs = infobatch.epochs()
    next(epochs)
    infobatch.losses.loss[:-1].exponential_(generator=torch.Generator().manual_seed(0))
    infobatch.seen = infobatch.length
    begun = time.perf_counter()
    infobatch._close()
    closing = time.perf_counter() - begun

    def plan() -> None:
        infobatch._plan = None  # as between epochs, where the old plan is freed before the new one is made
        infobatch._draw()

    planning = median_seconds(plan, 5)
    peak = peak_gigabytes()
    selected = infobatch.plan.selected
    lasting = infobatch.score.nbytes + infobatch.losses.loss.nbytes + (0 if selected is None else selected.nbytes)
    state = sum(v.nbytes for v in infobatch.state_dict().values() if isinstance(v, torch.Tensor))
    sampler = iter(infobatch)
    begun = time.perf_counter()
    indices = [next(sampler) for _ in range(min(1 << 18, len(infobatch)))]
    per_index = (time.perf_counter() - begun) / len(indices)
    batches = iter(torch.tensor(indices[: len(indices) // BATCH * BATCH]).split(BATCH))
    loss = torch.rand(BATCH, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    step = mean_seconds(lambda: infobatch(loss, next(batches)), min(400, len(indices) // BATCH - 1), device)
    return {
        "planning": planning,
        "visit": per_index,
        "step": step,
        "mean": mean_seconds(loss.mean, 400, device),
        "device": 0 if device == "cpu" else torch.accelerator.max_memory_allocated() / 1e9,
        "closing": closing,
        "peak": peak,
        "base": before,
        "bytes": lasting / size,
        "state": state / size,
        **checkpoint_seconds(infobatch),
    }


def checkpoint_seconds(infobatch: InfoBatch) -> dict[str, float]:
    """Seconds to write the state of an InfoBatch to a file, and to read and load it, in the middle of an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.safetensors"
        begun = time.perf_counter()
        state = infobatch.state_dict()
        save_file({name: value for name, value in state.items() if isinstance(value, torch.Tensor)}, file)
        saved = time.perf_counter()
        infobatch.load_state_dict({**state, **load_file(file)})
        return {"save": saved - begun, "load": time.perf_counter() - saved}


def measure_predecessor(_: str, size: int, device: str) -> dict[str, float]:
    """The same for the published package, without what it does not have."""
    from infobatch import InfoBatch  # pyright: ignore[reportMissingImports]

    before = peak_gigabytes()
    data = InfoBatch(range(size), 8)  # pyright: ignore[reportArgumentType]
    data.scores.exponential_(generator=torch.Generator().manual_seed(0))
    order: list[int] = []

    def plan() -> None:
        order[:] = []
        order[:] = data.prune()

    planning = median_seconds(plan, 1 if size > 5e6 else 5)
    peak = peak_gigabytes()
    loss = torch.rand(BATCH, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    batches = iter(torch.tensor(order[: 500 * BATCH]).split(BATCH))

    def step() -> None:
        data.set_active_indices(next(batches))
        data.update(loss * 1)  # a copy, because it multiplies its argument in place

    lasting = data.scores.nbytes + data.weights.nbytes + len(order) * (8 + sys.getsizeof(1 << 20))
    return {
        "planning": planning,
        "step": mean_seconds(step, 400, device),
        "mean": mean_seconds(loss.mean, 400, device),
        "peak": peak,
        "base": before,
        "bytes": lasting / size,
    }


def child(name: str, size: int, device: str, processes: int, threads: int) -> dict[str, float]:
    """The numbers of a policy, or of "predecessor", measured in processes of their own: the largest of any process.

    Raises:
        SystemExit: a process failed.
    """
    command = [sys.executable, __file__, "--one", name, "--sizes", str(size), "--device", device]
    command += ["--threads", str(max(1, threads // processes))]
    with tempfile.TemporaryDirectory() as folder:
        shared = {"PLANNING_STORE": f"{folder}/store", "WORLD_SIZE": str(processes)} if processes > 1 else {}
        jobs = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        outputs = [job.communicate() for job in jobs]
    for job, (_, errors) in zip(jobs, outputs, strict=True):
        if job.returncode == -signal.SIGKILL:
            cause = "a process was killed, probably for lack of memory: choose fewer --sizes or --processes"
            raise SystemExit(f"{name} with {size:,} samples: {cause}")
        if job.returncode:
            raise SystemExit(errors)
    found = [json.loads(text.splitlines()[-1]) for text, _ in outputs]
    return {key: max(numbers[key] for numbers in found) for key in found[0]}


def main(
    sizes: tuple[int, ...] = (1_280_000, 100_000_000),
    processes: tuple[int, ...] = (1,),
    one: str | None = None,
    threads: int = 2,
    device: str = "cpu",
    output: Path | None = None,
) -> None:
    """Measure and print tables.

    Columns: plan an epoch; next index of the sampler; a step, beside the mean of a batch's losses; close an epoch; save
    and load the state in an epoch; peak memory of a process, and before InfoBatch was made; memory of the device; bytes
    per sample that last through an epoch, and of the state in a checkpoint.

    Args:
        sizes: numbers of samples in the data set.
        processes: numbers of processes of the launch, which share the threads.
        one: measure only this policy, or "predecessor", and print its numbers as JSON.
        threads: of torch.
        device: of the losses, and so of the tensors that a step reads and writes: cpu or cuda.
        output: JSON file to write the numbers to.
    """
    torch.set_num_threads(threads)
    if one is not None:
        if store := os.environ.get("PLANNING_STORE"):
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        measure = measure_predecessor if one == "predecessor" else measure_ours
        sys.stdout.write(json.dumps(measure(one, sizes[0], device)) + "\n")
        return
    console = Console(width=150, highlight=False)
    listed = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    processor = next((line.split(": ")[1] for line in listed.splitlines() if "model name" in line), platform.machine())
    console.print(
        f"{processor.strip()}, {threads} threads, torch {torch.__version__}, numpy {np.__version__}, "
        f"Python {platform.python_version()}; batch {BATCH}"
    )
    names = [*OURS, *(["predecessor"] if importlib.util.find_spec("infobatch") else [])]
    if "predecessor" not in names:
        console.print("the predecessor is not installed; add a copy of it to PYTHONPATH to compare")
    numbers: dict[str, dict[str, float]] = {}
    for size in sizes:
        table = Table(title=f"{size:,} samples", padding=(0, 0))
        for head in ("policy", "processes", *COLUMNS):
            table.add_column(head, justify="right")
        for name, world in [(name, world) for name in names for world in processes]:
            if name == "predecessor" and world > 1:
                continue
            if name == "predecessor" and size > 2e7:
                table.add_row(name, "not run: it needs a list of Python integers, 40 bytes per sample")
                continue
            found = child(name, size, device, world, threads)
            numbers[f"{name} {size}" + (f" {world} processes" if world > 1 else "")] = found
            values = [f"{scale * found[key]:.3g}" if key in found else "" for key, scale in COLUMNS.values()]
            table.add_row(name, str(world), *values)
        console.print(table)
        if output is not None:
            output.write_text(json.dumps({"device": device, "torch": torch.__version__, **numbers}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

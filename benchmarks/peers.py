"""Compare training programs by speed: ours, a bare loop, and other projects', on the same network, images and batches.

    python benchmarks/peers.py --output-dir runs/peers
    python benchmarks/peers.py --output-dir runs/peers --diffusers PATH --mae PATH --transformers PATH

PATH are checkouts of huggingface/diffusers, facebookresearch/mae and huggingface/transformers; a project without one is
left out. Each run is a process of its own (peer_arms.py), and the programs take turns. A run that has a record is not
repeated. benchmarks/README.md explains the table.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import psutil
import torch
import tyro
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # the programs and the package of this checkout

from compare import machine, save
from peer_arms import Spec
from peer_inputs import Network, prepare, write_images
from proof import markdown

from pretrain.core.errors import UserError, exit_on_user_error
from pretrain.training.flops import peak_flops

CUDA = torch.cuda.is_available()
TITLES = {"unet": "UNet, noise prediction", "dit": "DiT, noise prediction", "mae": "ViT, masked autoencoder"}
PROJECTS = {"unet": ("diffusers",), "dit": (), "mae": ("mae", "transformers")}  # by network
SCRIPTS = {
    "diffusers": "examples/unconditional_image_generation/train_unconditional.py",
    "mae": "engine_pretrain.py",
    "transformers": "examples/pytorch/image-pretraining/run_mae.py",
}
MEMORY_INTERVAL = 0.25  # seconds between measurements of the memory of a run's processes
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Compare training programs by speed.

    Attributes:
        output_dir: folder for images, records, logs and table.
        data: images, as `--data` of our programs; they are brought to RGB.
        networks: to train.
        size: of the networks; default: large on a GPU, else small.
        batch_size: images per step; default: 256 on a GPU, else 64.
        warmup: steps before the timed ones.
        steps: number of timed steps.
        repetitions: of each program.
        threads: of each program (OMP_NUM_THREADS).
        workers: of the data loader of each program that has one.
        compile: also compile the network, in our program and in the bare loop; default: on a GPU.
        diffusers: checkout of huggingface/diffusers; default: left out.
        mae: checkout of facebookresearch/mae; default: left out.
        transformers: checkout of huggingface/transformers; default: left out.
    """

    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    data: str = "fashion-mnist"
    networks: tuple[Literal["unet", "dit", "mae"], ...] = ("unet", "dit", "mae")
    size: Literal["small", "large"] = "large" if CUDA else "small"
    batch_size: int = 256 if CUDA else 64
    warmup: int = 10
    steps: int = 50
    repetitions: int = 5
    threads: int = 1
    workers: int = 0
    compile: bool = CUDA
    diffusers: Path | None = None
    mae: Path | None = None
    transformers: Path | None = None

    def check(self) -> None:
        """Check numbers and checkouts.

        Raises:
            UserError: a number is too small, or a checkout lacks its script.
        """
        smallest = {"batch_size": 1, "warmup": 2, "steps": 1, "repetitions": 1, "threads": 1, "workers": 0}
        for name, least in smallest.items():
            if (value := getattr(self, name)) < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least {least}; give a larger one")
        for project, script in SCRIPTS.items():
            path = getattr(self, project)
            if path is not None and not (path / script).is_file():
                raise UserError(f"--{project} {path}: it has no {script}; name a checkout of the project")

    @property
    def measured(self) -> dict[str, Any]:
        """The settings that all records of a folder have in common."""
        names = ("data", "size", "batch_size", "warmup", "steps", "threads", "workers")
        return {name: getattr(self, name) for name in names}


class Arm(NamedTuple):
    """A program with its settings.

    Attributes:
        name: in the table.
        kind: a name in `peer_arms.KINDS`.
        compiled: whether the network is compiled.
        infobatch: whether it is our program with --infobatch.
    """

    name: str
    kind: str
    compiled: bool = False
    infobatch: bool = False


def arms_of(settings: Settings, network: str) -> Iterator[Arm]:
    """The arms that train a network."""
    for compiled in (False, True) if settings.compile else (False,):
        suffix = ", compiled" * compiled
        yield Arm(f"bare loop{suffix}", "bare", compiled)
        yield Arm(f"this project{suffix}", "ours", compiled)
        yield Arm(f"this project, --infobatch{suffix}", "ours", compiled, infobatch=True)
    for project in PROJECTS[network]:
        if getattr(settings, project) is not None:
            yield Arm("facebookresearch/mae" if project == "mae" else project, project)


def left_out(settings: Settings) -> Iterator[str]:
    """A message for each project that has no checkout and trains one of the networks."""
    for project in (project for network in settings.networks for project in PROJECTS[network]):
        if getattr(settings, project) is None:
            yield f"{project} is left out; to compare with it, give --{project} and a checkout with {SCRIPTS[project]}"


def spec_of(settings: Settings, network: str, trained: Network, arm: Arm, name: str) -> Spec:
    """What the process of a run executes; `name` is the run's."""
    # Our program is timed from the end of its first epoch on, so that planning an epoch is a part of the timed steps;
    # with InfoBatch later, as torch.compile compiles again when the last batch of an epoch has another size.
    epoch = settings.warmup + settings.steps
    first = settings.warmup if arm.kind != "ours" else 2 * epoch if arm.infobatch else epoch
    checkout = getattr(settings, arm.kind, None)
    return Spec(
        kind=arm.kind,
        mae=network == "mae",
        flags=[*trained.flags, *["--infobatch"] * arm.infobatch],
        data=str((settings.output_dir / "data").absolute()),
        shape=trained.shape,
        folder=str((settings.output_dir / "runs" / name).absolute()),
        record=str((settings.output_dir / "runs" / f"{name}.json").absolute()),
        batch=settings.batch_size,
        first=first,
        steps=settings.steps,
        bf16=CUDA,
        compiled=arm.compiled,
        workers=settings.workers,
        checkout=checkout and str(checkout.absolute()),
        sizes=trained.sizes,
    )


def execute(command: Sequence[str], log: Path, environment: dict[str, str]) -> tuple[int, int]:
    """Run a command with the time as its last argument; none of its processes outlives it.

    Returns:
        Its exit status, and the largest memory (RSS) of its processes together, in bytes.
    """
    peak = 0
    with log.open("w") as file:
        line = [*command, repr(time.time())]
        process = psutil.Popen(line, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT)
        tree = [process]
        try:
            while True:
                try:
                    return process.wait(MEMORY_INTERVAL), peak
                except psutil.TimeoutExpired:
                    with suppress(psutil.NoSuchProcess):
                        tree = [process, *process.children(recursive=True)]
                        peak = max(peak, sum(each.memory_info().rss for each in tree))
        finally:
            for each in tree:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()


def run(settings: Settings, network: str, trained: Network, arm: Arm, repetition: int) -> str | None:
    """Make a run and write its record; returns why there is none, or None."""
    folder = settings.output_dir
    name = run_name(network, arm, repetition)
    spec = spec_of(settings, network, trained, arm, name)
    spec.write(folder / "runs" / f"{name}.spec.json")
    threads = {name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    cache = {"HF_HOME": str((folder / "cache").absolute()), "HF_HUB_OFFLINE": "1"}
    script = str(Path(__file__).with_name("peer_arms.py"))
    command = [sys.executable, script, str(folder / "runs" / f"{name}.spec.json")]
    Path(spec.record).unlink(missing_ok=True)
    load, log = os.getloadavg()[0], folder / "logs" / f"{name}.txt"
    status, peak = execute(command, log, threads | cache)
    shutil.rmtree(spec.folder, ignore_errors=True)
    if status or not Path(spec.record).exists():
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        return f"{network}, {arm.name}: it ended with status {status}: {last} ({log})"
    record = json.loads(Path(spec.record).read_text())
    speed, device_bytes = record["images"] / record["seconds"], record.pop("device_bytes")
    most = peak_flops(torch.cuda.get_device_name(), "bf16") if CUDA else None
    record |= {
        "network": network,
        "arm": arm.name,
        "compiled": arm.compiled,
        "repetition": repetition,
        "memory_bytes": device_bytes if CUDA else peak,
        "mfu": most and trained.flops * speed / most,
        "parameters": trained.parameters,
        "flops": trained.flops,
        "settings": settings.measured,
        "load_when_started": load,
        "torch": torch.__version__,
        "machine": machine(),
    }
    save(record, folder / "records" / f"{name}.json")
    return None


def run_name(network: str, arm: Arm, repetition: int) -> str:
    """The name of a run's files."""
    return "-".join("".join(c if c.isalnum() else " " for c in f"{network} {arm.name} {repetition}").split())


MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "images/s": lambda record: record["images"] / record["seconds"],
    "CPU ms per image": lambda record: 1000 * record["cpu_seconds"] / record["images"],
    "start-up, s": lambda record: record["startup_seconds"],
    "peak memory, MiB": lambda record: record["memory_bytes"] / MIB,
}


def spread(values: Sequence[float]) -> str:
    """Median [minimum, maximum], with three significant digits."""
    middle, low, high = (
        f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")
        for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} [{low}, {high}]"


def ratios(records: Sequence[dict[str, Any]], bare: Sequence[dict[str, Any]], measure: str) -> list[float]:
    """A measure of an arm relative to that of the bare loop in the same repetition."""
    of, base = MEASURES[measure], {record["repetition"]: record for record in bare}
    return [of(record) / of(base[record["repetition"]]) for record in records if record["repetition"] in base]


def table(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table per network, the arms in the order of their first record.

    Args:
        records: of all runs.
    """
    parts = []
    for network in TITLES:
        found = [record for record in records if record["network"] == network]
        if not found:
            continue
        has_mfu = any(record["mfu"] for record in found)
        rows = []
        for arm in dict.fromkeys(record["arm"] for record in found):
            own = [record for record in found if record["arm"] == arm]
            name = "bare loop" + ", compiled" * own[0]["compiled"]
            bare = [record for record in found if record["arm"] == name]
            row = [arm, str(len(own))]
            for measure, of in MEASURES.items():
                relative = ratios(own, bare, measure)
                row += [spread([*map(of, own)]), spread(relative) if relative and arm != name else ""]
            if has_mfu:
                row.append(spread([100 * record["mfu"] for record in own if record["mfu"]] or [0.0]))
            rows.append(row)
        head = ["program", "runs", *(column for measure in MEASURES for column in (measure, "ratio"))]
        first = found[0]
        about = f"{first['parameters'] / 1e6:.2f} M parameters, {first['flops'] / 1e6:,.0f} MFLOP per image"
        made = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in first["settings"].items())
        title = f"## {TITLES[network]}\n\n{about}; {made}; {first['machine']}, torch {first['torch']}\n\n"
        parts.append(title + markdown(head + ["MFU, %"] * has_mfu, rows))
    return "\n".join(parts)


def order_of(record: dict[str, Any]) -> tuple[bool, int, str]:
    """Sort key: not compiled, then compiled; the bare loop, this project, then other projects."""
    arm = record["arm"]
    rank = 0 if arm.startswith("bare") else 3 if not arm.startswith("this") else 2 if "--infobatch" in arm else 1
    return record["compiled"], rank, arm


def read_records(settings: Settings) -> list[dict[str, Any]]:
    """The records of the output folder.

    Raises:
        UserError: they were made with other settings.
    """
    records = [json.loads(path.read_text()) for path in sorted((settings.output_dir / "records").glob("*.json"))]
    for record in records:
        for name, value in record["settings"].items():
            if value != settings.measured[name]:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{flag} {settings.measured[name]}: the records in {settings.output_dir} have {value}; give the "
                    "same, or another --output-dir"
                )
    return sorted(records, key=order_of)


def write_table(settings: Settings) -> str:
    """Write the table of all records to the output folder, and return it."""
    text = table(read_records(settings))
    (settings.output_dir / "table.md").write_text(text)
    return text


def main(settings: Settings) -> None:
    """Make the runs that are missing, in turns, and write the table.

    Args:
        settings: the command line.

    Raises:
        SystemExit: with status 1 if a program did not run.
    """
    console = Console(soft_wrap=True, highlight=False)
    settings.check()
    read_records(settings)
    folder = settings.output_dir
    for name in ("records", "runs", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for message in left_out(settings):
        console.print(message, markup=False)
    shape = write_images(folder / "data", settings.data, settings.batch_size * (settings.warmup + settings.steps))
    options = (settings.size, shape, settings.batch_size, settings.workers, CUDA)
    networks = {name: prepare(folder / "data", name, *options) for name in settings.networks}
    failed: dict[tuple[str, str], str] = {}
    for repetition in range(settings.repetitions):
        for network, trained in networks.items():
            arms = [*arms_of(settings, network)]
            turn = repetition % len(arms)
            for arm in arms[turn:] + arms[:turn]:
                done = (folder / "records" / f"{run_name(network, arm, repetition)}.json").exists()
                if done or (network, arm.name) in failed:
                    continue
                console.print(f"repetition {repetition + 1} of {settings.repetitions}: {network}, {arm.name}")
                if problem := run(settings, network, trained, arm, repetition):
                    failed[network, arm.name] = problem
                    console.print(problem, markup=False)
                write_table(settings)
    console.print(write_table(settings), markup=False)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(Settings, description=__doc__))

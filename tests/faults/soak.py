"""Real trainers under random faults, and their results compared with those of undisturbed runs.

    python -m tests.faults.soak --minutes 30
    python -m tests.faults.soak --kills 100 --processes 2 --seed 7

Both programs are trained on a few small images, some of them broken, first once undisturbed. Then a run is started
again and again: a fault is injected at a random step, or its files are damaged between launches, and it is resumed,
with or without loader workers, until it is done. After each fault the newest complete checkpoint must be, bit for bit,
the undisturbed run's of the same step; at the end all files must be. No process may end with a traceback, hang, or
leave a process or a partial file behind. What is compared does not depend on the speed of the machine.
"""

import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from pretrain.checkpoint import storage
from pretrain.checkpoint.verify_resume import differences
from pretrain.config.tyro_parser import run_command
from pretrain.core.errors import UserError
from pretrain.data import loader
from tests.conftest import PRUNED, draw_images, read_metrics
from tests.faults.trainers import HANGS, PROGRAMS, Trainers, keeping_nothing

STARTING = 0.25  # share of the faults that come before the launch's first step
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Broken(Exception):
    """A guarantee does not hold."""


def settings(program: str, images: Path, folder: Path) -> list[object]:
    """Everything that has a state: micro-batches, several EMAs, evaluations, pruning of both kinds, dropout."""
    policy = PRUNED if program == "train_mae.py" else ("--infobatch", "--model.dropout", 0.2)
    words = ["--data", images, "--output-dir", folder, "--on-bad-image", "skip", "--batch-size", 12, "--micro-batch", 6]
    words += ["--epochs", 8, "--evaluate.every", 3, "--ema.sigma-rel", 0.1, "--ema.snapshots", 5]
    return [*words, *policy, "--checkpoint.every", 1]


def hung_workers_are_noticed() -> None:
    """A worker that is killed while it sends a batch is waited for until this timeout."""
    loader.BATCH_TIMEOUT = 60.0


# Faults of a launch: each function injects one and returns the exit statuses that may follow.
# A process that gets a signal before it has installed its handler ends by the signal itself.
Statuses = set[int]


def kill(trainers: Trainers, rank: int, chance: random.Random) -> Statuses:
    trainers.send(signal.SIGKILL, rank)
    return {-signal.SIGKILL}


def stop_signal(trainers: Trainers, rank: int, chance: random.Random) -> Statuses:
    number = chance.choice(SIGNALS)
    trainers.send(number, rank)
    return {75, 130, -number}


def two_signals(trainers: Trainers, rank: int, chance: random.Random) -> Statuses:
    """The second signal comes while the step or the save after the first one is running."""
    allowed = stop_signal(trainers, rank, chance)
    time.sleep(chance.uniform(0, 2))
    return allowed | stop_signal(trainers, rank, chance)


def worker_killed(trainers: Trainers, rank: int, chance: random.Random) -> Statuses:
    for worker in trainers.workers(rank):
        worker.kill()
    return set()


def disk_full(trainers: Trainers, rank: int, chance: random.Random) -> Statuses:
    """For a while no file may grow beyond some bytes: manifests fit, networks do not."""
    process = trainers.processes[rank]
    everything = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    try:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (chance.choice([0, 500, 20_000]), everything[1]))
        time.sleep(chance.uniform(0, 1))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, everything)
    except ProcessLookupError:
        pass  # it is done
    return {2}


FAULTS: dict[str, Callable[[Trainers, int, random.Random], Statuses]] = {
    "killed": kill,
    "signal": stop_signal,
    "two signals": two_signals,
    "worker killed": worker_killed,
    "disk full": disk_full,
}


# Damages of the files of a run between launches: to the newest checkpoint; there is one before it.


def flipped(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut(file: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def gone(file: Path, chance: random.Random) -> None:
    file.unlink()


def value_changed(file: Path, chance: random.Random) -> None:
    """Flip a bit that only a hash can see: the highest one of a number's mantissa, in place of `file` a tensor file."""
    file = file.with_name(f"{chance.choice(['model', 'ema', 'optimizer'])}.safetensors")
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")  # behind the header
    numbers = np.frombuffer(content, np.dtype("<f4"), offset=start)  # a view
    numbers.view("<u4")[chance.choice(numbers.nonzero()[0].tolist())] ^= 1 << 22
    file.write_bytes(content)


def untouched(file: Path, chance: random.Random) -> None:
    pass


DAMAGES = {
    "bit flipped": flipped,
    "value changed": value_changed,
    "file cut": cut,
    "file gone": gone,
    "folder untouched": untouched,
}


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint of a run; 0 if there is none."""
    newest = storage.newest(folder / "checkpoints")
    return 0 if newest is None else int(newest.stem.removeprefix(storage.PREFIX))


class Soak:
    """Runs under faults.

    Args:
        work: an empty folder.
        chance: the random number generator.
        processes: of each launch.

    Attributes:
        first: called in each process before the program, to plant a bug.
        programs: that are trained under faults.
    """

    def __init__(self, work: Path, chance: random.Random, processes: int) -> None:
        self.work, self.chance, self.processes = work, chance, processes
        self.first: Callable[[], None] = hung_workers_are_noticed
        self.programs = [*PROGRAMS]
        self.counts: Counter[str] = Counter()
        self.read = 0  # characters of the log
        self.workers: list[psutil.Process] = []  # of trainers with a fault
        self.log = work / "output.txt"
        self.images = draw_images(work / "images", 47)
        victims = sorted(self.images.rglob("*.png"))[5:40:10]
        for victim, content in zip(victims, (b"", b"no image", victims[2].read_bytes()[:60]), strict=False):
            victim.write_bytes(content)
        self.undisturbed: dict[str, Path] = {}
        self.steps: dict[str, int] = {}  # of each program's run
        self.seconds: dict[str, tuple[float, float]] = {}  # to the first step, and of a step: only to draw moments
        Trainers("train_mae.py", ["--help"], self.log).wait()  # the server imports everything
        for program in PROGRAMS:
            folder = self.undisturbed[program] = work / f"undisturbed {program}"
            words = [*settings(program, self.images, folder), "--checkpoint.keep", 1000]
            began = time.monotonic()
            with self.launch(program, words, self.first) as trainers:
                trainers.until(lambda folder=folder: newest_step(folder))
                first_step = time.monotonic()
                if any(trainers.wait()):
                    raise Broken("the undisturbed run failed")
            self.steps[program] = steps = newest_step(folder)
            self.seconds[program] = first_step - began, (time.monotonic() - first_step) / steps

    def launch(self, program: str, words: list[object], first: Callable[[], None]) -> Trainers:
        """One program caches its images, so that it finds the bad ones at once; the other reads them at every use."""
        if program == "train_diffusion.py":
            first = partial(keeping_nothing, first)
        return Trainers(program, words, self.log, processes=self.processes, first=first)

    def run(self, faults: list[str], goes_on: Callable[[], bool]) -> None:
        """One run from its start to its end, with random faults at random moments as long as `goes_on`.

        Raises:
            Broken: a guarantee does not hold.
        """
        chance, program = self.chance, self.chance.choice(self.programs)
        injected: set[str] = set()
        folder = self.work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        words = settings(program, self.images, folder)
        while True:
            allowed: Statuses = {0}
            rank, fault = chance.randrange(self.processes), chance.choice(faults) if goes_on() else ""
            workers = 1 if fault == "worker killed" else chance.randrange(2)
            with self.launch(program, [*words, "--data.workers", workers], self.first) as trainers:
                if fault:
                    self.wait_for_a_moment(trainers, program, folder)
                    if not trainers.over:
                        self.workers += trainers.workers(rank)
                        allowed |= FAULTS[fault](trainers, rank, chance)
                        self.counts[fault] += 1
                        injected.add(fault)
                others = {76} if self.processes > 1 and fault else set()  # the other ranks
                if fault and self.processes > 1 and not trainers.have_met:
                    trainers.wait(20)
                    allowed |= {-signal.SIGKILL}  # of ranks that wait for a lost one: a launcher kills them
                    trainers.kill()
                statuses = trainers.wait()
                if not trainers.over:
                    raise Broken(f"{fault or 'no fault'}: hangs: {statuses}")
                if wrong := {status for status in statuses if status not in allowed | others}:
                    message = self.log.read_text().splitlines()[-1]
                    raise Broken(f"{fault}: exit statuses {statuses}, of which {wrong} should not be; {message}")
            self.look(program, folder)
            if not any(statuses):
                break
            words = ["--resume", "--output-dir", folder]
            if not self.damage(folder):
                words = [*settings(program, self.images, folder), "--overwrite"]
        self.compare(program, folder, whole="disk full" not in injected)

    def wait_for_a_moment(self, trainers: Trainers, program: str, folder: Path) -> None:
        """Wait until a random step that is left, or before the first one, and a random part of the time of a step."""
        begun, (starting, step) = newest_step(folder), self.seconds[program]
        if begun == self.steps[program] or self.chance.random() < STARTING:
            trainers.wait(self.chance.uniform(0, starting))
            return
        goal, end = self.chance.randint(begun + 1, self.steps[program]), time.monotonic() + HANGS
        while not trainers.over and newest_step(folder) < goal:
            trainers.wait(0.01)
            if time.monotonic() > end:
                raise Broken(f"hangs before step {goal}")
        trainers.wait(self.chance.uniform(0, step))

    def damage(self, folder: Path) -> bool:
        """Damage the newest of several checkpoints, unless it is damaged; returns whether there is one at all."""
        steps = sorted((folder / "checkpoints").glob("step-????????"))
        newest = storage.newest_whole(folder / "checkpoints")
        if len(steps) > 1 and newest is not None and newest.path == steps[-1]:
            name = self.chance.choice([*DAMAGES])
            DAMAGES[name](self.chance.choice(sorted(steps[-1].iterdir())), self.chance)
            self.counts[name] += 1
        return bool(steps)

    def look(self, program: str, folder: Path) -> None:
        """Compare the current state with the undisturbed run.

        Raises:
            Broken: they differ.
        """
        message = self.log.read_text()
        if re.search(r"Traceback(?:.|\n)*File .*/(pretrain|models)/", message[self.read :]):
            raise Broken("a traceback")  # not a worker's, whose trainer was killed
        self.read = len(message)
        newest = storage.newest_whole(folder / "checkpoints")
        if newest is not None:
            other = self.undisturbed[program] / "checkpoints" / newest.path.name
            if newest.state.values["infobatch"]["epoch"] != storage.load(other).values["infobatch"]["epoch"]:
                return  # stopped at an epoch's last step: its scores are still losses; the end will show
            if found := differences(newest.path, other):
                raise Broken(f"{newest.path.name}: {len(found)} differences, the first: {found[0]}")
            self.counts["checkpoints compared"] += 1

    def compare(self, program: str, folder: Path, *, whole: bool) -> None:
        """Compare a finished run with the undisturbed one.

        Args:
            program: that trained it.
            folder: its own.
            whole: whether all previews and EMA snapshots must be there; a full disk loses those that did not fit.

        Raises:
            Broken: they differ.
        """
        other = self.undisturbed[program]
        if read_metrics(folder) != read_metrics(other):
            raise Broken("metrics.jsonl differs")
        if (one := _timeless(folder)) != (two := _timeless(other)):
            raise Broken(f"the summary differs: {one} {two}")
        if psutil.wait_procs(self.workers, timeout=HANGS)[1]:
            raise Broken("workers that outlive their trainer")
        self.workers = []
        parts = [path.name for path in folder.rglob("*.part")]
        if parts:
            raise Broken(f"left behind: {parts}")
        for kind in ("ema", "pictures", "model"):
            mine, theirs = ({path.relative_to(run) for path in (run / kind).rglob("*")} for run in (folder, other))
            # A full disk may lose previews and snapshots; the card has the newest preview that there is.
            if lacking := {path for path in mine ^ theirs if whole or (kind == "model" and path.suffix != ".png")}:
                raise Broken(f"files of {kind}: {lacking}")
            for path in sorted(path for path in mine & theirs if (folder / path).suffix in (".safetensors", ".png")):
                if (folder / path).read_bytes() != (other / path).read_bytes():
                    raise Broken(f"{path} differs")
        self.counts["runs to the end"] += 1


def _timeless(folder: Path) -> dict[str, object]:
    summary = json.loads((folder / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key in ("samples_used", "steps", "quality", "bad_images")}


def main(minutes: float = 30.0, kills: int | None = None, processes: int = 1, seed: int | None = None) -> None:
    """Real trainers under random faults; exit status 1 if a guarantee does not hold.

    Args:
        minutes: after which no more runs are started.
        kills: instead, only SIGKILL, this many times.
        processes: of each launch.
        seed: of the faults; None: a random one.
    """
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    print(f"seed {seed}", flush=True)
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    began = time.monotonic()
    soak = Soak(work, random.Random(seed), processes)
    if kills is None:
        faults, goes_on = [*FAULTS], lambda: time.monotonic() - began < 60 * minutes
    else:
        faults, goes_on = ["killed"], lambda: soak.counts["killed"] < kills
    try:
        while goes_on():
            soak.run(faults, goes_on)
            counts = ", ".join(f"{count} {what}" for what, count in soak.counts.items())
            print(f"{(time.monotonic() - began) / 60:.1f} min: {counts}", flush=True)
    except (Broken, UserError) as error:
        print(f"BROKEN: {error}; seed {seed}, all is in {work}", flush=True)
        sys.exit(1)
    shutil.rmtree(work)
    print("all guarantees hold")


if __name__ == "__main__":
    run_command(main, "python -m tests.faults.soak")

"""Several processes look after each other: where one is killed or stopped, the others say which, and leave.

Without it they wait for half an hour, in a collective that names nobody.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed import TCPStore

BEAT = 2.0  # seconds between signs of life
FAILURES = 3  # errors of the store in a row, and rank 0 is taken to be gone
PATIENCE = 60.0  # seconds without one, and a process is taken to be gone
SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")  # of gloo
GONE = 76  # exit status of those that are left (EX_PROTOCOL); the checkpoints are whole


class Heartbeat:
    """A thread that gives signs of life, and looks for those of the others. Use it as a context.

    Args:
        rank, world: this process and how many there are.
        share: hands an object of rank 0 to all of them.
        stop: the `StopSignal` of this process; it hears of those of the others.

    Attributes:
        told: the signal that told one of the processes to stop, or 0.
        where: says where the training is, for the sentence.
        blocked: called in rank 0's thread if a process was told to stop and rank 0 does not come to it, because it
            waits for others; None: it does when the step ends.
    """

    def __init__(self, rank: int, world: int, share: Callable[[object], object], stop: Any) -> None:
        self.rank, self.world, self.stop = rank, world, stop
        self.blocked: Callable[[], None] | None = None
        self.told = 0
        self.where: Callable[[], str] = lambda: "before the first step"
        if world == 1:
            return
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        patience = timedelta(seconds=PATIENCE)
        own = TCPStore(host, 0, None, True, patience, wait_for_workers=False) if rank == 0 else None
        port = share(own.port if own else None)
        assert isinstance(port, int)
        self.store = own or TCPStore(host, port, None, False, patience, wait_for_workers=False)
        self.store.set(f"beat {rank}", "0 0")
        self.store.set(f"who {rank}", f"{os.getpid()} {socket.gethostname()}")
        # Process id and host of each; waits until all have said it.
        self.who = [tuple(self.store.get(f"who {number}").decode().split()) for number in range(world)]
        self._seen = dict.fromkeys(range(world), time.monotonic())
        self._answered, self._told_since = time.monotonic(), 0.0
        self._over = threading.Event()
        targets = (self._exchange, self._watch)
        self._threads = [threading.Thread(target=each, name=each.__name__, daemon=True) for each in targets]

    def __enter__(self) -> "Heartbeat":
        if self.world > 1:
            self._seen, self._answered = dict.fromkeys(range(self.world), time.monotonic()), time.monotonic()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.world == 1:
            return
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS):
            time.sleep(BEAT)  # whoever was killed is no more then
            here = socket.gethostname()
            dead = [n for n, (pid, host) in enumerate(self.who) if host == here and not psutil.pid_exists(int(pid))]
            dead = dead or [n for n in range(self.world) if n != self.rank and self._zombie(n)]
            self._leave(dead, "is gone" if dead else "another process is gone")
        self._over.set()
        for thread in self._threads:
            thread.join(BEAT)

    def _zombie(self, number: int) -> bool:
        """Whether a process has ended and its launcher has not noticed."""
        pid, host = self.who[number]
        try:
            return host == socket.gethostname() and psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError):
            return False

    def _exchange(self) -> None:
        """Give signs of life and read those of the others. It blocks for as long as the store does not answer."""
        count, failures = 0, 0
        last = [""] * self.world
        while not self._over.wait(BEAT):
            count += 1
            try:
                self.store.set(f"beat {self.rank}", f"{count} {self.stop.arrived()}")
                for number in range(self.world):
                    if (beat := self.store.get(f"beat {number}").decode()) != last[number]:
                        last[number], self._seen[number] = beat, time.monotonic()
                    if told := int(beat.split()[-1]):
                        self._told_since, self.told = self._told_since or time.monotonic(), told
                        self.stop.hear(told)
                if self.rank and self.store.check(["ended"]):
                    self.store.set(f"ended {self.rank}", "")
                    os._exit(int(self.store.get("ended").decode()))
                self._answered, failures = time.monotonic(), 0
            except Exception:  # the store is rank 0's, which has ended, as this process does, or was suspended
                failures += 1
                if failures == FAILURES and not self._over.wait(BEAT):
                    self._leave([0], f"gave no sign of life for {PATIENCE:.0f} s")

    def _watch(self) -> None:
        """Leave if others give no sign of life, or the store, which is rank 0's, no answer."""
        while True:
            before = time.monotonic()
            if self._over.wait(BEAT):
                return
            now = time.monotonic()
            if now - before > BEAT + PATIENCE / 4:  # it was this process that slept
                self._seen, self._answered = dict.fromkeys(self._seen, now), now
                continue
            gone = [number for number, seen in [*self._seen.items()] if now - seen > PATIENCE]
            if gone and now - self._answered > PATIENCE / 2:
                gone = [0]
            if gone:
                self._leave(gone, f"gave no sign of life for {PATIENCE:.0f} s")
            if self.rank == 0 and self._told_since and now - self._told_since > 3 * BEAT and (blocked := self.blocked):
                with suppress(SystemExit):
                    blocked()
                os._exit(0)  # `blocked` has ended the process

    def end_all(self, status: int) -> None:
        """End all processes, wherever they are; called in each of those that can."""
        if self.world == 1:
            return
        if self.rank:  # rank 0 may still be writing
            time.sleep(PATIENCE)
        else:
            self.store.set("ended", str(status))
            with suppress(Exception):  # those that can't any more
                self.store.wait([f"ended {number}" for number in range(1, self.world)], timedelta(seconds=3 * BEAT))
        sys.stdout.flush()
        os._exit(status)

    def _leave(self, gone: list[int], what: str) -> None:
        who = ", ".join(f"rank {number} (process {self.who[number][0]} on {self.who[number][1]})" for number in gone)
        said = f"{who} {what}".strip() + f", {self.where()}; all leave, --resume goes on from the last checkpoint"
        sys.stderr.write(f"error: [rank {self.rank}] {said}\n")
        sys.stderr.flush()
        os._exit(GONE)

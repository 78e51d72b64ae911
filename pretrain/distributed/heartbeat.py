"""Several processes look after each other: where one is killed or stopped, the others say which, and leave.

Without it they wait for half an hour, in a collective that names nobody.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import psutil
from torch.distributed import TCPStore

BEAT = 2.0  # seconds between signs of life
PATIENCE = 60.0  # seconds without one, and a process is taken to be gone
SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")  # of gloo
GONE = 76  # exit status of those that are left (EX_PROTOCOL); the checkpoints are whole


class Heartbeat:
    """A thread that gives signs of life, and looks for those of the others. Use it as a context.

    Args:
        rank, world: this process and how many there are.
        share: hands an object of rank 0 to all of them.

    Attributes:
        where: says where the training is, for the sentence.
    """

    def __init__(self, rank: int, world: int, share: Callable[[object], object]) -> None:
        self.rank, self.world = rank, world
        self.where: Callable[[], str] = lambda: "before the first step"
        if world == 1:
            return
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        patience = timedelta(seconds=PATIENCE)
        own = TCPStore(host, 0, None, True, patience, wait_for_workers=False) if rank == 0 else None
        port = share(own.port if own else None)
        assert isinstance(port, int)
        self.store = own or TCPStore(host, port, None, False, patience, wait_for_workers=False)
        self.store.set(f"beat {rank}", "0")
        self.store.set(f"who {rank}", f"{os.getpid()} {socket.gethostname()}")
        # Process id and host of each; waits until all have said it.
        self.who = [tuple(self.store.get(f"who {number}").decode().split()) for number in range(world)]
        self._seen: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self.world > 1:
            self._thread.start()
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
        self._thread.join(BEAT)

    def _zombie(self, number: int) -> bool:
        """Whether a process has ended and its launcher has not noticed."""
        pid, host = self.who[number]
        try:
            return host == socket.gethostname() and psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError):
            return False

    def _watch(self) -> None:
        count = 0
        last = [""] * self.world
        self._seen = dict.fromkeys(range(self.world), time.monotonic())
        while not self._over.wait(BEAT):
            before, count = time.monotonic(), count + 1
            try:
                self.store.set(f"beat {self.rank}", str(count))
                for number in range(self.world):
                    if (beat := self.store.get(f"beat {number}").decode()) != last[number]:
                        last[number], self._seen[number] = beat, time.monotonic()
            except Exception:  # the store is rank 0's
                if self._over.wait(BEAT):  # which has ended, as this process does
                    return
                self._leave([0], f"gave no sign of life for {PATIENCE:.0f} s")
            if time.monotonic() - before > PATIENCE / 2:  # it was this process that slept
                self._seen = dict.fromkeys(self._seen, time.monotonic())
            if gone := [number for number, seen in self._seen.items() if time.monotonic() - seen > PATIENCE]:
                self._leave(gone, f"gave no sign of life for {PATIENCE:.0f} s")

    def _leave(self, gone: list[int], what: str) -> None:
        who = ", ".join(f"rank {number} (process {self.who[number][0]} on {self.who[number][1]})" for number in gone)
        said = f"{who} {what}".strip() + f", {self.where()}; all leave, --resume goes on from the last checkpoint"
        sys.stderr.write(f"error: [rank {self.rank}] {said}\n")
        sys.stderr.flush()
        os._exit(GONE)

"""Noticing that another process of the launch was killed or has stopped.

Without this the other processes would wait in a collective for its timeout, half an hour, and its error would not name
the process. With it they report which process is gone and exit.
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

INTERVAL = 2.0  # seconds between heartbeats
TIMEOUT = 60.0  # seconds without a heartbeat after which a process counts as gone
PEER_ERRORS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")  # of gloo
EXIT_STATUS = 76  # of the remaining processes (EX_PROTOCOL)


class Heartbeat:
    """A thread that sends heartbeats and checks those of the other processes. Use it as a context manager.

    Heartbeats are counters in a TCPStore of rank 0. If a process is gone, this one writes an error to stderr and exits
    with status `EXIT_STATUS`; no checkpoint is written, those that exist are complete.

    Args:
        rank, world: this process, and the number of processes; with one process nothing happens.
        broadcast: returns rank 0's argument on all ranks.

    Attributes:
        position: returns the position in the training, such as "epoch 3, step 120", for the error message.
    """

    def __init__(self, rank: int, world: int, broadcast: Callable[[object], object]) -> None:
        self.rank, self.world = rank, world
        self.position: Callable[[], str] = lambda: "before the first step"
        if world == 1:
            return
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        timeout = timedelta(seconds=TIMEOUT)
        own = TCPStore(host, 0, None, True, timeout, wait_for_workers=False) if rank == 0 else None
        port = broadcast(own.port if own else None)
        assert isinstance(port, int)
        self.store = own or TCPStore(host, port, None, False, timeout, wait_for_workers=False)
        self.store.set(f"beat {rank}", "0")
        self.store.set(f"who {rank}", f"{os.getpid()} {socket.gethostname()}")
        # Process id and host of each rank; `get` waits until a rank has set them.
        self.peers = [tuple(self.store.get(f"who {number}").decode().split()) for number in range(world)]
        self._last_beat: dict[int, float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self.world > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.world == 1:
            return
        if isinstance(error, RuntimeError) and any(message in str(error) for message in PEER_ERRORS):
            time.sleep(INTERVAL)  # until the killed process has disappeared
            here = socket.gethostname()
            dead = [n for n, (pid, host) in enumerate(self.peers) if host == here and not psutil.pid_exists(int(pid))]
            dead = dead or [n for n in range(self.world) if n != self.rank and self._is_zombie(n)]
            self._exit(dead, "is gone" if dead else "another process is gone")
        self._stopped.set()
        self._thread.join(INTERVAL)

    def _is_zombie(self, number: int) -> bool:
        """Whether a process has ended and its launcher has not noticed yet."""
        pid, host = self.peers[number]
        try:
            return host == socket.gethostname() and psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError):
            return False

    def _watch(self) -> None:
        count = 0
        last = [""] * self.world
        self._last_beat = dict.fromkeys(range(self.world), time.monotonic())
        while not self._stopped.wait(INTERVAL):
            before, count = time.monotonic(), count + 1
            try:
                self.store.set(f"beat {self.rank}", str(count))
                for number in range(self.world):
                    if (beat := self.store.get(f"beat {number}").decode()) != last[number]:
                        last[number], self._last_beat[number] = beat, time.monotonic()
            except Exception:  # the store is a part of rank 0's process
                if self._stopped.wait(INTERVAL):  # both processes are ending normally
                    return
                self._exit([0], f"sent no heartbeat for {TIMEOUT:.0f} s")
            if time.monotonic() - before > TIMEOUT / 2:  # this process was suspended, so it has missed heartbeats
                self._last_beat = dict.fromkeys(self._last_beat, time.monotonic())
            if gone := [number for number, beat in self._last_beat.items() if time.monotonic() - beat > TIMEOUT]:
                self._exit(gone, f"sent no heartbeat for {TIMEOUT:.0f} s")

    def _exit(self, gone: list[int], what: str) -> None:
        names = (f"rank {n} (process {self.peers[n][0]} on {self.peers[n][1]})" for n in gone)
        message = f"{', '.join(names)} {what}".strip()
        sys.stderr.write(
            f"error: [rank {self.rank}] {message}, {self.position()}; all processes exit, --resume continues from the "
            "last checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(EXIT_STATUS)  # other threads may be stuck in a collective

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
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed import TCPStore

INTERVAL = 2.0  # seconds between heartbeats
TIMEOUT = 60.0  # seconds without a heartbeat after which a process counts as gone
MAX_FAILURES = 3  # errors of the store in a row after which rank 0 counts as gone
PEER_ERRORS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")  # of gloo
EXIT_STATUS = 76  # of the remaining processes (EX_PROTOCOL)


def _before_start() -> str:
    return "before the first step"


class Heartbeat:
    """Threads that send heartbeats and check those of the other processes. Use it as a context manager.

    Heartbeats are counters in a TCPStore of rank 0. If a process is gone, this one writes an error to stderr and exits
    with status `EXIT_STATUS`; no checkpoint is written, those that exist are complete.

    Args:
        rank, world: this process, and the number of processes; with one process nothing happens.
        broadcast: returns rank 0's argument on all ranks.
        stop_signal: the `StopSignal` of this process; it is told of the signals that other processes received.

    Attributes:
        signal: number of the signal to stop that one of the processes received, or 0.
        position: returns the position in the training, such as "epoch 3, step 120", for the error message.
        on_signal: called in a thread of rank 0 if a process received a signal to stop and rank 0 can't react to it,
            because its main thread waits in a collective. None: the training loop reacts, after the step.
    """

    def __init__(self, rank: int, world: int, broadcast: Callable[[object], object], stop_signal: Any) -> None:
        self.rank, self.world, self.stop_signal = rank, world, stop_signal
        self.on_signal: Callable[[], None] | None = None
        self.signal = 0
        self.position: Callable[[], str] = _before_start
        if world == 1:
            return
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        timeout = timedelta(seconds=TIMEOUT)
        own = TCPStore(host, 0, None, True, timeout, wait_for_workers=False) if rank == 0 else None
        port = broadcast(own.port if own else None)
        assert isinstance(port, int)
        self.store = own or TCPStore(host, port, None, False, timeout, wait_for_workers=False)
        self.store.set(f"beat {rank}", "0 0")
        self.store.set(f"who {rank}", f"{os.getpid()} {socket.gethostname()}")
        # Process id and host of each rank; `get` waits until a rank has set them.
        self.peers = [tuple(self.store.get(f"who {number}").decode().split()) for number in range(world)]
        self._last_beat = dict.fromkeys(range(world), time.monotonic())
        self._last_answer, self._signal_since = time.monotonic(), 0.0  # of the store; of `signal`
        self._stopped = threading.Event()
        targets = (self._exchange, self._watch)
        self._threads = [threading.Thread(target=each, name=each.__name__, daemon=True) for each in targets]

    def __enter__(self) -> "Heartbeat":
        if self.world > 1:
            self._last_beat = dict.fromkeys(range(self.world), time.monotonic())
            self._last_answer = time.monotonic()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        position, self.position = self.position, _before_start  # a method of the run would keep the run's lock alive
        if self.world == 1:
            return
        if isinstance(error, RuntimeError) and any(message in str(error) for message in PEER_ERRORS):
            time.sleep(INTERVAL)  # until the killed process has disappeared
            here = socket.gethostname()
            dead = [n for n, (pid, host) in enumerate(self.peers) if host == here and not psutil.pid_exists(int(pid))]
            dead = dead or [n for n in range(self.world) if n != self.rank and self._is_zombie(n)]
            self.position = position
            self._exit(dead, "is gone" if dead else "another process is gone")
        self._stopped.set()
        for thread in self._threads:
            thread.join(INTERVAL)

    def _is_zombie(self, number: int) -> bool:
        """Whether a process has ended and its launcher has not noticed yet."""
        pid, host = self.peers[number]
        try:
            return host == socket.gethostname() and psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError):
            return False

    def _exchange(self) -> None:
        """Send heartbeats and read those of the others; blocks as long as the store does not answer."""
        count, failures = 0, 0
        last = [""] * self.world
        while not self._stopped.wait(INTERVAL):
            count += 1
            try:
                self.store.set(f"beat {self.rank}", f"{count} {self.stop_signal.arrived()}")
                for number in range(self.world):
                    if (beat := self.store.get(f"beat {number}").decode()) != last[number]:
                        last[number], self._last_beat[number] = beat, time.monotonic()
                    if received := int(beat.split()[-1]):
                        self._signal_since, self.signal = self._signal_since or time.monotonic(), received
                        self.stop_signal.forward(received)
                if self.rank and self.store.check(["end"]):
                    status = int(self.store.get("end").decode())
                    self.store.set(f"end {self.rank}", "")  # after this rank 0 may exit, and its store with it
                    os._exit(status)
                self._last_answer, failures = time.monotonic(), 0
            except Exception:  # the store is a part of rank 0's process, which is ending, gone or suspended
                failures += 1
                if failures == MAX_FAILURES and not self._stopped.wait(INTERVAL):
                    self._exit([0], f"sent no heartbeat for {TIMEOUT:.0f} s")

    def _watch(self) -> None:
        """Exit if another process sends no heartbeats, or the store of rank 0 does not answer."""
        while True:
            before = time.monotonic()
            if self._stopped.wait(INTERVAL):
                return
            now = time.monotonic()
            if now - before > INTERVAL + TIMEOUT / 4:  # this process was suspended, so it has missed heartbeats
                self._last_beat, self._last_answer = dict.fromkeys(self._last_beat, now), now
                continue
            gone = [number for number, beat in [*self._last_beat.items()] if now - beat > TIMEOUT]
            if gone and now - self._last_answer > TIMEOUT / 2:
                gone = [0]
            if gone:
                self._exit(gone, f"sent no heartbeat for {TIMEOUT:.0f} s")
            waited = self._signal_since and now - self._signal_since > 3 * INTERVAL
            if self.rank == 0 and waited and (react := self.on_signal):
                with suppress(SystemExit):
                    react()
                os._exit(0)  # not reached: `react` ends the process

    def end_all(self, status: int) -> None:
        """End all processes, which may wait in a collective; called in each of those that received the signal."""
        if self.world == 1:
            return
        if self.rank:  # rank 0 may still be writing; `_exchange` ends this process when it has
            time.sleep(TIMEOUT)
        else:
            self.store.set("end", str(status))
            with suppress(Exception):  # processes that are suspended don't answer
                self.store.wait([f"end {number}" for number in range(1, self.world)], timedelta(seconds=TIMEOUT))
        sys.stdout.flush()
        os._exit(status)

    def _exit(self, gone: list[int], what: str) -> None:
        names = (f"rank {n} (process {self.peers[n][0]} on {self.peers[n][1]})" for n in gone)
        message = f"{', '.join(names)} {what}".strip()
        sys.stderr.write(
            f"error: [rank {self.rank}] {message}, {self.position()}; all processes exit, --resume continues from the "
            "last checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(EXIT_STATUS)  # other threads may be stuck in a collective

"""A run that is set up: its components, and what happens between its steps."""

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Adapter
from pretrain.checkpoint.async_writer import CheckpointWriter
from pretrain.checkpoint.ema_snapshots import Snapshots
from pretrain.checkpoint.run_dir import Lock
from pretrain.checkpoint.storage import State
from pretrain.config.schema import Config
from pretrain.core.errors import UserError
from pretrain.data.loader import RestartingLoader
from pretrain.data.sources import Source
from pretrain.distributed.collectives import all_gather_set, max_over_ranks, raise_on_all_ranks
from pretrain.distributed.heartbeat import Heartbeat
from pretrain.distributed.launch import StopRequested, StopSignal
from pretrain.distributed.sharding import full_state_dict
from pretrain.training import replay_step
from pretrain.training.flops import peak_flops
from pretrain.training.reporter import Reporter
from pretrain.training.state import TrainState
from pretrain.training.summary import environment, summarise

EXIT_STOPPED = 75  # exit status of a run that was stopped by a signal and can be resumed (EX_TEMPFAIL)


@dataclass
class Run:
    """What the training loop works with. Use it as a context manager.

    Attributes:
        config: settings of the run.
        adapter: the objective in evaluations.
        objective: the objective in training; called with model, batch and random numbers, returns `Losses`.
        source: the data set.
        accelerator: accelerate's `Accelerator`.
        model: the network as the objective calls it: compiled, in DistributedDataParallel.
        optimizer: as wrapped by accelerate.
        state: what a checkpoint holds.
        batches: of the current epoch; a new iterator starts behind the last batch whose losses InfoBatch has.
        writer: of checkpoints.
        snapshots: of the power-function EMAs.
        reporter: of everything that is printed, logged or drawn.
        evaluators: called with the EMA model.
        preview: draws what the EMA model does, or None.
        stop_signal: records a signal to stop.
        lock: of the run's directory, on rank 0; released with this object.
        is_new: whether the run was not resumed.
        heartbeat: of the processes.
        first_step: number of steps before this launch; 0 for a new run.
    """

    config: Config
    adapter: Adapter
    objective: Adapter
    source: Source
    accelerator: Any
    model: nn.Module
    optimizer: Any
    state: TrainState
    batches: RestartingLoader
    writer: CheckpointWriter
    snapshots: Snapshots
    reporter: Reporter
    evaluators: Sequence[Callable[[nn.Module], dict[str, Any]]]
    preview: Callable[[nn.Module], Tensor | None] | None
    stop_signal: StopSignal
    lock: Lock | None
    is_new: bool
    heartbeat: Heartbeat | None = None
    first_step: int = field(init=False)

    def __post_init__(self) -> None:
        self.first_step = self.state.step
        self._contexts = ExitStack()
        self._exiting = threading.Lock()
        self._skipped = len(self.source.train.skipped)

    def __enter__(self) -> "Run":
        for context in (self.reporter, self.writer, self.batches):
            self._contexts.enter_context(context)
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.__exit__(*error)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.accelerator.is_main_process

    def position(self) -> str:
        """The position in the training, for messages: "epoch 3, step 120"."""
        return f"epoch {self.state.infobatch.epoch + 1}, step {self.state.step}"

    def begin_epoch(self) -> None:
        """Write a checkpoint of the state between two epochs, and start to measure the epoch's time."""
        if self.state.infobatch.seen == 0 and self.state.step != self.first_step:
            self.checkpoint()
        self.reporter.begin_epoch(self.state)

    def end_epoch(self, epoch: int) -> None:
        """Count the samples, report, and evaluate if it is due."""
        evaluates = (epoch + 1) % self.config.evaluate.every == 0 or epoch + 1 == self.config.epochs
        before = self._state() if evaluates else None  # a run that is stopped in the evaluation repeats all of this
        self.state.count_samples()
        self.reporter.epoch(self.state, epoch)
        if before is not None:
            self.evaluate(epoch + 1, before)

    def evaluate(self, epochs: int, before: State | None = None) -> None:
        """Evaluate the EMA model; all ranks call it.

        Args:
            epochs: of training so far.
            before: the state to write if a signal interrupts the evaluation; default: the present one.

        Raises:
            SystemExit: with status `EXIT_STOPPED` after a signal to stop; `before` was written.
        """
        state = before or self._state()
        if state.is_sharded:  # now, as an interrupted evaluation can't gather all processes
            self._save(state)
        if self.heartbeat is not None:
            self.heartbeat.on_signal = lambda: self._exit_evaluation(epochs, state)
        try:
            with self.stop_signal.raising():
                self._evaluate(epochs)
        except StopRequested:
            self._exit_evaluation(epochs, state)
        finally:
            if self.heartbeat is not None:
                self.heartbeat.on_signal = None

    def _evaluate(self, epochs: int) -> None:
        model = self.state.ema.model
        metrics = {name: value for evaluator in self.evaluators for name, value in evaluator(model).items()}
        self.source.test.skipped |= all_gather_set(self.source.test.skipped)
        picture = self.preview(model) if self.preview is not None and epochs else None
        self.reporter.evaluation(epochs, self.state.step, metrics, picture)
        self.accelerator.wait_for_everyone()

    def checkpoint(self, *, wait: bool = False) -> State:
        """Write a checkpoint in the background; all ranks call it.

        Args:
            wait: until it is on disk.

        Returns:
            Its state, not copied: it changes with the training.

        Raises:
            UserError: it can't be written and `wait` is set, or the one before can't be and there is no other.
        """
        state = self._state()
        if len(skipped := self.source.train.skipped) > self._skipped:
            self._skipped = len(skipped)
            self.reporter.display.print(
                f"warning: {len(skipped)} of {len(self.source.train)} images can't be used and are skipped, for "
                f"example {min(skipped)}"
            )
        self._save(state)
        with raise_on_all_ranks():
            if self.is_main and wait:
                self.writer.wait(required=True)
        return state

    def _save(self, state: State) -> None:
        """Begin to write a checkpoint, or, of a sharded state, write it; all ranks call it."""
        if state.is_sharded:
            self.writer.save(self.state.step, state, self.reporter.metrics.flush)
            return
        with raise_on_all_ranks():
            if self.is_main:
                self.writer.save(self.state.step, state, self.reporter.metrics.flush)

    def _state(self) -> State:
        """What a checkpoint holds; all ranks call it. Later epochs don't change it."""
        self.source.train.skipped |= all_gather_set(self.source.train.skipped)
        state = self.state.state_dict(self.config, self.reporter.metrics.position)
        state.tensors["times_used"] = {"times_used": self.state.times_used.clone()}  # changes before it is written
        return state

    def inspect(self, epoch: int) -> tuple[int, bool]:
        """Check what the steps since the last call computed, and agree on it over all ranks, which all call it.

        Synchronizes with the device. Samples whose losses are not finite are excluded.

        Returns:
            The number of the signal to stop, or 0, and whether a checkpoint is due by time; the same on all ranks.

        Raises:
            UserError: an image can't be read, or too many losses or gradients are not finite.
        """
        nonfinite = self.state.nonfinite
        step = f"epoch {epoch + 1}, step {self.state.step + 1}"
        with raise_on_all_ranks():
            nonfinite.raise_pending()
        bad_samples = nonfinite.bad_samples()
        stop, save, any_bad = max_over_ranks(
            self.stop_signal.signal, self.is_main and self.writer.due, bool(bad_samples)
        )
        if any_bad:
            before = len(self.source.train.skipped)
            message = nonfinite.exclude(all_gather_set(bad_samples))
            self._skipped += len(self.source.train.skipped) - before  # reported here
            self.reporter.display.print(f"warning: {step}: {message}; excluded from now on")
        if reason := nonfinite.reason_to_stop():
            samples = sorted(all_gather_set({*nonfinite.recent}))
            parameters = full_state_dict(self.state.model)
            with raise_on_all_ranks():
                if self.is_main:
                    replay_step.record(self.config.output_dir, parameters, samples, epoch=epoch)
                hint = replay_step.hint(self.config.output_dir)
                raise UserError(f"{step}: {reason}; lower --optim.lr, or {hint}")
        nonfinite.recent.clear()
        return stop, bool(save)

    def exit_on_signal(self, number: int, epoch: int) -> None:
        """Write a checkpoint and exit the program.

        Raises:
            SystemExit: with status `EXIT_STOPPED`, or 128 + the signal's number in a dry run, which leaves nothing.
        """
        if self.config.dry_run:
            raise SystemExit(128 + number)
        self.checkpoint(wait=True)
        self._report_stop(number, f"in epoch {epoch + 1} after step {self.state.step}")
        raise SystemExit(EXIT_STOPPED)

    def _exit_evaluation(self, epochs: int, state: State) -> None:
        """Write a state without a collective, as the other processes may be anywhere, and end all of them.

        Raises:
            SystemExit: with status `EXIT_STOPPED`.
        """
        if not self._exiting.acquire(blocking=False):  # another thread does it, and ends the process
            threading.Event().wait()
        if self.is_main:
            if not state.is_sharded:
                self.writer.save(self.state.step, state, self.reporter.metrics.flush)
            self.writer.wait(required=True)
            received = self.heartbeat.signal if self.heartbeat is not None else 0
            self._report_stop(self.stop_signal.signal or received, f"in the evaluation after epoch {epochs}")
        if self.heartbeat is not None:
            self.heartbeat.end_all(EXIT_STOPPED)
        raise SystemExit(EXIT_STOPPED)

    def _report_stop(self, number: int, where: str) -> None:
        program = f"python {quote(sys.argv[0])}" if sys.argv[0].endswith(".py") else sys.argv[0]
        self.reporter.display.print(
            f"stopped by {signal.Signals(number).name} {where}; "
            f"continue with: {program} --resume --output-dir {quote(str(self.config.output_dir))}"
        )
        self.reporter.trackers.finish()

    def finish(self) -> dict[str, Any]:
        """Write the last checkpoint and return the summary; all ranks call it."""
        state = self.checkpoint(wait=True)
        self.reporter.sample_counts(self.state, self.source)
        device, config = self.accelerator.device, self.config
        peak = peak_flops(torch.cuda.get_device_name(device), config.precision) if device.type == "cuda" else None
        summary = summarise(
            config,
            state,
            model=self.state.model,
            evaluations=self.reporter.metrics.read("evaluation") if self.is_main else [],
            peak=peak and peak * self.accelerator.num_processes,
        ) | {
            "class_names": [*self.source.class_names],
            "environment": environment(device, self.accelerator.num_processes),
        }
        self.accelerator.wait_for_everyone()
        self.reporter.trackers.finish()
        return summary

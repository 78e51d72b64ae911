"""A training that is set up: its parts, and what is done with them between steps."""

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Adapter
from pretrain.checkpoint.async_writer import Writer
from pretrain.checkpoint.ema_snapshots import Snapshots
from pretrain.checkpoint.run_dir import Lock
from pretrain.config.schema import Config
from pretrain.core.errors import UserError
from pretrain.data.loader import RestartingLoader
from pretrain.data.sources import Source
from pretrain.distributed.collectives import all_gather_set, max_over_ranks, raise_on_all_ranks
from pretrain.distributed.launch import StopSignal
from pretrain.training import replay_step
from pretrain.training.flops import peak
from pretrain.training.reporter import Reporter
from pretrain.training.state import TrainState
from pretrain.training.summary import summarise

STOPPED = 75  # exit status of a run that was told to stop and can go on (EX_TEMPFAIL)


@dataclass
class Run:
    """Everything that the loop works with. Use it as a context.

    Attributes:
        config: the settings.
        adapter: the objective as it is evaluated.
        objective: the same as it is trained: called with model, batch and random numbers, returns `Losses`.
        source: the data.
        accelerator: accelerate's.
        model: the network as it is called in training: compiled, distributed.
        optimizer: as accelerate wraps it.
        state: all that changes, and is saved.
        batches: of the epoch; iterating again goes on behind the last batch whose losses came back.
        writer: of checkpoints.
        snapshots: of the power averages.
        reporter: of everything that is told.
        evaluators: called with the averaged model.
        draw: a picture of what the averaged model does, or None.
        stop: notes the signals that tell a run to stop.
        lock: of the run's directory, on rank 0; ends with this object.
        flops: of one sample.
        first_step: the step that the run began or goes on from.
        is_fresh: whether it begins.
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
    writer: Writer
    snapshots: Snapshots
    reporter: Reporter
    evaluators: Sequence[Callable[[nn.Module], dict[str, Any]]]
    draw: Callable[[nn.Module], Tensor] | None
    stop: StopSignal
    lock: Lock | None
    flops: int
    is_fresh: bool
    first_step: int = field(init=False)

    def __post_init__(self) -> None:
        self.first_step = self.state.step
        self._contexts = ExitStack()

    def __enter__(self) -> "Run":
        for part in (self.reporter, self.writer, self.batches):
            self._contexts.enter_context(part)
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.__exit__(*error)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.accelerator.is_main_process

    def where(self) -> str:
        """The place in the training, in words."""
        return f"epoch {self.state.infobatch.epoch + 1}, step {self.state.step}"

    def begin_epoch(self) -> None:
        """Save what the epoch before it led to, and start the clock."""
        if self.state.infobatch.seen == 0 and self.state.step != self.first_step:
            self.checkpoint()
        self.reporter.begin_epoch(self.state)

    def end_epoch(self, epoch: int) -> None:
        """Count, report, and evaluate if it is time."""
        self.state.count_visits()
        self.reporter.epoch(self.state, epoch)
        if (epoch + 1) % self.config.evaluate.every == 0 or epoch + 1 == self.config.epochs:
            self.evaluate(epoch + 1)

    def evaluate(self, epoch: int) -> None:
        """Measure and draw the averaged model; all ranks call it."""
        model = self.state.ema.model
        found = {name: value for evaluator in self.evaluators for name, value in evaluator(model).items()}
        self.source.test.skipped |= all_gather_set(self.source.test.skipped)
        picture = self.draw(model) if self.draw is not None and epoch else None
        self.reporter.evaluation(epoch, self.state.step, found, picture)
        self.accelerator.wait_for_everyone()

    def checkpoint(self, *, must: bool = False) -> None:
        """Have the state written, in the background; all ranks call it.

        Args:
            must: wait until it is on disk.

        Raises:
            UserError: it can't be written, and the run must not go on without it.
        """
        self.source.train.skipped |= all_gather_set(self.source.train.skipped)
        state = self.state.state_dict(self.config, self.reporter.metrics.position)
        with raise_on_all_ranks():
            if self.is_main:
                self.writer.save(self.state.step, state, self.reporter.metrics.flush)
            if self.is_main and must:
                self.writer.report(must=True)

    def inspect(self, epoch: int) -> tuple[int, bool]:
        """Look at what the steps since the last look computed, before the next one is made; all ranks call it.

        Returns:
            the signal to stop by, or 0, and whether the clock asks for a checkpoint, the same on all ranks.

        Raises:
            UserError: an image can't be used, or the numbers are too bad to go on.
        """
        guard = self.state.nan_guard
        step = f"epoch {epoch + 1}, step {self.state.step + 1}"
        with raise_on_all_ranks():
            guard.refuse()
        found = guard.found()
        told, due, bad = max_over_ranks(self.stop.signal, self.writer.due, bool(found))
        if bad:
            sentence = guard.set_aside(all_gather_set(found))
            self.reporter.display.print(f"warning: {step}: {sentence}; left out from now on")
        if verdict := guard.verdict():
            visits = sorted(all_gather_set({*guard.recent}))
            with raise_on_all_ranks():
                if self.is_main:
                    replay_step.record(self.config.output_dir, self.state.model, visits, epoch=epoch)
                how = replay_step.how(self.config.output_dir)
                raise UserError(f"{step}: {verdict}; lower --optim.lr, or {how}")
        guard.recent.clear()
        return told, bool(due)

    def leave(self, number: int, epoch: int) -> None:
        """Write a checkpoint and end the program, because of a signal.

        Raises:
            SystemExit: with status `STOPPED`.
        """
        self.checkpoint(must=True)
        program = f"python {Path(sys.argv[0]).name}" if sys.argv[0].endswith(".py") else sys.argv[0]
        self.reporter.display.print(
            f"stopped by {signal.Signals(number).name} in epoch {epoch + 1} after step {self.state.step}; "
            f"go on with: {program} --resume --output-dir {quote(str(self.config.output_dir))}"
        )
        self.reporter.trackers.finish()
        raise SystemExit(STOPPED)

    def finish(self) -> dict[str, Any]:
        """Save the last state; what the run came to, see `summarise`."""
        self.checkpoint(must=True)
        self.reporter.samples(self.state, self.source)
        device, config = self.accelerator.device, self.config
        each = peak(torch.cuda.get_device_name(device), config.precision) if device.type == "cuda" else None
        summary = summarise(
            config,
            self.state.state_dict(config, self.reporter.metrics.position),
            model=self.state.model,
            evaluations=self.reporter.metrics.read("evaluation") if self.is_main else [],
            flops=self.flops,
            peak=each and each * self.accelerator.num_processes,
        ) | {"class_names": [*self.source.class_names]}
        self.accelerator.wait_for_everyone()
        self.reporter.trackers.finish()
        return summary

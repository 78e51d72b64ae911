"""What a training tells: the terminal, metrics.jsonl, pictures, experiment trackers; one face for all of them."""

import time
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from pretrain.config.schema import Config, flat
from pretrain.core.console import Display, duration
from pretrain.core.files import atomic_write
from pretrain.data.sources import Source
from pretrain.training import plots
from pretrain.training.metrics_log import MetricsLog
from pretrain.training.state import TrainState
from pretrain.training.trackers import Trackers


class Reporter:
    """Reports a run; rank 0 alone speaks and writes. Use it as a context.

    Args:
        config: the run's settings.
        accelerator: accelerate's, with the trackers that the run was given.
        display: the terminal.
        remembered: what scores are made of, "loss" or "score".
        position: length in bytes of metrics.jsonl at the checkpoint that the run goes on from; 0 of a new one.
    """

    def __init__(self, config: Config, accelerator: Any, display: Display, remembered: str, position: int) -> None:
        self.config, self.display, self.remembered = config, display, remembered
        self.main = accelerator.is_main_process
        self.metrics = MetricsLog(config.output_dir / "metrics.jsonl", position, self.main, display.print)
        self.trackers = Trackers(accelerator, flat(config.to_dict()), self.main, display.print)

    def __enter__(self) -> "Reporter":
        self.display.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.display.__exit__(*error)

    def begin_epoch(self, state: TrainState) -> None:
        """From here on an epoch's seconds and images are counted, or those of what a resume left of it."""
        self._began, self._seconds, self._seen = time.monotonic(), state.seconds, state.infobatch.seen

    def clock(self) -> float:
        """Seconds of training so far."""
        return self._seconds + time.monotonic() - self._began

    def step(self, state: TrainState, epoch: int, loss: Tensor) -> None:
        """A line that is overwritten; waits for an accelerator."""
        infobatch = state.infobatch
        speed = (infobatch.seen - self._seen) / (state.seconds - self._seconds)
        skipped = 1 - infobatch.length / infobatch.size
        self.display.show_progress(
            epoch + 1, self.config.epochs, infobatch.progress, speed, loss.detach().mean().item(), skipped
        )

    def epoch(self, state: TrainState, epoch: int) -> None:
        """The record of an epoch that is over; all ranks call it."""
        infobatch = state.infobatch
        record = {
            "epoch": epoch + 1,
            "step": state.step,
            "samples_used": infobatch.samples_used,
            "nominal_samples": (epoch + 1) * infobatch.size,
            "skipped": 1 - infobatch.length / infobatch.size,
            "reliability": infobatch.reliability,
            "ignores_scores": infobatch.ignores_scores,
            self.remembered: infobatch.mean(),
            "lr": state.optimizer.param_groups[0]["lr"],
        }
        self.metrics.write("epoch", **record, seconds=state.seconds)
        self.trackers.log(record, state.step)
        self.display.print(
            f"epoch {epoch + 1}/{self.config.epochs}  {self.remembered} {record[self.remembered]:.4f}  "
            f"{infobatch.seen:,} samples, {record['skipped']:.1%} skipped  {duration(state.seconds)}"
        )

    def evaluation(self, epoch: int, step: int, found: dict[str, Any], picture: Tensor | None) -> None:
        """What the evaluators found, and a picture, uint8 [H, W, C]."""
        numbers = {name: value for name, value in found.items() if not isinstance(value, list)}
        self.metrics.write("evaluation", epoch=epoch, **found)
        self.trackers.log(numbers, step)
        if not self.main:
            return
        if picture is not None:
            self.picture("pictures", picture, step, f"epoch-{epoch:04d}")
        if "heldout_loss_by_level" in found:
            self.picture("loss-by-level", plots.loss_by_level(self.metrics.read("evaluation")), step)
        said = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        self.display.print(f"epoch {epoch}/{self.config.epochs}  {said}")

    def samples(self, state: TrainState, source: Source) -> None:
        """A sheet of the least and the most used images, where there is a difference."""
        sheet = plots.visits(state.visits, state.infobatch.score, source) if self.main else None
        if sheet is not None:
            self.picture("visits", sheet, state.step)

    def picture(self, name: str, picture: Tensor, step: int, file: str | None = None) -> None:
        """Write a picture, uint8 [H, W, C]; what fails is told, the training goes on."""
        path: Path = self.config.output_dir / "pictures" / f"{file or name}.png"
        with self.display.warn_on_error(f"writing {path}"), atomic_write(path) as part:
            Image.fromarray(picture.squeeze(-1).numpy()).save(part, "PNG")
        self.trackers.show(name, picture.numpy(), step)

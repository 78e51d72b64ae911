"""Everything that a run reports: the terminal, metrics.jsonl, pictures, experiment trackers."""

import time
from collections.abc import Callable
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
    """Reports a run, on rank 0 only. Use it as a context manager.

    Args:
        config: settings of the run.
        accelerator: accelerate's `Accelerator`, with the run's trackers.
        display: the terminal.
        loss_name: name of the mean loss in reports: "score" if the adapter returns scores, else "loss".
        metrics_length: length of metrics.jsonl in bytes at the checkpoint that the run continues from; 0 for a new run.
    """

    def __init__(self, config: Config, accelerator: Any, display: Display, loss_name: str, metrics_length: int) -> None:
        self.config, self.display, self.loss_name = config, display, loss_name
        self.main = accelerator.is_main_process
        self.metrics = MetricsLog(config.output_dir / "metrics.jsonl", metrics_length, self.main, display.print)
        self.trackers = Trackers(accelerator, flat(config.to_dict()), self.main, display.print)

    def __enter__(self) -> "Reporter":
        self.display.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.display.__exit__(*error)

    def begin_epoch(self, state: TrainState) -> None:
        """Start to measure the time and speed of an epoch, or of the rest of it after a resume."""
        self._began, self._seconds, self._seen = time.monotonic(), state.seconds, state.infobatch.seen

    def training_seconds(self) -> float:
        """Seconds of training so far, without evaluations and earlier interruptions."""
        return self._seconds + time.monotonic() - self._began

    def step(self, state: TrainState, epoch: int, loss: Tensor) -> None:
        """Update the live line of the terminal.

        Args:
            state: of the run.
            epoch: from 0.
            loss: of a micro-batch of this rank, [B]. Synchronizes with its device.
        """
        infobatch = state.infobatch
        speed = (infobatch.seen - self._seen) / (state.seconds - self._seconds)
        skipped = 1 - infobatch.length / infobatch.size
        self.display.show_progress(
            epoch + 1, self.config.epochs, infobatch.progress, speed, loss.detach().mean().item(), skipped
        )

    def epoch(self, state: TrainState, epoch: int) -> None:
        """Report an epoch, from 0, at its end; all ranks must call it."""
        infobatch = state.infobatch
        record = {
            "epoch": epoch + 1,
            "step": state.step,
            "samples_used": infobatch.samples_used,
            "nominal_samples": (epoch + 1) * infobatch.size,
            "skipped": 1 - infobatch.length / infobatch.size,
            "reliability": None if self.config.blocking.share else infobatch.reliability,  # blocked: scores of others
            "ignores_scores": infobatch.ignores_scores,
            self.loss_name: infobatch.mean(),
            "lr": state.optimizer.param_groups[0]["lr"],
        }
        self.metrics.write("epoch", **record, seconds=state.seconds)
        self.trackers.log(record, state.step)
        self.display.print(
            f"epoch {epoch + 1}/{self.config.epochs}  {self.loss_name} {record[self.loss_name]:.4f}  "
            f"{infobatch.seen:,} samples, {record['skipped']:.1%} skipped  {duration(state.seconds)} of training so far"
        )

    def evaluation(self, epochs: int, step: int, metrics: dict[str, Any], picture: Tensor | None) -> None:
        """Report an evaluation.

        Args:
            epochs: of training so far.
            step: optimizer steps so far.
            metrics: numbers, or lists of numbers, by name.
            picture: a preview, uint8 [H, W, C].
        """
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        self.metrics.write("evaluation", epoch=epochs, **metrics)
        self.trackers.log(numbers, step)
        if not self.main:
            return
        if picture is not None:
            self.picture("pictures", lambda: picture, step, f"epoch-{epochs:04d}")
        if "validation_loss_by_level" in metrics:
            self.picture("loss-by-level", lambda: plots.loss_by_level(self.metrics.read("evaluation")), step)
        values = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        self.display.print(f"epoch {epochs}/{self.config.epochs}  {values}" if epochs else f"before training  {values}")

    def sample_counts(self, state: TrainState, source: Source) -> None:
        """Draw the images that were used least and most often, if there is a difference."""
        if self.main:
            used, score = state.times_used, state.infobatch.score
            self.picture("times-used", lambda: plots.sample_counts(used, score, source), state.step)

    def picture(self, name: str, draw: Callable[[], Tensor | None], step: int, file: str | None = None) -> None:
        """Draw a picture and write it to the run's pictures/ and to the trackers; a failure is a warning.

        Args:
            name: for the trackers.
            draw: returns the picture, uint8 [H, W, C], or None if there is nothing to draw.
            step: optimizer steps so far.
            file: name of the file, without suffix; default: `name`.
        """
        path: Path = self.config.output_dir / "pictures" / f"{file or name}.png"
        with self.display.warn_on_error(f"the picture {path}", Exception):  # of a plotting library, an image, the disk
            picture = draw()
            if picture is not None:
                with atomic_write(path) as part:
                    Image.fromarray(picture.squeeze(-1).numpy()).save(part, "PNG")
                self.trackers.log_image(name, picture.numpy(), step)

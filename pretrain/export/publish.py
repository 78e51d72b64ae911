"""The end of a training program: write the model, its card and the summary, and upload them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write
from pretrain.export import hub, model_card
from pretrain.training.run import Run
from pretrain.training.summary import summary_rows


def publish(run: Run, summary: dict[str, Any], export: Callable[[nn.Module, Path], str]) -> None:
    """Write the EMA model with its card and summary.json, print the summary, and upload the model, on rank 0.

    All ranks call it.

    Args:
        run: the finished run.
        summary: the run's summary.
        export: writes a model to a folder and returns an expression that opens it.

    Raises:
        UserError: a file can't be written. An upload that fails is only reported.
    """
    model = run.state.ema.model
    if not run.is_main:
        return
    config, display = run.config, run.reporter.display
    try:
        summary["open_model_with"] = export(model, config.output_dir / "model")
        model_card.write(config, summary)
        with atomic_write(config.output_dir / "summary.json") as part:
            part.write_text(json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"the model can't be written: {error}; the training is complete, --resume writes the model"
        ) from None
    display.print_summary(summary_rows(summary))
    if config.push_to_hub:
        try:
            display.print(f"uploaded     {hub.push(config.push_to_hub, config, summary)}")
        except UserError as error:
            display.print(f"error: {error}")

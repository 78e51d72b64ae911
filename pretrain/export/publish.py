"""What a program does with a run that is over: write the model, its card and the summary, and upload them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write
from pretrain.export import hub, model_card
from pretrain.training.run import Run
from pretrain.training.summary import summary_rows


def publish(run: Run, summary: dict[str, Any], export: Callable[[nn.Module, Path], str]) -> None:
    """Write the averaged model with its card and summary.json, and say what the run came to; rank 0 alone does it.

    Args:
        run: that is over.
        summary: what it came to.
        export: writes a model to a folder and says how it is opened.

    Raises:
        UserError: it can't be written.
    """
    if not run.is_main:
        return
    config, display = run.config, run.reporter.display
    try:
        summary["open_model_with"] = export(run.state.ema.model, config.output_dir / "model")
        model_card.write(config, summary)
        with atomic_write(config.output_dir / "summary.json") as part:
            part.write_text(json.dumps(summary, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"the model can't be written: {error}; the training is done, --resume writes it") from None
    display.print_summary(summary_rows(summary))
    if config.push_to_hub:  # the run is whole whatever becomes of it
        try:
            display.print(f"uploaded     {hub.push(config.push_to_hub, config, summary)}")
        except UserError as refusal:
            display.print(f"error: {refusal}")

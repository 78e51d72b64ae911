"""Pictures of the run itself, uint8 [H, W, 3]: how the loss fell at each level, and who was skipped."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.grid import grid
from pretrain.data.images import on_device
from pretrain.data.sources import Source

SHOWN = 12  # images in a row of the sheet
INK, PALE = "#1b4f8a", "#b9c4d0"


def _figure(width: float, height: float) -> Any:
    """An empty figure, without pyplot: that would keep it, and look for a screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _drawn(figure: Any) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3])


def loss_by_level(evaluations: list[dict[str, Any]]) -> Tensor:
    """The validation loss over the levels: before training, in between, and now.

    Args:
        evaluations: as the journal has them, oldest first; a level without a loss is left out.
    """
    figure = _figure(6.0, 3.6)
    axes = figure.subplots()
    every = [(record["epoch"], record["validation_loss_by_level"]) for record in evaluations]
    for number, (epoch, losses) in enumerate(every):
        last = number == len(every) - 1
        name = "before training" if epoch == 0 else f"after epoch {epoch}" if last else None
        centres = [(bin + 0.5) / len(losses) for bin in range(len(losses))]
        colour, dashed = (INK if last else PALE), (epoch == 0 and not last)
        shown = [(centre, loss) for centre, loss in zip(centres, losses, strict=True) if loss is not None]
        axes.plot(*zip(*shown, strict=True), "o--" if dashed else "o-", ms=4 if last else 2.5, color=colour, label=name)
    values = [value for _, losses in every for value in losses if value is not None]
    if values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlim=(0, 1), xlabel="level (0: least noise or mask, 1: most)", ylabel="validation loss")
    axes.spines[["top", "right"]].set_visible(False)
    if every:  # none is left of a run whose folder was removed
        axes.legend(frameon=False)
    return _drawn(figure)


def visits(count: Tensor, score: Tensor, source: Source) -> Tensor | None:
    """The images that were visited least and most; None where all were visited alike, or none can be read.

    Args:
        count: int [N], visits of each image.
        score: float32 [N], by which images of as many visits are put in order: the best learned of the least visited,
            the worst learned of the most.
        source: whose training images they are; latents are decoded.
    """
    least, most = int(count.min()), int(count.max())
    if least == most:
        return None
    known = score.nan_to_num(nan=1.0)
    device = source.autoencoder.network.device if source.autoencoder else torch.device("cpu")
    rows = []
    for name, key in (("least", count + known / (known.max() + 1)), ("most", -count - known / (known.max() + 1))):
        index = key.double().argsort(stable=True)[:SHOWN]
        batch = next(source.train.batches(index.tolist(), SHOWN), None)
        if batch is None:
            return None
        rows.append((name, count[batch.index], source.seen(on_device(batch, device).image)))
    figure = _figure(9.0, 2.6)
    for axes, (name, times, shown) in zip(figure.subplots(2), rows, strict=True):
        picture = grid(shown, columns=SHOWN).numpy()
        axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=255)
        low, high = int(times.min()), int(times.max())
        axes.set_title(f"visited {name}: {low if low == high else f'{low} to {high}'} times", loc="left", fontsize=9)
        axes.axis("off")
    return _drawn(figure)

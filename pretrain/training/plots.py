"""Pictures of runs, uint8 [H, W, 3]: curves, the validation loss by level, which images were used least and most."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.grid import grid
from pretrain.data.images import on_device
from pretrain.data.sources import Source

Points = Sequence[tuple[float, float]]  # (x, y)

COLUMNS = 12  # images in each row of `sample_counts`
DARK = "#1b4f8a"


def _figure(width: float, height: float) -> Any:
    """An empty figure, without pyplot, which would keep a reference to it and look for a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _draw(figure: Any) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3])


def loss_by_level(evaluations: list[dict[str, Any]]) -> Tensor:
    """Plot the validation loss over the levels: at first, in between, the later the darker, and now.

    Args:
        evaluations: records of metrics.jsonl, oldest first; a level without a loss (None) is left out.

    Returns:
        uint8 [H, W, 3].
    """
    figure = _figure(6.0, 3.6)
    axes = figure.subplots()
    curves = [(record["epoch"], record["validation_loss_by_level"]) for record in evaluations]
    for number, (epoch, losses) in enumerate(curves):
        first, last = number == 0, number == len(curves) - 1
        name = "before training" if epoch == 0 else f"after epoch {epoch}" if first or last else None
        centres = [(bin + 0.5) / len(losses) for bin in range(len(losses))]
        points = [(centre, loss) for centre, loss in zip(centres, losses, strict=True) if loss is not None]
        style, alpha = "o--" if epoch == 0 and not last else "o-", 0.25 + 0.75 * (number + 1) / len(curves)
        axes.plot(*zip(*points, strict=True), style, ms=4 if last else 2.5, color=DARK, alpha=alpha, label=name)
    values = [value for _, losses in curves for value in losses if value is not None]
    if values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    else:
        low, high = min([0.0, *values]), max([0.0, *values])  # EDM's loss with learned uncertainty can be negative
        axes.set_ylim(low, high + 0.05 * (high - low or 1))
    axes.set(xlim=(0, 1), xlabel="level (0: least noise or mask, 1: most)", ylabel="validation loss")
    axes.spines[["top", "right"]].set_visible(False)
    if curves:  # empty if the run's folder was removed meanwhile
        axes.legend(frameon=False)
    return _draw(figure)


def lines(curves: Sequence[tuple[str, Points]], x: str, y: str, *, log: bool = False) -> Tensor | None:
    """Plot curves in one picture.

    Args:
        curves: names and points; a curve without points is left out.
        x, y: names of the axes.
        log: use a logarithmic y-axis where all values are above 0.

    Returns:
        uint8 [H, W, 3]; None if no curve has points.
    """
    shown = [(f"C{number}", name, points) for number, (name, points) in enumerate(curves) if points]
    if not shown:
        return None
    figure = _figure(6.0, 3.2)
    axes = figure.subplots()
    for colour, name, points in shown:  # a name has its colour in all pictures of the same names
        few = len(points) < 30
        label = axes.plot(*zip(*points, strict=True), "o-" if few else "-", ms=3, color=colour)[0]
        label.set_label("\u200b" + name.replace("$", r"\$"))  # a name that begins with _ would be left out
    if log and min(value for _, _, points in shown for _, value in points) > 0:
        axes.set_yscale("log")
    axes.set(xlabel=x, ylabel=y)
    if x == "epoch" and max(len(points) for _, _, points in shown) == 1:
        axes.set_xticks(sorted({points[0][0] for _, _, points in shown}))
    elif x == "epoch":
        axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _draw(figure)


def histogram(values: Tensor, x: str) -> Tensor:
    """Plot the distribution of values, float [N]; the largest 0.1 % are counted in the last bin.

    Args:
        values: finite numbers.
        x: name of the axis.

    Returns:
        uint8 [H, W, 3].
    """
    high = torch.tensor(np.quantile(values.numpy(), 0.999))
    figure = _figure(6.0, 2.8)
    axes = figure.subplots()
    axes.hist(values.clamp(max=high).numpy(), bins=60, color=DARK)
    axes.set(xlabel=x, ylabel="samples")
    axes.spines[["top", "right"]].set_visible(False)
    return _draw(figure)


def sample_counts(count: Tensor, score: Tensor, source: Source) -> Tensor | None:
    """Draw the images that were used least and most often, with their scores.

    Args:
        count: int [N]; how often each image was used.
        score: float32 [N]; orders images of the same count: low scores first among the least used, high scores first
            among the most used. NaN counts as 1.
        source: of the images; latents are decoded.

    Returns:
        uint8 [H, W, 3]; None if all images were used equally often, or none of them can be read.
    """
    least, most = int(count.min()), int(count.max())
    if least == most:
        return None
    known, score = score, score.nan_to_num(nan=1.0)
    device = source.autoencoder.network.device if source.autoencoder else torch.device("cpu")
    rows = []
    for name, key in (("least", count + score / (score.max() + 1)), ("most", -count - score / (score.max() + 1))):
        index = key.double().argsort(stable=True)[:COLUMNS]
        batch = next(source.train.batches(index.tolist(), COLUMNS), None)
        if batch is None:
            return None
        rows.append((name, count[batch.index], known[batch.index], source.seen(on_device(batch, device).image)))
    figure = _figure(9.0, 2.9)
    for axes, (name, times, scores, shown) in zip(figure.subplots(2), rows, strict=True):
        picture = grid(shown, columns=COLUMNS).numpy()
        axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=255)
        low, high = int(times.min()), int(times.max())
        title = f"used {name}: {low if low == high else f'{low} to {high}'} times; scores"
        axes.set_title(title, loc="left", fontsize=9)
        centres = [(column + 0.5) * picture.shape[1] / COLUMNS for column in range(len(scores))]
        axes.set_xticks(centres, ["none" if s.isnan() else f"{s:.3g}" for s in scores], fontsize=8)
        axes.tick_params(length=0)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    return _draw(figure)

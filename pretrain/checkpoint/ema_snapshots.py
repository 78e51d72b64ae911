"""Power averages of any sigma_rel, made after the run from snapshots of a few.

    pretrain ema RUN --sigma-rel 0.075 -o average.safetensors

By Karras et al. 2024 ("Analyzing and improving the training dynamics of diffusion models", section 3 and appendix C):
what an average weighs is a function of time; those of the snapshots are combined into the one that comes closest to
what is asked for, in the mean square, and their parameters are combined likewise.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.checkpoint import storage
from pretrain.checkpoint.ema import EMACollection, exponent
from pretrain.config.tyro_parser import run_command
from pretrain.core.console import Display
from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write


class Snapshots:
    """Writes a run's power averages now and then: one file a sigma_rel, with the parameters' own names.

    Args:
        folder: of the files; those of steps yet to be made (of another past) are removed from it.
        averages: of the run.
        count: how often in a whole run, evenly over progress.
        epochs: of a whole run.
        step: optimizer steps made.
        writes: whether this process is the one that writes.
    """

    def __init__(
        self, folder: Path, averages: EMACollection, count: int, epochs: int, step: int, *, writes: bool
    ) -> None:
        self.folder, self.averages, self.count, self.epochs, self.writes = folder, averages, count, epochs, writes
        self.taken = self._due()
        for path in folder.glob("step-*") if writes else ():
            if path.suffix == ".part" or int(path.name.split("-")[1]) > step:
                path.unlink()

    def _due(self) -> int:
        return int(self.averages.progress * self.count + 1e-9)  # 0.29 * 100 is less than 29

    def take(self, step: int) -> None:
        """Write the averages as they are after a step, if it is time; before that step's checkpoint."""
        due = self._due()
        if due > self.taken and self.writes and self.averages.powers:
            self.folder.mkdir(exist_ok=True)
            for sigma_rel, average in self.averages.powers.items():
                file = self.folder / f"step-{step:08d}-sigma_rel-{sigma_rel}.safetensors"
                # In epochs, which stay what they are if the run is given more of them. One entry: the order of several
                # in the file would be another one each time.
                about = json.dumps({"sigma_rel": sigma_rel, "epochs": self.averages.progress * self.epochs})
                with atomic_write(file) as part:
                    storage.write(part, average.model.state_dict(), {"snapshot": about})
        self.taken = due


class Snapshot(NamedTuple):
    """A power average as it was once."""

    sigma_rel: float
    epochs: float  # nominal, until then


def overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Integral of the product of what two averages weigh, each (gamma + 1) / T * (t / T)^gamma from 0 to its end T.

    Args:
        one, other: gamma and T, float64 [2, ...].
    """
    first = one[1] <= other[1]
    (gamma, end), (late_gamma, late_end) = np.where(first, one, other), np.where(first, other, one)
    return (gamma + 1) * (late_gamma + 1) / ((gamma + late_gamma + 1) * late_end) * (end / late_end) ** late_gamma


def combination(snapshots: Sequence[Snapshot], wanted: Snapshot) -> tuple[np.ndarray, float]:
    """What each snapshot counts for in the average that is wanted, and how far off it then is.

    The counts sum to 1, which least squares alone does not see to: parameters that never changed stay what they are.

    Returns:
        the counts, float64 [S], and the root of the mean squared error of what is weighed, as a share of its own size.
    """
    have = np.array([[exponent(one.sigma_rel) for one in snapshots], [one.epochs for one in snapshots]])
    want = np.array([[exponent(wanted.sigma_rel)], [wanted.epochs]])
    scale = 1 / np.sqrt(overlap(have, have))
    products = overlap(have[:, :, None], have[:, None, :]) * np.outer(scale, scale)
    aims = overlap(have, want) * scale
    value, vector = np.linalg.eigh(products)
    known = value > 1e-12 * value.max()  # of the others float64 knows nothing
    inverse = (vector[:, known] / value[known]) @ vector[:, known].T
    count = inverse @ (aims - scale * (scale @ inverse @ aims - 1) / (scale @ inverse @ scale))
    size = overlap(want, want).item()
    error = (count @ products @ count - 2 * count @ aims + size) / size
    return count * scale, max(error, 0.0) ** 0.5


def reconstruct(run: Path, sigma_rel: float) -> tuple[dict[str, Tensor], float]:
    """The power average of a sigma_rel at a run's last snapshot.

    Args:
        run: the run's folder.
        sigma_rel: sigma_rel, above 0 and at most 0.28.

    Returns:
        the parameters by name, for `load_state_dict` of the run's network; and the error, see `combination`.

    Raises:
        UserError: there are no snapshots, or one can't be read.
        ValueError: there is no such sigma_rel.
    """
    exponent(sigma_rel)
    files = sorted((run / "ema").glob("step-*.safetensors"))
    if not files:
        raise UserError(
            f"{run}: there are no snapshots of averages there; name the --output-dir of a run that was given "
            "--ema.sigma-rel, and see that it has come as far as the first"
        )
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            snapshots = [Snapshot(**json.loads(file.metadata()["snapshot"])) for file in opened]
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{run}: a snapshot in its ema/ can't be read: {error}") from None
        last = max(range(len(snapshots)), key=lambda n: snapshots[n].epochs)
        counts, error = combination(snapshots, Snapshot(sigma_rel, snapshots[last].epochs))
        found = {}
        for name in opened[last].keys():  # noqa: SIM118
            newest = opened[last].get_tensor(name)
            if newest.is_floating_point():
                total = torch.zeros_like(newest, dtype=torch.float64)
                for file, count in zip(opened, counts.tolist(), strict=True):
                    total += count * file.get_tensor(name).double()
                newest = total.to(newest.dtype)
            found[name] = newest
    return found, error


def main(
    run: tyro.conf.Positional[Path],
    sigma_rel: float,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
) -> None:
    """Write the power average of a sigma_rel, made from a run's snapshots; `pretrain export --sigma-rel` exports it.

    Args:
        run: the run's folder.
        sigma_rel: of the average (sigma_rel), above 0 and at most 0.28.
        output: file for the parameters, safetensors.
    """
    try:
        tensors, error = reconstruct(run, sigma_rel)
        storage.write(output, tensors)
    except (OSError, SafetensorError, ValueError) as refusal:
        raise refusal if isinstance(refusal, UserError) else UserError(str(refusal)) from None
    Display(True).print(f"{output}: the average of sigma_rel {sigma_rel}, {error:.1%} off what it should weigh")


def run() -> None:
    """The command."""
    run_command(main, "pretrain ema")

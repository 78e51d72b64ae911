"""Power-function EMAs of any sigma_rel, reconstructed after the run from snapshots of a few.

    pretrain ema RUN --sigma-rel 0.075 -o ema.safetensors

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", section 3 and appendix C: an
EMA is an integral of the parameters over time with a known weight function. The linear combination of the snapshots'
weight functions that is closest to the target's, by least squares, is applied to the snapshots' parameters.
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
from pretrain.core.files import own_folder
from pretrain.distributed.sharding import full_state_dict


class Snapshots:
    """Writes snapshots of a run's power-function EMAs: one file per snapshot and sigma_rel.

    Args:
        folder: of the files; files of steps after `step` are removed from it, since the run will write them again.
        emas: of the run.
        count: snapshots in the whole run, evenly over progress.
        epochs: of the whole run.
        step: optimizer steps made so far.
        writes: whether this process writes (rank 0).
    """

    def __init__(self, folder: Path, emas: EMACollection, count: int, epochs: int, step: int, *, writes: bool) -> None:
        self.folder, self.emas, self.count, self.epochs, self.writes = folder, emas, count, epochs, writes
        self.taken = self._due()
        for path in folder.glob("step-*") if writes else ():
            if path.suffix == ".part" or int(path.name.split("-")[1]) > step:
                path.unlink()

    def _due(self) -> int:
        """How many snapshots a run at this progress has."""
        return int(self.emas.progress * self.count + 1e-9)  # 0.29 * 100 is less than 29

    def take(self, step: int) -> None:
        """Write a snapshot if one is due after this step; all ranks call it before the step's checkpoint is written.

        Raises:
            OSError: it can't be written.
        """
        due = self._due()
        for sigma_rel, ema in self.emas.powers.items() if due > self.taken else ():
            tensors = full_state_dict(ema.model)
            if self.writes:
                own_folder(self.folder)
                file = self.folder / f"step-{step:08d}-sigma_rel-{sigma_rel}.safetensors"
                # In epochs, which stay valid if a resumed run is given more of them. One entry of metadata, because
                # safetensors writes several in an order that changes from run to run.
                about = json.dumps({"sigma_rel": sigma_rel, "epochs": self.emas.progress * self.epochs})
                storage.write(file, tensors, {"snapshot": about})
        self.taken = due


class Snapshot(NamedTuple):
    """What the weight function of a power-function EMA depends on.

    Attributes:
        sigma_rel: its width.
        epochs: of training when it was taken, skipped samples included; a float.
    """

    sigma_rel: float
    epochs: float


def overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Inner products of weight functions w(t) = (gamma + 1) / T * (t / T)^gamma on [0, T], in closed form.

    Karras et al. 2024, appendix C.

    Args:
        one, other: gamma and T, float64 [2, ...]; broadcast.

    Returns:
        float64 [...].
    """
    first = one[1] <= other[1]
    (gamma, end), (late_gamma, late_end) = np.where(first, one, other), np.where(first, other, one)
    return (gamma + 1) * (late_gamma + 1) / ((gamma + late_gamma + 1) * late_end) * (end / late_end) ** late_gamma


def combination(snapshots: Sequence[Snapshot], target: Snapshot) -> tuple[np.ndarray, float]:
    """Coefficients of the snapshots in the EMA `target`, by least squares over their weight functions.

    The coefficients are constrained to sum to 1, so that parameters that never changed keep their value (plain least
    squares does not ensure this).

    Args:
        snapshots: S of them.
        target: the EMA to reconstruct.

    Returns:
        The coefficients, float64 [S], and the relative error of the weight function: the norm of the difference over
        the norm of the target's.
    """
    have = np.array([[exponent(one.sigma_rel) for one in snapshots], [one.epochs for one in snapshots]])
    want = np.array([[exponent(target.sigma_rel)], [target.epochs]])
    scale = 1 / np.sqrt(overlap(have, have))
    products = overlap(have[:, :, None], have[:, None, :]) * np.outer(scale, scale)
    aims = overlap(have, want) * scale
    value, vector = np.linalg.eigh(products)
    resolved = value > 1e-12 * value.max()  # smaller eigenvalues are rounding errors of float64
    inverse = (vector[:, resolved] / value[resolved]) @ vector[:, resolved].T
    coefficient = inverse @ (aims - scale * (scale @ inverse @ aims - 1) / (scale @ inverse @ scale))
    size = overlap(want, want).item()
    error = (coefficient @ products @ coefficient - 2 * coefficient @ aims + size) / size
    return coefficient * scale, max(error, 0.0) ** 0.5


def reconstruct(run: Path, sigma_rel: float) -> tuple[dict[str, Tensor], float]:
    """Reconstruct the power-function EMA of a sigma_rel at the time of a run's last snapshot.

    Args:
        run: the run's folder.
        sigma_rel: above 0 and at most 0.28.

    Returns:
        The parameters and buffers by name, for `load_state_dict` of the run's network, and the relative error of
        `combination`.

    Raises:
        UserError: there are no snapshots, or one can't be read.
        ValueError: sigma_rel is out of its range.
    """
    exponent(sigma_rel)
    files = sorted((run / "ema").glob("step-*.safetensors"))
    if not files:
        raise UserError(
            f"{run}: there are no snapshots of EMAs in it; name the --output-dir of a run that was started with "
            "--ema.sigma-rel and has reached its first snapshot"
        )
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            snapshots = [Snapshot(**json.loads(file.metadata()["snapshot"])) for file in opened]
        except (OSError, SafetensorError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise UserError(f"{run}: a snapshot in its ema/ can't be read: {error}") from None
        last = max(range(len(snapshots)), key=lambda n: snapshots[n].epochs)
        coefficients, error = combination(snapshots, Snapshot(sigma_rel, snapshots[last].epochs))
        tensors = {}
        for name in opened[last].keys():  # noqa: SIM118
            newest = opened[last].get_tensor(name)
            if newest.is_floating_point():
                total = torch.zeros_like(newest, dtype=torch.float64)
                for file, coefficient in zip(opened, coefficients.tolist(), strict=True):
                    total += coefficient * file.get_tensor(name).double()
                newest = total.to(newest.dtype)
            tensors[name] = newest
    return tensors, error


def main(
    run: tyro.conf.Positional[Path],
    sigma_rel: float,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
) -> None:
    """Reconstruct an EMA of another width from the snapshots of a run that was trained with --ema.sigma-rel.

    `pretrain export`, `generate` and `evaluate` do the same with their --sigma-rel.

    Args:
        run: folder of the run.
        sigma_rel: standard deviation of its weights as a share of the training (Karras et al. 2024), at most 0.28.
        output: safetensors file to write the parameters to.
    """
    try:
        tensors, error = reconstruct(run, sigma_rel)
        storage.write(output, tensors)
    except (OSError, SafetensorError, ValueError) as failure:
        raise failure if isinstance(failure, UserError) else UserError(str(failure)) from None
    Display(True).print(
        f"{output}: the EMA of sigma_rel {sigma_rel}; relative error of its weight function {error:.1%}"
    )


def run() -> None:
    """Run the command `pretrain ema`."""
    run_command(main, "pretrain ema")

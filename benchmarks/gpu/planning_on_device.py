"""benchmarks/planning.py with its tensors on the device; started by `benchmarks/gpu/run planning`."""

from pathlib import Path

import planning
import torch
import tyro


def main(work: Path, data: Path, toy: bool = False) -> None:
    """Measure planning and steps with 1.28 and 100 million samples.

    Args:
        work: folder for planning.json.
        data: not used.
        toy: 100,000 samples only.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (100_000,) if toy else (1_280_000, 100_000_000)
    planning.main(sizes=sizes, device=device, output=work / "planning.json")


if __name__ == "__main__":
    tyro.cli(main)

"""Sizes of the rehearsal: the same programs and files, small enough for two minutes on a CPU."""

from pathlib import Path

import pyarrow.parquet as pq

ROWS = {"train": 192, "test": 96}
TOY_EPOCHS = 3
_COMMON = f"--precision no --data.workers 0 --batch-size 32 --epochs {TOY_EPOCHS} --model.patch 8 --model.width 32"
TOY = {name: f"{_COMMON} --model.depth 1 --model.heads 2".split() for name in ("cifar10_dit.yaml", "cifar10_mae.yaml")}


def toy_data(data: Path, folder: Path) -> Path:
    """Write a few rows of each parquet file in `data` to a file of the same name in `folder`, and return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in ROWS.items():
        for path in sorted(data.glob(f"{split}*.parquet")):
            if not (folder / path.name).exists():
                pq.write_table(pq.read_table(path).slice(0, rows), folder / path.name)
    return folder

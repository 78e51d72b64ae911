"""The rehearsal's sizes: the same programs and files, small enough for a CPU and two minutes."""

from pathlib import Path

import pyarrow.parquet as pq

ROWS = {"train": 192, "test": 96}
TOY_EPOCHS = 3
_COMMON = f"--precision no --data.workers 0 --batch-size 32 --epochs {TOY_EPOCHS} --model.patch 8 --model.width 32"
TOY = {name: f"{_COMMON} --model.depth 1 --model.heads 2".split() for name in ("cifar10_dit.yaml", "cifar10_mae.yaml")}


def toy_data(data: Path, folder: Path) -> Path:
    """A few rows of each split, as parquet files named as the whole ones are."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in ROWS.items():
        for path in sorted(data.glob(f"{split}*.parquet")):
            if not (folder / path.name).exists():
                pq.write_table(pq.read_table(path).slice(0, rows), folder / path.name)
    return folder

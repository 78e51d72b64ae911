"""Parquet files for tests of data sets."""

import io
from pathlib import Path

import datasets
from PIL import Image


def table(rows: dict, path: Path, **features) -> None:
    """Write columns as a parquet file, some of them as given features."""
    made = datasets.Dataset.from_dict(rows)
    for name, kind in features.items():
        made = made.cast_column(name, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.to_parquet(path)


def pictures(count: int) -> list[dict]:
    """Values of an image column: one grey PNG, several times."""
    stream = io.BytesIO()
    Image.new("L", (4, 4), 7).save(stream, "PNG")
    return [{"bytes": stream.getvalue(), "path": None}] * count

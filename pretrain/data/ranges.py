"""The range of pixel values: which value is black and which is white."""

from collections.abc import Sequence

import numpy as np

BITS = (8, 10, 12, 14, 16)  # of cameras and scanners
TOLERANCE = 1e-3  # of floats, at the ends of a range


def find_range(low: float, high: float, is_float: bool) -> tuple[float, float]:
    """The range that values are of: 8 to 16 bits; of floats also 0..1 and -1..1.

    Args:
        low: smallest value of the images that were looked at.
        high: the largest.
        is_float: whether they are floating-point numbers.

    Raises:
        ValueError: none of these holds them.
    """
    slack = TOLERANCE if is_float else 0
    if is_float and -1 - slack <= low < 0 and high <= 1 + slack:
        return -1.0, 1.0
    if low >= -slack:
        if (is_float or high == 1) and high <= 1 + slack:
            return 0.0, 1.0
        for bits in BITS:
            if high <= 2**bits - 1 + slack:
                return 0.0, 2.0**bits - 1
    raise ValueError(f"values from {low:g} to {high:g}")


def scale_to_uint8(values: np.ndarray, low: float, high: float, *, clip: bool) -> np.ndarray:
    """Values as uint8, `low` as 0 and `high` as 255.

    Args:
        values: of any shape and numeric type.
        low: of the range.
        high: of the range.
        clip: cut off values outside of the range.

    Raises:
        ValueError: a value is not finite, or outside of the range without `clip`.
    """
    smallest, largest = float(values.min()), float(values.max())
    if not np.isfinite([smallest, largest]).all():
        raise ValueError("it has values that are not finite")
    slack = TOLERANCE * (high - low)
    if not clip and (smallest < low - slack or largest > high + slack):
        raise ValueError(
            f"its values span {smallest:g} to {largest:g}, more than the {low:g} to {high:g} of the images that were "
            "looked at; set --data.range LOW HIGH"
        )
    scaled = (values.astype(np.float32) - low) * (255 / (high - low))
    return scaled.clip(0, 255).round().astype(np.uint8)


def largest_of(extrema: Sequence[tuple[float, float, bool]]) -> tuple[float, float, bool]:
    """Minimum, maximum, and whether there are floats, of those of several images."""
    lows, highs, floats = zip(*extrema, strict=True)
    return min(lows), max(highs), any(floats)

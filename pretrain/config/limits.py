"""Limits of the numbers in settings: whole ones with which a program would hang without an error, infinite ones."""

import math
from typing import Any

MAX_INTEGER = 10**9
MAXIMA = {
    "seed": 2**63 - 1,
    "epochs": 10**7,
    "batch_size": 10**7,
    "micro_batch": 10**7,
    "data.size": 2**16,
    "data.channels": 2**12,
    "data.limit": 10**12,
    "data.workers": 1024,
    "evaluate.images": 10_000,
    "evaluate.steps": 100_000,
    "evaluate.seeds": 10_000,
    "adapter.timesteps": 10**6,
    "model.channels": 2**16,
    "model.layers": 1000,
    "model.patch": 2**16,
    **{f"model.{prefix}{name}": 2**16 for prefix in ("", "decoder_") for name in ("width", "heads")},
    **{f"model.{prefix}depth": 1000 for prefix in ("", "decoder_")},
}


def require_in_range(settings: dict[str, Any]) -> None:
    """Check the numbers among settings, except infinite ones of a component of the user's own.

    Args:
        settings: by dotted name.

    Raises:
        ValueError: one is too large, or not finite.
    """
    for name, value in settings.items():
        largest = MAXIMA.get(name, MAX_INTEGER)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > largest:
                raise ValueError(f"{name} must be at most {largest:,}, got {number}")
            section = name.partition(".")[0]
            own = str(settings.get(f"{section}.name", "")).endswith(".py")
            if isinstance(number, float) and not math.isfinite(number) and not own:
                raise ValueError(f"{name} must be a finite number, got {number}")

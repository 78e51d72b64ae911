"""The learning rate over progress, so that it does not notice how long an epoch is."""

import math


def warmup_cosine(progress: float, warmup: float) -> float:
    """Share of the peak rate at `progress` in [0, 1]: a linear rise over `warmup`, then half a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

"""Random numbers as functions of a key such as (seed, epoch, index), not of a generator's state.

A resumed run, and a run on another number of processes, draws the same numbers without a generator's state in its
checkpoint. The mixing function is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), once for Python integers and once for int64 tensors; the two agree (tests/core/test_rng.py).
"""

import math

import torch
from torch import Tensor

from pretrain.core.padding import sample_of

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: SplitMix64's increment
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
MASK = (1 << 64) - 1


def signed(value: int) -> int:
    """The int64 that has the same lowest 64 bits."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    value &= MASK
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        value = ((value ^ (value >> shift)) * multiplier) & MASK
    return value


def _mix_tensor(value: Tensor) -> Tensor:
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        # `>>` keeps the sign of an int64; the mask makes it the unsigned shift.
        high = (value >> shift) & ((1 << (64 - shift)) - 1)
        value = (value ^ high) * signed(multiplier)  # int64 products wrap around
    return value


def fold_seed(*parts: int) -> int:
    """A 63-bit seed from integers, for example ``fold_seed(seed, epoch, index)``."""
    state = 0
    for part in parts:
        state = _mix((state ^ part) + GOLDEN)
    return state >> 1


def generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded by `fold_seed` of the parts."""
    return torch.Generator().manual_seed(fold_seed(*parts))


class SampleRNG:
    """Random numbers per sample: row i depends on the key and ``index[i]`` alone.

    Successive calls give fresh numbers; a new object with the same arguments gives the same ones again, on any device,
    in any batch, on any number of processes. All noise, masks and dropped labels come from here.

    Args:
        key: integers that the numbers depend on beside the sample, usually (seed, epoch).
        index: int64 [B]; the samples. Padding ``~i`` has the numbers of ``i``.
    """

    def __init__(self, *key: int, index: Tensor) -> None:
        state = signed(fold_seed(*key) << 1)
        self.state = _mix_tensor((sample_of(index) ^ state) + signed(GOLDEN))
        self.count = 0

    def _bits(self, n: int) -> Tensor:
        """int64 [B, n], all 64 bits random."""
        step = torch.arange(self.count + 1, self.count + 1 + n, device=self.state.device)
        self.count += n
        return _mix_tensor(self.state[:, None] + step * signed(GOLDEN))

    def uniform(self, *shape: int) -> Tensor:
        """float32 [B, *shape] in [0, 1)."""
        bits = self._bits(math.prod(shape))
        return (((bits >> 40) & 0xFFFFFF).float() * 2.0**-24).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """float32 [B, *shape], standard normal, by the method of Box and Muller (1958)."""
        n = math.prod(shape)
        bits = self._bits((n + 1) // 2)
        # 32 bits each; the half keeps the logarithm's argument above 0 (so |z| < 6.7).
        radius = ((bits & 0xFFFFFFFF).float() + 0.5).mul_(2.0**-32).clamp_(max=1.0).log_().mul_(-2.0).sqrt_()
        angle = ((bits >> 32) & 0xFFFFFFFF).float().mul_(2.0 * math.pi * 2.0**-32)
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return both[:, :n].reshape(-1, *shape)

"""A plan: one epoch's order, levels and weights, a function of a `SamplingRule`, the scores and (seed, epoch).

What can be computed where it is needed is not stored: the order is a permutation evaluated at a position, a level a
function of the sample and the epoch, a weight a function of the sample's score. Stored are the selected samples, four
bytes each, and nothing if all are.
"""

# torch does not declare all types of tolist, split and from_numpy.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.core.rng import fold_seed, signed
from pretrain.infobatch.chunks import CHUNK, map_chunks
from pretrain.infobatch.permutation import permute
from pretrain.infobatch.policies import SamplingRule
from pretrain.infobatch.stratified import band_sizes, bands_of, draw_from_bands, round_sizes

SAMPLE_STEP = 0x6A09E667F3BCC909  # 2^64 (sqrt(2) - 1): from a sample's level to the next sample's
EPOCH_STEP = 0x9E3779B97F4A7C15  # 2^64 (golden ratio - 1): from a sample's level to its level in the next epoch


class Tables(NamedTuple):
    """What a weight depends on beside the sample's score, on one device."""

    edges: Tensor  # float32 [E + 1]; the last one infinite: a sample without a score lies beyond it
    weight: Tensor  # float32 [E + 2]; of each band, the last one that of samples without a score
    density: Tensor  # float32 [bins]; of levels, 1 on average
    cumulative: Tensor  # float32 [bins]; share of the levels below each bin's end


class Plan:
    """Which samples an epoch uses, in which order, at what level and with what weight.

    Args:
        rule: the share of each band of scores that is used, and the density of levels.
        score: float32 [N] on the CPU, NaN where unknown; it must not change while the plan is in use.
        key: (seed, epoch); all random draws are functions of it.
        ignore_scores: draw as many samples as the rule does, uniformly among those that have a score.

    Attributes:
        size: N.
        length: K, the samples used.
        selected: int [K], the samples in no particular order; None if all N are used.
    """

    def __init__(self, rule: SamplingRule, score: Tensor, key: tuple[int, int], *, ignore_scores: bool = False) -> None:
        self.size, self.key = len(score), key
        edges = rule.edges
        band = bands_of(score, edges)
        n = band_sizes(band, len(edges) + 2)
        keep = torch.cat([rule.keep, torch.tensor([rule.unseen], dtype=torch.float64)])
        if ignore_scores:
            edges, keep = edges[:0], torch.stack([(keep * n)[:-1].sum() / n[:-1].sum().clamp(min=1), keep[-1]])
            band = (band == len(n) - 1).view(np.uint8)
            n = torch.stack([n[:-1].sum(), n[-1]])
        k = round_sizes(keep * n, n)
        self.length = int(k.sum())
        self.selected = None if self.length == self.size else draw_from_bands(band, n.numpy(), k.numpy(), key)
        density = rule.density if rule.density is not None else torch.ones(1, dtype=torch.float64)
        density = density / density.mean()
        weight = n / k.clamp(min=1)
        cumulative = density.cumsum(0) / len(density)
        edges = torch.cat([edges, torch.full((1,), torch.inf, dtype=torch.float32)])
        self._tables = {edges.device: Tables(edges, weight.float(), density.float(), cumulative.float())}
        self._score = score

    def _on(self, device: torch.device) -> Tables:
        """The tables on a device; copied there once."""
        if device not in self._tables:
            self._tables[device] = Tables(*(table.to(device) for table in self._tables[torch.device("cpu")]))
        return self._tables[device]

    # -- by position: the order ----------------------------------------------------------------------

    def at(self, position: np.ndarray) -> np.ndarray:
        """int64; the samples at these positions of the epoch, int64 in [0, K)."""
        place = permute(position, self.length, fold_seed(*self.key, 0))
        return place if self.selected is None else self.selected[place].astype(np.int64)

    def samples(self, start: int, step: int = 1) -> Iterator[int]:
        """The samples at positions start, start + step, ..."""
        for first in range(start, self.length, CHUNK * step):
            yield from self.at(np.arange(first, min(first + CHUNK * step, self.length), step)).tolist()

    def parts(self, count: int) -> np.ndarray:
        """uint8 [N]; in which of `count` equal parts of the epoch each sample is used; 0 where it is not."""
        part = np.zeros(self.size, dtype=np.uint8)

        def fill(first: int) -> None:
            position = np.arange(first, min(first + CHUNK, self.length))
            part[self.at(position)] = position * count // self.length

        for _ in map_chunks(fill, self.length):
            pass
        return part

    def left(self, used: Tensor, count: int) -> tuple[np.ndarray, bool]:
        """The samples of the epoch that are not marked in `used`, bool [N], in their order, int64.

        The second value: whether all samples from position `count` on are among them.
        """
        table = used.cpu().numpy()

        def find(first: int) -> tuple[np.ndarray, bool]:
            index = self.at(np.arange(first, min(first + CHUNK, self.length)))
            marked = table[index]
            return index[~marked], not marked[max(count - first, 0) :].any()

        found = list(map_chunks(find, self.length))
        return np.concatenate([index for index, _ in found]), all(in_order for _, in_order in found)

    # -- by sample -----------------------------------------------------------------------------------

    def _uniform(self, index: Tensor) -> Tensor:
        """float32 in [0, 1): the level before the density is applied.

        A Kronecker sequence in two dimensions, samples and epochs, shifted by the seed: any run of consecutive samples,
        and the epochs of one sample, cover the axis evenly.
        """
        seed, epoch = self.key
        start = fold_seed(seed, 1) * 2 + epoch * EPOCH_STEP
        bits = index * signed(SAMPLE_STEP) + signed(start)  # products of int64 wrap around: that is the fraction
        return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24

    def level_of(self, index: Tensor) -> Tensor:
        """float32 [B] in [0, 1); the levels of samples, int64 [B]."""
        uniform = self._uniform(index)
        _, _, density, cumulative = self._on(index.device)
        if len(density) == 1:
            return uniform
        bin = torch.bucketize(uniform, cumulative[:-1], right=True)
        within = (uniform - cumulative[bin]) * len(density) / density[bin] + 1  # counted from the bin's end
        return ((bin + within.clamp(0, 1)) / len(density)).clamp(max=1 - 2**-24)

    def weight_of(self, index: Tensor, score: Tensor) -> Tensor:
        """float32 [B]; 1 / (probability of being selected * density of the level).

        Args:
            index: int64 [B]; selected samples.
            score: float32 [B]; their scores.
        """
        edges, weight, density, cumulative = self._on(index.device)
        band = torch.bucketize(score.nan_to_num(nan=torch.inf), edges, right=True)
        if len(density) == 1:
            return weight[band]
        return weight[band] / density[torch.bucketize(self._uniform(index), cumulative[:-1], right=True)]

    def first_outside(self, used: Tensor) -> int | None:
        """A sample that is marked in `used`, bool [N], but not selected; None if there is none."""
        if self.selected is None:
            return None
        used = used.clone()
        used[torch.from_numpy(self.selected)] = False
        return int(used.int().argmax()) if used.any() else None

    # -- the whole, for inspection -------------------------------------------------------------------

    @property
    def order(self) -> Tensor:
        """int64 [K]; the samples in their order."""
        return torch.from_numpy(self.at(np.arange(self.length)))

    @property
    def weight(self) -> Tensor:
        """float32 [N]; the weights, 0 where not selected."""
        used = torch.arange(self.size) if self.selected is None else torch.from_numpy(self.selected).long()
        return torch.zeros(self.size, dtype=torch.float32).scatter_(0, used, self.weight_of(used, self._score[used]))

    @property
    def level(self) -> Tensor:
        """float32 [N] in [0, 1); the level of every sample, selected or not."""
        return self.level_of(torch.arange(self.size))

    def fingerprint(self) -> int:
        """A hash that differs for another rule, seed, epoch or selection."""
        probe = self.at(np.linspace(0, self.length - 1, 64).astype(np.int64))
        total = 0 if self.selected is None else int(self.selected.sum(dtype=np.int64))
        tables = torch.cat(self._on(torch.device("cpu"))).view(torch.int32)
        return fold_seed(self.length, total, *probe.tolist(), *(int(value) & 0xFFFFFFFF for value in tables))

"""A histogram of scores in one pass over their bits, and exact quantiles from it."""

# torch does not declare all types of tolist, split and from_numpy.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
from torch import Tensor

CHUNK = 1 << 20  # scores processed at a time
CELLS = 1 << 16  # a cell is the upper 16 bits of a float32: 128 cells an octave, each at most 0.8 % wide
FIRST_NOT_FINITE = 0x7F80  # cell of infinity; those of NaN follow


def histogram(score: Tensor) -> tuple[Tensor, Tensor]:
    """Number of scores in each cell, and the middle of each cell.

    Args:
        score: float32 [N], not negative; NaN is left out.

    Returns:
        float64 [CELLS] twice; cells ascend.
    """
    bits = score.view(torch.int32)
    count = torch.zeros(CELLS, dtype=torch.int64)
    for chunk in bits.split(CHUNK):
        count += torch.bincount((chunk >> 16).clamp_(min=0), minlength=CELLS)
    count[FIRST_NOT_FINITE:] = 0
    cells = torch.arange(CELLS, dtype=torch.int32)
    middle = ((cells << 16) + (1 << 15)).view(torch.float32).double()
    middle[FIRST_NOT_FINITE:] = 0
    return count.double(), middle


def cell_start(middle: Tensor) -> Tensor:
    """float32; the least score in the cell of each `middle`, float64."""
    return ((middle.float().view(torch.int32) >> 16) << 16).view(torch.float32)


def quantiles(score: Tensor, q: tuple[float, ...]) -> Tensor:
    """Exact quantiles of scores: the element of rank int(q n) among the n that are not NaN.

    Args:
        score: float32 [N], not negative, NaN where unknown.
        q: quantiles, each in [0, 1).

    Returns:
        float32 [len(q)]; zeros if all scores are NaN.
    """
    count, _ = histogram(score)
    if not count.any():
        return torch.zeros(len(q), dtype=torch.float32)
    return torch.stack([_order_statistic(score, count, int(each * count.sum().item())) for each in q])


def _order_statistic(score: Tensor, count: Tensor, rank: int) -> Tensor:
    """float32; the score of this rank, from 0, in ascending order; `count` as of `histogram`."""
    up_to = count.cumsum(0)
    cell = int((up_to > rank).nonzero()[0])
    inside = [chunk[(chunk.view(torch.int32) >> 16).clamp_(min=0) == cell] for chunk in score.split(CHUNK)]  # -0 is 0
    return torch.cat(inside).sort().values[rank - int(up_to[cell] - count[cell])]

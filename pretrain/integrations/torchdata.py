"""InfoBatch in torchdata's StatefulDataLoader.

infobatch = InfoBatch(data, epochs=100)
loader = StatefulDataLoader(Indexed(data), 64, sampler=StatefulSampler(infobatch), num_workers=8)
"""

import math
from collections.abc import Iterator, Mapping
from itertools import chain, repeat
from typing import Any

from torch.utils.data import Sampler

from pretrain.infobatch.sampler import InfoBatch


class StatefulSampler(Sampler[int]):
    """The samples of an InfoBatch, for loaders that keep the state of their sampler.

    StatefulDataLoader copies the state of its sampler for each batch that it fetches, with workers several steps before
    the loop has the batch. InfoBatch's own state would be copied as often, and a resume would use samples twice. The
    state of this sampler is one number, and InfoBatch's `state_dict()` stays the only one with scores and position.
    Save that beside the loader's, both after `infobatch(losses, index)`, and load both, in any order.

    Args:
        infobatch: whose samples are used; `infobatch.epochs()` plans them.
    """

    def __init__(self, infobatch: InfoBatch) -> None:
        self.infobatch = infobatch

    def __len__(self) -> int:
        return len(self.infobatch)

    def __iter__(self) -> Iterator[int]:
        return _Position(self.infobatch)


class _Position(Iterator[int]):
    """Indices, and how many of the epoch's samples were fetched."""

    def __init__(self, infobatch: InfoBatch) -> None:
        self._infobatch, self._fetched = infobatch, infobatch.seen
        self._indices = iter(infobatch)

    def __next__(self) -> int:
        index = next(self._indices)
        self._fetched += self._infobatch.world
        return index

    def state_dict(self) -> dict[str, int]:
        """The epoch, and its samples that were fetched over all ranks."""
        return {"epoch": self._infobatch.epoch, "fetched": self._fetched}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where InfoBatch is.

        Raises:
            ValueError: InfoBatch is further back than the loader.
        """
        infobatch = self._infobatch
        here, there = (infobatch.epoch, bool(infobatch.seen)), (state["epoch"], bool(state["fetched"]))
        if here < there:
            raise ValueError(
                f"the loader's state lies in epoch {there[0]} after {state['fetched']} samples, and InfoBatch is in "
                f"epoch {here[0]} after {infobatch.seen}; load the state of both, saved after the same step"
            )
        # With `snapshot_every_n_steps` the loader fetches again what came after its snapshot, and drops it.
        again = max(infobatch.seen - state["fetched"], 0) if infobatch.epoch == state["epoch"] else 0
        self._fetched = infobatch.seen - again
        self._indices = chain(repeat(0, math.ceil(again / infobatch.world)), iter(infobatch))

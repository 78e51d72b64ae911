"""The DataLoader: the sampler's order in every epoch."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from pretrain.config.schema import Data
from pretrain.data.images import Images
from pretrain.data.loader import EpochSampler, make_loader
from pretrain.data.sources import open_data
from pretrain.infobatch.sampler import InfoBatch


def source(path: object, **settings):
    return open_data(Data(source=str(path), **settings), seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_yields_the_samplers_order_in_every_epoch(pictures: Path, workers: int) -> None:
    images: Images = source(pictures, flip=True, workers=workers).train
    infobatch = InfoBatch(len(images), epochs=3)
    batches: DataLoader = make_loader(images, EpochSampler(infobatch), 8)
    state = torch.get_rng_state()
    for epoch in infobatch.epochs():
        seen = []
        for batch, problems in batches:
            assert not problems
            for image, index in zip(batch.image, batch.index.tolist(), strict=True):
                assert torch.equal(image, images[epoch, index].image)
            seen += batch.index.tolist()
            infobatch(batch.image.float().mean((1, 2, 3)), batch.index)
        assert seen == infobatch.plan.order.tolist()
    assert torch.equal(torch.get_rng_state(), state)

"""The cache of decoded images, and reading all of them before training."""

import pickle
from pathlib import Path

import pytest
import torch
from conftest import draw_images

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.image_cache import ImageCache, new_cache
from pretrain.data.loader import EpochSampler, make_loader
from pretrain.data.preload import preload
from pretrain.data.sources import open_data
from pretrain.infobatch.sampler import InfoBatch


def source(path: object, **settings):
    return open_data(Data(source=str(path), **settings), seed=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"flip": True, "size": 9, "channels": 3}, {"crop": 0.3}], ids=str)
def test_cached_images_are_those_decoded_anew(pictures: Path, settings: dict, workers: int, monkeypatch) -> None:
    kept, anew = (source(pictures, workers=workers, **settings).train for _ in range(2))
    anew.keepable, anew.cache = False, None
    for images in (kept, anew):
        preload(images, torch.device("cpu"), print)
    assert kept.cache and kept.cache.complete and anew.cache is None
    order = InfoBatch(len(kept), epochs=3), InfoBatch(len(kept), epochs=3)
    pairs = [
        make_loader(images, EpochSampler(infobatch), 8) for images, infobatch in zip((kept, anew), order, strict=True)
    ]
    assert [loader.num_workers for loader in pairs] == [0, workers]
    for _ in zip(order[0].epochs(), order[1].epochs(), strict=True):
        for (one, _), (other, _) in zip(*pairs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            for infobatch in order:
                infobatch(one.image.float().mean((1, 2, 3)), one.index)
    expected = [batch for batch in anew.batches(range(len(anew)), 7)]
    monkeypatch.setattr("pretrain.data.images.decode", None)  # no image is decoded any more
    for one, other in zip(kept.batches(range(len(kept)), 7), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_unreadable_image_is_not_cached(tmp_path: Path) -> None:
    """Reading is retried whenever it is used, until reading all was tried."""
    images = source(draw_images(tmp_path, 20), on_bad_image="skip").train
    path = Path(images.name_of(3))
    good = path.read_bytes()
    path.write_bytes(good[:40])
    for epoch in range(2):
        batch, (problem,) = images.__getitems__([(epoch, 2), (epoch, 3)])
        assert path.name in problem and batch.index.tolist() == [2, ~3]
        assert (batch.image[1] == 0).all() and batch.label[1] == -1 and batch.label[0] >= 0
    path.write_bytes(good)
    batch, problems = images.__getitems__([(2, 2), (2, 3)])
    assert not problems and batch.index.tolist() == [2, 3] and torch.equal(batch.image[1], images[None, 3].image)
    path.write_bytes(b"")
    assert torch.equal(images.__getitems__([(3, 3)])[0].image, batch.image[1:])
    images = source(tmp_path, on_bad_image="skip").train
    preload(images, torch.device("cpu"), print)
    (name,) = images.skipped
    assert path.name in name
    path.write_bytes(good)
    batch, problems = images.__getitems__([(3, 3), (3, ~4)])
    assert not problems and batch.index.tolist() == [~3, ~4]
    assert (batch.image[0] == 0).all() and batch.label.tolist() == [-1, images[None, 4].label]


def test_preloading_stops_on_request(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pretrain.data.preload.BATCH", 5)
    images, asked = source(draw_images(tmp_path, 20)).train, []
    preload(images, torch.device("cpu"), print, lambda: asked.append(1) or len(asked) == 2)
    assert images.cache and not images.cache.complete and images.cache.present.tolist() == [True] * 10 + [False] * 8
    batch, problems = images.__getitems__([(0, 2), (0, 12)])
    assert not problems and torch.equal(batch.image[1], images[None, 12].image)


def test_an_unreadable_image_raises_before_training(tmp_path: Path) -> None:
    images = source(draw_images(tmp_path, 20)).train
    path = Path(images.name_of(3))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=rf"{path.name} can't be used: .*; repair or remove it, or skip such images"):
        preload(images, torch.device("cpu"), print)


def test_when_images_are_not_cached(tmp_path: Path, monkeypatch) -> None:
    """Too many images; crops of larger images; in spawned workers; on unsupported devices."""
    folder = draw_images(tmp_path, 20)
    images, cpu = source(folder).train, torch.device("cpu")
    assert pickle.loads(pickle.dumps(images)).cache is None
    assert source(folder, size=8, crop=0.5).train.cache is None and source(folder, crop=0.5).train.cache
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2**60))  # processes of a launch share the available memory
    assert source(folder).train.cache is None
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    size = len(images) * 12 * 12
    for most, fits in ((size - 1, False), (size, True)):
        monkeypatch.setattr("pretrain.data.image_cache.MAX_HOST_BYTES", most)
        assert (source(folder).train.cache is not None) == fits and source(folder).test.cache
    assert new_cache(3, (1, 4, 4), cpu) and new_cache(3, (1, 4, 4), torch.device("meta")) is None
    for free, fits in ((10 * 48 - 1, False), (10 * 48, True)):  # a tenth of an accelerator's free memory
        monkeypatch.setattr("pretrain.data.image_cache.MAX_HOST_BYTES", 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        monkeypatch.setattr("pretrain.data.image_cache.ImageCache", lambda count, shape, device: (count, shape, device))
        assert (new_cache(3, (1, 4, 4), torch.device("cuda")) is not None) == fits


def test_reading_a_device_cache_does_not_synchronize() -> None:
    """On the meta device, where reading a value raises."""
    kept = ImageCache(5, (3, 4, 4), torch.device("meta"))
    number = torch.tensor([4, 0])
    kept.put(number, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([1, 2]))
    image, label = kept.get(number)
    assert kept.present.tolist() == [True, False, False, False, True]
    assert image.shape == (2, 3, 4, 4) and image.device.type == label.device.type == "meta"

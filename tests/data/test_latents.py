"""Latents as a data set: the same samples as the images, sampled from the posterior, and files that are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from autoencoders import encode, images, kl, opened, scaled

from pretrain.core.errors import UserError
from pretrain.data import latents
from pretrain.data.autoencoder import open_autoencoder
from pretrain.data.images import collate
from pretrain.data.loader import make_loader


def test_a_cache_is_the_same_data_set(cached: Path, pictures: Path) -> None:
    was, now = opened(pictures), opened(cached)
    assert now.shape == (4, 6, 6) and now.classes == was.classes == 2
    for split in ("train", "test"):
        theirs, ours = getattr(was, split), getattr(now, split)
        assert [theirs.name_of(n) for n in range(len(theirs))] == [ours.name_of(n) for n in range(len(ours))]
        assert [theirs[0, n].label for n in range(len(theirs))] == [ours[0, n].label for n in range(len(ours))]
    few = opened(cached, limit=9, held_out=2)
    assert (len(few.train), len(few.test)) == (9, 2)
    names = [few.train.name_of(n) for n in range(9)]
    assert names == sorted({*names}) and {*names} < {was.train.name_of(n) for n in range(43)}


@pytest.mark.parametrize("name", ["kl", "shifted", "by channel", "pipeline"])
def test_latents_are_samples_of_the_posterior(name: str, vaes: Path, pictures: Path, tmp_path: Path) -> None:
    """Mean and deviation over many epochs are those of its posterior, scaled; decoding inverts the scaling."""
    small = encode(vaes / name, pictures, tmp_path / "latents", limit=3)
    source, image = opened(small), images(opened(pictures, limit=3).train)
    assert source.autoencoder is not None
    network = source.autoencoder.network
    with torch.no_grad():
        coded = network.encode(image)
        posterior = getattr(coded, "latent_dist", None)
        raw = coded.latents if posterior is None else posterior.mean
        decoded = network.decode(raw).sample.clamp(-1, 1)
    drawn = torch.stack([torch.stack([source.train[epoch, n].image for n in range(3)]) for epoch in range(400)])
    size = scaled(network, raw).abs().max().item()
    if posterior is None:
        torch.testing.assert_close(drawn, scaled(network, raw).expand_as(drawn), atol=1e-3 * size, rtol=0)
    else:
        std = scaled(network, posterior.std + raw) - scaled(network, raw)
        assert ((drawn.mean(0) - scaled(network, raw)).abs() < 6 * std / 400**0.5 + 1e-3 * size).all()
        assert ((drawn.std(0) / std - 1).abs() < 6 / 800**0.5).all()
    torch.testing.assert_close(source.autoencoder.decode(scaled(network, raw)), decoded, atol=1e-5, rtol=1e-5)
    fixed = torch.stack([source.train[None, n].image for n in range(3)])
    assert torch.equal(fixed, torch.stack([opened(small, seed=5).train[None, n].image for n in range(3)]))


def test_a_latent_is_a_function_of_seed_epoch_and_index(cached: Path) -> None:
    first, again, other = (opened(cached, seed, flip=True).train for seed in (3, 3, 4))
    for epoch, index in ((0, 5), (1, 5), (0, 6), (7, ~5)):
        assert torch.equal(first[epoch, index].image, again[epoch, index].image)
        assert not torch.equal(first[epoch, index].image, other[epoch, index].image)
    assert not torch.equal(first[0, 5].image, first[1, 5].image)
    assert not torch.equal(first[0, 5].image, first[0, 6].image)
    order: Any = [(0, n) for n in torch.randperm(len(first)).tolist()]
    ((batch, _),) = make_loader(first, order, len(first))
    for number, index in enumerate(batch.index.tolist()):
        assert torch.equal(batch.image[number], again[0, index].image)


def test_half_of_the_latents_are_of_the_mirrored_image(cached: Path, pictures: Path) -> None:
    train, image = opened(cached, flip=True).train, images(opened(pictures).train)
    network = open_autoencoder(cached).network
    with torch.no_grad():
        two = [scaled(network, network.encode(view).latent_dist.mean) for view in (image, image.flip(-1))]
    drawn = torch.stack([collate([train[epoch, n] for n in range(len(train))])[0].image for epoch in range(40)])
    off = torch.stack([(drawn - mean).square().mean(dim=(2, 3, 4)) for mean in two])
    share = (off[1] < off[0]).float().mean().item()
    assert 0.4 < share < 0.6
    assert not any(torch.equal(a, b) for a, b in zip(*two, strict=True))
    straight = opened(cached).train
    assert torch.equal(straight[None, 3].image, train[None, 3].image), "validation images are not mirrored"


@pytest.mark.parametrize(
    "change",
    [{"shape": [4, 6]}, {"shape": "abc"}, {"moments": [1]}, {"moments": None}, {"classes": "two"}, {"splits": {}}],
    ids=str,
)
def test_a_wrong_manifest_raises(change: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    """In each field that reading depends on."""
    shutil.copytree(plain, tmp_path / "latents")
    file = tmp_path / "latents" / latents.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(
        UserError, match=r"its latents\.json can't be read .*; copy it again, or encode the images again"
    ):
        opened(tmp_path / "latents")


def test_a_cache_that_is_cut_off_or_has_another_autoencoder(plain: Path, vaes: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(plain, tmp_path / name))

    (shard,) = (broken("short") / "train").rglob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is cut off"):
        opened(tmp_path / "short")
    shutil.rmtree(broken("less") / "test")
    with pytest.raises(UserError, match="is cut off"):
        opened(tmp_path / "less")
    shutil.rmtree(broken("without") / "vae")
    with pytest.raises(UserError, match="the autoencoder that made its latents is gone"):
        opened(tmp_path / "without")
    (broken("manifest") / latents.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        opened(tmp_path / "manifest")
    other = kl()
    with torch.no_grad():
        other.decoder.conv_out.bias += 1e-3
    other.save_pretrained(broken("other") / "vae")
    with pytest.raises(UserError, match="made by another autoencoder"):
        opened(tmp_path / "other")

"""Fixtures of the tests of data: data sets of latents, which are encoded once per process."""

from pathlib import Path

import pytest
from autoencoders import encode, kl, tiny

from pretrain.data import encode_latents


@pytest.fixture(scope="session")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KL autoencoders: with a scale; with a shift, too; with both per channel; and one without a posterior."""
    folder = tmp_path_factory.mktemp("vaes")
    kl().save_pretrained(folder / "kl")
    kl(shift_factor=0.3).save_pretrained(folder / "shifted")
    kl(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]).save_pretrained(folder / "by channel")
    tiny().save_pretrained(folder / "pipeline" / "vae")
    return folder


@pytest.fixture(scope="session")
def cached(vaes: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of all images and their mirror images, by the shifted autoencoder, in shards of 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_latents, "SHARD_SIZE", 16)
        return encode(vaes / "shifted", pictures, tmp_path_factory.mktemp("cached") / "latents", flip=True)


@pytest.fixture(scope="session")
def plain(vaes: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of all images, by the autoencoder without a shift."""
    return encode(vaes / "kl", pictures, tmp_path_factory.mktemp("plain") / "latents")

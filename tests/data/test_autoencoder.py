"""Autoencoders: which are accepted, and the errors for others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from pretrain.core.errors import UserError
from pretrain.data.autoencoder import Autoencoder, open_autoencoder


def kl(**more: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    given = {"in_channels": 1, "out_channels": 1, "latent_channels": 4, "scaling_factor": 0.4} | more
    return AutoencoderKL(**blocks, block_out_channels=(4, 8), norm_num_groups=2, **given)


def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    numbers = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(1, 1, **blocks, **numbers, scaling_factor=2.0, shift_factor=0.25)


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KL autoencoders: with a scale; with a shift, too; with both per channel; and one without a posterior."""
    folder = tmp_path_factory.mktemp("vaes")
    kl().save_pretrained(folder / "kl")
    kl(shift_factor=0.3).save_pretrained(folder / "shifted")
    kl(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]).save_pretrained(folder / "by channel")
    tiny().save_pretrained(folder / "pipeline" / "vae")
    return folder


def test_a_folder_without_an_autoencoder_raises(vaes: Path, tmp_path: Path) -> None:
    shutil.copytree(vaes / "kl", tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="can't be read"):
        open_autoencoder(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors there"):
        open_autoencoder(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="must be an AutoencoderKL or AutoencoderTiny, got UNet2DModel"):
        open_autoencoder(tmp_path / "vae")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": 0}, "scaling_factor, .* must be numbers"),
        ({"scaling_factor": None}, "scaling_factor, .* must be numbers"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "one for each latent channel"),
        ({"block_out_channels": [8, 8]}, r"can't be read: .*expected shape torch.Size\(\[8\]\)"),
        ({"norm_num_groups": 3}, "can't be read: "),
    ],
)
def test_a_wrong_autoencoder_config_raises(change: dict[str, Any], message: str, vaes: Path, tmp_path: Path) -> None:
    shutil.copytree(vaes / "kl", tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as refusal:
        open_autoencoder(tmp_path / "vae")
    assert "\n" not in str(refusal.value)


def test_an_autoencoder_whose_channels_do_not_fit() -> None:
    for channels, message in (
        ((2, 2), r"2 channels, these have 1; give another"),
        ((1, 3), "makes images of 3 channels"),
    ):
        network = kl(in_channels=channels[0], out_channels=channels[1])
        with pytest.raises(UserError, match=message):
            Autoencoder(network).latent_shape((1, 12, 12))

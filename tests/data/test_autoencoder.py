"""Autoencoders: which are accepted, and the errors for others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from autoencoders import kl

from pretrain.core.errors import UserError
from pretrain.data.autoencoder import Autoencoder, open_autoencoder


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

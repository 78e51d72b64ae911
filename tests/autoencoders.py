"""Small autoencoders and data sets of latents."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from pretrain.config.schema import Data
from pretrain.data import encode_latents
from pretrain.data.images import Images, on_device
from pretrain.data.sources import Source, open_data


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


def encode(vae: Path, data: Path, output: Path, **settings: Any) -> Path:
    encode_latents.main(vae, output, Data(source=str(data), **settings), batch_size=16)
    return output


def opened(folder: Path, seed: int = 0, **settings: Any) -> Source:
    return open_data(Data(source=str(folder), **settings), seed)


def images(source: Images) -> torch.Tensor:
    return torch.cat([on_device(batch, torch.device("cpu")).image for batch in source.batches(range(len(source)), 16)])


def scaled(network: Any, raw: torch.Tensor) -> torch.Tensor:
    """As diffusers' pipelines scale them."""
    config = network.config
    if config.get("latents_mean"):
        mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        return (raw - mean) * config.scaling_factor / std
    return (raw - (config.shift_factor or 0.0)) * config.scaling_factor

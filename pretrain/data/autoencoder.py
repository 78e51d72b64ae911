"""Images to latents and back, by an autoencoder of diffusers that is never trained here."""

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pretrain.core.errors import UserError
from pretrain.core.files import read_json

KINDS = ("AutoencoderKL", "AutoencoderTiny")
PLACES = ("vae", "vqvae")  # what a pipeline calls its folder
AT_ONCE = 8  # images that are decoded together: a decoder takes far more memory than a denoiser


class Autoencoder:
    """An AutoencoderKL or AutoencoderTiny, with its latents brought to about unit variance.

    As in diffusers' pipelines, a latent z is taken as (z - shift_factor) * scaling_factor, or, where the config has
    them, as (z - latents_mean) / latents_std * scaling_factor.

    Args:
        network: the diffusers model.

    Raises:
        ValueError: its config has no way of scaling them.
    """

    def __init__(self, network: Any) -> None:
        self.network = network.eval().requires_grad_(False)
        config = network.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        known = mean is not None and std is not None
        try:
            self.shift = torch.tensor(mean if known else config.get("shift_factor") or 0.0).view(-1, 1, 1)
            self.scale = config.scaling_factor / torch.tensor(std if known else 1.0).view(-1, 1, 1)
            scaled = (torch.ones(config.latent_channels, 1, 1) - self.shift) * self.scale
        except (TypeError, ValueError, RuntimeError):
            scaled = torch.tensor(math.nan)
        if not scaled.isfinite().all() or not self.scale.all():
            raise ValueError(
                "its scaling_factor, shift_factor, latents_mean and latents_std must be numbers, one for each latent "
                "channel, and no scale 0"
            )

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent."""
        config = self.network.config
        return 2 ** (len(config.get("encoder_block_out_channels") or config.block_out_channels) - 1)

    @property
    def draws(self) -> bool:
        """Whether it gives a distribution of latents, not one latent."""
        return type(self.network).__name__ == "AutoencoderKL"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells it from another one: class, config, and the SHA-256 of its parameters in whatever file."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            values = value.detach().cpu().float().contiguous()
            digest.update(f"{name}{tuple(values.shape)}".encode())
            digest.update(values.numpy().data)
        config = {key: value for key, value in self.network.config.items() if not key.startswith("_")}
        return {
            "class": type(self.network).__name__,
            "config": json.loads(json.dumps(config, default=str)),
            "sha256": digest.hexdigest(),
        }

    @property
    def name(self) -> str:
        """The identity as one SHA-256."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of the latents of images (C, H, W).

        Raises:
            UserError: it can't encode such images.
        """
        config, (channels, height, width) = self.network.config, shape
        if config.in_channels != config.out_channels:
            raise UserError(
                f"the autoencoder makes images of {config.out_channels} channels from ones of {config.in_channels}; "
                "give another one"
            )
        if config.in_channels != channels:
            raise UserError(
                f"the autoencoder encodes images of {config.in_channels} channels, these have {channels}; "
                f"{f'say --data.channels {config.in_channels}, or ' if config.in_channels in (1, 3, 4) else ''}"
                "give another autoencoder"
            )
        if height % self.factor or width % self.factor:
            raise UserError(
                f"the autoencoder needs images whose sides {self.factor} divides, got {height}x{width}; "
                "give another --data.size"
            )
        return config.latent_channels, height // self.factor, width // self.factor

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of the images that latents (c, h, w) decode to."""
        return self.network.config.out_channels, shape[1] * self.factor, shape[2] * self.factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the scaled latents [B, 2, c, h, w] of images [B, C, H, W] in [-1, 1].

        An AutoencoderTiny knows no deviation: [B, 1, c, h, w].
        """
        shift, scale = self.shift.to(images.device), self.scale.to(images.device)
        coded = self.network.encode(images)
        if not self.draws:
            return ((coded.latents - shift) * scale)[:, None]
        posterior = coded.latent_dist
        return torch.stack([(posterior.mean - shift) * scale, posterior.std * scale], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] of scaled latents [B, c, h, w]."""
        network = self.network.to(latents.device)
        raw = latents.float() / self.scale.to(latents.device) + self.shift.to(latents.device)
        return torch.cat([network.decode(some).sample for some in raw.split(AT_ONCE)]).clamp(-1, 1)


def open_autoencoder(folder: Path) -> Autoencoder:
    """The autoencoder in a folder that diffusers wrote, or in a pipeline's.

    Raises:
        UserError: there is none, or it can't be read.
    """
    folder = next((folder / name for name in PLACES if (folder / name / "config.json").is_file()), folder)
    try:
        kind = read_json(folder / "config.json")["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: there is no autoencoder there; name a folder with the config.json of a diffusers model"
        ) from None
    if kind not in KINDS:
        raise UserError(f"{folder}: the autoencoder must be an {' or '.join(KINDS)}, got {kind}")
    if not any(folder.glob("diffusion_pytorch_model.safetensors*")):  # diffusers would say so on a line of its own
        raise UserError(f"{folder}: the autoencoder has no diffusion_pytorch_model.safetensors there; save it as one")
    import diffusers  # takes seconds

    try:
        network, found = getattr(diffusers, kind).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the autoencoder can't be read: {' '.join(str(error).split()).split('. ')[0]}"
        ) from None
    if missing := found["missing_keys"]:
        raise UserError(f"{folder}: the autoencoder can't be used: its file lacks {missing[0]}")
    for parameter in network.parameters():  # or it is the file itself, which may be written anew
        parameter.data = parameter.data.clone()
    try:
        return Autoencoder(network)
    except ValueError as error:
        raise UserError(f"{folder}: the autoencoder can't be used: {error}; mend its config.json") from None

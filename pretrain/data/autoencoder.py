"""Encoding images as latents, and decoding latents, with a pretrained autoencoder of diffusers."""

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

CLASSES = ("AutoencoderKL", "AutoencoderTiny")
SUBFOLDERS = ("vae", "vqvae")  # of a diffusers pipeline, that may hold its autoencoder
DECODE_BATCH = 8  # images; a decoder needs far more memory than a denoiser


class Autoencoder:
    """An AutoencoderKL or AutoencoderTiny whose latents are scaled to about unit variance.

    As in diffusers' pipelines, a latent z is scaled to (z - shift_factor) * scaling_factor, or to
    (z - latents_mean) / latents_std * scaling_factor if the config has latents_mean and latents_std.

    Args:
        network: the diffusers model; it is put into evaluation mode, and its parameters are frozen.

    Raises:
        ValueError: the config's scaling factors are missing, not finite or 0, or not one per latent channel.
    """

    def __init__(self, network: Any) -> None:
        self.network = network.eval().requires_grad_(False)
        config = network.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        by_channel = mean is not None and std is not None
        try:
            self.shift = torch.tensor(mean if by_channel else config.get("shift_factor") or 0.0).view(-1, 1, 1)
            self.scale = config.scaling_factor / torch.tensor(std if by_channel else 1.0).view(-1, 1, 1)
            scaled = (torch.ones(config.latent_channels, 1, 1) - self.shift) * self.scale
        except (TypeError, ValueError, RuntimeError):
            scaled = torch.tensor(math.nan)
        if not scaled.isfinite().all() or not self.scale.all():
            raise ValueError(
                "its scaling_factor, shift_factor, latents_mean and latents_std must be numbers, one for each latent "
                "channel, and no scale 0"
            )

    @property
    def downsampling(self) -> int:
        """Side of an image divided by that of its latent."""
        config = self.network.config
        return 2 ** (len(config.get("encoder_block_out_channels") or config.block_out_channels) - 1)

    @property
    def is_variational(self) -> bool:
        """Whether the encoder returns a distribution of latents (AutoencoderKL), not a single latent."""
        return type(self.network).__name__ == "AutoencoderKL"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Class, config, and the SHA-256 of the parameters as float32, which does not depend on the file format."""
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
    def fingerprint(self) -> str:
        """SHA-256 of `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape (c, h, w) of the latents of images of `shape`, (C, H, W).

        Raises:
            UserError: the autoencoder can't encode such images.
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
                f"{f'set --data.channels {config.in_channels}, or ' if config.in_channels in (1, 3, 4) else ''}"
                "give another autoencoder"
            )
        if height % self.downsampling or width % self.downsampling:
            raise UserError(
                f"the autoencoder needs images whose sides {self.downsampling} divides, got {height}x{width}; "
                "give another --data.size"
            )
        return config.latent_channels, height // self.downsampling, width // self.downsampling

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape (C, H, W) of the images that latents of `shape`, (c, h, w), decode to."""
        return self.network.config.out_channels, shape[1] * self.downsampling, shape[2] * self.downsampling

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images as the parameters of a normal distribution of scaled latents.

        Args:
            images: float32 [B, C, H, W] in [-1, 1], on the network's device.

        Returns:
            float32 [B, 2, c, h, w], mean and standard deviation; [B, 1, c, h, w], the latent alone, if not
            `is_variational`.
        """
        shift, scale = self.shift.to(images.device), self.scale.to(images.device)
        output = self.network.encode(images)
        if not self.is_variational:
            return ((output.latents - shift) * scale)[:, None]
        posterior = output.latent_dist
        return torch.stack([(posterior.mean - shift) * scale, posterior.std * scale], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images; moves the network to their device.

        Args:
            latents: [B, c, h, w], of any floating-point type.

        Returns:
            float32 [B, C, H, W] in [-1, 1].
        """
        network = self.network.to(latents.device)
        raw = latents.float() / self.scale.to(latents.device) + self.shift.to(latents.device)
        return torch.cat([network.decode(chunk).sample for chunk in raw.split(DECODE_BATCH)]).clamp(-1, 1)


def open_autoencoder(folder: Path) -> Autoencoder:
    """Load the autoencoder in a folder that diffusers wrote, or in a subfolder of a pipeline.

    Raises:
        UserError: the folder has no autoencoder, one of another class, or one that can't be loaded.
    """
    folder = next((folder / name for name in SUBFOLDERS if (folder / name / "config.json").is_file()), folder)
    try:
        class_name = read_json(folder / "config.json")["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: there is no autoencoder there; name a folder with the config.json of a diffusers model"
        ) from None
    if class_name not in CLASSES:
        raise UserError(f"{folder}: the autoencoder must be an {' or '.join(CLASSES)}, got {class_name}")
    if not any(folder.glob("diffusion_pytorch_model.safetensors*")):  # diffusers would also log a line of its own
        raise UserError(
            f"{folder}: the autoencoder has no diffusion_pytorch_model.safetensors there; save it in that format"
        )
    import diffusers  # takes seconds

    try:
        network, loading_info = getattr(diffusers, class_name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the autoencoder can't be read: {' '.join(str(error).split()).split('. ')[0]}"
        ) from None
    if missing := loading_info["missing_keys"]:
        raise UserError(f"{folder}: the autoencoder can't be used: its file lacks {missing[0]}")
    for parameter in network.parameters():  # a copy, since they are mapped to the file, which may be overwritten
        parameter.data = parameter.data.clone()
    try:
        return Autoencoder(network)
    except ValueError as error:
        raise UserError(f"{folder}: the autoencoder can't be used: {error}; fix its config.json") from None

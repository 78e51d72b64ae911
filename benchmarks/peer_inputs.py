"""What the programs of peers.py train: images as files and as an array, and networks with their configs."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import train_diffusion
import train_mae
from pretrain.config.build import build_model
from pretrain.config.cli import parse
from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.images import Images
from pretrain.data.sources import open_data
from pretrain.training.flops import profile_sample

FLAGS = {
    ("unet", "small"): "--model unet --model.channels 16 32 64 --model.layers 1 --model.attention 0",
    ("unet", "large"): "--model unet --model.channels 128 256 256 --model.layers 2 --model.attention 1",
    ("dit", "small"): "--model dit --model.patch 4 --model.width 96 --model.depth 4 --model.heads 4",
    ("dit", "large"): "--model dit --model.size S --model.patch 2",
    ("mae", "small"): "--model.encoder vit_tiny_patch16_224 --model.patch 4 --model.width 96 --model.depth 6 "
    "--model.heads 3 --model.decoder-width 64 --model.decoder-depth 2 --model.decoder-heads 4",
    ("mae", "large"): "--model.encoder vit_small_patch16_224 --model.patch 4 --model.width 384 --model.depth 12 "
    "--model.heads 6 --model.decoder-width 256 --model.decoder-depth 4 --model.decoder-heads 8",
}
DENOISER = "--adapter ddpm --optim.name adamw"  # the programs' default recipes have another objective or optimizer
# As in He et al. 2022: all hidden patches are predicted by self-attention, gradients are not clipped.
MAE = "--model.decoder self --adapter.predict 1 --optim.name adamw --optim.clip 0 --optim.betas 0.9 0.95"
MAE += " --optim.weight-decay 0.05"
HELD_OUT = 1000  # images that our program evaluates before its first step, as many as it holds out by default
EPOCHS = 8  # of our program; the process ends before


class Network(NamedTuple):
    """A network, and the images it is trained on.

    Attributes:
        flags: of our program.
        shape: (C, H, W) of an image.
        sizes: of a masked autoencoder, else empty; see `peer_arms.Spec`.
        parameters: number of those that are trained.
        flops: of an image, forward and backward.
    """

    flags: list[str]
    shape: tuple[int, int, int]
    sizes: dict[str, int]
    parameters: int
    flops: int


def write_images(folder: Path, data: str, count: int) -> tuple[int, int, int]:
    """Write RGB images to a folder, unless it exists: images/train/LABEL/*.png, images/test/..., and train.npy.

    Args:
        folder: to write.
        data: images, as `--data` of our programs.
        count: number of training images; they are repeated if there are too few.

    Returns:
        (C, H, W) of an image.

    Raises:
        UserError: the folder exists and holds something else.
    """
    made_of = {"data": data, "count": count}
    if not folder.exists():
        part, source = folder.with_suffix(".part"), open_data(Data(source=data, channels=3), 0)
        shutil.rmtree(part, ignore_errors=True)
        images, labels = _decoded(source.train, count)
        _write_files(part / "images" / "train", images, labels)
        _write_files(part / "images" / "test", *_decoded(source.test, min(HELD_OUT, len(source.test))))
        np.save(part / "train.npy", images)
        (part / "made_of.json").write_text(json.dumps(made_of))
        part.rename(folder)
    found = folder / "made_of.json"
    if not found.exists() or json.loads(found.read_text()) != made_of:
        raise UserError(f"{folder} does not hold the {count} images of {data}; remove it, or give another --output-dir")
    _, channels, height, width = np.load(folder / "train.npy", mmap_mode="r").shape
    return channels, height, width


def _decoded(images: Images, count: int) -> tuple[np.ndarray, list[int]]:
    """The first `count` images, uint8 [N, C, H, W], and labels; after the last image the first one again."""
    items = [images[None, number % len(images)] for number in range(count)]
    return np.stack([item.image.numpy() for item in items]), [max(item.label, 0) for item in items]


def _write_files(folder: Path, images: np.ndarray, labels: Sequence[int]) -> None:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)


def prepare(
    folder: Path, name: str, size: str, shape: tuple[int, int, int], batch: int, workers: int, bf16: bool
) -> Network:
    """Describe a network, and write its configs for other projects to `folder`/unet or `folder`/vit.

    Args:
        folder: of `write_images`.
        name: unet, dit or mae.
        size: small or large.
        shape: (C, H, W) of an image.
        batch: images per step.
        workers: of the data loader.
        bf16: whether the network computes in bfloat16.
    """
    mae = name == "mae"
    flags = ["--data", str(folder / "images"), "--data.channels", "3", "--data.workers", str(workers)]
    flags += ["--batch-size", str(batch), "--epochs", str(EPOCHS), "--evaluate.every", str(EPOCHS)]
    flags += ["--precision", "bf16" if bf16 else "no", "--optim.lr", "1e-3", *FLAGS[name, size].split()]
    flags += (MAE if mae else DENOISER).split()
    config = parse(flags, **(train_mae if mae else train_diffusion).START, output_dir="", help="")
    model: Any = build_model(config, shape, 0)
    sizes = {}
    if mae:
        encoder, decoder = model.encoder, config.component("model")
        sizes = {"patch": model.patch[0], "width": encoder.embed_dim, "depth": len(encoder.blocks)}
        sizes |= {"heads": encoder.blocks[0].attn.num_heads, "decoder_width": decoder.decoder_width}
        sizes |= {"decoder_depth": decoder.decoder_depth, "decoder_heads": decoder.decoder_heads}
        _write_vit(folder / "vit", sizes, shape)
    elif name == "unet":
        model.network.save_config(folder / "unet")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = profile_sample(config.component("adapter"), model, shape, 0).flops
    return Network(flags, shape, sizes, parameters, flops)


def _write_vit(folder: Path, sizes: dict[str, int], shape: tuple[int, int, int]) -> None:
    """Write the configs of the network and of its images as transformers reads them."""
    config: dict[str, Any] = {"model_type": "vit_mae", "image_size": shape[1], "num_channels": shape[0]}
    config |= {"patch_size": sizes["patch"], "qkv_bias": True}
    for prefix in ("", "decoder_"):
        width = sizes[f"{prefix}width"]
        config |= {f"{prefix}hidden_size": width, f"{prefix}intermediate_size": 4 * width}
        config |= {f"{prefix}num_hidden_layers": sizes[f"{prefix}depth"]}
        config |= {f"{prefix}num_attention_heads": sizes[f"{prefix}heads"]}
    half = [0.5] * shape[0]
    images = {"image_processor_type": "ViTImageProcessor", "image_mean": half, "image_std": half}
    images |= {"size": {"height": shape[1], "width": shape[2]}}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=1))

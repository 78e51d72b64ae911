"""Masked autoencoders out of other people's files: timm's, transformers', and those that MAEs are published in.

All three call the same parameters by other names, and pixels are normalised otherwise.
"""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from pretrain.core.errors import UserError
from pretrain.core.files import read_json

# Beginnings of our names, of those of published MAEs (facebookresearch/mae), and of those of transformers' ViTMAE.
NAMES = (
    ("encoder.cls_token", "cls_token", "vit.embeddings.cls_token"),
    ("encoder.pos_embed", "pos_embed", "vit.embeddings.position_embeddings"),
    ("encoder.patch_embed.proj.", "patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "blocks.", "vit.encoder.layer."),
    ("encoder.norm.", "norm.", "vit.layernorm."),
    ("mask_token", "mask_token", "decoder.mask_token"),
    ("position", "decoder_pos_embed", "decoder.decoder_pos_embed"),
    ("embed.", "decoder_embed.", "decoder.decoder_embed."),
    ("decoder.", "decoder_blocks.", "decoder.decoder_layers."),
    ("norm.", "decoder_norm.", "decoder.decoder_norm."),
    ("out.", "decoder_pred.", "decoder.decoder_pred."),
)
BLOCK = (  # the same within a block, of timm's names and of transformers'
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
QKV = (".attention.attention.query.", ".attention.attention.key.", ".attention.attention.value.")


def start_from(model: Any, path: Path, encoder: str) -> str:
    """Fill a fresh masked autoencoder from a file, and say what was taken.

    The file is timm's checkpoint of an encoder, a published MAE with or without its decoder, transformers' ViTMAE, or
    another run's model. Patches and positions are resampled where they are of another size. What the first layer made
    of pixels that were normalised by another mean and spread is folded into it.

    Args:
        model: the masked autoencoder.
        path: .safetensors, or what `torch.load` reads without running code.
        encoder: its timm name.

    Raises:
        UserError: the file is not there, can't be read, or is of another encoder.
    """
    tensors = _our_names(_read(path))
    taken = {key.removeprefix("encoder."): value for key, value in tensors.items() if key.startswith("encoder.")}
    rest = {key: value for key, value in tensors.items() if not key.startswith("encoder.")}
    own = model.encoder.state_dict()
    taken = {key: value for key, value in taken.items() if key in own or not key.startswith(("head.", "fc_norm."))}
    mean, std = _normalisation(path, encoder, published=bool(rest), ours=(path.parent / "state.json").is_file())
    if (proj := taken.get("patch_embed.proj.weight")) is not None and proj.ndim == 4:
        bias = taken.get("patch_embed.proj.bias", torch.zeros(len(proj)))
        if len(mean) == proj.shape[1]:
            scale, shift = (0.5 / std).view(-1, 1, 1), ((0.5 - mean) / std).view(-1, 1, 1)
            taken["patch_embed.proj.bias"] = bias + (proj * shift).sum(dim=(1, 2, 3))
            proj = proj * scale
        taken["patch_embed.proj.weight"] = adapt_input_conv(own["patch_embed.proj.weight"].shape[1], proj)
        taken = checkpoint_filter_fn(taken, model.encoder)
    differing = sorted(own.keys() ^ taken.keys()) or [key for key in own if own[key].shape != taken[key].shape]
    if differing:
        there, here = (_shape(tensors.get(differing[0])) for tensors in (taken, own))
        raise UserError(
            f"--model.init {path}: it does not fit {encoder} ({differing[0]} is {there} there, {here} here); give the "
            "--model.encoder, width, depth and heads that it is of"
        )
    model.encoder.load_state_dict(taken)
    position = rest.pop("position", None)
    fits = {key: value.shape for key, value in rest.items()} == {
        key: value.shape for key, value in model.state_dict().items() if not key.startswith("encoder.")
    } and (position is None or torch.allclose(position, model.position, atol=1e-4))
    if fits:
        model.load_state_dict(rest, strict=False)
    decoder = "and decoder" if fits else "alone, its decoder is of another shape" if rest else "alone"
    pixels = f"pixels there were normalised by {_numbers(mean)} and {_numbers(std)}"
    return f"starting from {path}: encoder {decoder}; {pixels}"


def _numbers(values: Tensor) -> str:
    """As they were written, not as float32 has them."""
    return f"[{', '.join(f'{value:.6g}' for value in values.tolist())}]"


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else "x".join(map(str, tensor.shape)) or "a number"


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"--model.init {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # published MAEs hold their command line
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken archive makes its reader say
        said = " ".join(str(error).split())[:160]
        raise UserError(
            f"--model.init {path}: it can't be read as tensors ({type(error).__name__}: {said}); give a .safetensors "
            "file, or a .pth that holds tensors alone"
        ) from None
    for inner in ("model", "state_dict"):
        found = found[inner] if isinstance(found, dict) and isinstance(found.get(inner), dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"--model.init {path}: it holds no named tensors; give the state dict of a model")
    return found


def _our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by our names, whichever of the three they have."""
    tensors = {key.removeprefix("module."): value.float() for key, value in tensors.items()}
    if any(key.startswith("encoder.blocks.") for key in tensors):
        return tensors
    if any(key.startswith("vit.") for key in tensors):
        return _from_transformers(tensors)
    renamed = {}
    for key, value in tensors.items():
        ours, theirs, _ = next((row for row in NAMES[5:] if key.startswith(row[1])), ("encoder.", "", ""))
        ours, theirs = ("encoder.", "") if key.startswith("norm.") else (ours, theirs)
        renamed[ours + key[len(theirs) :]] = value
    return renamed


def _from_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Any] = {}
    for key, value in tensors.items():
        ours, _, theirs = next((row for row in NAMES if key.startswith(row[2])), ("encoder.", "", ""))
        name = ours + key[len(theirs) :]
        for inside, there in BLOCK:
            name = name.replace(there, inside) if name.startswith(("encoder.blocks.", "decoder.")) else name
        for number, there in enumerate(QKV):
            if there in name:
                renamed.setdefault(name.replace(there, ".attn.qkv."), [None] * 3)[number] = value
                break
        else:
            renamed[name] = value
    return {key: torch.cat(value) if isinstance(value, list) else value for key, value in renamed.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        if isinstance(found := read_json(path), dict):
            return found
        reason: object = "it is no JSON object"
    except (OSError, ValueError) as error:
        reason = error
    raise UserError(f"--model.init: {path} beside the weights can't be read ({reason}); repair it, or move it away")


def _normalisation(path: Path, encoder: str, published: bool, ours: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what a file's model saw, of pixels in [0, 1]."""
    card = path.parent / "config.json"
    told = _json(card) if card.is_file() else {}
    if ours:
        mean = std = [0.5] * 3
    elif "mean" in told.get("pretrained_cfg", {}):
        mean, std = told["pretrained_cfg"]["mean"], told["pretrained_cfg"]["std"]
    elif (path.parent / "preprocessor_config.json").is_file():
        seen = _json(path.parent / "preprocessor_config.json")
        mean, std = seen["image_mean"], seen["image_std"]
    elif published:
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    else:
        known: Any = timm.get_pretrained_cfg(encoder)
        mean, std = known.mean, known.std
    return torch.tensor(mean), torch.tensor(std)

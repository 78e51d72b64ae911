"""Weights of masked autoencoders: read from files of timm, transformers and published MAEs, written for the first two.

These libraries name the same parameters differently and normalise pixels differently.
"""

import json
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from pretrain.checkpoint.storage import write
from pretrain.core.errors import UserError
from pretrain.core.files import expand
from pretrain.export.mae_names import NAMES, PATCH_WEIGHT, Weights, for_transformers, rename
from pretrain.export.weights import (
    differences,
    read_object,
    read_weights,
    require_finite,
    shape_text,
    summarise_names,
)

HEADS = re.compile(  # parameters that an encoder does not need, beside its own
    r"(\w*head\w*|decoder|classifier|fc|fc_norm|pre_logits|pooler|attn_pool|projector|predictor|mask_token)(\.|$)"
)


def start_from(model: Any, path: Path, encoder: str) -> str:
    """Initialize a masked autoencoder from a file.

    The file holds the encoder of timm, a published MAE with or without its decoder, transformers' ViTMAE, ViT or
    DINOv2, or the model of a run; wrappers (DDP, torch.compile, the teacher of a distillation) may have added prefixes.
    Patch embedding and positions are resampled to the model's patch and image size. The file's pixel normalisation is
    folded into the patch embedding.

    Args:
        model: the masked autoencoder; unchanged if an error is raised.
        path: see `read_weights`.
        encoder: timm name of its encoder.

    Returns:
        A message: which parts were taken, the assumed normalisation, and what was ignored.

    Raises:
        UserError: the file can't be read, or its encoder differs from the model's.
    """
    try:
        return f"--model.init {path}: {_start_from(model, expand(path), encoder)}"
    except UserError as error:
        raise UserError(f"--model.init {path}: {error}") from None


def _start_from(model: Any, path: Path, encoder: str) -> str:
    found = read_weights(path)
    weights = rename(found.tensors)
    _check_values(weights, found.folder, model.encoder)
    mean, std = _normalisation(found.folder, encoder, weights)
    own = model.encoder.state_dict()
    heads = [name for name in weights.encoder if name not in own and HEADS.match(name)]
    try:
        taken = _adapted({**weights.encoder}, model.encoder, mean, std)
    except Exception as error:  # timm raises exceptions of any type for shapes that it does not expect
        raise UserError(
            f"timm can't resample its patches or positions ({_sizes(weights.encoder)}) to those "
            f"of the model ({' '.join(str(error).split())[:160]}); choose other --model sizes"
        ) from None
    taken = {name: value for name, value in taken.items() if name not in heads}
    if wrong := differences(taken, own):
        raise UserError(
            f"it does not fit {encoder}: {wrong}; set --model.encoder, width, depth and "
            f"heads to those of the file ({_sizes(weights.encoder)})"
        )
    decoder = {name: value for name, value in weights.decoder.items() if name != "position"}
    decoder_own = {name: value for name, value in model.state_dict().items() if not name.startswith("encoder.")}
    wrong = differences(decoder, decoder_own)
    position: Any = weights.decoder.get("position", model.position)
    if position.shape != model.position.shape or not torch.allclose(position, model.position, atol=1e-4):
        wrong = wrong or "its positions were trained"
    model.encoder.load_state_dict(taken)
    parts = "the encoder"
    if not wrong:
        model.load_state_dict(decoder, strict=False)
        parts = "the encoder and the decoder"
    elif weights.decoder:
        parts += f" but not the decoder, which does not fit ({wrong})"
    message = f"initialised {parts}" + (f" by {found.kind}" if found.kind else "")
    if weights.others:
        message += f" from {weights.prefix!r}, one of {weights.others + 1} encoders in it"
    if weights.ignored or heads:
        message += f", ignored {summarise_names([*heads, *weights.ignored], weights.prefix)}"
    return f"{message}; its pixels were normalised by mean {_numbers(mean)} and std {_numbers(std)}"


def _check_values(weights: Weights, folder: Path, encoder: Any) -> None:
    """Raise a `UserError` if the weights are not finite floats, or are of another number of channels or heads."""
    require_finite(weights.encoder | weights.decoder)
    kernel, channels = weights.encoder[PATCH_WEIGHT], encoder.patch_embed.proj.in_channels
    if kernel.ndim == 4 and kernel.shape[1] not in (3, channels):
        raise UserError(
            f"it is of images with {kernel.shape[1]} channels, these have {channels}; give --data.channels "
            f"{kernel.shape[1]}, or a file for 3 channels, which are adapted"
        )
    here = encoder.blocks[0].attn.num_heads
    for file, *keys in (
        ("config.json", "num_attention_heads"),
        ("config.json", "model_args", "num_heads"),
        ("state.json", "config", "model", "heads"),
    ):
        there: Any = read_object(folder / file)
        for key in keys:
            there = there.get(key) if isinstance(there, dict) else None
        if isinstance(there, int) and there != here:
            raise UserError(f"its {file} has {there} attention heads, the model {here}; give --model.heads {there}")


def _adapted(tensors: dict[str, Tensor], encoder: Any, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """An encoder's tensors for our normalisation of pixels and the patches, channels and positions of `encoder`.

    Raises:
        Exception: of any type, if timm can't resample them.
    """
    kernel, channels = tensors[PATCH_WEIGHT], encoder.patch_embed.proj.in_channels
    there = {"reg_token" if name == "register_tokens" else name for name in tensors}
    same_tokens = all((name in there) == (getattr(encoder, name) is not None) for name in ("cls_token", "reg_token"))
    if kernel.ndim != 4 or not same_tokens:
        return {"reg_token" if name == "register_tokens" else name: value for name, value in tensors.items()}
    bias = tensors.get("patch_embed.proj.bias", torch.zeros(len(kernel)))
    scale, shift = (0.5 / std).view(-1, 1, 1), ((0.5 - mean) / std).view(-1, 1, 1)
    tensors["patch_embed.proj.bias"] = bias + (kernel * shift).sum(dim=(1, 2, 3))
    kernel = kernel * scale
    tensors[PATCH_WEIGHT] = kernel if kernel.shape[1] == channels else adapt_input_conv(channels, kernel)
    if "register_tokens" in tensors:
        tensors.setdefault("mask_token", torch.empty(0))  # by which timm recognises DINOv2
    return checkpoint_filter_fn(tensors, encoder)


def _numbers(values: Tensor) -> str:
    return f"[{', '.join(f'{value:.6g}' for value in values.tolist())}]"


def _sizes(encoder: dict[str, Tensor]) -> str:
    """Patch size, width and depth of a vision transformer."""
    kernel = encoder[PATCH_WEIGHT]
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    patch = f"patch {shape_text(kernel[0, 0])}, " if kernel.ndim == 4 else ""
    return f"{patch}width {kernel.shape[0] if kernel.ndim else 1}, depth {depth}"


def _normalisation(folder: Path, encoder: str, weights: Weights) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by which pixels in [0, 1] were normalised, from the files beside, or as usual."""
    kernel = weights.encoder[PATCH_WEIGHT]
    half = torch.full((kernel.shape[1] if kernel.ndim == 4 else 3,), 0.5)
    if weights.ours or (folder / "state.json").is_file():  # a checkpoint of a run
        return half, half
    card, pixels = (read_object(folder / name) for name in ("config.json", "preprocessor_config.json"))
    timm_card, known = card.get("pretrained_cfg"), timm.get_pretrained_cfg(encoder)
    usual: Any = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    if not weights.decoder and card.get("model_type") != "vit_mae" and known is not None:
        usual = (known.mean, known.std)
    candidates = (
        (timm_card.get("mean"), timm_card.get("std")) if isinstance(timm_card, dict) else (None, None),
        (pixels.get("image_mean"), pixels.get("image_std")),
        (card.get("image_mean"), card.get("image_std")),
        usual,
    )
    mean, std = next((mean, std) for mean, std in candidates if mean and std)
    try:
        mean, std = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"the normalisation of pixels beside it can't be read: {error}") from None
    same = mean.shape == std.shape == half.shape  # else it is of photographs, and the file of other channels
    return (mean, std) if same else (half, half)


def to_timm(model: Any, name: str, arguments: dict[str, Any], folder: Path) -> str:
    """Write the encoder of a masked autoencoder for timm.

    timm's `local-dir:` and transformers' `AutoModel` open the folder; timm resamples the positions for another
    `img_size`. model.safetensors is a checkpoint of the model without a head (`num_classes=0`),
    with_zero_head.safetensors, where timm's model has classes by default, one with a head of zeros.

    Args:
        model: its `encoder` is a timm vision transformer without a head.
        name, arguments: of `timm.create_model` for the encoder.
        folder: where to write.

    Returns:
        A Python expression that opens it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoder = model.encoder
    tensors, width = encoder.state_dict(), encoder.num_features
    write(folder / "model.safetensors", tensors, {"format": "pt"})
    if classes := getattr(timm.get_pretrained_cfg(name), "num_classes", 0):
        head = {"head.weight": torch.zeros(classes, width), "head.bias": torch.zeros(classes)}
        write(folder / "with_zero_head.safetensors", tensors | head, {"format": "pt"})
    channels = arguments["in_chans"]
    card = {
        "architecture": name.partition(".")[0],
        "num_classes": 0,
        "num_features": width,
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "input_size": [channels, *encoder.patch_embed.img_size],
            "mean": [0.5] * channels,
            "std": [0.5] * channels,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 0,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (folder / "config.json").write_text(json.dumps(card, indent=2) + "\n")
    return f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)"


def to_transformers(model: Any, adapter: Any, folder: Path) -> bool:
    """Write a masked autoencoder for transformers' `ViTMAEForPreTraining` and `AutoModel`.

    Args:
        model: the masked autoencoder.
        adapter: has `mask_ratio` and `norm_pix`.
        folder: where to write.

    Returns:
        Whether it was written; False if its architecture is not that of ViTMAE.
    """
    if not _is_vit_mae(model):
        return False
    encoder, block = model.encoder, model.encoder.blocks[0]
    tensors = for_transformers({**model.state_dict(), "position": model.position})
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "model.safetensors", tensors, {"format": "pt"})
    decoder, half = model.decoder[0], [0.5] * encoder.patch_embed.proj.in_channels
    card = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "image_size": encoder.patch_embed.img_size[0],
        "patch_size": model.patch[0],
        "num_channels": len(half),
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": block.norm1.eps,
        "decoder_hidden_size": model.embed.out_features,
        "decoder_num_hidden_layers": len(model.decoder),
        "decoder_num_attention_heads": decoder.attn.num_heads,
        "decoder_intermediate_size": decoder.mlp.fc1.out_features,
        "mask_ratio": adapter.mask_ratio,
        "norm_pix_loss": adapter.norm_pix,
        "image_mean": half,  # not of transformers, which keeps it, so that what it saves can be read again
        "image_std": half,
    }
    (folder / "config.json").write_text(json.dumps(card, indent=2) + "\n")
    size = {"height": card["image_size"], "width": card["image_size"]}
    pixels = {"image_processor_type": "ViTImageProcessor", "size": size, "image_mean": half, "image_std": half}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n")
    return True


def _is_vit_mae(model: Any) -> bool:
    """Whether it is an MAE as in He et al. 2022, the only architecture of transformers' ViTMAE."""
    encoder, first = model.encoder, model.encoder.blocks[0]
    known = re.compile("|".join(re.escape(row[0]) for row in NAMES))
    in_block = re.compile(r"(encoder\.blocks|decoder)\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)")
    names = model.state_dict().keys()
    return (
        not model.cross
        and model.grid[0] == model.grid[1]
        and encoder.num_prefix_tokens == 1
        and not encoder.no_embed_class
        and "encoder.norm.weight" in names
        and first.norm1.eps == model.norm.eps
        and type(first).__name__ == "Block"
        and isinstance(first.mlp.act, nn.GELU)
        and "encoder.blocks.0.attn.qkv.bias" in names
        and all(known.match(name) for name in names)
        and all(in_block.fullmatch(name) for name in names if name.startswith(("encoder.blocks.", "decoder.")))
    )

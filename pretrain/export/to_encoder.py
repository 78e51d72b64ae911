"""Masked autoencoders as files that other people's programs open: timm and transformers."""

import json
import re
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pretrain.checkpoint.storage import write
from pretrain.export.from_encoder import BLOCK, NAMES, QKV


def to_timm(model: Any, name: str, arguments: dict[str, Any], folder: Path) -> str:
    """Write a masked autoencoder's encoder for timm, and say how it is opened there.

    The folder is one that timm's `local-dir:` and transformers' `AutoModel` open; with another `img_size` timm
    resamples its positions. model.safetensors alone is a checkpoint of a model without a head (`num_classes=0`),
    with_zero_head.safetensors one of a model with as many classes as timm gives it by default, where it gives it some.

    Args:
        model: its `encoder` is a timm vision transformer without a head.
        name, arguments: what `timm.create_model` makes the encoder from.
        folder: for the files.
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
    """Write a masked autoencoder for transformers' `ViTMAEForPreTraining` and `AutoModel`, where it is one like it.

    Args:
        model: the masked autoencoder.
        adapter: has its mask ratio and `norm_pix`.
        folder: for the files.
    """
    if not _is_plain(model):
        return False
    encoder, block = model.encoder, model.encoder.blocks[0]
    tensors: dict[str, Tensor] = {}
    for key, value in {**model.state_dict(), "position": model.position}.items():
        ours, _, theirs = next(row for row in NAMES if key.startswith(row[0]))
        name = theirs + key[len(ours) :]
        for inside, there in BLOCK:
            name = name.replace(inside, there) if theirs.endswith(("layer.", "layers.")) else name
        if ".attn.qkv." in name:
            parts = zip(QKV, value.chunk(3), strict=True)
            tensors |= {name.replace(".attn.qkv.", there): part for there, part in parts}
        else:
            tensors[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "model.safetensors", tensors, {"format": "pt"})
    decoder = model.decoder[0]
    card = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "image_size": encoder.patch_embed.img_size[0],
        "patch_size": model.patch[0],
        "num_channels": encoder.patch_embed.proj.in_channels,
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
    }
    (folder / "config.json").write_text(json.dumps(card, indent=2) + "\n")
    size = {"height": card["image_size"], "width": card["image_size"]}
    half = [0.5] * card["num_channels"]
    pixels = {"image_processor_type": "ViTImageProcessor", "size": size, "image_mean": half, "image_std": half}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n")
    return True


def _is_plain(model: Any) -> bool:
    """Whether it is an MAE as He et al. 2022 have it, which is what transformers' can be."""
    encoder, first = model.encoder, model.encoder.blocks[0]
    known = re.compile("|".join(re.escape(row[0]) for row in NAMES))
    within = re.compile(r"(encoder\.blocks|decoder)\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)")
    keys = model.state_dict().keys()
    return (
        not model.cross
        and model.grid[0] == model.grid[1]
        and encoder.num_prefix_tokens == 1
        and not encoder.no_embed_class
        and "encoder.norm.weight" in keys
        and first.norm1.eps == model.norm.eps
        and type(first).__name__ == "Block"
        and isinstance(first.mlp.act, nn.GELU)
        and "encoder.blocks.0.attn.qkv.bias" in keys
        and all(known.match(key) for key in keys)
        and all(within.fullmatch(key) for key in keys if key.startswith(("encoder.blocks.", "decoder.")))
    )

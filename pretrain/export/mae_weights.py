"""Weights of masked autoencoders: read from files of timm, transformers and published MAEs, written for the first two.

These libraries name the same parameters differently and normalise pixels differently.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from pretrain.checkpoint.storage import write
from pretrain.core.errors import UserError
from pretrain.core.files import expand
from pretrain.export.mae_names import (
    LISTED,
    NAMES,
    PATCH_WEIGHT,
    Weights,
    for_transformers,
    rename,
    summarise_names,
)

HEADS = re.compile(  # parameters that an encoder does not need, beside its own
    r"(\w*head\w*|decoder|classifier|fc|fc_norm|pre_logits|pooler|attn_pool|projector|predictor|mask_token)(\.|$)"
)


IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def start_from(model: Any, path: Path, encoder: str) -> str:
    """Initialize a masked autoencoder from a file.

    The file holds the encoder of timm, a published MAE with or without its decoder, transformers' ViTMAE, ViT or
    DINOv2, or the model of a run; wrappers (DDP, torch.compile, the teacher of a distillation) may have added prefixes.
    Patch embedding and positions are resampled to the model's patch and image size. The file's pixel normalisation is
    folded into the patch embedding.

    Args:
        model: the masked autoencoder; unchanged if an error is raised.
        path: .safetensors, a file that `torch.load` reads with weights_only=True, the .index.json of several, or a
            folder that holds one of these by its usual name.
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
    shard = re.search(r"-\d{5}-of-(\d{5})\.", path.name)
    if shard and int(shard[1]) > 1:
        raise UserError(f"it is one of {int(shard[1])} files of a model; give their .index.json")
    if path.is_dir():
        path = next((path / name for name in IN_FOLDER if (path / name).is_file()), path)
    weights = rename(_read(path))
    _check_values(weights, path, model.encoder)
    mean, std = _normalisation(path, encoder, weights)
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
    if differences := _differences(taken, own):
        raise UserError(
            f"it does not fit {encoder}: {differences}; set --model.encoder, width, depth and "
            f"heads to those of the file ({_sizes(weights.encoder)})"
        )
    decoder = {name: value for name, value in weights.decoder.items() if name != "position"}
    decoder_own = {name: value for name, value in model.state_dict().items() if not name.startswith("encoder.")}
    differences = _differences(decoder, decoder_own)
    position: Any = weights.decoder.get("position", model.position)
    if position.shape != model.position.shape or not torch.allclose(position, model.position, atol=1e-4):
        differences = differences or "its positions were trained"
    model.encoder.load_state_dict(taken)
    parts = "the encoder"
    if not differences:
        model.load_state_dict(decoder, strict=False)
        parts = "the encoder and the decoder"
    elif weights.decoder:
        parts += f" but not the decoder, which does not fit ({differences})"
    message = f"initialised {parts}"
    if weights.others:
        message += f" from {weights.prefix!r}, one of {weights.others + 1} encoders in it"
    if weights.ignored or heads:
        message += f", ignored {summarise_names([*heads, *weights.ignored], weights.prefix)}"
    return f"{message}; its pixels were normalised by mean {_numbers(mean)} and std {_numbers(std)}"


def _check_values(weights: Weights, path: Path, encoder: Any) -> None:
    """Raise a `UserError` if the weights are not finite floats, or are of another number of channels or heads."""
    for name, value in (weights.encoder | weights.decoder).items():
        if not value.is_floating_point() or not value.isfinite().all():
            kind = "values that are not finite" if value.is_floating_point() else f"{value.dtype} values"
            raise UserError(f"its {name} has {kind}; give weights of floating-point numbers, all finite")
    kernel, channels = weights.encoder[PATCH_WEIGHT], encoder.patch_embed.proj.in_channels
    if kernel.ndim == 4 and kernel.shape[1] not in (3, channels):
        raise UserError(
            f"it is of images with {kernel.shape[1]} channels, these have {channels}; give --data.channels "
            f"{kernel.shape[1]}, or a file for 3 channels, which are adapted"
        )
    card = _read_json(path.parent / "config.json")
    arguments, here = card.get("model_args"), encoder.blocks[0].attn.num_heads
    there = card.get("num_attention_heads", arguments.get("num_heads") if isinstance(arguments, dict) else None)
    if isinstance(there, int) and there != here:
        raise UserError(f"its config.json has {there} attention heads, the model {here}; give --model.heads {there}")


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
    if len(mean) == kernel.shape[1]:
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


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else "x".join(map(str, tensor.shape)) or "a number"


def _differences(there: dict[str, Tensor], here: dict[str, Tensor]) -> str:
    """The names whose shapes differ, with the shapes; "" if none does."""
    names = [name for name in (*here, *there) if name not in there or name not in here]
    names += [name for name in here if name in there and here[name].shape != there[name].shape]
    names = [*dict.fromkeys(names)]
    listed = [f"{name} ({_shape(there.get(name))} in the file, {_shape(here.get(name))} here)" for name in names]
    return ", ".join(listed[:LISTED]) + (f" and {len(listed) - LISTED} more" if len(listed) > LISTED else "")


def _sizes(encoder: dict[str, Tensor]) -> str:
    """Patch size, width and depth of a vision transformer."""
    kernel = encoder[PATCH_WEIGHT]
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    patch = f"patch {_shape(kernel[0, 0])}, " if kernel.ndim == 4 else ""
    return f"{patch}width {kernel.shape[0] if kernel.ndim else 1}, depth {depth}"


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the files that an index names, by name; nested names are joined by dots."""
    if not path.is_file():
        raise UserError(f"there is no {IN_FOLDER[0]} in this folder" if path.is_dir() else "there is no such file")
    if path.name.endswith(".index.json"):
        names = {*_read_json(path).get("weight_map", {}).values()}
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise UserError("it names no files of weights beside it")
        return {name: value for file in sorted(names) for name, value in _read(path.parent / file).items()}
    start = b""
    try:
        with path.open("rb") as file:  # whose name does not matter
            start = file.read(64)
            file.seek(0)
            if start[8:9] == b"{":  # the header of safetensors
                return load_file(path)
            with torch.serialization.safe_globals([argparse.Namespace]):  # published MAEs contain their arguments
                found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # readers of broken files raise exceptions of any type
        raise UserError(
            f"it can't be read as tensors ({_cause(start, error)}); give a .safetensors file, or a .pth file of "
            "tensors alone"
        ) from None
    tensors = dict(_flat(found, ""))
    if not tensors:
        raise UserError("it holds no named tensors; give the state dict of a model")
    return tensors


def _cause(start: bytes, error: Exception) -> str:
    """Why a file that starts with these bytes could not be read; torch's own messages advise to trust it."""
    if not start and not isinstance(error, OSError):
        return "it is empty"
    for begin, what in ((b"version https://git-lfs", "it is a Git LFS pointer"), (b"<", "it is a web page")):
        if start.startswith(begin):
            return what
    message = " ".join(str(error).split())
    if "weights_only" in message or "Weights only" in message:
        return "it is of another format, or holds Python objects or code, which are not loaded"
    return f"{type(error).__name__}: {message[:160]}"


def _flat(tree: object, prefix: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(tree, Tensor) and prefix:
        yield prefix, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))


def _normalisation(path: Path, encoder: str, weights: Weights) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by which pixels in [0, 1] were normalised, from the files beside, or as usual."""
    if weights.ours or (path.parent / "state.json").is_file():  # a checkpoint of a run
        return torch.full((3,), 0.5), torch.full((3,), 0.5)
    card, pixels = (_read_json(path.parent / name) for name in ("config.json", "preprocessor_config.json"))
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
        return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"the normalisation of pixels beside it can't be read: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; {} if there is no file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read: {error}; repair it or move it away") from None
    return found if isinstance(found, dict) else {}


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

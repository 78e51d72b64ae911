"""Names of a masked autoencoder's parameters: ours, and those of timm, published MAEs and transformers."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.core.errors import UserError
from pretrain.export.weights import preference, summarise_names, without_wrappers

# Starts of our names, of those of published MAEs (facebookresearch/mae; the encoder's are timm's), and of those of
# transformers' ViTMAE.
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
DECODER = NAMES[5:]
BLOCK = (  # in a block: timm's names (and ours), and transformers'
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
)
QKV = (".attention.attention.query.", ".attention.attention.key.", ".attention.attention.value.")
VARIANTS = (  # further names in files of transformers, and the ones above
    (r"^vit\.layers\.", "vit.encoder.layer."),  # transformers 5, in memory
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),  # saved by transformers 5
    (r"\.attention\.q_proj\.", QKV[0]),
    (r"\.attention\.k_proj\.", QKV[1]),
    (r"\.attention\.v_proj\.", QKV[2]),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"^vit\.embeddings\.(register_tokens|mask_token)", r"vit.\1"),  # DINOv2
)
PATCH_WEIGHT = "patch_embed.proj.weight"  # of every timm vision transformer
PATCH_WEIGHT_TRANSFORMERS = "embeddings.patch_embeddings.projection.weight"


class Weights(NamedTuple):
    """The contents of a file by our names.

    Attributes:
        encoder: by the names of a timm vision transformer.
        decoder: by the names of a `MaskedAutoencoder`.
        ignored: names in the file of what is neither.
        prefix: of the encoder's names in the file.
        ours: whether the decoder has our names, so the file is of a run.
        others: number of further encoders in the file.
    """

    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    ignored: list[str]
    prefix: str
    ours: bool
    others: int


def rename(tensors: dict[str, Tensor]) -> Weights:
    """Tensors of a file by our names, whatever the library and the prefix.

    The patch embedding, which every vision transformer has, gives both.
    """
    plain = without_wrappers(tensors)
    ends = (PATCH_WEIGHT, PATCH_WEIGHT_TRANSFORMERS)
    found = [name for name in plain if any(name == end or name.endswith(f".{end}") for end in ends)]
    if not found:
        raise UserError(
            f"it holds no vision transformer, of which {' or '.join(ends)} would be a part; it "
            f"holds {summarise_names(plain)}"
        )
    patch_weight = min(found, key=preference)
    transformers = patch_weight.endswith(PATCH_WEIGHT_TRANSFORMERS)
    prefix = patch_weight.removesuffix(ends[transformers])
    whole = re.sub(r"(^|\.)(vit|encoder)\.$", r"\1", prefix)  # of the masked autoencoder that it may be a part of
    inside: dict[str, str] = {}
    for name in plain:
        decoder = name.removeprefix(whole) if name.startswith(whole) else ""
        if name.startswith(prefix) and not (transformers and decoder.startswith("decoder.")):
            inside[("vit." if transformers else "") + name.removeprefix(prefix)] = name
        elif decoder.startswith(("decoder.", *(row[0] for row in DECODER))):
            inside[("" if transformers else "our.") + decoder] = name
    taken = {*inside.values()}
    ignored = [name for name in plain if name not in taken]
    read = {name: tensors[plain[there]] for name, there in inside.items()}
    values = {name: value.float() if value.is_floating_point() else value for name, value in read.items()}
    named = _from_transformers(values) if transformers else _from_published(values)
    encoder = {name.removeprefix("encoder."): value for name, value in named.items() if name.startswith("encoder.")}
    decoder = {name: value for name, value in named.items() if not name.startswith("encoder.")}
    return Weights(encoder, decoder, ignored, prefix, any(name.startswith("our.") for name in values), len(found) - 1)


def _from_published(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """By our names, of timm's and those of published MAEs; "our." marks names of our decoder."""
    has_decoder = any(name.startswith("decoder_embed.") for name in values)
    renamed = {}
    for name, value in values.items():
        if name.startswith("our."):
            renamed[name.removeprefix("our.")] = value
            continue
        row = next((row for row in DECODER if has_decoder and name.startswith(row[1])), None)
        renamed[f"encoder.{name}" if row is None else row[0] + name.removeprefix(row[1])] = value
    return renamed


def _from_transformers(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """By our names, of those of transformers."""
    renamed: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        for pattern, replacement in VARIANTS:
            name = re.sub(pattern, replacement, name)
        ours, _, theirs = next((row for row in NAMES if name.startswith(row[2])), ("encoder.", "", "vit."))
        name = ours + name.removeprefix(theirs)
        if name.startswith(("encoder.blocks.", "decoder.")):
            for inside, there in BLOCK:
                name = name.replace(there, inside)
        part = next((part for part in QKV if part in name), None)
        if part is None:
            renamed[name] = value
        else:
            qkv.setdefault(name.replace(part, ".attn.qkv."), {})[part] = value
    for name, parts in qkv.items():
        if len(parts) == len(QKV):  # else it is missing
            try:
                renamed[name] = torch.cat([parts[part] for part in QKV])
            except RuntimeError as error:
                raise UserError(f"its query, key and value of {name} can't be joined: {error}") from None
    return renamed


def for_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a masked autoencoder, and its `position`, by the names of transformers' ViTMAE."""
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        ours, _, theirs = next(row for row in NAMES if key.startswith(row[0]))
        name = theirs + key.removeprefix(ours)
        for inside, there in BLOCK:
            name = name.replace(inside, there) if theirs.endswith(("layer.", "layers.")) else name
        if ".attn.qkv." in name:
            parts = zip(QKV, value.chunk(3), strict=True)
            renamed |= {name.replace(".attn.qkv.", there): part for there, part in parts}
        else:
            renamed[name] = value
    return renamed

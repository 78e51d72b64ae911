"""From an encoded image to pixels."""

import io
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class Glance(NamedTuple):
    """What an image's header says."""

    size: tuple[int, int]  # (H, W), upright
    grey: bool


def _open(image: dict[str, Any]) -> Image.Image:
    """An image from {"bytes", "path"}: encoded, or where it lies."""
    return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])


def glance(image: dict[str, Any]) -> Glance | None:
    """Size and colour of an image {"bytes", "path"} without decoding it; None where it can't be read."""
    try:
        with _open(image) as picture:
            lies = picture.getexif().get(0x0112, 1) > 4  # the orientation tag: on its side
            palette: Any = picture.convert("RGB").getcolors(256) if picture.mode in ("P", "PA") else []
            grey = bool(palette) and all(red == green == blue for _, (red, green, blue) in palette)
            grey |= picture.mode in ("1", "L", "LA", "F") or picture.mode.startswith("I")
            width, height = picture.size
            return Glance((width, height) if lies else (height, width), grey)
    except Exception:  # image decoders raise whatever they like; the image is named when it is visited
        return None


def decode(image: dict[str, Any], channels: int, size: int | None) -> Tensor:
    """uint8 [C, H, W] from {"bytes", "path"}: upright, 8 bits a channel.

    Args:
        image: encoded bytes, or where they lie.
        channels: 1, 3, or 4: with alpha; else what is transparent lies on white.
        size: scale the shorter side to it and crop the middle; None leaves the image's own size.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)  # handled below
        with _open(image) as picture:
            picture.load()
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):  # PIL would clip 16 bits, not scale them
                values = np.asarray(picture).astype(np.int64)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError(f"its values span {values.min()} to {values.max()}, more than 16 bits")
                picture = Image.fromarray((values // 257).astype(np.uint8))
            elif picture.mode == "F":
                raise ValueError("it has floating-point values, whose range is not known; save it with 8 or 16 bits")
            if channels == 4:  # to PIL an RGBX is four bands like any other; resizing an RGBA would mix them
                picture = Image.merge("RGBX", picture.convert("RGBA").split())
            else:
                if picture.has_transparency_data:
                    picture = picture.convert("RGBA")
                    white = Image.new("RGBA", picture.size, "white")
                    picture = Image.alpha_composite(white, picture)
                picture = picture.convert("L" if channels == 1 else "RGB")
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(picture))
    return values.view(picture.height, picture.width, channels).permute(2, 0, 1).contiguous()

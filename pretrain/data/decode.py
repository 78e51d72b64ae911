"""Decoding image files to tensors."""

import io
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class ImageInfo(NamedTuple):
    """Size and colour of an image."""

    size: tuple[int, int]  # (H, W), after the EXIF orientation is applied
    grey: bool  # whether the file stores grey values only


def _open(image: dict[str, Any]) -> Image.Image:
    """Open {"bytes", "path"}: the encoded bytes, or the file at the path if there are none."""
    return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])


def image_info(image: dict[str, Any]) -> ImageInfo | None:
    """Read the size and colour of an image from its header; only palette images are decoded.

    Args:
        image: {"bytes", "path"}: the encoded bytes, or the path of a file if they are None.

    Returns:
        None if the image can't be read.
    """
    try:
        with _open(image) as picture:
            sideways = picture.getexif().get(0x0112, 1) > 4  # the orientation tag: turned by 90 or 270 degrees
            palette: Any = picture.convert("RGB").getcolors(256) if picture.mode in ("P", "PA") else []
            grey = bool(palette) and all(red == green == blue for _, (red, green, blue) in palette)
            grey |= picture.mode in ("1", "L", "LA", "F") or picture.mode.startswith("I")
            width, height = picture.size
            return ImageInfo((width, height) if sideways else (height, width), grey)
    except Exception:  # image decoders raise exceptions of any type; the error is reported when the image is used
        return None


def decode(image: dict[str, Any], channels: int, size: int | None) -> Tensor:
    """Decode an image to 8 bits per channel, with its EXIF orientation applied.

    Args:
        image: {"bytes", "path"}: the encoded bytes, or the path of a file if they are None.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA). With 1 or 3, transparent pixels are composited on white.
        size: resize the shorter side to `size` pixels (bicubic) and center-crop; None keeps the size.

    Returns:
        uint8 [C, H, W].

    Raises:
        ValueError: the pixels are floating-point numbers, or integers outside of 16 bits.
        Exception: of any type, from the decoder of a damaged file; a file of too many pixels (Pillow's limit for
            decompression bombs) too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)  # handled below
        with _open(image) as picture:
            picture.load()
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):  # Pillow would clip 16 bits to 8, not scale
                values = np.asarray(picture).astype(np.int64)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError(f"its values span {values.min()} to {values.max()}, more than 16 bits")
                picture = Image.fromarray((values // 257).astype(np.uint8))
            elif picture.mode == "F":
                raise ValueError("it has floating-point values, whose range is not known; save it with 8 or 16 bits")
            if channels == 4:  # RGBX: four independent bands; resizing RGBA would premultiply the colours by alpha
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

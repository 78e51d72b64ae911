"""From an encoded image, or an array, to pixels."""

import io
import os
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from pretrain.data.files import FORMATS, OPENED, from_text, read_packed
from pretrain.data.ranges import scale_to_uint8
from pretrain.data.tiff import MAX_PIXELS, ORIENTATION, PICTURES, TIFF, Values, check_pages, tiff_values

MAX_CHUNK = 64 * 1024**2  # bytes of a PNG's text or color profile

Image.MAX_IMAGE_PIXELS = None  # checked here, against MAX_PIXELS
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_CHUNK

SHAPES = "1, 3 or 4 bands can be used"


class Reading(NamedTuple):
    """How images are read.

    Attributes:
        range: values that become black and white where they are not 8-bit; None: 16 bits.
        is_set: whether the user set the range: it is applied to 8-bit images, too, and values outside are cut off.
        pages: "first" reads the first page or frame of an image that has several; None: that is an error.
        folders: where files that a table names must lie; None: anywhere.
        bands: 1, 3 or 4: the most that are not alpha among the images that were looked at; in others more are an error.
        shards: the tar files whose places a table names.
    """

    range: tuple[float, float] | None = None
    is_set: bool = False
    pages: str | None = None
    folders: tuple[str, ...] | None = None
    bands: int = 4
    shards: tuple[str, ...] = ()


class ImageInfo(NamedTuple):
    """What an image's header says; of images that are not 8-bit the smallest and the largest value, too."""

    size: tuple[int, int]  # (H, W), upright
    grey: bool
    unused: bool = False  # there is a fourth band that is not alpha
    extrema: tuple[float, float, bool] | None = None  # minimum, maximum, whether they are floats
    what: str = ""  # what its values are
    bands: int = 0  # if they are none of a picture's, see `Values.is_picture`


def path_of(path: str, folders: tuple[str, ...] | None) -> str:
    """The file that a row names.

    Raises:
        ValueError: it lies outside of `folders`.
    """
    path = from_text(path)
    if folders is None:
        return path
    real = os.path.realpath(os.path.join(folders[0], path))  # noqa: PTH118 — not Path: it may hold any bytes
    if not any(real.startswith(f"{os.path.realpath(folder)}{os.sep}") for folder in folders):
        raise ValueError("its path leads out of the folder of the data set")
    return real


def _stream(image: dict[str, Any], reading: Reading) -> io.BufferedIOBase:
    """The encoded image of {"bytes", "path"}, or of a place in a tar file."""
    if "shard" in image:
        return io.BytesIO(read_packed(image, reading.shards))
    if image["bytes"]:
        return io.BytesIO(image["bytes"])
    if not image["path"]:
        raise ValueError("it has neither bytes nor a path" if image["bytes"] is None else "it has no bytes")
    path = path_of(image["path"], reading.folders)
    if not os.path.exists(path):  # noqa: PTH110
        raise FileNotFoundError("there is no such file")
    if not os.path.isfile(path):  # noqa: PTH113 — a FIFO would be waited for
        raise ValueError("it is no regular file")
    return open(path, "rb")  # noqa: PTH123 — closed by the caller


def _open(stream: Any) -> Image.Image:
    """An image of one of the formats that are read, not decoded yet."""
    try:
        picture = Image.open(stream, formats=OPENED)
    except UnidentifiedImageError:
        raise ValueError(f"it is no image of these formats: {', '.join(FORMATS)}") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"it has {picture.width * picture.height / 1e6:,.0f} megapixels, above {MAX_PIXELS / 1e6:.0f}")
    return picture


def _values(picture: Image.Image, stream: Any) -> Values | None:
    """Pixels of an opened image that is not 8-bit; None for others."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        orientation, pixels = picture.getexif().get(ORIENTATION, 1), np.asarray(picture)[..., None]
        if isinstance(transparent := picture.info.get("transparency"), int):
            alpha = (pixels != transparent) * 65535
            return Values(np.concatenate([pixels, alpha], axis=-1).astype(np.uint16), True, orientation)
        return Values(pixels, orientation=orientation)
    if picture.format == "PNG" and any(str(tile[3]).endswith(";16B") for tile in getattr(picture, "tile", ())):
        return _deep_png(picture, stream)
    if picture.format == "PPM" and picture.mode == "RGB":
        return _deep_ppm(picture, stream)
    return None


def _deep_ppm(picture: Any, stream: Any) -> Values | None:
    """Pixels of a PPM with 16 bits a band, of which Pillow makes 8; None for others. White is 65535."""
    decoder, _, offset, args = picture.tile[0]
    top = args[-1] if isinstance(args, tuple) else args
    if not isinstance(top, int) or top < 256:
        return None
    stream.seek(offset)
    shape = picture.height, picture.width, 3
    if decoder == "ppm_plain":
        flat = np.array(re.sub(rb"#[^\r\n]*", b"", stream.read()).split(), dtype=np.float64)
    else:
        flat = np.frombuffer(stream.read(2 * int(np.prod(shape))), ">u2").astype(np.float64)
    return Values((flat.reshape(shape) * (65535 / top)).round().astype(np.uint16))


def _deep_png(picture: Any, stream: Any) -> Values:
    """Pixels of a PNG with 16 bits a band, of which Pillow reads the upper byte: the lower one as if it were that."""
    tile = picture.tile[0]  # gone once the image is decoded
    if tile[3] == "LA;16B":  # grey and alpha: four bytes a pixel
        picture.tile = [tile._replace(args="RGBA")]
        upper, lower = np.split(np.asarray(picture).reshape(picture.height, picture.width, 2, 2), 2, axis=-1)
        pixels = (upper.astype(np.uint16) * 256 + lower)[..., 0]
    else:
        upper = np.asarray(picture).astype(np.uint16)
        stream.seek(0)
        with Image.open(stream, formats=OPENED) as again:
            again.tile = [tile._replace(args=tile[3].replace("16B", "16L"))]  # type: ignore[attr-defined]
            pixels = upper * 256 + np.asarray(again)
    transparent = picture.info.get("transparency")
    if transparent is not None and pixels.shape[-1] == 3:  # a color that stands for transparency
        alpha = (pixels != np.array(transparent)).any(axis=-1, keepdims=True) * np.uint16(65535)
        pixels = np.concatenate([pixels, alpha], axis=-1)
    return Values(pixels, pixels.shape[-1] in (2, 4), picture.getexif().get(ORIENTATION, 1))


def _of_array(array: Any, channels: int | None) -> Values:
    """A row's array as [H, W, C]; of [C, H, W] the bands come first.

    They do if only the first axis has `channels` values, or, where neither has, if it is the shorter one.

    Raises:
        ValueError: it is none.
    """
    array = np.asarray(array)
    if array.dtype == object or array.ndim not in (2, 3) or not array.size:
        shape = "rows of different lengths" if array.dtype == object else f"the shape {array.shape}"
        raise ValueError(f"it is an array with {shape}, and [H, W], [H, W, C] or [C, H, W] can be used")
    if array.ndim == 2:
        array = array[..., None]
    else:
        first, last = array.shape[0], array.shape[2]
        many = channels not in (None, *PICTURES) and channels in (first, last)
        if last != channels if many else last > 4 and (first <= 4 or (first < last and first < array.shape[1])):
            array = np.moveaxis(array, 0, 2)
    array = array * np.uint8(255) if array.dtype == bool else array
    return Values(array, what=f"it is an array with {array.shape[2]} bands")


def _merged(bands: np.ndarray, mode: str) -> Image.Image:
    """A picture of uint8 [H, W, C]."""
    pictures = [Image.fromarray(np.ascontiguousarray(bands[..., number])) for number in range(bands.shape[-1])]
    return pictures[0] if mode == "L" else Image.merge(mode, pictures)


def _to_picture(values: Values, reading: Reading) -> Image.Image:
    """An upright 8-bit picture; RGBX if it has four bands and none is alpha."""
    color, count = _to_8_bits(values, reading), values.pixels.shape[-1]
    picture = _merged(color, {1: "L", 2: "LA", 3: "RGB"}.get(count) or ("RGBA" if values.has_alpha else "RGBX"))
    picture.getexif()[ORIENTATION] = values.orientation
    return ImageOps.exif_transpose(picture)


def _to_8_bits(values: Values, reading: Reading) -> np.ndarray:
    """The values as uint8 [H, W, C], by the range of the reading."""
    pixels, count = values.pixels, values.pixels.shape[-1]
    colors, is_float = count - values.has_alpha, values.pixels.dtype.kind == "f"
    color = pixels[..., :colors]
    if is_float and not np.isfinite(color).all():
        raise ValueError("it has values that are not finite")
    if reading.is_set or color.dtype != np.uint8:
        if reading.range is None and is_float:
            raise ValueError("it has floating-point values, whose range is not known; set --data.range LOW HIGH")
        if reading.range is None and color.max() < 2**14:
            raise ValueError(
                f"it is not 8-bit, and its values reach only {color.max()}; set black and white with --data.range LOW "
                "HIGH"
            )
        color = scale_to_uint8(color, *(reading.range or (0, 65535)), clip=reading.is_set)
    if values.has_alpha:
        alpha = pixels[..., colors:]
        top = 1 if is_float else np.iinfo(alpha.dtype).max
        color = np.concatenate([color, scale_to_uint8(alpha, 0, top, clip=True)], axis=-1)
    return color


def _with_range(picture: Image.Image, reading: Reading) -> Image.Image:
    """An 8-bit picture with its values mapped to the range that the user set."""
    if picture.mode not in ("L", "LA", "RGB", "RGBA"):
        picture = picture.convert("L" if picture.mode == "1" else "RGBA" if picture.has_transparency_data else "RGB")
    pixels = np.asarray(picture).reshape(picture.height, picture.width, -1)
    return _to_picture(Values(pixels, picture.mode in ("LA", "RGBA")), reading)


def _read(image: Any, reading: Reading, channels: int | None, look: Callable[[Image.Image], Any]) -> Any:
    """`Values` of an image, or what `look` returns of the opened picture, if that is 8-bit."""
    if image is None:
        raise ValueError("its row has no image")
    if not isinstance(image, dict):
        return _of_array(image, channels)
    with _stream(image, reading) as stream:
        head = stream.read(4)
        stream.seek(0)
        if not head:
            raise ValueError("the file is empty")
        if head in TIFF and (values := tiff_values(stream, reading.pages)) is not None:
            return values
        with _open(stream) as picture:
            if picture.format not in ("MPO", "TIFF") and getattr(picture, "is_animated", False):
                check_pages(getattr(picture, "n_frames", 1), reading.pages)
            values = _values(picture, stream)
            return look(picture) if values is None else values


def image_info(
    image: Any,
    reading: Reading = Reading(),  # noqa: B008 — it can't be changed
    channels: int | None = None,
) -> ImageInfo | None:
    """Size and color of an image, see `decode`, without decoding it if it is 8-bit; None where it can't be read."""

    def look(picture: Image.Image) -> ImageInfo:
        is_turned = picture.getexif().get(ORIENTATION, 1) > 4
        palette: Any = picture.convert("RGB").getcolors(256) if picture.mode in ("P", "PA") else []
        grey = bool(palette) and all(red == green == blue for _, (red, green, blue) in palette)
        grey |= picture.mode in ("1", "L", "LA")
        width, height = picture.size
        return ImageInfo((width, height) if is_turned else (height, width), grey)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _read(image, reading, channels, look)
        if isinstance(found, ImageInfo):
            return found
        (height, width, count), dtype = found.pixels.shape, found.pixels.dtype
        color = found.pixels[..., : count - found.has_alpha]
        if not np.isfinite(color).all():
            return None
        extrema = None if dtype == np.uint8 else (float(color.min()), float(color.max()), dtype.kind == "f")
        size = (width, height) if found.orientation > 4 else (height, width)
        bands = 0 if found.is_picture else count
        return ImageInfo(size, count <= 2, count == 4 and not found.has_alpha, extrema, str(dtype), bands)
    except Exception:  # image decoders raise exceptions of any type; the image is named when it is used
        return None


def decode(image: Any, channels: int, size: int | None, reading: Reading = Reading()) -> Tensor:  # noqa: B008
    """Decode an image to uint8 [C, H, W], upright.

    Args:
        image: {"bytes", "path"}, encoded; or an array [H, W], [H, W, C] or [C, H, W]; None raises.
        channels: 1, 3, or 4: with alpha, or with the fourth band; else what is transparent lies on white. Of any other
            number the image must have as many bands, which are used as they are.
        size: scale the shorter side to it and crop the middle; None leaves the image's own size.
        reading: range of its values, and other settings.

    Raises:
        ValueError: it can't be used; the message says why. Decoders raise exceptions of other types, too.
    """

    def load(picture: Image.Image) -> Image.Image:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        return _with_range(picture, reading) if reading.is_set else picture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's, on palettes, EXIF and the like: what is no image is an error
        found = _read(image, reading, channels, load)
        if channels not in PICTURES:
            pictures = _bands(found, channels, reading)
        elif isinstance(found, Values) and not found.is_picture:
            count = found.pixels.shape[-1]
            said = found.what if str(count) in found.what else f"{found.what} {count} bands"
            raise ValueError(f"{said}, and {SHAPES}; --data.channels {count} uses all bands of such images")
        else:
            picture = _to_picture(found, reading) if isinstance(found, Values) else found
            _check_bands(picture, channels, reading.bands)
            pictures = [_to_channels(picture, channels)]
    if size is not None and pictures[0].size != (size, size):
        pictures = [ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC) for picture in pictures]
    values = np.concatenate([np.array(one).reshape(one.height, one.width, -1) for one in pictures], axis=-1)
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def _bands(found: Values | Image.Image, channels: int, reading: Reading) -> list[Image.Image]:
    """Upright 8-bit pictures of the bands of an image that must have `channels` of them.

    Raises:
        ValueError: it has another number.
    """
    count = found.pixels.shape[-1] if isinstance(found, Values) else len(found.getbands())
    if count != channels:
        raise ValueError(f"it has {count} band{'s' * (count != 1)}, and {channels} are used (--data.channels)")
    if isinstance(found, Image.Image):
        return [*found.split()]
    bands = _to_8_bits(found, reading)
    turned = (_merged(bands[..., [number]], "L") for number in range(channels))
    pictures = []
    for picture in turned:
        picture.getexif()[ORIENTATION] = found.orientation
        pictures.append(ImageOps.exif_transpose(picture))
    return pictures


def _check_bands(picture: Image.Image, channels: int, bands: int) -> None:
    """Raise ValueError for color, or a fourth band, that would be lost though no image that was looked at has it."""
    if picture.mode == "RGBX" and channels < 4 and bands < 4:
        raise ValueError(
            "it has a fourth band, which none of the images that were looked at has; set --data.channels 4, or "
            f"{channels} to leave it out"
        )
    if channels == bands == 1 and picture.mode not in ("1", "L", "LA"):
        red, green, blue = np.moveaxis(np.asarray(_to_channels(picture, 3)), -1, 0)
        if (red != green).any() or (red != blue).any():
            raise ValueError(
                "it has color, which none of the images that were looked at has; set --data.channels 3, or 1 to leave "
                "it out"
            )


def _to_channels(picture: Image.Image, channels: int) -> Image.Image:
    """An 8-bit picture as L, RGB, or RGBX: to Pillow four bands like any other; resizing an RGBA would mix them."""
    if picture.mode == "RGBX":
        if channels == 4:
            return picture
        picture = Image.merge("RGB", picture.split()[:3])
    if channels == 4:
        return Image.merge("RGBX", picture.convert("RGBA").split())
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if channels == 1 else "RGB")

"""TIFFs that Pillow does not read, or only in part: their pixels."""

import logging
from typing import Any, NamedTuple

import numpy as np

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it can't read is reported here

MAX_PIXELS = 500_000_000  # of an image as it is stored; larger ones are not read
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 274  # TIFF and EXIF tag
COLORS = {2: 3, 5: 4, 6: 3, 8: 3}  # bands of a TIFF's color, by its photometric tag; others have one
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # photometric tags
UNSIGNED, SIGNED, FLOAT, UNDEFINED = 1, 2, 3, 4  # sample formats of a TIFF
PICTURES = (1, 3, 4)  # bands of pictures: grey, RGB, and RGB with alpha or a fourth band; other numbers are only bands


class Values(NamedTuple):
    """Pixel values that are not 8-bit, or have bands that a picture has not."""

    pixels: np.ndarray  # [H, W, C]
    has_alpha: bool = False
    orientation: int = 1  # as in EXIF
    what: str = "it has"  # for messages about the bands

    @property
    def is_picture(self) -> bool:
        """Whether the bands are those of a grey or color picture, with or without alpha or a fourth one."""
        return self.pixels.shape[-1] in PICTURES or (self.pixels.shape[-1] == 2 and self.has_alpha)


def check_pages(count: int, pages: str | None) -> None:
    """Raise ValueError for several pages or frames, unless the first one is asked for."""
    if pages != "first" and count > 1:
        raise ValueError(f"it has {count} pages or frames; split it, or use the first of each with --data.pages first")


def _tiff_pages(file: Any) -> int:
    """The number of a TIFF's pages that are no previews and masks; ImageJ stores many images as one page.

    Raises:
        ValueError: a page leads back to one before it.
    """
    count, seen = 0, set()
    for page in file.pages:
        if page.offset in seen:
            raise ValueError("its pages lead in a circle")
        seen.add(page.offset)
        count += not page.subfiletype & 5
    count *= file.pages[0].imagedepth
    if file.is_imagej or file.is_shaped:
        count = max(count, file.series[0].size // file.pages[0].size)
    return count


def tiff_values(stream: Any, pages: str | None) -> Values | None:
    """Pixels of a TIFF that Pillow would not read, or only in part; None for others.

    Raises:
        ValueError: it can't be used, for example its bands.
    """
    import tifffile

    try:
        file = tifffile.TiffFile(stream)
        page: Any = file.pages[0]
        count = _tiff_pages(file)
    except Exception:  # of whatever type, from a damaged file on; Pillow says what is wrong
        stream.seek(0)
        return None
    check_pages(count, pages)
    samples, bits, kind = page.samplesperpixel, int(np.max(page.bitspersample)), int(page.sampleformat)
    kind = UNSIGNED if kind == UNDEFINED else kind
    extra, alpha = samples - COLORS.get(int(page.photometric), 1), tuple(map(int, page.extrasamples))
    has_alpha = extra == 1 and alpha in ((1,), (2,))
    by_pillow = {(UNSIGNED, size) for size in (1, 2, 4, 8, 12, 16)} | {(SIGNED, 16), (SIGNED, 32), (FLOAT, 32)}
    if (
        (kind, bits) in by_pillow
        and not (extra > 0 and not has_alpha)
        and not (bits > 8 and (samples > 1 or page.photometric == WHITE_IS_ZERO))
        and not (file.is_bigtiff and file.byteorder == ">")
        and page.imagedepth == 1
    ):
        stream.seek(0)
        return None
    what = f"it is a TIFF with {samples} bands of {bits} bits"
    if (
        page.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)
        or page.dtype is None
        or page.dtype.kind not in "biuf"
    ):
        color = getattr(page.photometric, "name", page.photometric)
        raise ValueError(f"{what}, {color}, of type {page.dtype}, and grey and RGB of real numbers can be used")
    if page.imagewidth * page.imagelength * page.imagedepth > MAX_PIXELS:
        raise ValueError(f"it has more than {MAX_PIXELS / 1e6:.0f} megapixels")
    try:
        pixels = page.asarray()
    except Exception as error:  # of whatever type
        raise ValueError(f"{what}, which can't be read: {' '.join(str(error).split())}") from None
    return _from_tiff(pixels, page, has_alpha)._replace(what=what)


def _from_tiff(pixels: np.ndarray, page: Any, has_alpha: bool) -> Values:
    """Pixels of a TIFF's page as [H, W, C], black below white, colors not multiplied by alpha."""
    depth = page.axes.find("Z")
    if depth >= 0:
        pixels = pixels.take(0, axis=depth)
    pixels = np.moveaxis(pixels, 0, -1) if page.axes.startswith("S") else pixels
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if page.photometric == WHITE_IS_ZERO:
        if pixels.dtype.kind != "u":
            raise ValueError(f"it is a TIFF whose white is 0, of type {pixels.dtype}, and its black is not known")
        colors = pixels.shape[-1] - has_alpha
        pixels[..., :colors] = np.iinfo(pixels.dtype).max - pixels[..., :colors]
    if has_alpha and int(page.extrasamples[0]) == 1:
        top = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "iu" else 1
        color = pixels[..., :-1].astype(np.float64) * top / np.maximum(pixels[..., -1:], 1e-9)
        pixels[..., :-1] = color.clip(0, top)
    tag = page.tags.get(ORIENTATION)
    return Values(pixels, has_alpha, int(tag.value) if tag else 1)

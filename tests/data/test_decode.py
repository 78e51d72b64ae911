"""Decoding: every image mode, orientation, size and cropping."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.data.decode import decode


def save(folder: Path, name: str, image: Image.Image, **options) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def plain(color: int | tuple = 100, mode: str = "L", size: tuple[int, int] = (6, 6)) -> Image.Image:
    return Image.new(mode, size, color)


@pytest.mark.parametrize(
    ("image", "channels", "expected"),
    [
        (plain(100), 1, [100]),
        (plain(100), 3, [100, 100, 100]),
        (plain((10, 20, 30), "RGB"), 3, [10, 20, 30]),
        (plain((255, 0, 0), "RGB"), 1, [76]),
        (plain((0, 0, 0, 0), "RGBA"), 3, [255, 255, 255]),  # transparent pixels are white
        (plain((200, 0, 0, 255), "RGBA"), 3, [200, 0, 0]),
        (plain((50, 0), "LA"), 1, [255]),
        (plain(1, "1"), 1, [255]),
        (Image.fromarray(np.full((6, 6), 257 * 100, np.uint16)), 1, [100]),  # scaled, not clipped
        (Image.fromarray(np.full((6, 6), 257 * 100, np.int32)), 1, [100]),
        (plain((10, 20, 30), "RGB").convert("P", palette=Image.Palette.ADAPTIVE), 3, [10, 20, 30]),
        (plain((0, 255, 255, 0), "CMYK"), 3, [255, 0, 0]),
        (plain((200, 10, 20, 0), "RGBA"), 4, [200, 10, 20, 0]),  # four channels: alpha is data
        (plain((10, 20, 30), "RGB"), 4, [10, 20, 30, 255]),
        (plain((50, 9), "LA"), 4, [50, 50, 50, 9]),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_image_mode_is_decoded(tmp_path: Path, image: Image.Image, channels: int, expected: list) -> None:
    path = save(tmp_path, f"x.{'tif' if image.mode in ('CMYK', 'I') else 'png'}", image)
    decoded = decode({"bytes": None, "path": str(path)}, channels, None)
    assert decoded.dtype == torch.uint8 and decoded.shape == (channels, 6, 6)
    assert decoded[:, 0, 0].tolist() == expected


def test_upright_and_cropped_to_the_middle(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    path = save(tmp_path, "x.png", plain(size=(8, 4)), exif=exif)
    assert decode({"bytes": None, "path": str(path)}, 1, None).shape == (1, 8, 4)
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    path = save(tmp_path, "y.png", Image.fromarray(wide))
    assert (decode({"bytes": None, "path": str(path)}, 1, 4) == 200).all()
    four = np.random.default_rng(0).integers(0, 255, (9, 7, 4)).astype(np.uint8)
    small = decode({"bytes": None, "path": str(save(tmp_path, "z.png", Image.fromarray(four)))}, 4, 5)
    for channel in range(4):  # channels are resized independently
        path = save(tmp_path, "one.png", Image.fromarray(four[..., channel]))
        assert torch.equal(decode({"bytes": None, "path": str(path)}, 1, 5)[0], small[channel])


def test_a_float_image_raises(tmp_path: Path) -> None:
    path = save(tmp_path, "x.tif", Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(ValueError, match="floating-point"):
        decode({"bytes": None, "path": str(path)}, 1, None)

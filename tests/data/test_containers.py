"""Pixels of any container: arrays, 16-bit files, several bands and pages."""

import io
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import tifffile
from parquet_files import pictures, table
from PIL import Image, PngImagePlugin

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data import decode as decoding
from pretrain.data.decode import Reading, decode
from pretrain.data.sources import Source, open_data

SEEDS = range(6)


def source(path: object, **settings) -> Source:
    return open_data(Data(source=str(path), **settings), seed=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("top", [1, 255, 1023, 4095, 16383, 65535])
def test_arrays_keep_their_grey_levels(tmp_path: Path, top: int, seed: int) -> None:
    """Black is black, white is white, whatever type and order of axes a table has."""
    rng = np.random.default_rng(seed)
    channels = int(rng.choice([1, 3]))
    array = rng.integers(0, top + 1, (5, 6, 7, channels))
    array[:, 0, 0], array[:, -1, -1] = 0, top
    kinds = [np.int64, np.float32] + ([np.uint8] if top == 255 else []) + ([np.uint16] if top > 255 else [])
    array = array.astype(kinds[seed % len(kinds)])
    stored = np.moveaxis(array, -1, 1) if seed % 2 else array[..., 0] if channels == 1 else array
    table({"image": stored.tolist() if seed % 3 else [*stored]}, tmp_path / "x.parquet")
    s = source(tmp_path / "x.parquet")
    assert s.shape == (channels, 6, 7)
    for images in (s.train, s.test):
        for number, row in enumerate(images.rows):
            expected = np.moveaxis(array[row], -1, 0) * (255 / top)
            assert np.abs(images[None, number].image.numpy() - expected).max() <= 0.51
    if top != 255:
        assert f"values 0 to {top}" in str(s.report)


def test_array_columns_and_ranges(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    array = np.linspace(-1, 1, 4 * 36).reshape(4, 6, 6).astype(np.float32)
    table({"pixels": [*array]}, file, pixels=datasets.Array2D((6, 6), "float32"))
    s = source(file)
    everything = np.stack([s.train[None, n].image.numpy()[0] for n in range(3)])
    assert np.abs(everything - (array[s.train.rows] + 1) * 127.5).max() <= 0.51
    s = source(file, range=(0, 0.5))
    assert {0, 255} <= {*np.unique([s.train[None, n].image.numpy() for n in range(3)])}
    table({"image": (1000 * array).tolist()}, file)
    with pytest.raises(UserError, match=r"values from -1000 to 1000 .*set --data\.range LOW HIGH"):
        source(file)
    assert source(file, range=(-1000, 1000)).train[None, 0].problem == ""
    table({"image": [[1, 2, 3]] * 4}, file)
    with pytest.raises(UserError, match="no height and width"):
        source(file)


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits, uint16 [H, W, C]; Pillow writes grey ones only."""
    height, width, count = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    made = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


@pytest.mark.parametrize("container", ["png", "tif", "tifffile"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_twelve_bits_in_sixteen(tmp_path: Path, container: str, count: int) -> None:
    rng, arrays = np.random.default_rng(count), []
    for number in range(6):
        pixels = rng.integers(0, 4096, (6, 7, count)).astype(np.uint16)
        pixels[0, 0], pixels[1, 1] = 0, 4095
        path = tmp_path / f"{number}.{container[:3]}"
        if container == "png":
            if count == 4:
                pixels[..., 3] = 65535  # alpha
            path.write_bytes(png16(pixels))
        elif container == "tif" and count == 1:
            Image.fromarray(pixels[..., 0].astype(np.int32)).save(path)
        else:
            more = {"extrasamples": ["unspecified"]} if count == 4 else {}
            tifffile.imwrite(path, pixels, photometric="rgb" if count > 1 else "minisblack", **more)
        arrays.append(pixels)
    s = source(tmp_path, channels=count)
    assert "values 0 to 4095" in str(s.report)
    for number, row in enumerate(s.train.rows):
        image, expected = s.train[None, number].image.numpy(), np.moveaxis(arrays[row], -1, 0) / 4095 * 255
        assert np.abs(image - expected.clip(0, 255)).max() <= 0.51
    (tmp_path / "5.png").write_bytes(png16(np.full((6, 7, 1), 60000, np.uint16)))
    s = source(tmp_path, channels=count, range=(0, 4095))
    assert all(not s.train[None, n].problem for n in range(len(s.train)))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_sixteen_bits_of_a_png_are_read(count: int) -> None:
    pixels = np.random.default_rng(count).integers(0, 65536, (9, 5, count)).astype(np.uint16)
    with Image.open(io.BytesIO(png16(pixels))) as picture:
        values = decoding._deep_png(picture, io.BytesIO(png16(pixels)))
    assert (values.pixels == pixels).all() and values.has_alpha == (count != 3)


def test_a_value_above_the_range_is_a_bad_image() -> None:
    content = png16(np.full((4, 4, 1), 5000, np.uint16))
    with pytest.raises(ValueError, match=r"span 5000 to 5000, more than the 0 to 4095 .*--data\.range"):
        decode({"bytes": content, "path": None}, 1, None, Reading((0.0, 4095.0)))
    assert decode({"bytes": content, "path": None}, 1, None, Reading((0.0, 4095.0), is_set=True)).max() == 255


def tiff(pixels: np.ndarray, **options) -> dict:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **options)
    return {"bytes": stream.getvalue(), "path": None}


def test_extra_bands_are_read_or_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 4)).astype(np.uint8)
    for options in ({}, {"compression": "zlib"}, {"planarconfig": "separate"}):
        stored = np.moveaxis(pixels, 2, 0) if "planarconfig" in options else pixels
        image = tiff(np.ascontiguousarray(stored), photometric="rgb", extrasamples=["unspecified"], **options)
        assert (decode(image, 4, None).numpy() == np.moveaxis(pixels, 2, 0)).all()
        assert (decode(image, 3, None).numpy() == np.moveaxis(pixels[..., :3], 2, 0)).all()
    for number in range(4):
        (tmp_path / f"{number}.tif").write_bytes(image["bytes"])
    assert "fourth band" in str(source(tmp_path).report) and "fourth band" not in str(
        source(tmp_path, channels=4).report
    )
    for count in (2, 5):
        many = np.zeros((6, 7, count), np.uint8)
        image = tiff(many, photometric="minisblack", planarconfig="contig", extrasamples=["unspecified"] * (count - 1))
        with pytest.raises(ValueError, match=f"{count} bands of 8 bits, and 1, 3 or 4 bands can be used"):
            decode(image, 3, None)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP"])
def test_several_pages_are_refused_unless_the_first_is_asked_for(kind: str) -> None:
    frames, stream = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (200, 100, 0)], io.BytesIO()
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
    image = {"bytes": stream.getvalue(), "path": None}
    with pytest.raises(ValueError, match=r"3 pages or frames; .*--data\.pages first"):
        decode(image, 3, None)
    assert decode(image, 3, None, Reading(pages="first")).float().mean((1, 2))[0] > 190


def test_large_chunks_and_scans_are_read(monkeypatch) -> None:
    text, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text("prompt", "x" * 3_000_000, zip=True)
    Image.new("L", (4, 4), 7).save(stream, "PNG", pnginfo=text, icc_profile=bytes(3_000_000))
    assert (decode({"bytes": stream.getvalue(), "path": None}, 1, None) == 7).all()
    assert decoding.MAX_PIXELS > 400e6 and Image.MAX_IMAGE_PIXELS is None
    scan_, stream = Image.new("1", (10_000, 9_500), 1), io.BytesIO()
    scan_.save(stream, "PNG")
    assert (decode({"bytes": stream.getvalue(), "path": None}, 1, 4) == 255).all()
    monkeypatch.setattr(decoding, "MAX_PIXELS", 15)
    with pytest.raises(ValueError, match="megapixels, above"):
        decode({"bytes": pictures(1)[0]["bytes"], "path": None}, 1, None)

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


@pytest.mark.parametrize("seed", range(40))
def test_a_tiff_is_read_as_it_is_meant_or_refused(seed: int) -> None:
    """Of any type, byte order, photometric tag and bands: the values scaled to 8 bits, or one sentence."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(rng.choice(["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8", "c8"]))
    count, alpha = int(rng.choice([1, 1, 3, 4])), 0
    low, high = (0.0, 1.0) if kind.kind in "fc" else map(float, (np.iinfo(kind).min, np.iinfo(kind).max))
    pixels = (low + rng.random((6, 7, count)) * (high - low)).astype(kind)
    color = "minisblack" if count == 1 else str(rng.choice(["rgb", "rgb", "minisblack"]))
    if count == 1 and rng.random() < 0.4:
        color = "miniswhite"
    elif count == 4 and rng.random() < 0.3:
        color = "separated"
    bands = {"rgb": 3, "separated": 4}.get(color, 1)
    options: dict = {
        "photometric": color,
        "byteorder": str(rng.choice(["<", ">"])),
        "bigtiff": bool(rng.random() < 0.3),
    }
    if count > bands:
        alpha = int(rng.choice([0, 1, 2])) if count == bands + 1 else 0
        options["extrasamples"] = [alpha] * (count - bands)
        options["planarconfig"] = "contig"
    image, reading = tiff(pixels, **options), Reading((low, high), is_set=kind.kind != "u" or kind.itemsize > 1)
    is_real = kind.kind in "uif" and not (color == "separated" and (kind.str[1:] != "u1" or options["bigtiff"]))
    if not is_real or (color == "miniswhite" and kind.kind != "u"):
        with pytest.raises(ValueError, match=r"(of|its) type|its black is not known|bits"):
            decode(image, count, None, reading)
        return
    if color == "separated" or alpha == 1:  # CMYK, by Pillow; colors multiplied by alpha
        assert decode(image, 3, None, reading).shape == (3, 6, 7)
        return
    got = decode(image, count if count != 4 or alpha or color != "separated" else 3, None, reading).numpy()
    expected = (pixels.astype(np.float64) - low) * (255 / (high - low))
    expected = 255 - expected if color == "miniswhite" else expected
    shown = expected.clip(0, 255)
    if alpha == 2:
        top = 1 if kind.kind == "f" else np.iinfo(kind).max
        shown[..., -1] = (pixels[..., -1].astype(np.float64) * (255 / top)).clip(0, 255)
    assert np.abs(got - np.moveaxis(shown, -1, 0)).max() <= 1.01, (kind, options)


def test_colors_multiplied_by_alpha_are_divided_by_it() -> None:
    color = np.full((6, 7, 3), 40_000, np.uint16)
    alpha = np.linspace(1, 65535, 42).reshape(6, 7, 1).astype(np.uint16)
    stored = np.concatenate([(color * (alpha / 65535)).round().astype(np.uint16), alpha], axis=-1)
    got = decode(tiff(stored, photometric="rgb", extrasamples=["assocalpha"]), 4, None, Reading((0, 65535)))
    seen = alpha[..., 0] > 5000
    assert np.abs(got[:3, seen].numpy() - 40_000 / 257).max() <= 1


def test_pages_that_are_not_pages_of_the_file_are_counted() -> None:
    """Several images in one page, as ImageJ stores many of them, and volumes."""
    stack = np.random.default_rng(0).integers(0, 256, (16, 16, 16)).astype(np.uint8)
    for options in (
        {"photometric": "minisblack", "truncate": True},
        {"photometric": "minisblack", "volumetric": True, "tile": (16, 16, 16)},
        {"imagej": True},
    ):
        image = tiff(stack, **options)
        with pytest.raises(ValueError, match=r"16 pages or frames; .*--data\.pages first"):
            decode(image, 1, None)
        assert (decode(image, 1, None, Reading(pages="first"))[0].numpy() == stack[0]).all()


def test_pages_that_lead_in_a_circle_do_not_hang() -> None:
    content = bytearray(tiff(np.zeros((4, 4), np.uint8))["bytes"])
    (first,) = struct.unpack("<I", content[4:8])
    (tags,) = struct.unpack("<H", content[first : first + 2])
    content[first + 2 + 12 * tags : first + 6 + 12 * tags] = struct.pack("<I", first)
    got = decode({"bytes": bytes(content), "path": None}, 1, None, Reading(pages="first"))
    assert got.shape == (1, 4, 4) and not got.any()


@pytest.mark.parametrize("top", [255, 1023, 4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_all_bits_of_a_ppm_are_read(tmp_path: Path, top: int, plain: bool) -> None:
    """Twelve bits in a file of sixteen, too."""
    rng = np.random.default_rng(top)
    limit = min(top, 4095)
    pixels = rng.integers(0, limit + 1, (4, 6, 7, 3))
    pixels[:, 0, 0] = limit
    for number, image in enumerate(pixels):
        text = b" ".join(b"%d" % value for value in image.flatten())
        body = b"# a comment\n" + text if plain else image.astype(">u2" if top > 255 else "u1").tobytes()
        (tmp_path / f"{number}.ppm").write_bytes(b"P%d\n7 6\n%d\n" % (3 if plain else 6, top) + body)
    s = source(tmp_path)
    for number, row in enumerate(s.train.rows):
        expected = np.moveaxis(pixels[row], -1, 0) * (255 / limit)
        assert np.abs(s.train[None, number].image.numpy() - expected).max() <= 1.01


def test_transparency_of_a_deep_grey_png() -> None:
    pixels, stream = np.full((4, 4), 60_000, np.uint16), io.BytesIO()
    pixels[0, 0] = 20
    Image.fromarray(pixels).save(stream, "PNG", transparency=20)
    got = decode({"bytes": stream.getvalue(), "path": None}, 1, None)
    assert got[0, 0, 0] == 255 and abs(int(got[0, 1, 1]) - 60_000 / 257) <= 1


def test_images_that_are_not_finite_do_not_hide_the_range_of_the_others(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, bad in enumerate([np.nan, 0, np.inf, 0, -np.inf, 0]):
        pixels = rng.random((4, 4)).astype(np.float32)
        pixels[0, 0] = bad
        tifffile.imwrite(tmp_path / f"{number}.tif", pixels, photometric="minisblack")
    s = source(tmp_path)
    assert "values 0 to 1" in str(s.report)
    found = {int(images.rows[n]): images[None, n].problem for images in (s.train, s.test) for n in range(len(images))}
    assert all(("not finite" in problem) == (row % 2 == 0) for row, problem in found.items())
    for number in (1, 3, 5):
        (tmp_path / f"{number}.tif").unlink()
    with pytest.raises(UserError, match="not finite"):
        source(tmp_path)


def test_types_of_different_ranges_are_refused(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(tmp_path / f"{number}.png")
        Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / f"{number}.tif")
    with pytest.raises(UserError, match=r"float32 values 0 to 1 and|uint16 values 0 to 65535 and"):
        source(tmp_path)


@pytest.mark.parametrize("kind", ["color", "grey", "band"])
def test_no_color_or_band_is_lost_unless_asked_for(tmp_path: Path, kind: str) -> None:
    """Among the images that were not looked at, either."""
    for number in range(150):
        Image.new("L", (4, 4), number).save(tmp_path / f"{number:03d}.png")
    value = np.full((4, 4, 4), 100, np.uint8)
    value[..., 0] = 90 if kind == "color" else 100
    if kind == "band":
        tifffile.imwrite(tmp_path / "000x.tif", value, photometric="rgb", extrasamples=["unspecified"])
    else:
        Image.fromarray(value[..., :3]).save(tmp_path / "000x.png")
    for channels in (None, 1):
        s = source(tmp_path, channels=channels)
        assert s.shape == (1, 4, 4)
        problems = [
            item.problem for part in (s.train, s.test) for n in range(len(part)) if (item := part[None, n]).problem
        ]
        assert bool(problems) == (channels is None and kind != "grey")
        assert all("000x" in problem and "--data.channels" in problem for problem in problems)


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

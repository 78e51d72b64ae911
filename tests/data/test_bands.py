"""Images with two, five or more bands: TIFFs and arrays, trained on, shown, generated and exported."""

import io
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import tifffile
import timm
import torch
from autoencoders import encode
from parquet_files import table
from PIL import Image
from programs import common, train

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.decode import Reading, decode
from pretrain.data.grid import grid
from pretrain.data.sources import Source, open_data
from pretrain.evaluation import generate, visualize


def source(path: object, **settings) -> Source:
    return open_data(Data(source=str(path), **settings), seed=0)


def save(path: Path, pixels: np.ndarray) -> None:
    """A TIFF of bands without a meaning, uint8 or uint16 [H, W, C]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    more = {"extrasamples": [0] * (pixels.shape[-1] - 1)}
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", **more)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 12 x 12 with five bands, two classes."""
    folder, rng = tmp_path_factory.mktemp("five"), np.random.default_rng(0)
    for number in range(24):
        save(folder / f"class {number % 2}" / f"{number:03d}.tif", rng.integers(0, 256, (12, 12, 5)).astype(np.uint8))
    return folder


@pytest.mark.parametrize("bands", [2, 5, 7])
@pytest.mark.parametrize("container", ["tif", "tif16", "HWC", "CHW"])
@pytest.mark.parametrize("is_set", [False, True])
def test_all_bands_are_used(tmp_path: Path, container: str, bands: int, is_set: bool) -> None:
    rng = np.random.default_rng(bands)
    top = 4095 if container == "tif16" else 255
    pixels = rng.integers(0, top + 1, (8, 9, 10, bands)).astype(np.uint16 if top > 255 else np.uint8)
    pixels[:, 0, 0], pixels[:, 1, 1] = 0, top
    if container.startswith("tif"):
        for number, image in enumerate(pixels):
            save(tmp_path / f"{number}.tif", image)
    else:
        stored = np.moveaxis(pixels, -1, 1) if container == "CHW" else pixels
        table({"image": stored.tolist()}, tmp_path / "x.parquet", image=datasets.Array3D(stored.shape[1:], "uint8"))
    s = source(tmp_path, channels=bands if is_set else None)
    assert s.shape == (bands, 9, 10)
    assert (f"images have {bands} bands, and all of them are used" in str(s.report)) == (not is_set)
    for images in (s.train, s.test):
        for number, row in enumerate(images.rows):
            item = images[None, number]
            expected = np.moveaxis(pixels[row], -1, 0) * (255 / top)
            assert not item.problem and np.abs(item.image.numpy() - expected).max() <= 0.51


def test_bands_are_resized_and_turned_like_pictures() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 5)).astype(np.uint8)
    small = decode(pixels, 5, 4)
    for band in range(5):
        assert torch.equal(decode(pixels[..., band], 1, 4)[0], small[band])
    scaled = decode(pixels, 5, None, Reading((0, 100), is_set=True)).numpy()
    assert np.abs(scaled - np.moveaxis(pixels, -1, 0).clip(0, 100) * 2.55).max() <= 0.51


def test_an_image_of_other_bands_is_a_bad_one(five: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"5 bands of 8 bits, and 1, 3 or 4 .*; --data\.channels 5 uses all bands"):
        decode({"bytes": next(five.glob("*/*.tif")).read_bytes(), "path": None}, 3, None)
    for number in range(9):
        save(tmp_path / f"{number}.tif", np.full((4, 4, 5), number, np.uint8))
    Image.new("RGB", (4, 4)).save(tmp_path / "odd.png")
    for channels in (None, 5):
        s = source(tmp_path, channels=channels)
        assert s.shape == (5, 4, 4) and "1 have other bands and can't be used" in str(s.report)
        found = {images.name_of(n): images[None, n].problem for images in (s.train, s.test) for n in range(len(images))}
        (said,) = filter(None, found.values())
        assert "odd.png" in said and "it has 3 bands, and 5 are used (--data.channels)" in said
    assert source(tmp_path, channels=3).shape == (3, 4, 4)
    with pytest.raises(ValueError, match=r"channels must be at least 1, got 0"):
        Data(channels=0)


def test_two_bands_are_grey_and_alpha_too() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 2)).astype(np.uint8)
    picture = Image.merge("LA", [Image.fromarray(np.ascontiguousarray(pixels[..., n])) for n in range(2)])
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    assert (decode({"bytes": stream.getvalue(), "path": None}, 2, None).numpy() == np.moveaxis(pixels, -1, 0)).all()


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3)])
def test_a_picture_shows_the_first_bands(channels: int, shown: int) -> None:
    images = torch.rand(2, channels, 100, 100) * 2 - 1
    sheet = grid(images, 2)
    assert sheet.shape[-1] == shown
    assert torch.equal(sheet[1:101, 1:101], ((images[0, :shown].movedim(0, -1) + 1) * 127.5).round().byte())


def test_a_masked_autoencoder_of_five_bands(five: Path, tmp_path: Path) -> None:
    train("train_mae.py", *common(five, tmp_path / "run", 1), "--data.channels", 5)
    visualize.main(tmp_path / "run", n=2)
    encoder = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    assert encoder(torch.zeros(1, 5, 12, 12)).shape[0] == 1


def test_denoisers_of_five_bands(five: Path, tmp_path: Path) -> None:
    for adapter, more in (("ddpm", []), ("flow", ["--class-conditional"])):
        run = tmp_path / adapter
        train("train_diffusion.py", *common(five, run, 1), "--adapter", adapter, *more)
        generate.main(run, num_images=3, steps=2)
        made = source(run / "generated" / "images")
        assert made.shape == (5, 12, 12) and not made.train[None, 0].problem
        with Image.open(run / "generated" / "grid.png") as sheet:
            assert sheet.mode == "RGB"
        pipeline = diffusers.DiffusionPipeline.from_pretrained(run / "model", trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 12, 12, 5)
        with pytest.raises(ValueError, match="5 channels can't be PIL images; give output_type 'np' or 'pt'"):
            pipeline(batch_size=2, num_inference_steps=2)
        assert 'output_type="np"' in (run / "model" / "README.md").read_text()


def test_latents_of_five_bands_are_refused(five: Path, tmp_path: Path, vaes: Path) -> None:
    with pytest.raises(UserError, match=r"the autoencoder encodes images of \d channels?, these have 5"):
        encode(vaes / "kl", five, tmp_path / "latents")

"""The segmentation example on masks that are made here."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT
from PIL import Image, ImageDraw
from torch import nn

sys.path.insert(0, str(ROOT / "examples"))  # as for a script that is started there

import segmentation
from fit import Training
from segmentation_adapter import IGNORED, Masked, Segmentation
from segmentation_data import Made, Pairs, Pictures, open_pairs

from pretrain import InfoBatch
from pretrain.core.errors import UserError, exit_on_user_error
from pretrain.core.rng import generator


def save(folder: Path, name: str, values: np.ndarray) -> None:
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def draw_pairs(folder: Path, count: int, size: int = 24) -> list[str]:
    """Squares (class 1) and discs (class 2) on black (class 0) with an ignored left column: `images`, `masks`."""
    rng = np.random.default_rng(0)
    for number in range(count):
        kind, (x, y) = 1 + number % 2, rng.integers(0, size // 2, 2).tolist()
        image, mask = Image.new("RGB", (size, size)), Image.new("L", (size, size))
        for picture, fill in ((image, (int(rng.integers(80, 255)),) * 3), (mask, kind)):
            pen = ImageDraw.Draw(picture)
            (pen.rectangle if kind == 1 else pen.ellipse)((x, y, x + size // 2, y + size // 2), fill=fill)
        values = np.array(mask)
        values[:, 0] = IGNORED
        save(folder / "images", f"{kind}/{number:03d}", np.array(image))
        save(folder / "masks", f"{kind}/{number:03d}", values)
    return ["--images", str(folder / "images"), "--masks", str(folder / "masks")]


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that the program ends with at an error."""
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        tyro.cli(segmentation.main, args=[*map(str, words)])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def random_mask(rng: torch.Generator, *shape: int, classes: int) -> torch.Tensor:
    mask = torch.randint(classes, shape, generator=rng)
    return mask.masked_fill(torch.rand(shape, generator=rng) < torch.rand((), generator=rng), IGNORED)


def test_ignored_pixels_change_neither_loss_nor_gradient() -> None:
    """Of a network without a receptive field; the image of an ignored pixel is then without influence."""
    for seed in range(20):
        rng = generator(seed)
        model = nn.Conv2d(2, 5, 1)
        image, mask = torch.rand(4, 2, 6, 7, generator=rng), random_mask(rng, 4, 6, 7, classes=5)
        mask[2] = IGNORED
        other = torch.where((mask == IGNORED)[:, None], torch.rand(image.shape, generator=rng), image)
        found = []
        for pixels in (image, other):
            model.zero_grad()
            losses = Segmentation()(model, Masked(pixels, mask, torch.arange(4)))
            assert losses.score is None and losses.loss[2] == 0
            losses.loss.sum().backward()
            found.append((losses.loss.detach(), model.weight.grad.clone()))
        assert all(torch.equal(*both) for both in zip(*found, strict=True)) and found[0][1].isfinite().all()
        each = nn.functional.cross_entropy(model(image), mask, reduction="none", ignore_index=IGNORED)
        for row in (0, 1, 3):
            valid = mask[row] != IGNORED
            if valid.any():
                torch.testing.assert_close(found[0][0][row], each[row][valid].mean())


def test_an_image_without_valid_pixels_is_a_sample_like_others() -> None:
    infobatch = InfoBatch(4, epochs=2)
    mask = torch.zeros(4, 3, 3, dtype=torch.int64)
    mask[1] = IGNORED
    for _ in infobatch.epochs():
        index = torch.tensor([*infobatch])
        loss = Segmentation()(nn.Conv2d(1, 2, 1), Masked(torch.rand(4, 1, 3, 3)[index], mask[index], index)).loss
        assert infobatch(loss, index).isfinite()


def test_mean_iou_is_that_of_sets_of_pixels() -> None:
    """Over the classes that occur; predictions where the mask is ignored do not count."""
    for seed in range(50):
        rng = generator(seed)
        mask, predicted = random_mask(rng, 3, 5, 5, classes=4), torch.randint(5, (3, 5, 5), generator=rng)
        counts = sum(segmentation.confusion(*both, 9) for both in zip(predicted, mask, strict=True))
        ious = []
        for kind in range(9):
            true, found = ((values == kind) & (mask != IGNORED) for values in (mask, predicted))
            if (true | found).any():
                ious.append((true & found).sum() / (true | found).sum())
        expected = torch.stack(ious).mean().item() if ious else float("nan")
        assert segmentation.mean_iou(counts) == pytest.approx(expected, nan_ok=True)


def test_image_and_mask_are_cropped_and_flipped_alike() -> None:
    """By draws of (seed, epoch, index); an image that shows its mask still shows it."""
    areas = torch.randint(8, (4, 4), generator=generator(0))
    mask = areas.repeat_interleave(20, 0).repeat_interleave(25, 1)

    class Shown(Made):
        def __call__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return (30 * mask[None]).to(torch.uint8).expand(3, -1, -1), mask.int()

    read = Shown(torch.zeros(1), torch.zeros(1), 0)
    pictures = Pictures(read, 4, 32, Pairs(crop=0.2, flip=True), seed=3)
    drawn = {}
    for epoch in range(6):
        for index in range(4):
            image, found, _ = drawn[epoch, index] = pictures[epoch, index]
            assert image.shape == (3, 32, 32) and found.shape == (32, 32)
            assert ((image.float() / 30).round()[0] == found).float().mean() > 0.75  # else at the borders of the areas
            assert torch.equal(image, pictures[epoch, index][0])
    assert len({image.numpy().tobytes() for image, *_ in drawn.values()}) > 15
    whole = pictures[None, 0]
    assert whole[0].shape == (3, 32, 32) and torch.equal(whole[1], mask.long())


def test_a_folder_of_images_and_masks_is_trained_on(tmp_path: Path, capsys) -> None:
    words = draw_pairs(tmp_path, 160)
    training = Training(epochs=8, batch_size=16, lr=3e-3, policy="importance", budget=0.8)
    data = Pairs(images=words[1], masks=words[3], size=24, flip=True)
    assert segmentation.main(data, training=training) > 0.5  # a third is what the background alone gives
    printed = capsys.readouterr().out
    assert "144 images to train on, 16 to evaluate on; 3 classes" in printed
    used, full = re.search(r"([\d,]+) samples used instead of ([\d,]+)", printed).groups()
    assert int(used.replace(",", "")) == round(0.8 * int(full.replace(",", "")))


def test_fashion_mnist_has_masks_by_a_threshold() -> None:
    image = torch.tensor([[[[0, 128], [192, 13]]]], dtype=torch.uint8)
    assert Made(image, torch.tensor([3]), 10)(0)[1].tolist() == [[10, 3], [3, 10]]
    assert 0 < segmentation.main(Pairs(limit=64), training=Training(epochs=1)) < 1


def test_what_does_not_fit_is_named(tmp_path: Path, capsys) -> None:
    words = draw_pairs(tmp_path, 6)
    images, masks = tmp_path / "images", tmp_path / "masks"
    (masks / "notes.txt").write_text("")
    (masks / "1" / "000.png").rename(tmp_path / "away.png")
    open_pairs(Pairs(images=words[1], masks=words[3]), 0)
    printed = capsys.readouterr().out
    assert f"images without a mask, not used: 1 of 6, for example {images / '1' / '000.png'}" in printed
    assert f"files that are no PNG files, not used: 1 in {masks}, for example {masks / 'notes.txt'}" in printed
    assert "4 images to train on, 1 to evaluate on" in printed

    save(masks, "lone", np.zeros((4, 4)))
    assert f"masks without an image of their name in {images}: 1, for example {masks / 'lone.png'}" in fails(
        capsys, *words
    )
    save(images, "lone", np.zeros((4, 5, 3)))
    assert "lone.png is 5x4, its mask 4x4" in fails(capsys, *words)
    save(images, "lone", np.zeros((4, 4, 3)))
    save(masks, "lone", np.zeros((4, 4, 3)))
    assert "lone.png has colors (mode RGB)" in fails(capsys, *words)
    save(masks, "lone", np.full((4, 4), IGNORED))
    (images / "lone.jpg").write_bytes((images / "lone.png").read_bytes())
    assert "lone.jpg and" in fails(capsys, *words)
    (images / "lone.jpg").unlink()
    assert open_pairs(Pairs(images=words[1], masks=words[3]), 0).classes == 3
    assert f"masks without a valid pixel, whose loss is 0: 1 of 6, for example {masks / 'lone.png'}" in (
        capsys.readouterr().out
    )
    (images / "lone.png").write_bytes((images / "lone.png").read_bytes()[:45])
    for workers in (0, 1):
        message = fails(capsys, *words, "--size", 8, "--workers", workers, "--training.epochs", 1)
        assert f"{images / 'lone.png'} can't be read" in message
    (masks / "lone.png").write_bytes(b"\x89PNG")
    assert f"{masks / 'lone.png'} can't be read" in fails(capsys, *words)
    for path in masks.rglob("*.png"):
        save(path.parent, path.stem, np.full((24, 24), IGNORED) - 255)
    save(images, "lone", np.zeros((24, 24, 3)))
    assert "the masks have class 0 alone (255 is ignored)" in fails(capsys, *words)
    assert f"{tmp_path / 'no'} is no folder" in fails(capsys, "--images", tmp_path / "no", *words[2:])
    assert "give both of the first two" in fails(capsys, *words[:2])
    assert "--crop must be above 0 and at most 1, got 2" in fails(capsys, *words, "--crop", 2)


def test_ade20k_is_read_by_its_layout(tmp_path: Path, capsys) -> None:
    """150 classes from 1; 0, "other", is ignored."""
    rng = np.random.default_rng(0)
    for part, count in (("training", 5), ("validation", 2)):
        for number in range(count):
            name = f"{part}/ADE_{part[:5]}_{number:08d}"
            shape = (20 + number, 30)
            save(tmp_path / "annotations", name, rng.integers(0, 151, shape))
            save(tmp_path / "images", name, rng.integers(0, 255, (*shape, 3)))
            (tmp_path / "images" / f"{name}.png").rename(tmp_path / "images" / f"{name}.jpg")
    train, test, channels, classes = open_pairs(Pairs(ade20k=str(tmp_path), size=16), 0)
    assert (len(train), len(test), channels, classes) == (5, 2, 3, 150)
    for index in range(2):
        file = tmp_path / "annotations" / "validation" / f"ADE_valid_{index:08d}.png"
        expected = torch.from_numpy(np.array(Image.open(file))).long() - 1
        image, mask, _ = test[None, index]
        assert image.shape == (3, 16, 16) and torch.equal(mask, expected.where(expected >= 0, IGNORED))
    training = Training(epochs=2, batch_size=3)
    assert 0 <= segmentation.main(Pairs(ade20k=str(tmp_path), size=32, crop=0.5), training=training) < 1
    save(tmp_path / "annotations" / "training", "ADE_train_00000000", np.full((20, 30), 151))
    assert "ADE_train_00000000.png has the value 151" in fails(capsys, "--ade20k", tmp_path)
    assert "is no folder" in fails(capsys, "--ade20k", tmp_path / "images")


@pytest.mark.parametrize("encoder", ["test_vit", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_any_encoder_of_timm_with_features_segments(encoder: str) -> None:
    """Made for one size of images or any, with channels first or last."""
    model = segmentation.Segmenter(encoder, 3, 7, (0, 1, 2), 64)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7, 64, 64)


def test_an_encoder_that_is_not_there_is_named(capsys) -> None:
    assert "--encoder resnet9000 can't be made for --size 28" in fails(capsys, "--limit", 8, "--encoder", "resnet9000")
    for stages, size in (((99,), 32), ((0,), 33)):
        with pytest.raises(UserError, match="--encoder test_vit can't be made for --size"):
            segmentation.Segmenter("test_vit", 3, 7, stages, size)

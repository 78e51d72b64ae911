"""What reading images costs beside training on them, and what is saved where they are read once (data/image_cache.py).

    python benchmarks/reading.py --config configs/fashion_mnist_mae.yaml
    python benchmarks/reading.py --config configs/cifar10_mae.yaml --photos 32 --steps 0

In CPU time. Steps on images that are decoded anew and on ones that were kept take turns, on the same samples, so that
both see the same machine. Crops and flips, which the device makes that trains, are counted apart.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import tyro
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from pretrain.adapters import Batch
from pretrain.config.build import build_model
from pretrain.config.cli import parse
from pretrain.config.schema import Config
from pretrain.core.rng import SampleRNG, generator
from pretrain.data.images import Images, on_device
from pretrain.data.preload import preload
from pretrain.data.sources import open_data
from pretrain.training.optim import build_optimizer

CPU = torch.device("cpu")


def main(config: Path, steps: int = 60, photos: int | None = None) -> None:
    """Measure.

    Args:
        config: a recipe.
        steps: of each kind, in turns; 0 measures the reading alone.
        photos: instead of the recipe's images, square cuts of scikit-learn's two photographs, of this side: PNG, from
            224 on JPEG.
    """
    denoises = "mae" not in config.stem
    made = parse(
        ["--config", str(config)],
        adapter="ddpm" if denoises else "mae",
        model="unet" if denoises else "mae",
        recipe=config,
        output_dir="",
        help="",
    )
    with tempfile.TemporaryDirectory() as folder:
        if photos:
            draw(Path(folder), photos)
            made = replace(made, data=replace(made.data, source=folder, held_out=1))
        kept, anew = (open_data(made.data, 0).train for _ in range(2))
        anew.cache = None
        preload(kept, CPU, print)
        said = measure(made, kept, anew, steps)
    Console(highlight=False, soft_wrap=True).print(f"{config.stem}, {'x'.join(map(str, kept.shape))}: {said}")


def draw(folder: Path, side: int) -> None:
    """200 images of this side into a folder."""
    from sklearn.datasets import load_sample_images

    pictures, suffix = load_sample_images().images, "png" if side < 224 else "jpg"
    for number in range(200):
        picture = Image.fromarray(pictures[number % 2])
        x, y = (int(torch.randint(most - 360, (1,), generator=generator(number, most))) for most in picture.size)
        picture.crop((x, y, x + 360, y + 360)).resize((side, side)).save(folder / f"{number}.{suffix}", quality=90)


def measure(made: Config, kept: Images, anew: Images, steps: int) -> str:
    """What it costs, in words."""
    size = min(made.batch_size, len(kept))
    count = len(kept) // size

    def read(images: Images, step: int) -> Batch:
        first = step % count * size
        return images.__getitems__([(step, index) for index in range(first, first + size)])[0]

    if steps:
        source = open_data(made.data, 0)
        adapter, model = made.component("adapter"), build_model(made, source.shape, source.classes)
        optimizer = build_optimizer(model, made.optim)

    def visit(images: Images, step: int) -> None:
        batch = images.augmented(on_device(read(images, step), CPU), step)
        level = SampleRNG(1, step, index=batch.index).uniform()
        adapter(model, batch._replace(level=level), SampleRNG(0, step, index=batch.index)).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def ratios(what: Callable[[Images, int], object], times: int) -> tuple[float, float, float]:
        """Seconds a sample, anew and kept, and the median of the ratios."""
        spent = []
        for step in range(times + 2):
            pair = []
            for images in (anew, kept):
                began = time.process_time()
                what(images, step)
                pair.append((time.process_time() - began) / size)
            spent.append(pair)
        one, other = zip(*spent[2:], strict=True)  # the first ones pay for what is allocated
        return median(one), median(other), median(b / a for a, b in spent[2:])

    plain = on_device(read(kept, 0), CPU)
    change, _, _ = ratios(lambda images, step: images.augmented(plain, step), 20)
    one, other, _ = ratios(read, 20)
    said = f"reading a visit takes {1e6 * one:.0f} µs decoded anew, {1e6 * other:.0f} µs kept"
    if not kept.cache:
        said = f"reading a visit takes {1e6 * one:.0f} µs; these are not kept"
    said += f"; crops and flips {1e6 * change:.0f} µs"
    if steps:
        one, other, ratio = ratios(visit, steps)
        said += f"; a visit of the training {1e6 * one:.0f} and {1e6 * other:.0f} µs, {ratio:.3f}"
    return said


if __name__ == "__main__":
    tyro.cli(main)

"""The cost of decoding images relative to training on them, and what caching them saves (data/image_cache.py).

    python benchmarks/reading.py --config configs/fashion_mnist_mae.yaml
    python benchmarks/reading.py --config configs/cifar10_mae.yaml --photos 32 --steps 0

In CPU time. Steps with decoded and with cached images alternate, on the same samples, so that a busy machine affects
both alike. Crops and flips, which run on the device that trains, are measured separately.
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
    """Measure and print.

    Args:
        config: a recipe.
        steps: of each kind; 0: only the reading.
        photos: instead of the recipe's images use square crops of scikit-learn's two photographs with this side, PNG
            files, or JPEG files from 224 on.
    """
    diffusion = "mae" not in config.stem
    settings = parse(
        ["--config", str(config)],
        adapter="ddpm" if diffusion else "mae",
        model="unet" if diffusion else "mae",
        recipe=config,
        output_dir="",
        help="",
    )
    with tempfile.TemporaryDirectory() as folder:
        if photos:
            write_photos(Path(folder), photos)
            settings = replace(settings, data=replace(settings.data, source=folder, held_out=1))
        cached, decoded = (open_data(settings.data, 0).train for _ in range(2))
        decoded.cache = None
        preload(cached, CPU, print)
        result = measure(settings, cached, decoded, steps)
    Console(highlight=False, soft_wrap=True).print(f"{config.stem}, {'x'.join(map(str, cached.shape))}: {result}")


def write_photos(folder: Path, side: int) -> None:
    """Write 200 random crops of two photographs, resized to this side in pixels, to a folder."""
    from sklearn.datasets import load_sample_images

    pictures, suffix = load_sample_images().images, "png" if side < 224 else "jpg"
    for number in range(200):
        picture = Image.fromarray(pictures[number % 2])
        x, y = (int(torch.randint(size - 360, (1,), generator=generator(number, size))) for size in picture.size)
        picture.crop((x, y, x + 360, y + 360)).resize((side, side)).save(folder / f"{number}.{suffix}", quality=90)


def measure(settings: Config, cached: Images, decoded: Images, steps: int) -> str:
    """A message about the measured times.

    Args:
        settings: of the recipe.
        cached, decoded: the same images, with a complete cache and without one.
        steps: training steps of each kind; 0: only the reading.
    """
    size = min(settings.batch_size, len(cached))
    count = len(cached) // size

    def read(images: Images, step: int) -> Batch:
        first = step % count * size
        return images.__getitems__([(step, index) for index in range(first, first + size)])[0]

    if steps:
        source = open_data(settings.data, 0)
        adapter, model = settings.component("adapter"), build_model(settings, source.shape, source.classes)
        optimizer = build_optimizer(model, settings.optim)

    def train(images: Images, step: int) -> None:
        batch = images.augmented(on_device(read(images, step), CPU), step)
        level = SampleRNG(1, step, index=batch.index).uniform()
        adapter(model, batch._replace(level=level), SampleRNG(0, step, index=batch.index)).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def times(function: Callable[[Images, int], object], repetitions: int) -> tuple[float, float, float]:
        """Median microseconds per sample, decoded and cached, and the median of their ratio."""
        pairs = []
        for step in range(repetitions + 2):
            pair = []
            for images in (decoded, cached):
                began = time.process_time()
                function(images, step)
                pair.append(1e6 * (time.process_time() - began) / size)
            pairs.append(pair)
        pairs = pairs[2:]  # the first calls allocate memory
        one, other = zip(*pairs, strict=True)
        return median(one), median(other), median(b / a for a, b in pairs)

    batch = on_device(read(cached, 0), CPU)
    augmenting, _, _ = times(lambda images, step: images.augmented(batch, step), 20)
    one, other, _ = times(read, 20)
    message = f"reading a sample takes {one:.0f} µs decoded, {other:.0f} µs cached"
    if not cached.cache:
        message = f"reading a sample takes {one:.0f} µs; these images are not cached"
    message += f"; crops and flips {augmenting:.0f} µs"
    if steps:
        one, other, ratio = times(train, steps)
        message += f"; a training sample {one:.0f} and {other:.0f} µs, ratio {ratio:.3f}"
    return message


if __name__ == "__main__":
    tyro.cli(main)

"""The cost of the online probe: CPU time of training steps with it relative to steps without it.

    python benchmarks/online_probe.py --config configs/fashion_mnist_mae.yaml

Steps with and without it alternate, on the same batch, so that a busy machine affects both alike.
"""

import sys
import time
from pathlib import Path

import torch
import tyro
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from pretrain.config.build import build_model
from pretrain.config.cli import parse
from pretrain.core.rng import SampleRNG
from pretrain.data.images import on_device
from pretrain.data.sources import open_data
from pretrain.evaluation.context import EvalContext
from pretrain.evaluation.online_probe import OnlineProbe
from pretrain.training.optim import build_optimizer


def main(config: Path, steps: int = 60) -> None:
    """Measure and print.

    Args:
        config: a recipe of train_mae.py.
        steps: of each kind.
    """
    settings = parse(["--config", str(config)], adapter="mae", model="mae", recipe=config, output_dir="", help="")
    source = open_data(settings.data, 0)
    adapter, model = settings.component("adapter"), build_model(settings, source.shape, source.classes)
    optimizer = build_optimizer(model, settings.optim)
    probe = OnlineProbe(EvalContext(adapter, source, 0, True, settings.evaluate, during_training=True))
    batch = on_device(next(source.train.batches(range(settings.batch_size), settings.batch_size)), torch.device("cpu"))
    seconds = {True: 0.0, False: 0.0}
    probe.attach(model, torch.device("cpu"))
    for step in range(2 * steps + 4):
        with_probe = step % 2 == 0
        began = time.process_time()
        adapter(model, batch, SampleRNG(0, step, index=batch.index)).loss.mean().backward()
        if with_probe:
            probe.observe(batch, (step + 1) / (2 * steps + 4))
        optimizer.step()
        optimizer.zero_grad()
        if step >= 4:  # the first steps allocate memory
            seconds[with_probe] += time.process_time() - began
    ratio = seconds[True] / seconds[False]
    Console(highlight=False).print(
        f"{1000 * seconds[True] / steps:.2f} ms per step with the probe, "
        f"{1000 * seconds[False] / steps:.2f} without: ratio {ratio:.4f}"
    )


if __name__ == "__main__":
    tyro.cli(main)

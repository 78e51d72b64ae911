"""Measure how many concurrent training processes give the highest total throughput on one device.

Each process has a network and an optimizer and takes optimizer steps for a few seconds: first one process alone, then
two, four and eight concurrently. A small network leaves the device idle while the CPU launches its kernels; other
processes can use that time.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

COUNTS = (1, 2, 4, 8)
MIN_GAIN = 1.05  # factor of the throughput by which more processes must be better


def _process(recipe: Path, flags: list[str], pipe: Connection) -> None:
    """For each number of seconds received, train so long and send the images per second; 0 ends the process."""
    import torch
    from torch.nn.attention import SDPBackend  # noqa: F401  # loads libraries of attention

    from pretrain.adapters import Batch
    from pretrain.config.build import build_model
    from pretrain.config.cli import parse
    from pretrain.core.rng import SampleRNG
    from pretrain.data.sources import open_data
    from pretrain.training.optim import build_optimizer

    arguments = ["--config", str(recipe), *flags]
    config = parse(arguments, adapter="flow", model="unet", recipe=recipe, output_dir="", help="")
    source = open_data(config.data, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapter, model = config.component("adapter"), build_model(config, source.shape, 0).to(device)
    optimizer = build_optimizer(model, config.optim)
    index = torch.arange(config.batch_size, device=device)
    batch = Batch(
        torch.zeros(config.batch_size, *source.shape, device=device),
        torch.full_like(index, -1),
        index,
        torch.linspace(0, 0.99, config.batch_size, device=device),
    )

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = adapter(model, batch, SampleRNG(0, index=index)).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def images_per_second(seconds: float) -> float:
        steps, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            step()
            steps += 1
            if steps % 8 == 0 and device.type == "cuda":
                torch.cuda.synchronize()
        return steps * config.batch_size / (time.monotonic() - began)

    for _ in range(3):
        step()
    pipe.send("ready")
    while seconds := pipe.recv():
        pipe.send(images_per_second(seconds))


def concurrent_runs(recipe: Path, flags: list[str], toy: bool) -> dict[str, Any]:
    """The best number of concurrent processes, `runs`, and the `images_per_second` by their number.

    Args:
        recipe: of the training.
        flags: further settings.
        toy: at most two processes, for a second each.
    """
    counts, seconds = (COUNTS[:2], 1.0) if toy else (COUNTS, 4.0)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(counts[-1]):
        ours, theirs = context.Pipe()
        process = context.Process(target=_process, args=(recipe, flags, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    throughput: dict[int, float] = {}
    for count in counts:
        for pipe in pipes[:count]:
            pipe.send(seconds)
        throughput[count] = sum(pipe.recv() for pipe in pipes[:count])
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(0)
        process.join(30)
    best = counts[0]
    for count in counts[1:]:
        if throughput[count] > MIN_GAIN * throughput[best]:
            best = count
    return {"runs": best, "images_per_second": throughput}

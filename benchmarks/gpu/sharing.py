"""How many trainings at once get the most out of one device: measured, by the steps that they make together.

Every process has its own network and optimizer and makes optimizer steps for a few seconds: first one process alone,
then two at once, four, eight. A network that does not fill the device leaves it idle while the processor prepares the
next kernels; other processes use that time.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

COUNTS = (1, 2, 4, 8)
WORTH = 1.05  # more at once have to raise the throughput by this factor


def _process(recipe: Path, flags: list[str], pipe: Connection) -> None:
    """Answer every number of seconds with the images per second that were trained in them."""
    import torch
    from torch.nn.attention import SDPBackend  # noqa: F401  # loads what the first attention needs

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

    def measured(seconds: float) -> float:
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
        pipe.send(measured(seconds))


def runs_at_once(recipe: Path, flags: list[str], toy: bool) -> dict[str, Any]:
    """Images per second by the number of trainings at once, and the number that is worth it, as `runs`.

    Args:
        recipe: of the trainings.
        flags: beside it.
        toy: two at most, for a second each.
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
        if throughput[count] > WORTH * throughput[best]:
            best = count
    return {"runs": best, "images_per_second": throughput}

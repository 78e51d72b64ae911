"""`--dry-run`: what a training would cost, from a few timed steps."""

import resource
import sys

import torch

from pretrain.config.schema import Config
from pretrain.core.console import duration
from pretrain.training.optim import step_flops, steps_in_epoch
from pretrain.training.run import Run

TIMED_STEPS = 3


def estimate(run: Run, seconds: float) -> list[tuple[str, str]]:
    """Rows (name, text) for the terminal; all ranks may call it.

    Args:
        run: after some steps.
        seconds: of one optimizer step.
    """
    config, size = run.config, len(run.source.train)
    share = config.pruning.budget if config.infobatch else 1.0
    steps = config.epochs * steps_in_epoch(round(size * (share or 1.0)), config.batch_size)
    flops, _ = run.state.flops
    total = flops * size * config.epochs * (share or 1.0) + step_flops(run.state.model, config.optim) * steps
    most = "" if share and not config.blocking.share else "at most "
    accelerator = run.accelerator
    where = f"on {accelerator.device.type}"
    if accelerator.num_processes > 1:
        where = f"in the first of {accelerator.num_processes} processes, {where}"
    return [
        ("time", f"{most}{duration(steps * seconds)}: {steps:,} steps of {seconds:.3g} s, without evaluations"),
        ("cost", f"{most}{total:.3g} training FLOPs"),
        ("memory", f"{peak_gigabytes(accelerator.device):.2f} GB at most so far, {where}"),
        ("--infobatch", what_infobatch_saves(config)),
    ]


def what_infobatch_saves(config: Config) -> str:
    """What `--infobatch` does to the number of samples."""
    pruning, uses = config.pruning, "uses" if config.infobatch else "would use"
    if pruning.policy == "full":
        return f"{uses} every sample, the best known for {config.adapter.name} (docs/policies.md)"
    if pruning.budget is not None:
        return f"{uses} {pruning.budget:.0%} of the samples (policy {pruning.policy})"
    return f"{uses} as many samples as their losses ask for (policy {pruning.policy})"


def peak_gigabytes(device: torch.device) -> float:
    """Largest memory so far: of this process's tensors on an accelerator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

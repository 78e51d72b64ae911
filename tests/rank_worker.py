"""Processes of a launch with gloo: a small network in a user's loop (`main`), or one of the examples.

`main` writes to `folder`, by rank: the indices of every optimizer step, parameters, scores, and the state inside the
third epoch.
"""

import contextlib
import importlib
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from pretrain import Indexed, InfoBatch

SIZE, BATCH, EPOCHS = 101, 24, 7  # neither 2 nor 3 divides the samples of an epoch


def main(rank: int, world: int, folder: Path, micro: int, state: str = "") -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE, 6, generator=rng, dtype=torch.float64)
    y = (x @ torch.randn(6, 1, generator=rng, dtype=torch.float64)).sin().squeeze(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    network = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-2)
    infobatch = InfoBatch(SIZE, epochs=EPOCHS, policy="importance", budget=0.7, warn=lambda sentence: None)
    if state:
        saved = load_file(f"{state}.safetensors")
        numbers = {name: int(saved.pop(name)) for name in ("epoch", "seen", "used_before", "dropped", "merged", "plan")}
        model.load_state_dict({name[6:]: saved.pop(name) for name in [*saved] if name.startswith("model.")})
        saved.pop("steps")
        infobatch.load_state_dict({**saved, **numbers})
    loader = DataLoader(Indexed(TensorDataset(x, y)), micro, sampler=infobatch)
    steps: list[list[int]] = []
    for epoch in infobatch.epochs():
        due = 0  # samples missing from the current step, over all processes
        for index, features, target in loader:
            if not due:
                due = window = min(BATCH, infobatch.length - infobatch.seen)
                steps.append([])
            count = infobatch.global_batch_size(index)
            steps[-1] += [number for number in index.tolist() if number >= 0]
            loss = infobatch((network(features).squeeze(1) - target).square(), index)
            (loss * count / window).backward()
            due -= count
            if due:
                continue
            optimizer.step()
            optimizer.zero_grad()
            if epoch == 2 and infobatch.seen == BATCH and not state:
                kept = {**infobatch.state_dict(), "steps": len(steps)}
                tensors = {name: torch.as_tensor(value) for name, value in kept.items()}
                tensors |= {f"model.{name}": value for name, value in model.state_dict().items()}
                if rank == 0:
                    save_file(tensors, folder / "state.safetensors")
    save_file({**model.state_dict(), "score": infobatch.score}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.txt").write_text("\n".join(" ".join(map(str, step)) for step in steps))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_example(
    name: str, arguments: dict[str, object], environment: dict[str, str], output: Path, kill_at: int = 0
) -> None:
    """Call `main` of a module in examples/ as one process of a launch; what it prints goes to a file.

    With `kill_at` the process kills itself where it passes that batch's losses.
    """
    os.environ.update(environment)
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    if kill_at:
        InfoBatch.__call__ = at_call(kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with output.open("w") as file, contextlib.redirect_stdout(file):
        importlib.import_module(name).main(**arguments)


def at_call(number: int, act: Callable[[], object]) -> Callable[..., torch.Tensor]:
    """`InfoBatch.__call__`, which acts instead at its call of that number."""
    calls, original = itertools.count(1), InfoBatch.__call__
    return lambda *given, **more: act() if next(calls) == number else original(*given, **more)

"""InfoBatch in a plain PyTorch loop, with a checkpoint that is resumed within an epoch.

python examples/plain_loop.py
python examples/plain_loop.py --checkpoint state.pt --stop-after 50     # stops; without --stop-after it continues
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.data import DataLoader
from toy import data, learning_rate, network, report

from pretrain import Indexed, InfoBatch


def main(
    epochs: int = 20, checkpoint: Path | None = None, stop_after: int | None = None, save: Path | None = None
) -> nn.Module:
    """Train a small classifier.

    Args:
        epochs: passes over the data.
        checkpoint: file to continue from if it exists, and to write when stopping.
        stop_after: number of optimizer steps after which to stop.
        save: file to write the final parameters to.
    """
    if stop_after is not None and checkpoint is None:
        raise SystemExit("--stop-after needs --checkpoint: the file to write when stopping")
    samples, model = data(), network()
    optimizer = torch.optim.SGD(model.parameters(), learning_rate(0.0), momentum=0.9)
    infobatch = InfoBatch(samples, epochs=epochs)
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        infobatch.load_state_dict(state["infobatch"])
    loader = DataLoader(Indexed(samples), 64, sampler=infobatch, generator=torch.Generator())
    steps = 0
    for _ in infobatch.epochs():
        for index, features, label in loader:
            optimizer.param_groups[0]["lr"] = learning_rate(infobatch.progress)
            losses = F.cross_entropy(model(features), label, reduction="none")
            optimizer.zero_grad()
            infobatch(losses, index).backward()
            optimizer.step()
            steps += 1
            if steps == stop_after and checkpoint is not None:
                stateful = {"model": model, "optimizer": optimizer, "infobatch": infobatch}
                torch.save({name: each.state_dict() for name, each in stateful.items()}, checkpoint)
                print(
                    f"stopped in epoch {infobatch.epoch + 1} after {infobatch.seen} of its {infobatch.length} samples"
                )
                return model
    print(report(model, infobatch.samples_used, epochs))
    if save is not None:
        torch.save(model.state_dict(), save)
    return model


if __name__ == "__main__":
    tyro.cli(main)

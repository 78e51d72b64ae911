"""That a training step never waits for the device: train_diffusion.py with torch's synchronisation errors switched on.

    python benchmarks/gpu/no_waiting.py [flags of train_diffusion.py]

From the moment a batch is there until the averages are updated, whatever makes the processor wait for the device is an
error (torch.cuda.set_sync_debug_mode). Excepted are the first steps, which allocate, and every 16th and an epoch's
last, in which the loop looks at what was computed, as it says it does.
"""

import sys
from pathlib import Path

import torch

import train_diffusion
from pretrain.checkpoint.ema import EMACollection
from pretrain.config.cli import parse
from pretrain.infobatch.sampler import InfoBatch
from pretrain.training import loop

FIRST = 3  # steps in which allocators and libraries set themselves up
checked = step = 0


def main() -> None:
    """Train, and say how many steps were checked."""
    batch_size, update = InfoBatch.global_batch_size, EMACollection.update

    def begins(infobatch: InfoBatch, index: torch.Tensor) -> int:
        global checked
        count = batch_size(infobatch, index)
        last = infobatch.seen + count >= infobatch.length
        if step >= FIRST and step % loop.SYNC_EVERY and not last and not torch.cuda.get_sync_debug_mode():
            torch.cuda.set_sync_debug_mode("error")
            checked += 1
        return count

    def ends(averages: EMACollection, *arguments: object) -> None:
        global step
        update(averages, *arguments)
        torch.cuda.set_sync_debug_mode("default")
        step += 1

    InfoBatch.global_batch_size, EMACollection.update = begins, ends
    train_diffusion.main(parse(sys.argv[1:], **train_diffusion.START, output_dir="runs/no-waiting", help=""))
    print(f"{checked} of {step} steps made without waiting for the device")
    if not checked:
        sys.exit("no step was checked; train longer")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()

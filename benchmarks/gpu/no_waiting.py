"""Check that training steps do not synchronize with the device: train_diffusion.py with torch's sync debug mode.

    python benchmarks/gpu/no_waiting.py [flags of train_diffusion.py]

A synchronization between the arrival of a batch and the update of the EMAs raises an error
(torch.cuda.set_sync_debug_mode). Not checked are the first steps, which initialize libraries, and those in which the
loop synchronizes on purpose: every `SYNC_EVERY`-th one and the last one of an epoch.
"""

import sys

import torch

import train_diffusion
from pretrain.checkpoint.ema import EMACollection
from pretrain.config.cli import parse
from pretrain.infobatch.sampler import InfoBatch
from pretrain.training import loop

WARMUP = 3  # steps that initialize allocators and libraries
checked = step = 0


def main() -> None:
    """Train, and print the number of steps that were checked.

    Raises:
        SystemExit: no step was checked.
    """
    batch_size, update = InfoBatch.global_batch_size, EMACollection.update

    def check_from_here(infobatch: InfoBatch, index: torch.Tensor) -> int:
        global checked
        count = batch_size(infobatch, index)
        last = infobatch.seen + count >= infobatch.length
        if step >= WARMUP and step % loop.SYNC_EVERY and not last and not torch.cuda.get_sync_debug_mode():
            torch.cuda.set_sync_debug_mode("error")
            checked += 1
        return count

    def check_until_here(emas: EMACollection, *arguments: object) -> None:
        global step
        update(emas, *arguments)
        torch.cuda.set_sync_debug_mode("default")
        step += 1

    InfoBatch.global_batch_size, EMACollection.update = check_from_here, check_until_here
    train_diffusion.main(parse(sys.argv[1:], **train_diffusion.START, output_dir="runs/no-waiting", help=""))
    print(f"{checked} of {step} steps were checked, and none of them synchronized with the device")
    if not checked:
        sys.exit("no step was checked; train longer")


if __name__ == "__main__":
    main()

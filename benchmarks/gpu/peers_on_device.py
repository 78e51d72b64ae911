"""benchmarks/peers.py on CIFAR-10; started by `benchmarks/gpu/run peers`."""

from pathlib import Path

import peers
import tyro


def main(work: Path, data: Path, toy: bool = False) -> None:
    """Compare our program with a bare loop, each compiled and not, and with the other projects that are packed.

    Args:
        work: folder for records, logs and table.
        data: folder of CIFAR-10's parquet files. Beside it, peers/diffusers, peers/mae and peers/transformers may be
            checkouts of other projects.
        toy: few steps of small networks.
    """
    found = {name: data.parent / "peers" / name for name in peers.SCRIPTS}
    checkouts = {name: path for name, path in found.items() if path.is_dir()}
    sizes = {"size": "small", "batch_size": 8, "warmup": 2, "steps": 2, "repetitions": 1} if toy else {"repetitions": 2}
    peers.main(peers.Settings(work, str(data), ("dit", "mae", "unet"), workers=0 if toy else 4, **sizes, **checkouts))


if __name__ == "__main__":
    tyro.cli(main)

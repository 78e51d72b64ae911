"""Write a long-tailed subset of a labelled data set, for `--data.subset`.

    python benchmarks/long_tail.py --data path/to/cifar10 -o long_tail.json

Class c of C has most * ratio^(-c / (C - 1)) training images (Cui et al., "Class-balanced loss", CVPR 2019). The
held-out images stay balanced.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from pretrain.config.schema import Data
from pretrain.config.tyro_parser import run_command
from pretrain.core.errors import UserError
from pretrain.core.rng import generator
from pretrain.data.fingerprint import digest
from pretrain.data.sources import open_data


def main(
    data: Data,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    most: int = 1000,
    ratio: float = 10,
    seed: int = 0,
) -> None:
    """Write the indices of a long-tailed subset of the training images.

    Args:
        data: the images, with labels.
        output: JSON file to write.
        most: images of class 0, which has the most.
        ratio: of the sizes of the largest and the smallest class.
        seed: of the choice of images.

    Raises:
        UserError: there are fewer than two classes, or a class has too few images.
    """
    if most < 1 or ratio < 1:
        raise UserError(f"--most and --ratio must be at least 1, got {most} and {ratio:g}")
    source = open_data(data, 0)
    if source.classes < 2:
        raise UserError(f"--data {data.source}: a long tail needs labels of two classes or more; give other data")
    label, chosen = torch.cat([batch.label for batch in source.train.batches(range(len(source.train)), 1000)]), []
    for number in range(source.classes):
        of_class = torch.nonzero(label == number)[:, 0]
        count = max(1, round(most * ratio ** (-number / (source.classes - 1))))
        if len(of_class) < count:
            raise UserError(f"class {number} has {len(of_class)} images, fewer than {count}; give a smaller --most")
        chosen.append(of_class[torch.randperm(len(of_class), generator=generator(seed, number))[:count]])
    index = torch.cat(chosen).sort().values
    found = {"method": f"long tail {ratio:g}:1", "biased": True, "fingerprint": digest(source.train, index.numpy())}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found | {"size": len(label), "indices": index.tolist()}) + "\n")
    counts = ", ".join(str(len(each)) for each in chosen)
    Console().print(f"{output}: {len(index):,} of {len(label):,} images; by class {counts}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main, "long_tail.py")

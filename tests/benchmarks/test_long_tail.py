"""A long-tailed subset has the sizes of Cui et al. 2019, and is read by --data.subset."""

from pathlib import Path

import long_tail
import torch

from pretrain.config.schema import Data
from pretrain.data.sources import open_data


def test_a_long_tail_is_a_subset_of_the_data(tmp_path: Path) -> None:
    data = {"source": "fashion-mnist", "size": 14}
    long_tail.main(Data(**data), tmp_path / "tail.json", most=90, ratio=9)
    train = open_data(Data(**data, subset=str(tmp_path / "tail.json")), 0).train
    label = torch.cat([batch.label for batch in train.batches(range(len(train)), 100)])
    assert label.bincount().tolist() == [round(90 * 9 ** (-number / 9)) for number in range(10)]

"""Image classification: a timm ResNet on CIFAR-10, pruned by InfoBatch.

    python examples/classification.py                                   # from the Hugging Face hub
    python examples/classification.py --data path/to/cifar10        # parquet files or class folders
    python examples/classification.py --data path/to/cifar10 --data.limit 1000 --training.epochs 4      # on a CPU

A ResNet's batch norm lets the samples of a batch touch each other's losses a little; the method is used with it all the
same.
"""

import timm
import torch
import tyro
from classification_adapter import Classification
from fit import Training, device, fit, visits
from torch import nn

from pretrain.config.schema import Data
from pretrain.core.errors import exit_on_user_error
from pretrain.data.images import Images, on_device
from pretrain.data.preload import preload
from pretrain.data.sources import open_data


def small_resnet(name: str, channels: int, classes: int) -> nn.Module:
    """A ResNet for small images: its first convolution keeps their size."""
    model = timm.create_model(name, num_classes=classes, in_chans=channels)
    model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the images whose class is found."""
    right = [
        (model(on_device(batch, device()).image).argmax(dim=1).cpu() == batch.label)
        for batch in images.batches(range(len(images)), 500)
    ]
    return torch.cat(right).float().mean().item()


def main(
    data: Data = Data("uoft-cs/cifar10", flip=True),
    model: str = "resnet18",
    adapter: Classification = Classification(),
    training: Training = Training(),
) -> float:
    """Train and report the accuracy on held-out images.

    Args:
        data: what is classified.
        model: a ResNet that timm knows.
        adapter: the objective.
        training: how long and on whom.
    """
    source = open_data(data, training.seed)
    preload(source.train, device(), print)
    torch.manual_seed(training.seed)
    network = small_resnet(model, source.shape[0], source.classes).to(device())
    fit(
        training,
        network,
        adapter,
        len(source.train),
        lambda infobatch: visits(source.train, training.batch_size, infobatch),
    )
    reached = accuracy(network, source.test)
    print(f"accuracy {reached:.3f}")
    return reached


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(main)

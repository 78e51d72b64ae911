"""Image classification: a timm ResNet on CIFAR-10, pruned by InfoBatch.

    python examples/classification.py                                   # from the Hugging Face hub
    python examples/classification.py --data path/to/cifar10        # parquet files or class folders
    python examples/classification.py --data path/to/cifar10 --data.limit 1000 --training.epochs 4      # on a CPU

With the batch norm of a ResNet the losses of a batch depend on each other, so the weighted gradient is not exactly
unbiased; the method is commonly used with it nevertheless.
"""

import timm
import torch
import tyro
from classification_adapter import Classification
from fit import Training, device, epoch_batches, fit
from torch import nn

from pretrain.config.schema import Data
from pretrain.core.errors import exit_on_user_error
from pretrain.data.images import Images, on_device
from pretrain.data.preload import preload
from pretrain.data.sources import open_data


def small_resnet(name: str, channels: int, classes: int) -> nn.Module:
    """A ResNet of timm for small images, whose first layers do not downsample."""
    model = timm.create_model(name, num_classes=classes, in_chans=channels)
    model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Accuracy on images."""
    correct = [
        (model(on_device(batch, device()).image).argmax(dim=1).cpu() == batch.label)
        for batch in images.batches(range(len(images)), 500)
    ]
    return torch.cat(correct).float().mean().item()


def main(
    data: Data = Data("uoft-cs/cifar10", flip=True),
    model: str = "resnet18",
    adapter: Classification = Classification(),
    training: Training = Training(),
) -> float:
    """Train a classifier and print its accuracy on held-out images.

    Args:
        data: the images, with labels.
        model: name of a ResNet of timm.
        adapter: settings of the objective.
        training: settings of the training.
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
        lambda infobatch: epoch_batches(source.train, training.batch_size, infobatch),
    )
    result = accuracy(network, source.test)
    print(f"accuracy {result:.3f}")
    return result


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(main)

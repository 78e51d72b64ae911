"""Semantic segmentation of clothes, pruned by InfoBatch.

python examples/segmentation.py       # on the Fashion-MNIST images that ship with the package
"""

import timm
import torch
import torch.nn.functional as F
import tyro
from fit import Training, device, epoch_batches, fit
from segmentation_adapter import Segmentation
from torch import Tensor, nn

from pretrain.config.schema import Data
from pretrain.core.errors import exit_on_user_error
from pretrain.data.images import Images, on_device
from pretrain.data.preload import preload
from pretrain.data.sources import open_data


class Segmenter(nn.Module):
    """A timm encoder, and a decoder that sums the upsampled logits of its stages (FCN; Long et al. 2015)."""

    def __init__(self, encoder: str, channels: int, classes: int) -> None:
        super().__init__()
        self.encoder = timm.create_model(encoder, features_only=True, in_chans=channels, out_indices=(0, 1, 2))
        self.heads = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in self.encoder.feature_info.channels())

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes, H, W] of images [B, C, H, W]."""
        stages = zip(self.heads, self.encoder(image), strict=True)
        size = image.shape[-2:]
        return torch.stack([F.interpolate(head(x), size, mode="bilinear") for head, x in stages]).sum(dim=0)


@torch.no_grad()
def mean_iou(model: nn.Module, adapter: Segmentation, images: Images, classes: int) -> float:
    """Intersection over union of predicted and true pixels, averaged over the classes."""
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for batch in images.batches(range(len(images)), 250):
        batch = on_device(batch, device())
        predicted, true = model(batch.image).argmax(dim=1).flatten(), adapter.masks(batch).flatten()
        confusion += torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes).cpu()
    both = confusion.diag()
    return (both / (confusion.sum(0) + confusion.sum(1) - both).clamp(min=1)).mean().item()


def main(
    data: Data = Data(),
    encoder: str = "resnet10t",
    training: Training = Training(),
) -> float:
    """Train a network and print its mean intersection over union on held-out images.

    Args:
        data: the images, with labels.
        encoder: name of a network of timm.
        training: settings of the training.
    """
    source = open_data(data, training.seed)
    preload(source.train, device(), print)
    adapter = Segmentation(background=source.classes)
    torch.manual_seed(training.seed)
    network = Segmenter(encoder, source.shape[0], source.classes + 1).to(device())
    fit(
        training,
        network,
        adapter,
        len(source.train),
        lambda infobatch: epoch_batches(source.train, training.batch_size, infobatch),
    )
    result = mean_iou(network, adapter, source.test, source.classes + 1)
    print(f"mean IoU {result:.3f}")
    return result


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(main)

"""Semantic segmentation: which pixels of a picture show a shirt, a shoe, a bag; pruned by InfoBatch.

python examples/segmentation.py       # on the Fashion-MNIST images that ship with the package
"""

import timm
import torch
import torch.nn.functional as F
import tyro
from fit import Training, device, fit, visits
from segmentation_adapter import Segmentation
from torch import Tensor, nn

from pretrain.config.schema import Data
from pretrain.core.errors import exit_on_user_error
from pretrain.data.images import Images, on_device
from pretrain.data.preload import preload
from pretrain.data.sources import open_data


class Segmenter(nn.Module):
    """A timm encoder and a decoder that adds up what its stages say of every pixel (an FCN, Long et al. 2015)."""

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
    """Intersection over union of found and true pixels, averaged over the classes."""
    table = torch.zeros(classes, classes, dtype=torch.int64)
    for batch in images.batches(range(len(images)), 250):
        batch = on_device(batch, device())
        found, true = model(batch.image).argmax(dim=1).flatten(), adapter.masks(batch).flatten()
        table += torch.bincount(true * classes + found, minlength=classes**2).view(classes, classes).cpu()
    both = table.diag()
    return (both / (table.sum(0) + table.sum(1) - both).clamp(min=1)).mean().item()


def main(
    data: Data = Data(),
    encoder: str = "resnet10t",
    training: Training = Training(),
) -> float:
    """Train and report the mean intersection over union on held-out images."""
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
        lambda infobatch: visits(source.train, training.batch_size, infobatch),
    )
    reached = mean_iou(network, adapter, source.test, source.classes + 1)
    print(f"mean IoU {reached:.3f}")
    return reached


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(main)

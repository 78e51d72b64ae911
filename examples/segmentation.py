r"""Semantic segmentation, pruned by InfoBatch: a timm encoder with a small decoder.

    python examples/segmentation.py                 # on Fashion-MNIST, with masks made by a threshold
    python examples/segmentation.py --images photos --masks masks --encoder resnet18 --stages 1 2 3 4
    python examples/segmentation.py --ade20k ADEChallengeData2016 --crop 0.25 --flip --workers 8 \
        --encoder resnet50 --pretrained --stages 1 2 3 4 \
        --training.epochs 126 --training.batch-size 16 --training.lr 1e-4

A mask is a PNG file with a class number per pixel; 255 is ignored. The loss of an image, by which it is selected, is
the mean over its valid pixels. The last line is the usual schedule of 160,000 steps; it has not been run here.
InfoBatch's authors report 40 % less cost on ADE20K, without naming network and settings. With batch norm the losses of
a batch depend on each other, so the weighted gradient is not exactly unbiased.
"""

from collections.abc import Iterator
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
import tyro
from fit import Training, device, fit
from segmentation_adapter import IGNORED, Masked, Segmentation
from segmentation_data import Pairs, Pictures, open_pairs
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from pretrain import InfoBatch
from pretrain.core.errors import UserError, exit_on_user_error
from pretrain.data.loader import EpochSampler


class Segmenter(nn.Module):
    """A timm encoder, and a decoder that sums the upsampled logits of its stages (FCN; Long et al. 2015).

    Args:
        encoder: name of a network of timm that has features.
        channels: of the images.
        classes: number of them.
        stages: of the encoder, whose features are used; the first has the most pixels.
        size: side of the images, for encoders that are made for one size.
        pretrained: start from timm's weights, with their normalization of images.

    Raises:
        UserError: timm has no such encoder, or not for this size.
    """

    def __init__(
        self, encoder: str, channels: int, classes: int, stages: tuple[int, ...], size: int, pretrained: bool = False
    ) -> None:
        super().__init__()
        self.encoder: Any
        self.mean: Tensor
        self.std: Tensor
        settings = {"features_only": True, "in_chans": channels, "out_indices": stages, "pretrained": pretrained}
        try:
            try:
                self.encoder = timm.create_model(encoder, img_size=size, **settings)
            except TypeError:  # most networks of convolutions have no such argument
                self.encoder = timm.create_model(encoder, **settings)
            self.encoder.eval()(torch.zeros(1, channels, size, size))
        except Exception as error:  # of many types; also of a download
            message = " ".join(str(error).split())
            raise UserError(f"--encoder {encoder} can't be made for --size {size}: {message}") from None
        self.heads = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in self.encoder.feature_info.channels())
        normalization = resolve_model_data_config(self.encoder)
        for name in ("mean", "std"):
            value = torch.tensor(normalization[name] if pretrained and channels == 3 else [0.5])
            self.register_buffer(name, value.view(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes, H, W] of images [B, C, H, W] in [-1, 1]."""
        features = self.encoder((image / 2 + 0.5 - self.mean) / self.std)
        if self.encoder.output_fmt == "NHWC":
            features = [x.permute(0, 3, 1, 2) for x in features]
        logits = [head(x) for head, x in zip(self.heads, features, strict=True)]
        size = logits[0].shape[-2:]
        total = torch.stack([F.interpolate(x, size, mode="bilinear") for x in logits]).sum(dim=0)
        return F.interpolate(total, image.shape[-2:], mode="bilinear")


def confusion(predicted: Tensor, mask: Tensor, classes: int) -> Tensor:
    """Number of valid pixels by true and predicted class, int64 [classes, classes]."""
    valid = mask != IGNORED
    return torch.bincount(mask[valid] * classes + predicted[valid], minlength=classes**2).view(classes, classes)


def mean_iou(counts: Tensor) -> float:
    """Intersection over union, averaged over the classes that occur in masks or predictions; NaN if none does."""
    both = counts.diag()
    union = counts.sum(0) + counts.sum(1) - both
    return (both[union > 0] / union[union > 0]).mean().item()


@torch.no_grad()
def evaluate(model: nn.Module, test: Pictures, classes: int, batch_size: int) -> float:
    """Mean IoU in the masks' own sizes, to which the logits are resized."""
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for image, masks, _ in test.batches([(None, index) for index in range(len(test))], batch_size):
        for logits, mask in zip(model(image.to(device())), masks, strict=True):
            predicted = F.interpolate(logits[None], mask.shape, mode="bilinear")[0].argmax(dim=0)
            counts += confusion(predicted, mask.to(device()), classes).cpu()
    return mean_iou(counts)


def main(
    data: Annotated[Pairs, tyro.conf.arg(name="")] = Pairs(),
    encoder: str = "resnet10t",
    stages: tuple[int, ...] = (0, 1, 2),
    pretrained: bool = False,
    training: Training = Training(),
) -> float:
    """Train a network and print its mean intersection over union on images that are not trained on.

    Args:
        data: images and masks.
        encoder: name of a network of timm.
        stages: its stages whose features are used, from 0.
        pretrained: start from timm's weights.
        training: settings of the training.
    """
    train, test, channels, classes = open_pairs(data, training.seed)
    torch.manual_seed(training.seed)
    network = Segmenter(encoder, channels, classes, stages, train.size, pretrained).to(device())

    def batches(infobatch: InfoBatch) -> Iterator[Masked]:
        for image, masks, index in train.batches(EpochSampler(infobatch), training.batch_size):
            yield Masked(image.to(device()), torch.stack(masks).to(device()), index.to(device()))

    fit(training, network, Segmentation(), len(train), batches)
    result = evaluate(network, test, classes, training.batch_size)
    print(f"mean IoU {result:.3f}")
    return result


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(main)

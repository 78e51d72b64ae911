"""Image classification: a timm ResNet, pruned by InfoBatch.

    python examples/classification.py --config examples/recipes/cifar10_resnet18.yaml     # from the Hugging Face hub
    python examples/classification.py --config examples/recipes/cifar10_resnet18.yaml --data path/to/cifar10
    python examples/classification.py --data path/to/cifar10 --data.limit 1000 --training.epochs 4      # on a CPU
    python examples/classification.py --data path/to/cifar10 --training.policy full --blocking.share 0.4

The data are a name on the hub, parquet files, or class folders; recipes for CIFAR-10, CIFAR-100 and ImageNet-1K lie in
examples/recipes/. With the batch norm of a ResNet the losses of a batch depend on each other, so the weighted gradient
is not exactly unbiased; the method is commonly used with it nevertheless. It runs on one process; examples/ddp.py is a
loop for several.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from classification_adapter import Classification, random_shifts, score
from fit import Training, device, epoch_batches, fit, run, write_record
from torch import Tensor, nn

from pretrain.adapters import Batch
from pretrain.config.schema import Blocking, Data
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data.images import Images, on_device
from pretrain.data.preload import preload
from pretrain.data.sources import open_data
from pretrain.evaluation.context import labelled
from pretrain.training.blocking import Choose

SMALL = 64  # pixels; images below that have no downsampling in the first layers, as usual for CIFAR
SHIFTS = 3  # added to the key (seed, epoch) of random numbers; crops and flips have 1 and 2


class ResNet(nn.Module):
    """A ResNet of timm that samples can leave after its first stage.

    Args:
        name: of the network.
        shape: (C, H, W) of the images; those of less than `SMALL` pixels are not downsampled before the first stage.
        classes: number of classes.
        width: factor of the channels of all stages, and of a stem of several layers.

    Raises:
        UserError: timm has no ResNet of that name.
    """

    def __init__(self, name: str, shape: tuple[int, int, int], classes: int, width: float = 1.0) -> None:
        super().__init__()
        channels = tuple(max(1, round(width * each)) for each in (64, 128, 256, 512))
        stem = {"stem_width": max(4, round(32 * width))}  # of stems of several layers; others have 64 channels
        try:
            self.net: Any = timm.create_model(
                name, num_classes=classes, in_chans=shape[0], channels=channels, **(stem if width != 1 else {})
            )
        except (RuntimeError, TypeError):  # no such network, or not one with channels
            self.net = None
        if not isinstance(self.net, timm.models.resnet.ResNet):
            raise UserError(f"--model {name}: timm has no ResNet of this name; give for example resnet18 or resnet50")
        if min(shape[1:]) < SMALL:
            self.net.conv1 = nn.Conv2d(shape[0], self.net.bn1.num_features, 3, padding=1, bias=False)
            self.net.maxpool = nn.Identity()

    def forward(self, image: Tensor, choose: Choose | None = None) -> Tensor:
        """Logits of images.

        Args:
            image: float32 [B, C, H, W].
            choose: called after the first stage with the spatial mean of its output, [B, D]; returns the images that go
                on, int64 [K].

        Returns:
            float32 [B, classes], or with `choose` [K, classes].
        """
        net = self.net
        x = net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(image)))))
        if choose is not None:
            x = x[choose(x.mean(dim=(2, 3)))]
        return net.forward_head(net.layer4(net.layer3(net.layer2(x))))


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> dict[str, float]:
    """Accuracy and mean cross entropy on images."""
    correct, losses = [], []
    for batch in images.batches(range(len(images)), 500):
        logits, label = model(on_device(batch, device()).image).float().cpu(), batch.label
        correct.append(logits.argmax(dim=1) == label)
        losses.append(score(logits, label))
    return {
        "accuracy": torch.cat(correct).float().mean().item(),
        "validation_loss": torch.cat(losses).mean().item(),
    }


def main(
    data: Data = Data("uoft-cs/cifar10", flip=True),
    model: str = "resnet18",
    width: float = 1.0,
    shift: int = 0,
    adapter: Classification = Classification(),
    blocking: Blocking = Blocking(),
    training: Training = Training(),
    output: Path | None = None,
) -> float:
    """Train a classifier and print its accuracy on held-out images.

    `--config FILE` starts from a recipe; settings beside it take precedence.

    Args:
        data: the images, with labels.
        model: name of a ResNet of timm.
        width: factor of the network's channels.
        shift: largest random shift of an image in pixels: a random crop after padding by as many.
        adapter: settings of the objective.
        blocking: Partial Forward Blocking; with `--training.policy full`.
        training: settings of the training.
        output: JSON file for what the run cost and reached.

    Raises:
        UserError: images have no label, or a setting is out of its range.
    """
    if shift < 0 or width <= 0:
        raise UserError(f"--shift must be 0 or more and --width above 0, got {shift} and {width}")
    source = open_data(data, training.seed)
    if not source.classes:
        raise UserError(f"--data {data.source}: it has no labels; give images in class folders, or --data.label COLUMN")
    for name, images in (("training", source.train), ("held-out", source.test)):
        if without := len(images) - len(labelled(images)):
            raise UserError(
                f"--data {data.source}: {without:,} of {len(images):,} {name} images have no label; leave them out"
            )
    preload(source.train, device(), print)
    torch.manual_seed(training.seed)
    network = ResNet(model, source.shape, source.classes, width).to(device())

    def batches(infobatch: Any) -> Iterator[Batch]:
        for batch in epoch_batches(source.train, training.batch_size, infobatch):
            if shift:
                rng = SampleRNG(training.seed, infobatch.epoch, SHIFTS, index=batch.index)
                batch = batch._replace(image=random_shifts(batch.image, rng, shift))
            yield batch

    fitted = fit(training, network, adapter, len(source.train), batches, blocking, source.weights)
    quality = evaluate(network, source.test)
    print(f"accuracy {quality['accuracy']:.3f}")
    more = {"blocking": {"share": blocking.share, "method": blocking.method}} if blocking.share else {}
    write_record(output, training, network, fitted, quality, **more)
    return quality["accuracy"]


if __name__ == "__main__":
    run(main)

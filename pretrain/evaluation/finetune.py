"""The accuracy of an encoder after fine-tuning, or frozen under an attentive head."""

import copy
from dataclasses import dataclass

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.parallel import DistributedDataParallel

from pretrain.adapters import Batch, bare
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG, fold_seed, generator
from pretrain.data.images import on_device
from pretrain.distributed.collectives import rank_and_world_size
from pretrain.evaluation.context import EvalContext, accuracy, labelled, map_images, mean_over_seeds
from pretrain.evaluation.finetune_augment import Augmentation, seeded
from pretrain.evaluation.heads import AttentiveProbe, DropPath, as_classifier, fine_tuning_settings

MAX_BATCH_SIZE = 256
MIN_STEPS_PER_EPOCH = 8
PROBE_LR = 1e-3  # of the attentive probe


def make(context: EvalContext, names: list[str]) -> "TrainedClassifier":
    """The evaluator of the metrics finetune and attentive-probe.

    Raises:
        UserError: the batch has less than two images per process.
    """
    evaluator = TrainedClassifier(context, tuple(names), labelled(context.source.train))
    if evaluator.batch_size < 2 * (world := rank_and_world_size()[1]):
        raise UserError(
            f"{context.flag('metrics')} {','.join(names)}: {len(evaluator.index)} labelled images are too few for "
            f"{world} processes; start fewer"
        )
    return evaluator


@dataclass(frozen=True)
class TrainedClassifier:
    """Accuracy of a classifier trained on the labelled training images, with the crops and flips of pretraining.

    Fine-tuning is that of He et al. 2022, table 9: AdamW, layer-wise decay of the learning rate, drop path, mixup,
    cutmix, label smoothing, and a head on the mean of the patch tokens; where pretraining crops its images, also
    RandAugment and random erasing.

    Attributes:
        context: what is evaluated.
        names: of the metrics.
        index: the training images with a label, int64.
    """

    context: EvalContext
    names: tuple[str, ...]
    index: Tensor

    @property
    def batch_size(self) -> int:
        """Images of a step over all processes; an even number, because mixup takes pairs of images."""
        return min(MAX_BATCH_SIZE, max(2, len(self.index) // MIN_STEPS_PER_EPOCH)) // 2 * 2

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The accuracies on the labelled validation images, see `mean_over_seeds`.

        Raises:
            UserError: none of them can be read.
        """
        return mean_over_seeds(lambda seed: self.measure(model, seed), self.context.settings.seeds)

    def measure(self, model: nn.Module, seed: int) -> dict[str, float]:
        """The accuracies with one seed."""
        found, classes = {}, self.context.source.classes
        device = next(model.parameters()).device
        for name in self.names:
            encoder = copy.deepcopy(bare(model).encoder)
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(fold_seed(seed))
                network = as_classifier(encoder, classes) if name == "finetune" else AttentiveProbe(encoder, classes)
            self.fit(name, network.to(device), seed)

            def predict(batch: Batch, network: nn.Module = network) -> tuple[Tensor, Tensor]:
                return network(batch.image).argmax(1), batch.label

            test = self.context.source.test
            predicted, label = map_images(test, range(len(test)), device, predict)
            found[f"{name.replace('-', '_')}_accuracy"] = accuracy(predicted, label)
        return found

    def fit(self, name: str, network: nn.Module, seed: int) -> None:
        """Train the classifier of a metric; the processes share each step, and the result is that of one process."""
        tuned = name == "finetune"
        rank, world = rank_and_world_size()
        device = next(network.parameters()).device
        lr, layer_decay = fine_tuning_settings(network)[1:3] if tuned else (PROBE_LR, None)
        optimizer = create_optimizer_v2(
            network, "adamw", lr, weight_decay=0.05, betas=(0.9, 0.999), layer_decay=layer_decay
        )
        drop_paths = [module for module in network.modules() if isinstance(module, DropPath)]
        per_epoch, epochs = len(self.index) // self.batch_size, self.context.settings.probe_epochs
        steps = per_epoch * epochs
        schedule = CosineLRScheduler(optimizer, steps, lr_min=1e-6, warmup_t=steps // 20, t_in_epochs=False)
        classes = self.context.source.classes
        mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=classes) if tuned else None
        cropped = self.context.source.train.data.crop < 1
        augment = Augmentation(self.context.source.shape[0]) if tuned and cropped else None
        parallel = DistributedDataParallel(network) if world > 1 else network
        network.train()
        for epoch in range(epochs):
            order = self.index[torch.randperm(len(self.index), generator=generator(seed, epoch))]
            for n, chosen in enumerate(order[: per_epoch * self.batch_size].split(self.batch_size)):
                step = epoch * per_epoch + n
                # Mixup mixes image i with the i-th from the end, so a process has both.
                share = torch.arange(len(chosen) // 2)[rank::world]
                batch = self._read(chosen[torch.cat([share, (len(chosen) - 1 - share).flip(0)])], epoch, device)
                if augment is not None:
                    batch = batch._replace(image=augment(batch.image, batch.index, seed, epoch))
                image, label = batch.image, batch.label.clamp(min=0)
                if mixup is not None:
                    with seeded(seed, step):
                        image, target = mixup(image, label)
                else:
                    target = one_hot(label, classes).float()
                rng = SampleRNG(seed, epoch, index=batch.index)
                for drop_path in drop_paths:
                    drop_path.rng = rng
                loss = cross_entropy(parallel(image), target, reduction="none") * batch.mask
                schedule.step_update(step)
                (loss.sum() * world / len(chosen)).backward()
                optimizer.step()
                optimizer.zero_grad()
        network.eval()

    def _read(self, index: Tensor, epoch: int, device: torch.device) -> Batch:
        """The images, augmented as in pretraining; an unreadable one becomes padding."""
        train = self.context.source.train
        batch, problems = train.__getitems__([(epoch, int(number)) for number in index])
        train.handle(problems)
        return train.augmented(on_device(batch, device), epoch)

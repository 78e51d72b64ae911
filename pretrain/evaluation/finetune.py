"""What an encoder is worth to somebody who trains on with labels: fine-tuned, or frozen below an attentive head."""

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
from pretrain.evaluation.context import EvalContext, labelled, over, over_seeds
from pretrain.evaluation.finetune_augment import Augmentation, seeded
from pretrain.evaluation.heads import Attentive, DropPath, tunable, tuning

MOST = 256  # images of a step
STEPS = 8  # of an epoch, at least
RATE = 1e-3  # of the attentive probe


def make(subject: EvalContext, names: list[str]) -> "Supervised":
    """The evaluator of this file's metrics.

    Raises:
        UserError: there are fewer labelled images in a step than processes can share.
    """
    found = Supervised(subject, tuple(names), labelled(subject, names))
    if found.batch < 2 * (world := rank_and_world_size()[1]):
        raise UserError(
            f"{subject.flag}metrics {','.join(names)}: {len(found.index)} labelled images are too few for {world} "
            "processes; start fewer"
        )
    return found


@dataclass(frozen=True)
class Supervised:
    """Accuracy on held-out images of a classifier that was trained on the labelled ones, augmented as in pretraining.

    Fine-tuning is AdamW with a learning rate that decays from layer to layer downwards, drop path, mixup, cutmix and
    label smoothing, where pretraining crops its images also random augmentation and erasing (He et al. 2022, table 9),
    on the mean of the patches.

    Attributes:
        subject: what is evaluated.
        names: of the metrics.
        index: the training images that have labels.
    """

    subject: EvalContext
    names: tuple[str, ...]
    index: Tensor

    @property
    def batch(self) -> int:
        """Images of a step; even, because mixing takes images in pairs."""
        return min(MOST, max(2, len(self.index) // STEPS)) // 2 * 2

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The share of held-out images told rightly, by metric."""
        return over_seeds(lambda seed: self.measure(model, seed), self.subject.settings.seeds)

    def measure(self, model: nn.Module, seed: int) -> dict[str, float]:
        """The accuracies with one seed."""
        found, classes = {}, self.subject.source.classes
        device = next(model.parameters()).device
        for name in self.names:
            encoder = copy.deepcopy(bare(model).encoder)
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(fold_seed(seed))
                network = tunable(encoder, classes) if name == "finetune" else Attentive(encoder, classes)
            self.learn(name, network.to(device), seed)

            def rows(batch: Batch, network: nn.Module = network) -> tuple[Tensor, Tensor]:
                return network(batch.image).argmax(1), batch.label

            test = self.subject.source.test
            guess, label = over(test, range(len(test)), device, rows)
            right = (guess == label)[label >= 0].double().mean().item()
            found[f"{name.replace('-', '_')}_accuracy"] = right
        return found

    def learn(self, name: str, network: nn.Module, seed: int) -> None:
        """Train a metric's classifier; every process with its share of each step, as one would alone."""
        tuned = name == "finetune"
        rank, world = rank_and_world_size()
        device = next(network.parameters()).device
        rate, decay = tuning(network)[1:3] if tuned else (RATE, None)
        optimizer = create_optimizer_v2(
            network, "adamw", rate, weight_decay=0.05, betas=(0.9, 0.999), layer_decay=decay
        )
        paths = [module for module in network.modules() if isinstance(module, DropPath)]
        per_epoch, epochs = len(self.index) // self.batch, self.subject.settings.probe_epochs
        steps = per_epoch * epochs
        schedule = CosineLRScheduler(optimizer, steps, lr_min=1e-6, warmup_t=steps // 20, t_in_epochs=False)
        classes = self.subject.source.classes
        mix = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=classes) if tuned else None
        cropped = self.subject.source.train.data.crop < 1
        augment = Augmentation(self.subject.source.shape[0]) if tuned and cropped else None
        reached = DistributedDataParallel(network) if world > 1 else network
        network.train()
        for epoch in range(epochs):
            order = self.index[torch.randperm(len(self.index), generator=generator(seed, epoch))]
            for n, chosen in enumerate(order[: per_epoch * self.batch].split(self.batch)):
                step = epoch * per_epoch + n
                # Image i is mixed with the i-th from the end, so a process has both.
                share = torch.arange(len(chosen) // 2)[rank::world]
                batch = self._read(chosen[torch.cat([share, (len(chosen) - 1 - share).flip(0)])], epoch, device)
                if augment is not None:
                    batch = batch._replace(image=augment(batch.image, batch.index, seed, epoch))
                image, label = batch.image, batch.label.clamp(min=0)
                if mix is not None:
                    with seeded(seed, step):
                        image, target = mix(image, label)
                else:
                    target = one_hot(label, classes).float()
                draws = SampleRNG(seed, epoch, index=batch.index)
                for path in paths:
                    path.draws = draws
                loss = cross_entropy(reached(image), target, reduction="none") * batch.mask
                schedule.step_update(step)
                (loss.sum() * world / len(chosen)).backward()
                optimizer.step()
                optimizer.zero_grad()
        network.eval()

    def _read(self, index: Tensor, epoch: int, device: torch.device) -> Batch:
        """The images as pretraining augments them; an unreadable one keeps its place and does not count."""
        train = self.subject.source.train
        batch, problems = train.__getitems__([(epoch, int(number)) for number in index])
        train.handle(problems)
        return train.augmented(on_device(batch, device), epoch)

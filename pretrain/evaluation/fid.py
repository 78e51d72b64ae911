"""How like the training images the images are that a model makes: in the features of a network, by torch-fidelity."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pretrain.adapters import Batch
from pretrain.adapters._sampling import check_sampling, generate, make_scheduler
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data.grid import to_uint8
from pretrain.data.images import Images
from pretrain.data.sources import Source, is_cache, open_data
from pretrain.distributed.collectives import all_reduce_max, rank_and_world_size
from pretrain.evaluation.context import BATCH, EvalContext, evenly, over, over_seeds, together
from pretrain.evaluation.feature_extractors import Features, load

LEAST = 4  # images on either side: a neighbourhood is that of the third neighbour
SUBSET = 1000  # images that one estimate of the kernel distance looks at, at most
PROBED = 64  # images that tell one data set from another


def make(subject: EvalContext, names: list[str]) -> "Likeness":
    """The evaluator of this file's metrics.

    Raises:
        UserError: the settings do not fit the model or each other.
    """
    settings, flag = subject.settings, subject.flag
    check_sampling(subject.adapter, subject.classes, settings.sampler, settings.steps, settings.guidance, flag)
    if settings.num_images < LEAST:
        raise UserError(f"{flag}num-images {settings.num_images}: {', '.join(names)} need at least {LEAST} images")
    others = _others(subject)
    if len(evenly(others.train, settings.max_reference)) < LEAST:
        few = min(len(others.train), settings.max_reference)
        raise UserError(f"{flag}metrics {','.join(names)}: {few} images to compare with are too few, it takes {LEAST}")
    return Likeness(subject, others, tuple(names), load(settings.features, f"{flag}features"))


def _others(subject: EvalContext) -> Source:
    """The data whose images made ones are compared with, of the shape that those have.

    Raises:
        UserError: there are none.
    """
    name, (channels, height, width) = subject.settings.reference, subject.source.seen_shape
    if name is None:
        return subject.source
    size, given = height if height == width else None, f"{subject.flag}reference {name}"
    if is_cache(name):
        raise UserError(f"{given}: it holds latents; name images, or leave it out")
    data = replace(subject.source.train.data, source=name, size=size, channels=channels, flip=False, crop=1.0)
    data = replace(data, train_split=None, test_split=None, image=None, label=None)
    try:
        found = open_data(data, 0)
    except UserError as refusal:
        raise UserError(f"{given}: {str(refusal).removeprefix(f'--data {name}: ')}") from None
    if found.shape != subject.source.seen_shape:
        there, here = ("x".join(map(str, shape)) for shape in (found.shape, subject.source.seen_shape))
        raise UserError(f"{given}: its images are {there}, those that the model makes {here}; name images of that size")
    return found


@dataclass(frozen=True)
class Likeness:
    """Fréchet and kernel distance, precision and recall of made images against training images, as torch-fidelity has
    them (Heusel et al. 2017, equation 6; Bińkowski et al. 2018, section 4; Kynkäänniemi et al. 2019, section 2).

    Image n has the same noise, and of a conditional model the same label, whatever the model and the processes.

    Attributes:
        subject: what is evaluated.
        others: data that made images are compared with; the training images, of latents decoded.
        names: of the metrics.
        network: whose features are compared.
    """

    subject: EvalContext
    others: Source
    names: tuple[str, ...]
    network: Features

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The metrics by name; over several seeds, their means and standard deviations."""
        self.network.to(next(model.parameters()).device)
        return over_seeds(lambda seed: self.compare(self.made(model, seed)), self.subject.settings.seeds)

    def made(self, model: nn.Module, seed: int) -> Tensor:
        """Features [n, D] of the images that the model makes."""
        settings, classes = self.subject.settings, self.subject.classes
        device, (rank, world) = next(model.parameters()).device, rank_and_world_size()

        def rows(which: Tensor) -> tuple[Tensor, Tensor]:
            noise = SampleRNG(seed, index=which).normal(*self.subject.source.shape)
            label = which % classes if classes else torch.full_like(which, -1)
            image = generate(
                model,
                self.subject.adapter,
                noise,
                label,
                steps=settings.steps,
                guidance=settings.guidance,
                sampler=settings.sampler,
                autoencoder=self.subject.source.autoencoder,
            )
            return which, self.features(image)

        (feature,) = together(map(rows, torch.arange(settings.num_images, device=device).split(BATCH)[rank::world]))
        return feature

    def features(self, image: Tensor) -> Tensor:
        """Features [B, D] of images [B, C, H, W] in [-1, 1], brought to 8 bits as files have them."""
        return self.network(to_uint8(image).movedim(-1, 1).to(self.network.device))

    def compare(self, made: Tensor) -> dict[str, float]:
        """The metrics of features [n, D]."""
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_kid import kid_features_to_metric
        from torch_fidelity.metric_prc import prc_features_to_metric

        found: dict[str, float] = {}
        if "fid" in self.names:
            statistics = {name: self.real[name].numpy() for name in ("mu", "sigma")}
            distance = fid_statistics_to_metric(fid_features_to_statistics(made), statistics, verbose=False)
            found["fid"] = distance["frechet_inception_distance"]
        real = self.real["feature"]
        if "kid" in self.names:
            size = min(SUBSET, len(made), len(real))
            kernel = kid_features_to_metric(made, real, kid_subset_size=size, verbose=False)
            found["kid"] = kernel["kernel_inception_distance_mean"]
        if "precision-recall" in self.names:
            both = prc_features_to_metric(made, real, save_cpu_ram=True, verbose=False)
            found |= {name: both[name] for name in ("precision", "recall")}
        return found

    @property
    def chosen(self) -> range:
        """Numbers of the images that made ones are compared with."""
        return evenly(self.others.train, self.subject.settings.max_reference)

    @property
    def note(self) -> str:
        """What the numbers are of, in words, without folders of this machine."""
        settings, source = self.subject.settings, Path(self.others.train.data.source).expanduser()
        by = type(make_scheduler(self.subject.adapter, settings.sampler)).__name__
        kind = "latents decoded by their autoencoder" if self.others.autoencoder else "images"
        where = source.resolve().name if source.exists() else self.others.train.data.source
        return (
            f"{settings.num_images:,} images, by {settings.steps} steps of {by} with guidance {settings.guidance:g}, "
            f"compared with {len(self.chosen):,} {kind} of {where} by the features of {Path(settings.features).name}"
        )

    @cached_property
    def real(self) -> dict[str, Tensor]:
        """Features of the training images, "feature" [R, D], with their mean "mu" and covariance "sigma"; kept on disk,
        by what the images and the network are.
        """
        from torch_fidelity.metric_fid import fid_features_to_statistics

        images, network, chosen = self.others.train, self.network, self.chosen

        def encode(batch: Batch) -> tuple[Tensor]:
            return (self.features(self.others.seen(batch.image)),)

        told = _fingerprint(images, chosen, self.others.made_by or "")
        name = f"{told}-{network.fingerprint()}.safetensors"
        file = cached_assets_path("infobatch-pretrain", "evaluate", "reference") / name
        # All processes do the same: on one of several machines the file may be missing.
        if not all_reduce_max(torch.tensor(not file.exists())).item():
            return load_file(file)
        (feature,) = over(images, chosen, network.device, encode)
        statistics = fid_features_to_statistics(feature)
        found = {"feature": feature, **{key: torch.from_numpy(value) for key, value in statistics.items()}}
        if rank_and_world_size()[0] == 0:
            _keep(found, file)
        return found


def _keep(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a file that others never see half of."""
    part = file.with_suffix(f".{torch.initial_seed() % 997}.part")
    save_file(tensors, part)
    part.replace(file)


def _fingerprint(images: Images, chosen: range, autoencoder: str) -> str:
    """Changes with the images, as far as some of them, evenly apart, tell, and with what decodes them."""
    digest = hashlib.sha256(f"{len(images)} {len(chosen)} {images.shape} {autoencoder}".encode())
    for index in chosen[:: -(-len(chosen) // PROBED)]:
        digest.update(images[None, index].image.numpy().tobytes())
    return digest.hexdigest()[:16]

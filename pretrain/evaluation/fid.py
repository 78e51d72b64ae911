"""FID, KID, precision and recall of generated images, computed by torch-fidelity from the features of a network."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pretrain.adapters import Batch
from pretrain.core.errors import UserError, warn
from pretrain.core.files import atomic_write, expand
from pretrain.data.fingerprint import digest
from pretrain.data.grid import to_uint8
from pretrain.data.images import Images
from pretrain.data.sources import Source, is_cache, open_data
from pretrain.distributed.collectives import all_reduce_max, rank_and_world_size
from pretrain.evaluation.context import (
    EvalContext,
    describe_generated,
    map_generated,
    map_images,
    mean_over_seeds,
    some_images,
)
from pretrain.evaluation.feature_extractors import Features, load

MIN_IMAGES = 4  # generated and reference images: precision and recall use the third nearest neighbour
KID_SUBSET_SIZE = 1000  # images of one estimate of KID, at most
FINGERPRINT_IMAGES = 64  # reference images whose pixels identify the data set


def make(context: EvalContext, names: list[str]) -> "ImageQuality":
    """The evaluator of the metrics fid, kid and precision-recall.

    Raises:
        UserError: the settings do not suit the model or each other.
    """
    settings = context.settings
    context.check_sampling()
    if settings.num_images < MIN_IMAGES:
        raise UserError(
            f"{context.flag('num-images')} {settings.num_images}: {', '.join(names)} need at least {MIN_IMAGES} images"
        )
    reference = _open_reference(context)
    if (count := min(len(reference.train), settings.max_reference)) < MIN_IMAGES:
        raise UserError(
            f"{context.flag('metrics')} {','.join(names)}: there are {count} reference images, and at least "
            f"{MIN_IMAGES} are needed; set another {context.flag('reference')} or a larger "
            f"{context.flag('max-reference')}"
        )
    return ImageQuality(context, reference, tuple(names), load(settings.features, context.flag("features")))


def _open_reference(context: EvalContext) -> Source:
    """The data set that generated images are compared with.

    Raises:
        UserError: it can't be opened, or its images have another shape than the generated ones.
    """
    name, (channels, height, width) = context.settings.reference, context.source.seen_shape
    if name is None:
        return context.source
    size, flag = height if height == width else None, f"{context.flag('reference')} {name}"
    if is_cache(name):
        raise UserError(f"{flag}: it holds latents; give images, or omit it")
    data = replace(
        context.source.train.data, source=name, subset=None, size=size, channels=channels, flip=False, crop=1.0
    )
    try:
        reference = open_data(data, 0)
    except UserError as error:
        raise UserError(f"{flag}: {str(error).removeprefix(f'--data {name}: ')}") from None
    if reference.shape != context.source.seen_shape:
        theirs, ours = ("x".join(map(str, shape)) for shape in (reference.shape, context.source.seen_shape))
        raise UserError(f"{flag}: its images are {theirs}, the generated ones {ours}; give images of that size")
    return reference


@dataclass(frozen=True)
class ImageQuality:
    """FID (Heusel et al. 2017, equation 6), KID (Bińkowski et al. 2018, section 4), precision and recall (Kynkäänniemi
    et al. 2019, section 2) of generated images.

    Attributes:
        context: what is evaluated.
        reference: data set that generated images are compared with; latents are decoded.
        names: of the metrics.
        network: computes the features.
    """

    context: EvalContext
    reference: Source
    names: tuple[str, ...]
    network: Features

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The metrics by name, see `mean_over_seeds`."""
        self.network.to(next(model.parameters()).device)
        return mean_over_seeds(
            lambda seed: self.compare(map_generated(self.context, model, seed, self.features)),
            self.context.settings.seeds,
        )

    def features(self, image: Tensor) -> Tensor:
        """Features [B, D] of images [B, C, H, W] in [-1, 1], which are rounded to 8 bits as in an image file."""
        return self.network(to_uint8(image).movedim(-1, 1).to(self.network.device))

    def compare(self, generated: Tensor) -> dict[str, float]:
        """The metrics of features [N, D]."""
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_kid import kid_features_to_metric
        from torch_fidelity.metric_prc import prc_features_to_metric

        found: dict[str, float] = {}
        if "fid" in self.names:
            statistics = {name: self.reference_features[name].numpy() for name in ("mu", "sigma")}
            distance = fid_statistics_to_metric(fid_features_to_statistics(generated), statistics, verbose=False)
            found["fid"] = distance["frechet_inception_distance"]
        reference = self.reference_features["feature"]
        if "kid" in self.names:
            size = min(KID_SUBSET_SIZE, len(generated), len(reference))
            distance = kid_features_to_metric(generated, reference, kid_subset_size=size, verbose=False)
            found["kid"] = distance["kernel_inception_distance_mean"]
        if "precision-recall" in self.names:
            both = prc_features_to_metric(generated, reference, save_cpu_ram=True, verbose=False)
            found |= {name: both[name] for name in ("precision", "recall")}
        return found

    @cached_property
    def reference_index(self) -> list[int]:
        """Indices of the reference images."""
        return some_images(self.reference.train, self.context.settings.max_reference)

    @property
    def note(self) -> str:
        """How the metrics were measured; of paths only the last name."""
        settings, source = self.context.settings, expand(self.reference.train.data.source)
        kind = "latents, decoded by their autoencoder," if self.reference.autoencoder else "images"
        name = source.resolve().name if source.exists() else self.reference.train.data.source
        return (
            f"{describe_generated(self.context)}, compared with {len(self.reference_index):,} {kind} of {name} in the "
            f"features of {Path(settings.features).name}"
        )

    @cached_property
    def reference_features(self) -> dict[str, Tensor]:
        """Features of the reference images ("feature", float32 [R, D]), their mean ("mu") and covariance ("sigma").

        They are cached on disk under a fingerprint of the images and the network.
        """
        from torch_fidelity.metric_fid import fid_features_to_statistics

        images, network, index = self.reference.train, self.network, self.reference_index

        def encode(batch: Batch) -> tuple[Tensor]:
            return (self.features(self.reference.seen(batch.image)),)

        name = f"{_fingerprint(images, index, self.reference.made_by or '')}-{network.fingerprint()}.safetensors"
        file = cached_assets_path("infobatch-pretrain", "evaluate", "reference") / name
        # All processes must take the same branch, and a process on another machine may not see the file.
        if not all_reduce_max(torch.tensor(not file.exists())).item():
            return load_file(file)
        (feature,) = map_images(images, index, network.device, encode)
        statistics = fid_features_to_statistics(feature)
        found = {"feature": feature, **{key: torch.from_numpy(value) for key, value in statistics.items()}}
        if rank_and_world_size()[0] == 0:
            try:
                with atomic_write(file) as part:
                    save_file(found, part)
            except (OSError, SafetensorError) as error:
                warn(f"{file}: the reference features can't be cached: {error}")
        return found


def _fingerprint(images: Images, index: list[int], autoencoder: str) -> str:
    """A hash of the files of the images `index`, of some of their pixels, and of the name of their autoencoder.

    Files say which images they are, pixels how they are resized.
    """
    files = digest(images, np.asarray(index))
    found = hashlib.sha256(f"{files} {len(images)} {images.shape} {autoencoder}".encode())
    for number in index[:: -(-len(index) // FINGERPRINT_IMAGES)]:
        found.update(images[None, number].image.numpy().tobytes())
    return found.hexdigest()[:16]

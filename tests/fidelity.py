"""torch-fidelity's own metrics, with the feature network that ships with the package."""

from pathlib import Path

import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from pretrain.evaluation.feature_extractors import load


class Ours(FeatureExtractorBase):
    """The small network as a feature extractor of torch-fidelity."""

    def __init__(self, name, features_list, **_) -> None:
        super().__init__(name, features_list)
        self.network = load("small")

    get_provided_features_list = staticmethod(lambda: ("all",))
    get_default_feature_layer_for_metric = staticmethod(lambda metric: "all")
    can_be_compiled = staticmethod(lambda: False)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.network(image),)


torch_fidelity.register_feature_extractor("ours", Ours)


class TensorDataset(Dataset):
    """A data set of tensors for torch-fidelity."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def by_hand(made: Tensor | Path, real: Tensor | Path, subset: int) -> dict[str, float]:
    """The metrics under our names, of uint8 images [N, C, H, W] or folders of files; `subset`: of the kernel."""
    made, real = (TensorDataset(images) if isinstance(images, Tensor) else str(images) for images in (made, real))
    found = torch_fidelity.calculate_metrics(
        input1=made,
        input2=real,
        feature_extractor="ours",
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=subset,
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        batch_size=64,
    )
    return {
        "fid": found["frechet_inception_distance"],
        "kid": found["kernel_inception_distance_mean"],
        "precision": found["precision"],
        "recall": found["recall"],
    }

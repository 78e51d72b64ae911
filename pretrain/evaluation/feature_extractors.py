"""Networks whose features images are compared by: a small one that is here, torch-fidelity's, a file of the user's."""

import hashlib
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.core.errors import UserError

SMALL = Path(__file__).parent / "weights" / "fashion_mnist.safetensors"
WIDTH = 64  # of the small network's features
SHORT = {"inception": "inception-v3-compat"}


class Classifier(nn.Module):
    """A small convolutional network for images of any size; what comes before its last layer are the features."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        sizes = (channels, 32, 64, 64)
        layers: list[nn.Module] = []
        for n, (i, o) in enumerate(pairwise(sizes)):
            layers += [nn.Conv2d(i, o, 3, stride=1 + (n > 0), padding=1), nn.GroupNorm(8, o), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 64, WIDTH), nn.SiLU())
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Features [B, WIDTH] of uint8 images [B, C, H, W]."""
        return self.body(image.float() / 127.5 - 1)


class Features(nn.Module):
    """A feature network together with what it wants.

    Args:
        network: uint8 images [B, C, H, W] -> [B, D], or a tuple that begins with it.
        channels: C that it wants.
        code: what tells it from others with the same parameters.
    """

    def __init__(self, network: nn.Module, channels: int, code: bytes) -> None:
        super().__init__()
        self.network, self.channels, self.code = network.eval(), channels, code
        self.anchor: Tensor
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # it is where the network is

    @property
    def device(self) -> torch.device:
        """Where images must be."""
        return self.anchor.device

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Features float32 [B, D] of uint8 images [B, C, H, W], grey or RGB; grey is the mean of the colours."""
        if self.channels == 1 and image.shape[1] == 3:
            image = image.float().mean(1, keepdim=True).round().byte()
        found: Any = self.network(image.expand(-1, self.channels, -1, -1))
        return (found[0] if isinstance(found, tuple) else found).float().flatten(1)

    def fingerprint(self) -> str:
        """Changes with any of the parameters, and with the code."""
        digest = hashlib.sha256(self.code)
        for name, value in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def load(name: str, flag: str = "--features") -> Features:
    """A feature network.

    Args:
        name: "small"; a network that torch-fidelity knows, "inception" for short, whose weights come from where
            torch-fidelity keeps or fetches them, or, as NAME=PATH, from a file; the path of a TorchScript file (.pt)
            for uint8 images [B, 3, H, W], or of a small network (.safetensors) that benchmarks/quality.py trained.
        flag: what it was named by.

    Raises:
        UserError: there is none, or it can't be read.
    """
    try:
        if name == "small" or name.endswith(".safetensors"):
            return _small(SMALL if name == "small" else Path(name))
        if name.endswith(".pt") and "=" not in name:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TorchScript has a successor; files of it remain
                return Features(torch.jit.load(name, map_location="cpu"), 3, Path(name).read_bytes())
        return _of_torch_fidelity(name)
    except UserError as refusal:
        raise UserError(f"{flag} {name}: {refusal}") from None
    except Exception as error:  # whatever the readers have to say
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{flag} {name}: the feature network can't be read: {said}") from None


def _small(path: Path) -> Features:
    state = load_file(path)
    network = Classifier(state["body.0.weight"].shape[1], len(state["head.bias"]))
    network.load_state_dict(state)
    return Features(network, state["body.0.weight"].shape[1], b"small")


def _of_torch_fidelity(name: str) -> Features:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as KNOWN
    from torch_fidelity.utils import create_feature_extractor

    short, _, weights = name.partition("=")
    full = SHORT.get(short, short)
    if full not in KNOWN:
        raise UserError(
            f"a feature network is small, inception, {', '.join(KNOWN)} (each also as NAME=WEIGHTS), or the path of a "
            ".pt or .safetensors file"
        )
    if weights and not Path(weights).is_file():
        raise UserError(f"there is no file {weights}")
    layer = KNOWN[full].get_default_feature_layer_for_metric("fid")
    try:
        extractor = create_feature_extractor(
            full, [layer], feature_extractor_weights_path=weights or None, cuda=False, verbose=False
        )
    except URLError as error:
        raise UserError(
            f"its weights can't be fetched ({error.reason}); bring them from elsewhere and name the file: {short}=FILE"
        ) from None
    return Features(extractor, 3, full.encode())

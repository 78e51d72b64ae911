"""Networks whose features FID, KID, precision and recall compare: our small one, torch-fidelity's, or a user's file."""

import hashlib
import pickle
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.config.trusted_code import features_file, require_trust
from pretrain.core.errors import UserError

SMALL = Path(__file__).parent / "weights" / "fashion_mnist.safetensors"
WIDTH = 64  # of the small network's features
ABBREVIATIONS = {"inception": "inception-v3-compat"}


class Classifier(nn.Module):
    """A small convolutional classifier for images of any size; the input of its last layer are the features."""

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
    """A feature network for images of 1 or 3 channels.

    Args:
        network: maps uint8 images [B, C, H, W] to [B, D], or to a tuple whose first element is that.
        channels: C of its input.
        code: distinguishes it from networks with other code and the same parameters.
    """

    def __init__(self, network: nn.Module, channels: int, code: bytes) -> None:
        super().__init__()
        self.network, self.channels, self.code = network.eval(), channels, code
        self.anchor: Tensor
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # it is on the network's device

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return self.anchor.device

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Features float32 [B, D] of uint8 images [B, C, H, W], grey or RGB; grey is the mean of the colours."""
        if self.channels == 1 and image.shape[1] == 3:
            image = image.float().mean(1, keepdim=True).round().byte()
        found: Any = self.network(image.expand(-1, self.channels, -1, -1))
        return (found[0] if isinstance(found, tuple) else found).float().flatten(1)

    def fingerprint(self) -> str:
        """A hash of the code and all parameters."""
        digest = hashlib.sha256(self.code)
        for name, value in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def load(name: str, flag: str = "--features") -> Features:
    """Load a feature network.

    Args:
        name: one of
            - "small";
            - the name of a torch-fidelity network, or "inception" for its Inception-v3; torch-fidelity downloads its
              weights, or, as NAME=PATH, they are those of a file;
            - the path of a small network (.safetensors) trained by benchmarks/quality.py;
            - the path of a TorchScript file (.pt) for uint8 images [B, 3, H, W]. TorchScript is code, so the user must
              have trusted the file, see `trusted_code`.
        flag: the command-line flag, for error messages.

    Raises:
        UserError: the name is unknown, or the file can't be read or is not trusted.
    """
    try:
        file = features_file(name)
        if name == "small" or (name.endswith(".safetensors") and file == name):
            return _small(SMALL if name == "small" else Path(name))
        if name.endswith(".pt") and file == name:
            require_trust(name, flag, "the setting evaluate.features")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch deprecates TorchScript
                return Features(torch.jit.load(name, map_location="cpu"), 3, Path(name).read_bytes())
        return _of_torch_fidelity(name.removesuffix(f"={file}"), file if file != name else "", flag)
    except UserError as error:
        raise UserError(f"{flag} {name}: {error}") from None
    except Exception as error:  # readers of broken files raise exceptions of any type
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{flag} {name}: the feature network can't be read ({message})") from None


def _small(path: Path) -> Features:
    state = load_file(path)
    network = Classifier(state["body.0.weight"].shape[1], len(state["head.bias"]))
    network.load_state_dict(state)
    return Features(network, state["body.0.weight"].shape[1], b"small")


def _of_torch_fidelity(name: str, file: str, flag: str) -> Features:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as EXTRACTORS
    from torch_fidelity.utils import create_feature_extractor

    full = ABBREVIATIONS.get(name, name)
    if full not in EXTRACTORS:
        raise UserError(
            f"a feature network is small, inception, {', '.join(EXTRACTORS)} (also as NAME=PATH with the weights of a "
            "file), or the path of a .pt or .safetensors file"
        )
    layer = EXTRACTORS[full].get_default_feature_layer_for_metric("fid")

    def create(path: str | None) -> Features:
        network = create_feature_extractor(
            full, [layer], feature_extractor_weights_path=path, cuda=False, verbose=False
        )
        return Features(network, 3, full.encode())

    if not file:
        try:
            return create(None)
        except URLError as error:
            raise UserError(
                f"its weights can't be downloaded ({error.reason}); copy them from another machine and give the file: "
                f"{name}=PATH"
            ) from None
    if not Path(file).is_file():
        raise UserError(f"there is no file {file}")
    if full.startswith("dinov2"):
        raise UserError(f"torch-fidelity can't read the weights of {full} from a file; give {name} alone")
    if full.startswith("clip"):  # its files are TorchScript
        require_trust(file, flag, "the setting evaluate.features")
        return create(file)
    # torch-fidelity unpickles its file, which can execute code, so it gets a copy that holds tensors alone.
    try:
        tensors = load_file(file) if file.endswith(".safetensors") else torch.load(file, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file} holds more than tensors, which could execute code; save a state dict alone") from None
    with tempfile.NamedTemporaryFile(suffix=".pth") as copy:
        torch.save(tensors, copy.name)
        return create(copy.name)

"""A pipeline with code of its own: in half precision, saved again, with labels of any kind."""

import random
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from export.test_export import SMALL_DIT
from pretrain.models.dit import DiTConfig
from pretrain.models.unet import UNetConfig

from pretrain.adapters.ddpm import DDPM
from pretrain.adapters.edm import EDM
from pretrain.adapters.flow import Flow
from pretrain.data.autoencoder import Autoencoder
from pretrain.export.to_diffusers import to_diffusers

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype. is deprecated:FutureWarning")
SHAPE, CLASSES = (1, 12, 12), 3
NETWORKS = {
    "dit": DiTConfig(**SMALL_DIT),
    "rope": DiTConfig(**SMALL_DIT, position="rope", qk_norm=True),
    "unet": UNetConfig(channels=(8, 16), layers=1, attention=0),
}
ADAPTERS = {"flow": Flow(), "ddpm": DDPM(), "edm": EDM()}


class Buffered(ModelMixin, ConfigMixin):
    """A user's network with a buffer that no file has."""

    @register_to_config
    def __init__(self, shape: tuple[int, ...] = SHAPE) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(shape[-1], shape[-1])
        self.offset: torch.Tensor
        self.register_buffer("offset", torch.linspace(-1, 1, shape[-1], dtype=torch.float32), persistent=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.linear(x + self.offset)


def exported(folder: Path, network: str, adapter: str, classes: int = CLASSES, vae: Any = None) -> str:
    torch.manual_seed(0)
    shape = (4, 8, 8) if vae else SHAPE
    model = Buffered() if network == "buffered" else NETWORKS[network].build(shape, classes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    to_diffusers(model.eval(), ADAPTERS[adapter], folder, Autoencoder(vae) if vae else None)
    return str(folder)


def opened(folder: str, **arguments: Any) -> Any:
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe: Any, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return pipe(generator=generator, num_inference_steps=3, output_type="pt", **arguments).images


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("network", [*NETWORKS, "buffered"])
def test_half_precision_and_a_second_saving(network: str, adapter: str, tmp_path: Path) -> None:
    """Opened in half precision it is what it is cast to it later, near float32; saved again it is the same pipeline."""
    folder, more = exported(tmp_path / "a", network, adapter), {"batch_size": 2}
    if network != "buffered":
        more = {"label": [0, 2], "guidance": 1.5}
    pipe = opened(folder)
    expected = made(pipe, **more)
    assert expected.dtype == torch.float32 and (expected > 0).any() and (expected < 1).any()
    for dtype in (torch.float16, torch.bfloat16):
        half = opened(folder, torch_dtype=dtype)
        assert all(value.dtype == dtype for value in [*half.network.parameters(), *half.network.buffers()])
        images = made(half, **more)
        assert torch.equal(images, made(opened(folder).to(dtype), **more))
        assert (images - expected).abs().mean() < (0.02 if dtype == torch.float16 else 0.1)
    for n in ("b", "c"):  # also what was saved again
        pipe.save_pretrained(tmp_path / n)
        pipe = opened(str(tmp_path / n))
        assert torch.equal(made(pipe, **more), expected)
    names = [sorted(str(path.relative_to(tmp_path / n)) for path in (tmp_path / n).rglob("*.*")) for n in "ac"]
    assert (
        names[0] == names[1]
        and (tmp_path / "c" / "pipeline.py").read_bytes() == (tmp_path / "a" / "pipeline.py").read_bytes()
    )


@pytest.mark.parametrize("statistics", [False, True])
def test_latents_are_decoded_in_the_precision_of_the_autoencoder(statistics: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, scaling_factor=0.5)
    if statistics:
        vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5])
    folder = exported(tmp_path / "a", "dit", "flow", vae=vae)
    expected = made(opened(folder), label=1)
    for dtype in (torch.float16, torch.bfloat16):
        images = made(opened(folder, torch_dtype=dtype), label=1)
        assert images.dtype == torch.float32 and (images - expected).abs().mean() < 0.1


def test_labels_are_what_a_sequence_of_whole_numbers_can_be(tmp_path: Path) -> None:
    pipe = opened(exported(tmp_path / "a", "dit", "flow"))
    rng = random.Random(0)
    for _ in range(5):
        labels = [rng.randrange(CLASSES) for _ in range(rng.randrange(1, 4))]
        expected = made(pipe, label=labels)
        assert len(expected) == len(labels)
        for kind in (tuple, np.array, torch.tensor, lambda some: np.array(some, dtype=np.uint8), np.int32):
            assert torch.equal(made(pipe, label=kind(labels)), expected)
        assert torch.equal(made(pipe, label=[torch.tensor(label) for label in labels]), expected)
    for one in (1, np.int64(1), torch.tensor(1)):
        assert torch.equal(made(pipe, label=one, batch_size=2), made(pipe, label=[1, 1]))


def test_classes_by_their_names(tmp_path: Path) -> None:
    """Also after it is saved again; a name that looks like a number is a name."""
    torch.manual_seed(0)
    model = NETWORKS["dit"].build(SHAPE, CLASSES).eval()
    names = ["2", "cat", *(f"class {n}" for n in range(2, CLASSES))]
    to_diffusers(model, Flow(), tmp_path / "a", class_names=names)
    opened(str(tmp_path / "a")).save_pretrained(tmp_path / "b")
    for folder in "ab":
        pipe = opened(str(tmp_path / folder))
        assert torch.equal(made(pipe, label=["cat", "2", 1]), made(pipe, label=[1, 0, 1]))
        assert torch.equal(made(pipe, label="cat", batch_size=2), made(pipe, label=[1, 1]))
        with pytest.raises(ValueError, match=r"^there is no class 'dog'; the classes are 2, cat, class 2"):
            made(pipe, label=[0, "dog"])


@pytest.mark.parametrize("network", ["dit", "unet"])
def test_what_is_no_label_is_one_sentence(network: str, tmp_path: Path) -> None:
    pipe = opened(exported(tmp_path / "a", network, "flow"))
    for label in (CLASSES, -1, CLASSES + 100, [0, CLASSES], np.array([-2, 1]), torch.tensor([CLASSES]), 2**40, 2**80):
        with pytest.raises(ValueError, match=r"label") as error:
            made(pipe, label=label)
        assert f"give one of the {CLASSES} classes from 0" in str(error.value) and "\n" not in str(error.value)
    for label in (0.5, "cat", [0.0, 1.0], [[0, 1]], True, [None, 1], [], {"a": 1}, np.ones(500), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"^label must be a whole number or a list of them, got") as error:
            made(pipe, label=label)
        assert len(str(error.value)) < 250 and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="label must have batch_size = 3 entries, got 2"):
        made(pipe, label=[0, 1], batch_size=3)
    if network == "dit":  # a UNet without labels makes diffusers' own pipeline
        without = opened(exported(tmp_path / "b", network, "flow", classes=0))
        with pytest.raises(ValueError, match="there is no label 0; this model has no classes, give None"):
            made(without, label=0)
        assert len(made(without, batch_size=2)) == 2


def test_arguments_out_of_their_range_are_one_sentence(tmp_path: Path) -> None:
    """As a loop over settings would pass them; no noise is returned in place of images."""
    pipe, g = opened(exported(tmp_path / "a", "dit", "flow")), torch.Generator()
    wrong: dict[str, tuple[Any, ...]] = {
        "num_inference_steps": (0, -1, 2.5, "4", None),
        "batch_size": (0, -1, 1.5, "2"),
        "guidance": (float("nan"), float("inf"), "2", [1, 2], None),
        "guidance_interval": (1, "ab", (1, 1), (2, 1), (-1, 2), (float("nan"), 1), (1, 2, 3)),
        "output_type": ("latent", "jpg", None),
        "generator": (5, [g], [g] * 3, [g, 5]),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} must be ") as error:
                pipe(**{"label": [0, 1], name: value})
            assert "\n" not in str(error.value)
    two = [torch.Generator().manual_seed(7) for _ in range(2)]
    images = pipe(label=[1, 1], generator=two, num_inference_steps=np.int64(2), output_type="pt").images
    assert torch.equal(images[0], images[1])

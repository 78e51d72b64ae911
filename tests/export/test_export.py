"""Exported models open without this project and give the same outputs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from pretrain.models.dit import DiTConfig
from pretrain.models.unet import UNetConfig
from programs import common, final, train
from safetensors.torch import load_file

import train_mae
from pretrain.adapters._sampling import generate
from pretrain.adapters.ddpm import DDPM
from pretrain.adapters.edm import EDM
from pretrain.adapters.flow import Flow
from pretrain.checkpoint.load_run import load_run
from pretrain.config.cli import parse
from pretrain.export.to_diffusers import to_diffusers

SMALL_DIT = {"patch": 4, "width": 16, "depth": 1, "heads": 2}

ELSEWHERE = """
import sys, torch
from safetensors.torch import load_file, save_file
{code}
assert not any(name.split('.')[0] in ('pretrain', 'models') for name in sys.modules)
save_file(out if isinstance(out, dict) else {{'out': out.contiguous()}}, '{out}')
"""


def elsewhere(code: str, folder: Path) -> Any:
    """Run code in a process without this project; returns its variable `out`, a tensor or several by name."""
    out = folder / "out.safetensors"
    text = ELSEWHERE.format(code=code, out=out)
    done = subprocess.run([sys.executable, "-c", text], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    return found.get("out", found)


# Whether diffusers has a pipeline for the combination: a UNet without labels, and a scheduler that neither
# starts from noise of another standard deviation than 1 nor scales the network's input.
UNET, DIT = UNetConfig(channels=(8, 16), layers=1, attention=0), DiTConfig(**SMALL_DIT)
COMBINATIONS = {
    "flow": (Flow(), UNET, 0, True),
    "flow logit-normal, shifted": (Flow(times="logit_normal", shift=2.0), UNET, 0, True),
    "noise": (DDPM(), UNET, 0, True),
    "noise, linear": (DDPM(noise_schedule="linear", min_snr=5.0), UNET, 0, True),
    "image, sigmoid to the end": (
        DDPM(prediction="sample", noise_schedule="sigmoid", zero_terminal_snr=True),
        UNET,
        0,
        True,
    ),
    "velocity, to the end": (DDPM(prediction="v_prediction", zero_terminal_snr=True), UNET, 0, True),
    "edm": (EDM(), UNET, 0, False),
    "edm with labels and uncertainty": (EDM(uncertainty=True), DIT, 2, False),
    "velocity with labels": (DDPM(prediction="v_prediction"), UNET, 2, False),
    "flow with labels": (Flow(), UNET, 2, False),
    "dit": (Flow(), DIT, 0, False),
    "dit with labels": (DDPM(), DIT, 2, False),
    "rope": (Flow(), DiTConfig(**SMALL_DIT, position="rope", qk_norm=True), 0, False),
    "neither square nor grey nor RGB": (Flow(), UNET, 0, True),
    "the same with labels": (Flow(), DIT, 2, False),
    "predicted images": (Flow(prediction="sample"), DIT, 2, False),
    "a UNet's predicted images": (Flow(prediction="sample"), UNET, 0, False),
}
OPENED = """
import json, diffusers
{name} = {message}
{name}.set_progress_bar_config(disable=True)
{name}_out = {name}({more}num_inference_steps=4, generator=torch.Generator().manual_seed(7), output_type='np').images
{name}_out = torch.from_numpy({name}_out).permute(0, 3, 1, 2)
"""


def shape_of(name: str) -> tuple[int, int, int]:
    return (2, 8, 12) if "same" in name or "square" in name else (1, 12, 12)


def exported(name: str, folder: Path) -> tuple[str, torch.Tensor]:
    """Code that opens an export and generates three images, `model_out`; and the expected images."""
    adapter, part, classes, stock = COMBINATIONS[name]
    torch.manual_seed(0)
    model = part.build(shape_of(name), classes).eval()
    for parameter in model.parameters():  # also those initialized to 0, so that every parameter matters
        torch.nn.init.normal_(parameter, std=0.2)
    model = adapter.prepare(model) if isinstance(adapter, EDM | Flow) else model
    message = to_diffusers(model, adapter, folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert (index["_class_name"] == "DDPMPipeline") == stock == ("trust_remote_code" not in message)
    assert stock != (folder / "pipeline.py").is_file()
    more = "label=[0, 1, 1], guidance=2.0, guidance_interval=(0.1, 8), " if classes else "batch_size=3, "
    noise = torch.randn(3, *shape_of(name), generator=torch.Generator().manual_seed(7))
    label = torch.tensor([0, 1, 1] if classes else [-1, -1, -1])
    guided: dict[str, Any] = {"guidance": 2.0, "guidance_interval": (0.1, 8.0)} if classes else {}
    made = generate(model, adapter, noise, label, steps=4, **guided)
    assert (made.abs() < 1).float().mean() > 0.2, "images in which one could see a difference"
    return OPENED.format(name="model", message=message, more=more), (made + 1) / 2


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_diffusion_model_opens_as_a_pipeline(name: str, tmp_path: Path) -> None:
    """Same noise, labels and steps: the same images as here; by a class of diffusers if there is one."""
    code, expected = exported(name, tmp_path / "model")
    scope: dict[str, Any] = {"torch": torch}
    exec(code, scope)
    torch.testing.assert_close(scope["model_out"], expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_every_pipeline_opens_without_this_project(tmp_path: Path) -> None:
    """One process opens them all."""
    code, expected = "", {}
    for number, name in enumerate(COMBINATIONS):
        one, expected[f"{number}"] = exported(name, tmp_path / str(number))
        code += one.replace("model_out", f"out{number}") + f"out{number} = out{number}.contiguous()\n"
    code += "out = {str(n): globals()[f'out{n}'] for n in range(" + f"{len(COMBINATIONS)}" + ")}\n"
    found = elsewhere(code, tmp_path)
    for number, images in expected.items():
        torch.testing.assert_close(found[number], images, atol=1e-5, rtol=0)


def test_the_printed_code_opens_the_ema(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    pipe = eval(summary["open_model_with"], {"diffusers": diffusers})
    found, average = pipe.unet.state_dict(), final(finished, "ema")
    assert all(torch.equal(found[name.removeprefix("network.")], value) for name, value in average.items())


@pytest.mark.slow
def test_an_encoder_opens_without_this_project(pictures: Path, tmp_path: Path) -> None:
    """In timm, with and without a head, and in transformers."""
    train("train_mae.py", *common(pictures, tmp_path / "run", 1), "--model.decoder", "self")
    folder = tmp_path / "run" / "model"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    config = parse(
        ["--config", str(tmp_path / "run" / "config.yaml")], adapter="", model="", recipe=ROOT, output_dir="", help=""
    )
    part = config.component("model")
    arguments = {**part.timm_arguments((1, 12, 12)), "model_name": part.encoder}
    code = f"""
import timm
from transformers import AutoModel
x = torch.linspace(-1, 1, 144).view(1, 1, 12, 12)
with torch.no_grad():
    arguments = {arguments!r}
    out = {{
        "said": {summary["open_model_with"]}.eval().forward_features(x),
        "file": timm.create_model(**arguments, checkpoint_path='{folder}/model.safetensors').eval().forward_features(x),
        "transformers": AutoModel.from_pretrained('{folder}').eval()(x).last_hidden_state,
        "vit_mae": AutoModel.from_pretrained('{folder}/transformers', mask_ratio=0.0).eval()(
            x, noise=torch.arange(9.0)[None]).last_hidden_state,
    }}
    del arguments["num_classes"]
    zero = timm.create_model(**arguments, checkpoint_path='{folder}/with_zero_head.safetensors').eval()
    out["zero"] = zero.forward_features(x)
"""
    found: Any = elsewhere(code, tmp_path)
    model = part.build((1, 12, 12), 0).eval()
    model.load_state_dict(final(tmp_path / "run", "ema"))
    with torch.no_grad():
        expected = model.encoder.forward_features(torch.linspace(-1, 1, 144).view(1, 1, 12, 12))
    assert len(found) == 5
    for features in found.values():
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


OWN_NETWORK = '''
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn


@dataclass(frozen=True)
class OwnConfig:
    """A network of one layer."""

    width: int = 8

    def build(self, shape, classes):
        return Own(shape, self.width + classes)


class Own(nn.Module):
    def __init__(self, shape, width):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], width))
        self.out = nn.Linear(width, 144)

    def forward(self, image):
        return self.out(self.encoder(image))
'''
OWN_OBJECTIVE = '''
from dataclasses import dataclass

from pretrain.adapters import Losses


@dataclass(frozen=True)
class Fill:
    """Fill in what is hidden."""

    def __call__(self, model, batch, rng):
        hidden = rng.uniform(144) < 0.5
        pixels = batch.image.flatten(1)
        whole = model(pixels.masked_fill(hidden, 0).view_as(batch.image))
        return Losses((whole - pixels).square().mean(1))
'''


def test_an_encoder_and_an_objective_of_ones_own_are_trained_exported_and_opened(
    pictures: Path, tmp_path: Path
) -> None:
    """As parameters alone; on data with labels, which the network does not see."""
    (tmp_path / "net.py").write_text(OWN_NETWORK)
    (tmp_path / "fill.py").write_text(OWN_OBJECTIVE)
    words = [*common(pictures, tmp_path / "run", 1), "--evaluate.metrics", "loss"]
    own = ["--model", str(tmp_path / "net.py"), "--adapter", str(tmp_path / "fill.py")]
    train_mae.main(parse([*map(str, words), *own], **train_mae.START, output_dir="runs/x", help=""))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found, average = eval(summary["open_model_with"], {"safetensors": safetensors}), final(tmp_path / "run", "ema")
    assert found.keys() == average.keys() and all(torch.equal(found[name], value) for name, value in average.items())
    model = load_run(tmp_path / "run").model
    assert all(torch.equal(model.state_dict()[name], value) for name, value in average.items())
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "An encoder, pretrained: network" in card and "python train_mae.py --config recipe.yaml" in card

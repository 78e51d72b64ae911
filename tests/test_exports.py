"""Exported models open in a process that knows nothing of this project, and give the same outputs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from programs import common, final, train
from safetensors.torch import load_file

import train_diffusion
from models.dit import DiTConfig
from models.unet import UNetConfig
from pretrain.adapters.flow import Flow
from pretrain.command_line import parse
from pretrain.export import to_diffusers
from pretrain.objective import Uncertain
from pretrain.training import build

SMALL_DIT = {"patch": 4, "width": 16, "depth": 1, "heads": 2}

ELSEWHERE = """
import sys, torch
from safetensors.torch import load_file, save_file
{code}
assert not any(name.split('.')[0] in ('pretrain', 'models') for name in sys.modules)
save_file({{'out': out.contiguous()}}, '{out}')
"""


def elsewhere(code: str, folder: Path) -> torch.Tensor:
    """Run code in a process that knows nothing of this project; what it calls `out`."""
    out = folder / "out.safetensors"
    text = ELSEWHERE.format(code=code, out=out)
    done = subprocess.run([sys.executable, "-c", text], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(out)["out"]


@pytest.mark.parametrize(
    "settings",
    [
        "",
        "--adapter ddpm",
        "--adapter ddpm --adapter.prediction v_prediction --conditional",
        "--adapter ddpm --adapter.prediction sample --adapter.noise-schedule sigmoid --adapter.zero-terminal-snr",
        "--adapter edm",
        "--adapter edm --adapter.uncertainty --model dit --conditional",
        "--conditional",
        "--model dit --conditional --evaluate.guidance 2",
        "--model dit --model.position rope --model.qk-norm",
    ],
)
def test_a_diffusion_model_opens_as_a_pipeline(settings: str, pictures: Path, tmp_path: Path) -> None:
    """Same noise, same labels, same steps: the same images as here."""
    from pretrain.sampling import generate

    words = settings.split()
    if "dit" in words:
        words += ["--model.patch", "4", "--model.width", "16", "--model.depth", "1", "--model.heads", "2"]
        words = ["--data", str(pictures), "--output-dir", str(tmp_path / "run"), "--epochs", "2", *words]
        train_diffusion.main(
            parse(
                words,
                adapter="flow",
                model="unet",
                recipe=ROOT / "configs/fashion_mnist_flow.yaml",
                output_dir="",
                help="",
            )
        )
    else:
        train("train_diffusion.py", *common(pictures, tmp_path / "run", 1), *words)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    conditional = "--conditional" in words
    extra = "label=[0, 1, 1], guidance=2.0, " if conditional else "batch_size=3, "
    code = f"""
import diffusers
pipe = {summary["open_model_with"]}
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(7)
images = pipe({extra}num_inference_steps=4, generator=generator, output_type='np').images
out = torch.from_numpy(images).permute(0, 3, 1, 2)
"""
    found = elsewhere(code, tmp_path)
    config = parse(
        ["--config", str(tmp_path / "run" / "config.yaml")], adapter="", model="", recipe=ROOT, output_dir="", help=""
    )
    model = build(config, (1, 12, 12), 2 if conditional else 0).eval()
    model.load_state_dict(final(tmp_path / "run", "average"))
    if "--adapter.uncertainty" in words:
        assert isinstance(model, Uncertain) and model.log_error.bias.item() != 0, "it was trained, averaged and saved"
    noise = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(7))
    label = torch.tensor([0, 1, 1] if conditional else [-1, -1, -1])
    made = generate(model, config.part("adapter"), noise, label, steps=4, guidance=2.0 if conditional else 1.0)
    torch.testing.assert_close(found, (made + 1) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", [DiTConfig(**SMALL_DIT), UNetConfig(channels=(8, 16), layers=1, attention=0)])
@pytest.mark.parametrize("classes", [0, 2])
def test_a_pipeline_has_the_networks_shape(part, classes: int, tmp_path: Path) -> None:
    """Neither square nor of one or three channels."""
    said = to_diffusers(part.build((2, 8, 12), classes).eval(), Flow(), tmp_path / "model")
    code = f"import diffusers\npipe = {said}\npipe.set_progress_bar_config(disable=True)\n"
    code += "out = torch.from_numpy(pipe(batch_size=3, num_inference_steps=2, output_type='np').images)"
    assert elsewhere(code, tmp_path).shape == (3, 8, 12, 2)


def test_an_encoder_opens_in_timm(pictures: Path, tmp_path: Path) -> None:
    train("train_mae.py", *common(pictures, tmp_path / "run", 1))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    code = (
        f"import timm\nmodel = {summary['open_model_with']}.eval()\nx = torch.linspace(-1, 1, 144).view(1, 1, 12, 12)"
    )
    code += "\nout = model(x).detach()"
    found = elsewhere(code, tmp_path)
    config = parse(
        ["--config", str(tmp_path / "run" / "config.yaml")], adapter="", model="", recipe=ROOT, output_dir="", help=""
    )
    model = config.part("model").build((1, 12, 12), 0).eval()
    model.load_state_dict(final(tmp_path / "run", "average"))
    with torch.no_grad():
        assert torch.equal(found, model.encoder(torch.linspace(-1, 1, 144).view(1, 1, 12, 12)))

"""Runs on latents: trained, resumed, exported and evaluated."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from autoencoders import images, opened
from conftest import PRUNED, draw_images
from fidelity import by_hand
from PIL import Image
from programs import common, refused, same, train

from pretrain.adapters._sampling import generate
from pretrain.checkpoint.load_run import load_run
from pretrain.config.schema import Evaluate
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data import latents
from pretrain.data.grid import to_uint8
from pretrain.evaluation import evaluate, evaluators
from pretrain.evaluation.context import EvalContext


@pytest.mark.parametrize(
    ("which", "words", "stock"),
    [
        ("plain", "--adapter ddpm", "LDMPipeline"),
        ("plain", "--adapter edm", "LDMPipeline"),
        ("cached", "--adapter flow --class-conditional --data.flip --pruning.policy infobatch", None),
    ],
)
def test_a_latent_run_decodes_and_exports(which: str, words: str, stock, request, tmp_path: Path) -> None:
    """Previews are decoded; the pipeline's images are those of `generate`; a model does not need its data set."""
    data, run = Path(shutil.copytree(request.getfixturevalue(which), tmp_path / "latents")), tmp_path / "run"
    train("train_diffusion.py", *common(data, run, 1), *words.split())
    assert json.loads((run / "model" / "model_index.json").read_text())["_class_name"] == (
        stock or ["pipeline", "LabelPipeline"]
    )
    conditional = "--class-conditional" in words
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(run / "model", trust_remote_code=not stock)
    pipe.set_progress_bar_config(disable=True)
    more: Any = {"label": [0, 1, 1], "guidance": 2.0} if conditional else {"batch_size": 3}
    generator = torch.Generator().manual_seed(7)
    pictures = pipe(**more, num_inference_steps=4, generator=generator, output_type="np").images
    found = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    assert found.shape == (3, 1, 12, 12)
    shutil.rmtree(data)
    trained = load_run(run)
    noise = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(7))
    label = torch.tensor([0, 1, 1] if conditional else [-1, -1, -1])
    given: Any = {"steps": 4, "guidance": 2.0 if conditional else 1.0, "autoencoder": trained.autoencoder}
    made = generate(trained.model, trained.adapter, noise, label, **given)
    assert made.std() > 0
    torch.testing.assert_close(found, (made + 1) / 2, atol=1e-5, rtol=0)


def test_a_resumed_run_draws_the_same_latents(cached: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    every = ["--checkpoint.every", 1, "--checkpoint.keep", 1000]
    train("train_diffusion.py", *common(cached, one, 2), *every, "--data.flip", "--infobatch")
    shutil.copytree(one, other)
    step = sorted((other / "checkpoints").glob("step-*"))[2]
    train("train_diffusion.py", "--resume", step, "--output-dir", other)
    assert same(one, other)


def test_a_run_is_not_resumed_with_latents_of_another_autoencoder(
    plain: Path, cached: Path, pictures: Path, tmp_path: Path
) -> None:
    train("train_diffusion.py", *common(plain, tmp_path / "run", 1))
    sentence = refused("train_diffusion.py", "--resume", "--output-dir", tmp_path / "run", "--data", cached)
    assert f"--data {cached} has latents of another autoencoder now" in sentence
    sentence = refused("train_diffusion.py", "--resume", "--output-dir", tmp_path / "run", "--data", pictures)
    assert f"--data {pictures} has no latents now" in sentence
    shutil.rmtree(tmp_path / "run" / "model")
    trained = load_run(tmp_path / "run")
    assert trained.autoencoder is not None
    (tmp_path / "run" / "config.yaml").write_text(
        (tmp_path / "run" / "config.yaml").read_text().replace(str(plain), str(cached))
    )
    with pytest.raises(UserError, match="restore it there"):
        _ = load_run(tmp_path / "run").autoencoder


@pytest.fixture(scope="module")
def run(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned run of latents."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train("train_diffusion.py", *common(plain, folder, 3), *PRUNED)
    return folder


def evaluated(run: Path, *words: object) -> dict[str, Any]:
    evaluate.main([str(run), *map(str, words)])
    return json.loads((run / "evaluation.json").read_text())[-1]


def test_generated_images_are_compared_with_decoded_or_reference_images(
    run: Path, pictures: Path, plain: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The record names which."""
    monkeypatch.setattr("pretrain.evaluation.fid.cached_assets_path", lambda *names: tmp_path)
    trained = load_run(run)
    vae: Any = trained.autoencoder
    noise, label = SampleRNG(0, index=torch.arange(30)).normal(4, 6, 6), torch.full((30,), -1)
    made = generate(trained.model, trained.adapter, noise, label, steps=2, autoencoder=vae)
    for words, real, message in (
        ([], vae.decode(images(opened(plain).train)), "43 latents, decoded by their autoencoder, of latents"),
        (["--reference", pictures], images(opened(pictures).train), f"43 images of {pictures.name}"),
    ):
        both = [to_uint8(image).movedim(-1, 1) for image in (made, real)]
        record = evaluated(run, "--metrics", "fid,kid,precision-recall,loss", "--num-images", 30, *words)
        found = record["found"]
        expected = by_hand(*both, 30)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
        by = "30 images, generated by 2 steps of DDIMScheduler with guidance 1"
        assert record["notes"] == [f"{by}, compared with {message} in the features of small"]
        assert found["validation_loss"] == json.loads((run / "summary.json").read_text())["quality"]["validation_loss"]


def test_unusable_reference_images_raise(run: Path, plain: Path, pictures: Path, tmp_path: Path) -> None:
    long = draw_images(tmp_path / "long", 8)
    for path in long.rglob("*.png"):
        Image.open(path).crop((0, 0, 12, 6)).save(path)
    source = opened(plain)
    source.train.shape = source.test.shape = (4, 6, 3)
    subject = EvalContext(
        load_run(run).adapter, source._replace(shape=(4, 6, 3)), 0, False, Evaluate(reference=str(long))
    )
    with pytest.raises(UserError, match=r"--reference .*: its images are 1x6x12, the generated ones 1x12x6; give"):
        evaluators(["fid"], subject)
    for against, message in ((plain, "it holds latents; give images"), (tmp_path / "none", "there is no such file")):
        with pytest.raises(UserError, match=f"^--reference {against}: {message}"):
            evaluated(run, "--metrics", "fid", "--reference", against)


def test_data_that_have_changed_raise(run: Path, plain: Path, cached: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for other, message in ((cached, "latents of another autoencoder"), (pictures, "images of another shape")):
        (tmp_path / "run" / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(plain), str(other)))
        with pytest.raises(UserError, match=f"the run's data, {other}, are {message} now; restore"):
            evaluated(tmp_path / "run")


def test_the_card_names_the_autoencoder(run: Path, plain: Path) -> None:
    autoencoder = json.loads((plain / latents.MANIFEST).read_text())["autoencoder"]
    card = (run / "model" / "README.md").read_text()
    assert (
        "The `AutoencoderKL` that encoded the training images is in this folder and decodes the latents. SHA-256 of its"
        in card
    )
    assert f"`{autoencoder['sha256']}`" in card
    assert (run / "pictures" / "times-used.png").is_file()

"""Model cards, and uploading to the hub."""

import json
import shutil
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from huggingface_hub import HfApi, ModelCard, RepoUrl
from PIL import Image
from programs import common, final, refused, train
from safetensors.torch import load_file

from pretrain.adapters import _sampling
from pretrain.checkpoint.ema_snapshots import reconstruct
from pretrain.checkpoint.load_run import load_run
from pretrain.config.cli import parse
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data.grid import to_uint8
from pretrain.evaluation import evaluate, generate
from pretrain.evaluation.validation_loss import ValidationLoss
from pretrain.export import export, hub, model_card


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards") / "run"
    lengths = ["--ema.sigma-rel", 0.1, 0.2, "--ema.snapshots", 4, "--checkpoint.every", 2, "--checkpoint.keep", 9]
    train("train_diffusion.py", *common(pictures, folder), "--infobatch", *lengths)
    return folder


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> HfApi:
    """The hub's interface: a call that does not match its signature raises."""
    api = create_autospec(HfApi, instance=True)
    api.create_repo.return_value = RepoUrl("https://huggingface.co/me/discs")
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    return api


def test_the_card_has_the_results_of_the_run(run: Path) -> None:
    written = ModelCard.load(run / "model" / "README.md", ignore_metadata_errors=False)
    summary = json.loads((run / "summary.json").read_text())
    assert written.data.library_name == "diffusers" and written.data.license is None
    (result,) = written.data.eval_results
    assert (result.metric_type, result.metric_value) == ("validation_loss", summary["quality"]["validation_loss"])
    before = summary["quality_before"]["validation_loss"]
    for message in (
        f"| samples used | {summary['samples_used']:,} | {43 * 4:,} |",
        f"| training FLOPs | {summary['train_flops']:.3g} | {summary['full_train_flops']:.3g} |",
        f"{summary['saved_fraction']:.1%} of the samples were saved, counted against 4 epochs of 43 images",
        f"| validation_loss | {before:.4f} | {summary['quality']['validation_loss']:.4f} |",
        "DiffusionPipeline.from_pretrained('.')",
        "pruned dynamically (importance)",
        "python train_diffusion.py --config recipe.yaml",
        "`evaluate` in `recipe.yaml` says how it was measured.",
        "![What it makes](epoch-0004.png)",
        "![Its loss by level](loss-by-level.png)",
    ):
        assert message in written.text, message
    assert {"epoch-0004.png", "loss-by-level.png"} <= {path.name for path in (run / "model").iterdir()}


def test_the_card_has_no_absolute_path_and_its_recipe_is_valid(run: Path, pictures: Path) -> None:
    for name in ("README.md", "recipe.yaml"):
        assert str(pictures.parent) not in (run / "model" / name).read_text()
    recipe_settings = yaml.safe_load((run / "model" / "recipe.yaml").read_text())
    assert recipe_settings["data"]["source"] == pictures.name
    recipe = run / "model" / "recipe.yaml"
    config = parse(["--data", str(pictures)], adapter="", model="", recipe=recipe, output_dir="x", help="")
    assert model_card.recipe(config) == recipe_settings


def test_the_card_does_not_show_the_users_images(pictures: Path, tmp_path: Path) -> None:
    train("train_mae.py", *common(pictures, tmp_path / "run", 1))
    assert any((tmp_path / "run" / "pictures").iterdir())
    assert [path.name for path in (tmp_path / "run" / "model").glob("*.png")] == ["loss-by-level.png"]
    written = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    assert written.data.library_name == "timm" and "train_mae.py --config" in written.text
    assert "timm.create_model('local-dir:.', pretrained=True)" in written.text


def test_a_model_is_pushed_under_its_name(run: Path, stub) -> None:
    """Only the exported folder, with a card that shows how to load it from the hub, and a license if one is given."""
    export.main(run, push_to_hub="discs", license="mit")
    stub.create_repo.assert_called_once_with("discs", exist_ok=True)
    assert stub.upload_folder.call_args.kwargs["repo_id"] == "me/discs"
    assert stub.upload_folder.call_args.kwargs["folder_path"] == str(run / "model")
    written = ModelCard.load(run / "model" / "README.md")
    assert "from_pretrained('me/discs')" in written.text and written.data.license == "mit"


def test_the_card_of_an_encoder_opens_it_from_the_hub(pictures: Path, stub, tmp_path: Path) -> None:
    train("train_mae.py", *common(pictures, tmp_path / "run", 1), "--push-to-hub", "discs")
    assert "timm.create_model('hf-hub:me/discs', pretrained=True)" in (tmp_path / "run/model/README.md").read_text()


def test_a_failing_upload_loses_nothing(run: Path, pictures: Path, stub, tmp_path: Path, capsys) -> None:
    """The run ends normally and prints what failed and a command that pushes again."""
    stub.upload_folder.side_effect = OSError("502 Bad\n Gateway")
    train("train_diffusion.py", *common(pictures, tmp_path / "a run", 1), "--push-to-hub", "discs")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "--push-to-hub" in line)
    assert line.startswith("error: --push-to-hub discs failed (OSError: 502 Bad Gateway); the model is whole in ")
    assert line.endswith(f"pretrain export '{tmp_path / 'a run'}' --push-to-hub discs")
    assert {"summary.json", "model", "checkpoints"} <= {path.name for path in (tmp_path / "a run").iterdir()}
    assert (tmp_path / "a run" / "model" / "README.md").is_file()
    with pytest.raises(UserError, match="502 Bad Gateway"):
        export.main(run, push_to_hub="discs")


def test_an_invalid_hub_name_raises_first(pictures: Path, tmp_path: Path) -> None:
    message = refused("train_diffusion.py", *common(pictures, tmp_path / "run"), "--push-to-hub", "a/b/c")
    assert message.startswith("--push-to-hub a/b/c: ") and not (tmp_path / "run").exists()


def test_another_ema_is_exported(run: Path) -> None:
    export.main(run, sigma_rel=0.15)
    found, _ = reconstruct(run, 0.15)
    exported = load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == {name.removeprefix("network.") for name in found}
    assert all(torch.equal(exported[name.removeprefix("network.")], value) for name, value in found.items())
    with pytest.raises(UserError, match=r"--sigma-rel: the sigma_rel of a power-function EMA must be above 0"):
        export.main(run, sigma_rel=0.5)


def test_another_ema_is_evaluated_and_on_the_card(run: Path, pictures: Path, tmp_path: Path) -> None:
    """The card has only the metrics of the parameters that it describes."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    trained = load_run(folder)
    trained.model.load_state_dict(reconstruct(folder, 0.15)[0])
    expected = ValidationLoss(trained.adapter, trained.source.test)(trained.model)["validation_loss"]
    evaluate.main([str(folder), "--metrics", "loss,fid", "--num-images", "8", "--sigma-rel", "0.15"])
    evaluate.main([str(folder), "--metrics", "kid", "--num-images", "8"])
    other, plain = json.loads((folder / "evaluation.json").read_text())
    assert other["found"]["validation_loss"] == expected and (other["sigma_rel"], plain["sigma_rel"]) == (0.15, None)
    for length, record, message in (
        (0.15, other, f"| validation_loss |  | {expected:.4f} |"),
        (None, plain, "validation_loss"),
    ):
        export.main(folder, sigma_rel=length)
        card = (folder / "model" / "README.md").read_text()
        assert message in card and f"{record['notes'][0]}." in card and str(pictures.parent) not in card
        assert ("its parameters are their power-function EMA of sigma_rel 0.15" in card) == (length is not None)
        assert [name for name in ("fid", "kid") if f"| {name} |" in card] == [
            name for name in record["found"] if name[1:] == "id"
        ]
    generate.main(folder, num_images=2, steps=2, sigma_rel=0.15)
    made = _sampling.generate(
        trained.model,
        trained.adapter,
        SampleRNG(0, index=torch.arange(2)).normal(1, 12, 12),
        torch.tensor([-1, -1]),
        steps=2,
    )
    for image, file in zip(to_uint8(made), sorted((folder / "generated" / "images").iterdir()), strict=True):
        assert (image.squeeze(-1).numpy() == np.asarray(Image.open(file))).all()
    (folder / "evaluation.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"evaluation\.json: can't be read"):
        export.main(folder)


def test_a_stopped_run_is_exported(run: Path, tmp_path: Path) -> None:
    """Its cost is compared with full training up to there."""
    folder = tmp_path / "stopped"
    shutil.copytree(run, folder)
    checkpoints = sorted((folder / "checkpoints").iterdir())
    for path in checkpoints[2:]:
        shutil.rmtree(path)
    export.main(folder)
    values = load_run(folder).state.values
    seen = values["infobatch"]["samples_used"] + values["infobatch"]["seen"]
    assert (
        f"| samples used | {seen:,} | {round(43 * 4 * values['progress'])} |"
        in (folder / "model/README.md").read_text()
    )
    exported = load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[k.removeprefix("network.")], v) for k, v in final(folder, "ema").items())


def test_a_run_with_a_partial_line_of_metrics_is_exported(run: Path, tmp_path: Path) -> None:
    """A partial last line is ignored; any other broken line is one sentence."""
    shutil.copytree(run, tmp_path / "run")
    export.main(tmp_path / "run")
    card, log = tmp_path / "run" / "model" / "README.md", tmp_path / "run" / "metrics.jsonl"
    written, whole = card.read_text(), log.read_bytes()
    log.write_bytes(whole + b'{"kind": "eval')
    export.main(tmp_path / "run")
    assert card.read_text() == written
    log.write_bytes(b"no\n" + whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl: can't be read"):
        export.main(tmp_path / "run")


def test_a_model_that_cant_be_written_is_one_sentence(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "model").write_text("")
    with pytest.raises(UserError, match="model: can't be written to"):
        export.main(tmp_path / "run")


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_cards_recipe_has_the_settings_without_paths(recipe: Path) -> None:
    config = parse([], adapter="flow", model="unet", recipe=recipe, output_dir="x", help="")
    recipe_settings = model_card.recipe(config)
    plain = config.to_dict()
    assert recipe_settings == {
        key: plain[key] for key in recipe_settings
    } and plain.keys() - recipe_settings.keys() == {"output_dir", "push_to_hub"}

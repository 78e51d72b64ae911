"""The model card says what the run came to; the hub gets it, or is named as what failed."""

import dataclasses
import inspect
import json
import random
import shutil
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from huggingface_hub import HfApi, ModelCard, RepoUrl
from markdown_it import MarkdownIt
from PIL import Image
from programs import common, final, refused, train
from safetensors import SafetensorError
from safetensors.torch import load_file

from pretrain.adapters import _sampling, ddpm
from pretrain.checkpoint.ema_snapshots import reconstruct
from pretrain.checkpoint.load_run import load_run
from pretrain.config.cli import parse
from pretrain.config.schema import Blocking
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data.grid import to_uint8
from pretrain.evaluation import evaluate, generate
from pretrain.evaluation.validation_loss import ValidationLoss
from pretrain.export import export, hub, model_card, to_diffusers


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards") / "run"
    lengths = ["--ema.sigma-rel", 0.1, 0.2, "--ema.snapshots", 4, "--checkpoint.every", 2, "--checkpoint.keep", 9]
    train("train_diffusion.py", *common(pictures, folder), "--infobatch", *lengths, "--evaluate.at-start")
    return folder


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> HfApi:
    """The hub's interface: a call that the real one would not take raises."""
    api = create_autospec(HfApi, instance=True)
    api.create_repo.return_value = RepoUrl("https://huggingface.co/me/discs")
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    return api


def test_the_card_is_filled_from_the_run(run: Path) -> None:
    written = ModelCard.load(run / "model" / "README.md", ignore_metadata_errors=False)
    summary = json.loads((run / "summary.json").read_text())
    assert written.data.library_name == "diffusers" and written.data.license is None
    (result,) = written.data.eval_results
    assert (result.metric_type, result.metric_value) == ("validation_loss", summary["quality"]["validation_loss"])
    before = summary["quality_before"]["validation_loss"]
    for said in (
        f"| samples used | {summary['samples_used']:,} | {43 * 4:,} |",
        f"| training FLOPs | {summary['train_flops']:.3g} | {summary['full_train_flops']:.3g} |",
        f"Training used {summary['saved_fraction']:.1%} fewer samples than 4 epochs of the full data set.",
        f"| `validation_loss` | {before:.4f} | {summary['quality']['validation_loss']:.4f} |",
        "DiffusionPipeline.from_pretrained('.')",
        "with dynamic data pruning (InfoBatch, policy `importance`)",
        "python train_diffusion.py --config recipe.yaml",
        "`evaluate` in `recipe.yaml` contains the settings of the evaluation.",
        "![Generated images](epoch-0004.png)",
        "![Validation loss by level](loss-by-level.png)",
    ):
        assert said in written.text, said
    assert {"epoch-0004.png", "loss-by-level.png"} <= {path.name for path in (run / "model").iterdir()}


def test_the_card_names_no_path_of_this_machine_and_its_recipe_is_one(run: Path, pictures: Path) -> None:
    for name in ("README.md", "recipe.yaml"):
        assert str(pictures.parent) not in (run / "model" / name).read_text()
    told = yaml.safe_load((run / "model" / "recipe.yaml").read_text())
    assert told["data"]["source"] == pictures.name
    recipe = run / "model" / "recipe.yaml"
    config = parse(["--data", str(pictures)], adapter="", model="", recipe=recipe, output_dir="x", help="")
    assert model_card.recipe(config) == told


@pytest.mark.parametrize(
    ("method", "said"), [("topk", "Blocking, which changes the objective)"), ("unbiased", "Blocking)")]
)
def test_the_card_tells_of_blocked_samples(run: Path, tmp_path: Path, method, said: str) -> None:
    config = dataclasses.replace(load_run(run).config, infobatch=False, blocking=Blocking(0.4, method))
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"model": str(tmp_path), "samples_blocked": 0.4 * summary["samples_used"]}
    model_card.write(config, summary)
    (sentence,) = [line for line in (tmp_path / "README.md").read_text().splitlines() if "blocks only" in line]
    assert "40% of them through the first blocks only" in sentence and said in sentence


def test_what_shows_the_users_own_images_is_not_in_the_card(pictures: Path, tmp_path: Path) -> None:
    train("train_mae.py", *common(pictures, tmp_path / "run", 1))
    assert any((tmp_path / "run" / "pictures").iterdir())
    assert [path.name for path in (tmp_path / "run" / "model").glob("*.png")] == ["loss-by-level.png"]
    written = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    assert written.data.library_name == "timm" and "train_mae.py --config" in written.text
    assert "timm.create_model('local-dir:.', pretrained=True)" in written.text


def test_a_model_is_pushed_under_its_name(run: Path, stub) -> None:
    """Nothing but the exported folder, with a card that says how it is had from there, and a licence if one is told."""
    export.main(run, push_to_hub="discs", license="mit")
    stub.create_repo.assert_called_once_with("discs", exist_ok=True)
    assert stub.upload_folder.call_args.kwargs["repo_id"] == "me/discs"
    assert stub.upload_folder.call_args.kwargs["folder_path"] == str(run / "model")
    written = ModelCard.load(run / "model" / "README.md")
    assert "from_pretrained('me/discs')" in written.text and written.data.license == "mit"


def test_an_encoder_is_had_from_the_hub_by_timm(pictures: Path, stub, tmp_path: Path) -> None:
    train("train_mae.py", *common(pictures, tmp_path / "run", 1), "--push-to-hub", "discs")
    assert "timm.create_model('hf-hub:me/discs', pretrained=True)" in (tmp_path / "run/model/README.md").read_text()


def test_a_failing_upload_loses_nothing(run: Path, pictures: Path, stub, tmp_path: Path, capsys) -> None:
    """The run ends as ever, and says what failed and how to push again; what it says is a command."""
    stub.upload_folder.side_effect = OSError("502 Bad\n Gateway")
    train("train_diffusion.py", *common(pictures, tmp_path / "a run", 1), "--push-to-hub", "discs")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "--push-to-hub" in line)
    assert line.startswith("error: --push-to-hub discs failed (OSError: 502 Bad Gateway); the model is complete in ")
    assert line.endswith(f"pretrain export '{tmp_path / 'a run'}' --push-to-hub discs")
    assert {"summary.json", "model", "checkpoints"} <= {path.name for path in (tmp_path / "a run").iterdir()}
    assert (tmp_path / "a run" / "model" / "README.md").is_file()
    with pytest.raises(UserError, match="502 Bad Gateway"):
        export.main(run, push_to_hub="discs")


def test_a_name_that_the_hub_will_not_take_is_refused_before_anything_else(pictures: Path, tmp_path: Path) -> None:
    said = refused("train_diffusion.py", *common(pictures, tmp_path / "run"), "--push-to-hub", "a/b/c")
    assert said.startswith("--push-to-hub a/b/c: ") and not (tmp_path / "run").exists()


def test_another_average_is_exported(run: Path) -> None:
    export.main(run, sigma_rel=0.15)
    found, _ = reconstruct(run, 0.15)
    exported = load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == {name.removeprefix("network.") for name in found}
    assert all(torch.equal(exported[name.removeprefix("network.")], value) for name, value in found.items())
    with pytest.raises(UserError, match=r"--sigma-rel: the sigma_rel of a power-function EMA must be above 0"):
        export.main(run, sigma_rel=0.5)


def test_another_average_is_measured_looked_at_and_told(run: Path, pictures: Path, tmp_path: Path) -> None:
    """The card has what was measured of the parameters that it is about, and of no others."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    trained = load_run(folder)
    trained.model.load_state_dict(reconstruct(folder, 0.15)[0])
    expected = ValidationLoss(trained.adapter, trained.source.test)(trained.model)["validation_loss"]
    evaluate.main([str(folder), "--metrics", "loss,fid", "--num-images", "8", "--sigma-rel", "0.15"])
    evaluate.main([str(folder), "--metrics", "kid", "--num-images", "8"])
    other, plain = json.loads((folder / "evaluation.json").read_text())
    assert other["found"]["validation_loss"] == expected and (other["sigma_rel"], plain["sigma_rel"]) == (0.15, None)
    for length, record, said in (
        (0.15, other, f"| `validation_loss` | {expected:.4f} |"),
        (None, plain, "`validation_loss`"),
    ):
        export.main(folder, sigma_rel=length)
        card = (folder / "model" / "README.md").read_text()
        assert said in card and f"{record['notes'][0]}." in card and str(pictures.parent) not in card
        assert ("The parameters are a power-function EMA over the training (sigma_rel 0.15)." in card) == (
            length is not None
        )
        assert [name for name in ("fid", "kid") if f"| `{name}` |" in card] == [
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


def test_a_run_that_was_stopped_is_exported_as_far_as_it_came(run: Path, tmp_path: Path) -> None:
    """Its cost is compared with that of all samples until there."""
    folder = tmp_path / "stopped"
    shutil.copytree(run, folder)
    checkpoints = sorted((folder / "checkpoints").iterdir())
    for path in checkpoints[-2:]:
        shutil.rmtree(path)
    export.main(folder)
    values = load_run(folder).state.values
    seen = values["infobatch"]["used_before"] + values["infobatch"]["seen"]
    assert (
        f"| samples used | {seen:,} | {round(43 * 4 * values['progress'])} |"
        in (folder / "model/README.md").read_text()
    )
    exported = load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[k.removeprefix("network.")], v) for k, v in final(folder, "ema").items())


def test_a_run_that_was_killed_while_it_wrote_metrics_is_exported(run: Path, tmp_path: Path, capsys) -> None:
    """What it had begun to write is not read; a line that can't be read is left out and reported."""
    shutil.copytree(run, tmp_path / "run")
    export.main(tmp_path / "run")
    card, metrics = tmp_path / "run" / "model" / "README.md", tmp_path / "run" / "metrics.jsonl"
    written, whole = card.read_text(), metrics.read_bytes()
    metrics.write_bytes(whole + b'{"kind": "eval')
    export.main(tmp_path / "run")
    assert card.read_text() == written
    assert "can't be read" not in capsys.readouterr().out
    metrics.write_bytes(b"no\n" + whole)
    export.main(tmp_path / "run")
    assert card.read_text() == written
    assert "metrics.jsonl: line 1 can't be read and is left out" in capsys.readouterr().out


def test_a_model_that_cant_be_written_is_one_sentence(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "model").write_text("")
    with pytest.raises(UserError, match="model: can't be written to"):
        export.main(tmp_path / "run")


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_without_paths_are_told_as_they_are(recipe: Path) -> None:
    config = parse([], adapter="flow", model="unet", recipe=recipe, output_dir="x", help="")
    told = model_card.recipe(config)
    plain = config.to_dict()
    assert told == {key: plain[key] for key in told}
    assert plain.keys() - told.keys() == {"output_dir", "push_to_hub", "tracker"}


PIECES = ("<script>alert(1)</script>", "`", "|", "\n---\nlicense: mit\n---\n", "](http://x)", "[x](y)", "**b**", "&lt;")
PIECES += (
    "<img src=x>",
    "\n# Title\n",
    "\n\n",
    "![i](//x)",
    "a_b",
    ": ",
    "- ",
    "$x$",
    "~~s~~",
    "'",
    '"',
    "\\",
    "é",
    "{}",
)


def test_names_are_text_whatever_they_contain(run: Path, tmp_path: Path) -> None:
    """Names of folders, files, metrics and policies are no HTML, Markdown or metadata of the card."""
    trained, rng = load_run(run), random.Random(0)
    summary = json.loads((run / "summary.json").read_text()) | {"model": str(tmp_path)}
    for _ in range(40):

        def name() -> str:
            return "x" + "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 5))) + "x"

        metric, note, title, data = name(), name(), name().replace("/", "."), name()
        adapter = tmp_path / f"{name().replace('/', '.')}.py"
        adapter.write_text(inspect.getsource(ddpm))
        config = dataclasses.replace(
            trained.config,
            output_dir=tmp_path / "runs" / title,
            data=dataclasses.replace(trained.config.data, source=data),
            adapter=dataclasses.replace(trained.config.adapter, name=str(adapter)),
        )
        found = {"quality": {metric: 0.5}, "quality_before": {}, "notes": [note]}
        model_card.write(config, summary | found)
        card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
        assert card.data.license is None and card.data.tags == ["infobatch", adapter.name]
        (result,) = card.data.eval_results
        assert (result.metric_type, result.dataset_name, card.data.model_name) == (metric, data, title)
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.text)
        tokens += [child for token in tokens for child in token.children or ()]
        kinds = [token.type for token in tokens]
        assert not {"html_block", "html_inline", "link_open", "image", "strong_open", "em_open", "s_open"} & {*kinds}
        assert kinds.count("heading_open") == 5 and kinds.count("tr_open") == 4 + 2 and "hr" not in kinds
        text = " ".join("".join(token.content for token in tokens if token.type == "text").split())
        assert "".join(title.split()) in "".join(text.split()) and "".join(note.split()) in "".join(text.split())
        adapter.unlink()


def test_a_path_is_in_the_recipe_by_its_last_name(run: Path, pictures: Path, tmp_path: Path) -> None:
    trained = load_run(run)
    for features, told in ((str(tmp_path / "net.pt"), "net.pt"), (f"inception={tmp_path}/w.pth", "inception=w.pth")):
        evaluate = dataclasses.replace(trained.config.evaluate, features=features, reference=str(pictures))
        recipe = model_card.recipe(dataclasses.replace(trained.config, evaluate=evaluate))["evaluate"]
        assert (recipe["features"], recipe["reference"]) == (told, pictures.name)


@pytest.mark.parametrize("place", ["model/notes.txt", "model/unet/more", "model/folder", "model"])
def test_a_link_is_not_uploaded(place: str, run: Path, stub, tmp_path: Path) -> None:
    """Not what it leads to, wherever in the model's folder it is."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("private")
    link = tmp_path / "run" / place
    if place == "model":
        link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / ("elsewhere" if place == "model" else "secret" if "folder" in place else "secret/key"))
    with pytest.raises(UserError, match=f"{link} is a link"):
        export.main(tmp_path / "run", push_to_hub="discs")
    assert not stub.create_repo.called and not stub.upload_folder.called


def test_a_picture_that_is_a_link_is_not_in_the_card(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "key").write_text("private")
    for name in ("epoch-9999.png", "loss-by-level.png"):
        (tmp_path / "run" / "pictures" / name).unlink(missing_ok=True)
        (tmp_path / "run" / "model" / name).unlink(missing_ok=True)
        (tmp_path / "run" / "pictures" / name).symlink_to(tmp_path / "key")
    export.main(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "model").glob("*.png")] == ["epoch-0004.png"]
    assert all(b"private" not in path.read_bytes() for path in (tmp_path / "run" / "model").rglob("*.*"))


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (to_diffusers, "to_diffusers", SafetensorError("I/O error: No space left on device (os error 28)")),
        (to_diffusers, "to_diffusers", OSError(30, "Read-only file system")),
        (model_card, "write", OSError(28, "No space left on device")),
    ],
    ids=["full", "read-only", "full for the card"],
)
def test_an_export_that_finds_no_place_is_one_sentence(module, name: str, error, run: Path, monkeypatch) -> None:
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(UserError, match=r"model: can't be written to: .*(No space left|Read-only)") as refusal:
        export.main(run)
    assert "\n" not in str(refusal.value)

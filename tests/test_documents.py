"""Examples in the documents run as they are printed."""

import inspect
import re
import shutil
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from conftest import ROOT, read_metrics, tiny
from pretrain.models.unet import UNetConfig
from programs import train

from pretrain import Indexed, InfoBatch, evaluation
from pretrain.adapters import Batch
from pretrain.adapters.flow import Flow
from pretrain.checkpoint import ema_snapshots, verify_resume
from pretrain.checkpoint.load_run import load_run
from pretrain.config.registry import KINDS, load, names
from pretrain.config.schema import Config, Data, Evaluate
from pretrain.config.tyro_parser import settings_of
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG, generator
from pretrain.data import encode_latents
from pretrain.data.images import on_device
from pretrain.data.sources import open_data
from pretrain.evaluation import coreset, evaluate, generate, visualize
from pretrain.evaluation.context import EvalContext
from pretrain.export import export
from pretrain.export.denoiser_weights import start_from
from pretrain.export.to_diffusers import to_diffusers
from pretrain.infobatch.policies import POLICIES


def blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)


@pytest.mark.parametrize("document", ["docs/objectives.md", "README.md"])
def test_the_documented_adapter_trains(document: str, tmp_path: Path, pictures: Path, monkeypatch, capsys) -> None:
    (code,) = (block for block in blocks(document) if "class" in block)
    if document == "README.md":  # printed without its imports
        head = "from dataclasses import dataclass\nfrom einops import reduce\nfrom pretrain.adapters import Losses\n"
        code = head + code
    (tmp_path / "mine.py").write_text(code)
    more = ["--adapter.delta", "0.3"] if document == "docs/objectives.md" else []
    words = ["--data", pictures, "--adapter", "mine.py", *more, "--infobatch", "--epochs", 3, "--batch-size", 8]
    monkeypatch.chdir(tmp_path)
    train("train_diffusion.py", *words, "--output-dir", "run")
    assert "Flow on 43 images" in capsys.readouterr().out
    pictured = any((tmp_path / "run" / "pictures").glob("epoch-*.png"))
    assert pictured == ("scheduler" in code)
    assert any((tmp_path / "run" / "model").iterdir())


def test_the_documented_policy_prunes(tmp_path: Path, pictures: Path, monkeypatch) -> None:
    (code,) = blocks("docs/policies.md")
    (tmp_path / "middle.py").write_text(code)
    words = ["--data", pictures, "--infobatch", "--pruning.policy", "middle.py", "--epochs", 4, "--batch-size", 8]
    monkeypatch.chdir(tmp_path)
    train("train_diffusion.py", *words, "--output-dir", "run")
    epochs = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "epoch"]
    assert [round(43 * (1 - record["skipped"])) for record in epochs] == [43, 32, 32, 43]  # half of 10, 22, half of 11


def test_every_policy_is_documented() -> None:
    text = (ROOT / "docs" / "policies.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == list(POLICIES)


def sums(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """40 samples of three numbers; the class is the sign of their sum."""
    x = torch.randn(40, 3, generator=generator(seed))
    return list(zip(x, (x.sum(1) > 0).long(), strict=True))


def parts(data: list[tuple[torch.Tensor, torch.Tensor]], **more: Any) -> dict[str, Any]:
    """What the loops that are shown take as given."""
    model = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    loader, functional = torch.utils.data.DataLoader, torch.nn.functional
    given = {"data": data, "model": model, "optimizer": optimizer, "torch": torch, "DataLoader": loader}
    return {**given, "F": functional, **more}


# 40 samples: whether there is a warning depends on the parameters.
@pytest.mark.filterwarnings("ignore:per-sample scores carry no signal")
def test_the_documented_loop_trains() -> None:
    (code,) = (block for block in blocks("README.md") if "InfoBatch(" in block)
    scope = parts(sums(0))
    exec(code, scope)
    infobatch: InfoBatch = scope["infobatch"]
    assert infobatch.progress == 1 and infobatch.samples_used < 100 * 40
    x, label = (torch.stack(column) for column in zip(*scope["data"], strict=True))
    assert torch.nn.functional.cross_entropy(scope["model"](x), label) < 0.3


def test_the_lora_that_is_shown_trains_and_a_run_starts_from_it(tmp_path: Path) -> None:
    """The base network stays as it is, the loss falls, and the merged network is that of the loop."""
    (code,) = (block for block in blocks("docs/training.md") if "LoraConfig" in block)
    torch.manual_seed(0)
    config = UNetConfig((8, 16), 1, 1, 4)
    to_diffusers(config.build((1, 8, 8), 0), Flow(), tmp_path / "runs" / "diffusion" / "model")
    images = torch.randn(1, 1, 8, 8).expand(32, -1, -1, -1)
    infobatch = InfoBatch(len(images), epochs=8, policy="full")
    loader = torch.utils.data.DataLoader(Indexed([(image,) for image in images]), 8, sampler=infobatch)
    scope: dict[str, Any] = {"torch": torch, "infobatch": infobatch, "loader": loader}
    exec(code.replace('"runs/', f'"{tmp_path}/runs/'), scope)
    model, before = config.build((1, 8, 8), 0).eval(), config.build((1, 8, 8), 0).eval()
    start_from(model, Flow(), tmp_path / "runs" / "lora")
    start_from(before, Flow(), tmp_path / "runs" / "diffusion" / "model")
    batch = Batch(images, -torch.ones(32).long(), torch.arange(32), torch.arange(32) / 32)
    with torch.no_grad():
        trained, base = (Flow()(net, batch, SampleRNG(0, index=batch.index)).loss.mean() for net in (model, before))
        merged = scope["unet"](images[:2], torch.tensor([3.0, 700.0])).sample
        torch.testing.assert_close(model(images[:2], torch.tensor([3.0, 700.0]), batch.label[:2]), merged)
    assert trained < 0.95 * base
    layers = [
        name for name in model.state_dict() if any(part in name for part in ("to_q", "to_k", "to_v", "conv1", "conv2"))
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]) or (name in layers and name.endswith("weight"))


class Interrupted(Exception):
    """Stops the loop that is shown."""


def count_steps(optimizer: torch.optim.Optimizer, most: int = 10**9) -> list[int]:
    """A list that grows by one in each step; the loop is interrupted instead of the step after `most`."""
    made: list[int] = []

    def before_step(*_: object) -> None:
        if len(made) == most:
            raise Interrupted
        made.append(1)

    optimizer.register_step_pre_hook(before_step)
    return made


def test_the_loop_with_checkpoints_that_is_shown_resumes_exactly(tmp_path: Path) -> None:
    """Interrupted after any number of steps and started again, it is the run that was not interrupted."""
    (code,) = (block for block in blocks("docs/training.md") if "InfoBatch(" in block)
    code = compile(code.replace("step % 100 == 99", "step % 2 == 1"), "docs/training.md", "exec")
    whole = parts(sums(0), checkpoint=tmp_path / "whole.pt")
    all_steps = count_steps(whole["optimizer"])
    exec(code, whole)
    assert whole["infobatch"].progress == 1 and whole["infobatch"].samples_used < 20 * 40
    for seed in range(4):
        file, most = tmp_path / f"{seed}.pt", int(torch.randint(4, 40, (), generator=generator(seed)))
        first = parts(sums(0), checkpoint=file)
        count_steps(first["optimizer"], most)
        with pytest.raises(Interrupted):
            exec(code, first)
        again = parts(sums(0), checkpoint=file)
        steps = count_steps(again["optimizer"])
        exec(code, again)
        assert 0 <= most - (len(all_steps) - len(steps)) < 3  # the steps since the checkpoint are made again
        assert torch.equal(whole["model"].weight, again["model"].weight)
        assert torch.equal(whole["infobatch"].score, again["infobatch"].score)


def test_the_metric_that_is_shown_measures(pictures: Path, tmp_path: Path) -> None:
    """Given by its path, it is the mean of the losses, one by one."""
    (shown,) = blocks("docs/evaluation.md")
    (tmp_path / "loss_at.py").write_text(shown)
    source, adapter = open_data(Data(str(pictures)), 0), Flow()
    model = load("model", "unet")(channels=(8, 16), attention=0).build(source.shape, 0).eval()
    context = EvalContext(adapter, source, 0, False, Evaluate())
    _, evaluator = evaluation.evaluators(["loss", str(tmp_path / "loss_at.py")], context)
    batch = on_device(next(source.test.batches(range(len(source.test)), 64)), torch.device("cpu"))
    batch = batch._replace(level=torch.full((len(source.test),), 0.9))
    with torch.no_grad():
        losses = adapter(model, batch, SampleRNG(0, index=batch.index)).loss
    assert evaluator(model) == {"loss_at": pytest.approx(losses.mean().item(), rel=1e-5)}


def test_the_table_that_is_shown_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(next(block for block in blocks("docs/data.md") if "to_parquet" in block), {})
    source = open_data(Data("mine.parquet"), 0)
    assert (len(source.train), len(source.test), source.shape, source.classes) == (54, 6, (1, 12, 12), 2)
    for images in source[:2]:
        (batch,) = images.batches(range(len(images)), 64)
        number = torch.tensor([int(images.name_of(index).removesuffix(".png")) for index in range(len(images))])
        assert (batch.image[:, 0, 5, 5] == 4 * number).all()
        assert (batch.label == (number <= 30).long()).all()  # bright is 0, dark 1


def test_the_source_that_is_shown_trains_and_resumes(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pngs").mkdir()
    for path in pictures.rglob("*.png"):
        shutil.copy(path, Path("pngs") / path.name)
    code = next(block for block in blocks("docs/data.md") if "def my_source" in block)
    words = tiny("train_diffusion.py", "--epochs", 2, "--batch-size", 14, "--infobatch")
    for arguments in (words, ["--resume", "--output-dir", "runs/mine"]):
        monkeypatch.setattr(sys, "argv", ["mine.py", *arguments])
        exec(code, {"__name__": "__main__"})
        assert "{'mean_square': " in capsys.readouterr().out
    assert [record["kind"] for record in read_metrics(Path("runs/mine"))].count("epoch") == 2
    with pytest.raises(UserError, match="opened by a program of its own"):  # not measured on other images
        load_run(Path("runs/mine")).source  # noqa: B018


DOCUMENTS = (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md"))
CURRENT = [path for path in DOCUMENTS if path.name not in ("log.md", "CHANGELOG.md")]  # these are of their time


def anchors(document: Path) -> set[str]:
    """The names by which a document's headings are linked."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_file_and_heading_that_is_linked_is_there() -> None:
    for document in DOCUMENTS:
        for link, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", document.read_text()):
            if not link.startswith("http"):
                target = document.parent / link if link else document
                assert target.exists(), (document, link)
                assert not heading or heading in anchors(target), (document, link, heading)


def test_every_document_and_file_that_is_named_is_there() -> None:
    """Documents in code, settings' help and recipes; files in documents."""
    code = [path for folder in ROOT.iterdir() for kind in ("*.py", "*.yaml") for path in [*folder.rglob(kind)]]
    gone = {
        (path.name, name)
        for path in (*code, *ROOT.glob("*.py"), *DOCUMENTS)
        for name in re.findall(r"(?<![\w./])docs/[\w/-]+\.md", path.read_text())
        if not (ROOT / name).is_file()
    }
    folders = "pretrain|tests|benchmarks|configs|examples|models"
    gone |= {
        (path.name, name)
        for path in CURRENT
        for name in re.findall(rf"(?<![\w/])(?:{folders})/[\w/]+\.(?:py|yaml|md|txt)\b", path.read_text())
        if not (ROOT / name).is_file() and not re.search("NAME|/x.yaml", name)
    }
    assert not gone


# Of pip, pytest, torchrun, accelerate, sbatch, fidelity, hf; of the benchmarks, the soak, and examples in documents.
OTHER_FLAGS = {
    *("dist", "nproc-per-node", "multi-gpu", "num-processes", "machine-rank", "cpu", "nodes", "local-dir"),
    *("input1", "input2", "fid", "kid", "prc", "arms", "budgets", "steps", "photos", "minutes", "out", "earlier"),
    *("max-restarts", "kills", "processes", "version", "config", "help", "adapter.delta", "pruning", "shares"),
    *("rates", "compensations", "images", "diffusers", "mae", "transformers", "networks", "repetitions", "threads"),
    *("workers", "warmup", "size", "sizes", "use-ema"),
    *("masks", "encoder", "stages", "ade20k", "crop", "flip", "pretrained", "save", "lora.rank", "max-length"),
    *("packed", "subset", "held-out", "runs", "strict", "tags"),
    *("program", "seed-flag", "output", "shift", "adapter.mixup"),
    *(f"training.{name}" for name in ("policy", "epochs", "lr", "seed", "optimizer", "schedule", "settings")),
    *("pruning.rule", "pruning.prompts", "warm-models", "lr", "pruned-rates"),
}


def settings() -> set[str]:
    """Those of the programs, with any adapter and model, and of the commands."""
    known = {"adapter", "model", "adapter.name", "model.name", "data", "on-bad-image"}
    for name, kind in get_type_hints(Config).items():
        known |= (
            {inner for inner, _ in settings_of(kind, f"{name}.")}
            if isinstance(kind, type) and is_dataclass(kind)
            else {name}
        )
    for kind in KINDS:
        known |= {setting for name in names(kind) for setting, _ in settings_of(load(kind, name), f"{kind}.")}
    known |= {item.name for item in fields(evaluate.Command)}
    for command in (generate, export, visualize, coreset, encode_latents, ema_snapshots):
        known |= {*inspect.signature(command.main).parameters}
    known |= {*re.findall(r'"--([\w-]+)"', Path(verify_resume.__file__).read_text())}
    return {name.replace("_", "-") for name in known}


def test_every_setting_that_is_named_is_there() -> None:
    known, gone = settings() | OTHER_FLAGS, set()
    for path in CURRENT:
        for name in re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*\w)", path.read_text()):
            if name.replace("_", "-").replace(".no-", ".").removeprefix("no-") not in known:
                gone.add((path.name, name))
    assert not gone


def test_every_test_that_is_named_is_there() -> None:
    named = {name for path in (ROOT / "docs").rglob("*.md") for name in re.findall(r"`(test_\w+)`", path.read_text())}
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert named and not {name for name in named if f"def {name}(" not in tests}

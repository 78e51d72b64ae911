"""What the documents show runs as it is shown."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, journal

from pretrain import InfoBatch
from pretrain.core.rng import generator
from pretrain.infobatch.policies import POLICIES


def blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)


@pytest.mark.parametrize("document", ["docs/objectives.md", "README.md"])
def test_the_adapter_that_is_shown_trains(document: str, tmp_path: Path, pictures: Path, program) -> None:
    (code,) = (block for block in blocks(document) if "class" in block)
    if document == "README.md":  # shown without its imports
        head = "from dataclasses import dataclass\nfrom einops import reduce\nfrom pretrain.adapters import Losses\n"
        code = head + code
    (tmp_path / "mine.py").write_text(code)
    more = ["--adapter.delta", "0.3"] if document == "docs/objectives.md" else []
    words = ["--data", pictures, "--adapter", "mine.py", *more, "--infobatch", "--epochs", 3, "--batch-size", 8]
    done = program("train_diffusion.py", *words, "--output-dir", "run", cwd=tmp_path)
    assert "Flow on 43 images" in done.stdout
    pictured = any((tmp_path / "run" / "pictures").glob("epoch-*.png"))
    assert pictured == ("scheduler" in code)
    assert any((tmp_path / "run" / "model").iterdir())


def test_the_policy_that_is_shown_prunes(tmp_path: Path, pictures: Path, program) -> None:
    (code,) = blocks("docs/policies.md")
    (tmp_path / "middle.py").write_text(code)
    words = ["--data", pictures, "--infobatch", "--pruning.policy", "middle.py", "--epochs", 4, "--batch-size", 8]
    program("train_diffusion.py", *words, "--output-dir", "run", cwd=tmp_path)
    epochs = [record for record in journal(tmp_path / "run") if record["kind"] == "epoch"]
    assert [round(43 * (1 - record["skipped"])) for record in epochs] == [43, 32, 32, 43]  # half of 10, 22, half of 11


def test_every_policy_is_documented() -> None:
    text = (ROOT / "docs" / "policies.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == list(POLICIES)


@pytest.mark.filterwarnings("ignore:per-sample scores carry no signal")  # 40 samples: it may say so, by the parameters
def test_the_loop_that_is_shown_trains() -> None:
    (code,) = (block for block in blocks("README.md") if "InfoBatch(" in block)
    x = torch.randn(40, 3, generator=generator(0))
    data = list(zip(x, (x.sum(1) > 0).long(), strict=True))
    model = torch.nn.Linear(3, 2)
    scope = {
        "data": data,
        "model": model,
        "DataLoader": torch.utils.data.DataLoader,
        "F": torch.nn.functional,
        "optimizer": torch.optim.SGD(model.parameters(), 0.5),
    }
    exec(code, scope)
    infobatch: InfoBatch = scope["infobatch"]
    assert infobatch.progress == 1 and infobatch.samples_used < 100 * 40
    assert torch.nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long()) < 0.3


def test_every_file_that_is_linked_is_there() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert link.startswith("http") or (document.parent / link).exists(), (document, link)


def test_every_test_that_is_named_is_there() -> None:
    named = {name for path in (ROOT / "docs").rglob("*.md") for name in re.findall(r"`(test_\w+)`", path.read_text())}
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert named and not {name for name in named if f"def {name}(" not in tests}

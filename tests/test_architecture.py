"""Who may know whom (docs/design.md), read from the imports; and how large a file may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OURS = ("pretrain", "models")
# What a file may import of ours, and whether it may import accelerate. Longest path wins.
ALLOWED: dict[str, set[str]] = {
    "models": set(),
    "models/mae.py": {"models._attention"},
    "pretrain/errors.py": set(),
    "pretrain/rng.py": set(),
    "pretrain/schedule.py": set(),
    "pretrain/average.py": set(),
    "pretrain/posthoc.py": {
        f"pretrain.{name}" for name in ("average", "checkpoint", "command_line", "display", "errors", "files")
    },
    "pretrain/journal.py": set(),
    "pretrain/trackers.py": set(),
    "pretrain/display.py": set(),
    "pretrain/pipeline.py": set(),
    "pretrain/policies.py": set(),
    "pretrain/levels.py": set(),
    "pretrain/ledger.py": set(),
    "pretrain/budget.py": set(),
    "pretrain/indexed.py": set(),
    "pretrain/ranks.py": set(),
    "pretrain/plan.py": {"pretrain.policies", "pretrain.rng"},
    "pretrain/memory.py": {"pretrain.ledger", "pretrain.levels", "pretrain.plan"},
    "pretrain/infobatch.py": {
        f"pretrain.{name}" for name in ("ranks", "budget", "indexed", "ledger", "memory", "plan", "policies")
    },
    "pretrain/parts.py": {"pretrain.errors"},
    "pretrain/trust.py": {"pretrain.errors"},
    "pretrain/config.py": {"pretrain.parts"},
    "pretrain/command_line.py": {f"pretrain.{name}" for name in ("config", "errors", "parts", "trust")},
    "pretrain/decode.py": set(),
    "pretrain/kept.py": set(),
    "pretrain/augment.py": {"pretrain.rng"},
    "pretrain/preload.py": {"pretrain.data", "pretrain.kept", "pretrain.patient"},
    "pretrain/adapter.py": {"pretrain.rng"},
    "pretrain/objective.py": {"pretrain.rng"},
    "pretrain/adapters": {"pretrain.adapter", "pretrain.objective", "pretrain.rng"},
    "pretrain/files.py": set(),
    "pretrain/manifest.py": {"pretrain.files"},
    "pretrain/room.py": {"pretrain.adapter", "pretrain.errors"},
    "pretrain/checkpoint.py": {"pretrain.errors", "pretrain.files", "pretrain.manifest"},
    "pretrain/guard.py": {f"pretrain.{name}" for name in ("adapter", "data", "errors", "infobatch", "ledger")},
    "pretrain/replay.py": {
        f"pretrain.{name}" for name in ("checkpoint", "data", "display", "errors", "rng", "trained")
    },
    "pretrain/patient.py": {"pretrain.errors"},
    "pretrain/watch.py": set(),
    "pretrain/fingerprint.py": {f"pretrain.{name}" for name in ("checkpoint", "data", "errors", "sources")},
    "pretrain/verify_resume.py": {
        f"pretrain.{name}" for name in ("checkpoint", "display", "errors", "manifest", "parts")
    },
    "pretrain/writer.py": {"pretrain.checkpoint", "pretrain.config", "pretrain.errors"},
    "pretrain/run.py": {"pretrain.checkpoint", "pretrain.config", "pretrain.errors", "pretrain.files"},
    "pretrain/data.py": {
        f"pretrain.{name}" for name in ("adapter", "augment", "config", "decode", "errors", "kept", "rng")
    },
    "pretrain/autoencoder.py": {"pretrain.errors"},
    "pretrain/cache.py": {"pretrain.adapter", "pretrain.config", "pretrain.data", "pretrain.errors", "pretrain.rng"},
    "pretrain/latents.py": {
        f"pretrain.{name}"
        for name in (
            "autoencoder",
            "cache",
            "command_line",
            "config",
            "data",
            "display",
            "errors",
            "patient",
            "preload",
            "processes",
            "sources",
        )
    },
    "pretrain/sources.py": {
        f"pretrain.{name}" for name in ("autoencoder", "cache", "config", "data", "decode", "errors", "rng")
    },
    "pretrain/processes.py": {"pretrain.config", "pretrain.errors", "pretrain.ranks", "pretrain.watch"},
    "pretrain/training.py": {
        f"pretrain.{name}"
        for name in (
            "adapter",
            "average",
            "checkpoint",
            "config",
            "cost",
            "errors",
            "infobatch",
            "ledger",
            "parts",
            "rng",
            "sources",
        )
    },
    "pretrain/trained.py": {
        f"pretrain.{name}"
        for name in (
            "adapter",
            "checkpoint",
            "autoencoder",
            "command_line",
            "config",
            "errors",
            "posthoc",
            "sources",
            "training",
        )
    },
    "pretrain/summary.py": {"pretrain.config", "pretrain.display"},
    "pretrain/charts.py": {"pretrain.data", "pretrain.pictures", "pretrain.sources"},
    "pretrain/card.py": {"pretrain.autoencoder", "pretrain.config", "pretrain.display"},
    "pretrain/hub.py": {"pretrain.card", "pretrain.config", "pretrain.errors"},
    "pretrain/cost.py": {"pretrain.adapter", "pretrain.rng"},
    "pretrain/heun.py": set(),
    "pretrain/sampling.py": {"pretrain.heun", "pretrain.adapter", "pretrain.autoencoder", "pretrain.errors"},
    "pretrain/pictures.py": {
        f"pretrain.{name}" for name in ("adapter", "autoencoder", "data", "errors", "sampling", "ranks", "rng")
    },
    "pretrain/generate.py": {
        f"pretrain.{name}"
        for name in (
            "adapter",
            "command_line",
            "display",
            "errors",
            "pictures",
            "processes",
            "rng",
            "sampling",
            "trained",
        )
    },
    "pretrain/evaluate/__init__.py": {"pretrain.errors", "pretrain.evaluate.subject"},  # the latter for its type
    "pretrain/evaluate/__main__.py": {
        f"pretrain.{name}" for name in ("command_line", "errors", "evaluate", "files", "processes", "trained")
    }
    | {"pretrain.evaluate.subject"},
    "pretrain/evaluate": {
        f"pretrain.{name}"
        for name in (
            "adapter",
            "average",
            "config",
            "data",
            "errors",
            "pictures",
            "ranks",
            "rng",
            "sampling",
            "sources",
        )
    }
    | {
        f"pretrain.evaluate.{name}"
        for name in ("augmentation", "classifiers", "features", "generated", "knn", "subject")
    },
    "pretrain/look.py": {
        *(f"pretrain.{name}" for name in ("adapter", "data", "display", "errors", "pictures", "trained")),
        "pretrain.evaluate.subject",
    },
    "pretrain/foreign.py": {"pretrain.errors"},
    "pretrain/takeaway.py": {"pretrain.checkpoint", "pretrain.foreign"},
    "pretrain/export.py": {
        *(f"pretrain.{name}" for name in ("adapter", "card", "config", "cost", "display", "errors", "hub", "journal")),
        *(f"pretrain.{name}" for name in ("command_line", "objective", "pipeline", "summary", "takeaway", "trained")),
        *(f"pretrain.{name}" for name in ("autoencoder", "sampling")),
    },
}
FILES = sorted(path for name in OURS for path in (ROOT / name).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules that a file imports; `from pretrain import x` counts as pretrain.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module in OURS else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_knows_only_whom_it_may(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    known = imports(path)
    ours = {module for module in known if module.split(".")[0] in OURS}
    rule = max((rule for rule in ALLOWED if name.startswith(rule)), key=len, default=None)
    if rule is not None:
        assert ours <= ALLOWED[rule], f"{name} must not import {sorted(ours - ALLOWED[rule])}"
    else:
        assert name in ("pretrain/loop.py", "pretrain/__init__.py")
    if name != "pretrain/processes.py":
        assert not any(module.split(".")[0] == "accelerate" for module in known), (
            "accelerate is known to processes.py alone; the loop is handed its object"
        )


def test_infobatch_stands_on_torch_and_numpy_alone() -> None:
    """Itself and whatever it imports; also when it is run."""
    todo, done = ["infobatch"], set()
    while todo:
        name = todo.pop()
        done.add(name)
        known = imports(ROOT / "pretrain" / f"{name}.py")
        foreign = {module.split(".")[0] for module in known} - sys.stdlib_module_names
        assert foreign <= {"torch", "numpy", "pretrain"}, name
        ours = {module.removeprefix("pretrain.").split(".")[0] for module in known if module.startswith("pretrain.")}
        todo += sorted(ours - done)
    assert {"plan", "memory", "policies", "rng"} <= done
    check = "import sys, pretrain; pretrain.InfoBatch; print({'accelerate', 'diffusers', 'timm'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("pattern", "most"),
    [("pretrain/adapters/*.py", 80), ("train_*.py", 50), ("pretrain/**/*.py", 340), ("models/*.py", 250)],
)
def test_files_stay_small(pattern: str, most: int) -> None:
    for path in ROOT.glob(pattern):
        assert len(path.read_text().splitlines()) <= most, path


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads", "yaml.load"), path
                careful = ("weights_only", "True") in ((word.arg, ast.unparse(word.value)) for word in node.keywords)
                assert called != "torch.load" or careful, path
                assert not any(keyword.arg == "trust_remote_code" for keyword in node.keywords), path

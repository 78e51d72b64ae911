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
    "pretrain/core/errors.py": set(),
    "pretrain/core/rng.py": set(),
    "pretrain/training/optim.py": set(),
    "pretrain/checkpoint/ema.py": set(),
    "pretrain/checkpoint/ema_snapshots.py": {
        f"pretrain.{name}" for name in ("average", "checkpoint", "command_line", "display", "errors", "files")
    },
    "pretrain/training/metrics_log.py": set(),
    "pretrain/training/trackers.py": set(),
    "pretrain/core/console.py": set(),
    "pretrain/export/pipeline.py": set(),
    "pretrain/infobatch/policies.py": set(),
    "pretrain/infobatch/level_stats.py": set(),
    "pretrain/infobatch/epoch_losses.py": set(),
    "pretrain/infobatch/budget.py": set(),
    "pretrain/infobatch/indexed.py": set(),
    "pretrain/distributed/collectives.py": set(),
    "pretrain/infobatch/plan.py": {"pretrain.infobatch.policies", "pretrain.core.rng"},
    "pretrain/infobatch/scores.py": {
        "pretrain.infobatch.epoch_losses",
        "pretrain.infobatch.level_stats",
        "pretrain.infobatch.plan",
    },
    "pretrain/infobatch/sampler.py": {
        f"pretrain.{name}" for name in ("ranks", "budget", "indexed", "ledger", "memory", "plan", "policies")
    },
    "pretrain/config/registry.py": {"pretrain.core.errors"},
    "pretrain/config/trusted_code.py": {"pretrain.core.errors"},
    "pretrain/config/schema.py": {"pretrain.config.registry"},
    "pretrain/config/cli.py": {f"pretrain.{name}" for name in ("config", "errors", "parts", "trust")},
    "pretrain/data/decode.py": set(),
    "pretrain/data/image_cache.py": set(),
    "pretrain/data/transforms.py": {"pretrain.core.rng"},
    "pretrain/data/preload.py": {"pretrain.data.images", "pretrain.data.image_cache", "pretrain.data.loader"},
    "pretrain/adapters/__init__.py": {"pretrain.core.rng"},
    "pretrain/adapters/_uncertainty.py": {"pretrain.core.rng"},
    "pretrain/adapters": {"pretrain.adapters", "pretrain.adapters._uncertainty", "pretrain.core.rng"},
    "pretrain/core/files.py": set(),
    "pretrain/checkpoint/manifest.py": {"pretrain.core.files"},
    "pretrain/training/micro_batches.py": {"pretrain.adapters", "pretrain.core.errors"},
    "pretrain/checkpoint/storage.py": {"pretrain.core.errors", "pretrain.core.files", "pretrain.checkpoint.manifest"},
    "pretrain/training/nan_guard.py": {
        f"pretrain.{name}" for name in ("adapter", "data", "errors", "infobatch", "ledger")
    },
    "pretrain/training/replay_step.py": {
        f"pretrain.{name}" for name in ("checkpoint", "data", "display", "errors", "rng", "trained")
    },
    "pretrain/data/loader.py": {"pretrain.core.errors"},
    "pretrain/distributed/heartbeat.py": set(),
    "pretrain/data/fingerprint.py": {f"pretrain.{name}" for name in ("checkpoint", "data", "errors", "sources")},
    "pretrain/checkpoint/verify_resume.py": {
        f"pretrain.{name}" for name in ("checkpoint", "display", "errors", "manifest", "parts")
    },
    "pretrain/checkpoint/async_writer.py": {
        "pretrain.checkpoint.storage",
        "pretrain.config.schema",
        "pretrain.core.errors",
    },
    "pretrain/checkpoint/run_dir.py": {
        "pretrain.checkpoint.storage",
        "pretrain.config.schema",
        "pretrain.core.errors",
        "pretrain.core.files",
    },
    "pretrain/data/images.py": {
        f"pretrain.{name}" for name in ("adapter", "augment", "config", "decode", "errors", "kept", "rng")
    },
    "pretrain/data/autoencoder.py": {"pretrain.core.errors"},
    "pretrain/data/latents.py": {
        "pretrain.adapters",
        "pretrain.config.schema",
        "pretrain.data.images",
        "pretrain.core.errors",
        "pretrain.core.rng",
    },
    "pretrain/data/encode_latents.py": {
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
    "pretrain/data/sources.py": {
        f"pretrain.{name}" for name in ("autoencoder", "cache", "config", "data", "decode", "errors", "rng")
    },
    "pretrain/distributed/launch.py": {
        "pretrain.config.schema",
        "pretrain.core.errors",
        "pretrain.distributed.collectives",
        "pretrain.distributed.heartbeat",
    },
    "pretrain/training/state.py": {
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
    "pretrain/checkpoint/load_run.py": {
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
    "pretrain/training/summary.py": {"pretrain.config.schema", "pretrain.core.console"},
    "pretrain/training/plots.py": {"pretrain.data.images", "pretrain.evaluation.previews", "pretrain.data.sources"},
    "pretrain/export/model_card.py": {"pretrain.data.autoencoder", "pretrain.config.schema", "pretrain.core.console"},
    "pretrain/export/hub.py": {"pretrain.export.model_card", "pretrain.config.schema", "pretrain.core.errors"},
    "pretrain/training/flops.py": {"pretrain.adapters", "pretrain.core.rng"},
    "pretrain/adapters/_heun.py": set(),
    "pretrain/adapters/_sampling.py": {
        "pretrain.adapters._heun",
        "pretrain.adapters",
        "pretrain.data.autoencoder",
        "pretrain.core.errors",
    },
    "pretrain/evaluation/previews.py": {
        f"pretrain.{name}" for name in ("adapter", "autoencoder", "data", "errors", "sampling", "ranks", "rng")
    },
    "pretrain/evaluation/generate.py": {
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
    "pretrain/evaluate/__init__.py": {"pretrain.core.errors", "pretrain.evaluation.context"},  # the latter for its type
    "pretrain/evaluation/evaluate.py": {
        f"pretrain.{name}" for name in ("command_line", "errors", "evaluate", "files", "processes", "trained")
    }
    | {"pretrain.evaluation.context"},
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
        f"pretrain.evaluation.{name}"
        for name in ("augmentation", "classifiers", "features", "generated", "knn", "subject")
    },
    "pretrain/evaluation/visualize.py": {
        *(f"pretrain.{name}" for name in ("adapter", "data", "display", "errors", "pictures", "trained")),
        "pretrain.evaluation.context",
    },
    "pretrain/export/from_encoder.py": {"pretrain.core.errors"},
    "pretrain/export/to_encoder.py": {"pretrain.checkpoint.storage", "pretrain.export.from_encoder"},
    "pretrain/export/export.py": {
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
        assert name in ("pretrain/training/loop.py", "pretrain/__init__.py")
    if name != "pretrain/distributed/launch.py":
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

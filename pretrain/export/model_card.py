"""The model card: what a stranger wants to know of an exported model, filled from its run."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pretrain.config.schema import Config
from pretrain.core.console import duration
from pretrain.data.autoencoder import SUBFOLDERS, open_autoencoder

TASKS = {"diffusers": "unconditional-image-generation", "timm": "image-feature-extraction"}
PROGRAMS = {"timm": "train_mae.py"}  # of the others: train_diffusion.py


def write(config: Config, summary: dict[str, Any], *, name: str = "", licence: str | None = None) -> None:
    """Write README.md, what it shows, and recipe.yaml, beside the model.

    Args:
        config: the run's settings.
        summary: what it came to (summary.json); its `model` is the folder of the exported model.
        name: of its repository on the hub, if it has one.
        licence: as the hub calls it, if it is known.
    """
    folder = Path(summary["model"])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(config), sort_keys=False, allow_unicode=True))
    shown = []
    for title, path in _pictures(config):
        shutil.copy(path, folder / path.name)
        shown.append((title, path.name))
    card = ModelCard(f"---\n{_data(config, summary, licence).to_yaml()}\n---\n\n{_text(config, summary, name, shown)}")
    card.save(folder / "README.md")


def recipe(config: Config) -> dict[str, Any]:
    """The run's settings for somebody elsewhere: without its output folder, and of paths the last name alone."""
    tree = config.to_dict()
    del tree["output_dir"], tree["push_to_hub"]
    paths = (("data", "source"), ("adapter", "name"), ("model", "name"), ("model", "init"), ("pruning", "policy"))
    for section, key in paths:
        value = tree[section].get(key)
        if value and Path(value).expanduser().exists():
            tree[section][key] = Path(value).expanduser().resolve().name
    return tree


def _own(config: Config) -> bool:
    """Whether the images are the user's own, so that it is not for us to show them to the world."""
    return Path(config.data.source).expanduser().exists()


def _pictures(config: Config) -> list[tuple[str, Path]]:
    """The run's last picture, and its loss by level; a masked autoencoder's shows images of the data set."""
    folder = config.output_dir / "pictures"
    last, shows_data = sorted(folder.glob("epoch-*.png"))[-1:], hasattr(config.component("adapter"), "reconstruct")
    made = [] if shows_data and _own(config) else [("What it makes", path) for path in last]
    return made + [("Its loss by level", path) for path in folder.glob("loss-by-level.png")]


def _library(summary: dict[str, Any]) -> str:
    return summary["open_model_with"].split(".")[0]


def _data(config: Config, summary: dict[str, Any], licence: str | None) -> ModelCardData:
    """The head that the hub reads."""
    library, data = _library(summary), recipe(config)["data"]["source"]
    task = TASKS.get(library, "other")
    results = [
        EvalResult(task_type=task, dataset_type="image", dataset_name=data, metric_type=name, metric_value=value)
        for name, value in summary["quality"].items()
        if not isinstance(value, list)
    ]
    return ModelCardData(
        library_name=library,
        pipeline_tag=task if library in TASKS else None,
        license=licence,
        datasets=None if _own(config) or "/" not in data else data,
        tags=["infobatch", recipe(config)["adapter"]["name"]],
        model_name=config.output_dir.resolve().name if results else None,
        eval_results=results or None,
    )


def _text(config: Config, summary: dict[str, Any], name: str, shown: list[tuple[str, str]]) -> str:
    """What a person reads."""
    told = recipe(config)
    adapter, model, data = told["adapter"]["name"], told["model"]["name"], told["data"]["source"]
    parts = [
        f"# {name.split('/')[-1] or config.output_dir.resolve().name}",
        f"Network `{model}`, {summary['parameters'] / 1e6:.3g} M parameters; objective `{adapter}`; trained on {data}"
        f"{', with labels' if config.class_conditional else ''}, {_who(config)}{_average(summary)}.",
        *_autoencoder(Path(summary["model"])),
        *(f"![{title}]({path})" for title, path in shown),
    ]
    return "\n\n".join([*parts, *_use(summary, name), *_cost(summary), *_quality(summary), *_made(summary)]) + "\n"


def _autoencoder(folder: Path) -> list[str]:
    """What decodes the model's latents, so that nobody takes another one for it."""
    if not any((folder / place).is_dir() for place in SUBFOLDERS):
        return []
    told = open_autoencoder(folder).identity
    return [
        f"It makes latents; the `{told['class']}` that encoded the images is in this folder and decodes them. "
        f"SHA-256 of its parameters: `{told['sha256']}`."
    ]


def _use(summary: dict[str, Any], name: str) -> list[str]:
    """How it is opened: from the hub by libraries that ask it themselves, else from its folder."""
    library, folder, said = _library(summary), summary["model"], summary["open_model_with"]
    place = "In this folder:"
    if name and library in TASKS:
        place, said = "", said.replace(f"local-dir:{folder}", f"hf-hub:{name}").replace(folder, name)
    elif name:
        place = f"After `hf download {name} --local-dir model && cd model`:"
    code = f"import {library}{'.torch' if library == 'safetensors' else ''}\n\nmodel = {said.replace(folder, '.')}"
    parts = ["## Use", *filter(None, [place]), f"```python\n{code}\n```"]
    if "trust_remote_code" in said:
        parts.append("It brings the code of its own pipeline: `pipeline.py` and, of a network of its own, `network/`.")
    if (Path(folder) / "transformers").is_dir():
        parts.append(
            "`transformers/` is the same with its decoder, for `transformers.ViTMAEForPreTraining.from_pretrained`."
        )
    return parts


def _average(summary: dict[str, Any]) -> str:
    sigma_rel = summary.get("sigma_rel")
    return "" if sigma_rel is None else f"; its parameters are their power-function EMA of sigma_rel {sigma_rel:g}"


def _who(config: Config) -> str:
    return "on the full data set in every epoch" if config.policy == "full" else f"pruned dynamically ({config.policy})"


def _cost(summary: dict[str, Any]) -> list[str]:
    visits, flops = summary["samples_used"], summary["train_flops"]
    return [
        "## Cost",
        "| | this model | the full data set in every epoch |\n|---|---|---|\n"
        f"| samples used | {visits:,} | {summary['full_samples']:,} |\n"
        f"| training FLOPs | {flops:.3g} | {summary['full_train_flops']:.3g} |\n"
        f"| time of training | {duration(summary['seconds'])} | |",
        f"{summary['saved_fraction']:.1%} of the samples were saved, counted against "
        f"{summary['progress'] * summary['epochs']:g} epochs of "
        f"{summary['dataset_size']:,} images. That is what it cost, not that nothing was lost: compare its quality "
        "with that of ordinary training of the same, shorter length.",
    ]


def _quality(summary: dict[str, Any]) -> list[str]:
    before, after = summary["quality_before"], summary["quality"]
    rows = [
        f"| {key} | {f'{before[key]:.4f}' if key in before else ''} | {value:.4f} |"
        for key, value in after.items()
        if not isinstance(value, list)
    ]
    table = "\n".join(["| | before training | after |\n|---|---|---|", *rows])
    how = [f"{note}." for note in summary.get("notes", [])] or ["`evaluate` in `recipe.yaml` says how it was measured."]
    return ["## Quality", table, *how] if rows else []


def _made(summary: dict[str, Any]) -> list[str]:
    program = PROGRAMS.get(_library(summary), "train_diffusion.py")
    return ["## Made with", f"```\npython {program} --config recipe.yaml\n```", "`recipe.yaml` holds every setting."]

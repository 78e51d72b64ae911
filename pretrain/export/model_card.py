"""The model card, written from a run: what the model is, how to use it, its cost and its quality."""

import html
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pretrain.config.schema import LAUNCH_ONLY, Config
from pretrain.config.trusted_code import features_file
from pretrain.core.console import duration
from pretrain.core.files import expand, read_json
from pretrain.core.text import printable
from pretrain.data.autoencoder import SUBFOLDERS, open_autoencoder

TASKS = {"diffusers": "unconditional-image-generation", "timm": "image-feature-extraction"}


def write(config: Config, summary: dict[str, Any], *, name: str = "", licence: str | None = None) -> None:
    """Write README.md with its pictures, and recipe.yaml, to the folder of the model.

    Args:
        config: the run's settings.
        summary: the run's summary; `model` is the folder of the exported model.
        name: of the repository on the Hub; "": it has none.
        licence: its identifier on the Hub; None: unknown.

    Raises:
        OSError: a file can't be written.
    """
    folder = Path(summary["model"])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(config), sort_keys=False, allow_unicode=True), "utf-8")
    pictures = []
    for title, path in _pictures(config):
        shutil.copy(path, folder / path.name)
        pictures.append(f"![{title}]({quote(path.name)})")
    head = _front_matter(config, summary, licence).to_yaml()
    card = ModelCard(f"---\n{head}\n---\n\n{_text(config, summary, name, pictures)}")
    card.save(folder / "README.md")


def recipe(config: Config) -> dict[str, Any]:
    """The run's settings for publication: without its output folder, and of paths only the last name."""
    tree = config.to_dict()
    for name in ("output_dir", *LAUNCH_ONLY):
        tree.pop(name, None)
    paths = (
        ("data", "source"),
        ("adapter", "name"),
        ("model", "name"),
        ("pruning", "policy"),
        ("evaluate", "features"),
        ("evaluate", "reference"),
    )
    inits = [(section, "init") for section in _models(tree)]
    for section, key in (*((tree[section], key) for section, key in paths), *inits):
        value = section.get(key) or ""
        path = features_file(value) if key == "features" else value
        if _is_path(path):
            section[key] = value.removesuffix(path) + expand(path).resolve().name
    return tree


def _models(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of the model, and of the networks inside it."""
    return [tree["model"], *(inner for inner in tree["model"].values() if isinstance(inner, dict))]


def _is_path(name: str) -> bool:
    path = expand(name)
    files = name.startswith(".") or name.lower().endswith(".tar")  # train-{000..012}.tar is no existing file
    return bool(name) and (path.exists() or path.is_absolute() or files)


def _pictures(config: Config) -> list[tuple[str, Path]]:
    """The run's last picture and its loss by level, with their titles.

    The picture of a masked autoencoder contains images of the data set, so it is omitted if these are the user's own. A
    link is omitted, because it can lead to any file.
    """
    folder = config.output_dir / "pictures"
    if folder.is_symlink():
        return []
    last = sorted(path for path in folder.glob("epoch-*.png") if not path.is_symlink())[-1:]
    if hasattr(config.component("adapter"), "reconstruct"):
        title, shown = "Reconstructions of validation images", [] if _is_path(config.data.source) else last
    else:
        title, shown = "Generated images", last
    by_level = [path for path in folder.glob("loss-by-level.png") if not path.is_symlink()]
    return [*((title, path) for path in shown), *(("Validation loss by level", path) for path in by_level)]


def _library(summary: dict[str, Any]) -> str:
    return summary["open_model_with"].split(".")[0]


def _front_matter(config: Config, summary: dict[str, Any], licence: str | None) -> ModelCardData:
    """The metadata that the Hub reads."""
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
        datasets=None if _is_path(config.data.source) or "/" not in data else data,
        tags=["infobatch", recipe(config)["adapter"]["name"]],
        model_name=config.output_dir.resolve().name if results else None,
        eval_results=results or None,
    )


def _code(text: str) -> str:
    """Text as inline code; what would end it, or a cell of a table, is removed."""
    return f"`{printable(' '.join(re.sub(r'[`|]', '', text).split()))}`"


def _prose(text: str) -> str:
    """Text without HTML or Markdown: names of files and folders may contain either."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(printable(" ".join(text.split())), quote=False))


def _text(config: Config, summary: dict[str, Any], name: str, pictures: list[str]) -> str:
    """The text below the metadata."""
    sections = [
        f"# {_prose(name.split('/')[-1] or config.output_dir.resolve().name)}",
        *_description(config, summary),
        *pictures,
        *_use(config, summary, name),
        *_cost(summary),
        *_quality(summary),
        *_training(config, summary),
    ]
    return "\n\n".join(sections) + "\n"


def _description(config: Config, summary: dict[str, Any]) -> list[str]:
    settings, folder = recipe(config), Path(summary["model"])
    adapter, network = (_code(settings[section]["name"]) for section in ("adapter", "model"))
    kind = "An encoder, pretrained" if summary["program"] == "train_mae.py" else "A "
    if _library(summary) == "timm":
        kind = "A vision transformer, pretrained as a masked autoencoder"
    elif kind == "A ":
        kind += "class-conditional denoiser" if config.class_conditional else "denoiser"
        kind += " of latents" if (folder / "vae").is_dir() or (folder / "vqvae").is_dir() else " of images"
    ema = "The parameters are an exponential moving average (EMA) over the training."
    if summary.get("sigma_rel") is not None:
        ema = f"The parameters are a power-function EMA over the training (sigma_rel {summary['sigma_rel']:g})."
    parts = [
        f"{kind}: network {network} with {summary['parameters'] / 1e6:.3g} M parameters, objective {adapter}, trained "
        f"on {summary['dataset_size']:,} images of {_code(settings['data']['source'])}. {ema}"
    ]
    if any((folder / place / "config.json").is_file() for place in SUBFOLDERS):
        identity = open_autoencoder(folder).identity
        parts.append(
            f"The {_code(identity['class'])} that encoded the training images is in this folder and decodes the "
            f"latents. SHA-256 of its parameters: `{identity['sha256']}`."
        )
    return parts


def _use(config: Config, summary: dict[str, Any], name: str) -> list[str]:
    """How to open it: from the Hub, if its library can do that, else from its folder."""
    library, folder = _library(summary), summary["model"]
    expression = summary["open_model_with"]
    inside = repr(folder)[1:-1]  # as in the expression, which contains a literal
    place = "In this folder:"
    if name and library in TASKS:
        place, expression = "", expression.replace(f"local-dir:{inside}", f"hf-hub:{name}").replace(inside, name)
    elif name:
        place = f"After `hf download {name} --local-dir model && cd model`:"
    expression = expression.replace(inside, ".")
    lines = [f"import {library}{'.torch' if library == 'safetensors' else ''}", ""]
    text = []
    if library == "diffusers":
        first = next(iter(summary.get("class_names", [])), 0)
        call = f"batch_size=4, label={first!r}, guidance=1.5" if config.class_conditional else "batch_size=4"
        if (channels := _channels(config)) > 4 and not (Path(folder) / "vae").is_dir():
            call += ', output_type="np"'
            text.append(f"Images have {channels} channels: float32 [B, H, W, {channels}] in [0, 1].")
        lines += [f"pipeline = {expression}", f"images = pipeline({call}).images"]
    elif library == "timm":
        lines += [f"model = {expression}"]
        text.append("It takes images in [-1, 1], that is pixels in [0, 1] normalised by mean 0.5 and std 0.5.")
    else:
        lines += [f"parameters = {expression}"]
        text.append("These are the parameters alone; `recipe.yaml` describes the network.")
    if "trust_remote_code" in expression:
        text.append("The pipeline has code of its own: `pipeline.py`, and that of the network in `network/`, if any.")
    if (Path(folder) / "transformers").is_dir():
        text.append("`transformers/` contains it with its decoder, for `transformers.ViTMAEForPreTraining`.")
    code = "\n".join(lines)
    return ["## Use", *filter(None, [place]), f"```python\n{code}\n```", *text]


def _channels(config: Config) -> int:
    """C of the run's images, from its data.json; 0 if that can't be read."""
    try:
        return int(read_json(config.output_dir / "data.json")["shape"][0])
    except (OSError, ValueError, TypeError, LookupError):
        return 0


def _cost(summary: dict[str, Any]) -> list[str]:
    used, full, flops = summary["samples_used"], summary["full_samples"], summary["train_flops"]
    epochs = f"{summary['progress'] * summary['epochs']:g} epochs"
    whole = "subset" if summary.get("subset") else "full data set"
    bad = len(summary["bad_images"])
    skipped = [f"{bad:,} of the images could not be read or had no finite loss; they were skipped."] if bad else []
    if used == full:
        time = duration(summary["seconds"])
        text = f"Training used {used:,} samples ({epochs}) and {flops:.3g} FLOPs, and took {time}."
        return ["## Cost", text, *skipped]
    return [
        "## Cost",
        f"| | this model | {epochs} of the {whole} |\n|---|---|---|\n"
        f"| samples used | {used:,} | {full:,} |\n"
        f"| training FLOPs | {flops:.3g} | {summary['full_train_flops']:.3g} |\n"
        f"| training time | {duration(summary['seconds'])} | |",
        f"Training used {summary['saved_fraction']:.1%} fewer samples than {epochs} of the {whole}. This says "
        "nothing about quality: compare that with ordinary training which is shortened to the same cost.",
        *skipped,
    ]


def _quality(summary: dict[str, Any]) -> list[str]:
    before, after = summary["quality_before"], summary["quality"]
    numbers = {name: f"{value:.4f} |" for name, value in after.items() if not isinstance(value, list)}
    head = "| | after training |\n|---|---|"
    if before:
        head = "| | before training | after |\n|---|---|---|"
        numbers = {
            name: f"{f'{before[name]:.4f}' if name in before else ''} | {text}" for name, text in numbers.items()
        }
    rows = [f"| {_code(name)} | {text}" for name, text in numbers.items()]
    table = "\n".join([head, *rows])
    notes = [f"{_prose(note)}." for note in summary.get("notes", [])]
    notes = notes or ["`evaluate` in `recipe.yaml` contains the settings of the evaluation."]
    return ["## Quality", table, *notes] if rows else []


def _training(config: Config, summary: dict[str, Any]) -> list[str]:
    samples = "on all images in every epoch"
    if config.policy != "full":
        samples = f"with dynamic data pruning (InfoBatch, policy {_code(recipe(config)['pruning']['policy'])})"
    elif config.blocking.share:
        changed = ", which changes the objective" if config.blocking.method == "topk" else ""
        part = summary["samples_blocked"] / max(summary["samples_used"], 1)
        samples += f", {part:.0%} of them through the first blocks only (Partial Forward Blocking{changed})"
    data = " --data FOLDER" if _is_path(config.data.source) else ""
    inits = [_code(section["init"]) for section in _models(recipe(config)) if section.get("init")]
    start = f"It started from the weights {inits[0]} and was" if inits else "It was"
    return [
        "## Training",
        f"{start} trained {samples} by infobatch-pretrain:",
        f"```\npython {summary['program']} --config recipe.yaml{data}\n```",
        "`recipe.yaml` contains all settings.",
    ]

"""The config: frozen dataclasses that YAML files, the command line, `--help` and checkpoints share.

A YAML file is turned into command-line arguments, so both are checked by the same code (tyro). Nothing
here imports torch: `--help` and a refused setting come at once.
"""

import contextlib
import dataclasses
import io
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from pretrain import parts
from pretrain.errors import Refused


def _require(good: bool, name: str, allowed: str, given: object) -> None:
    if not good:
        raise ValueError(f"{name} must be {allowed}, got {given}")


@dataclass(frozen=True)
class Data:
    """Images to train on, and how they are read.

    Attributes:
        source: "fashion-mnist" (6,000 images that ship with the package), a folder of images, a parquet file
            or a folder of them, or the name of a Hugging Face data set.
        size: side in pixels that images are resized and cropped to; their own where not given.
        channels: 1 (grey) or 3 (RGB); the images' own where not given.
        flip: mirror half of the visits left to right.
        crop: smallest share of the area that a random crop keeps; 1 does not crop.
        held_out: images set aside for evaluation where the data set has no test split of its own.
        on_bad_image: what to do about an image that can't be read: stop, or skip and count it.
        workers: processes that decode images beside the training process.
    """

    source: Annotated[str, tyro.conf.arg(aliases=["--data"])] = "fashion-mnist"
    size: int | None = None
    channels: Literal[1, 3] | None = None
    flip: bool = False
    crop: float = 1.0
    held_out: int = 1000
    on_bad_image: Annotated[Literal["stop", "skip"], tyro.conf.arg(aliases=["--on-bad-image"])] = "stop"
    workers: int = 0

    def __post_init__(self) -> None:
        _require(self.size is None or self.size >= 1, "data.size", "at least 1", self.size)
        _require(0 < self.crop <= 1, "data.crop", "above 0 and at most 1", self.crop)
        _require(self.held_out >= 1, "data.held_out", "at least 1", self.held_out)
        _require(self.workers >= 0, "data.workers", "0 or more", self.workers)


@dataclass(frozen=True)
class Pruning:
    """Whom to skip, and what the others then count for.

    Attributes:
        policy: how epochs are planned; where not given, infobatch with --infobatch and full without.
        ratio: share skipped among the samples that are better learned than the mean, in [0, 1).
        anneal: share of the epochs, the last ones, that visit everybody, in [0, 1].
        smoothing: what a sample's score keeps of its past at a visit, in [0, 1).
    """

    policy: Literal["full", "infobatch"] | None = None
    ratio: float = 0.5
    anneal: float = 0.125
    smoothing: float = 0.7

    def __post_init__(self) -> None:
        _require(0 <= self.ratio < 1, "pruning.ratio", "in [0, 1)", self.ratio)
        _require(0 <= self.anneal <= 1, "pruning.anneal", "in [0, 1]", self.anneal)
        _require(0 <= self.smoothing < 1, "pruning.smoothing", "in [0, 1)", self.smoothing)


@dataclass(frozen=True)
class Optim:
    """AdamW, and its learning rate: a linear warm-up, then half a cosine down to 0.

    Attributes:
        lr: peak learning rate.
        betas: decay of the running mean of gradients and of their squares.
        weight_decay: decoupled; not on biases, norms and other vectors.
        warmup: share of the training in which the rate rises.
        clip: largest norm of the gradient; 0 does not clip.
        average: half-life of the parameters' exponential average, as a share of the training.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0
    average: float = 0.02

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", "above 0", self.lr)
        _require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", "in [0, 1)", self.betas)
        _require(self.weight_decay >= 0, "optim.weight_decay", "0 or more", self.weight_decay)
        _require(0 <= self.warmup < 1, "optim.warmup", "in [0, 1)", self.warmup)
        _require(self.clip >= 0, "optim.clip", "0 or more", self.clip)
        _require(0 < self.average <= 1, "optim.average", "above 0 and at most 1", self.average)


@dataclass(frozen=True)
class Evaluate:
    """What is measured and drawn while training.

    Attributes:
        every: epochs between evaluations; the first and the last epoch are always evaluated.
        images: images in a picture.
        steps: network calls to generate an image (diffusion).
        guidance: classifier-free guidance when generating with labels; 1 is none (diffusion).
    """

    every: int = 5
    images: int = 64
    steps: int = 25
    guidance: float = 1.0

    def __post_init__(self) -> None:
        _require(self.every >= 1, "evaluate.every", "at least 1", self.every)
        _require(self.images >= 1, "evaluate.images", "at least 1", self.images)
        _require(self.steps >= 1, "evaluate.steps", "at least 1", self.steps)


@dataclass(frozen=True)
class Checkpoint:
    """When the state of the run is written; it always is at an epoch's end and on Ctrl-C or SIGTERM.

    Attributes:
        every: optimizer steps between checkpoints inside an epoch; 0 writes none there.
        keep: newest checkpoints that are kept.
    """

    every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        _require(self.every >= 0, "checkpoint.every", "0 or more", self.every)
        _require(self.keep >= 1, "checkpoint.keep", "at least 1", self.keep)


@dataclass(frozen=True)
class AdapterSection:
    """The name that an adapter's section starts with."""

    name: Annotated[str, tyro.conf.arg(aliases=["--adapter"], help="objective, or the path of a file with one")]


@dataclass(frozen=True)
class ModelSection:
    """The name that a model's section starts with."""

    name: Annotated[str, tyro.conf.arg(aliases=["--model"], help="network, or the path of a file with one")]


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
        output_dir: folder that the run is written to.
        epochs: passes over the data; one that skips samples counts as a whole one.
        batch_size: images of an optimizer step, over all processes.
        micro_batch: most images a process pushes through at once; more are accumulated.
        seed: of everything that is random.
        infobatch: prune with InfoBatch; without it everybody is visited with weight 1.
        conditional: tell the network the images' labels.
        precision: of the network's arithmetic; parameters and losses stay float32.
        tracker: also log to an experiment tracker that accelerate knows, for example tensorboard.
        resume: go on from the newest checkpoint of the output folder, or from the one given.
        overwrite: replace the run that is in the output folder.
    """

    adapter: Any
    model: Any
    output_dir: Path = Path("runs/run")
    data: Data = field(default_factory=Data)
    epochs: int = 100
    batch_size: int = 64
    micro_batch: int | None = None
    seed: int = 0
    infobatch: bool = False
    pruning: Pruning = field(default_factory=Pruning)
    optim: Optim = field(default_factory=Optim)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    conditional: bool = False
    precision: Literal["no", "fp16", "bf16"] = "no"
    tracker: str | None = None
    resume: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        _require(self.micro_batch is None or self.micro_batch >= 1, "micro_batch", "at least 1", self.micro_batch)
        _require(self.seed >= 0, "seed", "0 or more", self.seed)
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: go on with the run, or replace it")

    @property
    def policy(self) -> str:
        """The name of the policy that plans the epochs."""
        return self.pruning.policy or ("infobatch" if self.infobatch else "full")

    def part(self, kind: str) -> Any:
        """The adapter or the model's config itself, from its section."""
        section = getattr(self, kind)
        fields = {item.name: getattr(section, item.name) for item in dataclasses.fields(section)}
        return parts.load(kind, fields.pop("name"))(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON; without what belongs to one launch alone."""
        tree = dataclasses.asdict(self) | {"output_dir": str(self.output_dir)}
        del tree["resume"], tree["overwrite"]
        return _plain(tree)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def _settings(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's dotted name and type."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _settings(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hints[item.name]


def _unknown(name: str, known: Sequence[str], source: str) -> Refused:
    near = get_close_matches(name.replace("-", "_"), known, 1, 0.5)
    near = near or [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    return Refused(
        f"{source}there is no setting {name!r}{f'; did you mean {near[0]!r}?' if near else ''} (--help lists them)"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    """A recipe's settings by dotted name."""
    if not path.is_file():
        near = get_close_matches(path.name, [item.name for item in path.parent.glob("*.yaml")], 1, 0.3)
        raise Refused(f"--config {path}: there is no such file{f'; did you mean {near[0]}?' if near else ''}")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"--config {path}: not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise Refused(f"--config {path}: a recipe is settings, `name: value`, got {type(tree).__name__}")
    # As on the command line, a section's own name is short for its first setting: `adapter: flow`.
    first = {"adapter": "adapter.name", "model": "model.name", "data": "data.source"}
    return {first.get(name, name): value for name, value in flat({str(k): v for k, v in tree.items()}).items()}


def _arguments(settings: dict[str, Any], cls: type, source: str) -> list[str]:
    """The command line that says what a YAML file says."""
    known = dict(_settings(cls))
    arguments: list[str] = []
    for name, value in settings.items():
        if name not in known:
            raise _unknown(name, list(known), source)
        if known[name] is bool:
            if not isinstance(value, bool):
                raise Refused(f"{source}{name} must be true or false, got {value!r}")
            head, _, leaf = name.rpartition(".")
            arguments.append(f"--{head}{'.' if head else ''}{'' if value else 'no-'}{leaf}")
        elif isinstance(value, list):
            if typing.get_origin(known[name]) is not tuple:
                raise Refused(f"{source}{name} must be one value, got the list {value}")
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def _sentence(box: str) -> str:
    """Tyro's first paragraph, out of its frame and in the user's words."""
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in box.splitlines()]
    text: list[str] = []
    for line in lines[1:]:
        if not line or line.startswith(("─", "╰")):
            break
        text.append(line)
    sentence = " ".join(text).removeprefix("Error parsing ").removeprefix("Config: ").rstrip(".")
    sentence = re.sub(r"^(\w+): (?=\1\.)", "", sentence)
    sentence = re.sub(r": could not convert string to float: (.*)", r" must be a number, got \1", sentence)
    sentence = re.sub(r": invalid literal for int\(\) with base 10: (.*)", r" must be a whole number, got \1", sentence)
    return sentence or box.strip()


def _tyro(cls: type, arguments: list[str], default: Any, source: str) -> Any:
    """Parse with tyro; its complaint as one sentence."""
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(cls, args=arguments, default=default)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(cls, args=arguments, default=default, return_unknown_args=True)
    except SystemExit:
        raise Refused(source + _sentence(complaint.getvalue())) from None
    if unknown:
        if not unknown[0].startswith("--"):
            raise Refused(f"{source}unexpected argument {unknown[0]!r}; settings are given as --name value")
        name = unknown[0].removeprefix("--").partition("=")[0]
        raise _unknown(name, [name for name, _ in _settings(cls)], source)
    return config


def _take(arguments: list[str], *flags: str) -> str | None:
    """The last value that one of the flags is given; it stays among the arguments."""
    for position in reversed(range(len(arguments))):
        flag, equals, value = arguments[position].partition("=")
        if flag in flags:
            return value if equals else next(iter(arguments[position + 1 :]), None)
    return None


def parse(arguments: Sequence[str], *, adapter: str, model: str, recipe: Path, output_dir: str, help: str) -> Config:
    """The config of a run from its command line.

    The values come, the later the stronger, from the dataclasses, the YAML file (that of `--config`, or of the
    run that is resumed, or else `recipe`), and the command line.

    Args:
        arguments: the command line, without the program's name.
        adapter, model: the parts where neither file nor command line names one.
        recipe: the YAML file that is read where no other is named.
        output_dir: where the run goes if nobody says.
        help: what `--help` starts with.

    Raises:
        Refused: a setting is unknown, of the wrong type or out of its range.
    """
    arguments = list(arguments)
    for position, argument in enumerate(arguments):  # `--resume` alone: the newest checkpoint
        following = arguments[position + 1 : position + 2]
        if argument == "--resume" and (not following or following[0].startswith("-")):
            arguments[position] = "--resume=newest"
    path = _take(arguments, "--config")
    if path is not None:
        position = next(n for n, item in enumerate(arguments) if item.partition("=")[0] == "--config")
        del arguments[position : position + (1 if "=" in arguments[position] else 2)]
        recipe = Path(path)
    elif resume := _take(arguments, "--resume"):
        if resume != "newest":  # <output_dir>/checkpoints/<one of them>
            output_dir = str(Path(resume).resolve().parents[1])
        folder = Path(_take(arguments, "--output-dir", "--output_dir") or output_dir)
        recipe = folder / "config.yaml" if (folder / "config.yaml").is_file() else recipe
    settings = {"output_dir": output_dir} | _read_yaml(recipe)

    sections = {}
    for kind, default, head in (("adapter", adapter, AdapterSection), ("model", model, ModelSection)):
        written = str(settings.setdefault(f"{kind}.name", default))
        name = _take(arguments, f"--{kind}", f"--{kind}.name") or written
        if name != written:  # the file's other settings are of the other part
            settings = {key: value for key, value in settings.items() if not key.startswith(f"{kind}.")}
            settings[f"{kind}.name"] = name
        part = parts.declared(kind, name)
        sections[kind] = types.new_class(part.__name__, (part, head), exec_body=lambda space: None)
        sections[kind].__doc__ = part.__doc__
        sections[kind] = dataclass(frozen=True, kw_only=True)(sections[kind])
    cls = dataclasses.make_dataclass("Config", sections.items(), bases=(Config,), frozen=True, kw_only=True)
    told = "--config FILE starts from a recipe (YAML); any setting given beside it is stronger."
    cls.__doc__ = (Config.__doc__ or "").replace("One run.", f"{help} {told}", 1)

    source = f"{recipe}: "
    base = _tyro(cls, _arguments(settings, cls, source), None, source)
    return _tyro(cls, arguments, base, "")


def from_command_line(**program: Any) -> Config:
    """`parse` of this process's own command line."""
    return parse(sys.argv[1:], **program)

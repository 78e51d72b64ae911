"""The config: frozen dataclasses that YAML files, the command line, `--help` and checkpoints share."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pretrain.config import registry


def _require(good: bool, name: str, allowed: str, given: object) -> None:
    if not good:
        raise ValueError(f"{name} must be {allowed}, got {given}")


@dataclass(frozen=True)
class Data:
    """Images to train on, and how they are read.

    Attributes:
        source: "fashion-mnist" (6,000 images that ship with the package), a folder of images, a parquet file
            or a folder of them, a folder that `pretrain encode-latents` wrote, or the name of a Hugging Face data set.
        size: side in pixels that images are resized and cropped to; their own where not given.
        channels: 1 (grey), 3 (RGB, transparent ones on white) or 4 (RGB and what a file keeps as its alpha, as it is);
            where not given 1 if all are grey, else 3.
        flip: mirror half of the visits left to right.
        crop: smallest share of the whole image's area that a random crop keeps; 1 does not crop.
        limit: most images to train on, chosen by chance but always the same; all where not given.
        held_out: images set aside for evaluation where the data set has no test split of its own.
        on_bad_image: what to do about an image that can't be read: stop, or skip and count it.
        workers: processes that decode images beside the training process.
    """

    source: Annotated[str, tyro.conf.arg(aliases=["--data"])] = "fashion-mnist"
    size: int | None = None
    channels: Literal[1, 3, 4] | None = None
    flip: bool = False
    crop: float = 1.0
    limit: int | None = None
    held_out: int = 1000
    on_bad_image: Annotated[Literal["stop", "skip"], tyro.conf.arg(aliases=["--on-bad-image"])] = "stop"
    workers: int = 0

    def __post_init__(self) -> None:
        _require(bool(self.source), "data", "images", "an empty name")
        _require(self.size is None or self.size >= 1, "data.size", "at least 1", self.size)
        _require(0 < self.crop <= 1, "data.crop", "above 0 and at most 1", self.crop)
        _require(self.limit is None or self.limit >= 1, "data.limit", "at least 1", self.limit)
        _require(self.held_out >= 1, "data.held_out", "at least 1", self.held_out)
        _require(self.workers >= 0, "data.workers", "0 or more", self.workers)


@dataclass(frozen=True)
class Pruning:
    """Which samples and noise levels an epoch uses, and with what weight.

    Attributes:
        policy: how epochs are planned: full, random, infobatch, quantile, importance, or the path of a file with one
            of your own. Another one than the recipe's drops the recipe's other settings of this section.
        prune_ratio: share skipped among the samples that are better learned than the mean, in [0, 1); of infobatch, 0.5
            where not given.
        budget: share of the full data set's samples to use over the whole run, in (0, 1]; of random and importance.
        over: what importance chooses, both where not given.
        anneal: share of the epochs, the last ones, that use every sample, in [0, 1]; if not given 0.125, but 0 with a
            budget.
        smoothing: what a sample's score keeps of its past at a visit, in [0, 1).
    """

    policy: str = "infobatch"
    prune_ratio: float | None = None
    budget: float | None = None
    over: Literal["samples", "levels", "both"] | None = None
    anneal: float | None = None
    smoothing: float = 0.7

    def __post_init__(self) -> None:
        _require(
            self.prune_ratio is None or 0 <= self.prune_ratio < 1, "pruning.prune_ratio", "in [0, 1)", self.prune_ratio
        )
        _require(self.budget is None or 0 < self.budget <= 1, "pruning.budget", "in (0, 1]", self.budget)
        _require(self.anneal is None or 0 <= self.anneal <= 1, "pruning.anneal", "in [0, 1]", self.anneal)
        _require(0 <= self.smoothing < 1, "pruning.smoothing", "in [0, 1)", self.smoothing)


@dataclass(frozen=True)
class Optim:
    """AdamW, and its learning rate: a linear warm-up, then half a cosine down to 0.

    Attributes:
        lr: peak learning rate.
        linear_scaling: the rate is that of 256 images a step and grows in proportion to the batch size (Goyal et al.
            2017; the "base learning rate" of masked autoencoders).
        betas: decay of the running mean of gradients and of their squares.
        weight_decay: decoupled; not on biases, norms and other vectors.
        warmup: share of the training in which the rate rises.
        clip: largest norm of the gradient; 0 does not clip.
        compensation: an epoch that visits a share k of the samples multiplies the rate by k to the power of minus
            this; 0 leaves the rate alone, 1 makes up for all the steps that are skipped.
    """

    lr: float = 1e-4
    linear_scaling: bool = False
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0
    compensation: float = 0.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", "above 0", self.lr)
        _require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", "in [0, 1)", self.betas)
        _require(self.weight_decay >= 0, "optim.weight_decay", "0 or more", self.weight_decay)
        _require(0 <= self.warmup < 1, "optim.warmup", "in [0, 1)", self.warmup)
        _require(self.clip >= 0, "optim.clip", "0 or more", self.clip)
        _require(0 <= self.compensation <= 1, "optim.compensation", "in [0, 1]", self.compensation)


@dataclass(frozen=True)
class EMASettings:
    """Averages of the parameters; progress is their clock.

    Attributes:
        halflife: of the exponential average, the one that is evaluated and exported, as a share of the training.
        sigma_rel: of power-function EMAs kept beside it (Karras et al. 2024), up to 0.28; with two, say 0.05 and 0.1,
            `pretrain ema` makes that of any sigma_rel when the run is over.
        snapshots: how often in the run those are written to its ema/; more make what lies between more exact.
    """

    halflife: float = 0.02
    sigma_rel: tuple[float, ...] = ()
    snapshots: int = 16

    def __post_init__(self) -> None:
        _require(0 < self.halflife <= 1, "ema.halflife", "above 0 and at most 1", self.halflife)
        _require(
            all(0 < length <= 0.28 for length in self.sigma_rel) and len({*self.sigma_rel}) == len(self.sigma_rel),
            "ema.sigma_rel",
            "different ones above 0 and at most 0.28",
            self.sigma_rel,
        )
        _require(self.snapshots >= 1, "ema.snapshots", "at least 1", self.snapshots)


@dataclass(frozen=True)
class Evaluate:
    """What is measured and drawn while training; `pretrain evaluate` measures the same way.

    Attributes:
        every: epochs between evaluations; the first and the last epoch are always evaluated.
        metrics: what is measured, see docs/evaluating.md; where not given, the held-out loss, and the k-NN accuracy of
            an encoder whose images have labels.
        images: images in a picture.
        steps: network calls to generate an image (diffusion).
        guidance: classifier-free guidance when generating with labels; 1 is none (diffusion).
        sampler: ddim, euler, heun or dpm++ for fid, kid and precision-recall; the objective's own where not given.
        num_images: images generated for them.
        features: network whose features they compare: small, inception, any other of torch-fidelity's, or a path.
        reference: images that generated ones are compared with, as --data names them; where not given the training
            images, of latents decoded.
        max_reference: how many of them at most, evenly apart.
        probe_epochs: passes over the labelled images of linear-probe, attentive-probe and finetune.
        seeds: that a metric with chance in it (generated images, a probe's head) is measured with; its mean and
            standard deviation are given.
    """

    every: int = 5
    metrics: tuple[str, ...] = ()
    images: int = 64
    steps: int = 25
    guidance: float = 1.0
    sampler: str | None = None
    num_images: int = 1000
    features: str = "small"
    reference: str | None = None
    max_reference: int = 50_000
    probe_epochs: int = 90
    seeds: int = 1

    def __post_init__(self) -> None:
        names = [name for item in self.metrics for name in item.split(",") if name]  # fid,kid is fid kid
        object.__setattr__(self, "metrics", tuple(names))
        _require(self.every >= 1, "evaluate.every", "at least 1", self.every)
        _require(self.images >= 1, "evaluate.images", "at least 1", self.images)
        _require(self.steps >= 1, "evaluate.steps", "at least 1", self.steps)
        _require(self.num_images >= 1, "evaluate.num_images", "at least 1", self.num_images)
        _require(self.reference != "", "evaluate.reference", "images", "an empty name")
        _require(self.max_reference >= 1, "evaluate.max_reference", "at least 1", self.max_reference)
        _require(self.probe_epochs >= 1, "evaluate.probe_epochs", "at least 1", self.probe_epochs)
        _require(self.seeds >= 1, "evaluate.seeds", "at least 1", self.seeds)


@dataclass(frozen=True)
class Checkpoint:
    """When the state of the run is written; it always is at an epoch's end and on Ctrl-C or SIGTERM.

    Attributes:
        every: optimizer steps between checkpoints inside an epoch; 0 writes none by number there.
        minutes: between checkpoints inside an epoch; 0 writes none by the clock.
        keep: newest checkpoints that are kept.
        hours: beside them the first checkpoint of every so many hours of training is kept; none where not given.
    """

    every: int = 0
    minutes: float = 15.0
    keep: int = 2
    hours: float | None = None

    def __post_init__(self) -> None:
        _require(self.every >= 0, "checkpoint.every", "0 or more", self.every)
        _require(self.minutes >= 0, "checkpoint.minutes", "0 or more", self.minutes)
        _require(self.keep >= 1, "checkpoint.keep", "at least 1", self.keep)
        _require(self.hours is None or self.hours > 0, "checkpoint.hours", "above 0", self.hours)


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
        micro_batch: most images a process pushes through at once; more are accumulated. auto: as many as the device's
            memory has room for, tried at the start.
        seed: of everything that is random.
        infobatch: prune, as the recipe's pruning section recommends; without it every sample is used with weight 1. Any
            --pruning.* on the command line says it too.
        class_conditional: give the network the images' labels.
        precision: of the network's arithmetic; parameters and losses stay float32.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them: much less
            memory, about a third more time, the same run.
        compile: compile the network in training (torch.compile): slow at the start, faster later, the same run but for
            rounding.
        tracker: also log to an experiment tracker that accelerate knows, for example tensorboard.
        push_to_hub: name of a model repository on the Hugging Face hub that the trained model is uploaded to.
        resume: go on from the newest checkpoint of the output folder, or from the one given.
        overwrite: replace the run that is in the output folder.
    """

    adapter: Any
    model: Any
    output_dir: Path = Path("runs/run")
    data: Data = field(default_factory=Data)
    epochs: int = 100
    batch_size: int = 64
    micro_batch: int | Literal["auto"] | None = None
    seed: int = 0
    infobatch: bool = False
    pruning: Pruning = field(default_factory=Pruning)
    optim: Optim = field(default_factory=Optim)
    ema: EMASettings = field(default_factory=EMASettings)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    class_conditional: bool = False
    precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    tracker: str | None = None
    push_to_hub: str | None = None
    resume: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        number = self.micro_batch if isinstance(self.micro_batch, int) else 1
        _require(number >= 1, "micro_batch", "at least 1, or auto", number)
        _require(self.seed >= 0, "seed", "0 or more", self.seed)
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: go on with the run, or replace it")

    @property
    def peak_rate(self) -> float:
        """The highest learning rate."""
        return self.optim.lr * (self.batch_size / 256 if self.optim.linear_scaling else 1)

    @property
    def policy(self) -> str:
        """The name of the policy that plans the epochs."""
        return self.pruning.policy if self.infobatch else "full"

    def part(self, kind: str) -> Any:
        """The adapter or the model's config itself, from its section."""
        section = getattr(self, kind)
        fields = {item.name: getattr(section, item.name) for item in dataclasses.fields(section)}
        return registry.load(kind, fields.pop("name"))(**fields)

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

"""The settings of a run: frozen dataclasses shared by YAML files, the command line, `--help` and checkpoints."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pretrain.config import registry
from pretrain.config.limits import require_in_range

SAMPLERS = ("ddim", "euler", "heun", "dpm++")
# Settings of one launch: they are given on the command line only, because a recipe or a run may come from elsewhere.
LAUNCH_ONLY = ("resume", "overwrite", "dry_run", "tracker", "push_to_hub")


def _require(good: bool, name: str, allowed: str, given: object) -> None:
    if not good:
        raise ValueError(f"{name} must be {allowed}, got {given}")


@dataclass(frozen=True)
class Data:
    """Images to train on, and how they are decoded.

    Attributes:
        source: "fashion-mnist" (6,000 images that ship with the package), a folder of images, a parquet file or
            a folder of them, a tar file of WebDataset's, a folder of them or FOLDER/train-{000..012}.tar, a folder that
            the datasets library (`save_to_disk`) or `pretrain encode-latents` wrote, or the name of a Hugging Face data
            set.
        train_split: folder, file or split to train on, A+B for several; "." is the whole folder; default: by the names
            (docs/data.md).
        test_split: the one to evaluate on; "none" holds out training images; default: by the names.
        image: column of the images; in tar files their extension; default: the only one, or the one called image.
        label: column of the labels, in a table or in metadata.csv, .jsonl or .parquet beside images; in tar files a
            field of .json, or an extension; default: one that is called label, or of a like name; in tar files .cls.
        size: side in pixels that images are resized and center-cropped to; default: the size they have.
        channels: 1 (grey), 3 (RGB, transparent pixels on white), 4 (RGB and the file's alpha channel, or fourth band,
            unchanged), or the number of bands of TIFF files and arrays that have 2, 5 or more; default: 1 if all are
            grey, the number of bands if most have 2, 5 or more, else 3 (of 64 images that are looked at).
        flip: mirror each image left to right with probability 1/2.
        crop: smallest area of a random crop, as a share of the image's; 1: no random crop.
        limit: largest number of training images, a random subset that is always the same; default: all.
        subset: JSON file of the training images to use: a list of indices, or what `pretrain coreset` wrote; default:
            all.
        range: values of the images that become black and white; values outside are cut off; default: 8 bits, or, of
            other images, what the largest value of those that are looked at needs.
        pages: first: use the first page or frame of images that have several; default: such an image is a bad one.
        held_out: largest number of images to evaluate on: of the test split or, without one, of training images that
            are held out (at most a tenth).
        on_bad_image: what to do with an image that can't be read: stop, or skip and count it.
        workers: processes that decode images beside the training process.
    """

    source: Annotated[str, tyro.conf.arg(aliases=["--data"])] = "fashion-mnist"
    train_split: str | None = None
    test_split: str | None = None
    image: str | None = None
    label: str | None = None
    range: tuple[float, float] | None = None
    pages: Literal["first"] | None = None
    size: int | None = None
    channels: int | None = None
    flip: bool = False
    crop: float = 1.0
    limit: int | None = None
    subset: str | None = None
    held_out: int = 1000
    on_bad_image: Annotated[Literal["stop", "skip"], tyro.conf.arg(aliases=["--on-bad-image"])] = "stop"
    workers: int = 0

    def __post_init__(self) -> None:
        _require(bool(self.source), "data", "images", "an empty name")
        names = (self.train_split, self.test_split, self.image, self.label, self.subset)
        _require("" not in names, "data.train_split, test_split, image, label and subset", "names", "an empty one")
        low, high = self.range or (0, 1)
        _require(-1e30 < low < high < 1e30, "data.range", "LOW and HIGH, LOW below HIGH", self.range)
        _require(self.channels is None or self.channels >= 1, "data.channels", "at least 1", self.channels)
        _require(self.size is None or self.size >= 1, "data.size", "at least 1", self.size)
        _require(0 < self.crop <= 1, "data.crop", "above 0 and at most 1", self.crop)
        _require(self.limit is None or self.limit >= 1, "data.limit", "at least 1", self.limit)
        _require(self.held_out >= 1, "data.held_out", "at least 1", self.held_out)
        _require(self.workers >= 0, "data.workers", "0 or more", self.workers)


@dataclass(frozen=True)
class Pruning:
    """Which samples and noise levels an epoch uses, and with what weight; only with --infobatch or a setting of these.

    Attributes:
        policy: full, random, infobatch, quantile, importance, or the path of a .py file (docs/policies.md); where none
            is known to be best for the objective, a budget alone means importance. Another policy than the recipe's
            discards the recipe's other settings of this section.
        prune_ratio: share that is skipped of the samples whose loss is below the mean, in [0, 1); for infobatch;
            default: 0.5.
        budget: samples used in the whole run as a share of epochs * images, in (0, 1]; for random and importance.
        over: what importance draws non-uniformly; default: both.
        anneal: share of the epochs, the last ones, that use all samples, in [0, 1]; default: 0.125, or 0 with a budget.
        smoothing: weight of a sample's old score in its new one, in [0, 1).
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
    """The optimizer, with a linear warm-up of the learning rate and a cosine decay to 0.

    Attributes:
        name: adamw; or muon for the matrices of the network's blocks and adamw for the rest (Jordan et al. 2024).
        lr: peak learning rate.
        linear_scaling: multiply the learning rate by batch size / 256 (Goyal et al. 2017; `lr` is then the "base
            learning rate" of masked autoencoders).
        betas: decay rates of the running means of the gradient and of its square.
        weight_decay: decoupled weight decay; not applied to biases, norms and other vectors.
        warmup: share of the training in which the learning rate rises.
        clip: largest norm of the gradient; 0: no clipping.
        compensation: an epoch that uses a share k of the samples multiplies the learning rate by k ** -compensation;
            0: unchanged, 1: as much larger as there are fewer steps.
    """

    name: Literal["adamw", "muon"] = "adamw"
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
    """Exponential moving averages (EMA) of the parameters, over progress in [0, 1] instead of steps.

    Attributes:
        halflife: of the EMA that is evaluated and exported, as a share of the training.
        sigma_rel: relative widths of additional power-function EMAs (Karras et al. 2024), up to 0.28; from two, for
            example 0.05 and 0.1, `pretrain ema` reconstructs the EMA of any width after the run.
        snapshots: how many snapshots of those the run writes to its ema/; more make the reconstruction more exact.
    """

    halflife: float = 0.02
    sigma_rel: tuple[float, ...] = ()
    snapshots: int = 16

    def __post_init__(self) -> None:
        _require(0 < self.halflife <= 1, "ema.halflife", "above 0 and at most 1", self.halflife)
        _require(
            all(0 < width <= 0.28 for width in self.sigma_rel) and len({*self.sigma_rel}) == len(self.sigma_rel),
            "ema.sigma_rel",
            "different ones above 0 and at most 0.28",
            self.sigma_rel,
        )
        _require(self.snapshots >= 1, "ema.snapshots", "at least 1", self.snapshots)


@dataclass(frozen=True)
class Evaluate:
    """Metrics and pictures during training; `pretrain evaluate` has the same settings.

    Attributes:
        every: epochs between evaluations; the end of the training is always evaluated.
        at_start: also evaluate the untrained model, for comparison (Hugging Face's `eval_on_start`).
        metrics: names of docs/evaluation.md, or paths of .py files; default: the validation loss, and the k-NN accuracy
            of an encoder if the images have labels.
        images: images in a picture.
        steps: sampling steps of generated images (diffusion).
        guidance: scale of classifier-free guidance for generation with labels; 1: none (diffusion).
        guidance_interval: noise levels sigma, low and high, between which guidance is used (Kynkäänniemi et al. 2024);
            default: all.
        sampler: ddim, euler, heun or dpm++ for metrics of generated images; default: the objective's.
        num_images: number of images that are generated for fid, kid, precision-recall and memorization.
        features: network whose features fid, kid and precision-recall compare: small, inception, another one of
            torch-fidelity's, or a path.
        reference: images that generated ones are compared with, in the form of --data; default: the training images
            (latents are decoded).
        max_reference: at most this many reference images; of more, a random subset, always the same one.
        probe_epochs: epochs of linear-probe, attentive-probe and finetune.
        seeds: number of seeds of random metrics (generated images, the head of a probe), which then have a mean and a
            standard deviation.
    """

    every: int = 5
    at_start: bool = False
    metrics: tuple[str, ...] = ()
    images: int = 64
    steps: int = 25
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
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
        _require(self.sampler in (None, *SAMPLERS), "evaluate.sampler", f"one of {', '.join(SAMPLERS)}", self.sampler)
        _require(self.num_images >= 1, "evaluate.num_images", "at least 1", self.num_images)
        _require(self.reference != "", "evaluate.reference", "images", "an empty name")
        _require(self.max_reference >= 1, "evaluate.max_reference", "at least 1", self.max_reference)
        _require(self.probe_epochs >= 1, "evaluate.probe_epochs", "at least 1", self.probe_epochs)
        _require(self.seeds >= 1, "evaluate.seeds", "at least 1", self.seeds)


@dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are written; one always is at the end of an epoch and on Ctrl-C or SIGTERM.

    Attributes:
        every: optimizer steps between checkpoints inside an epoch; 0: none by the number of steps.
        minutes: minutes between checkpoints inside an epoch; 0: none by time.
        keep: number of newest checkpoints that are kept.
        hours: additionally keep the first checkpoint of each period of this many hours of training; default: none.
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
class Blocking:
    """Partial Forward Blocking (Wu et al., 2025): part of each batch goes through the network's first blocks only.

    Attributes:
        share: of a batch's samples that are blocked, in [0, 1); 0: none.
        method: how those that go on are chosen. unbiased: by random draws, and weighted by one over their probability;
            topk: the most important ones, as published, which changes the objective.
    """

    share: float = 0.0
    method: Literal["unbiased", "topk"] = "unbiased"

    def __post_init__(self) -> None:
        _require(0 <= self.share < 1, "blocking.share", "in [0, 1)", self.share)


@dataclass(frozen=True)
class AdapterSection:
    """The first field of the adapter's section."""

    name: Annotated[str, tyro.conf.arg(aliases=["--adapter"], help="objective: its name, or the path of a .py file")]


@dataclass(frozen=True)
class ModelSection:
    """The first field of the model's section."""

    name: Annotated[str, tyro.conf.arg(aliases=["--model"], help="network: its name, or the path of a .py file")]


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
        output_dir: folder of the run.
        epochs: passes over the data; an epoch counts as one however many samples it skips.
        batch_size: images per optimizer step, over all processes.
        micro_batch: largest number of images per forward pass and process; gradients are accumulated. auto: the largest
            that fits into the device's memory, measured at the start.
        seed: seed of all random numbers.
        infobatch: prune by the recipe's pruning section or, without one, as is best known for the objective
            (docs/policies.md); without it every sample is used with weight 1. Any --pruning.* on the command line
            implies it.
        class_conditional: train with the images' labels as a condition.
        precision: number format of the network's computations; parameters and losses stay float32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        compile: compile the network by torch.compile.
        shard: split parameters, gradients, optimizer and EMAs over the processes (FSDP2), for networks that are too
            large for one device.
        tracker: also log to an experiment tracker of accelerate, for example tensorboard.
        push_to_hub: upload the trained model to this repository on the Hugging Face hub.
        resume: continue from the newest checkpoint of the output folder, or from the one given; auto: from the newest,
            or start if there is none yet, for launchers that start the same command again.
        overwrite: replace the run in the output folder.
        dry_run: print what would be trained, and its cost from a few steps, and leave nothing.
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
    blocking: Blocking = field(default_factory=Blocking)
    optim: Optim = field(default_factory=Optim)
    ema: EMASettings = field(default_factory=EMASettings)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    class_conditional: bool = False
    precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    tracker: str | None = None
    push_to_hub: str | None = None
    resume: str | None = None
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        require_in_range(flat(self.to_dict()))
        _require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        number = self.micro_batch if isinstance(self.micro_batch, int) else 1
        _require(number >= 1, "micro_batch", "at least 1, or auto", number)
        _require(self.seed >= 0, "seed", "0 or more", self.seed)
        if self.blocking.share and (self.policy != "full" or self.compile):
            raise ValueError(
                "blocking.share excludes pruning, because a blocked sample has no score, and compile; leave one out"
            )
        if self.blocking.share and "online-probe" in self.evaluate.metrics:
            raise ValueError(
                "blocking.share excludes evaluate.metrics online-probe, which needs all features of a batch"
            )
        if self.shard and (self.blocking.share or self.micro_batch == "auto" or self.precision == "fp16"):
            raise ValueError("shard excludes blocking.share, micro_batch auto and precision fp16; leave one out")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other: continue the run, or replace it")
        if self.dry_run and self.resume:
            raise ValueError("--dry-run and --resume exclude each other: a dry run begins anew and leaves nothing")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, with linear scaling."""
        return self.optim.lr * (self.batch_size / 256 if self.optim.linear_scaling else 1)

    @property
    def policy(self) -> str:
        """The name of the policy of this run."""
        return self.pruning.policy if self.infobatch else "full"

    def component(self, kind: str) -> Any:
        """The adapter, or the model's config, from its section; `kind` is "adapter" or "model"."""
        section = getattr(self, kind)
        fields = {item.name: getattr(section, item.name) for item in dataclasses.fields(section)}
        return registry.load(kind, fields.pop("name"))(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON, without `resume`, `overwrite` and `dry_run`, which are of one launch only."""
        tree = dataclasses.asdict(self) | {"output_dir": str(self.output_dir)}
        del tree["resume"], tree["overwrite"], tree["dry_run"]
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

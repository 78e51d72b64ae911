"""One run of benchmarks/peers.py, in a process of its own: a program whose steps are timed, and which ends behind them.

    python benchmarks/peer_arms.py SPEC.json SECONDS     SECONDS: time.time() at which the command was started

All programs are timed by the same hook of torch's optimizers. Other projects' scripts run as they are, from the
checkout that the user names; where they need an older library, it is adapted in memory.
"""

import json
import os
import runpy
import sys
import time
import types
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).parents[1]))  # the programs and the package of this checkout


@dataclass(frozen=True)
class Spec:
    """What a process runs.

    Attributes:
        kind: a name in `KINDS`.
        mae: whether it is a masked autoencoder.
        flags: of our program, which define the network.
        data: folder of `peer_inputs.write_images`.
        shape: of the images, (C, H, W).
        folder: for what the program writes.
        record: file to write.
        batch: images per step.
        first: number of steps before the timed ones.
        steps: number of timed steps.
        bf16: whether the network computes in bfloat16.
        compiled: whether it is compiled by torch.compile.
        workers: of the data loader.
        checkout: of the other project, or None.
        sizes: of the vision transformer: width, depth, heads, decoder_width, decoder_depth, decoder_heads, patch.
    """

    kind: str
    mae: bool
    flags: list[str]
    data: str
    shape: tuple[int, int, int]
    folder: str
    record: str
    batch: int
    first: int
    steps: int
    bf16: bool
    compiled: bool
    workers: int
    checkout: str | None
    sizes: dict[str, int]

    def write(self, path: Path) -> None:
        """Write it to a JSON file."""
        path.write_text(json.dumps(asdict(self), indent=1))


class StepClock:
    """Times the steps of torch's optimizers, writes the record after the last one, and ends the process.

    Args:
        spec: what runs.
        started: time.time() at which the command was started.
    """

    def __init__(self, spec: Spec, started: float) -> None:
        self.spec, self.started, self.count = spec, started, 0
        self.images: Callable[[], int] = lambda: self.count * spec.batch
        self.marks: dict[int, dict[str, float]] = {}

    def after_step(self, *_: Any) -> None:
        """Count a step; time the first one, and the first and the last of those that are timed."""
        self.count += 1
        if self.count not in (1, self.spec.first, self.spec.first + self.spec.steps):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks[self.count] = {
            "seconds": time.time() - self.started,
            "cpu_seconds": cpu_seconds(psutil.Process()),
            "images": self.images(),
        }
        if self.count == self.spec.first + self.spec.steps:
            self.finish(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None)

    def finish(self, device_bytes: int | None) -> None:
        """Write the record, and end the process without checkpoints, evaluations and exit handlers."""
        first, last = self.marks[self.spec.first], self.marks[self.spec.first + self.spec.steps]
        timed = {name: last[name] - first[name] for name in last}
        record = {"startup_seconds": self.marks[1]["seconds"], "device_bytes": device_bytes, **timed}
        Path(self.spec.record).write_text(json.dumps(record))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process and its descendants."""
    times = process.cpu_times()
    own = times.user + times.system + times.children_user + times.children_system
    return own + sum(cpu_seconds(child) for child in process.children())


def ours(spec: Spec, clock: StepClock) -> None:
    """Run our program; from the first epoch on it writes no checkpoints."""
    import train_diffusion
    import train_mae
    from pretrain.training.run import Run

    begin_epoch = Run.begin_epoch

    def begin_without_checkpoint(run: Run) -> None:
        clock.images = lambda: run.state.infobatch.samples_used
        setattr(run, "checkpoint", lambda **_: None)  # noqa: B010
        begin_epoch(run)

    setattr(Run, "begin_epoch", begin_without_checkpoint)  # noqa: B010
    sys.argv = ["", *spec.flags, "--output-dir", spec.folder, "--overwrite", *["--compile"] * spec.compiled]
    (train_mae if spec.mae else train_diffusion).run()


def bare(spec: Spec, clock: StepClock) -> None:
    """Run bare_loop.py."""
    import bare_loop
    import numpy as np

    import train_diffusion
    import train_mae
    from pretrain.config.build import build_model
    from pretrain.config.cli import parse

    start = (train_mae if spec.mae else train_diffusion).START
    config = parse(spec.flags, **start, output_dir="", help="")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.from_numpy(np.load(Path(spec.data) / "train.npy")).to(device)
    model, options = build_model(config, spec.shape, 0).to(device), {"bf16": spec.bf16, "compiled": spec.compiled}
    bare_loop.train(model, images, spec.batch, spec.first + spec.steps, mae=spec.mae, **options)


def diffusers(spec: Spec, clock: StepClock) -> None:
    """Run train_unconditional.py; the config of the network is that in `data`/unet."""
    line = ["--train_data_dir", f"{spec.data}/images/train", "--model_config_name_or_path", f"{spec.data}/unet"]
    line += ["--resolution", str(spec.shape[1]), "--center_crop", "--train_batch_size", str(spec.batch)]
    line += ["--num_epochs", "1", "--use_ema", "--ema_max_decay", "0.999", "--learning_rate", "1e-3"]
    line += ["--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--checkpointing_steps", "1000000000"]
    line += ["--dataloader_num_workers", str(spec.workers), "--output_dir", spec.folder]
    line += ["--mixed_precision", "bf16" if spec.bf16 else "no"]
    run_script(f"{spec.checkout}/examples/unconditional_image_generation/train_unconditional.py", line)


def facebook_mae(spec: Spec, clock: StepClock) -> None:
    """Run the model and the engine of facebookresearch/mae, with its optimizer, on images without crops and flips."""
    import numpy as np
    from timm.models import vision_transformer
    from timm.optim import param_groups_weight_decay
    from torchvision import datasets, transforms

    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch.cuda.amp
    block = vision_transformer.Block
    vision_transformer.Block = lambda *arguments, qk_scale=None, **options: block(*arguments, **options)
    sys.modules["torch._six"] = types.ModuleType("torch._six")
    setattr(sys.modules["torch._six"], "inf", float("inf"))  # noqa: B010
    setattr(np, "float", float)  # noqa: B010
    cuda = torch.cuda.is_available()
    torch.cuda.amp.autocast = partial(torch.autocast, "cuda" if cuda else "cpu", torch.bfloat16, enabled=spec.bf16)
    torch.cuda.amp.GradScaler = partial(torch.amp.GradScaler, enabled=False)  # which bfloat16 does not need
    if not cuda:
        torch.cuda.synchronize = lambda: None
    sys.path.insert(0, str(spec.checkout))
    import engine_pretrain  # pyright: ignore[reportMissingImports]
    import models_mae  # pyright: ignore[reportMissingImports]
    from util.misc import NativeScalerWithGradNormCount  # pyright: ignore[reportMissingImports]

    device, sizes = torch.device("cuda" if cuda else "cpu"), spec.sizes
    model = models_mae.MaskedAutoencoderViT(
        img_size=spec.shape[1],
        patch_size=sizes["patch"],
        in_chans=spec.shape[0],
        embed_dim=sizes["width"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        decoder_embed_dim=sizes["decoder_width"],
        decoder_depth=sizes["decoder_depth"],
        decoder_num_heads=sizes["decoder_heads"],
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    ).to(device)
    half = [0.5] * spec.shape[0]
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(half, half)])
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(f"{spec.data}/images/train", transform=transform),
        spec.batch,
        shuffle=True,
        num_workers=spec.workers,
        pin_memory=cuda,
        drop_last=True,
    )
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=1e-3, betas=(0.9, 0.95))
    settings = Namespace(accum_iter=1, mask_ratio=0.75, lr=1e-3, min_lr=0.0, warmup_epochs=1, epochs=2)
    engine_pretrain.train_one_epoch(
        model, loader, optimizer, device, 0, NativeScalerWithGradNormCount(), log_writer=None, args=settings
    )


def transformers(spec: Spec, clock: StepClock) -> None:
    """Run run_mae.py without its crops and flips; the configs of network and images are those in `data`/vit."""
    from torchvision import transforms

    transforms.RandomResizedCrop = lambda size, **_: transforms.Resize(size)
    transforms.RandomHorizontalFlip = lambda: transforms.Lambda(lambda image: image)
    line = ["--dataset_name", "imagefolder", "--train_dir", f"{spec.data}/images/train/**", "--train_val_split", "0.0"]
    line += ["--config_name", f"{spec.data}/vit", "--image_processor_name", f"{spec.data}/vit"]
    line += ["--image_column_name", "image", "--remove_unused_columns", "False", "--label_names", "pixel_values"]
    line += ["--do_train", "--num_train_epochs", "1", "--per_device_train_batch_size", str(spec.batch)]
    line += ["--max_grad_norm", "0", "--save_strategy", "no", "--report_to", "none", "--logging_steps", "1000000"]
    line += ["--dataloader_num_workers", str(spec.workers), "--output_dir", f"{spec.folder}/output"]
    line += ["--bf16"] * spec.bf16 + ["--use_cpu"] * (not torch.cuda.is_available())
    run_script(f"{spec.checkout}/examples/pytorch/image-pretraining/run_mae.py", line)


def run_script(path: str, line: list[str]) -> None:
    """Run a script in this process, as `python path *line` would."""
    sys.argv = [path, *line]
    sys.path[0] = str(Path(path).parent)
    runpy.run_path(path, run_name="__main__")


KINDS: dict[str, Callable[[Spec, StepClock], None]] = {
    "ours": ours,
    "bare": bare,
    "diffusers": diffusers,
    "mae": facebook_mae,
    "transformers": transformers,
}


def main(path: str, started: str) -> None:
    """Run what a file describes.

    Args:
        path: of the JSON file.
        started: time.time() at which the command was started.

    Raises:
        SystemExit: the program ended before its last timed step.
    """
    values = json.loads(Path(path).read_text())
    spec = Spec(**values | {"shape": tuple(values["shape"])})
    clock = StepClock(spec, float(started))
    register_optimizer_step_post_hook(clock.after_step)
    KINDS[spec.kind](spec, clock)
    sys.exit(f"it ended after {clock.count} steps, before the last of {spec.first + spec.steps}")


if __name__ == "__main__":
    main(*sys.argv[1:])

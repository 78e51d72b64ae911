"""Encode a data set once, for a diffusion model of its latents.

    pretrain encode-latents VAE --data ~/photos --data.size 256 --data.flip -o photos-latents
    python train_diffusion.py --data photos-latents

VAE is a folder with an AutoencoderKL or AutoencoderTiny of diffusers, or with a pipeline that has one. What is kept is
the mean and the standard deviation of each image's latent, in float16, so that every visit in training draws a new one;
with --data.flip also those of the mirrored image. A run that was stopped goes on where it was when it is started again.
Under torchrun or `accelerate launch` the processes share the images.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from pretrain.config.schema import Data
from pretrain.config.tyro_parser import run_command
from pretrain.core.errors import UserError

IMAGES = Data()
SHARD = 4096  # images; what a stopped run may have to encode again, on each process


def main(
    vae: tyro.conf.Positional[Path],
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    data: Data = IMAGES,
    batch_size: int = 32,
) -> None:
    """Encode a data set into a folder that --data takes.

    Args:
        vae: folder of a diffusers AutoencoderKL or AutoencoderTiny, or of a pipeline that has one.
        output_dir: new or empty folder, or one that this command has not finished.
        data: which images, and how they are read; `flip` keeps both views of each.
        batch_size: images at once.
    """
    from pretrain.core.console import Display
    from pretrain.data.autoencoder import open_autoencoder
    from pretrain.data.latents import VERSION
    from pretrain.data.sources import open_data
    from pretrain.distributed import launch

    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}")
    if data.crop < 1:
        raise UserError(f"--data.crop {data.crop:g}: a random crop can't be encoded once; leave it out")
    state = launch.join()
    autoencoder, source = open_autoencoder(vae), open_data(data, 0)
    if source.autoencoder is not None:
        raise UserError(f"--data {data.source}: these are latents already; name the images")
    Display(state.is_main_process).say(str(source.report))
    source.train.cache = source.test.cache = None  # each image is read once
    shape = autoencoder.latent_shape(source.shape)
    manifest = {
        "version": VERSION,
        "autoencoder": autoencoder.identity,
        "source": data.source,
        "image": source.shape,
        "shape": shape,
        "moments": (1 + data.flip, 2 if autoencoder.draws else 1),
        "dtype": "float16",
        "classes": source.classes,
        "class_names": source.class_names,
        "images": {"train": len(source.train), "test": len(source.test)},
        "shard": SHARD,
    }
    _check_folder(output_dir, manifest)
    state.wait_for_everyone()  # nobody writes before everybody has looked
    try:
        if state.is_main_process:
            _begin(output_dir, manifest, autoencoder)
        state.wait_for_everyone()
        _encode(source, autoencoder, output_dir, data.flip, batch_size, state)
        state.wait_for_everyone()
        if state.is_main_process:
            Display(True).say(_finish(output_dir, manifest))
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: can't be written to: {error}", local=True) from None
    state.wait_for_everyone()


def _check_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but an unfinished cache of the very same."""
    from pretrain.data.latents import UNFINISHED

    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / UNFINISHED).is_file()):
        raise UserError(f"--output-dir {folder}: it is there already and not an empty folder; name another one")
    if not any(folder.iterdir()):
        return
    try:
        begun = json.loads((folder / UNFINISHED).read_text())
    except ValueError:
        begun = {}
    mine = json.loads(json.dumps(manifest))
    if differing := [name for name in mine if begun.get(name) != mine[name]]:
        raise UserError(
            f"--output-dir {folder}: it holds an unfinished cache with another {', '.join(differing)}; give what it "
            "was begun with, or name another folder"
        )


def _begin(folder: Path, manifest: dict[str, Any], autoencoder: Any) -> None:
    """Make the folder ready."""
    from pretrain.data.latents import UNFINISHED

    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).write_text(json.dumps(manifest, indent=2) + "\n")
    for split in ("train", "test"):
        (folder / split).mkdir(exist_ok=True)
    autoencoder.network.save_pretrained(folder / "vae")


def _encode(source: Any, autoencoder: Any, output_dir: Path, flip: bool, batch_size: int, state: Any) -> None:
    """Write this process's shards, as far as they are not there yet."""
    from pretrain.core.console import Display
    from pretrain.data.loader import RestartingLoader, make_loader

    autoencoder.network.to(state.device)
    display = Display(state.is_main_process)
    work = [
        (images, output_dir / split, number)
        for split, images in (("train", source.train), ("test", source.test))
        for number in range(math.ceil(len(images) / SHARD))
    ]
    for images, folder, number in work[state.process_index :: state.num_processes]:
        path = folder / f"{number:05d}"
        if not path.exists():
            left = [(None, index) for index in range(number * SHARD, min((number + 1) * SHARD, len(images)))]
            with RestartingLoader(
                lambda images=images, left=left: make_loader(images, [*left], batch_size), display.say
            ) as batches:
                _write(_encoded(images, left, batches, autoencoder, flip, state.device), path)
            display.say(f"{path} written")


def _encoded(images: Any, left: list[Any], batches: Any, autoencoder: Any, flip: bool, device: Any) -> Iterator[Any]:
    """A shard's rows; `left` shrinks as they are made."""
    import torch

    from pretrain.data.images import on_device

    for plain, problems in batches:
        del left[: len(plain.index)]
        images.handle(problems)
        batch = on_device(plain, device)
        views = [batch.image, batch.image.flip(-1)] if flip else [batch.image]
        latents = torch.stack([autoencoder.encode(view) for view in views], dim=1).half().cpu()
        for index, label, latent in zip(plain.index.tolist(), plain.label.tolist(), latents, strict=True):
            if index < 0:  # it can't be read
                continue
            if not latent.isfinite().all():
                sentence = f"{images.name_of(index)}: its latent is too large for float16; give the autoencoder that"
                raise UserError(f"{sentence} was trained on such images, with its scaling_factor", local=True)
            yield {"latent": latent.numpy().tobytes(), "path": images.name_of(index), "label": label}


def _write(rows: Iterator[Any], path: Path) -> None:
    """A shard, written beside and renamed, so that it is whole or not there."""
    import datasets

    from pretrain.data.latents import FEATURES

    part = path.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([*rows], features=FEATURES).save_to_disk(part)
    part.rename(path)


def _finish(folder: Path, manifest: dict[str, Any]) -> str:
    """Make the folder a cache, and say what is in it."""
    import datasets
    import numpy as np

    from pretrain.data.latents import MANIFEST, UNFINISHED

    splits = {}
    for split in ("train", "test"):
        shards = [datasets.load_from_disk(path) for path in sorted((folder / split).iterdir())]
        splits[split] = sum(map(len, shards)), sum(file.stat().st_size for file in (folder / split).rglob("*.arrow"))
        if not splits[split][0]:
            raise UserError(f"{folder}: none of the {split} images can be read")
    first: Any = datasets.load_from_disk(folder / "train" / "00000")
    some = first[:256]["latent"]
    moments = np.stack([np.frombuffer(latent, np.float16) for latent in some]).astype(float)
    mean, *deviation = moments.reshape(-1, manifest["moments"][1], math.prod(manifest["shape"])).swapaxes(0, 1)
    std = float((mean.var() + sum((one**2).mean() for one in deviation)) ** 0.5)
    (folder / UNFINISHED).write_text(json.dumps({**manifest, "std": std, "splits": splits}, indent=2) + "\n")
    (folder / UNFINISHED).rename(folder / MANIFEST)
    (train, size), (test, _) = splits["train"], splits["test"]
    left_out = sum(manifest["images"].values()) - train - test
    said = f"{train:,} and {test:,} held-out latents {'x'.join(map(str, manifest['shape']))} in {folder}, "
    said += f"{size / train / 1024:,.1f} KiB an image, standard deviation {std:.2f}"
    said += f"; {left_out} images that can't be read are left out" if left_out else ""
    if not 0.5 < std < 2:
        said += (
            "\nnote: noise schedules are made for a deviation of about 1; correct scaling_factor in the VAE's config"
        )
    return said


def run() -> None:
    """The command."""
    run_command(main, "pretrain encode-latents")

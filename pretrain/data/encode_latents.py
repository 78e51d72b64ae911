"""The command `pretrain encode-latents`: encode a data set once, for training a latent diffusion model.

    pretrain encode-latents VAE --data ~/photos --data.size 256 --data.flip -o photos-latents
    python train_diffusion.py --data photos-latents

VAE is a folder with an AutoencoderKL or AutoencoderTiny of diffusers, or a pipeline that has one. The mean and the
standard deviation of each image's latent are stored in float16, and training samples a new latent in every epoch. With
--data.flip those of the mirrored image are stored, too. A command that was stopped continues at the last shard when it
is started again. Under torchrun or `accelerate launch` the processes share the images.
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
from pretrain.core.files import read_json, require_utf8

DEFAULT_DATA = Data()
SHARD_SIZE = 4096  # images; each process of a stopped command encodes at most so many of them again


def main(
    vae: tyro.conf.Positional[Path],
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    data: Data = DEFAULT_DATA,
    batch_size: int = 32,
) -> None:
    """Encode a data set into a folder of latents, which --data accepts.

    Args:
        vae: folder of a diffusers AutoencoderKL or AutoencoderTiny, or of a pipeline that has one.
        output_dir: new or empty folder, or one that this command has begun and not finished.
        data: the images, and how they are decoded; with `flip` the mirrored images are encoded, too.
        batch_size: images that the autoencoder encodes at once.
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
    require_utf8(output_dir)
    state = launch.join()
    autoencoder, source = open_autoencoder(vae), open_data(data, 0)
    if source.autoencoder is not None:
        raise UserError(f"--data {data.source}: these are latents already; give the images")
    Display(state.is_main_process).print(str(source.report))
    source.train.cache = source.test.cache = None  # each image is read once
    shape = autoencoder.latent_shape(source.shape)
    manifest = {
        "version": VERSION,
        "autoencoder": autoencoder.identity,
        "source": data.source,
        "image": source.shape,
        "shape": shape,
        "moments": (1 + data.flip, 2 if autoencoder.is_variational else 1),
        "dtype": "float16",
        "classes": source.classes,
        "class_names": source.class_names,
        "images": {"train": len(source.train), "test": len(source.test)},
        "shard": SHARD_SIZE,
    }
    _check_folder(output_dir, manifest)
    state.wait_for_everyone()  # no process may write before all have checked the folder
    try:
        if state.is_main_process:
            _create_folder(output_dir, manifest, autoencoder)
        state.wait_for_everyone()
        _encode(source, autoencoder, output_dir, data.flip, batch_size, state)
        state.wait_for_everyone()
        if state.is_main_process:
            Display(True).print(_finish(output_dir, manifest))
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: can't be written to: {error}", local=True) from None
    state.wait_for_everyone()


def _check_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise unless the folder can be written to: it is new, empty, or holds unfinished latents with the same manifest.

    Raises:
        UserError: it is a file, or holds something else.
    """
    from pretrain.data.latents import UNFINISHED

    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / UNFINISHED).is_file()):
        raise UserError(f"--output-dir {folder}: it exists and is not an empty folder; give another one")
    if not any(folder.iterdir()):
        return
    try:
        existing = read_json(folder / UNFINISHED)
    except (OSError, ValueError):
        existing = {}
    new = json.loads(json.dumps(manifest))
    if differing := [name for name in new if existing.get(name) != new[name]]:
        raise UserError(
            f"--output-dir {folder}: it holds unfinished latents with another {', '.join(differing)}; give the "
            "same arguments as before, or another folder"
        )


def _create_folder(folder: Path, manifest: dict[str, Any], autoencoder: Any) -> None:
    """Create the folder with its subfolders, the unfinished manifest and the autoencoder."""
    from pretrain.data.latents import UNFINISHED

    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).write_text(json.dumps(manifest, indent=2) + "\n")
    for split in ("train", "test"):
        (folder / split).mkdir(exist_ok=True)
    autoencoder.network.save_pretrained(folder / "vae")


def _encode(source: Any, autoencoder: Any, output_dir: Path, flip: bool, batch_size: int, state: Any) -> None:
    """Write those shards of this process that do not exist yet."""
    from pretrain.core.console import Display
    from pretrain.data.loader import RestartingLoader, make_loader

    autoencoder.network.to(state.device)
    display = Display(state.is_main_process)
    shards = [
        (images, output_dir / split, number)
        for split, images in (("train", source.train), ("test", source.test))
        for number in range(math.ceil(len(images) / SHARD_SIZE))
    ]
    for images, folder, number in shards[state.process_index :: state.num_processes]:
        path = folder / f"{number:05d}"
        if not path.exists():
            end = min((number + 1) * SHARD_SIZE, len(images))
            remaining = [(None, index) for index in range(number * SHARD_SIZE, end)]
            with RestartingLoader(
                lambda images=images, remaining=remaining: make_loader(images, [*remaining], batch_size), display.print
            ) as batches:
                _write_shard(_encode_rows(images, remaining, batches, autoencoder, flip, state.device), path)
            display.print(f"{path} written")


def _encode_rows(
    images: Any, remaining: list[Any], batches: Any, autoencoder: Any, flip: bool, device: Any
) -> Iterator[Any]:
    """Yield the rows of a shard; the keys of batches that were loaded are removed from `remaining`."""
    import torch

    from pretrain.data.images import on_device

    for loaded, problems in batches:
        del remaining[: len(loaded.index)]
        images.handle(problems)
        batch = on_device(loaded, device)
        views = [batch.image, batch.image.flip(-1)] if flip else [batch.image]
        latents = torch.stack([autoencoder.encode(view) for view in views], dim=1).half().cpu()
        for index, label, latent in zip(loaded.index.tolist(), loaded.label.tolist(), latents, strict=True):
            if index < 0:  # padding: the image can't be read
                continue
            if not latent.isfinite().all():
                raise UserError(
                    f"{images.name_of(index)}: its latent is too large for float16; give an autoencoder that was "
                    "trained on such images, with its scaling_factor",
                    local=True,
                )
            yield {"latent": latent.numpy().tobytes(), "path": images.name_of(index), "label": label}


def _write_shard(rows: Iterator[Any], path: Path) -> None:
    """Write a shard under a temporary name and rename it, so that it is complete or absent."""
    import datasets

    from pretrain.data.latents import FEATURES

    temporary = path.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([*rows], features=FEATURES).save_to_disk(temporary)
    temporary.rename(path)


def _finish(folder: Path, manifest: dict[str, Any]) -> str:
    """Write the final manifest, and return a summary for the user.

    Raises:
        UserError: a split has no readable image.
    """
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
    stored = first[:256]["latent"]
    moments = np.stack([np.frombuffer(latent, np.float16) for latent in stored]).astype(float)
    mean, *deviation = moments.reshape(-1, manifest["moments"][1], math.prod(manifest["shape"])).swapaxes(0, 1)
    std = float((mean.var() + sum((sigma**2).mean() for sigma in deviation)) ** 0.5)
    (folder / UNFINISHED).write_text(json.dumps({**manifest, "std": std, "splits": splits}, indent=2) + "\n")
    (folder / UNFINISHED).rename(folder / MANIFEST)
    (train, size), (test, _) = splits["train"], splits["test"]
    skipped = sum(manifest["images"].values()) - train - test
    message = f"{train:,} and {test:,} held-out latents {'x'.join(map(str, manifest['shape']))} in {folder}, "
    message += f"{size / train / 1024:,.1f} KiB per image, standard deviation {std:.2f}"
    message += f"; {skipped} images that can't be read were skipped" if skipped else ""
    if not 0.5 < std < 2:
        message += (
            "\nnote: noise schedules assume a standard deviation of about 1; correct scaling_factor in the "
            "autoencoder's config"
        )
    return message


def run() -> None:
    """Run the command `pretrain encode-latents`."""
    run_command(main, "pretrain encode-latents")

"""The command `pretrain encode-latents`: encode a data set once, for training a latent diffusion model.

    pretrain encode-latents VAE --data ~/photos --data.size 256 --data.flip -o photos-latents
    python train_diffusion.py --data photos-latents

VAE is a folder with an AutoencoderKL or AutoencoderTiny of diffusers, or a pipeline that has one. The mean and the
standard deviation of each image's latent are stored in float16, and training samples a new latent in every epoch. With
--data.flip those of the mirrored image are stored, too. A command that was stopped continues at the last shard when it
is started again, if the images are the same; a shard of finished latents that is damaged is encoded again. Under
torchrun or `accelerate launch` the processes share the images.
"""

import hashlib
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
from pretrain.core.files import atomic_write, own_folder, read_json, require_plain, require_utf8

DEFAULT_DATA = Data()
NOT_STORED = (
    "source",
    "workers",
    "on_bad_image",
    "subset",
)  # settings that may differ when the command is started again
SPLITS = ("train", "test")
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
        output_dir: new or empty folder, or one that this command has begun and not finished, or that lost shards since.
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
    if data.subset is not None:
        raise UserError(f"--data.subset {data.subset}: latents are encoded of all images; give it to the training")
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
        "settings": {name: value for name, value in vars(data).items() if name not in NOT_STORED},
        "content": _content(source),
    }
    try:
        _check_folder(output_dir, manifest)
        state.wait_for_everyone()  # no process may write before all have checked the folder
        if state.is_main_process:
            _create_folder(output_dir, manifest, autoencoder)
        state.wait_for_everyone()
        _encode(source, autoencoder, output_dir, manifest, batch_size, state)
        state.wait_for_everyone()
        if state.is_main_process:
            Display(True).print(_finish(output_dir, manifest))
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: can't be written to: {error}", local=True) from None
    state.wait_for_everyone()


def _content(source: Any) -> str:
    """SHA-256 of the fingerprints of all images, to notice that they have changed between two starts."""
    from pretrain.data.fingerprint import fingerprints

    return hashlib.sha256(b"".join(marks.numpy().tobytes() for marks in fingerprints(source).values())).hexdigest()


def _check_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise unless the folder can be written to: it is new, empty, or holds latents with the same manifest.

    Raises:
        UserError: it is a file, or holds something else, or its latents are complete.
        OSError: it can't be read, or something in it is a link or not a regular file.
    """
    from pretrain.data.latents import MANIFEST, UNFINISHED

    if not folder.exists():
        return
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [""]
    if not names:
        return
    found = next((name for name in (UNFINISHED, MANIFEST) if name in names), None)
    if found is None:
        raise UserError(f"--output-dir {folder}: it exists and is not an empty folder; name another one, or remove it")
    for name in names:
        require_plain(folder / name)
    try:
        existing = read_json(folder / found)
        existing = existing if isinstance(existing, dict) else {}
    except (OSError, ValueError):
        existing = {}
    new = json.loads(json.dumps(manifest))
    kind = "unfinished latents" if found == UNFINISHED else "finished latents"
    if differing := [name for name in new if existing.get(name) != new[name]]:
        what = "made of other images" if differing == ["content"] else f"with another {', '.join(differing)}"
        raise UserError(
            f"--output-dir {folder}: it holds {kind} {what}, and is not an empty folder; give the same images and "
            "arguments as before, or another folder"
        )
    if found == MANIFEST and not _damaged(folder, existing):
        raise UserError(f"--output-dir {folder}: it holds {kind}; name another folder, or remove it")


def _shards(manifest: dict[str, Any]) -> list[tuple[str, int]]:
    """The split and the number of each shard."""
    counts = {split: math.ceil(images / manifest["shard"]) for split, images in manifest["images"].items()}
    return [(split, number) for split, count in counts.items() for number in range(count)]


def _damaged(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """The shards of finished latents that are missing, have another size than they had, or can't be read."""
    sizes = manifest.get("sizes") or {}
    paths = {f"{split}/{number:05d}": folder / split / f"{number:05d}" for split, number in _shards(manifest)}
    return [path for name, path in paths.items() if not _is_whole(path) or sizes.get(name) not in (None, _size(path))]


def _size(path: Path) -> int:
    """Bytes of the Arrow files of a shard or a split."""
    return sum(file.stat().st_size for file in path.rglob("*.arrow"))


def _is_whole(shard: Path) -> bool:
    """Whether a shard is there and can be read."""
    import datasets

    from pretrain.data.latents import FEATURES

    try:
        table: Any = datasets.load_from_disk(shard)
        return table.features == FEATURES
    except Exception:  # arrow raises exceptions of many types
        return False


def _create_folder(folder: Path, manifest: dict[str, Any], autoencoder: Any) -> None:
    """Create the folder with its subfolders, the unfinished manifest and the autoencoder."""
    from pretrain.data.latents import MANIFEST, UNFINISHED

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / UNFINISHED) as part:
        part.write_text(json.dumps(manifest, indent=2) + "\n")
    if (folder / MANIFEST).exists():  # finished, but for the shards that are made again
        for path in _damaged(folder, read_json(folder / MANIFEST)):
            shutil.rmtree(path, ignore_errors=True)
        (folder / MANIFEST).unlink()
    for split in SPLITS:
        own_folder(folder / split)
    autoencoder.network.save_pretrained(folder / "vae")


def _encode(
    source: Any, autoencoder: Any, output_dir: Path, manifest: dict[str, Any], batch_size: int, state: Any
) -> None:
    """Write those shards of this process that do not exist yet."""
    from pretrain.core.console import Display
    from pretrain.data.loader import RestartingLoader, make_loader

    autoencoder.network.to(state.device)
    display = Display(state.is_main_process)
    for split, number in _shards(manifest)[state.process_index :: state.num_processes]:
        images, path = getattr(source, split), output_dir / split / f"{number:05d}"
        if not _is_whole(path):
            end = min((number + 1) * SHARD_SIZE, len(images))
            remaining = [(None, index) for index in range(number * SHARD_SIZE, end)]
            with RestartingLoader(
                lambda images=images, remaining=remaining: make_loader(images, [*remaining], batch_size), display.print
            ) as batches:
                _write_shard(
                    _encode_rows(images, remaining, batches, autoencoder, source.train.data.flip, state.device), path
                )
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
    shutil.rmtree(path, ignore_errors=True)  # a damaged one
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
    for split in SPLITS:
        shards = [datasets.load_from_disk(path) for path in sorted((folder / split).iterdir())]
        splits[split] = sum(map(len, shards)), _size(folder / split)
        if not splits[split][0]:
            raise UserError(f"{folder}: none of the {split} images can be read")
    first: Any = datasets.load_from_disk(folder / "train" / "00000")
    stored = first[:256]["latent"]
    moments = np.stack([np.frombuffer(latent, np.float16) for latent in stored]).astype(float)
    mean, *deviation = moments.reshape(-1, manifest["moments"][1], math.prod(manifest["shape"])).swapaxes(0, 1)
    std = float((mean.var() + sum((sigma**2).mean() for sigma in deviation)) ** 0.5)
    with atomic_write(folder / UNFINISHED) as part:
        sizes = {
            f"{split}/{number:05d}": _size(folder / split / f"{number:05d}") for split, number in _shards(manifest)
        }
        part.write_text(json.dumps({**manifest, "std": std, "splits": splits, "sizes": sizes}, indent=2) + "\n")
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

"""Generate images with a trained run.

    pretrain generate RUN --num-images 64 --guidance 2 --steps 30 --sampler heun

The noise of image n depends on the seed and n alone. Under torchrun or `accelerate launch` the processes share the
batches; the images are bit-identical on the same kind of device. Another --batch-size may change their rounding.
"""

from pathlib import Path
from typing import Annotated, Any

import tyro

from pretrain.config.tyro_parser import run_command
from pretrain.core.errors import UserError
from pretrain.core.files import own_folder

MAX_PNG = 4  # channels


def main(
    run: tyro.conf.Positional[Path],
    num_images: Annotated[int, tyro.conf.arg(aliases=["--n"])] = 64,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    guide: Path | None = None,
    guide_sigma_rel: float | None = None,
    steps: int = 30,
    sampler: str | None = None,
    label: int | str | None = None,
    sigma_rel: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    output_dir: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> None:
    """Generate images with the EMA model of a run, as files and as one grid.

    Args:
        run: folder of a run of train_diffusion.py.
        num_images: number of images.
        guidance: scale of guidance; 1: none.
        guidance_interval: noise levels sigma, low and high, between which guidance is used (Kynkäänniemi et al. 2024);
            default: all.
        guide: run of a worse model, of a smaller network or a shorter training, that takes the place of the model
            without labels (autoguidance: Karras et al. 2024); default: classifier-free guidance.
        guide_sigma_rel: guide with the power-function EMA of this relative width, of the run itself or of --guide.
        steps: sampling steps.
        sampler: euler, heun (two network calls per step), dpm++, or, for ddpm, ddim; default: ddim for ddpm, euler for
            flow, dpm++ for edm.
        label: class of all images, by number or name; default: class n modulo the number of classes for image n of a
            conditional run.
        sigma_rel: use the power-function EMA of this relative width, made of the run's snapshots; default: the plain
            EMA.
        seed: of the noise.
        batch_size: images per batch.
        output_dir: new or empty folder for grid.png and images/, which contains the images alone (of more than four
            channels as TIFFs); default: RUN/generated.
    """
    import torch

    from pretrain.adapters import Generative
    from pretrain.adapters._sampling import check_sampling, generate
    from pretrain.checkpoint.load_run import load_run
    from pretrain.core.rng import SampleRNG
    from pretrain.data.grid import to_uint8
    from pretrain.distributed import launch

    for name, value, minimum in (
        ("num-images", num_images, 1),
        ("steps", steps, 1),
        ("batch-size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < minimum:
            raise UserError(f"--{name} must be at least {minimum}, got {value}")
    state = launch.join()
    trained = load_run(run, sigma_rel)
    adapter, classes, worse = trained.adapter, trained.classes, _load_guide(trained, guide, guide_sigma_rel)
    if not isinstance(adapter, Generative):
        raise UserError(f"{run}: {type(adapter).__name__} generates no images; it has no method `scheduler`")
    check_sampling(
        adapter, classes, sampler, steps, guidance, interval=guidance_interval, guided_by_labels=worse is None
    )
    label = _class_number(label, trained)
    folder = output_dir or run / "generated"
    files = _new_folder(folder, state, of_run=output_dir is None)
    autoencoder, model = trained.autoencoder, trained.model.to(state.device)
    sampling: dict[str, Any] = {"steps": steps, "sampler": sampler, "autoencoder": autoencoder, "guidance": guidance}
    sampling |= {"guidance_interval": guidance_interval, "guide": worse and worse.model.to(state.device)}
    for start in range(state.process_index * batch_size, num_images, state.num_processes * batch_size):
        number = torch.arange(start, min(start + batch_size, num_images), device=state.device)
        noise = SampleRNG(seed, index=number).normal(*trained.shape)
        labels = number % classes if classes else torch.full_like(number, -1)
        labels = labels if label is None else torch.full_like(number, label)
        images = generate(model, adapter, noise, labels, **sampling)
        for n, image in zip(number.tolist(), to_uint8(images), strict=True):
            write(image, files / f"{n:05d}.{'png' if image.shape[-1] <= MAX_PNG else 'tif'}")
    state.wait_for_everyone()
    if state.is_main_process:
        _write_grid(files, num_images)


def _class_number(label: int | str | None, trained: Any) -> int | None:
    """The number of a class of a run, which is given by number or name.

    Raises:
        UserError: there is no such class.
    """
    classes, names = trained.classes, trained.class_names
    known = f"classes 0 to {classes - 1}" if classes else "no classes"
    if names:
        known += f": {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
    if label in names:
        return names.index(label)
    if isinstance(label, str) or (label is not None and not 0 <= label < classes):
        raise UserError(f"--label {label}: the run has {known}")
    return label


def _write_grid(files: Path, count: int) -> None:
    """Draw the first images of a folder into grid.png beside it, and print where they are."""
    import torch

    from pretrain.core.console import Display
    from pretrain.data.grid import grid

    suffix = next(files.iterdir()).suffix
    shown = [read(files / f"{n:05d}{suffix}") for n in range(min(count, 144))]
    sheet = grid(torch.stack(shown), columns=max(1, round(len(shown) ** 0.5)))
    write(sheet, files.parent / "grid.png")
    Display(True).print(f"{count} images in {files}, the first {len(shown)} in {files.parent / 'grid.png'}")


def _load_guide(trained: Any, guide: Path | None, sigma_rel: float | None) -> Any:
    """The `LoadedRun` of autoguidance, or None.

    Raises:
        UserError: it is not one of the same objective, classes and shape.
    """
    from pretrain.checkpoint.load_run import load_run

    if guide is None and sigma_rel is None:
        return None
    run = trained.folder
    worse = load_run(guide or run, sigma_rel)
    if any(getattr(trained, name) != getattr(worse, name) for name in ("adapter", "classes", "shape")):
        raise UserError(f"--guide {guide}: it must have the objective, classes and shape of {run}; give another run")
    return worse


def _new_folder(folder: Path, state: Any, *, of_run: bool) -> Path:
    """Create the folder of the images; all processes call it.

    Args:
        folder: to create; an empty one is used.
        state: of the processes.
        of_run: whether it is in the folder of a run, which may be someone else's: a link is not followed.

    Raises:
        UserError: the output folder is not empty, or can't be created.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output-dir {folder}: it exists and is not an empty folder; name another one, or remove it")
    state.wait_for_everyone()
    files = folder / "images"
    try:
        if of_run:
            own_folder(folder)
        files.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: can't be written to: {error.strerror}") from None
    return files


def write(image: Any, path: Path) -> None:
    """Write an image, uint8 [H, W, C], to a file: a TIFF if it has more than `MAX_PNG` channels.

    Raises:
        UserError: it can't be written, for example on a full disk.
    """
    import tifffile
    from PIL import Image

    channels = image.shape[-1]
    try:
        if channels > MAX_PNG:
            more = {"planarconfig": "contig", "extrasamples": [0] * (channels - 1)}
            tifffile.imwrite(path, image.numpy(), photometric="minisblack", **more)
        else:
            Image.fromarray(image.squeeze(-1).numpy()).save(path)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error}; the images before it are complete", local=True) from None


def read(path: Path) -> Any:
    """Read an image file as float32 [C, H, W] in [-1, 1]."""
    import tifffile
    import torch
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    if path.suffix == ".tif":
        return torch.from_numpy(tifffile.imread(path)).movedim(-1, 0) / 127.5 - 1
    with Image.open(path) as image:
        return pil_to_tensor(image) / 127.5 - 1


def run() -> None:
    """The command `pretrain generate`."""
    run_command(main, "pretrain generate")

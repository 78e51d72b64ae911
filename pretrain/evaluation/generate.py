"""Generate images with a trained run.

    pretrain generate RUN --num-images 64 --guidance 2 --steps 30 --sampler heun

Image n has the same noise whatever else is generated, so a seed and a number give an image back. Under torchrun or
`accelerate launch` the processes share the batches, and make the same images to the bit on the same kind of device;
another --batch-size may round otherwise.
"""

from pathlib import Path
from typing import Annotated, Any

import tyro

from pretrain.config.tyro_parser import run_command
from pretrain.core.errors import UserError


def main(
    run: tyro.conf.Positional[Path],
    num_images: Annotated[int, tyro.conf.arg(aliases=["--n"])] = 64,
    guidance: float = 1.0,
    steps: int = 30,
    sampler: str | None = None,
    label: int | None = None,
    sigma_rel: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    output_dir: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> None:
    """Generate images with the averaged model of a run, as single files and as one grid.

    Args:
        run: folder of a run of train_diffusion.py.
        num_images: images.
        guidance: classifier-free guidance scale; 1 is none.
        steps: of the sampler.
        sampler: euler, heun (which calls the network twice a step), dpm++, or of ddpm ddim; where not given ddim of
            ddpm, euler of flow, dpm++ of edm.
        label: class of all images; of a conditional run, image n has class n modulo the classes where not given.
        sigma_rel: of the power-function EMA that makes them, from the run's snapshots; the plain average where not
            given.
        seed: of the noise.
        batch_size: images at once.
        output_dir: new or empty folder for grid.png and images/, which holds nothing else, as other programs want it;
            RUN/generated where not given.
    """
    import torch

    from pretrain.adapters import Generative
    from pretrain.adapters._sampling import check_sampling, generate
    from pretrain.checkpoint.load_run import load_run
    from pretrain.core.console import Display
    from pretrain.core.rng import SampleRNG
    from pretrain.data.grid import grid, to_uint8
    from pretrain.distributed import launch

    for name, value, least in (
        ("num-images", num_images, 1),
        ("steps", steps, 1),
        ("batch-size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    state = launch.join()
    trained = load_run(run, sigma_rel)
    adapter, classes = trained.adapter, trained.classes
    if not isinstance(adapter, Generative):
        raise UserError(f"{run}: {type(adapter).__name__} makes no images; name a run of train_diffusion.py")
    check_sampling(adapter, classes, sampler, steps, guidance)
    if label is not None and not 0 <= label < classes:
        raise UserError(f"--label {label}: the run has {f'classes 0 to {classes - 1}' if classes else 'no classes'}")
    folder = output_dir or run / "generated"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output-dir {folder}: it is there already and not an empty folder; name another one")
    state.wait_for_everyone()
    single = folder / "images"
    try:
        single.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: can't be written to: {error.strerror}") from None

    vae, model = trained.autoencoder, trained.model.to(state.device)
    for start in range(state.process_index * batch_size, num_images, state.num_processes * batch_size):
        which = torch.arange(start, min(start + batch_size, num_images), device=state.device)
        noise = SampleRNG(seed, index=which).normal(*trained.shape)
        given = which % classes if classes else torch.full_like(which, -1)
        given = given if label is None else torch.full_like(which, label)
        made = generate(model, adapter, noise, given, steps=steps, guidance=guidance, sampler=sampler, autoencoder=vae)
        for number, image in zip(which.tolist(), to_uint8(made), strict=True):
            write(image, single / f"{number:05d}.png")
    state.wait_for_everyone()
    if state.is_main_process:
        shown = [to_tensor(single / f"{number:05d}.png") for number in range(min(num_images, 144))]
        sheet = grid(torch.stack(shown), columns=max(1, round(len(shown) ** 0.5)))
        write(sheet, folder / "grid.png")
        Display(True).print(f"{num_images} images in {single}, the first {len(shown)} in {folder / 'grid.png'}")


def write(image: Any, path: Path) -> None:
    """Write an image, uint8 [H, W, C].

    Raises:
        UserError: there is no room for it, or the like.
    """
    from PIL import Image

    try:
        Image.fromarray(image.squeeze(-1).numpy()).save(path)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error}; the images before it are kept", local=True) from None


def to_tensor(path: Path) -> Any:
    """An image file as float32 [C, H, W] in [-1, 1]."""
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    with Image.open(path) as image:
        return pil_to_tensor(image) / 127.5 - 1


def run() -> None:
    """The command."""
    run_command(main, "pretrain generate")

"""Pictures of what a masked autoencoder has learned.

    pretrain visualize RUN

writes four sheets about validation images: their reconstructions, the attention of the class token, their nearest
training images, and a map of all of them, coloured by class.
"""

import colorsys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from einops import rearrange, repeat
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import normalize

from pretrain.adapters import Batch, bare
from pretrain.checkpoint.load_run import load_run
from pretrain.config.tyro_parser import run_command
from pretrain.core.console import Display
from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write, own_folder
from pretrain.data.grid import grid
from pretrain.data.images import Images, on_device
from pretrain.data.sources import some_rows
from pretrain.evaluation.context import map_images, some_batch, some_images
from pretrain.evaluation.previews import Reconstructions

MAX_IMAGES = 10_000  # whose features are compared, of each split
NEIGHBOURS = 9  # training images beside each validation image
SIDE, MARGIN = 960, 40  # of the map, in pixels


def main(
    run: tyro.conf.Positional[Path],
    n: Annotated[int, tyro.conf.arg(aliases=["--images"])] = 24,
    output_dir: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> None:
    """Make pictures of what the EMA model of a masked autoencoder's run has learned.

    Args:
        run: folder of a run of train_mae.py.
        n: validation images per sheet.
        output_dir: folder for the pictures; default: RUN/pictures.
    """
    if n < 1:
        raise UserError(f"--n must be at least 1, got {n}")
    trained = load_run(run)
    if not hasattr(bare(trained.model), "encoder") or not hasattr(trained.adapter, "reconstruct"):
        raise UserError(f"{run}: its model is no masked autoencoder; give a run of train_mae.py")
    folder = output_dir or run / "pictures"
    with _writing(folder):
        if output_dir is None:  # the run may be someone else's
            own_folder(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)  # before minutes of computation
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, source = trained.model.to(device), trained.source
    with torch.no_grad():
        train, test = encode(model, source.train, device), encode(model, source.test, device)
        sheets = {
            "reconstructions": Reconstructions(trained.adapter, source.test, n).draw(model),
            "attention": attention_sheet(model, source.test, n),
            "neighbours": neighbour_sheet(source.test, test, source.train, train, n),
            "map": feature_map(*test[:2], source.classes, source.class_names),
        }
    with _writing(folder):
        for name, sheet in sheets.items():
            with atomic_write(folder / f"{name}.png") as part:
                Image.fromarray(sheet.squeeze(-1).numpy()).save(part, "PNG")
    Display(True).print(f"{', '.join(f'{name}.png' for name in sheets)} in {folder}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output-dir {folder}: the pictures can't be written there: {error}") from None


def encode(model: Any, images: Images, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features float32 [N, D], labels int64 [N] (-1: none) and indices int64 [N] of the images, on the CPU."""

    def function(batch: Batch) -> tuple[Tensor, ...]:
        return model.encoder(batch.image).float(), batch.label, batch.index

    feature, label, index = map_images(images, some_images(images, MAX_IMAGES), device, function)
    return feature, label, index


def attention(model: Any, image: Tensor) -> Tensor:
    """Attention weights of the encoder's last block, [B, heads, H', W'] over patches.

    The query is the class token; without one, the mean over all tokens. The weights of a head sum to at most 1, because
    prefix tokens are left out.
    """
    encoder, inputs = model.encoder, []
    block: Any = encoder.blocks[-1].attn
    handle = block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        encoder.forward_features(image)
    finally:
        handle.remove()
    q, k, _ = rearrange(block.qkv(inputs[0]), "b l (n h d) -> n b h l d", n=3, h=block.num_heads)
    weight = (block.q_norm(q) @ block.k_norm(k).transpose(-1, -2) * block.scale).softmax(dim=-1)
    of_query = weight[:, :, 0] if encoder.cls_token is not None else weight.mean(dim=2)
    return rearrange(of_query[..., encoder.num_prefix_tokens :], "b h (y x) -> b h y x", y=model.grid[0])


def attention_sheet(model: Any, images: Images, n: int) -> Tensor:
    """One validation image per row: the image, the attention's mean over heads, and that of up to six heads."""
    batch = on_device(some_batch(images, n), next(model.parameters()).device)
    heads = attention(model, batch.image)
    weight = torch.cat([heads.mean(dim=1, keepdim=True), heads[:, :6]], dim=1)
    weight = weight / weight.amax(dim=(-2, -1), keepdim=True)
    weight = repeat(weight, "b h y x -> b h 1 (y p) (x q)", p=model.patch[0], q=model.patch[1])
    overlay = 0.3 * (batch.image[:, None] + 1) + 1.4 * weight - 1  # bright where the weight is large
    rows = torch.cat([batch.image[:, None], overlay], dim=1)
    return grid(rows.flatten(0, 1), columns=rows.shape[1])


def neighbour_sheet(
    test: Images, test_encoded: tuple[Tensor, ...], train: Images, train_encoded: tuple[Tensor, ...], n: int
) -> Tensor:
    """One validation image per row, and the training images whose features have the largest cosine similarity.

    Args:
        test, train: validation and training images.
        test_encoded, train_encoded: see `encode`.
        n: number of rows.
    """
    shown = some_rows(np.arange(len(test_encoded[0])), n, 0)
    similarity = normalize(test_encoded[0][shown], dim=1) @ normalize(train_encoded[0], dim=1).T
    nearest = similarity.topk(min(NEIGHBOURS, similarity.shape[1]), dim=1).indices
    rows = []
    for index, neighbours in zip(test_encoded[2][shown].tolist(), train_encoded[2][nearest].tolist(), strict=True):
        cells = [test[None, index].image, *(train[None, neighbour].image for neighbour in neighbours)]
        rows += [cells[0], torch.full_like(cells[0], 50), *cells[1:]]
    return grid(torch.stack(rows).float() / 127.5 - 1, columns=2 + nearest.shape[1])


def feature_map(feature: Tensor, label: Tensor, classes: int, names: Sequence[str] = ()) -> Tensor:
    """A scatter plot of the first two principal components of features, with a colour for each class.

    Args:
        feature: float32 [N, D].
        label: int64 [N]; -1: none (grey).
        classes: number of classes.
        names: of the classes, for the legend; default: their numbers.

    Returns:
        A picture, uint8 [H, W, 3].
    """
    centred = (feature - feature.mean(dim=0)).double()
    variance, axes = torch.linalg.eigh(centred.T @ centred)
    place = centred @ axes[:, -2:].flip(1)
    share = (variance[-2:].flip(0) / variance.sum()).tolist()
    place = (place - place.amin(0)) / (place.amax(0) - place.amin(0)).clamp(min=1e-9)
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(picture)
    hues = [colorsys.hsv_to_rgb(number / max(classes, 1), 0.9, 0.75 + 0.2 * (number % 2)) for number in range(classes)]
    colours = [(*(round(255 * part) for part in hue),) for hue in hues]
    for (x, y), of in zip((MARGIN + place * (SIDE - 2 * MARGIN)).tolist(), label.tolist(), strict=True):
        pen.ellipse((x - 3, SIDE - y - 3, x + 3, SIDE - y + 3), fill=colours[of] if of >= 0 else (120, 120, 120))
    caption = f"principal components: horizontal {share[0]:.0%} of the variance, vertical {share[1]:.0%}"
    pen.text((MARGIN, SIDE - 24), caption, fill="black", font_size=16)
    legend = [names[number][:16] if names else f"{number}" for number in range(min(classes, 20))]
    x, y = MARGIN, 2
    for name, colour in zip(legend, colours, strict=False):
        width = int(pen.textlength(name, font_size=16)) + 14
        if x + width > SIDE - MARGIN:
            x, y = MARGIN, y + 18
        pen.text((x, y), name, fill=colour, font_size=16)
        x += width
    return torch.from_numpy(np.array(picture))


def run() -> None:
    """The command `pretrain visualize`."""
    run_command(main, "pretrain visualize")

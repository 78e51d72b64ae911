"""Pictures of what a masked autoencoder has learned.

    pretrain visualize RUN

writes four sheets of held-out images: how it completes them, where its class token looks, which training images it
finds nearest, and a map of all of them, coloured by class.
"""

import colorsys
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from einops import rearrange, repeat
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import normalize

from pretrain.adapters import Batch, bare
from pretrain.checkpoint.load_run import load_run
from pretrain.core.console import Display
from pretrain.core.errors import UserError
from pretrain.data.grid import grid
from pretrain.data.images import Images, on_device
from pretrain.evaluation.context import evenly, over
from pretrain.evaluation.previews import Reconstructed

MOST = 10_000  # images that are compared at most
NEAREST = 9  # training images beside each held-out one
SIDE, MARGIN = 960, 40  # of the map, in pixels


def main(
    run: tyro.conf.Positional[Path],
    n: Annotated[int, tyro.conf.arg(aliases=["--images"])] = 24,
    output_dir: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> None:
    """Draw what the averaged masked autoencoder of a run has learned.

    Args:
        run: folder of a run of train_mae.py.
        n: held-out images on a sheet.
        output_dir: folder for the pictures; RUN/pictures where not given.
    """
    if n < 1:
        raise UserError(f"--n must be at least 1, got {n}")
    trained = load_run(run)
    if not hasattr(bare(trained.model), "encoder") or not hasattr(trained.adapter, "reconstruct"):
        raise UserError(f"{run}: its model is no masked autoencoder; name a run of train_mae.py")
    folder = output_dir or run / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, source = trained.model.to(device), trained.source
    with torch.no_grad():
        known, asked = encoded(model, source.train, device), encoded(model, source.test, device)
        sheets = {
            "reconstructions": Reconstructed(trained.adapter, source.test, n)(model),
            "attention": attention_sheet(model, source.test, n),
            "neighbours": neighbour_sheet(source.test, asked, source.train, known, n),
            "map": feature_map(*asked[:2], source.classes),
        }
    for name, sheet in sheets.items():
        Image.fromarray(sheet.squeeze(-1).numpy()).save(folder / f"{name}.png")
    Display(True).print(f"{', '.join(f'{name}.png' for name in sheets)} in {folder}")


def encoded(model: Any, images: Images, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, D], labels (-1: none) and numbers, int64 [N], of the images, on the CPU."""

    def rows(batch: Batch) -> tuple[Tensor, ...]:
        return model.encoder(batch.image).float(), batch.label, batch.index

    feature, label, index = over(images, evenly(images, MOST), device, rows)
    return feature, label, index


def attention(model: Any, image: Tensor) -> Tensor:
    """Where the last block of the encoder looks, [B, heads, H', W'] over patches, each summing to at most 1.

    From its class token; where it has none, from all patches on average.
    """
    encoder, inputs = model.encoder, []
    block: Any = encoder.blocks[-1].attn
    handle = block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        encoder.forward_features(image)
    finally:
        handle.remove()
    q, k, _ = rearrange(block.qkv(inputs[0]), "b l (n h d) -> n b h l d", n=3, h=block.num_heads)
    weight = (block.q_norm(q) @ block.k_norm(k).transpose(-1, -2) * block.scale).softmax(dim=-1)
    looked = weight[:, :, 0] if encoder.cls_token is not None else weight.mean(dim=2)
    return rearrange(looked[..., encoder.num_prefix_tokens :], "b h (y x) -> b h y x", y=model.grid[0])


def attention_sheet(model: Any, images: Images, n: int) -> Tensor:
    """Held-out images, one a row: itself, where the mean of the heads looks, and where each of up to six does."""
    batch = on_device(next(images.batches(range(len(images)), n)), next(model.parameters()).device)
    heads = attention(model, batch.image)
    looked = torch.cat([heads.mean(dim=1, keepdim=True), heads[:, :6]], dim=1)
    looked = looked / looked.amax(dim=(-2, -1), keepdim=True)
    looked = repeat(looked, "b h y x -> b h 1 (y p) (x q)", p=model.patch[0], q=model.patch[1])
    lit = 0.3 * (batch.image[:, None] + 1) + 1.4 * looked - 1  # bright where it looks, the image behind it
    rows = torch.cat([batch.image[:, None], lit], dim=1)
    return grid(rows.flatten(0, 1), columns=rows.shape[1])


def neighbour_sheet(asked: Images, one: tuple[Tensor, ...], known: Images, other: tuple[Tensor, ...], n: int) -> Tensor:
    """Held-out images, one a row, and the training images that are nearest by the cosine of their features."""
    near = normalize(one[0][:n], dim=1) @ normalize(other[0], dim=1).T
    near = near.topk(min(NEAREST, near.shape[1]), dim=1).indices
    rows = []
    for index, beside in zip(one[2][:n].tolist(), other[2][near].tolist(), strict=True):
        cells = [asked[None, index].image, *(known[None, number].image for number in beside)]
        rows += [cells[0], torch.full_like(cells[0], 50), *cells[1:]]
    return grid(torch.stack(rows).float() / 127.5 - 1, columns=2 + near.shape[1])


def feature_map(feature: Tensor, label: Tensor, classes: int) -> Tensor:
    """A picture, uint8 [H, W, 3], of features [N, D] by their two principal components; a colour for each class."""
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
    said = f"principal components: across {share[0]:.0%} of the variance, up {share[1]:.0%}"
    pen.text((MARGIN, SIDE - 24), said, fill="black", font_size=16)
    for number, colour in enumerate(colours[:20]):
        pen.text((MARGIN + 44 * number, 10), f"{number}", fill=colour, font_size=22)
    return torch.tensor(list(picture.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)


def run() -> None:
    """The command."""
    tyro.cli(main, prog="pretrain visualize", args=sys.argv[1:])

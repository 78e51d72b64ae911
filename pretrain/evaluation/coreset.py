"""Selecting a coreset: a subset of the training images, by the features of an encoder.

    pretrain coreset RUN --keep 0.3 --method stratified -o subset.json
    python train_mae.py --data.subset subset.json

The methods are in `pretrain.data.coresets`, the file's format in `pretrain.data.subset`.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import psutil
import torch
import tyro
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize

from pretrain.adapters import Batch, bare
from pretrain.checkpoint.load_run import LoadedRun, load_run
from pretrain.config.tyro_parser import run_command
from pretrain.core.console import Display
from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write
from pretrain.data import coresets
from pretrain.data.fingerprint import digest
from pretrain.data.images import Images
from pretrain.data.subset import describe, read_subset
from pretrain.evaluation.context import map_images

METHODS = {  # the function, whether it is biased over seeds, and multiplications for N samples of D numbers, K kept
    "kcenter": (coresets.kcenter, True, lambda N, K, D: N * K * D),
    "graphcut": (coresets.graphcut, False, lambda N, K, D: N * N * D / 2),
    "stratified": (coresets.stratified, False, lambda N, K, D: N * min(K, 256) * D),
}
MAX_PRODUCTS = 2e13  # multiplications: an hour or so of a few CPU cores
COPIES = 3  # of the features, that a method has in memory


def main(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN|FEATURES")],
    keep: float,
    method: Literal["random", "kcenter", "graphcut", "stratified"],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    seed: int = 0,
) -> None:
    """Select a subset of the training images, for --data.subset of the training programs.

    random: a uniform subset. stratified: some of every k-means cluster, with weights that make the subset unbiased for
    all images. graphcut: the same share of each of the bins of Dataset Quantization (Zhou et al. 2023). kcenter: greedy
    farthest points (Sener and Savarese 2018), a biased subset. A training never sees the other images.

    Args:
        source: folder of a run, for all training images of its data set (features of its EMA encoder, scaled to length
            1; random needs none, so any run will do); or features [N, D] of all training images in their order, as a
            .npy or .safetensors file (used as they are).
        keep: share of the images that is kept, above 0 and at most 1.
        method: of the selection.
        output: JSON file to write.
        seed: of all random draws.
    """
    if not 0 < keep <= 1:
        raise UserError(f"--keep must be above 0 and at most 1, got {keep:g}")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed must be 0 or more, and below 2^63, got {seed}")
    if source.is_dir():
        trained = load_run(source)
        images = trained.whole_source.train
        size, document = len(images), {"data": trained.config.data.source}
        feature, known = (None, None) if method == "random" else encode(trained, images, source)
    else:
        images, known, document = None, None, {"data": None}
        feature = read_features(source)
        size = len(feature)
    candidates = torch.arange(size) if known is None else known
    count = max(1, round(keep * len(candidates)))
    found = _select(method, feature, len(candidates), count, seed)
    index, order = candidates[found.index].sort()
    document = {
        "made_of": str(source),
        **document,
        "fingerprint": digest(images, index.numpy()) if images is not None else "",
        "size": size,
        "method": method,
        "keep": keep,
        "seed": seed,
        "biased": METHODS[method][1] if method in METHODS else False,
        "indices": index.tolist(),
    }
    if found.weights is not None:
        document["weights"] = found.weights[order].tolist()
    try:
        with atomic_write(output) as part:
            part.write_text(json.dumps(document) + "\n")
    except OSError as error:
        raise UserError(f"--output {output}: it can't be written: {error}") from None
    Display(True).print(describe(read_subset(output, size).to_dict()))


def _select(method: str, feature: Tensor | None, size: int, count: int, seed: int) -> coresets.Coreset:
    if method == "random" or feature is None:
        return coresets.random(size, count, seed)
    function, _, products = METHODS[method]
    if (cost := products(size, count, feature.shape[1])) > MAX_PRODUCTS:
        raise UserError(
            f"--method {method}: {count:,} of {size:,} samples with {feature.shape[1]:,} features need {cost:.0e} "
            f"multiplications, and {MAX_PRODUCTS:.0e} are the limit; use stratified or random, or fewer features"
        )
    return function(feature, count, seed)


def encode(trained: LoadedRun, images: Images, source: Path) -> tuple[Tensor, Tensor]:
    """Features float32 [n, D] of length 1, as k-NN compares them, and indices int64 [n] of the images that can be read.

    Raises:
        UserError: the model has no encoder, or there is not enough memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder: Any = getattr(bare(trained.model), "encoder", None)
    if encoder is None:
        raise UserError(
            f"{source}: its model has no encoder; give a run of train_mae.py, a file of features, or --method random"
        )
    encoder.to(device)

    def function(batch: Batch) -> tuple[Tensor, Tensor]:
        return normalize(encoder(batch.image).float(), dim=1), batch.index

    if width := getattr(encoder, "num_features", 0):
        require_memory(len(images), width, source)
    feature, index = map_images(images, range(len(images)), device, function)
    _require_finite(feature, source)
    return feature, index


def read_features(file: Path) -> Tensor:
    """Features of a .npy or .safetensors file, float32 [N, D].

    Raises:
        UserError: it can't be read, or has no such array.
    """
    if not file.is_file() or file.suffix not in (".npy", ".safetensors"):
        raise UserError(f"{file}: it is neither the folder of a run nor a .npy or .safetensors file; give one of them")
    try:
        if file.suffix == ".npy":
            array = np.load(file, mmap_mode="r", allow_pickle=False)
            if array.dtype.kind not in "fiu":
                raise UserError(f"{file}: features must be real numbers, got {array.dtype}")
            _require_shape(array.shape, file)
            feature = torch.from_numpy(array.astype(np.float32))
        else:
            with safe_open(file, framework="pt") as tensors:
                names = [*tensors.keys()]
                name = "features" if "features" in names else names[0] if len(names) == 1 else None
                if name is None:
                    raise UserError(f"{file}: it has {len(names)} tensors; give one, or call one of them features")
                _require_shape(tuple(tensors.get_slice(name).get_shape()), file)
                feature = tensors.get_tensor(name)
                if feature.is_complex() or feature.dtype == torch.bool:
                    raise UserError(f"{file}: features must be real numbers, got {feature.dtype}")
                feature = feature.float()
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: its features can't be read: {' '.join(str(error).split())}") from None
    _require_finite(feature, file)
    return feature


def _require_shape(shape: tuple[int, ...], source: Path) -> None:
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{source}: features must have the shape [N, D], one row per training image, got {[*shape]}")
    require_memory(*shape, source)


def require_memory(size: int, width: int, source: Path) -> None:
    """Check that features float32 [size, width] and what the methods copy of them fit into memory.

    Raises:
        UserError: they don't.
    """
    needed, available = COPIES * 4 * size * width, psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"{source}: {size:,} samples with {width:,} features need {needed / 1024**3:.1f} GiB of memory, and "
            f"{available / 1024**3:.1f} GiB are available; use fewer features, or --method random"
        )


def _require_finite(feature: Tensor, source: Path) -> None:
    bad = ~feature.isfinite().all(1)
    if bad.any():
        raise UserError(f"{source}: the features of sample {int(bad.int().argmax())} are not finite; repair them")


def run() -> None:
    """The command `pretrain coreset`."""
    run_command(main, "pretrain coreset")

"""The savings that papers claim, what of each works here, and what was measured, from the records in results/.

python benchmarks/claims.py      # writes benchmarks/results/claims.md
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import proof
from matched_quality import Arm
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
HEAD = """# Published claims and what was measured here

Made by `python benchmarks/claims.py` from the records. *Used* and *FLOPs* are shares of full training's: samples with a
backward pass, and training FLOPs with all overheads. *Ratio* is the FLOPs over those that ordinary training, shortened
and at its best learning rate, needs for the same quality: below 1 the method saves. *Rates* is the number of learning
rates at which the method was trained; its row is the best of them, in the interval of each draw anew, which flatters a
method with several. A random subset is another one in each epoch, except under coresets. *Gain* is by how much the
metric is better than that of ordinary training, shortened to the same FLOPs: where more training hardly helps, ratios
are wide, and this is the number to read. *Unbiased*: the expected gradient is that of the full data set, in a network
without batch norm. [benchmarks/README.md](../README.md) defines ratio and interval; each comparison's own table, with
all metrics, is `results/NAME/table.md`, and `results/NAME/commands.sh` makes its records. The FLOPs of coresets are
without those of the masked autoencoder by whose features they were chosen, as many as full training's. The published
numbers are of other, mostly larger, data sets and networks, and compare with full training, not with shortened.

"""
METHODS = {  # by arm, up to the first "@": the name in the table, and whether it is unbiased for the full data set
    "random": ("a random subset", True),
    "infobatch": ("InfoBatch", True),
    "quantile": ("InfoBatch, quantiles", True),
    "importance": ("importance (ours)", True),
    "samples": ("importance over samples (ours)", True),
    "orderdp": ("OrderDP", False),
    "seta": ("SeTa", False),
    "ies": ("IES", False),
    "selective-backprop": ("Selective-Backprop", False),
    "topk": ("Partial Forward Blocking", False),
    "unbiased": ("Partial Forward Blocking with weights (ours)", True),
    "nonzero": ("GRPO without the completions of advantage 0", True),
    "cppo": ("CPPO", False),
    "dppo": ("DPPO", True),
    "proportional": ("completions in proportion to advantage (ours)", True),
    "stratified": ("coreset, stratified by k-means, weighted", True),
    "graphcut": ("coreset, Dataset Quantization's bins", True),
    "kcenter": ("coreset, k-center", False),
}


class Claim(NamedTuple):
    """A group of rows of the table.

    Attributes:
        task: what is trained.
        published: the claims, with their papers.
        command: that trains this here.
        folder: of the comparison in `RESULTS`.
        metric: by which the ratio is measured.
        arms: of the comparison.
    """

    task: str
    published: str
    command: str
    folder: str
    metric: str
    arms: tuple[str, ...]


CLASSIFIERS = (
    "infobatch",
    "quantile",
    "importance@0.7",
    "orderdp@0.7",
    "seta",
    "ies",
    "selective-backprop@0.7",
    "topk@0.6",
    "unbiased@0.6",
)
CLAIMS = (
    Claim(
        "Diffusion, noise prediction",
        "InfoBatch (Qin et al., ICLR 2024): 27 % less for a latent diffusion model",
        "train_diffusion.py --config benchmarks/recipes/dit.yaml --pruning.policy infobatch",
        "dit",
        "validation_loss",
        ("infobatch", "importance@0.65"),
    ),
    Claim(
        "Masked autoencoder",
        "InfoBatch: 24.8 % less",
        "train_mae.py --config benchmarks/recipes/mae.yaml --pruning.policy infobatch",
        "mae",
        "validation_loss",
        ("infobatch", "samples@0.65"),
    ),
    Claim(
        "Classification, 4,000 images for 10 epochs",
        "InfoBatch: 40 % less on CIFAR-10, CIFAR-100 and ImageNet-1K. OrderDP (ICLR 2026): over 40 %. SeTa (CVPR "
        "2025): up to 50 %. IES (ICLR 2025): 10 to 50 % of the backward passes. Partial Forward Blocking (Wu et al., "
        "ICCV 2025): 33 % less time and 0.5 % more accuracy, ResNet-50 on ImageNet-1K",
        "examples/classification.py --config benchmarks/recipes/classification.yaml",
        "classification",
        "accuracy",
        CLASSIFIERS,
    ),
    Claim(
        "Classification, 1,500 images for 50 epochs, where 12 suffice",
        "the same",
        "examples/classification.py --config benchmarks/recipes/classification_long.yaml",
        "classification_long",
        "accuracy",
        CLASSIFIERS,
    ),
    Claim(
        "Classification, long-tailed",
        "Partial Forward Blocking: rare samples go on",
        "examples/classification.py --config benchmarks/recipes/classification_long_tail.yaml",
        "classification_long_tail",
        "accuracy",
        ("infobatch", "topk@0.6", "unbiased@0.6"),
    ),
    Claim(
        "Semantic segmentation",
        "InfoBatch: 40 % less on ADE20K",
        "examples/segmentation.py --config benchmarks/recipes/segmentation.yaml",
        "segmentation",
        "mean_iou",
        ("infobatch", "quantile", "importance@0.7"),
    ),
    Claim(
        "Instruction tuning",
        "InfoBatch: 20 % less for LoRA of a LLaMA, after a coreset",
        "examples/language.py --config benchmarks/recipes/language.yaml",
        "language",
        "validation_loss",
        ("infobatch", "quantile", "importance@0.7"),
    ),
    Claim(
        "Reinforcement learning of a language model",
        "DPPO (Zhu et al., ICML 2026): 2.37 times faster than GRPO. CPPO (Lin et al., NeurIPS 2025): up to 7.98 times",
        "examples/group_policy.py --pruning.rule dppo --pruning.prompts 0.5",
        "grpo",
        "expected_reward",
        ("nonzero", "cppo@0.5", "dppo@0.5", "proportional@0.5"),
    ),
    Claim(
        "Coreset of 30 %, masked autoencoder",
        "InfoBatch: composes with Dataset Quantization (Zhou et al., ICCV 2023)",
        "train_mae.py --config benchmarks/recipes/coreset.yaml --data.subset runs/coresets/graphcut-0.json",
        "coreset",
        "validation_loss",
        (
            "stratified",
            "graphcut",
            "kcenter",
            *(f"{way}-pruned" for way in ("random", "stratified", "graphcut", "kcenter")),
        ),
    ),
)
RANDOM = ("random@0.65", "random@0.7", "random@0.5", "random")


def method_of(arm: str) -> tuple[str, str]:
    """A method's name, and whether its objective is that of the full data set."""
    word = arm.partition("@")[0].partition(" ")[0]
    name, unbiased = METHODS[word.removesuffix("-pruned")]
    return name + ", InfoBatch inside" * word.endswith("-pruned"), "unbiased" if unbiased else "biased"


def without_rate(name: str) -> str:
    """An arm's name without its learning rate and compensation: infobatch for "infobatch lr*0.70 lr^0.5"."""
    return re.sub(r"( lr[*^][\d.]+)+$", "", name)


def rows_of(claim: Claim) -> list[list[str]]:
    """The rows of a claim.

    Raises:
        KeyError: the comparison has no arm of a name.
    """
    found, _ = proof.read(RESULTS / claim.folder)
    arms: dict[str, list[Arm]] = {}  # by name without learning rate
    for arm in found.arms:
        arms.setdefault(without_rate(arm.name), []).append(arm)
    full = max(arm.cost["samples_used"] for arm in found.baseline)
    rows = []
    random = [name for name in RANDOM if name in arms][:1]
    for name in [*random, *claim.arms]:
        best = found.best(arms[name], claim.metric)
        used, seeds = f"{best.cost['samples_used'] / full:.2f}", str(len(best.quality[claim.metric]))
        ratio = found.ratio(arms[name], found.base, claim.metric)
        if best.cost["flops"] >= 0.995 * found.full["flops"]:
            ratio = "left nothing out"
        share, rates = found.share(best, "flops"), str(len(arms[name]))
        gain = found.gain(arms[name], found.base, claim.metric)
        rows.append([*method_of(name), used, share, seeds, rates, ratio, gain])
    return rows


def restoration() -> str:
    """The section on N:M subnetworks, whose saving is of inference: quality at forward FLOPs."""
    runs = [json.loads(path.read_text())["arms"] for path in sorted((RESULTS / "restoration").glob("seed-*.json"))]
    rows = []
    for arm in runs[0] if runs else ():
        values = [run[arm]["psnr"] for run in runs]
        difference = [run[arm]["psnr"] - run["narrow"]["psnr"] for run in runs]
        spread = f"{np.mean(difference):+.2f} ± {np.std(difference, ddof=1):.2f}" if arm != "narrow" else ""
        flops = f"{np.mean([run[arm]['flops'] for run in runs]) / 1e6:.1f}"
        rows.append([arm, flops, f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}", spread])
    head = ["network", "forward MFLOPs", "PSNR (dB)", "minus the narrower dense network's"]
    body = proof.markdown(head, rows) if rows else "Not measured yet.\n"
    return (
        "## Restoration by N:M subnetworks\n\nPublished: ClassPruning (Zhou et al., 2022), about 40 % of the forward "
        "FLOPs saved at the same quality. Here: `python examples/restoration.py`, denoising. This saves inference, not "
        f"training, and in practice only where a kernel for N of M exists (2 of 4 on a GPU). {len(runs)} seeds, mean ± "
        f"standard deviation.\n\n{body}"
    )


def table() -> str:
    """The whole document."""
    parts = [HEAD]
    columns = ["method", "objective", "used", "FLOPs", "seeds", "rates", "ratio", "gain"]
    for claim in CLAIMS:
        text = f"## {claim.task}\n\nPublished: {claim.published}. Here: `python {claim.command}`, by "
        text += f"{proof.plain(claim.metric)} (`results/{claim.folder}`).\n\n"
        measured = (RESULTS / claim.folder / "records").is_dir()
        rows = proof.markdown(columns, rows_of(claim)) if measured else "Not measured yet.\n"
        parts.append(text + rows + "\n")
    return "".join(parts) + restoration()


if __name__ == "__main__":
    (RESULTS / "claims.md").write_text(table())
    Console().print(f"wrote {RESULTS / 'claims.md'}", soft_wrap=True)

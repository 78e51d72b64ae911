"""What choosing levels by importance promises under each objective: the variance of its gradient, and what is default.

    python benchmarks/levels.py          # trains a small network with each objective, minutes; writes results/levels.md
    python benchmarks/levels.py --table-only  # the table alone, from the numbers in results/levels

gradient_variance.py defines the numbers; recipes/dit.yaml and recipes/epsilon.yaml have the networks and data.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import proof
import tyro
from rich.console import Console

from pretrain.config.cli import parse
from pretrain.core.errors import UserError, exit_on_user_error

ROOT = Path(__file__).parents[1]
NUMBERS = ROOT / "benchmarks" / "results" / "levels"
COSINE = "--adapter.noise-schedule squaredcos_cap_v2"
V = "--adapter.prediction v_prediction"
RUNS = {  # recipe and flags
    "dit-epsilon-linear": ("dit", ""),
    "dit-epsilon-cosine": ("dit", COSINE),
    "dit-epsilon-cosine-min-snr": ("dit", f"{COSINE} --adapter.min-snr 5"),
    "dit-sample-cosine": ("dit", f"{COSINE} --adapter.prediction sample"),
    "dit-v-linear": ("dit", V),
    "dit-v-cosine": ("dit", f"{COSINE} {V}"),
    "dit-v-cosine-min-snr": ("dit", f"{COSINE} {V} --adapter.min-snr 5"),
    "dit-edm": ("dit", "--adapter edm"),
    "dit-flow": ("dit", "--adapter flow"),
    "dit-flow-logit-normal": ("dit", "--adapter flow --adapter.times logit_normal"),
    "dit-flow-shift3": ("dit", "--adapter flow --adapter.shift 3"),
    "dit-flow-posterior-mean": ("dit", "--adapter flow --adapter.posterior-mean"),
    "dit-flow-sample": ("dit", "--adapter flow --adapter.prediction sample"),
    "unet-epsilon-linear": ("epsilon", "--adapter.noise-schedule linear --epochs 10"),
    "unet-epsilon-cosine": ("epsilon", "--epochs 10"),
    "unet-epsilon-cosine-min-snr": ("epsilon", "--adapter.min-snr 5 --epochs 10"),
    "unet-v-linear": ("epsilon", f"--adapter.noise-schedule linear {V} --epochs 10"),
    "unet-v-cosine": ("epsilon", f"{V} --epochs 10"),
    "unet-v-cosine-min-snr": ("epsilon", f"{V} --adapter.min-snr 5 --epochs 10"),
    "unet-edm": ("epsilon", "--adapter edm --epochs 10"),
    "unet-flow": ("epsilon", "--adapter flow --epochs 10"),
    "unet-flow-logit-normal": ("epsilon", "--adapter flow --adapter.times logit_normal --epochs 10"),
    "unet-flow-shift3": ("epsilon", "--adapter flow --adapter.shift 3 --epochs 10"),
    "unet-flow-posterior-mean": ("epsilon", "--adapter flow --adapter.posterior-mean --epochs 10"),
}
HEAD = """# Levels by importance under each objective

Made by `python benchmarks/levels.py`: one run without pruning of each objective; then, at its last parameters, the
variance of the weighted gradient if levels are drawn by importance over that if they are drawn uniformly, at equal
cost, with a 95 % interval over images. Below 1 choosing levels promises a saving. *Preconditioned*: each coordinate in
units of Adam's running squares. *Best possible*: the least that any fixed density of levels could have. Trainings
beside shortened training tested four rows of the DiT: the preconditioned 0.50 of the linear schedule became a cost of
0.70 to 0.77 (levels alone), the 0.70 of the cosine one 0.79 to 0.90 (images and levels), the 0.80 of velocities with
min-SNR 0.82 [0.76, 0.90] and the 0.90 of EDM 0.95 [0.84, 1.06] (levels alone). So a number near 0.9 promises little.
`--infobatch` alone chooses levels by importance where the preconditioned number is 0.9 or less for the DiT. For flow
matching with posterior means the UNet's is 0.96; there training with Muon decided, which is 0.90 [0.88, 0.94] of
shortened training at one of four learning rates. `RUNS` in levels.py has the recipe and flags of each row.

"""


def measure(name: str) -> None:
    """Train with an objective, and measure the variance; a training that was stopped continues.

    Args:
        name: of `RUNS`.

    Raises:
        UserError: a program failed; its own message stands above.
    """
    recipe, flags = RUNS[name]
    folder = ROOT / "runs" / "levels" / name
    train = ["train_diffusion.py", "--config", f"benchmarks/recipes/{recipe}.yaml", "--output-dir", str(folder)]
    variance = ["benchmarks/gradient_variance.py", str(folder), "--output", str(NUMBERS / f"{name}.json")]
    for command in ([*train, "--resume", "auto", *shlex.split(flags)], variance):
        if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            raise UserError(f"{shlex.join(command)} failed; see above")


def default(name: str) -> str:
    """What --infobatch alone is for the objective of a run."""
    recipe, flags = RUNS[name]
    words = ["--config", str(ROOT / f"benchmarks/recipes/{recipe}.yaml"), "--infobatch", *shlex.split(flags)]
    return parse(words, adapter="ddpm", model="unet", recipe=Path(), output_dir="runs", help="").policy


def table() -> str:
    """The whole document."""
    rows = []
    for name in RUNS:
        file = NUMBERS / f"{name}.json"
        found = json.loads(file.read_text()) if file.is_file() else None
        cells = ["not measured"] * 3
        if found:
            both, best = found["levels"], found["best possible choice of levels"]
            cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*figures) for figures in (*both, best[1])]
        network, _, objective = name.partition("-")
        rows.append([{"dit": "DiT", "unet": "UNet"}[network], objective.replace("-", " "), *cells, default(name)])
    head = [
        "network",
        "objective",
        "variance",
        "preconditioned",
        "best possible, preconditioned",
        "`--infobatch` alone",
    ]
    return HEAD + proof.markdown(head, rows)


def main(table_only: bool = False) -> None:
    """Measure what is missing, and write the table.

    Args:
        table_only: measure nothing.
    """
    NUMBERS.mkdir(parents=True, exist_ok=True)
    for name in RUNS:
        if not table_only and not (NUMBERS / f"{name}.json").is_file():
            measure(name)
    (NUMBERS.parent / "levels.md").write_text(table())
    Console().print(f"wrote {NUMBERS.parent / 'levels.md'}", soft_wrap=True)


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(main)

"""The commands that make a comparison's records, read from the records: `commands.sh` beside each table.

proof.py writes it together with the table.
"""

import shlex
from collections.abc import Sequence
from typing import Any

HEAD = """# Makes the records of {name}: bash benchmarks/results/{name}/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.
"""


def commands(name: str, records: Sequence[dict[str, Any]]) -> str:
    """A script of `compare.py` or `compare_examples.py` that makes the records and no others.

    Args:
        name: of the comparison.
        records: of its runs, in the order of their names. Those whose note says that today's code can't make them are
            left out.
    """
    seeds: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for record in records:
        if not record.get("note", "").startswith("made before"):
            seeds.setdefault((_start(name, record), _arm(record)), []).append(record["seed"])
    lines: dict[tuple[tuple[str, ...], tuple[int, ...]], list[str]] = {}
    for (start, arm), found in seeds.items():
        lines.setdefault((start, tuple(sorted(found))), []).append(arm)
    script = HEAD.format(name=name)
    for (start, numbers), arms in sorted(lines.items(), key=lambda line: (-len(line[0][1]), line[0])):
        script += f"\n{shlex.join(start)} --seeds {' '.join(map(str, numbers))} --arms"
        script += "".join(f" \\\n  {arm}" for arm in arms) + "\n"
    return script


def _arm(record: dict[str, Any]) -> str:
    """The arm, as `--arms` takes it."""
    flags = shlex.join(record["flags"])
    return '"{}"'.format(f"{record['arm']}={flags}") if flags else record["arm"]


def _start(name: str, record: dict[str, Any]) -> tuple[str, ...]:
    """The command up to seeds and arms."""
    _, program, *words = shlex.split(record["command"])
    common = words[: len(words) - len(record["flags"]) - 4]  # the command ends with the arm, the seed and the output
    config, rest = (common[:2], common[2:]) if common[:1] == ["--config"] else ([], common)
    output = ["--output-dir", f"runs/compare/{name}"]
    note = ["--note", record["note"]] if record.get("note") else []
    if program.startswith("examples/"):
        flag = words[-4].removeprefix("--")
        seed = [] if flag == "training.seed" else ["--seed-flag", flag]
        return ("python", "benchmarks/compare_examples.py", "--program", program, *config, *output, *seed, *note, *rest)
    images = ["--images", "0"] * (program == "train_diffusion.py" and "frechet_distance" not in record["quality"])
    return ("python", "benchmarks/compare.py", *config, *output, *images, *note, *rest)

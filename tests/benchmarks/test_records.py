"""benchmarks/results: its records are those of its commands, its tables those of its records."""

import json
import re
import shlex
from pathlib import Path

import claims
import compare
import compare_examples
import levels
import proof
import pytest
import scale
import tyro
from conftest import ROOT
from matched_quality import parsed

from pretrain.adapters import Generative
from pretrain.config.cli import parse

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*/records"))
DOCUMENT = (ROOT / "benchmarks" / "README.md").read_text()
NOISE_SCHEDULES = {
    **dict.fromkeys(("dit", "dit_x8", "dit_x64", "unet", "seconds_dit"), "linear"),
    **dict.fromkeys(("dit_cosine", "dit_min_snr"), "squaredcos_cap_v2"),
}
RATIO = re.compile(r"[≤≥]?\d\.\d\d \[[^\]]*\]")
VALUE = re.compile(r"[≤≥]\d\.\d\d(?! \[)|[≤≥]?\d\.\d\d \[[^\]]*\]")  # a ratio with its interval, or a bound alone


def values(flags: list[str]) -> dict[str, float | str]:
    """Settings of a command line, numbers to six digits."""
    return {key: float(f"{float(v):.6g}") if v[:1].isdigit() else v for key, v in parsed(flags).items()}


def commands_of(records: Path) -> list[list[str]]:
    """The words of each command of a comparison."""
    script = (records.parent / "commands.sh").read_text().replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in script.splitlines() if line.startswith("python ")]


OF_EXAMPLES = [path for path in RESULTS if commands_of(path)[0][0] == "benchmarks/compare_examples.py"]


@pytest.mark.parametrize(
    "records", [path for path in RESULTS if path not in OF_EXAMPLES], ids=lambda path: path.parent.name
)
def test_the_commands_make_the_records_and_no_others(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = {path.stem: json.loads(path.read_text()) for path in records.glob("*.json")}
    gone = {name for name, record in found.items() if record["family"] == "corrected"}
    assert all("made before 0.2" in found[name]["note"] for name in gone)
    made: set[str] = set()
    valid: dict[str, str] = {}
    for program, *words in commands_of(records):
        assert program == "benchmarks/compare.py"
        comparison, rest = tyro.cli(compare.Comparison, args=words, return_unknown_args=True)
        assert comparison.output_dir == Path("runs/compare") / records.parent.name
        recipe = ["--config", str(comparison.config)]
        base = parse([*recipe, *rest], adapter="flow", model="unet", recipe=comparison.config, output_dir="", help="")
        for arm in compare.expanded(comparison, base):
            valid |= parsed(arm.flags)
            for seed in comparison.seeds:
                name = compare.run_name(arm, seed)
                assert name not in made, "two commands make the same run"
                made.add(name)
                record = found[name]
                assert (record["arm"], record["family"], record["seed"]) == (arm.name, arm.family, seed)
                assert values(record["flags"]) == values(arm.flags), name
                folder = comparison.output_dir / "runs" / name
                program = "train_diffusion.py" if isinstance(base.component("adapter"), Generative) else "train_mae.py"
                again = [*recipe, *rest, *record["flags"], "--seed", str(seed), "--output-dir", str(folder)]
                assert shlex.split(record["command"]) == ["python", program, *again]
                generated = program == "train_diffusion.py" and comparison.images > 0
                assert ("frechet_distance" in record["quality"]) == generated, name
        named = {"optim.name" if key == "optim" else key: value for key, value in valid.items()}
        flags = [f"--{key}={value}" if value else f"--{key}" for key, value in named.items()]
        parse([*recipe, *rest, *flags], adapter="flow", model="unet", recipe=comparison.config, output_dir="", help="")
    assert made == found.keys() - gone


@pytest.mark.parametrize("records", OF_EXAMPLES, ids=lambda path: path.parent.name)
def test_the_commands_make_the_records_of_examples_and_no_others(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = {path.stem: json.loads(path.read_text()) for path in records.glob("*.json")}
    made: set[str] = set()
    for program, *words in commands_of(records):
        assert program == "benchmarks/compare_examples.py"
        comparison, rest = tyro.cli(compare_examples.Comparison, args=words, return_unknown_args=True)
        assert comparison.output_dir == Path("runs/compare") / records.parent.name
        config = ["--config", str(comparison.config)] if comparison.config else []
        for arm in compare_examples.expanded(comparison, rest):
            for seed in comparison.seeds:
                name = compare.run_name(arm, seed)
                assert name not in made, "two commands make the same run"
                made.add(name)
                record = found[name]
                assert (record["arm"], record["family"], record["seed"]) == (arm.name, arm.family, seed)
                assert record["flags"] == arm.flags
                ends = [f"--{comparison.seed_flag}", str(seed)]
                output = ["--output", str(comparison.output_dir / "runs" / f"{name}.json")]
                command = ["python", str(comparison.program), *config, *rest, *arm.flags, *ends, *output]
                assert shlex.split(record["command"]) == command
    assert made == found.keys()


@pytest.mark.parametrize("records", RESULTS, ids=lambda path: path.parent.name)
def test_the_tables_are_those_of_the_records(records: Path) -> None:
    folder = records.parent
    text = proof.tables(*proof.read(folder))
    assert f"# {folder.name}\n\n{text}" == (folder / "table.md").read_text(), "run benchmarks/proof.py"
    schedule = re.search(r"(\w+) noise schedule", text.partition("\n")[0])
    assert (schedule and schedule[1]) == NOISE_SCHEDULES.get(folder.name)


@pytest.mark.parametrize("document", ["README.md", "benchmarks/README.md", "docs/policies.md", "docs/training.md"])
def test_ratios_in_documents_are_those_of_the_tables(document: str) -> None:
    tables = [path.parent / "table.md" for path in RESULTS] + [
        claims.RESULTS / f"{name}.md" for name in ("scale", "claims")
    ]
    known = {ratio for path in tables for ratio in RATIO.findall(path.read_text())}
    assert set(RATIO.findall((ROOT / document).read_text())) <= known


@pytest.mark.parametrize(
    ("head", "section", "sentence"),
    [
        ("cost of full training's quality", "## FLOPs for the quality", r"The README's families are (.*)\.$"),
        ("cost beside shorter training", "## Ratio to", r"The README's arms are (.*)\.$"),
        (
            "cost beside shorter training, in batches of 32",
            "## In batches of 32 alone: ratio to",
            r"The arms \[in batches of 32\]\(#in-batches-of-32\) are (.*)\.$",
        ),
    ],
)
def test_the_tables_of_both_readmes_have_the_numbers_of_what_is_named(head: str, section: str, sentence: str) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / "README.md").read_text() + DOCUMENT, re.M)
    lines = [line for table in tables if table.startswith(f"| {head} |") for line in table.splitlines()]
    expected, names = [], []
    for word in re.findall(r"`([^`]+)`", re.findall(sentence, DOCUMENT, re.M)[0]):  # names, then the bench they are of
        names.append(word)
        if (table := ROOT / "benchmarks" / "results" / word / "table.md").is_file():
            text = table.read_text()
            rows = text.partition(section)[2] or text.partition("## Ratio to")[2]  # one batch size has no such section
            expected += [VALUE.findall(rows.partition(f"| {name} |")[2].partition("\n")[0]) for name in names[:-1]]
            names = []
    assert len(expected) > 10 and [row for line in lines if (row := VALUE.findall(line))] == expected


def test_every_recipe_that_predicts_noise_names_its_noise_schedule() -> None:
    recipes = [*(ROOT / "benchmarks" / "recipes").glob("*.yaml"), *(ROOT / "configs").glob("*.yaml")]
    ddpm = [text for path in recipes if "ddpm" in (text := path.read_text()).partition("model:")[0]]
    assert len(ddpm) > 5 and all("noise_schedule: " in text for text in ddpm)


def test_the_table_of_published_claims_is_that_of_the_records() -> None:
    assert claims.table() == (claims.RESULTS / "claims.md").read_text(), "run benchmarks/claims.py"


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.folder)
def test_the_commands_of_claims_have_the_recipes_of_their_records(claim: claims.Claim) -> None:
    record = next((claims.RESULTS / claim.folder / "records").glob("*.json"), None)
    if record is not None:
        trained, named = (
            parsed(shlex.split(command)).get("config")
            for command in (json.loads(record.read_text())["command"], claim.command)
        )
        assert trained == named


def test_the_table_of_sizes_is_that_of_the_records() -> None:
    assert scale.table() == (claims.RESULTS / "scale.md").read_text(), "run benchmarks/scale.py"


def test_the_table_of_levels_is_that_of_the_numbers_and_defaults() -> None:
    assert levels.table() == (claims.RESULTS / "levels.md").read_text(), "run benchmarks/levels.py --table-only"

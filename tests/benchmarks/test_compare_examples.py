"""benchmarks/compare_examples.py: any program with --output, killed and continued, and the table of its records."""

import json
import subprocess
import sys
from pathlib import Path

import compare
import compare_examples
import proof
import pytest
from matched_quality import arms_of, parsed

from pretrain.core.errors import UserError, exit_on_user_error

PROGRAM = """
import json, sys
words = sys.argv[1:]
found = {a[2:]: b for a, b in zip(words, words[1:]) if a[:2] == "--"}
epochs, rate, budget = (float(found.get("training." + n, d)) for n, d in (("epochs", 10), ("lr", 1), ("budget", 1)))
if "fail" in found:
    sys.exit("it failed")
cost = epochs * budget * (0.8 if "blocking.share" in found else 1)
loss = (1 + (rate - 1.4) ** 2 / 50) / (epochs if budget == 1 else 1.25 * cost) + 0.001 * int(found["training.seed"])
record = {"cost": {"samples_used": 10 * cost, "flops": 100 * cost, "seconds": cost}, "quality": {"loss": loss}}
if "nothing" not in found:
    open(found["output"], "w").write(json.dumps(record | {"epochs": epochs}))
open(sys.argv[0] + ".log", "a").write(" ".join(words) + "\\n")
"""


@pytest.fixture(autouse=True)
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing it takes longer than all else here."""
    monkeypatch.setattr(proof, "figure", lambda found, path: path.write_text(f"{len(found.arms)} arms"))


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("training:\n  epochs: 10\n  lr: 1.0\n  optimizer: sgd\n")
    return path


def command(program: Path, recipe: Path, *more: object) -> list[str]:
    words = ["--program", program, "--config", recipe, "-o", program.parent / "out", "--seeds", 0, 1, *more]
    return [*map(str, words)]


def runs(program: Path) -> list[str]:
    log = program.with_suffix(".py.log")
    return log.read_text().splitlines() if log.exists() else []


def test_missing_runs_are_made_once_and_the_table_has_the_ratios(program: Path, recipe: Path, capsys) -> None:
    """SGD is the baseline. The arm at 0.7 reaches what ordinary training does at 0.90, by linear interpolation."""
    arms = ["full", "shortened", "random", "topk@0.8=--training.policy full --blocking.share 0.2"]
    compare_examples.main(command(program, recipe, "--arms", "full", "--data", "pictures"))
    assert len(runs(program)) == 2 and all("--data pictures" in line for line in runs(program))
    compare_examples.main(command(program, recipe, "--arms", *arms, "--data", "pictures"))
    assert len(runs(program)) == len({*runs(program)}) == 2 * (1 + 2 * 3 + 1 + 1)
    compare_examples.main(command(program, recipe, "--arms", *arms, "--data", "pictures"))
    assert len(runs(program)) == 18
    text = capsys.readouterr().out
    assert (
        "Ratio to shortened training with SGD" in text
        and (program.parent / "out" / "figure.png").read_text() == "9 arms"
    )
    found = [json.loads(path.read_text()) for path in (program.parent / "out" / "records").glob("*.json")]
    pruned = {arm.name: arm.pruned for arm in arms_of(found)}
    assert {name for name, value in pruned.items() if value} == {"random@0.7", "topk@0.8"}
    rates = {arm.name: arm.lr for arm in arms_of(found)}
    assert rates["full"] == 1 and rates["shortened@0.5 lr*2.00"] == 2 and rates["shortened@0.7 lr*1.00"] == 1
    (row,) = (line for line in text.rpartition("# out")[2].splitlines() if line.startswith("| random@0.7 "))
    assert "| 0.700 |" in row and "| 0.78 [" in row
    for record in found:
        assert record["epochs"] == float(parsed(record["command"].split()).get("epochs", 10))
        assert record["cost"] and record["machine"] and parsed(record["flags"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "ful"], "there are full, shortened"),
        (["--arms", "full", "--fail", "1"], "ended with status 1"),
        (["--arms", "full", "--nothing", "1"], "needs a setting --output"),
        (["--program", "missing.py"], "missing.py"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    words: list[str], message: str, program: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped, exit_on_user_error():
        compare_examples.main([*command(program, recipe), *words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not [*(program.parent / "out").glob("records/*")]


def test_shortened_needs_the_length_of_full_training(program: Path, tmp_path: Path) -> None:
    words = ["--program", str(program), "-o", str(tmp_path / "out"), "--arms", "shortened"]
    with pytest.raises(UserError, match=r"training\.epochs"):
        compare_examples.main(words)
    compare_examples.main([*words, "--seeds", "0", "--training.epochs", "4", "--training.lr", "1"])
    assert len(runs(program)) == 6 and all("--training.epochs 4" in line for line in runs(program))


def test_a_run_that_another_process_makes_is_left_to_it(program: Path, recipe: Path) -> None:
    folder = program.parent / "out"
    (folder / "locks").mkdir(parents=True)
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('locked', flush=True)\n"
        "sys.stdin.read()"
    )
    lock = folder / "locks" / compare.run_name(compare.Arm("full", "full", []), 0)
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "locked\n"
    compare_examples.main(command(program, recipe, "--arms", "full"))
    other.communicate()
    assert [line.partition("--training.seed ")[2][0] for line in runs(program)] == ["1"]
    compare_examples.main(command(program, recipe, "--arms", "full"))
    assert len(runs(program)) == 2


def test_policies_are_tried_at_learning_rates_of_their_own(program: Path, recipe: Path) -> None:
    arms, rates = ("random", "seta", "full"), (1.0, 0.5)
    comparison = compare_examples.Comparison(program, program.parent, recipe, arms, budgets=(0.7,), pruned_rates=rates)
    found = {arm.name: parsed(arm.flags) for arm in compare_examples.expanded(comparison, [])}
    assert [*found] == ["random@0.7", "random@0.7 lr*0.50", "seta", "seta lr*0.50", "full"]
    stated = {name: settings.get("optim.lr") for name, settings in found.items()}
    assert stated == dict.fromkeys(found) | {"random@0.7 lr*0.50": "0.5", "seta lr*0.50": "0.5"}
    unknown = compare_examples.Comparison(program, program.parent, arms=("seta",), pruned_rates=(2.0,))
    with pytest.raises(UserError, match=r"--pruned-rates, need the full run's --training\.epochs"):
        list(compare_examples.expanded(unknown, []))

"""The programs as a user meets them: what a run leaves, where it refuses, how it stops and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, journal
from PIL import Image
from safetensors.torch import load_file

import train_diffusion
import train_mae
from pretrain import checkpoint
from pretrain.command_line import parse
from pretrain.errors import Refused

PROGRAMS = {"train_diffusion.py": (train_diffusion, "flow", "unet"), "train_mae.py": (train_mae, "mae", "mae")}


def train(script: str, *arguments: object) -> None:
    """The program's main in this process."""
    module, adapter, model = PROGRAMS[script]
    recipe = ROOT / "configs" / f"fashion_mnist_{adapter}.yaml"
    words = [*TINY[script].split(), *map(str, arguments)]
    module.main(parse(words, adapter=adapter, model=model, recipe=recipe, output_dir="runs/x", help=""))


def common(pictures: Path, output: Path, epochs: int = 4) -> list[object]:
    return ["--data", pictures, "--output-dir", output, "--epochs", epochs, "--batch-size", 12, "--evaluate.every", 2]


def final(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    return load_file(newest / f"{name}.safetensors")


def same(one: Path, other: Path) -> bool:
    """Bit for bit."""
    names = ("model", "average", "optimizer", "infobatch")
    pairs = [(final(one, name), final(other, name)) for name in names]
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a) for a, b in pairs
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures: Path) -> Path:
    """An uninterrupted run, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    every = ["--checkpoint.every", 1, "--checkpoint.keep", 1000, "--micro-batch", 6]
    train("train_diffusion.py", *common(pictures, folder), *every, "--infobatch")
    return folder


# -- what a run leaves -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", PROGRAMS)
@pytest.mark.parametrize("infobatch", [True, False])
def test_a_run_leaves_what_it_promises(script: str, infobatch: bool, pictures: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    train(script, *common(pictures, folder, 8), *(["--infobatch"] if infobatch else []))
    printed = capsys.readouterr()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["policy"] == ("infobatch" if infobatch else "full")
    assert (summary["epochs"], summary["dataset_size"], summary["full_visits"]) == (8, 43, 8 * 43)
    assert summary["visited"] == summary["full_visits"] if not infobatch else summary["visited"] < 8 * 43
    assert summary["saved_fraction"] == pytest.approx(1 - summary["visited"] / (8 * 43))
    assert summary["adapter"] == PROGRAMS[script][1] and summary["seconds"] > 0 and summary["bad_images"] == []
    assert 0 < summary["train_flops"] == summary["full_train_flops"] // summary["full_visits"] * summary["visited"]
    assert summary["quality"]["heldout_loss"] < summary["quality_before"]["heldout_loss"]
    epochs = [record for record in journal(folder) if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs] == list(range(1, 9))
    assert epochs[-1]["visited"] == summary["visited"] and epochs[-1]["credited"] == 8 * 43
    assert epochs[-1]["skipped"] == 0 and epochs[0]["skipped"] == 0
    assert [record["epoch"] for record in journal(folder) if record["kind"] == "evaluation"] == [0, 2, 4, 6, 8]
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == [f"epoch-000{n}.png" for n in (2, 4, 6, 8)]
    for path in (folder / "pictures").iterdir():
        assert np.asarray(Image.open(path)).std() > 0
    for said in ("epoch 8/8", "visited", "saved", "heldout_loss", str(folder / "pictures"), str(folder / "model")):
        assert said in printed.out
    assert "\x1b" not in printed.out  # no terminal, no escapes
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["infobatch"] is infobatch and resolved["epochs"] == 8
    if script == "train_mae.py":
        assert {"knn_accuracy"} <= summary["quality"].keys() & summary["quality_before"].keys()
        assert "knn_accuracy" in printed.out and "(before training" in printed.out


def test_without_pruning_it_is_the_same_program(pictures: Path, tmp_path: Path) -> None:
    """Skipping a share of nobody is, bit for bit, the run without InfoBatch."""
    train("train_diffusion.py", *common(pictures, tmp_path / "full"))
    train("train_diffusion.py", *common(pictures, tmp_path / "zero"), "--infobatch", "--pruning.ratio", 0)
    assert same(tmp_path / "full", tmp_path / "zero")
    assert journal(tmp_path / "full") == journal(tmp_path / "zero")


def test_the_resolved_config_runs_again_to_the_same_end(finished: Path, tmp_path: Path) -> None:
    train("train_diffusion.py", "--config", finished / "config.yaml", "--output-dir", tmp_path / "again")
    assert same(finished, tmp_path / "again")
    assert journal(finished) == journal(tmp_path / "again")


def test_accumulated_micro_batches_are_the_batch(pictures: Path, finished: Path, tmp_path: Path) -> None:
    train("train_diffusion.py", *common(pictures, tmp_path / "whole"), "--infobatch")
    for name, value in final(finished).items():
        torch.testing.assert_close(value, final(tmp_path / "whole")[name], rtol=1e-4, atol=1e-5)


def test_a_tracker_gets_the_numbers(pictures: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("train_diffusion.py", *common(pictures, tmp_path / "run", 2), "--tracker", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "run"))
    events.Reload()
    assert {"loss", "skipped", "heldout_loss"} <= set(events.Tags()["scalars"])
    logged = [event.value for event in events.Scalars("loss")]
    written = [record["loss"] for record in journal(tmp_path / "run") if record["kind"] == "epoch"]
    assert logged == pytest.approx(written)


def test_a_terminal_shows_a_live_line(pictures: Path, tmp_path: Path) -> None:
    master, slave = os.openpty()
    words = [*TINY["train_diffusion.py"].split(), *map(str, common(pictures, tmp_path / "run", 8)), "--infobatch"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_diffusion.py", *words],
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "140"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 4096)
        except OSError:  # the program has ended
            break
    assert process.wait() == 0
    text = shown.decode()
    for said in ("images/s", "skipped", "loss", " left", "━", "epoch 8/8  loss"):
        assert said in text


# -- exports open elsewhere ------------------------------------------------------------------------

ELSEWHERE = """
import sys, torch
from safetensors.torch import load_file, save_file
{code}
assert not any(name.split('.')[0] in ('pretrain', 'models') for name in sys.modules)
save_file({{'out': out.contiguous()}}, '{out}')
"""


def elsewhere(code: str, folder: Path) -> torch.Tensor:
    """Run code in a process that knows nothing of this project; what it calls `out`."""
    out = folder / "out.safetensors"
    text = ELSEWHERE.format(code=code, out=out)
    done = subprocess.run([sys.executable, "-c", text], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(out)["out"]


@pytest.mark.parametrize(
    "settings",
    [
        "",
        "--adapter ddpm",
        "--adapter ddpm --adapter.prediction v_prediction --conditional",
        "--conditional",
        "--model dit --conditional --evaluate.guidance 2",
        "--model dit",
    ],
)
def test_a_diffusion_model_opens_as_a_pipeline(settings: str, pictures: Path, tmp_path: Path) -> None:
    """Same noise, same labels, same steps: the same images as here."""
    from pretrain.generate import generate

    words = settings.split()
    if "dit" in words:
        words += ["--model.patch", "4", "--model.width", "16", "--model.depth", "1", "--model.heads", "2"]
        words = ["--data", str(pictures), "--output-dir", str(tmp_path / "run"), "--epochs", "1", *words]
        train_diffusion.main(
            parse(
                words,
                adapter="flow",
                model="unet",
                recipe=ROOT / "configs/fashion_mnist_flow.yaml",
                output_dir="",
                help="",
            )
        )
    else:
        train("train_diffusion.py", *common(pictures, tmp_path / "run", 1), *words)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    conditional = "--conditional" in words
    extra = "label=[0, 1, 1], guidance=2.0, " if conditional else "batch_size=3, "
    code = f"""
import diffusers
pipe = {summary["open_model_with"]}
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(7)
images = pipe({extra}num_inference_steps=4, generator=generator, output_type='np').images
out = torch.from_numpy(images).permute(0, 3, 1, 2)
"""
    found = elsewhere(code, tmp_path)
    config = parse(
        ["--config", str(tmp_path / "run" / "config.yaml")], adapter="", model="", recipe=ROOT, output_dir="", help=""
    )
    model = config.part("model").build((1, 12, 12), 2 if conditional else 0).eval()
    model.load_state_dict(final(tmp_path / "run", "average"))
    noise = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(7))
    label = torch.tensor([0, 1, 1] if conditional else [-1, -1, -1])
    made = generate(model, config.part("adapter"), noise, label, steps=4, guidance=2.0 if conditional else 1.0)
    torch.testing.assert_close(found, (made + 1) / 2, atol=1e-5, rtol=0)


def test_an_encoder_opens_in_timm(pictures: Path, tmp_path: Path) -> None:
    train("train_mae.py", *common(pictures, tmp_path / "run", 1))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    code = (
        f"import timm\nmodel = {summary['open_model_with']}.eval()\nx = torch.linspace(-1, 1, 144).view(1, 1, 12, 12)"
    )
    code += "\nout = model(x).detach()"
    found = elsewhere(code, tmp_path)
    config = parse(
        ["--config", str(tmp_path / "run" / "config.yaml")], adapter="", model="", recipe=ROOT, output_dir="", help=""
    )
    model = config.part("model").build((1, 12, 12), 0).eval()
    model.load_state_dict(final(tmp_path / "run", "average"))
    with torch.no_grad():
        assert torch.equal(found, model.encoder(torch.linspace(-1, 1, 144).view(1, 1, 12, 12)))


# -- stop and go on --------------------------------------------------------------------------------


def test_from_every_step_the_rest_is_bit_identical(finished: Path, tmp_path: Path) -> None:
    steps = sorted((finished / "checkpoints").iterdir())
    assert len(steps) >= 14
    for step in steps[:-1:3]:
        folder = tmp_path / step.name
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copytree(step, folder / "checkpoints" / step.name)
        for name in ("config.yaml", "journal.jsonl"):  # the journal runs ahead of the checkpoint, as after a kill
            shutil.copy(finished / name, folder / name)
        train("train_diffusion.py", "--resume", "--output-dir", folder)
        assert same(finished, folder), step
        assert journal(finished) == journal(folder), step


def test_killed_and_resumed(pictures: Path, finished: Path, tmp_path: Path, program) -> None:
    folder = tmp_path / "run"
    words = [*TINY["train_diffusion.py"].split(), *map(str, common(pictures, folder)), "--infobatch"]
    words += ["--micro-batch", "6", "--checkpoint.every", "1", "--data.workers", "1"]
    process = subprocess.Popen([sys.executable, ROOT / "train_diffusion.py", *words], stdout=subprocess.DEVNULL)
    wait_for(lambda: checkpoint.newest(folder / "checkpoints"), process)
    process.kill()
    process.wait()
    assert not (folder / "summary.json").exists()
    done = program("train_diffusion.py", "--resume", "--output-dir", folder)
    assert "going on from" in done.stdout
    assert same(finished, folder) and journal(finished) == journal(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_writes_a_checkpoint_and_says_how_to_go_on(
    number: int, pictures: Path, tmp_path: Path, program
) -> None:
    folder = tmp_path / "run"
    words = [*TINY["train_diffusion.py"].split(), *map(str, common(pictures, folder, 2000)), "--data.workers", "1"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_diffusion.py", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: len(journal(folder)) > 2 if (folder / "journal.jsonl").exists() else False, process)
    os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert err == "" and f"stopped by {signal.Signals(number).name}" in out.splitlines()[-1]
    assert out.splitlines()[-1].endswith(f"go on with: python train_diffusion.py --resume --output-dir {folder}")
    records = journal(folder)
    reached = records[-1]["epoch"] if records[-1]["kind"] == "epoch" else records[-2]["epoch"]
    again = program("train_diffusion.py", "--resume", "--output-dir", folder, "--epochs", reached + 1)
    assert "epochs 2000 -> " in again.stdout and journal(folder)[: len(records)] == records


def wait_for(condition, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the program ended or hangs"
        time.sleep(0.02)


def test_a_run_is_given_more_epochs(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("train_diffusion.py", *common(pictures, folder, 2), "--infobatch")
    train("train_diffusion.py", "--resume", "--output-dir", folder, "--epochs", 5)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["quality"]["heldout_loss"] < summary["quality_before"]["heldout_loss"]
    assert [record["epoch"] for record in journal(folder) if record["kind"] == "epoch"] == [1, 2, 3, 4, 5]
    one, average = final(folder), final(folder, "average")
    assert all((one[name] - average[name]).abs().max() < 0.1 for name in one)


def test_inside_an_epoch_its_plan_must_stay(finished: Path, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for step in sorted((folder / "checkpoints").iterdir())[6:]:  # the last one left lies in the second epoch
        shutil.rmtree(step)
    for change in (["--seed", 1], ["--pruning.ratio", 0.9], ["--pruning.policy", "full"]):
        assert "whose plan would be another one now" in refused(
            "train_diffusion.py", "--resume", "--output-dir", folder, *change
        )


def test_what_accelerate_was_configured_to_do_does_not_change_the_run(
    pictures: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train("train_diffusion.py", "--config", finished / "config.yaml", "--output-dir", tmp_path / "run")
    assert same(finished, tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "say --precision bf16" in refused("train_diffusion.py", *common(pictures, tmp_path / "other"))


# -- several processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_are_one_run(
    processes: int, pictures: Path, finished: Path, tmp_path: Path, program
) -> None:
    folder = tmp_path / "run"
    settings = ["--infobatch", "--micro-batch", 2]
    done = program("train_diffusion.py", *common(pictures, folder), *settings, processes=processes)
    assert done.stdout.count("epoch 4/4") == 2  # one voice: the epoch and its evaluation
    one, several = final(finished), final(folder)
    distance = sum((one[k] - several[k]).square().sum() for k in one).sqrt()
    assert distance / sum(v.square().sum() for v in one.values()).sqrt() < 1e-5
    a, b = final(finished, "infobatch"), final(folder, "infobatch")
    torch.testing.assert_close(a["score"], b["score"], rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(journal(finished), journal(folder), strict=True):
        assert {k: v for k, v in mine.items() if isinstance(v, int)} == {
            k: v for k, v in theirs.items() if isinstance(v, int)
        }
        assert mine.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-5)


def test_a_run_of_two_processes_goes_on_as_one(pictures: Path, finished: Path, tmp_path: Path, program) -> None:
    folder = tmp_path / "run"
    program(
        "train_diffusion.py",
        *common(pictures, folder),
        "--infobatch",
        "--checkpoint.every",
        1,
        "--checkpoint.keep",
        99,
        processes=2,
    )
    for step in sorted((folder / "checkpoints").iterdir())[6:]:
        shutil.rmtree(step)
    train("train_diffusion.py", "--resume", "--output-dir", folder)
    for name, value in final(finished).items():
        torch.testing.assert_close(value, final(folder)[name], rtol=1e-3, atol=1e-5)


def test_bad_images_are_counted_whoever_met_them(pictures: Path, tmp_path: Path, program) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    every = sorted((tmp_path / "data").rglob("*.png"))
    for victim in every[5:11]:
        victim.write_bytes(b"")
    words = [*common(tmp_path / "data", tmp_path / "run", 1), "--on-bad-image", "skip"]
    program("train_diffusion.py", *words, processes=2)
    bad = json.loads((tmp_path / "run" / "summary.json").read_text())["bad_images"]
    assert len(bad) == 6 and all(any(str(victim) in line for line in bad) for victim in every[5:11])
    train("train_diffusion.py", "--resume", "--output-dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["bad_images"] == bad


def test_a_launch_that_starts_fewer_than_asked_for_is_stopped(pictures: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    words = [str(ROOT / "train_diffusion.py"), *map(str, common(pictures, tmp_path / "run"))]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "error: the launcher was asked for 2 processes and started 1" in done.stderr
    assert not (tmp_path / "run").exists()


# -- no --------------------------------------------------------------------------------------------


def refused(script: str, *arguments: object) -> str:
    with pytest.raises(Refused) as refusal:
        train(script, *arguments)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_refusal_is_a_line_and_status_2(tmp_path: Path, program) -> None:
    for arguments in (("--data", "./not/there"), ("--optim.lrr", "3"), ("--adapter", "nope")):
        done = program("train_diffusion.py", *arguments, "--output-dir", tmp_path / "run", check=False)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_another_run(pictures: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "the folder holds a run; go on with it (--resume)" in refused(
        "train_diffusion.py", *common(pictures, folder)
    )
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train("train_diffusion.py", *common(pictures, folder, 1), "--overwrite")
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 1
    assert len(list((folder / "checkpoints").iterdir())) == 1


def test_a_folder_with_something_else_is_never_overwritten(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for more in ([], ["--overwrite"]):
        assert "'thesis.tex', which no run wrote" in refused("train_diffusion.py", *common(pictures, tmp_path), *more)
    (tmp_path / "thesis.tex").rename(tmp_path / "file")
    assert "a file of that name" in refused("train_diffusion.py", *common(pictures, tmp_path / "file"))


def test_what_is_no_run_is_never_taken_for_one(pictures: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "run" / "pictures")
    for more in ([], ["--overwrite"]):
        inside = common(tmp_path / "run" / "pictures", tmp_path / "run")
        assert "lies in it" in refused("train_diffusion.py", *inside, *more)
        assert "which no run wrote" in refused("train_diffusion.py", *common(pictures, tmp_path / "run"), *more)
    assert len(list((tmp_path / "run").rglob("*.png"))) == 47


def test_a_checkpoint_is_resumed_in_its_own_run(finished: Path, tmp_path: Path) -> None:
    (step,) = (path for path in (finished / "checkpoints").iterdir() if path.name.endswith("05"))
    words = ["--resume", step, "--output-dir", tmp_path / "other"]
    assert "is not of the run in --output-dir" in refused("train_diffusion.py", *words)
    for nowhere in ("/x", "x", tmp_path):
        assert "there is no checkpoint there" in refused("train_diffusion.py", "--resume", nowhere)
    shutil.copytree(finished, tmp_path / "run")
    train("train_diffusion.py", "--resume", tmp_path / "run" / "checkpoints" / step.name)
    assert same(finished, tmp_path / "run") and journal(finished) == journal(tmp_path / "run")


def test_nothing_to_resume(pictures: Path, tmp_path: Path) -> None:
    assert "holds no checkpoint" in refused("train_diffusion.py", *common(pictures, tmp_path / "run"), "--resume")


def test_a_checkpoint_of_another_model_adapter_or_data_set(pictures: Path, finished: Path, tmp_path: Path) -> None:
    resume = ["--resume", "--output-dir", finished]
    assert "model.channels is [8, 16] there, [16, 16] here" in refused(
        "train_diffusion.py", *resume, "--model.channels", 16, 16
    )
    assert "of another adapter" in refused("train_diffusion.py", *resume, "--adapter", "ddpm")
    shutil.copytree(pictures, tmp_path / "less")
    next((tmp_path / "less").rglob("*.png")).unlink()
    assert "is of 43 images, --data has 42 now" in refused("train_diffusion.py", *resume, "--data", tmp_path / "less")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    other = train_mae_parameters = {"x": torch.zeros(1)}
    checkpoint.save_file(other | train_mae_parameters, newest / "model.safetensors")
    assert "of another model" in refused("train_diffusion.py", "--resume", "--output-dir", folder)
    (newest / "model.safetensors").write_bytes(b"")
    assert "can't be read" in refused("train_diffusion.py", "--resume", "--output-dir", folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model.channels 8 16 16 16", "8 divides, got 12x12"),
        ("--batch-size 10 --micro-batch 4", "must be a multiple of 1 processes times --micro-batch 4"),
        ("--precision fp16", "fp16"),
        ("--tracker nonsense", "nonsense"),
        ("--adapter ddpm --evaluate.steps 2000", "--evaluate.steps 2000"),
        ("--data.channels 1 --conditional --data ./nowhere/at/all", "there is no such file"),
    ],
)
def test_what_does_not_fit(arguments: str, said: str, pictures: Path, tmp_path: Path) -> None:
    sentence = refused("train_diffusion.py", *common(pictures, tmp_path / "run"), *arguments.split())
    assert said in sentence
    assert not (tmp_path / "run").exists()


def test_parts_that_do_not_go_together(pictures: Path, tmp_path: Path) -> None:
    def main(module, *words: object) -> str:
        words = ("--data", pictures, "--output-dir", tmp_path / "run", *words)
        recipe = ROOT / "configs" / "fashion_mnist_flow.yaml"
        with pytest.raises(Refused) as refusal:
            module.main(parse([*map(str, words)], adapter="flow", model="unet", recipe=recipe, output_dir="", help=""))
        return str(refusal.value)

    assert "--adapter mae has no use for --model unet" in main(train_diffusion, "--adapter", "mae")
    assert "an `encoder`" in main(train_mae, "--adapter", "mae")
    assert not (tmp_path / "run").exists()


def test_a_mae_that_cant_be_is_refused(pictures: Path, tmp_path: Path) -> None:
    words = common(pictures, tmp_path / "run")
    for change, said in (
        ("--model.patch 1", "norm_pix needs patches of two or more values"),
        ("--model.heads 5", "timm can't make"),
        ("--model.encoder vit_relpos_small_patch16_224", "plain VisionTransformer"),
    ):
        assert said in refused("train_mae.py", *words, *change.split())
    assert not (tmp_path / "run").exists()


def test_parameters_that_the_loss_does_not_reach_are_known() -> None:
    """Or several processes would wait for their gradients: here a norm that only the pooled features pass."""
    from models.mae import MAEConfig
    from pretrain.adapters.mae import MAE
    from pretrain.cost import first_visit

    model = MAEConfig("vit_base_patch16_reg4_gap_256", 4, 16, 1, 2, 16, 1, 2).build((1, 12, 12), 0)
    flops, unreached = first_visit(MAE(), model, (1, 12, 12), 0)
    assert flops > 0 and unreached and {*unreached} <= {*model.encoder.fc_norm.parameters()}


OWN = '''
from dataclasses import dataclass
from pretrain.adapter import Losses
from pretrain.adapters.flow import Flow as Ours

@dataclass(frozen=True)
class Own(Ours):
    """Not quite right."""

    def __call__(self, model, batch, rng):
        loss = super().__call__(model, batch, rng).loss
        return {}
'''


@pytest.mark.parametrize(
    ("result", "said"),
    [("Losses(loss.mean())", "got a loss of shape ()"), ("loss", "got Tensor"), ("None", "got NoneType")],
)
def test_an_adapter_that_breaks_the_contract_is_told(result: str, said: str, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN.format(result))
    assert said in refused("train_diffusion.py", *common(pictures, tmp_path / "run"), "--adapter", tmp_path / "own.py")


NAN = '''
from dataclasses import dataclass
import torch
from pretrain.adapter import Losses
from pretrain.adapters.flow import Flow as Ours

@dataclass(frozen=True)
class Broken(Ours):
    """Right until the second epoch."""

    def __call__(self, model, batch, rng):
        loss = super().__call__(model, batch, rng).loss
        # One call counts FLOPs, two evaluate, four are the first epoch.
        Broken.calls = getattr(Broken, "calls", 0) + 1
        return Losses(loss.masked_fill((batch.index == 7) & (Broken.calls > 7), float("nan")))
'''


def test_a_loss_that_is_not_a_number_names_epoch_step_and_samples(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(NAN)
    words = [*common(pictures, tmp_path / "run"), "--adapter", tmp_path / "broken.py"]
    sentence = refused("train_diffusion.py", *words)
    assert "epoch 2, step " in sentence and "the loss of sample 7 is not finite" in sentence and ".png" in sentence
    for name in ("model", "average"):  # what was saved before is good
        assert all(value.isfinite().all() for value in final(tmp_path / "run", name).values())


def test_a_bad_image_stops_the_run_or_is_skipped_and_counted(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    victim = sorted((tmp_path / "data").rglob("*.png"))[20]
    victim.write_bytes(victim.read_bytes()[:40])
    sentence = refused("train_diffusion.py", *common(tmp_path / "data", tmp_path / "run"))
    assert str(victim) in sentence and "--on-bad-image skip" in sentence
    words = [*common(tmp_path / "data", tmp_path / "run"), "--on-bad-image", "skip", "--overwrite", "--infobatch"]
    train("train_diffusion.py", *words)
    (bad,) = json.loads((tmp_path / "run" / "summary.json").read_text())["bad_images"]
    assert str(victim) in bad
    scores = final(tmp_path / "run", "infobatch")["score"]
    assert scores.isnan().sum() <= 1 and scores[~scores.isnan()].isfinite().all()

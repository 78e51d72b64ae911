"""Check both programs on a GPU: precisions, kill and resume, compilation, export, throughput.

    python benchmarks/gpu/smoke.py --work FOLDER --data CIFAR10

`benchmarks/gpu/run smoke` starts it. Each check is a list of commands that run one after the other; four checks run
concurrently, those that measure throughput run alone at the end. Outcomes are written to smoke.json as soon as they are
known; started again, it repeats the checks that did not succeed. The exit status is 1 if a check failed.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
import tyro
from toy import TOY, toy_data

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()
DENOISER = ["--model", "dit", "--model.patch", "4", "--model.width", "128", "--model.depth", "4", "--model.heads", "4"]
VIT_S = "--model.patch 16 --model.width 384 --model.depth 12 --model.heads 6"
DECODER = "--model.decoder-width 512 --model.decoder-depth 8 --model.decoder-heads 16"
OPEN = """
import json, sys, torch
summary = json.load(open(sys.argv[1] + "/summary.json"))
print(summary["open_model_with"])
library = summary["open_model_with"].partition(".")[0]
opened = eval(summary["open_model_with"], {library: __import__(library)})
device = "cuda" if torch.cuda.is_available() else "cpu"
if library == "timm":
    print(opened.to(device)(torch.zeros(2, *map(int, sys.argv[2:]), device=device)).shape)
else:
    print(opened.to(device)(batch_size=2, num_inference_steps=4).images)
"""


class Check(NamedTuple):
    """A check: commands that must all end with status 0.

    Attributes:
        name: of the check.
        commands: in their order.
        kill: whether the first command is killed after it has written a checkpoint.
        run: folder of the run whose summary is a part of the outcome, or None.
        alone: whether it measures throughput, so that nothing else may run.
        device: whether it needs CUDA.
    """

    name: str
    commands: list[list[str]]
    kill: bool = False
    run: Path | None = None
    alone: bool = False
    device: bool = False


def checks(work: Path, data: Path, toy: bool) -> Iterable[Check]:
    """All checks, the most informative ones first; see `main` for the arguments."""

    def program(kind: str, name: str, *flags: str) -> list[str]:
        folder = work / "runs" / name
        command = [sys.executable, str(ROOT / f"train_{kind}.py"), "--output-dir", str(folder), "--data", str(data)]
        limit = ["--data.limit", "4096", "--data.held-out", "1000", "--epochs", "2", "--batch-size", "128"]
        small = TOY["cifar10_dit.yaml" if kind == "diffusion" else "cifar10_mae.yaml"]
        network = DENOISER if kind == "diffusion" else ["--model.patch", "4", "--model.depth", "4"]
        return [*command, "--evaluate.images", "16", *limit, *network, *(small if toy else []), *flags]

    def run(name: str) -> Path:
        return work / "runs" / name

    def opened(name: str) -> list[str]:
        return [sys.executable, "-c", OPEN, str(run(name)), "3", "32", "32"]

    bf16 = ["--precision", "bf16"]
    generate = [sys.executable, "-m", "pretrain", "generate", str(run("diffusion-bf16"))]
    generate += ["--n", "16", "--steps", "5", "--output-dir", str(run("generated"))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    killed = program("diffusion", "killed", *bf16, "--infobatch", "--epochs", "4", "--checkpoint.every", "2")
    nccl = [
        *torchrun,
        *program("diffusion", "nccl", *bf16, "--infobatch", "--epochs", "4", "--checkpoint.every", "2")[1:],
    ]
    yield Check(
        "diffusion bf16, exported, opened, generate",
        [program("diffusion", "diffusion-bf16", *bf16, "--infobatch"), opened("diffusion-bf16"), generate],
        run=run("diffusion-bf16"),
    )
    yield Check(
        "mae bf16, exported, opened",
        [program("mae", "mae-bf16", *bf16, "--infobatch"), opened("mae-bf16")],
        run=run("mae-bf16"),
    )
    for adapter in ("flow", "ddpm", "edm"):
        flags = [*bf16, "--infobatch", "--epochs", "3", "--adapter", adapter]
        _, _, *words = program("diffusion", f"no-waiting-{adapter}", *flags)
        yield Check(
            f"no synchronization with the device in a step of {adapter}",
            [[sys.executable, str(Path(__file__).with_name("no_waiting.py")), *words]],
            device=True,
        )
    yield Check("killed and resumed", [killed, [*killed, "--resume"]], kill=True, run=run("killed"))
    yield Check("one process under NCCL, the run that was killed", [nccl], run=run("nccl"))
    for kind in ("diffusion", "mae"):
        yield Check(f"{kind} fp16", [program(kind, f"{kind}-fp16", "--precision", "fp16")], device=True)
        yield Check(f"{kind} compiled", [program(kind, f"{kind}-compiled", *bf16, "--compile")], device=True)
    auto = ["--micro-batch", "auto", "--batch-size", "96" if toy else "2048"]
    yield Check("micro-batch auto", [program("diffusion", "auto", *bf16, *auto)])
    for compiled in ([], ["--compile"]):
        suffix = " compiled" if compiled else ""
        large = "--epochs 4 --batch-size 512 --data.limit 25600 --evaluate.steps 2".split()
        dit = "--model.size S --model.patch 2 --model.width 384 --model.depth 12 --model.heads 6".split()
        vit = f"--model.encoder vit_small_patch16_224 {VIT_S} {DECODER} --data.size 224 --data.limit 8192".split()
        for kind, name, sizes in (("diffusion", "DiT-S/2, 32 x 32", dit), ("mae", "ViT-S/16 MAE, 224 x 224", vit)):
            folder = f"throughput-{kind}{suffix.replace(' ', '-')}"
            flags = (
                TOY["cifar10_dit.yaml" if kind == "diffusion" else "cifar10_mae.yaml"]
                if toy
                else [*bf16, *large, *sizes, *compiled]
            )
            yield Check(
                f"throughput: {name}{suffix}",
                [program(kind, folder, *flags)],
                run=run(folder),
                alone=True,
                device=bool(compiled),
            )


def kill_after_checkpoint(command: list[str], log: Any) -> None:
    """Start training, wait for a checkpoint inside an epoch, and kill it.

    Raises:
        RuntimeError: it ended before.
    """
    folder = Path(command[command.index("--output-dir") + 1]) / "checkpoints"
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    while process.poll() is None and len([*folder.glob("step-*[0-9]")]) < 2:
        time.sleep(0.05)
    if process.poll() is not None:
        raise RuntimeError(f"it ended with status {process.returncode} before it was killed")
    process.kill()
    process.wait()


def outcome_of(check: Check, work: Path) -> dict[str, Any]:
    """Run a check and return its outcome."""
    if check.device and not CUDA:
        return {"outcome": "skipped: there is no CUDA device"}
    began = time.monotonic()
    log = work / "logs" / f"{''.join(c if c.isalnum() else '-' for c in check.name)}.txt"
    for command in check.commands:
        if "--output-dir" in command and "--resume" not in command:
            shutil.rmtree(command[command.index("--output-dir") + 1], ignore_errors=True)
    with log.open("w") as file:
        for number, command in enumerate(check.commands):
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            if check.kill and number == 0:
                kill_after_checkpoint(command, file)
                continue
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
            if status:
                last = log.read_text().strip().splitlines()[-1]
                return {"outcome": f"failed: command {number + 1} ended with status {status}: {last}"}
    outcome = {"outcome": "ok", "seconds": round(time.monotonic() - began, 1)}
    if check.run is not None:
        outcome["training"] = results_of(check.run)
    return outcome


def results_of(run: Path) -> dict[str, Any]:
    """Speed and quality of a run; the speed is that of the last epoch, after loading libraries and compiling."""
    summary = json.loads((run / "summary.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, last = [record for record in records if record["kind"] == "epoch"][-2:]
    speed = (last["samples_used"] - before["samples_used"]) / (last["seconds"] - before["seconds"])
    mfu = summary["mfu"] and summary["mfu"] * speed / summary["images_per_second"]
    quality = {name: value for name, value in summary["quality"].items() if not isinstance(value, list)}
    return {"images_per_second": speed, "mfu": mfu, "parameters": summary["parameters"], "quality": quality}


def main(work: Path, data: Path, toy: bool = False) -> None:
    """Run the checks that have not succeeded yet.

    Args:
        work: folder for runs, logs and smoke.json.
        data: folder of CIFAR-10's parquet files.
        toy: few images and tiny networks, for a CPU.
    """
    if toy:
        data = toy_data(data, work / "data")
    (work / "logs").mkdir(parents=True, exist_ok=True)
    file, lock = work / "smoke.json", Lock()
    outcomes = json.loads(file.read_text())["checks"] if file.exists() else {}
    device = torch.cuda.get_device_name() if CUDA else "cpu"

    def run_check(check: Check) -> None:
        if outcomes.get(check.name, {}).get("outcome") == "ok":
            return
        try:
            outcome = outcome_of(check, work)
        except Exception as error:  # must not stop the other checks
            outcome = {"outcome": f"failed: {type(error).__name__}: {error}"}
        with lock:
            outcomes[check.name] = outcome
            file.write_text(json.dumps({"device": device, "torch": torch.__version__, "checks": outcomes}, indent=1))
            print(f"{check.name}: {json.dumps(outcome)}", flush=True)

    every = [*checks(work, data, toy)]
    with ThreadPoolExecutor(4 if CUDA else 2) as pool:
        list(pool.map(run_check, [check for check in every if not check.alone]))
    for check in every:
        if check.alone:
            run_check(check)
    sys.exit(any(outcome["outcome"].startswith("failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    tyro.cli(main)

"""What reports a fault does not fault itself: names of any bytes, rows without images, charts."""

import io
import json
import os
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow as pa
from conftest import draw_images
from matplotlib.backend_bases import FigureCanvasBase
from programs import common, refused, train
from pyarrow import parquet
from rich.console import Console

from pretrain.checkpoint.load_run import load_run
from pretrain.core.console import Display
from pretrain.core.text import printable
from pretrain.evaluation import visualize
from pretrain.training import plots
from pretrain.training.reporter import Reporter


def renamed(path: Path, name: bytes) -> Path:
    return path.rename(os.fsdecode(os.fsencode(path.parent) + b"/" + name))


def test_names_of_any_bytes_in_a_whole_run(tmp_path: Path, capsys) -> None:
    folder = draw_images(tmp_path / "images", 24)
    (folder / "class 1" / "0003.png").write_bytes(b"")
    for name, bad in (("0001", b"im\xe9.png"), ("0003", b"\x1b[31m\xff.png"), ("0005", b"a\nb.png")):
        renamed(folder / "class 1" / f"{name}.png", bad)
    renamed(folder / "class 0", b"cl\xe9 <b>")
    folder = renamed(folder, b"caf\xe9 \x1b[32m")
    run = tmp_path / "run"
    train("train_diffusion.py", *common(folder, run, 1), "--on-bad-image", "skip", "--data.test-split", "none")
    output = capsys.readouterr().out
    assert output.replace("\n", "").isprintable() and r"caf\udce9 \x1b[32m" in output
    card = (run / "model" / "README.md").read_bytes().decode()
    assert card.replace("\n", "").isprintable()
    summary = json.loads((run / "summary.json").read_text())
    assert {printable(name) for name in summary["class_names"]} == {"class 1", r"cl\udce9 <b>"}
    trained = load_run(run)
    assert trained.config.data.source == str(folder) and len(trained.source.train) == 22


def test_an_output_folder_that_is_not_utf8_is_refused(pictures: Path, tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"a/\xff/b"):
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        message = refused("train_diffusion.py", *common(pictures, folder, 1))
        assert "its path is not UTF-8" in message and not folder.exists()


def test_a_message_of_any_characters_is_printed() -> None:
    rng = random.Random(0)
    raw = io.BytesIO()
    display = Display(True)
    display.console = Console(file=io.TextIOWrapper(raw, "utf-8", errors="strict"), width=200, soft_wrap=True)
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(32), rng.randrange(0x110000), 0xDC80, 27])) for _ in range(9))
        display.print(text)
        display.print_summary([(rng.choice(["a", "model"]), text)])
    display.console.file.flush()
    lines = raw.getvalue().decode().split("\n")
    assert len(lines) > 600 and all(line.isprintable() for line in lines)


def test_rows_without_an_image_in_a_whole_run(tmp_path: Path) -> None:
    """Training, evaluation, pictures and the sheets of `pretrain visualize` skip them."""
    rng = random.Random(0)
    files = sorted(draw_images(tmp_path / "images", 60).rglob("*.png"))
    rows = [{"bytes": path.read_bytes(), "path": rng.choice([None, path.name])} for path in files]
    missing = rng.sample(range(60), 20)
    for number in missing:
        rows[number] = rng.choice([None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}])
    labels = ["ab"["class 1" in str(file)] for file in files]
    parquet.write_table(pa.table({"image": rows, "label": labels}), tmp_path / "x.parquet")
    run = tmp_path / "run"
    words = ["--on-bad-image", "skip", "--data.held-out", 9, "--evaluate.metrics", "loss", "knn"]
    train("train_mae.py", *common(tmp_path / "x.parquet", run, 1), *words)
    named = json.loads((run / "summary.json").read_text())["bad_images"]
    assert {name.split(" of ")[0] for name in named} == {f"row {row}" for row in missing} and len(named) == 20
    visualize.main(run, n=4)
    assert (run / "pictures" / "neighbours.png").is_file()


def test_a_chart_beside_a_thread_that_imports_ipython(tmp_path: Path, monkeypatch, capsys) -> None:
    """Matplotlib looks into the module IPython, which a tracker's thread may have imported in part."""
    (tmp_path / "pictures").mkdir()
    reporter = SimpleNamespace(
        config=SimpleNamespace(output_dir=tmp_path),
        display=Display(True),
        trackers=SimpleNamespace(log_image=lambda *_: None),
    )
    losses = [{"epoch": 0, "validation_loss_by_level": [1.0, 2.0]}]

    def draw() -> bool:
        FigureCanvasBase._fix_ipython_backend2gui.__func__.cache_clear()  # of earlier charts in this process
        Reporter.picture(reporter, "chart", lambda: plots.loss_by_level(losses), 3)  # type: ignore[arg-type]
        return (tmp_path / "pictures" / "chart.png").is_file()

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "IPython", ModuleType("IPython"))  # without what it defines later
        assert not draw()
        message = capsys.readouterr().out
        assert "chart.png failed: " in message and "the training continues" in message
    assert draw() and not capsys.readouterr().out

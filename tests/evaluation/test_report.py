"""The page about runs."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from programs import common, train

from pretrain.core.console import duration
from pretrain.core.errors import UserError
from pretrain.export import report
from pretrain.training import plots

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@given(st.lists(st.floats(1, 1e9), min_size=2, max_size=8, unique=True), st.floats(0, 1))
def test_the_cost_of_ordinary_training_is_found_again(flops: list[float], share: float) -> None:
    """Of runs whose loss falls with the logarithm of their FLOPs, and of losses beyond both ends."""
    points = [(cost, 9 - 0.3 * np.log(cost)) for cost in flops]
    low, high = min(flops), max(flops)
    cost = low ** (1 - share) * high**share
    found, beyond = report.ordinary_flops(9 - 0.3 * np.log(cost), points)
    assert found == pytest.approx(cost, rel=1e-6)
    assert beyond == 0 or share in (0, 1) or high < low * (1 + 1e-9)
    assert report.ordinary_flops(10.0, points) == (low, -1)
    assert report.ordinary_flops(-10.0, points) == (high, 1)


def test_a_page_shows_every_run_and_loads_nothing(flow: Path, mae: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<script>alert(1)<"
    shutil.copytree(flow, hostile)
    output = tmp_path / "report.html"
    report.main((flow, hostile, mae), output)
    page = output.read_text()
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)&lt;" in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert not re.search(r"https?://|@import|url\(", page)
    summary = json.loads((mae / "summary.json").read_text())
    assert f"{summary['samples_used']:,}" in page and f"{summary['parameters']:,}" in page
    assert "<td>adapter.name</td><td>flow</td><td>flow</td><td>mae</td>" in page
    assert "device: " in page and "Samples over time" in page


def test_ordinary_training_beside_a_pruned_run(flow: Path, tmp_path: Path) -> None:
    """A run with half of the FLOPs and the same loss as the ordinary one has the ratio 0.50."""
    pruned = tmp_path / "pruned"
    shutil.copytree(flow, pruned)
    summary = json.loads((flow / "summary.json").read_text())
    assert summary["policy"] == "full"
    half = summary | {"policy": "importance", "train_flops": summary["train_flops"] / 2}
    (pruned / "summary.json").write_text(json.dumps(half))
    (row,) = report.beside_ordinary([report.read_record(flow, "flow"), report.read_record(pruned, "pruned")])
    assert row["run"] == "pruned" and row["ratio of FLOPs"] == "0.50" and row["of time"] == "1.00"
    assert report.beside_ordinary([report.read_record(pruned, "pruned")]) == []
    (pruned / "summary.json").write_text(json.dumps(half | {"policy": "full"}))  # pruned until it was resumed
    (row,) = report.beside_ordinary([report.read_record(flow, "flow"), report.read_record(pruned, "pruned")])
    assert row["run"] == "pruned"
    settings = (pruned / "config.yaml").read_text()
    cases = {r"times: \w+": ("times: logit_normal", 0), r"workers: \d+": ("workers: 3", 1)}  # workers change no loss
    for old, (new, rows) in cases.items():
        changed = re.sub(old, new, settings)
        assert changed != settings
        (pruned / "config.yaml").write_text(changed)
        records = [report.read_record(flow, "flow"), report.read_record(pruned, "pruned")]
        assert len(report.beside_ordinary(records)) == rows


def test_a_run_with_partial_forward_blocking_is_not_the_ordinary_training(flow: Path, tmp_path: Path) -> None:
    blocked = shutil.copytree(flow, tmp_path / "blocked")
    file = blocked / "config.yaml"
    file.write_text(re.sub(r"(blocking:\n(?:  .*\n)*?  share:) .*", r"\1 0.4", file.read_text()))
    (row,) = report.beside_ordinary([report.read_record(path, path.name) for path in (flow, blocked)])
    assert row["run"] == "blocked"


def test_metrics_of_generated_images_are_named_with_what_they_depend_on(flow: Path, tmp_path: Path) -> None:
    run = shutil.copytree(flow, tmp_path / "run")
    settings = {"num_images": 32, "steps": 3, "features": "small", "sampler": None, "guidance": 2.0}
    records = [{"settings": settings | {"num_images": n}, "found": {"fid": 1.0 + n, "psnr": 7.0}} for n in (32, 5000)]
    (run / "evaluation.json").write_text(json.dumps(records))
    quality = report.read_record(run, "run").quality
    assert quality["fid (32 images, 3 steps, features small, guidance 2)"] == 33.0 and quality["psnr"] == 7.0
    assert quality["fid (5000 images, 3 steps, features small, guidance 2)"] == 5001.0 and "fid" not in quality


def test_a_damaged_line_of_the_metrics_is_left_out_and_named(flow: Path, tmp_path: Path, capsys) -> None:
    run = shutil.copytree(flow, tmp_path / "run")
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("nonsense\n" + whole)
    assert report.read_record(run, "run").epochs == report.read_record(flow, "flow").epochs
    assert capsys.readouterr().out.count("line 1 can't be read and is left out") == 1


def test_a_run_that_is_still_training(flow: Path, tmp_path: Path) -> None:
    """Without a summary or a checkpoint, its data gone, a line of its metrics half written."""
    running = tmp_path / "running"
    shutil.copytree(flow, running)
    (running / "summary.json").unlink()
    with (running / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epo')
    config = running / "config.yaml"
    config.write_text(re.sub(r"source: .*", f"source: {tmp_path / 'gone'}", config.read_text()))
    page = report.page([report.read_record(running, "running")])
    assert "<td>full</td>" in page  # whatever the section `pruning` would do
    assert "the run has not finished" in page and ("can&#39;t be shown" in page or "equally often" in page)
    shutil.rmtree(running / "checkpoints")
    assert "no checkpoint yet" in report.page([report.read_record(running, "running")])


@pytest.mark.parametrize("break_it", ["missing", "config", "summary", "nothing", "output"])
def test_errors_name_the_folder(break_it: str, flow: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(flow, run)
    names = {"config": "config.yaml", "summary": "summary.json"}
    if break_it in names:
        (run / names[break_it]).write_text("[1]\n")
    runs = {"missing": (tmp_path / "gone",), "nothing": ()}.get(break_it, (run,))
    output = tmp_path / "gone" / "page.html" if break_it == "output" else tmp_path / "page.html"
    with pytest.raises(UserError, match="at least one run" if break_it == "nothing" else "gone|run"):
        report.main(runs, output)
    assert not (tmp_path / "page.html").exists()


@pytest.fixture(scope="module")
def pruned(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "run"
    settings = ["--adapter", "flow", "--infobatch", "--pruning.policy", "infobatch", "--evaluate.every", "1"]
    train("train_diffusion.py", *common(pictures, folder, 4), *settings)
    return folder


def test_each_curve_and_picture_shows_the_runs_own_numbers(flow: Path, pruned: Path, monkeypatch) -> None:
    """What the files of two runs say, of a run that prunes by raw losses and one that uses every sample."""
    drawn: dict[str, tuple] = {}
    for name in ("lines", "loss_by_level", "histogram", "sample_counts"):
        draw = getattr(plots, name)

        def recorded(*given: object, _name: str = name, _draw: Callable = draw, **more: object) -> object:
            drawn[str(given[2]) if _name == "lines" and "FLOPs" not in str(given[1]) else _name] = given
            return _draw(*given, **more)

        monkeypatch.setattr(plots, name, recorded)
    records = [report.read_record(flow, "flow"), report.read_record(pruned, "pruned")]
    page = report.page(records)
    lines = [json.loads(line) for line in (pruned / "metrics.jsonl").read_text().splitlines()]
    epochs, evaluations = ([r for r in lines if r["kind"] == kind] for kind in ("epoch", "evaluation"))
    assert [e["epoch"] for e in epochs] == [1, 2, 3, 4] == [e["epoch"] for e in evaluations]
    used = np.diff([0, *(e["samples_used"] for e in epochs)])
    expected = {
        "training loss": [(e["epoch"], e["loss"]) for e in epochs],
        "learning rate": [(e["epoch"], e["lr"]) for e in epochs],
        "share of samples used": [*zip((1, 2, 3, 4), used / 43, strict=True)],
        "reliability of the scores": [(e["epoch"], e["reliability"]) for e in epochs if e["reliability"] is not None],
        "validation loss": [(e["epoch"], e["validation_loss"]) for e in evaluations],
    }
    for title, points in expected.items():
        (_, _), (name, found) = drawn[title][0]
        assert name == "pruned" and [*map(list, found)] == [pytest.approx(point) for point in points], title
        assert f'alt="{title}"' in page
    assert min(share for _, share in expected["share of samples used"]) < 1 and expected["reliability of the scores"]
    summary = json.loads((pruned / "summary.json").read_text())
    flops = [summary["train_flops"] * e["samples_used"] / summary["samples_used"] for e in epochs]
    losses = [e["validation_loss"] for e in evaluations]
    name, points = drawn["lines"][0][1]
    assert name == "pruned" and np.allclose(points, [*zip(flops, losses, strict=True)])
    assert drawn["loss_by_level"][0] == evaluations
    checkpoint = records[1].checkpoint
    assert checkpoint is not None
    score, count = checkpoint.tensors["infobatch"]["score"], checkpoint.tensors["times_used"]["times_used"]
    assert torch.equal(drawn["histogram"][0], score) and drawn["histogram"][1] == "score: the last loss"
    assert torch.equal(drawn["sample_counts"][0], count) and torch.equal(drawn["sample_counts"][1], score)
    captions = re.findall(r'<img class="sample2" data-caption="([^"]*)" src="data:image/png;base64,([^"]*)"', page)
    assert [caption for caption, _ in captions] == [f"epoch {number}" for number in (1, 2, 3, 4)]
    files = [file.read_bytes() for file in sorted((pruned / "pictures").glob("epoch-*.png"))]
    assert [base64.b64decode(source) for _, source in captions] == files
    for name, value in summary["environment"].items():
        assert f"{name}: {value}" in page
    assert "<tr><td>epochs</td><td>2</td><td>4</td></tr>" in page and "<td>data.held_out</td>" not in page
    cost = summary["train_flops"]
    saved = summary["full_train_flops"] - cost
    assert f"<td>{saved:.3g} FLOPs, about {duration(summary['seconds'] * saved / cost)}</td>" in page
    (row,) = report.beside_ordinary(records)
    ordinary = json.loads((flow / "summary.json").read_text())
    assert row["of time"].endswith(f"{summary['seconds'] / ordinary['seconds']:.2f}")


# -- in a browser ----------------------------------------------------------------------------------


def browse(page: Path, *flags: str) -> tuple[str, str]:
    """The document after its scripts, and what Chromium wrote to stderr."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", *flags)
    flags += ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [str(CHROMIUM), *flags, f"--user-data-dir={profile}", "--enable-logging=stderr", page.as_uri()],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
    return done.stdout, done.stderr


in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@in_browser
def test_the_page_opens_without_errors_and_is_not_blank(flow: Path, pruned: Path, tmp_path: Path) -> None:
    """Every picture is decoded, nothing is written to the console, and each part of a screenshot shows something."""
    report.main((flow, pruned), tmp_path / "report.html")
    html, picture = (tmp_path / "report.html").read_text(), tmp_path / "page.png"
    _, said = browse(tmp_path / "report.html", f"--screenshot={picture}", "--window-size=1240,3000")
    assert "CONSOLE" not in said
    pixels = np.asarray(Image.open(picture).convert("RGB"), float)
    assert pixels.shape == (3000, 1240, 3)
    for part in np.split(pixels, 6):
        assert (part < 250).mean() > 0.005 and part.std() > 5
    script = "document.title = [...document.images].filter(i => i.complete && i.naturalWidth > 50).length; gone()"
    (tmp_path / "report.html").write_text(
        html.replace("</body>", f"<script>onload = () => {{{script}}}</script></body>")
    )
    shown, said = browse(tmp_path / "report.html", "--dump-dom")
    assert "gone is not defined" in said and "CONSOLE" in said
    assert f"<title>{html.count('<img ')}</title>" in shown


@in_browser
def test_the_slider_shows_one_picture_at_a_time(pruned: Path, tmp_path: Path) -> None:
    """The last one, and after a move to the left the first one."""
    page = report.page([report.read_record(pruned, "run")])

    def visible(move: str) -> list[str]:
        (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{move}</script></body>"))
        shown, _ = browse(tmp_path / "page.html", "--dump-dom")
        images = re.findall(r'<img class="sample1" data-caption="([^"]*)"[^>]*?(hidden="")?>', shown)
        assert len(images) == 4
        return [caption for caption, hidden in images if not hidden]

    assert visible("") == ["epoch 4"]
    move = "const s = document.getElementById('slider1'); s.value = 0; s.dispatchEvent(new Event('input'));"
    assert visible(move) == ["epoch 1"]

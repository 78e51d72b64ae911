"""The page about runs."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.core.errors import UserError
from pretrain.export import report

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
    assert row["run"] == "pruned" and row["ratio"] == "0.50"
    assert report.beside_ordinary([report.read_record(pruned, "pruned")]) == []


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
    assert "the run has not finished" in page and ("can&#39;t be shown" in page or "equally often" in page)
    shutil.rmtree(running / "checkpoints")
    assert "no checkpoint yet" in report.page([report.read_record(running, "running")])


@pytest.mark.parametrize("break_it", ["missing", "config", "metrics", "summary", "nothing", "output"])
def test_errors_name_the_folder(break_it: str, flow: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(flow, run)
    names = {"config": "config.yaml", "metrics": "metrics.jsonl", "summary": "summary.json"}
    if break_it in names:
        (run / names[break_it]).write_text("[1]\n" if break_it != "metrics" else "nonsense\n")
    runs = {"missing": (tmp_path / "gone",), "nothing": ()}.get(break_it, (run,))
    output = tmp_path / "gone" / "page.html" if break_it == "output" else tmp_path / "page.html"
    with pytest.raises(UserError, match="at least one run" if break_it == "nothing" else "gone|run"):
        report.main(runs, output)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_slider_shows_one_picture_at_a_time(flow: Path, tmp_path: Path) -> None:
    """In a browser: the last one, and after a move to the left the first one."""
    run = tmp_path / "run"
    shutil.copytree(flow, run)
    drawn = next((run / "pictures").glob("epoch-*.png")).read_bytes()
    for number in range(7, 10):
        (run / "pictures" / f"epoch-000{number}.png").write_bytes(drawn)
    page = report.page([report.read_record(run, "run")])
    count = len(re.findall(r'<img class="sample1"', page))
    assert count >= 3

    def visible(move: str) -> list[str]:
        (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{move}</script></body>"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
        shown = subprocess.run(
            [str(CHROMIUM), *flags, "--dump-dom", (tmp_path / "page.html").as_uri()],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        images = re.findall(r'<img class="sample1" data-caption="([^"]*)"[^>]*?(hidden="")?>', shown)
        assert len(images) == count
        return [caption for caption, hidden in images if not hidden]

    captions = re.findall(r'<img class="sample1" data-caption="([^"]*)"', page)
    assert visible("") == captions[-1:]
    move = "const s = document.getElementById('slider1'); s.value = 0; s.dispatchEvent(new Event('input'));"
    assert visible(move) == captions[:1]

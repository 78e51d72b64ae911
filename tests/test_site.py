"""The site builds without warnings."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def test_the_site_builds_and_every_link_leads_to_a_page(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    pages = [*(tmp_path / "site").rglob("*.html")]
    for name in ("index", "evaluation", "normal_losses", "notebooks/own_loop", "repository/examples/ddp.py"):
        assert tmp_path / "site" / f"{name}.html" in pages
    for name, wanted in {"infobatch": "state_dict", "adapters": "__call__", "config": "batch_size"}.items():
        assert wanted in (tmp_path / "site" / "reference" / f"{name}.html").read_text()
    for page in pages:
        for link in re.findall(r'(?:href|src)="([^"#?:]+)["#?]', page.read_text()):
            assert page.name == "404.html" or (page.parent / link).exists(), (page, link)

"""Fixtures of the tests of evaluation: two runs, which no test changes except for evaluation.json."""

from pathlib import Path

import pytest
from programs import common, train


@pytest.fixture(scope="session")
def mae(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mae") / "run"
    train("train_mae.py", *common(pictures, folder, 2))
    return folder


@pytest.fixture(scope="session")
def flow(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow") / "run"
    train("train_diffusion.py", *common(pictures, folder, 2), "--adapter", "flow")
    return folder

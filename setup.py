"""Copies models/, configs/ and train_*.py into the package when a wheel is built; all else is in pyproject.toml.

In the repository they are at the top. In a user's environment `pretrain` must be the only name that this package takes.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TOP_LEVEL = ("models", "configs", "train_diffusion.py", "train_mae.py")


class BuildPy(build_py):
    """Builds the package. An editable install copies nothing: pretrain/__init__.py finds the files at the top."""

    def run(self) -> None:
        """Build."""
        super().run()
        if self.editable_mode:
            return
        for name in TOP_LEVEL:
            target = Path(self.build_lib, "pretrain", name)
            if Path(name).is_dir():
                shutil.copytree(name, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            else:
                shutil.copy(name, target)


setup(cmdclass={"build_py": BuildPy})

"""Everything else is in pyproject.toml. Models, recipes and programs lie at the top of the repository; in an installed
package they lie inside `pretrain`, so that it claims no other name in a user's environment."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BESIDE = ("models", "configs", "train_diffusion.py", "train_mae.py")


class BuildPy(build_py):
    """Copies them in, but for an editable install, which finds them where they are (pretrain/__init__.py)."""

    def run(self) -> None:
        """Build."""
        super().run()
        if self.editable_mode:
            return
        for name in BESIDE:
            target = Path(self.build_lib, "pretrain", name)
            if Path(name).is_dir():
                shutil.copytree(name, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            else:
                shutil.copy(name, target)


setup(cmdclass={"build_py": BuildPy})

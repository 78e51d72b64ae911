"""Cheaper pretraining of diffusion models and masked autoencoders, with proof."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.indexed import Indexed
    from pretrain.infobatch import InfoBatch

__version__ = "0.1.0"
__all__ = ["Indexed", "InfoBatch"]


def __getattr__(name: str):
    """Import on first use: `--help` must not wait for torch."""
    if name in __all__:
        return getattr(import_module(f"pretrain.{name.lower()}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

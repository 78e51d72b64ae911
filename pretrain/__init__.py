"""Cheaper pretraining of diffusion models and masked autoencoders, with proof."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.infobatch.indexed import Indexed
    from pretrain.infobatch.sampler import InfoBatch

__version__ = "0.2.0"
# In a checkout models, configs and programs lie beside this package; in an installed one inside it. Either way they are
# pretrain.models, pretrain.train_mae, ..., so that the name `models` stays the user's own.
_CHECKOUT = Path(__file__).resolve().parents[1]
HOME = _CHECKOUT if (_CHECKOUT / "train_mae.py").is_file() else Path(__file__).resolve().parent
if HOME == _CHECKOUT:
    __path__.append(str(HOME))
_HOMES = {"InfoBatch": "pretrain.infobatch.sampler", "Indexed": "pretrain.infobatch.indexed"}
__all__ = ["Indexed", "InfoBatch"]


def __getattr__(name: str):
    """Import on first use: `--help` must not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

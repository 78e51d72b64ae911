"""Pretraining of diffusion models and masked autoencoders with unbiased data pruning.

`from pretrain import InfoBatch, Indexed` is the sampler for your own training loop; it needs only torch and numpy.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.infobatch.indexed import Indexed
    from pretrain.infobatch.sampler import InfoBatch

__version__ = "0.2.0"
# In a checkout models/, configs/ and train_*.py are beside this package, in a wheel inside it (setup.py). Either way
# they are imported as pretrain.models, pretrain.train_mae, ..., so a user may have another package named `models`.
_CHECKOUT = Path(__file__).resolve().parents[1]
HOME = _CHECKOUT if (_CHECKOUT / "train_mae.py").is_file() else Path(__file__).resolve().parent
if HOME == _CHECKOUT:
    __path__.append(str(HOME))
_LAZY = {"InfoBatch": "pretrain.infobatch.sampler", "Indexed": "pretrain.infobatch.indexed"}
__all__ = ["Indexed", "InfoBatch"]


def __getattr__(name: str):
    """Import on first use, because `--help` must not wait for torch."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

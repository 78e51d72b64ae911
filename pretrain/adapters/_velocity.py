"""Networks of flow matching that predict images."""

from einops import rearrange
from torch import Tensor, nn

from pretrain.adapters import bare

MIN_TIME = 0.05  # by which the difference to a predicted image is divided at least (Li and He, 2025)


class VelocityFromImage(nn.Module):
    """A network that predicts the image, as one that predicts the velocity: (x_t - image) / max(t, MIN_TIME).

    Args:
        network: called as ``network(x_t, 1000 t, label)``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """The velocity, float32 [B, C, H, W], of noisy images x, of its shape, at times [B], with labels, int64 [B]."""
        t = rearrange((time / 1000).clamp(min=MIN_TIME), "b -> b 1 1 1")
        return (x - self.network(x, time, label).float()) / t


def shrinkage(model: nn.Module, t: Tensor) -> Tensor:
    """Velocities of a `VelocityFromImage` that predicts the right image, relative to the path's: t / max(t, MIN_TIME).

    Raises:
        ValueError: the model is none.
    """
    if not isinstance(bare(model), VelocityFromImage):
        raise ValueError("prediction sample needs a VelocityFromImage; pass the module that prepare(model) returns")
    return t / t.clamp(min=MIN_TIME)

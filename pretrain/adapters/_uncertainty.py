"""The learned uncertainty of EDM2."""

import torch
from torch import Tensor, nn


class UncertaintyHead(nn.Module):
    """A denoiser with a head that learns the logarithm of its error at each noise level.

    The log error u is a learned linear function of cos(k time) and sin(k time), k = 1 .. 16, and initially 0 (Karras et
    al., 2024; Kendall et al., 2018). Its parameters are trained, saved and averaged (EMA) with those of the network.

    Args:
        network: called as ``network(x, time, label)``, with time [B] between -pi and pi.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.log_error = nn.Linear(32, 1)
        nn.init.zeros_(self.log_error.weight)
        nn.init.zeros_(self.log_error.bias)

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor, uncertainty: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Call the network.

        Args:
            x: float32 [B, C, H, W].
            time: float32 [B].
            label: int64 [B]; -1 for no label.
            uncertainty: whether to return the log error too.

        Returns:
            The network's output, [B, C, H, W]; with `uncertainty` also u, float32 [B].
        """
        output = self.network(x, time, label)
        if not uncertainty:
            return output
        phase = time[:, None] * torch.arange(1, 17, device=time.device)
        with torch.autocast(time.device.type, enabled=False):  # part of the loss, which is computed in float32
            return output, self.log_error(torch.cat([phase.cos(), phase.sin()], dim=1)).squeeze(1)

"""Attention to some tokens."""

from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention


class CrossBlock(nn.Module):
    """Cross-attention to a context and an MLP; queries know nothing of each other (Fu et al. 2024, "Rethinking patch
    dependence for masked autoencoders", section 3.2).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.query, self.both, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor, context: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Queries [B, H, D] from queries [B, H, D] and a context [B, V, D]; the mask says what of it is looked at."""
        q = rearrange(self.query(self.norm1(x)), "b l (h d) -> b h l d", h=self.heads)
        k, v = rearrange(self.both(self.norm2(context)), "b l (n h d) -> n b h l d", n=2, h=self.heads)
        x = x + self.out(rearrange(scaled_dot_product_attention(q, k, v, attn_mask), "b h l d -> b l (h d)"))
        return x + self.mlp(self.norm3(x))


def with_prefix(there: Tensor, prefix: int) -> Tensor:
    """Who may be looked at, bool [B, 1, 1, prefix + N], where of N places [B, N] some are taken."""
    return pad(there, (prefix, 0), value=True)[:, None, None]

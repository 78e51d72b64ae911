"""Cross-attention for the decoder of a masked autoencoder, and attention masks."""

from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention


class CrossBlock(nn.Module):
    """A pre-norm transformer block of cross-attention to a context and an MLP, without self-attention of the queries.

    Fu et al., "Rethinking patch dependence for masked autoencoders", 2024, section 3.2.

    Args:
        width: channels of queries and context, D.
        heads: attention heads; they divide `width`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.query, self.both, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor, context: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Update the queries.

        Args:
            x: float32 [B, H, D]; the queries.
            context: float32 [B, V, D].
            attn_mask: bool [B, 1, 1, V], False for tokens of the context to ignore; None: all are used.

        Returns:
            float32 [B, H, D].
        """
        q = rearrange(self.query(self.norm1(x)), "b l (h d) -> b h l d", h=self.heads)
        k, v = rearrange(self.both(self.norm2(context)), "b l (n h d) -> n b h l d", n=2, h=self.heads)
        x = x + self.out(rearrange(scaled_dot_product_attention(q, k, v, attn_mask), "b h l d -> b l (h d)"))
        return x + self.mlp(self.norm3(x))


def attention_mask(valid: Tensor, prefix: int) -> Tensor:
    """A mask for attention to `prefix` tokens, which are all valid, and to N tokens of which some are.

    Args:
        valid: bool [B, N]; False for tokens to ignore.
        prefix: number of tokens before them.

    Returns:
        bool [B, 1, 1, prefix + N], as `scaled_dot_product_attention` takes it.
    """
    return pad(valid, (prefix, 0), value=True)[:, None, None]

"""Decoder: one block of the transformer, attention and feed-forward with a way around each.

    x = norm1(x + attention(x))
    x = norm2(x + ffn(x))

Post-norm, as in GPT-1 and in the first transformer: sub-layer, add what came in, normalise
(Vaswani et al. 2017, section 3.1; Radford et al. 2018, section 4.1). GPT-2 moved the norm before
the sub-layer, which trains more easily; why the residual `x +` is needed at all: run this file.

Does not know: how a sub-layer works inside. Needs: torch, Attention.py, FFN.py.
"""

import torch
from torch import Tensor, nn

from Attention import KVCache, MultiHeadAttention
from FFN import FeedForward


class Decoder(nn.Module):
    """One post-norm decoder block.

    num_heads: H; emb_size: E; head_size: D; max_seq_len: the longest sequence; dropout: the share
    of each sub-layer's outputs set to zero in training.
    """

    def __init__(self, num_heads: int, emb_size: int, head_size: int, max_seq_len: int,
                 dropout: float = 0.1):
        super().__init__()
        self.attention = MultiHeadAttention(num_heads, emb_size, head_size, max_seq_len, dropout)
        self.ffn = FeedForward(emb_size, dropout)
        self.norm1 = nn.LayerNorm(emb_size)
        self.norm2 = nn.LayerNorm(emb_size)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, E) -> (B, T, E). With a cache, x are the tokens that come after the cached ones.

        >>> block = Decoder(num_heads=2, emb_size=8, head_size=4, max_seq_len=16)
        >>> block(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
        """
        x = self.norm1(x + self.attention(x, cache))
        return self.norm2(x + self.ffn(x))


def first_layer_gradient(num_blocks: int = 12, residual: bool = True) -> float:
    """The gradient norm that reaches the first block's FFN of a stack, with or without `x +`."""
    torch.manual_seed(0)
    blocks = [Decoder(4, 32, 8, 16, dropout=0.0) for _ in range(num_blocks)]
    x = torch.randn(4, 16, 32)
    for block in blocks:
        if residual:
            x = block(x)
        else:
            x = block.norm1(block.attention(x))
            x = block.norm2(block.ffn(x))
    (x * torch.randn(x.shape)).mean().backward()
    return blocks[0].ffn.expand.weight.grad.norm().item()


def demo() -> None:
    """Print the gradient that arrives at the first of 12 blocks, with and without residuals."""
    print("How much of the error signal reaches the first of N blocks (gradient norm)?\n")
    print("   N   with x + f(x)   with f(x) alone")
    for num_blocks in (1, 2, 4, 8, 12):
        kept, lost = (first_layer_gradient(num_blocks, residual) for residual in (True, False))
        print(f"  {num_blocks:2d}   {kept:13.2e}   {lost:15.2e}")
    print("\nEach sub-layer alone passes a part of the signal on; the sum always passes all of it.")


if __name__ == "__main__":
    demo()

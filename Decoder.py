"""Decoder: a transformer block, attention and feed-forward, each with a residual connection.

    x = norm1(x + attention(x))
    x = norm2(x + ffn(x))

Post-norm, as in GPT-1 and in the first transformer: sub-layer, add its input, normalise
(Vaswani et al. 2017, section 3.1; Radford et al. 2018, section 4.1). GPT-2 moved the norm before
the sub-layer, which trains more easily. Run this file to see why the residual `x +` is needed.

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
        """(B, T, E) -> (B, T, E). With a cache, x holds the tokens after the cached ones.

        >>> block = Decoder(num_heads=2, emb_size=8, head_size=4, max_seq_len=16)
        >>> block(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
        """
        x = self.norm1(x + self.attention(x, cache))
        return self.norm2(x + self.ffn(x))


def first_layer_gradient(num_blocks: int, residual: bool = True, norm: bool = True) -> float:
    """The gradient norm at the first block's FFN in a stack of blocks, with or without parts.

    >>> first_layer_gradient(12) > 0.01, first_layer_gradient(12, norm=False) > 0.01
    (True, True)
    >>> first_layer_gradient(12, residual=False, norm=False) < 1e-12
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [Decoder(4, 32, 8, 16, dropout=0.0) for _ in range(num_blocks)]
        x, target = torch.randn(2, 4, 16, 32)
    for block in blocks:
        for sub_layer, normalise in ((block.attention, block.norm1), (block.ffn, block.norm2)):
            x = x + sub_layer(x) if residual else sub_layer(x)
            x = normalise(x) if norm else x
    (x * target).mean().backward()
    return blocks[0].ffn.expand.weight.grad.norm().item()


def demo() -> None:
    """Print the gradient that arrives at the first of N blocks, with and without residuals."""
    print("How much of the error signal reaches the first of N blocks? (gradient norm)\n")
    print("   N         f(x)     x + f(x)   norm(x + f(x)), our block")
    for num_blocks in (1, 2, 4, 8, 12):
        alone = first_layer_gradient(num_blocks, residual=False, norm=False)
        added = first_layer_gradient(num_blocks, residual=True, norm=False)
        block = first_layer_gradient(num_blocks)
        print(f"  {num_blocks:2d}     {alone:8.1e}     {added:8.1e}   {block:8.1e}")
    print("\nf(x) alone passes on only part of the signal, layer after layer, until it vanishes.\n"
          "The sum passes on all of it. (The norm keeps the signal's size, too, but alone it\n"
          "could only scale up what is left of x; the sum passes on x itself.)")


if __name__ == "__main__":
    demo()

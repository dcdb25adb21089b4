"""Attention: each token looks at the tokens before it and takes what it needs.

    Attention(Q, K, V) = softmax( Q·Kᵀ / √D + M ) · V,   M[i, j] = 0 if j <= i, else -inf

Every token asks a question (query) and offers a label (key) and a content (value). Its output
is the mean of the contents, weighted by how well each label answers its question (Vaswani et al.
2017, section 3.2.1, equation 1). The mask M hides the future: token i sees the tokens 0 … i.
Several heads ask different questions at once; a linear layer mixes their answers (section 3.2.2).

Unlike in GPT-1, dropout is on the output, not on the weights, so that fused kernels can be used.
Does not know: layers, vocabulary, training. Needs: torch. Copy this file alone and it works.

Letters, the same in every file: B batch, T tokens in a sequence, E emb_size, H num_heads,
D head_size, V vocab_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The formula, and nothing else: returns (output, weights).

    q: (…, T, D); k, v: (…, S, D); mask: (T, S), 0 where a token may look and -inf elsewhere.
    output: (…, T, D); weights: (…, T, S), each row sums to 1.

    >>> q = k = v = torch.eye(2)
    >>> mask = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    >>> attention(q, k, v, mask)[1]  # the first token can only look at itself
    tensor([[1.0000, 0.0000],
            [0.3302, 0.6698]])
    """
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (…, T, D) @ (…, D, S) -> (…, T, S)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1)
    return weights @ v, weights  # (…, T, S) @ (…, S, D) -> (…, T, D)


def causal_mask(T: int, S: int, like: Tensor) -> Tensor:
    """M of the formula, (T, S), for the last T of S tokens: 0 up to its own position, then -inf.

    >>> causal_mask(2, 3, like=torch.zeros(0))
    tensor([[0., 0., -inf],
            [0., 0., 0.]])
    """
    return torch.full((T, S), -torch.inf, device=like.device, dtype=like.dtype).triu(S - T + 1)


class KVCache:
    """The keys and values that one layer has seen, so that generation doesn't recompute them.

    Allocated once, (B, H, max_seq_len, D) each; `length` of the positions are filled.
    """

    def __init__(self, batch: int, num_heads: int, max_seq_len: int, head_size: int,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        shape = (batch, num_heads, max_seq_len, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of T new tokens, (B, H, T, D); return all (B, H, length, D)."""
        start, self.length = self.length, self.length + k.shape[-2]
        if self.length > self.keys.shape[-2]:
            self.length = start
            raise ValueError(
                f"{start} cached and {k.shape[-2]} new tokens: the cache holds "
                f"{self.keys.shape[-2]}; start a new one with the last tokens"
            )
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class HeadAttention(nn.Module):
    """Masked self-attention: one head, or several of the same size side by side.

    emb_size: E; head_size: D; max_seq_len: the longest sequence; num_heads: H, 1 by default.
    The heads share one matrix product: head h owns the columns h·D … (h+1)·D-1 of Q, K and V.
    """

    def __init__(self, emb_size: int, head_size: int, max_seq_len: int, num_heads: int = 1):
        super().__init__()
        self.num_heads, self.head_size, self.max_seq_len = num_heads, head_size, max_seq_len
        self.qkv = nn.Linear(emb_size, 3 * num_heads * head_size)  # Q, K, V in one go

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, E) -> (B, T, H·D). With a cache, x holds the T tokens after the cached ones.

        ValueError if the sequence, cached tokens included, is longer than max_seq_len.

        >>> HeadAttention(emb_size=8, head_size=4, max_seq_len=16)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 4])
        """
        q, k, v = self._project(x)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, T, D) -> (B, H, S, D), S = cached + T
        T, S = q.shape[-2], k.shape[-2]
        if torch.is_grad_enabled() and q.is_cpu and q.dtype == torch.bfloat16:
            # torch's fused CPU kernel has a slow backward pass in bfloat16: the formula is faster
            out, _ = attention(q, k, v, causal_mask(T, S, like=q))
        elif T == S:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # a single new token may look at everything
            mask = causal_mask(T, S, like=q) if T > 1 else None
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H·D): heads side by side

    def weights(self, x: Tensor) -> Tensor:
        """The attention weights, to look at: (B, T, E) -> (B, H, T, T), rows sum to 1."""
        q, k, v = self._project(x)
        return attention(q, k, v, causal_mask(x.shape[1], x.shape[1], like=q))[1]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x.shape
        if T > self.max_seq_len:
            raise ValueError(
                f"a sequence of {T} tokens: max_seq_len is {self.max_seq_len}; shorten the "
                f"sequence or build the model with a larger max_seq_len"
            )
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, self.head_size)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, T, 3·H·D) -> 3 × (B, H, T, D)


class MultiHeadAttention(nn.Module):
    """num_heads heads in one batched computation -> one linear layer -> dropout.

    num_heads: H; emb_size: E; head_size: D (H·D need not equal E); max_seq_len: the longest
    sequence; dropout: the share of outputs set to zero in training, 0 <= dropout < 1.
    """

    def __init__(self, num_heads: int, emb_size: int, head_size: int, max_seq_len: int,
                 dropout: float = 0.1):
        super().__init__()
        self.heads = HeadAttention(emb_size, head_size, max_seq_len, num_heads)
        self.linear = nn.Linear(num_heads * head_size, emb_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, E) -> (B, T, E). Cache and errors: see HeadAttention.forward.

        >>> layer = MultiHeadAttention(num_heads=2, emb_size=8, head_size=3, max_seq_len=16)
        >>> layer(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
        """
        return self.dropout(self.linear(self.heads(x, cache)))  # (B, T, H·D) -> (B, T, E)

    def weights(self, x: Tensor) -> Tensor:
        """Who looks at whom: (B, T, E) -> (B, H, T, T)."""
        return self.heads.weights(x)


def demo() -> None:
    """Print who looks at whom in a sentence."""
    words = ["the", "cat", "and", "the", "dog", "and", "the", "bird"]
    names = sorted(set(words))
    x = 2.5 * torch.eye(len(names))[[names.index(word) for word in words]]  # (T, D), one-hot
    _, weights = attention(x, x, x, causal_mask(len(words), len(words), like=x))
    print("Who looks at whom, in percent? Query = key = the word itself, so each word finds its\n"
          "equals. A row sums to 100; right of the diagonal is the future, which the mask hides.\n")
    print("      " + "".join(f"{word:>6}" for word in words))
    for t, (word, row) in enumerate(zip(words, weights, strict=True)):
        print(f"{word:>6}" + "".join(f"{100 * w:6.0f}" for w in row[: t + 1]))
    print("\nA trained head makes its queries and keys from x with learned matrices;\n"
          "sample.py draws them: set PICTURES = True there.")


if __name__ == "__main__":
    demo()

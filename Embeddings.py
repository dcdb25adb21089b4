"""Embeddings: what a token is and where it stands, as vectors.

    x = TokenEmbedding[id] + PositionalEmbedding[position]

A network computes with vectors, not with ids, so each id of the vocabulary has one learned row of
E numbers. Attention sees a *set* of vectors, so each position has a learned row as well; GPT.py
adds the two (Radford et al. 2018, section 3.1, equation 2: h0 = U·We + Wp).

Does not know: text, files, attention. Needs: torch. Copy this file alone and it works.

Letters, the same in every file: B batch, T tokens in a sequence, E emb_size, H num_heads,
D head_size, V vocab_size.
"""

import torch
from torch import Tensor, nn


class TokenEmbeddings(nn.Module):
    """One learned vector for each token of the vocabulary.

    vocab_size: V, how many different ids there are (0 … V-1).
    emb_size: E, the width of a vector.
    """

    def __init__(self, vocab_size: int, emb_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, emb_size)

    def forward(self, x: Tensor) -> Tensor:
        """ids (B, T) of any integer type -> vectors (B, T, E). ValueError for ids outside 0 … V-1.

        >>> TokenEmbeddings(vocab_size=10, emb_size=4)(torch.tensor([[1, 2, 1]])).shape
        torch.Size([1, 3, 4])
        """
        try:
            return self.embedding(x)  # (B, T) -> (B, T, E)
        except (IndexError, RuntimeError):  # free while ids are right; on a GPU check_ids first
            return self.embedding(check_ids(x, self.embedding.num_embeddings))


class PositionalEmbeddings(nn.Module):
    """One learned vector for each position (learned, as in GPT-1, not sines).

    max_seq_len: how many positions there are; a model can't look back further.
    emb_size: E, the width of a vector.
    """

    def __init__(self, max_seq_len: int, emb_size: int):
        super().__init__()
        self.embedding = nn.Embedding(max_seq_len, emb_size)

    def forward(self, seq_len: int, start: int = 0) -> Tensor:
        """The vectors of the positions start … start+seq_len-1: (T, E).

        ValueError if one of them is outside 0 … max_seq_len-1.

        >>> PositionalEmbeddings(max_seq_len=8, emb_size=4)(seq_len=3, start=5).shape
        torch.Size([3, 4])
        """
        max_seq_len = self.embedding.num_embeddings
        if seq_len < 1 or start < 0 or start + seq_len > max_seq_len:
            raise ValueError(
                f"positions {start} to {start + seq_len - 1} (seq_len={seq_len}, start={start}): "
                f"there are {max_seq_len}, 0 to {max_seq_len - 1}; shorten the sequence or build "
                f"the model with a larger max_seq_len"
            )
        return self.embedding.weight[start : start + seq_len]  # rows of a table: (T, E)


def check_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """The ids as int64. ValueError if there are none, or some are not in the vocabulary."""
    if ids.numel() == 0:
        raise ValueError(f"a batch of shape {tuple(ids.shape)}: it must have at least one token")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids of dtype {ids.dtype}: token ids are whole numbers; use x.long()")
    ids = ids.long()
    low, high = (bound.item() for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"id {low if low < 0 else high}: the vocabulary has the ids 0 to "
                         f"{vocab_size - 1}; encode the text with the model's own tokenizer")
    return ids


def demo() -> None:
    """Print two tiny tables and their sum."""
    torch.manual_seed(0)
    tokens, positions = TokenEmbeddings(5, 3), PositionalEmbeddings(4, 3)
    x = torch.tensor([[2, 4, 2]])
    print("ids", x[0].tolist(), "-> token vector + position vector = what the first block sees\n")
    for t, (token, position) in enumerate(zip(tokens(x)[0], positions(3), strict=True)):
        rows = ["[" + " ".join(f"{v:5.2f}" for v in row) + "]"
                for row in (token, position, token + position)]
        print(f"id {x[0, t]} at {t}:  {rows[0]} + {rows[1]} = {rows[2]}")
    print("\nThe id 2 appears twice: the same token vector, but not the same sum.")


if __name__ == "__main__":
    demo()

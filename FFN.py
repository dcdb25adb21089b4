"""FFN: the feed-forward network, which processes each token on its own.

    FFN(x) = dropout( W2 · max(0, W1 · x + b1) + b2 ),   E -> 4E -> E

Attention mixes tokens; this works on each token alone, with the same weights for all of them
(Vaswani et al. 2017, section 3.3, equation 2; the fourfold width is theirs, too). They used ReLU;
GPT-1 used GELU, which is one of the exercises.

Does not know: positions, heads, other tokens. Needs: torch. Copy this file alone and it works.
"""

import torch
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them, then dropout.

    emb_size: E. dropout: the share of outputs set to zero in training, 0 <= dropout < 1.
    """

    def __init__(self, emb_size: int, dropout: float = 0.1):
        super().__init__()
        self.expand = nn.Linear(emb_size, 4 * emb_size)
        self.contract = nn.Linear(4 * emb_size, emb_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, E), each token on its own.

        >>> FeedForward(emb_size=8)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        """
        x = torch.relu(self.expand(x))  # (B, T, E) -> (B, T, 4E)
        return self.dropout(self.contract(x))  # (B, T, 4E) -> (B, T, E)


def demo() -> None:
    """Show that one hidden layer learns a bent line."""
    torch.manual_seed(0)
    ffn = FeedForward(emb_size=1, dropout=0.0)
    optimizer = torch.optim.Adam(ffn.parameters(), lr=0.05)
    x = torch.linspace(-2, 2, 41).view(1, -1, 1)
    for _ in range(300):
        loss = ((ffn(x) - x.abs()) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("Four ReLU units (E=1, 4E=4) learn y = |x|, which no linear layer can:\n")
    for value in (-2.0, -1.0, 0.0, 1.0, 2.0):
        y = ffn(torch.tensor([[[value]]])).item()
        print(f"  x = {value:4.1f}   y = {y:4.2f}  " + "#" * round(max(y, 0) * 15))
    print(f"\nmean squared error {loss.item():.5f}")


if __name__ == "__main__":
    demo()

#!/usr/bin/env bash
# scaled_dot_product_attention(is_causal=True) with one query and many keys looks at the first key
# only.
#
# Version: torch 2.13.0.
# Seen: a query of length 1, five keys and values 0, 1, 2, 3, 4. With is_causal=True the result is
# 0, the value of the first key; without, a mixture of all five.
# Why one guesses wrong: generating with a key/value cache, the one query is the newest token and
# may see every key, so "causal" should change nothing. But the triangle starts in the upper left
# corner: query i sees the keys 0 to i, however many keys come before it. The shapes fit, nothing is
# raised, and the model writes nonsense from the second token on.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import torch
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
q, k = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 5, 4)
v = torch.arange(5.0).view(1, 1, 5, 1)
causal = scaled_dot_product_attention(q, k, v, is_causal=True).item()
free = scaled_dot_product_attention(q, k, v).item()
formula = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).item()
print(f"is_causal=True {causal}, without {free:.4f}, by the formula {formula:.4f}")
assert causal == 0 and abs(free - formula) < 1e-5 and free > 1
END

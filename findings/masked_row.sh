#!/usr/bin/env bash
# A query that may see no key: 0 in scaled_dot_product_attention, NaN in MultiheadAttention.
#
# Version: torch 2.13.0 (CPU).
# Seen: the first of three queries is masked from every key. scaled_dot_product_attention gives
# zeros for it, with a mask of booleans as with one of -inf; softmax(q k / sqrt(d) + mask) v gives
# NaN. MultiheadAttention gives NaN when it also returns the weights, as it does by default, and
# finite numbers when it doesn't (need_weights=False).
# Why one guesses wrong: one library, one formula, one mask; and whether the weights are asked for
# should not change the output. With padding on the left such rows are common. A test of a new
# attention against one path passes, against the other it fails.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 3, 4)
see = torch.tensor([[False, False, False], [True, False, False], [True, True, True]])
added = torch.zeros(3, 3).masked_fill(~see, float("-inf"))
fused = [scaled_dot_product_attention(q, k, v, attn_mask=mask)[0, 0] for mask in (see, added)]
formula = ((q @ k.transpose(-1, -2) / 2 + added).softmax(-1) @ v)[0, 0]
layer = nn.MultiheadAttention(4, 1, batch_first=True)
x = torch.randn(1, 3, 4)
layers = [layer(x, x, x, attn_mask=~see, need_weights=need)[0][0] for need in (True, False)]
print("fused", fused[0][0], "formula", formula[0], "layer", *(out[0].detach() for out in layers))
for out in fused:
    assert (out[0] == 0).all() and torch.allclose(out[1:], formula[1:], atol=1e-6)
assert formula[0].isnan().all()
assert layers[0][0].isnan().all() and layers[1].isfinite().all()
assert torch.allclose(layers[0][1:], layers[1][1:], atol=1e-6)
END

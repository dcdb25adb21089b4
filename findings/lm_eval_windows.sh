#!/usr/bin/env bash
# lm-eval scores a long text in blocks of which most begin with one token of context.
#
# Version: lm_eval 0.4.13.
# Seen: ten tokens, a model of four positions, the settings that its rolling log-likelihood uses (a
# context of 1): the tokens 4 to 7 are predicted with token 3 alone before the first of them, and
# only the last block, which is too short, is filled up with earlier tokens (5, 6, 7 before 8 and
# 9).
# Why one guesses wrong: "rolling" sounds like a window that moves on token by token, so that each
# token is predicted from as many as the model can read. Bits per byte from lm-eval are therefore
# higher than those of a sliding window, the more so the fewer positions a model has, and a text
# whose length isn't a multiple of the block gets a better end.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lm_eval==0.4.13
cd "$folder"
"$folder/venv/bin/python" - <<'END'
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

windows = get_rolling_token_windows(list(range(10)), prefix_token=-1, max_seq_len=4, context_len=1)
seen = [tuple(map(list, make_disjoint_window(window))) for window in windows]
print(seen)
assert seen == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])], seen
END

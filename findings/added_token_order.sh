#!/usr/bin/env bash
# Of two added tokens that begin alike, tokenizers takes the shorter one, if "normalized" differs.
#
# Version: tokenizers 0.23.3.
# Seen: with the added tokens "<|a|>" (normalized: false) and "<|a|>b" (normalized: true), and no
# normalizer at all, "<|a|>b" is split into "<|a|>" and "b". With the same value on both, whichever,
# it is the one token "<|a|>b".
# Why one guesses wrong: added tokens are known to be matched leftmost and longest, and without a
# normalizer "normalized" seems to say nothing. But the text is searched twice: first, all of it, for
# the tokens that are not normalized, then only what lies between those for the others.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'END'
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers


def tokens(short, long):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.add_special_tokens([AddedToken("<|a|>", normalized=short),
                                  AddedToken("<|a|>b", normalized=long)])
    return tokenizer.encode("<|a|>b").tokens


seen = tokens(False, True), tokens(True, True), tokens(False, False)
print(seen)
assert seen == (["<|a|>", "b"], ["<|a|>b"], ["<|a|>b"]), seen
END

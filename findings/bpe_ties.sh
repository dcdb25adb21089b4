#!/usr/bin/env bash
# Two byte pairs are equally frequent: which is merged first?
#
# Versions: tokenizers 0.23.3, rustbpe 0.1.0, bpeasy 0.1.6.
# Seen: in "ab\n\nab\n\n" the pairs "ab" and "\n\n" occur twice each. rustbpe and bpeasy merge the
# two newlines first, tokenizers merges "ab" first.
# Why one guesses wrong: all three train byte-level BPE, the ids of single bytes are 0 to 255 in
# each, and ties go to the smaller pair of ids. But tokenizers numbers bytes by the printable
# character that stands for each. The characters for space, newline and other bytes without a
# picture of their own begin at U+0100, behind every letter. So the same text and the same rule give
# other merges, and from the first tie on other ids.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3 rustbpe==0.1.0 bpeasy==0.1.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import json

import bpeasy
import rustbpe
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

TEXT, PATTERN = "ab\n\nab\n\n", r"\s+|\S+"

ours = Tokenizer(models.BPE())
ours.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(PATTERN), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
ours.train_from_iterator([TEXT], trainers.BpeTrainer(
    vocab_size=258, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
merges = json.loads(ours.to_str())["model"]["merges"]
first = {"tokenizers": "".join(merges[0]).replace("Ċ", "\n").encode()}

other = rustbpe.Tokenizer()
other.train_from_iterator([TEXT], 258, pattern=PATTERN)
first["rustbpe"] = next(bytes(token) for token, rank in other.get_mergeable_ranks() if rank == 256)

ranks = bpeasy.train_bpe(iter([TEXT]), PATTERN, 10, 258)
first["bpeasy"] = next(token for token, rank in ranks.items() if rank == 256)

print(first)
assert first == {"tokenizers": b"ab", "rustbpe": b"\n\n", "bpeasy": b"\n\n"}, first
END

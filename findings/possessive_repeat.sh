#!/usr/bin/env bash
# "{1,3}+" is a possessive repeat in tiktoken and "once or more often" in tokenizers.
#
# Versions: tokenizers 0.23.3, tiktoken 0.14.0.
# Seen: with the pattern \p{N}{1,3}+ tiktoken cuts "1234567" into 123, 456 and 7; tokenizers' Split
# leaves it in one piece. Written as \p{N}{1,3} both cut in threes.
# Why one guesses wrong: tiktoken's own newer patterns are written with possessive repeats, and with
# "++", "?+" and "*+" the two engines agree, so the string looks fit to be copied into a
# tokenizer.json. But Oniguruma, the engine inside tokenizers, reads a plus after braces as a second
# repeat around the first. Numbers then are never cut, and the ids are other ones.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3 tiktoken==0.14.0
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import tiktoken
from tokenizers import Regex, pre_tokenizers

TEXT = "1234567"
digits = {bytes([b]): b for b in range(256)}
# every run of digits of TEXT is a token, so the tokens are the pieces
pieces = {TEXT[a:b].encode() for a in range(7) for b in range(a + 2, 8)}
ranks = digits | {piece: 256 + n for n, piece in enumerate(sorted(pieces, key=len))}


def both(pattern):
    encoding = tiktoken.Encoding("pieces", pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={})
    theirs = [encoding.decode([token]) for token in encoding.encode(TEXT)]
    split = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(TEXT)
    return theirs, [piece for piece, _ in split]


for pattern in (r"\p{N}{1,3}", r"\p{N}{1,3}+", r"\p{N}++"):
    print(pattern, *both(pattern))
threes = ["123", "456", "7"]
assert both(r"\p{N}{1,3}") == (threes, threes)
assert both(r"\p{N}{1,3}+") == (threes, [TEXT])
assert both(r"\p{N}++") == ([TEXT], [TEXT])
END

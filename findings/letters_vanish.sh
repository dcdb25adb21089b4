#!/usr/bin/env bash
# A byte-level BPE that tokenizers has trained drops bytes that its training text lacked, silently.
#
# Version: tokenizers 0.23.3.
# Seen: trained on "the cat sat on the mat", "the zebra sat" is encoded and decoded to "the ea sat".
# With initial_alphabet=ByteLevel.alphabet() it comes back whole.
# Why one guesses wrong: byte-level BPE is known to encode any text, as every byte is a token. In
# tokenizers the pre-tokenizer ByteLevel only rewrites bytes as characters; which of the 256 become
# tokens is decided by the trainer, from the text. BPE without an unknown token then skips what it
# doesn't know: no error, no token, no trace.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'END'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def round_trip(text, **options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["the cat sat on the mat"], trainers.BpeTrainer(
        vocab_size=300, show_progress=False, **options))
    return tokenizer.decode(tokenizer.encode(text).ids)


TEXT = "the zebra sat"
seen = round_trip(TEXT), round_trip(TEXT, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
print(seen)
assert seen == ("the ea sat", TEXT), seen
END

#!/usr/bin/env bash
# tokenizers numbers the added tokens of a tokenizer.json itself: the ids in the file don't count.
#
# Version: tokenizers 0.23.3.
# Seen: a file whose 256 byte tokens have the ids 0 to 255 and whose one added token has the id 1000
# encodes that token as 256, knows no token 1000, and decodes it to the empty text. Two added tokens
# with the ids 300 and 256, in this order, become 256 and 257.
# Why one guesses wrong: each entry of `added_tokens` names its id, model.vocab is read as it stands,
# and the library writes the same field. Nothing is said on loading. A model whose rows leave room
# before its special tokens then looks up other rows than the ones it was trained with.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import json
from tokenizers import Tokenizer, models, pre_tokenizers


def load(added):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data = json.loads(plain.to_str()) | {"added_tokens": [
        {"id": i, "content": text, "special": True, **off} for text, i in added]}
    return Tokenizer.from_str(json.dumps(data))


one, two = load([("<|end|>", 1000)]), load([("<|a|>", 300), ("<|b|>", 256)])
seen = (one.encode("<|end|>").ids, one.id_to_token(1000), one.decode([1000]),
        two.encode("<|a|><|b|>").ids)
print(seen)
assert seen == ([256], None, "", [256, 257]), seen
END

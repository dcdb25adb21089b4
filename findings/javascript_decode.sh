#!/usr/bin/env bash
# The same tokenizer.json decodes to other text in JavaScript: spaces before punctuation are gone.
#
# Versions: npm @huggingface/tokenizers 0.2.0, beside tokenizers 0.23.3 for Python.
# Seen: a byte-level tokenizer without merges encodes "a [ 1 ] , b ! it 's" and decodes it to the
# same text in Python, and to "a [ 1 ], b! it's" in JavaScript. With clean_up_tokenization_spaces:
# false among the settings (tokenizer_config.json) JavaScript gives the text back.
# Why one guesses wrong: encoding gives the same ids in both, byte-level decoding is exact, and the
# file says nothing about spaces. But the JavaScript class tidies up English punctuation unless the
# settings forbid it, and settings written by transformers 5 for Python no longer mention it. Code
# and tables come out changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3
npm init --yes >npm.log
npm install --silent @huggingface/tokenizers@0.2.0
venv/bin/python - <<'END'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save("tokenizer.json")
text = "a [ 1 ] , b ! it 's"
assert tokenizer.decode(tokenizer.encode(text).ids) == text
END
cat >decode.mjs <<'END'
import assert from "node:assert";
import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";

const file = JSON.parse(readFileSync("tokenizer.json", "utf8"));
const text = "a [ 1 ] , b ! it 's";
const seen = [{}, { clean_up_tokenization_spaces: false }].map((settings) => {
  const tokenizer = new Tokenizer(file, settings);
  return tokenizer.decode(tokenizer.encode(text).ids);
});
console.log(seen);
assert.deepStrictEqual(seen, ["a [ 1 ], b! it's", text]);
END
node decode.mjs

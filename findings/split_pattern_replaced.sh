#!/usr/bin/env bash
# AutoTokenizer replaces the splitting pattern of a tokenizer.json, depending on the model beside
# it.
#
# Version: transformers 5.24.0 (with tokenizers 0.23.3). 4.57.6 keeps the file's pattern in each
# case.
# Seen: a tokenizer.json with a pattern of its own gives 12|3|4| |a for "1234 a". With model_type
# "qwen2" in config.json it gives 1|2|3|4| a, though tokenizer_config.json says
# PreTrainedTokenizerFast; with "gpt2" and no tokenizer_class 12|3|4| a. With model_type "llama" the
# file is kept.
# Why one guesses wrong: tokenizer.json describes the whole tokenizer, splitting included, and
# tokenizers itself obeys it. But the class of a model type takes only vocabulary and merges from
# the file and puts the pattern that this family of models was published with in front of them. No
# warning appears; a model trained with the file's pattern just reads other tokens.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer


def words(folder, model_type, **config):
    """The tokens of a text by a file that cuts digits in threes and leaves spaces alone."""
    tokenizer = Tokenizer(models.BPE(
        vocab={token: n for n, token in enumerate(["1", "2", "3", "4", "a", "Ġ", "12", "Ġa"])},
        merges=[("1", "2"), ("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+| "), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    Path(folder).mkdir()
    tokenizer.save(f"{folder}/tokenizer.json")
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    Path(folder, "config.json").write_text(json.dumps({"model_type": model_type}), "utf-8")
    return AutoTokenizer.from_pretrained(folder).tokenize("1234 a")


kept, fast = ["12", "3", "4", "Ġ", "a"], {"tokenizer_class": "PreTrainedTokenizerFast"}
seen = [words("llama", "llama", **fast), words("qwen2", "qwen2", **fast), words("gpt2", "gpt2")]
print(*seen, sep="\n")
assert seen == [kept, ["1", "2", "3", "4", "Ġa"], ["12", "3", "4", "Ġa"]]
END

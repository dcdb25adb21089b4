#!/usr/bin/env bash
# GPT-1 in transformers has no key/value cache: each new token reads the whole text again.
#
# Versions: transformers 5.24.0, torch 2.13.0. 4.57.6 does the same.
# Seen: generate(use_cache=True) of five tokens after a prompt of three gives the first layer 3, 4,
# 5, 6 and 7 tokens; GPT-2's is given 3, 1, 1, 1 and 1.
# Why one guesses wrong: both classes share generate, which takes use_cache=True from either without
# a word, and the two models differ in little but the place of the norms. Whoever measures a decoder
# of the GPT-1 kind through transformers measures this.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

seen = {}
for make, config in ((OpenAIGPTLMHeadModel, OpenAIGPTConfig), (GPT2LMHeadModel, GPT2Config)):
    torch.manual_seed(0)
    model = make(config(vocab_size=50, n_positions=32, n_embd=32, n_head=4, n_layer=2,
                        bos_token_id=None, eos_token_id=None)).eval()
    lengths = seen[make.__name__] = []
    model.transformer.drop.register_forward_hook(lambda *call: lengths.append(call[-1].shape[1]))
    prompt = torch.tensor([[5, 6, 7]])
    model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                   max_new_tokens=5, pad_token_id=0)
print(seen)
assert seen == {"OpenAIGPTLMHeadModel": [3, 4, 5, 6, 7], "GPT2LMHeadModel": [3, 1, 1, 1, 1]}, seen
END

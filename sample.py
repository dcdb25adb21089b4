"""sample.py: what the trained net writes. Edit the constants, then: python sample.py

Loads the best model of the run in OUT_DIR and its tokenizer, and prints what it makes of PROMPT,
token by token. Train first: python train.py
"""

import codecs
import hashlib
import os
import sys
import time
from pathlib import Path

import torch

from BPE import BPE
from GPT import GPT, pick_device

# ------------------------------------------------------------------------------------------------
OUT_DIR = "out"        # the folder of the run
PROMPT = ""            # how the text begins; "": the net begins a new document
NUM_SAMPLES = 1        # continuations of the prompt, made side by side
MAX_NEW_TOKENS = 300   # the length of each, in tokens; it may end earlier, where a document would
TEMPERATURE = 0.8      # 0: always the likeliest token; 1: as learned; above: more daring
TOP_K = 50             # draw from the k likeliest tokens only; None: from all of them
TOP_P = 0.95           # draw from the likeliest that have this probability together; None: from all
SEED = 1337            # another seed, another text; None: another text each time
DEVICE = "auto"        # "cuda", "mps", "cpu", …; "auto": the first of these that is there
# ------------------------------------------------------------------------------------------------

END = "<|endoftext|>"  # the special token between two documents


def main() -> None:
    out = Path(OUT_DIR)
    for file in (out / "model.pt", out / "tokenizer.json"):
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is not there: run python train.py first, or set OUT_DIR to "
                f"the folder of a finished run"
            )
    if NUM_SAMPLES < 1:
        raise ValueError(f"NUM_SAMPLES={NUM_SAMPLES!r}: pick a whole number, 1 or more")
    device = pick_device(DEVICE)
    model = GPT.load(out / "model.pt", device)
    if model.notes.get("tokenizer_sha256") != hashlib.sha256(
            (out / "tokenizer.json").read_bytes()).hexdigest():
        raise ValueError(
            f"{out / 'tokenizer.json'} is not the tokenizer that {out / 'model.pt'} was "
            f"trained with: put the right one there, or train anew"
        )
    bpe = BPE.load(out / "tokenizer.json")
    end_token = bpe.special_tokens[END]
    generator = None if SEED is None else torch.Generator(device).manual_seed(SEED)

    x = torch.tensor([bpe.encode(PROMPT) or [end_token]] * NUM_SAMPLES)  # (B, T)
    steps = model.stream(x, MAX_NEW_TOKENS, True, TEMPERATURE, TOP_K, TOP_P, stop_token=end_token,
                         generator=generator)
    rows = [[] for _ in range(NUM_SAMPLES)]  # the new tokens of each sample
    whole_characters = codecs.getincrementaldecoder("utf-8")("replace")  # holds back half of one
    started = time.perf_counter()
    try:
        print(PROMPT, end="", flush=True)
        for ids in steps:
            for row, token in zip(rows, ids.tolist(), strict=True):
                row.append(token)
            if rows[0][-1] != end_token:
                text = whole_characters.decode(bpe.decode_bytes(rows[0][-1:]))
                print(text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    seconds = time.perf_counter() - started
    print(whole_characters.decode(b"", final=True))
    rows = [row[: row.index(end_token)] if end_token in row else row for row in rows]
    for row in rows[1:]:
        print("-" * 80 + "\n" + PROMPT + bpe.decode(row))
    made = sum(map(len, rows))
    print(f"\n[{made} tokens, {made / seconds:,.0f} tokens/s]")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows a "?"
    try:
        main()
    except BrokenPipeError:  # python sample.py | head: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")

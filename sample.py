"""sample.py: what the trained model writes. Edit the constants, then: python sample.py

Loads the best model of the run in OUT_DIR and its tokenizer, and prints how it continues PROMPT,
token by token. Train first: python train.py
"""

import ast
import codecs
import hashlib
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from Attention import draw_attention
from BPE import BPE, draw_tokens
from Embeddings import draw_similarity
from GPT import GPT, pick_device, whole_number

# ------------------------------------------------------------------------------------------------
OUT_DIR = "out"        # the folder of the run
PROMPT = ""            # how the text begins; "": as the training texts begin
NUM_SAMPLES = 1        # continuations of the prompt, generated in parallel
MAX_NEW_TOKENS = 300   # the most tokens in each; it may end earlier, where a document would
TEMPERATURE = 0.8      # 0: always the likeliest token; 1: as learned; above: bolder
TOP_K = 50             # draw from the k likeliest tokens only; None: from all of them
TOP_P = 0.95           # draw from the likeliest that together have this probability; None: from all
SEED = 1337            # another seed gives another text; None: a new text each time
DEVICE = "auto"        # "cuda", "mps", "cpu", …; "auto": the first of these that is available
PICTURES = False       # True: draw the tokens and the attention of PROMPT, and the positions
# ------------------------------------------------------------------------------------------------

END = "<|endoftext|>"  # the special token between two documents


def main() -> None:
    out = Path(OUT_DIR)
    for file in (out / "model.pt", out / "tokenizer.json"):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: run python train.py first, or set "
                                    f"OUT_DIR to the folder of a finished run")
    samples = whole_number("NUM_SAMPLES", NUM_SAMPLES)
    if SEED is not None:
        whole_number("SEED", SEED, at_least=0)
    device = pick_device(DEVICE)
    model = GPT.load(out / "model.pt", device)
    tokenizer = hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest()
    if model.notes.get("tokenizer_sha256") != tokenizer:
        raise ValueError(f"{out / 'tokenizer.json'} is not the tokenizer that {out / 'model.pt'} "
                         f"was trained with: put the right one there, or train from scratch")
    if changed := changed_code(out / "code"):
        print(f"{', '.join(changed)}: changed since training; the old code: {out / 'code'}",
              file=sys.stderr)
    bpe = BPE.load(out / "tokenizer.json")
    end_token = bpe.special_tokens[END]
    generator = None if SEED is None else torch.Generator(device).manual_seed(int(SEED))

    start = bpe.encode(PROMPT) or model.notes.get("start", [end_token])
    # without a prompt: the end of a document or of a line, which isn't shown, or the first word
    prompt = PROMPT or bpe.decode([i for i in start if i != end_token]).lstrip()
    x = torch.tensor([start] * samples)  # (B, T)
    steps = model.stream(x, MAX_NEW_TOKENS, True, TEMPERATURE, TOP_K, TOP_P, stop_token=end_token,
                         generator=generator)
    rows = [[] for _ in range(samples)]  # the new tokens of each sample
    whole_characters = codecs.getincrementaldecoder("utf-8")("replace")  # holds back partial ones
    started = time.perf_counter()
    try:
        print(prompt, end="", flush=True)
        for ids in steps:
            for row, token in zip(rows, ids.tolist(), strict=True):
                row.append(token)
            if rows[0][-1] != end_token:
                text = whole_characters.decode(bpe.decode_bytes(rows[0][-1:]))
                print(text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(whole_characters.decode(b"", final=True))
    rows = [row[: row.index(end_token)] if end_token in row else row for row in rows]
    for row in rows[1:]:
        print("-" * 80 + "\n" + prompt + bpe.decode(row))
    made = sum(map(len, rows))
    print(f"\n[{made} tokens, {made / (time.perf_counter() - started):,.0f} tokens/s]")
    if PICTURES:
        draw(model, bpe, bpe.encode(PROMPT) or rows[0], out)


def changed_code(folder: Path) -> list[str]:
    """The scripts that differ from those that the model was trained with, comments aside."""
    here = Path(globals().get("__file__", "sample.py")).resolve().parent
    names = [path.relative_to(folder) for path in folder.rglob("*.py") if path.name != "train.py"]
    try:
        return [str(name) for name in sorted(names) if not (here / name).exists() or ast.unparse(
            ast.parse((here / name).read_bytes())) != ast.unparse(
            ast.parse((folder / name).read_bytes()))]
    except (SyntaxError, ValueError) as error:
        return [str(error)]


def draw(model: GPT, bpe: BPE, ids: list[int], out: Path) -> None:
    """Draw the tokens, the layer with the sharpest attention to them, and the positions."""
    ids = ids[: min(48, model.sizes["max_seq_len"])]  # more would be unreadable
    labels, layers = [bpe.show([i]) for i in ids], []  # layers: each one's weights (H, T, T)

    def attention() -> None:
        for decoder in model.decoders:
            decoder.attention.register_forward_pre_hook(lambda module, inputs: layers.append(
                module.weights(inputs[0])[0].cpu()))
        with torch.no_grad():
            model.hidden(torch.tensor([ids], device=model.device))
        sharpest = max(range(len(layers)), key=lambda n: layers[n].square().sum(-1).mean().item())
        draw_attention(layers[sharpest], labels, str(out / "attention.png"),
                       f"Layer {sharpest + 1} of {len(layers)}, with the sharpest attention")

    def positions() -> None:
        vectors = model.positional_embeddings.embedding.weight.detach().cpu()  # (T, E)
        draw_similarity(vectors, str(out / "positions.png"))

    for picture in (lambda: draw_tokens(labels, str(out / "tokens.png")), attention, positions):
        try:
            picture()
        except Exception as error:  # no display, no matplotlib, no such part in an edited model
            print(f"no picture: {type(error).__name__}: {error}")


if __name__ == "__main__":
    with suppress(AttributeError):  # a terminal that can't show a character shows a "?"
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except BrokenPipeError:  # python sample.py | head: the reader is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")

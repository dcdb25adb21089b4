"""sample.py: what the trained model writes. Edit the constants, then: python sample.py

Loads the best model of the run in OUT_DIR and its tokenizer, and prints how it continues PROMPT,
token by token. Train first: python train.py
"""

import codecs
import hashlib
import os
import sys
import time
import warnings
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from unicodedata import east_asian_width

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch is imported: see train.py

import torch
from torch import Tensor

from BPE import BPE
from GPT import GPT, pick_device, whole_number

# ------------------------------------------------------------------------------------------------
OUT_DIR = "out"        # the folder of the run
PROMPT = "\n"          # how the text begins; "\n" or "": at the beginning of a line. Special tokens
                       # count as such: "<|endoftext|>" begins a document
NUM_SAMPLES = 1        # continuations of the prompt, generated in parallel
MAX_NEW_TOKENS = 300   # the most tokens in each; it may end earlier, where a document would
TEMPERATURE = 0.8      # 0: always the likeliest token; 1: as learned; above: bolder
TOP_K = 50             # draw from the k likeliest tokens only; None: from all of them
TOP_P = 0.95           # draw from the likeliest that together have this probability; None: from all
SEED = 1337            # another seed gives another text; None: a new text each time
DEVICE = "auto"        # "cuda", "mps", "cpu", …; "auto": the first of these that is available
PICTURES = False       # True: draw the tokens and the attention of PROMPT, and the positions
# ------------------------------------------------------------------------------------------------


def main() -> None:
    out = Path(OUT_DIR)
    samples = whole_number("NUM_SAMPLES", NUM_SAMPLES)
    device = pick_device(DEVICE)
    model = GPT.load(out / "model.pt", device)
    found = hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest()
    if model.notes.get("tokenizer_sha256") != found:
        raise ValueError(f"{out / 'tokenizer.json'} is not the tokenizer that {out / 'model.pt'} "
                         f"was trained with: put the right one there, or train from scratch")
    metrics = model.notes.get("metrics")
    step = f", step {metrics[-1]['step']}" if metrics else ""
    print(f"model: {out / 'model.pt'}{step}", file=sys.stderr)
    if PROMPT.endswith(" "):
        print("PROMPT ends in a space; most tokens begin with one, so the text usually continues "
              "better without it", file=sys.stderr)

    bpe = BPE.load(out / "tokenizer.json")
    end = next(iter(bpe.special_tokens.values()), None)  # what divides documents
    generator = None if SEED is None else torch.Generator(device).manual_seed(SEED)
    prompt = bpe.encode(PROMPT or "\n", allow_special=True)
    rows, ended = [[] for _ in range(samples)], [False] * samples  # the new tokens of each sample
    shown = PROMPT.lstrip("\n")  # as it is shown
    whole_characters = codecs.getincrementaldecoder("utf-8")("replace")  # holds back partial ones
    started = time.perf_counter()
    with suppress(KeyboardInterrupt):  # Ctrl-C ends the text
        print(shown, end="", flush=True)
        for ids in model.stream(torch.tensor([prompt] * samples), MAX_NEW_TOKENS, True, TEMPERATURE,
                                TOP_K, TOP_P, generator=generator):  # (B,)
            for n, token in enumerate(ids.tolist()):
                if token == end:
                    ended[n] = bool(rows[n])  # it ends a sample that has text
                elif not ended[n]:
                    rows[n].append(token)
                    if n == 0:
                        new = whole_characters.decode(bpe.decode_bytes([token]))
                        print(new, end="", flush=True)
            if all(ended):
                break
    print(whole_characters.decode(b"", final=True))
    for row in rows[1:]:
        print("-" * 80 + "\n" + shown + bpe.decode(row))
    made = sum(map(len, rows))
    print(f"\n[{made} tokens, {made / (time.perf_counter() - started):,.0f} tokens/s]")
    if PICTURES:
        draw(model, bpe, prompt if shown else prompt + rows[0], out)


# ------------------------------------------------------------------ pictures

def draw(model: GPT, bpe: BPE, ids: list[int], out: Path) -> None:
    """Draw the tokens, the layer with the sharpest attention to them, and the positions."""
    ids = ids[: min(48, model.sizes["max_seq_len"])]  # more would be unreadable
    labels, layers = [bpe.show([i]) for i in ids], []
    try:
        fonts = fonts_for("".join(labels))
    except (ImportError, ValueError) as error:  # ValueError: MPLBACKEND is none that it knows
        return print(f"no pictures; they need matplotlib (pip install matplotlib): {error}")
    draw_tokens(labels, fonts, out / "tokens.png")
    for decoder in model.decoders:  # each adds its weights, (H, T, T)
        decoder.attention.register_forward_pre_hook(
            lambda module, inputs: layers.append(module.weights(inputs[0])[0].cpu()))
    with torch.no_grad():
        model.hidden(torch.tensor([ids], device=model.device))
    sharpest = max(range(len(layers)), key=lambda n: layers[n].square().sum(-1).mean().item())
    draw_matrices(layers[sharpest], out / "attention.png", "weight",
                  f"Layer {sharpest + 1} of {len(layers)}, with the sharpest attention",
                  "key: the token attended to", "query: the token that attends", labels, fonts)
    if hasattr(model, "positional_embeddings"):
        vectors = model.positional_embeddings(model.sizes["max_seq_len"]).detach().cpu()  # (T, E)
        unit = torch.nn.functional.normalize(vectors.float(), dim=1)
        draw_matrices((unit @ unit.T)[None], out / "positions.png", "cosine of their vectors",
                      "How alike are two positions?", "position", "position")


def fonts_for(text: str) -> list[str]:
    """Fonts that together have the characters of a text, as far as any installed one does."""
    from matplotlib.font_manager import findfont, fontManager
    from matplotlib.ft2font import FT2Font

    files = {"DejaVu Sans Mono": findfont("DejaVu Sans Mono")}  # it comes with matplotlib
    fonts, missing = [], set(text)
    for name, file in (files | {font.name: font.fname for font in fontManager.ttflist}).items():
        if missing and not name.startswith("Last Resort"):  # which has a box for any character
            font = FT2Font(file)
            if found := {c for c in missing if font.get_char_index(ord(c))}:
                fonts, missing = [*fonts, name], missing - found
    if missing:
        print(f"no installed font has {' '.join(sorted(missing))}: the pictures show boxes instead")
    return fonts


def draw_tokens(labels: list[str], fonts: list[str], path: Path) -> None:
    """Draw tokens as a row of pale boxes."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # which, unlike pyplot, needs no display

    widths = [sum(1 + (east_asian_width(c) in "WF") for c in label) for label in labels]
    ends = list(accumulate(widths))
    axes = Figure(figsize=(max(1, ends[-1] / 8), 0.5), layout="constrained").subplots()
    for n, (label, width, end) in enumerate(zip(labels, widths, ends, strict=True)):
        axes.barh(0, -width, left=end, color=colormaps["Pastel1"](n % 9), edgecolor="gray")
        axes.text(end - width / 2, 0, label, ha="center", va="center", family=fonts,
                  parse_math=False)
    axes.set_xlim(0, ends[-1])
    axes.axis("off")
    save(axes.figure, path)


def draw_matrices(matrices: Tensor, path: Path, values: str, title: str, x: str, y: str,
                  labels: list[str] | None = None, fonts: list[str] | None = None) -> None:
    """Draw matrices (N, T, T) side by side: with labels, of attention heads, values 0 … 1; without,
    of cosines, -1 … 1."""
    from matplotlib.figure import Figure

    columns = min(len(matrices), 3)
    rows, side = -(-len(matrices) // columns), max(2.3, 0.16 * len(labels)) if labels else 4.5
    figure = Figure(figsize=(columns * side + 1.4, rows * side + 1.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(matrices) :]:
        axes.set_axis_off()
    colours, least = ("Blues", 0) if labels else ("RdBu", -1)
    for n, (axes, matrix) in enumerate(zip(grid.flat, matrices, strict=False), 1):
        image = axes.imshow(matrix.tolist(), cmap=colours, vmin=least, vmax=1)
        if labels:
            axes.set_title(f"head {n}")
            style = {"family": fonts, "parse_math": False}
            axes.set_xticks(range(len(labels)), labels, rotation=90, **style)
            axes.set_yticks(range(len(labels)), labels, **style)
    figure.suptitle(title)
    figure.supxlabel(x)
    figure.supylabel(y)
    figure.colorbar(image, ax=grid, label=values, shrink=0.6, aspect=40)
    save(figure, path)


def save(figure, path: Path) -> None:
    """Write a matplotlib Figure as a PNG, on white: readable on a dark page, too."""
    warnings.filterwarnings("ignore", "Glyph .* missing")  # fonts_for has named it
    figure.savefig(path, dpi=150)
    print(f"drawn: {path}")


if __name__ == "__main__":
    with suppress(AttributeError):  # a terminal that can't show a character shows a "?"
        sys.stdout.reconfigure(errors="replace")
    main()

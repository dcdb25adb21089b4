"""train.py: from a text to a GPT that writes such text. Edit the constants, then: python train.py

It holds back the end of the text, trains a tokenizer on the rest, trains the net, validates it on
the held-out part as it goes, and prints a sample. Stop it whenever you like (Ctrl-C, a power cut):
run again, it goes on where it was. On several processes: torchrun --nproc_per_node=2 train.py
"""

import csv
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from BPE import BPE, read_text
from GetData import Batches, GetData
from GPT import GPT, pick_device, pick_dtype, read_file

# ------------------------------------------------------------------------------------------------
DATA_FILE = None       # a UTF-8 text file, or a list of them; None: Python's own documentation
OUT_DIR = "out"        # the run's folder: tokenizer, model, checkpoint, figures

VOCAB_SIZE = 1024      # V: tokens the tokenizer learns; at least 257; more for more text
MAX_SEQ_LEN = 64       # T: tokens the net can look back; memory and time of attention grow with T²
EMB_SIZE = 192         # E: width of the net; more learns more and costs E² time
NUM_HEADS = 6          # H: attention heads in a layer
HEAD_SIZE = 32         # D: width of a head; H·D is usually E
NUM_LAYERS = 3         # decoder blocks, one after another
DROPOUT = 0.1          # share of activations dropped in training; 0 if the text is seen only once

BATCH_SIZE = 16        # windows of T tokens in a batch, over all processes
ACCUMULATE = 1         # batches in a step; raise it, and lower BATCH_SIZE, when memory runs out
MAX_STEPS = 600        # steps of training; raise it and run again to train on
LEARNING_RATE = 3e-3   # the peak; lower it for deeper nets (1e-3 for 12 layers)
WARMUP_STEPS = 120     # steps up to the peak, half of all at most; with too few a post-norm net
                       # only learns how frequent each token is (4 layers at 4e-3: stuck with 80
                       # steps, learns with 200)
WEIGHT_DECAY = 0.1     # pull of the weight matrices towards 0
EVAL_EVERY = 100       # steps between validations; at most so many are lost in a power cut

SEED = 1337            # of initial weights, dropout and the order of the windows
DEVICE = "auto"        # "cuda", "mps", "cpu", …; "auto": the first of these that is there
DTYPE = "auto"         # "fp32" or "bf16"; "auto": bf16 where the hardware computes in it natively
COMPILE = False        # True: torch.compile; pays on long runs, wants a C++ compiler
# ------------------------------------------------------------------------------------------------

END = "<|endoftext|>"  # the special token between two documents


def main() -> None:
    started = time.perf_counter()
    if not isinstance(MAX_STEPS, int) or MAX_STEPS < 1:
        raise ValueError(f"MAX_STEPS={MAX_STEPS!r}: pick a whole number, 1 or more")
    device = own_device(DEVICE)
    rank, ranks = join_group(device)
    out = Path(OUT_DIR)
    checkpoint = out / "checkpoint.pt"
    documents = find_documents()
    dtype = pick_dtype(device, DTYPE)
    bpe = BPE(VOCAB_SIZE, special_tokens=(END,))
    sizes = (MAX_SEQ_LEN, EMB_SIZE, NUM_HEADS, HEAD_SIZE, NUM_LAYERS, DROPOUT)
    with torch.device("meta"):  # a net without numbers: wrong sizes are told before a run is moved
        GPT(VOCAB_SIZE, *sizes, device="meta")
    names = (
        "VOCAB_SIZE MAX_SEQ_LEN EMB_SIZE NUM_HEADS HEAD_SIZE NUM_LAYERS DROPOUT BATCH_SIZE "
        "ACCUMULATE MAX_STEPS LEARNING_RATE WARMUP_STEPS WEIGHT_DECAY EVAL_EVERY SEED DEVICE DTYPE "
        "COMPILE"
    ).split()
    settings = json.loads(json.dumps({name: globals()[name] for name in names}))  # plain values
    settings |= {"DATA": fingerprint(documents), "processes": ranks}
    say = print if rank == 0 else (lambda *_: None)

    if rank == 0:
        open_folder(out, settings)
    if ranks > 1:
        dist.barrier()
    saved = read_file(checkpoint) if checkpoint.exists() else None
    if saved and saved["run"]["step"] >= MAX_STEPS:
        say(f"{OUT_DIR} holds a finished run with these settings ({MAX_STEPS} steps).\n"
            f"To train it further raise MAX_STEPS; to start anew rename or remove {OUT_DIR}.")
        if rank == 0:
            report(out)
        return
    if saved:  # what "auto" was
        device, dtype = own_device(saved["notes"]["device"]), saved["run"]["dtype"]
    elif rank == 0:
        prepare_data(out, documents, bpe)
    if ranks > 1:
        dist.barrier()
    bpe = BPE.load(out / "tokenizer.json")
    train_ids = np.load(out / "train.npy", mmap_mode="r")
    valid_ids = np.load(out / "valid.npy", mmap_mode="r")
    valid_bytes = sum(map(size, documents)) - split_point(documents)
    if min(len(train_ids), len(valid_ids)) < MAX_SEQ_LEN + 1:
        raise ValueError(
            f"{len(train_ids)} tokens to train on and {len(valid_ids)} held out, but a "
            f"window takes MAX_SEQ_LEN + 1 = {MAX_SEQ_LEN + 1}: use a longer text or a "
            f"smaller MAX_SEQ_LEN"
        )

    torch.manual_seed(SEED)
    model = GPT(len(bpe), *sizes, device)
    model.notes = {"settings": settings, "device": device.type if DEVICE == "auto" else DEVICE,
                   "tokenizer_sha256": sha256(out / "tokenizer.json")}
    if saved and saved["notes"]["tokenizer_sha256"] != model.notes["tokenizer_sha256"]:
        raise ValueError(f"{out / 'tokenizer.json'} is not the one that {checkpoint} was trained "
                         f"with: put it back, or rename {OUT_DIR} to start anew")
    torch.manual_seed(SEED + rank)  # every process drops other activations
    train = Batches(GetData(train_ids, MAX_SEQ_LEN), BATCH_SIZE, SEED, rank, ranks)
    valid = Batches(GetData(valid_ids, MAX_SEQ_LEN, stride=MAX_SEQ_LEN), BATCH_SIZE, None,
                    rank, ranks)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"net: {parameters:,} parameters on {device}, {dtype}, processes: {ranks}; "
        f"{len(train_ids):,} tokens to train on, {len(valid_ids):,} held out")
    if saved:
        say(f"going on after step {saved['run']['step']} of {MAX_STEPS}")
    rows = []
    if rank == 0:
        rows = cut_metrics(out / "metrics.csv", saved["run"]["step"] if saved else 0)
    before = float(rows[-1]["seconds"]) if rows else 0.0

    def on_eval(figures: dict) -> None:
        bits = figures["valid_loss"] * len(valid_ids) / valid_bytes / math.log(2)
        rows.append({
            "step": figures["step"], "tokens": figures["tokens"],
            "seconds": f"{before + time.perf_counter() - started:.1f}",
            "train_loss": f"{figures['train_loss']:.4f}",
            "valid_loss": f"{figures['valid_loss']:.4f}", "valid_bits_per_byte": f"{bits:.4f}",
            "learning_rate": f"{figures['learning_rate']:.3g}",
            "tokens_per_second": f"{figures['tokens_per_second']:.0f}"})
        append_metrics(out / "metrics.csv", rows[-1])
        if figures["best"]:
            model.save(out / "model.pt")

    with stop_on_signal(model) as stopped:
        model.fit(train, valid, 1, LEARNING_RATE, max_steps=MAX_STEPS, warmup_steps=WARMUP_STEPS,
                  weight_decay=WEIGHT_DECAY, accumulate=ACCUMULATE, eval_every=EVAL_EVERY,
                  dtype=dtype, compile=COMPILE, checkpoint=checkpoint, on_eval=on_eval)
    if ranks > 1:
        dist.destroy_process_group()
    if rank == 0 and (not rows or int(rows[-1]["step"]) < MAX_STEPS):
        how = "python train.py" if ranks == 1 else "the same torchrun command"
        print(f"\nstopped; everything is in {checkpoint}. Go on: {how}")
        sys.exit(128 + (stopped[0] if stopped else signal.SIGTERM))  # or another rank was told to
    if rank == 0:
        draw_losses(out, rows)
        report(out)
        print_sample(out)


# ------------------------------------------------------------------ the text


def find_documents() -> list[Path] | list[bytes]:
    """The files of DATA_FILE, or the topics of Python's own documentation as bytes."""
    if DATA_FILE is None:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise ValueError("this Python comes without pydoc_data.topics, the default text: set "
                             "DATA_FILE to a text file of yours") from None
        return [topics[name].encode() for name in sorted(topics)]
    files = [Path(file) for file in
             ([DATA_FILE] if isinstance(DATA_FILE, (str, os.PathLike)) else DATA_FILE)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"DATA_FILE: there is no file {file} in {Path.cwd()}; give the "
                                    f"path of a text file, or None for Python's documentation")
    if sum(map(size, files)) == 0:
        raise ValueError(f"DATA_FILE={DATA_FILE!r} is empty: give a file with text in it")
    return files


def size(document: Path | bytes) -> int:
    """Bytes in a document."""
    return len(document) if isinstance(document, bytes) else document.stat().st_size


def text_of(document: Path | bytes, start: int, stop: int) -> Iterator[str]:
    """The text of bytes start … stop of a document, in pieces. ValueError if it isn't UTF-8."""
    if isinstance(document, bytes):
        yield document[start:stop].decode()
    else:
        yield from read_text(document, start, stop)


def fingerprint(documents: list[Path] | list[bytes]) -> str:
    """The same for the same bytes, wherever the files lie."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update((hashlib.sha256(document).hexdigest() if isinstance(document, bytes)
                       else sha256(document)).encode())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_point(documents: list[Path] | list[bytes]) -> int:
    """How many bytes, of all documents in a row, are for training: 90 %, to the end of a line."""
    total = sum(map(size, documents))
    before = 0
    for document in documents:
        point = total * 9 // 10 - before
        if point < size(document):
            break
        before += size(document)
    if isinstance(document, bytes):
        rest = document[point : point + 4096]
    else:
        with open(document, "rb") as file:
            file.seek(point)
            rest = file.read(4096)
    line = rest.find(b"\n", 0, total // 100) + 1
    # UTF-8: all bytes of a character but its first are 10xxxxxx
    character = next((i for i, byte in enumerate(rest) if byte & 0xC0 != 0x80), 0)
    return before + point + (line or character)


def pieces(documents: list[Path] | list[bytes], start: int, stop: int,
           end_token: int | None = None) -> Iterator[str | int]:
    """The text of bytes start … stop of all documents in a row, with end_token between two."""
    before = 0
    for document in documents:
        first, last = max(start - before, 0), min(stop - before, size(document))
        if first < last:
            yield from text_of(document, first, last)
            if end_token is not None and before + last < stop:
                yield end_token
        before += size(document)


# ------------------------------------------------------------------ the run's folder


def open_folder(out: Path, settings: dict) -> None:
    """Make OUT_DIR ready: a run that can be gone on with stays, any other is set aside, by name."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "checkpoint.pt.tmp").write_bytes(b"can this folder be written?")
        (out / "checkpoint.pt.tmp").unlink()
    except OSError as error:
        raise OSError(error.errno, f"OUT_DIR can't be written ({error.strerror}); pick another",
                      str(out)) from None
    if (out / "checkpoint.pt").exists():
        was = read_file(out / "checkpoint.pt")["notes"].get("settings", {})
        changed = [key for key in settings if settings[key] != was.get(key)]
        if changed == ["MAX_STEPS"] and MAX_STEPS > was["MAX_STEPS"]:
            print(f"MAX_STEPS is raised from {was['MAX_STEPS']} to {MAX_STEPS}; the learning rate "
                  f"follows the new, longer cosine from here on")
            return
        if not changed:
            return
        why = "other " + ", ".join(changed)
    elif (out / "model.pt").exists():
        why = "a model without its checkpoint.pt"
    else:
        if any(out.iterdir()):
            print(f"{OUT_DIR}: no checkpoint yet, nothing to go on from: starting clean")
        return
    aside = next(path for n in range(1, sys.maxsize)
                 if not (path := out.with_name(f"{out.name}-{n}")).exists())
    out.rename(aside)
    out.mkdir()
    print(f"{OUT_DIR} holds another run ({why}): it is kept as {aside}; starting anew")


def prepare_data(out: Path, documents: list[Path] | list[bytes], bpe: BPE) -> None:
    """Train the tokenizer on the first 90 % of the text; write the ids of both parts."""
    split, total = split_point(documents), sum(map(size, documents))
    print(f"tokenizer: {VOCAB_SIZE} tokens from {split:,} bytes; {total - split:,} bytes held out")
    bpe.fit(pieces(documents, 0, split))
    bpe.save(out / "tokenizer.json")
    end_token = bpe.special_tokens[END]
    bpe.encode_file(pieces(documents, 0, split, end_token), out / "train.npy")
    bpe.encode_file(pieces(documents, split, total, end_token), out / "valid.npy")


def cut_metrics(path: Path, step: int) -> list[dict]:
    """Read metrics.csv and cut it to what came up to that step; the rest will come again."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file)
                if None not in row.values() and int(row["step"]) <= step]
    shorter = path.with_suffix(".csv.tmp")
    shorter.unlink(missing_ok=True)
    for row in rows:
        append_metrics(shorter, row)
    shorter.replace(path) if rows else path.unlink()
    return rows


def append_metrics(path: Path, row: dict) -> None:
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


# ------------------------------------------------------------------ processes, device, signals


def own_device(name: str) -> torch.device:
    """The device of this process: of several processes on a machine with GPUs each has its own."""
    device = torch.device(pick_device(name))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.type == "mps":  # processes can't share gradients there
            return torch.device("cpu")
    return device


def join_group(device: torch.device) -> tuple[int, int]:
    """(rank, ranks): joins the process group that torchrun made, or (0, 1) without one."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DistributedDataParallel imports this; imported with a group, its functions hold the group for
    # good, and its threads, still there when Python ends, at times abort the process.
    from torch.distributed.nn import functional  # noqa: F401
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(hours=1))  # the others wait while rank 0 encodes
    return dist.get_rank(), ranks


@contextmanager
def stop_on_signal(model: GPT) -> Iterator[list[int]]:
    """Ctrl-C or SIGTERM ends the training after the current step; a second one at once."""
    stopped = []

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        model.stop_training = True
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; again: at once\n")  # print may be in use just now

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------ what there is to see


def report(out: Path) -> None:
    """Print the best figures of the run, where everything lies, and the next command."""
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    best = min(rows, key=lambda row: float(row["valid_loss"]))
    losses = f"{best['valid_loss']} nats per token, {best['valid_bits_per_byte']} bits per byte"
    speed = f"{int(rows[-1]['tokens_per_second']):,} tokens/s at the end"
    print(f"""
best validation loss  {losses}
                      at step {best["step"]} of {rows[-1]["step"]}, {int(best["tokens"]):,} tokens
time                  {rows[-1]["seconds"]} s, {speed}
best model            {out / "model.pt"}
all figures           {out / "metrics.csv"}
next                  python sample.py
""")


def draw_losses(out: Path, rows: list[dict]) -> None:
    """Draw both losses over tokens as loss.png."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no loss.png: it needs matplotlib (pip install matplotlib)")
        return
    tokens = [int(row["tokens"]) for row in rows]
    valid = [float(row["valid_loss"]) for row in rows]
    best = valid.index(min(valid))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(tokens, [float(row["train_loss"]) for row in rows], label="training")
    axes.plot(tokens, valid, label="validation")
    axes.plot(tokens[best], valid[best], "o", color="C1", label=f"best: {valid[best]:.3f}")
    axes.set(xlabel="tokens seen", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=150)
    plt.close(figure)
    print(f"drawn: {out / 'loss.png'}")


def print_sample(out: Path) -> None:
    model, bpe = GPT.load(out / "model.pt"), BPE.load(out / "tokenizer.json")
    ids = model.generate(torch.tensor([[bpe.special_tokens[END]]]), 200, True, 0.8, 50,
                         generator=torch.Generator().manual_seed(SEED))
    print(f"a sample of {ids.shape[1] - 1} tokens:\n\n{bpe.decode(ids[0, 1:].tolist())}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows a "?"
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")

"""train.py: from a text to a GPT that writes like it. Edit the constants, then: python train.py

It holds out the last tenth of each file, trains a tokenizer on the rest, trains the model,
validates it on the held-out part as it goes, and prints a sample. Stop it whenever you like
(Ctrl-C, a power cut): run it again and it resumes.
On several processes: torchrun --nproc_per_node=2 train.py
"""

import csv
import ctypes
import hashlib
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from itertools import takewhile
from pathlib import Path

# The threads of torch's Linux builds spin while they wait for each other, 300,000 turns. With only
# 10,000, a step takes 80 ms instead of 278 beside four busy programs on two cores, and alone 17
# instead of 18. Does nothing once torch is imported (in a notebook, say) or on other systems.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from BPE import BPE, can_be_cut, read_text
from GetData import Batches, GetData
from GPT import GPT, check_number, pick_device, pick_dtype, read_file, schedule, whole_number

# ---------- What makes a run: with another value, or a constant that you add here, a new one starts
VOCAB_SIZE = 2048      # V: tokens the tokenizer learns; at least 257; more for more text
MAX_SEQ_LEN = 64       # T: tokens the model can look back; memory and time of attention grow as T²
EMB_SIZE = 192         # E: width of the model; more learns more and costs E² time
NUM_HEADS = 6          # H: attention heads in a layer
HEAD_SIZE = 32         # D: width of a head; H·D is usually E
NUM_LAYERS = 3         # decoder blocks, one after another
DROPOUT = 0.0          # share of activations dropped in training; here WEIGHT_DECAY does better
SPECIAL_TOKENS = ("<|endoftext|>",)  # texts that are one token wherever they are written; the first
                       # divides documents; add marks of your own, such as "<|user|>"
INIT_FROM = None       # fine-tuning: a model.pt to begin with, its tokenizer.json beside it

BATCH_SIZE = 8         # windows of T tokens in a batch, over all processes
ACCUMULATE = 1         # batches in a step; raise it, and lower BATCH_SIZE, when memory runs out
LEARNING_RATE = 2e-3   # the peak; lower it for deeper models (1e-3 for 12 layers)
WARMUP_STEPS = 120     # steps up to the peak, at most half of all; with too few, or at too high a
                       # rate, a deep post-norm model learns only how frequent each token is
WEIGHT_DECAY = 0.3     # pull of the weight matrices towards 0; 0.1 for a text read once or twice
                       # (this one, read five times: 1.659 bits per byte with 0.3, 1.665 with 0.1)
EVAL_TOKENS = 16_000   # held-out tokens that a validation reads, evenly spread
DTYPE = "auto"         # "fp32" or "bf16"; "auto": bf16 where the hardware computes in it natively
SEED = 1337            # of initial weights, dropout and the order of the windows
SETTINGS = [name for name in takewhile(lambda name: name != "SETTINGS", globals())  # all above
            if name.isupper() and name not in ("BPE", "GPT")]
# ---------- What may change at any time
DATA_FILE = None       # a UTF-8 text file, or a list of them; None: Python's own documentation
                       # (another text starts a new run, too)
OUT_DIR = "out"        # the run's folder: tokenizer, model, checkpoint, metrics
MAX_STEPS = 1200       # steps of training; raise it and run again to train longer
EVAL_EVERY = 200       # steps between validations; a power cut loses at most this many
DEVICE = "auto"        # "cuda", "mps", "cpu", …; "auto": the first of these that is available
COMPILE = False        # True: torch.compile, for a GPU; on a CPU it was slower, by a third in bf16
# ------------------------------------------------------------------------------------------------


def main() -> None:
    with suppress(AttributeError, ValueError):  # a console that lacks a character shows a "?"
        sys.stdout.reconfigure(errors="replace")
    with ExitStack() as locks:  # the lock of OUT_DIR, held until the run ends, however it ends
        run(locks)


def run(locks: ExitStack) -> None:
    started = time.perf_counter()
    device, rank, ranks = start_group()
    dtype = pick_dtype(device, DTYPE)
    settings = check_constants(ranks)
    documents = find_text()
    out = Path(OUT_DIR).resolve()
    box = [open_run(out, documents, settings, locks) if rank == 0 else None]
    if ranks > 1:
        dist.broadcast_object_list(box)  # rank 0 decides for all
    (notes,) = box
    rows = notes["metrics"]  # of metrics.csv; the list stays a note, so each checkpoint has it
    seconds_before = float(rows[-1]["seconds"]) if rows else 0.0

    bpe = BPE.load(out / "tokenizer.json")
    train_ids = np.load(out / "train.npy", mmap_mode="r")
    valid_ids = np.load(out / "valid.npy", mmap_mode="r")
    stride = max(MAX_SEQ_LEN, len(valid_ids) * MAX_SEQ_LEN // EVAL_TOKENS)  # between windows
    train = Batches(GetData(train_ids, MAX_SEQ_LEN, stride=MAX_SEQ_LEN), BATCH_SIZE, SEED,
                    rank, ranks)
    valid = Batches(GetData(valid_ids, MAX_SEQ_LEN, stride=stride), BATCH_SIZE, None, rank, ranks)
    valid_bytes = sum(size - split for _, split, size in documents)
    bits_per_nat = len(valid_ids) / valid_bytes / math.log(2)  # bits per byte, nats per token

    torch.manual_seed(SEED)
    model = build(len(bpe), device)
    if INIT_FROM is not None and not rows:  # fit loads those of a run that resumes
        model.load_state_dict(read_file(INIT_FROM)["weights"])
    torch.manual_seed(SEED + rank)  # every process drops different activations
    model.notes = notes
    if rank == 0:
        passes = MAX_STEPS * BATCH_SIZE * ACCUMULATE * MAX_SEQ_LEN / len(train_ids)
        say(f"model: {sum(p.numel() for p in model.parameters()):,} parameters on {device}, {dtype}"
            f", processes: {ranks}; {len(train_ids):,} tokens to train on, {len(valid_ids):,} held "
            f"out; {MAX_STEPS:,} steps: {passes:,.1f} passes over the text")

    def on_eval(metrics: dict) -> None:
        bits = metrics["valid_loss"] * bits_per_nat
        rows.append({
            "step": metrics["step"], "tokens": metrics["tokens"],
            "seconds": f"{seconds_before + time.perf_counter() - started:.1f}",
            "train_loss": f"{metrics['train_loss']:.4f}",
            "valid_loss": f"{metrics['valid_loss']:.4f}", "valid_bits_per_byte": f"{bits:.4f}",
            "learning_rate": f"{metrics['learning_rate']:.3g}",
            "tokens_per_second": f"{metrics['tokens_per_second']:.0f}"})
        if metrics["best"] or not (out / "model.pt").exists():
            model.save(out / "model.pt")
        with open(out / "metrics.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
            writer.writeheader()
            writer.writerows(rows)  # all of them: the file may be ahead, edited or deleted
        say(f"step {metrics['step']} of {MAX_STEPS}: training {metrics['train_loss']:.4f}, "
            f"validation {metrics['valid_loss']:.4f} nats per token, {bits:.4f} bits per byte, "
            f"{metrics['tokens_per_second']:,.0f} tokens/s")

    keep_memory()
    with stop_on_signal(model) as signals:
        model.fit(train, valid, 1, LEARNING_RATE, max_steps=MAX_STEPS, warmup_steps=WARMUP_STEPS,
                  weight_decay=WEIGHT_DECAY, accumulate=ACCUMULATE, eval_every=EVAL_EVERY,
                  dtype=dtype, compile=COMPILE, checkpoint=out / "checkpoint.pt", on_eval=on_eval)
    if ranks > 1:
        came = [[] for _ in range(ranks)]
        dist.all_gather_object(came, signals)  # one rank alone may have been told to stop
        signals = sum(came, [])
        dist.destroy_process_group()
    if rank > 0:
        return
    if signals and (not rows or rows[-1]["step"] < MAX_STEPS):
        say("stopped; to resume, start it again in the same way")
        sys.exit(128 + signals[0])
    report(out, rows)


def build(vocab_size: int, device: torch.device | str) -> GPT:
    return GPT(vocab_size, MAX_SEQ_LEN, EMB_SIZE, NUM_HEADS, HEAD_SIZE, NUM_LAYERS, DROPOUT, device)


def check_constants(ranks: int) -> dict[str, str]:
    """The constants that make a run, as text by name. ValueError for one out of range."""
    here = globals()
    for name in ("BATCH_SIZE", "ACCUMULATE", "MAX_STEPS", "EVAL_EVERY", "EVAL_TOKENS"):
        whole_number(name, here[name])
    if BATCH_SIZE % ranks:
        raise ValueError(f"BATCH_SIZE={BATCH_SIZE} on {ranks} processes: pick a multiple of that")
    if whole_number("SEED", SEED, at_least=0) >= 1 << 63:
        raise ValueError(f"SEED={SEED}: pick a whole number below 2**63")
    check_number("WEIGHT_DECAY", WEIGHT_DECAY, zero=True)
    schedule(LEARNING_RATE, WARMUP_STEPS, MAX_STEPS)
    BPE(VOCAB_SIZE, special_tokens=SPECIAL_TOKENS)
    with torch.device("meta"):  # where a model takes no memory: built there, then moved there
        build(VOCAB_SIZE, "meta")
    # as text, the same in the next process (a set's is not: use a list); a function by its name
    return {name: str(getattr(here[name], "__qualname__", here[name])) for name in SETTINGS}


# ------------------------------------------------------------------ the text

Document = tuple[Path | bytes, int, int]  # the text, where its held-out part begins, its size


def find_text() -> list[Document]:
    """The files of DATA_FILE, or the topics of Python's own documentation: the last tenth of each
    is held out, from the beginning of a line. ValueError if a part is too short for a window."""
    if DATA_FILE is None:
        from pydoc_data.topics import topics  # a Python that has none needs a DATA_FILE
        texts = [topics[name].encode() for name in sorted(topics)]
    else:
        one = isinstance(DATA_FILE, (str, os.PathLike))
        texts = [Path(file).resolve() for file in ([DATA_FILE] if one else DATA_FILE)]
    documents = []
    for text in texts:
        if isinstance(text, Path) and not text.is_file():
            raise FileNotFoundError(f"DATA_FILE: {text} is not a file; give a path or a list of "
                                    f"paths, such as sorted(Path('folder').glob('*.txt'))")
        with open(text, "rb") if isinstance(text, Path) else io.BytesIO(text) as file:
            size = file.seek(0, os.SEEK_END)
            point = file.seek(size * 9 // 10)
            rest = file.read(1 << 16)
        newline = rest.find(b"\n", 0, (size - point) // 2)  # at most half of it is given up
        if newline >= 0:
            split = point + newline + 1
        else:  # the next character: in UTF-8 all its bytes but the first are 10xxxxxx
            split = point + next((i for i, byte in enumerate(rest) if byte & 0xC0 != 0x80), 0)
        documents.append((text, split, size))
    train = sum(split for _, split, _ in documents)
    valid = sum(size - split for _, split, size in documents)
    if min(train, valid) < MAX_SEQ_LEN + 1:
        raise ValueError(f"DATA_FILE={DATA_FILE!r}: {train} bytes to train on and {valid} held "
                         f"out, but a window needs MAX_SEQ_LEN + 1 = {MAX_SEQ_LEN + 1} tokens: use "
                         f"a longer text or a smaller MAX_SEQ_LEN")
    return documents


def pieces(text: Path | bytes, start: int, stop: int) -> Iterator[str]:
    """The bytes start … stop of a document, as text, in pieces that no word crosses."""
    if isinstance(text, Path):
        yield from read_text(text, start, stop)
    else:
        yield text[start:stop].decode()


def part(documents: list[Document], held_out: bool, between: str) -> Iterator[str]:
    """The training part of all documents, or the held-out part, with a token between two."""
    for n, (text, split, size) in enumerate(documents):
        yield between if n else ""
        yield from pieces(text, split, size) if held_out else pieces(text, 0, split)


def sha256_of(documents: list[Document]) -> str:
    """A hash of the whole text. ValueError, with the offset, for what isn't UTF-8."""
    digest = hashlib.sha256()
    for text, _, size in documents:
        for piece in pieces(text, 0, size):
            digest.update(piece.encode())
        digest.update(b"\xff")  # UTF-8 never has it: here a document ends
    return digest.hexdigest()


# ------------------------------------------------------------------ the run's folder

def open_run(out: Path, documents: list[Document], settings: dict[str, str],
             locks: ExitStack) -> dict:
    """Get OUT_DIR ready for this run; returns the notes that travel in its files.

    An unfinished run of the same settings and text resumes, a finished one if MAX_STEPS was raised.
    Any other is kept under another name, and a new one starts. ValueError, before anything is
    moved, for a folder that isn't ours, that is in use, or that can't make room.
    """
    settings = settings | {"DATA_FILE": sha256_of(documents)}
    if out.exists() and not (out / ".lock").exists() and any(out.iterdir()):
        raise ValueError(f"OUT_DIR={OUT_DIR!r} isn't empty and has no .lock, so no run of train.py "
                         f"made it: give a new folder; nobody's files are overwritten")
    out.mkdir(parents=True, exist_ok=True)
    lock(out, locks)
    why = ""
    if (out / "checkpoint.pt").exists():
        saved = read_file(out / "checkpoint.pt")
        was = saved["notes"].get("settings", {})
        changed = [name for name in was | settings if was.get(name) != settings.get(name)]
        if "rng_states" not in saved:
            why = "from an older version"
        elif changed:
            why = ", ".join("another text" if name == "DATA_FILE" else
                            f"{name}: {was.get(name)} -> {settings.get(name)}" for name in changed)
        elif saved["run"]["step"] >= MAX_STEPS:
            why = f"finished after {saved['run']['step']} steps"
        elif saved["notes"]["tokenizer_sha256"] != file_hash(out / "tokenizer.json"):
            raise ValueError(f"{out / 'tokenizer.json'} is not the tokenizer of this run: put that "
                             f"back, or rename the folder to start from scratch")
        else:
            say(f"resuming {OUT_DIR} after step {saved['run']['step']} of {MAX_STEPS}")
            return saved["notes"]
    elif (out / "model.pt").exists():
        why = "a model without its checkpoint.pt"
    bpe = new_tokenizer(out)  # it may refuse INIT_FROM, so before anything is moved
    if why:
        files = [text for text, _, _ in documents if isinstance(text, Path)]
        if any(path.is_relative_to(out) for path in (Path.cwd(), *files)):
            raise ValueError(f"OUT_DIR={OUT_DIR!r} holds another run ({why}); give a new one: the "
                             f"text or the current folder is in it, so it must stay")
        n = 1
        while os.path.lexists(old := out.with_name(f"{out.name}-{n}")):
            n += 1
        out.rename(old)
        say(f"{OUT_DIR} held another run ({why}): it is kept as {old}; a new one starts")
        out.mkdir()
        lock(out, locks)
    end = next(iter(bpe.special_tokens), "")
    if INIT_FROM is None:
        say(f"tokenizer: {VOCAB_SIZE} tokens, learned from the text")
        bpe.fit(part(documents, False, end))
    bpe.save(out / "tokenizer.json")
    for held_out, name in ((False, "train.npy"), (True, "valid.npy")):
        bpe.encode_file(part(documents, held_out, end), out / name, allow_special=True)
    tokenizer = file_hash(out / "tokenizer.json")
    return {"settings": settings, "metrics": [], "tokenizer_sha256": tokenizer}


def new_tokenizer(out: Path) -> BPE:
    """The tokenizer that a new run begins with: empty, or that of INIT_FROM. ValueError if
    INIT_FROM is inside OUT_DIR, or its sizes aren't those of the constants, or a special token
    might be cut in two."""
    if INIT_FROM is None:
        bpe = BPE(VOCAB_SIZE, special_tokens=SPECIAL_TOKENS)
    else:
        file = Path(INIT_FROM).resolve()
        tokenizer = file.with_name("tokenizer.json")
        if file.is_relative_to(out):
            raise ValueError(f"INIT_FROM={INIT_FROM!r} is inside OUT_DIR={OUT_DIR!r}, whose run "
                             f"makes room for the new one: set OUT_DIR to another folder")
        model, bpe = GPT.load(file), BPE.load(tokenizer)
        if model.notes.get("tokenizer_sha256") != file_hash(tokenizer):
            raise ValueError(f"{tokenizer} is not the tokenizer that {file} was trained with: put "
                             f"the right one beside it")
        with torch.device("meta"):
            sizes = build(len(bpe), "meta").sizes | {"dropout": model.sizes["dropout"]}
        if model.sizes != sizes:
            raise ValueError(f"INIT_FROM={INIT_FROM!r} has the sizes {model.sizes}, the constants "
                             f"{sizes}: make them equal")
        say(f"beginning with the weights of {INIT_FROM} and its tokenizer of {len(bpe)} tokens, "
            f"special: {', '.join(bpe.special_tokens)}; VOCAB_SIZE and SPECIAL_TOKENS aren't used")
    for name in bpe.special_tokens:
        if len(name) == 1 or can_be_cut(name):
            raise ValueError(f"special token {name!r} is a letter, or might be cut where a text is "
                             f"read in pieces: write it without spaces, like <|user|>")
    return bpe


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lock(out: Path, locks: ExitStack) -> None:
    """Make .lock, the mark of a run's folder, and lock it until `locks` ends. ValueError if another
    training has."""
    file = locks.enter_context(open(out / ".lock", "a"))
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"OUT_DIR={OUT_DIR!r} is in use by another train.py: wait for it, stop "
                         f"it, or give another folder") from None
    except (ImportError, OSError) as error:  # Windows, some network drives
        file.close()  # Windows can't rename a folder with an open file in it
        say(f"{OUT_DIR} can't be locked here ({error}): don't start a second training there")


# ------------------------------------------------------------------ processes, memory, signals

def start_group() -> tuple[torch.device, int, int]:
    """This process's device, its rank and how many there are: 0 and 1 if torchrun didn't start it.
    Of several processes on a machine with GPUs, each has its own GPU."""
    device, ranks = torch.device(pick_device(str(DEVICE))), int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif device.type == "mps":
        device = torch.device("cpu")  # mps can't share
    # DistributedDataParallel imports this. Imported while a group exists, its functions keep the
    # group alive, whose threads sometimes abort the process when Python exits.
    from torch.distributed.nn import functional  # noqa: F401
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(hours=1))  # the others wait while rank 0 encodes
    return device, dist.get_rank(), ranks


def keep_memory() -> None:
    """Have glibc, Linux's C library, keep for the next step what a step frees. Given back, it would
    be taken from the system page by page again: 3,500 page faults and a sixth of a step's time."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)        # M_MMAP_MAX: no memory mapping for a large tensor alone
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: give back what is free beyond 1 GiB


@contextmanager
def stop_on_signal(model: GPT) -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM or a closed terminal (SIGHUP) ends the training after the current step, a
    second one at once; what is ignored (SIGHUP under nohup) stays so. Yields those that came."""
    came = []

    def stop(number: int, frame: object) -> None:
        came.append(number)
        model.stop_training = True
        signal.signal(number, signal.SIG_DFL)
        with suppress(OSError):  # print may be in use right now
            os.write(2, b"\nstopping after this step; press again to stop at once\n")

    with ExitStack() as restore:  # puts each old handler back in the end
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number and signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: C's
                    restore.callback(signal.signal, number, signal.signal(number, stop))
        yield came


# ------------------------------------------------------------------ output

def say(text: str) -> None:
    """Print a line above the progress bar. If nobody can read it, training continues."""
    try:
        with tqdm.external_write_mode():
            print(text, flush=True)
    except (OSError, ValueError):  # a closed pipe or terminal
        sys.stdout = None  # from now on print does nothing


def report(out: Path, rows: list[dict]) -> None:
    """Draw the losses; print a sample, the best result, where the model lies, the next command."""
    model, bpe = GPT.load(out / "model.pt"), BPE.load(out / "tokenizer.json")
    best = model.notes["metrics"][-1]  # the row of the step at which it was saved
    try:
        draw_losses(out / "loss.png", rows, best)
    except Exception as error:  # a failed picture must not end a run
        say(f"no loss.png; it needs matplotlib (pip install matplotlib): {error}")
    start = torch.tensor([bpe.encode("\n")])
    ids = model.generate(start, 200, True, 0.8, 50,
                         generator=torch.Generator().manual_seed(int(SEED)))[0, start.shape[1]:]
    bits, steps, seconds = best["valid_bits_per_byte"], rows[-1]["step"], rows[-1]["seconds"]
    where = "" if OUT_DIR == "out" else f", with OUT_DIR = {str(OUT_DIR)!r} in it"
    say(f"""a sample of {len(ids)} tokens:

{bpe.decode(ids.tolist())}

best validation loss  {best["valid_loss"]} nats per token, {bits} bits per byte
                      at step {best["step"]} of {steps}, after {seconds} s in all
best model            {Path(OUT_DIR, "model.pt")}
next                  python sample.py{where}""")


def draw_losses(path: Path, rows: list[dict], best: dict) -> None:
    """Draw both losses over tokens."""
    from matplotlib.figure import Figure  # unlike pyplot, it has no global state

    axes = Figure(figsize=(8.3, 4.2), layout="constrained").subplots()
    for name, label in (("train_loss", "training"), ("valid_loss", "held-out text")):
        axes.plot([row["tokens"] for row in rows], [float(row[name]) for row in rows], label=label)
    axes.plot(best["tokens"], float(best["valid_loss"]), "o", color="C1",
              label=f"best: {float(best['valid_loss']):.3f}")
    axes.set(xlabel="tokens seen in training", ylabel="loss, nats per token")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    axes.figure.savefig(path, dpi=150)  # on white, so readable on a dark page, too


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the training, or after it
        print("interrupted", file=sys.stderr)
        sys.exit(130)

"""train.py: from a text to a GPT that writes like it. Edit the constants, then: python train.py

It holds back the end of the text, trains a tokenizer on the rest, trains the model, validates it on
the held-out part as it goes, and prints a sample. Stop it whenever you like (Ctrl-C, a power cut):
run it again and it resumes. On several processes: torchrun --nproc_per_node=2 train.py
"""

import ast
import csv
import ctypes
import hashlib
import inspect
import io
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from importlib.machinery import ModuleSpec
from modulefinder import ModuleFinder
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from BPE import BPE, read_text
from GetData import Batches, GetData
from GPT import (
    GPT,
    check_number,
    make_schedule,
    pick_device,
    pick_dtype,
    read_file,
    whole_number,
)

# ------------------------------------------------------------------------------------------------
DATA_FILE = None       # a UTF-8 text file, or a list of them; None: Python's own documentation
OUT_DIR = "out"        # the run's folder: tokenizer, model, checkpoint, metrics, code
RESUME = "auto"        # "auto": resume an interrupted run, start from scratch if a constant or the
                       # text changed; True: resume whatever changed; False: from scratch.
                       # Starting from scratch keeps the old folder, as out-1, out-2, …

VOCAB_SIZE = 2048      # V: tokens the tokenizer learns; at least 257; more for more text
MAX_SEQ_LEN = 64       # T: tokens the model can look back; memory and time of attention grow as T²
EMB_SIZE = 192         # E: width of the model; more learns more and costs E² time
NUM_HEADS = 6          # H: attention heads in a layer
HEAD_SIZE = 32         # D: width of a head; H·D is usually E
NUM_LAYERS = 3         # decoder blocks, one after another
DROPOUT = 0.0          # share of activations dropped in training, against memorising the text; here
                       # WEIGHT_DECAY does that better, and in five sixths of the time

BATCH_SIZE = 8         # windows of T tokens in a batch, over all processes
ACCUMULATE = 1         # batches in a step; raise it, and lower BATCH_SIZE, when memory runs out
MAX_STEPS = 1200       # steps of training; raise it and run again to train longer
LEARNING_RATE = 2e-3   # the peak; lower it for deeper models (1e-3 for 12 layers)
WARMUP_STEPS = 120     # steps up to the peak (a very short run uses half of its steps); with too
                       # few, or at too high a rate, a deep post-norm model learns only how frequent
                       # each token is
WEIGHT_DECAY = 1.0     # pull of the weight matrices towards 0; 0.1 for a text that is read once or
                       # twice (this one is read five times: 1.71 bits per byte, 1.74 with 0.1)
EVAL_EVERY = 200       # steps between validations; a power cut loses at most this many
EVAL_TOKENS = 16_000   # held-out tokens that a validation reads, evenly spread (5 % of the time
                       # with the values here); None: all of them

SEED = 1337            # of initial weights, dropout and the order of the windows
DEVICE = "auto"        # "cuda", "mps", "cpu", …; "auto": the first of these that is available
DTYPE = "auto"         # "fp32" or "bf16"; "auto": bf16 where the hardware computes in it natively
COMPILE = False        # True: torch.compile; pays on long runs, needs a C++ compiler
# ------------------------------------------------------------------------------------------------

END = "<|endoftext|>"  # the special token between two documents


def main() -> None:
    started = time.perf_counter()
    settings = check_constants()
    device = own_device(DEVICE)
    dtype = pick_dtype(device, DTYPE)
    sizes = (MAX_SEQ_LEN, EMB_SIZE, NUM_HEADS, HEAD_SIZE, NUM_LAYERS, DROPOUT)
    with torch.device("meta"):  # checks the sizes: a model on the meta device takes no memory
        GPT(VOCAB_SIZE, *sizes, device="meta")
    out = Path(OUT_DIR).resolve()
    with process_group(device) as (rank, ranks), ExitStack() as locks:
        shared = [get_ready(out, settings, locks) if rank == 0 else None]
        if ranks > 1:
            dist.broadcast_object_list(shared)  # rank 0 decides for all
        if (ready := shared[0]) is None:  # the run is finished
            return
        bpe = BPE.load(out / "tokenizer.json")
        train_ids = np.load(out / "train.npy", mmap_mode="r")
        valid_ids = np.load(out / "valid.npy", mmap_mode="r")
        torch.manual_seed(SEED)
        model = GPT(len(bpe), *sizes, device)
        model.notes = {"settings": ready["settings"], "device": device.type,
                       "tokenizer_sha256": sha256(out / "tokenizer.json"),
                       "start": how_texts_begin(train_ids, bpe)}
        torch.manual_seed(SEED + rank)  # every process drops different activations
        train = Batches(GetData(train_ids, MAX_SEQ_LEN), BATCH_SIZE, SEED, rank, ranks)
        stride = max(MAX_SEQ_LEN, len(valid_ids) * MAX_SEQ_LEN // (EVAL_TOKENS or len(valid_ids)))
        valid = Batches(GetData(valid_ids, MAX_SEQ_LEN, stride=stride), BATCH_SIZE, None,
                        rank, ranks)
        rows = model.notes["metrics"] = ready["rows"]  # kept in the checkpoint, so the two agree
        since = model.notes["since"] = ready["since"]  # the rows before are of another text
        before = float(rows[-1]["seconds"]) if rows else 0.0
        if rank == 0:
            if rows:  # restores a metrics.csv that is ahead of the checkpoint, lost or edited
                write_metrics(out, rows, ready["code"], bpe, locks)
            describe(model, f"{dtype}, processes: {ranks}", ready, len(train_ids), len(valid_ids))

        def on_eval(metrics: dict) -> None:
            bits = metrics["valid_loss"] * len(valid_ids) / ready["valid_bytes"] / math.log(2)
            rows.append({
                "step": metrics["step"], "tokens": metrics["tokens"],
                "seconds": f"{before + time.perf_counter() - started:.1f}",
                "train_loss": f"{metrics['train_loss']:.4f}",
                "valid_loss": f"{metrics['valid_loss']:.4f}", "valid_bits_per_byte": f"{bits:.4f}",
                "learning_rate": f"{metrics['learning_rate']:.3g}",
                "tokens_per_second": f"{metrics['tokens_per_second']:.0f}"})
            log(rows[-1])
            write_metrics(out, rows, ready["code"], bpe, locks)
            if best_of(rows[since:]) is rows[-1]:
                model.save(out / "model.pt")

        keep_memory()
        with stop_on_signal(model) as stopped:
            model.fit(train, valid, 1, LEARNING_RATE, max_steps=MAX_STEPS,
                      warmup_steps=WARMUP_STEPS, weight_decay=WEIGHT_DECAY, accumulate=ACCUMULATE,
                      eval_every=EVAL_EVERY, dtype=dtype, compile=COMPILE,
                      checkpoint=out / "checkpoint.pt", on_eval=on_eval)
        if rank == 0:
            finish(out, rows[since:], stopped)


def check_constants() -> dict:
    """The settings of this run, plain values by name. ValueError for a constant out of range."""
    here, least = globals(), {"VOCAB_SIZE": 257, "WARMUP_STEPS": 0, "SEED": 0}
    for name in ("VOCAB_SIZE", "MAX_SEQ_LEN", "EMB_SIZE", "NUM_HEADS", "HEAD_SIZE", "NUM_LAYERS",
                 "BATCH_SIZE", "ACCUMULATE", "MAX_STEPS", "WARMUP_STEPS", "EVAL_EVERY",
                 "EVAL_TOKENS", "SEED"):
        if name != "EVAL_TOKENS" or EVAL_TOKENS is not None:
            here[name] = whole_number(name, here[name], least.get(name, 1))
    for name in ("DROPOUT", "WEIGHT_DECAY"):
        here[name] = check_number(name, here[name], zero=True)
    make_schedule(LEARNING_RATE, WARMUP_STEPS, MAX_STEPS)  # checks them; it may be a function, too
    if not callable(LEARNING_RATE):
        here["LEARNING_RATE"] = float(LEARNING_RATE)
    for name, choices in (("RESUME", ("auto", True, False)), ("COMPILE", (True, False)),
                          ("DTYPE", ("auto", "fp32", "bf16"))):
        if repr(here[name]) not in map(repr, choices):
            raise ValueError(f"{name}={here[name]!r}: pick one of {choices}")
    if not isinstance(OUT_DIR, (str, os.PathLike)) or not str(OUT_DIR):
        raise ValueError(f"OUT_DIR={OUT_DIR!r}: give the path of a folder")
    if SEED >= 1 << 63:
        raise ValueError(f"SEED={SEED}: pick a whole number below 2**63")
    if BATCH_SIZE % RANKS:
        raise ValueError(f"BATCH_SIZE={BATCH_SIZE} on {RANKS} processes: pick a multiple of that")
    if not (block := CONSTANTS.search(SOURCE)):
        raise ValueError(f"{FILE}: put the two lines of dashes around the constants back; the "
                         f"constants between them define the run")
    names = [node.id for node in ast.walk(ast.parse(block[0]))
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return {name: plain(here[name]) for name in names
            if name in here and name not in ("DATA_FILE", "OUT_DIR", "RESUME")
            and not name.startswith("LOG_")}


def plain(value: object) -> bool | int | float | str | None:
    """A constant as a value that is the same in the next process: of a function, its source."""
    if type(value) in (bool, int, str, type(None)) or type(value) is float and value == value:
        return value
    with suppress(TypeError, OSError):
        return ast.unparse(ast.parse(inspect.getsource(value).strip()))  # without comments
    text = repr(sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value)
    return re.sub(r" at 0x\w+", "", text)


# ------------------------------------------------------------------ the text


def find_documents() -> list[Path] | list[bytes]:
    """The files of DATA_FILE, or the topics of Python's own documentation as bytes."""
    if DATA_FILE is None:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise ValueError("this Python comes without pydoc_data.topics, the default text: set "
                             "DATA_FILE to your own text file") from None
        return [topics[name].encode() for name in sorted(topics)]
    one = isinstance(DATA_FILE, (str, os.PathLike))
    if not one and not isinstance(DATA_FILE, (list, tuple)):
        raise ValueError(f"DATA_FILE={DATA_FILE!r}: give a path, a list of paths, or None")
    files = [Path(file).resolve() for file in ([DATA_FILE] if one else DATA_FILE)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"DATA_FILE: there is no file {file}; give the path of a text "
                                    f"file, or None for Python's documentation")
    if sum(map(size, files)) == 0:
        raise ValueError(f"DATA_FILE={DATA_FILE!r} is empty: give a file with text in it")
    return files


def size(document: Path | bytes) -> int:
    """Bytes in a document."""
    return len(document) if isinstance(document, bytes) else document.stat().st_size


def blocks(document: Path | bytes, start: int = 0) -> Iterator[bytes]:
    """The bytes of a document from `start` on, a megabyte at a time."""
    with io.BytesIO(document) if isinstance(document, bytes) else open(document, "rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            yield block


def sha256(*documents: Path | bytes) -> str:
    """A hash of the contents, wherever the files are."""
    digest = hashlib.sha256()
    for document in documents:
        for block in blocks(document):
            digest.update(block)
        digest.update(b"%d" % size(document) if len(documents) > 1 else b"")
    return digest.hexdigest()


def split_point(documents: list[Path] | list[bytes]) -> int:
    """How many bytes of all documents together are for training: 90 %, to the end of a line."""
    total = sum(map(size, documents))
    before = 0
    for document in documents:
        point = total * 9 // 10 - before
        if point < size(document):
            break
        before += size(document)
    rest = next(blocks(document, point))[:4096]
    line = rest.find(b"\n", 0, total // 100) + 1
    # UTF-8: all bytes of a character but its first are 10xxxxxx
    character = next((i for i, byte in enumerate(rest) if byte & 0xC0 != 0x80), 0)
    return before + point + (line or character)


def pieces(documents: list[Path] | list[bytes], start: int, stop: int,
           end_token: int | None = None) -> Iterator[str | int]:
    """The text of bytes start … stop of all documents together, with end_token between two."""
    before = 0
    for document in documents:
        first, last = max(start - before, 0), min(stop - before, size(document))
        if first < last:
            yield from (read_text(document, first, last) if isinstance(document, Path) else
                        [document[first:last].decode()])
            if end_token is not None and before + last < stop:
                yield end_token
        before += size(document)


def how_texts_begin(train_ids: np.ndarray, bpe: BPE) -> list[int]:
    """The token before a text that the model writes without a prompt: the one between documents if
    it was seen often enough to be learned, else the one that most lines end with, else (no lines)
    the first of the text."""
    counts = np.bincount(train_ids[:1_000_000], minlength=len(bpe))
    end = bpe.special_tokens[END]
    line = max((i for i in range(len(bpe)) if i != end and bpe.decode_bytes([i])[-1:] == b"\n"),
               key=counts.__getitem__)
    return [next((i for i in (end, line) if counts[i] >= 10), int(train_ids[0]))]


# ------------------------------------------------------------------ the code of the run

FILE = Path(globals().get("__file__", "train.py")).resolve()  # a notebook's cell has no __file__
SOURCE = FILE.read_bytes()
CONSTANTS = re.compile(rb"(?ms)^# -{50,}\r?$.*?^# -{50,}\r?$")


def scripts() -> dict[str, bytes]:
    """The sources of this script and of all modules from its folder that it imports, directly or
    not, by file name, as they were when imported."""
    finder = ModuleFinder([str(FILE.parent)])
    finder.run_script(str(FILE))
    found = {FILE.name: SOURCE}
    for name, module in finder.modules.items():
        path = Path(module.__file__ or "")
        if path.suffix == ".py" and path != FILE:
            # A notebook keeps a module while its file is edited; a reload makes a new spec.
            kept = vars(getattr(sys.modules.get(name), "__spec__", None) or ModuleSpec(name, None))
            found[path.relative_to(FILE.parent).as_posix()] = kept.setdefault(
                "source_as_imported", path.read_bytes())
    return found


scripts()  # remembers them


def meaning(source: bytes, name: str) -> str:
    """The syntax tree of a script, without comments, docstrings and the values of constants."""
    block = CONSTANTS.search(source) if name == FILE.name else None
    try:
        tree = ast.parse(source.replace(block[0], b"") if block else source)
    except (SyntaxError, ValueError):  # truncated, say
        return repr(source)
    tree.body += [node for node in ast.parse(block[0] if block else b"").body
                  if not isinstance(node, (ast.Assign, ast.AnnAssign))]
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [line for line in node.body if not (
                isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
    return ast.dump(tree)


def changed_code(folder: Path, code: dict[str, bytes]) -> list[str]:
    """The names of the scripts that differ from those in the folder."""
    kept = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    return [name for name in sorted({*kept, *code}) if not (
        name in kept and name in code and (
            kept[name] == code[name] or meaning(kept[name], name) == meaning(code[name], name)))]


def write_code(folder: Path, code: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, source in code.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source)


# ------------------------------------------------------------------ the run's folder


def get_ready(out: Path, settings: dict, locks: ExitStack) -> dict | None:
    """Lock OUT_DIR, decide what to do with the run in it, and do it; None: that run is finished.
    Everything new is made in a folder inside OUT_DIR and moved into place last."""
    documents, code, new = find_documents(), scripts(), out / "new.tmp"
    settings["DATA"] = sha256(*documents)
    for name in code:
        if (FILE.parent / name).read_bytes() != code[name]:
            say(f"{name} was edited after it was imported: restart Python to use the new code")
    with about_out_dir("can't be written"):
        out.mkdir(parents=True, exist_ok=True)
    lock(out, locks)
    saved, why = decide(out, settings, code)
    notes = saved["notes"] if saved else {}
    rows, since = notes.get("metrics", []), notes.get("since", 0)
    if notes.get("settings", settings).get("DATA") != settings["DATA"]:  # RESUME = True
        since = len(rows)
    if saved and saved["run"]["step"] >= MAX_STEPS:
        say(f"{OUT_DIR} holds a finished run with these settings ({MAX_STEPS} steps).\n"
            f"To train it longer raise MAX_STEPS; to start from scratch set RESUME = False.")
        report(rows[since:])
        return None
    inside = [Path.cwd(), FILE, *(file for file in documents if isinstance(file, Path))]
    if why and (os.path.ismount(out) or any(path.is_relative_to(out) for path in inside)):
        raise ValueError(f"OUT_DIR={OUT_DIR!r} holds another run ({why}) and can't be renamed to "
                         f"keep it: it is a mount point, or the scripts, the text or the current "
                         f"folder are in it. Set OUT_DIR to another folder, or to one inside it")
    shutil.rmtree(new, ignore_errors=True)  # left by a killed preparation
    try:
        with about_out_dir("can't be written"):
            new.mkdir()
        prepare(out, new, documents, settings["DATA"], code, saved)
        if why:
            aside = next(path for n in range(1, sys.maxsize)
                         if not os.path.lexists(path := out.with_name(f"{out.name}-{n}")))
            with about_out_dir(f"holds another run ({why}) and can't be renamed"):
                out.rename(aside)
            say(f"{OUT_DIR} holds another run ({why}): it is kept as {aside}; a new one starts "
                f"from scratch")
            out.mkdir()
            lock(out, locks)
            new = aside / new.name
        if made := list(new.iterdir()):
            (out / "text.sha256").unlink(missing_ok=True)  # says which text the ids come from
            for path in made:
                if path.is_dir():
                    shutil.rmtree(out / path.name, ignore_errors=True)
                path.replace(out / path.name)
            (out / "text.sha256").write_text(settings["DATA"])
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return {"settings": settings, "code": code, "rows": rows, "since": since,
            "step": saved["run"]["step"] if saved else 0, "device": notes.get("device"),
            "valid_bytes": sum(map(size, documents)) - split_point(documents)}


def decide(out: Path, settings: dict, code: dict[str, bytes]) -> tuple[dict | None, str]:
    """The checkpoint to resume from, or None; and why the run in OUT_DIR must make room, or ""."""
    if not (out / "checkpoint.pt").exists():
        if (out / "tokenizer.json").exists() and not (out / "model.pt").exists():
            say(f"{OUT_DIR}: stopped before its first checkpoint: starting from scratch")
        return None, "a model without its checkpoint.pt" if (out / "model.pt").exists() else ""
    if RESUME is False:
        return None, "RESUME = False"
    try:
        saved = read_file(out / "checkpoint.pt")
        if "run" not in saved:
            raise ValueError(f"{out / 'checkpoint.pt'} holds no training state, only a model")
    except ValueError as error:
        raise ValueError(f"{error}. Put the checkpoint back, or set RESUME = False to start from "
                         f"scratch") from None
    was, files = saved["notes"].get("settings", {}), changed_code(out / "code", code)
    names = [name for name in {**settings, **was} if settings.get(name) != was.get(name)]
    what = ", ".join([*(f"{name}: {was.get(name)} -> {settings.get(name)}" for name in names
                        if name != "DATA"), *["a different text (DATA_FILE)"] * ("DATA" in names),
                      *(f"edited code: {file}" for file in files)])
    raised = names == ["MAX_STEPS"] and MAX_STEPS > was["MAX_STEPS"]
    if RESUME is True:
        if what:
            say(f"RESUME = True: {OUT_DIR} is resumed despite the changes: {what}")
    elif names and not raised or files and saved["run"]["step"] >= MAX_STEPS:
        return None, what
    elif files:
        raise ValueError(
            f"{OUT_DIR} holds an unfinished run; changed since then: {what}. Set RESUME = True "
            f"to resume it with the current code, or RESUME = False to start from scratch and keep "
            f"it under another name; the code that it started with is in {out / 'code'}")
    elif raised:
        say(f"MAX_STEPS is raised from {was['MAX_STEPS']} to {MAX_STEPS}; the learning rate "
            f"follows the new, longer schedule from here on")
    return saved, ""


def prepare(out: Path, new: Path, documents: list[Path] | list[bytes], data: str,
            code: dict[str, bytes], saved: dict | None) -> None:
    """Put into `new` what the run needs and OUT_DIR lacks: tokenizer, code, ids of both parts."""
    split, total = split_point(documents), sum(map(size, documents))
    if saved:
        tokenizer, ids = out / "tokenizer.json", [out / "train.npy", out / "valid.npy"]
        if not tokenizer.exists() or sha256(tokenizer) != saved["notes"].get("tokenizer_sha256"):
            raise ValueError(f"{tokenizer} is not the tokenizer of the run in {OUT_DIR}: put that "
                             f"back, or set RESUME = False to start from scratch")
        text = out / "text.sha256"
        if all(file.exists() for file in (*ids, text)) and text.read_text() == data:
            return
        bpe = BPE.load(tokenizer)
    else:
        say(f"tokenizer: {VOCAB_SIZE} tokens from {split:,} bytes; {total - split:,} held out")
        bpe = BPE(VOCAB_SIZE, special_tokens=(END,)).fit(pieces(documents, 0, split))
        bpe.save(new / "tokenizer.json")
        with about_out_dir("can't be written"):
            write_code(new / "code", code)
    nul = sum(block.count(0) for document in documents for block in blocks(document))
    if nul > total // 20:  # English in UTF-16: half; Russian: each space and full stop
        raise ValueError(f"DATA_FILE={DATA_FILE!r}: {nul:,} of {total:,} bytes are NUL; is it "
                         f"UTF-16? Convert it: iconv -f UTF-16 -t UTF-8")
    tokens = [bpe.encode_file(pieces(documents, start, stop, bpe.special_tokens[END]), new / name)
              for name, start, stop in (("train.npy", 0, split), ("valid.npy", split, total))]
    if min(tokens) < MAX_SEQ_LEN + 1:
        raise ValueError(
            f"{tokens[0]} tokens to train on and {tokens[1]} held out, but a window needs "
            f"MAX_SEQ_LEN + 1 = {MAX_SEQ_LEN + 1}: use a longer text or a smaller MAX_SEQ_LEN")


def lock(folder: Path, locks: ExitStack) -> None:
    """Lock a folder until this main() or the process ends, however it ends."""
    try:
        import fcntl
        fcntl.flock(locks.enter_context(open(folder / ".lock", "w")),
                    fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"OUT_DIR={OUT_DIR!r} is in use by another train.py. Wait for it, stop "
                         f"it, or set OUT_DIR to another folder") from None
    except (ImportError, OSError) as error:  # Windows, a read-only folder, some network drives
        say(f"{OUT_DIR} can't be locked ({error}): don't start a second training there")


@contextmanager
def about_out_dir(what: str) -> Iterator[None]:
    """Make an OSError say what is wrong with OUT_DIR and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"OUT_DIR {what} ({error.strerror}); set OUT_DIR to another "
                      f"folder", str(OUT_DIR)) from None


def write_metrics(out: Path, rows: list[dict], code: dict[str, bytes], bpe: BPE,
                  locks: ExitStack) -> None:
    """Write metrics.csv, and the rest in case somebody has removed the folder."""
    with about_out_dir("can't be written"):
        if not out.exists():
            out.mkdir(parents=True)
            lock(out, locks)
        if not (out / "tokenizer.json").exists():
            bpe.save(out / "tokenizer.json")
        if changed_code(out / "code", code):  # RESUME = True with other code
            write_code(out / "code", code)
        with open(out / "metrics.csv.tmp", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[-1], restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(out / "metrics.csv.tmp", out / "metrics.csv")


# ------------------------------------------------------------------ processes, device, signals

RANKS = int(os.environ.get("WORLD_SIZE", 1))  # processes that torchrun started


def own_device(name: str) -> torch.device:
    """This process's device: of several processes on a machine with GPUs, each has its own GPU."""
    device = torch.device(pick_device(str(name)))
    if RANKS > 1 and device.type == "cuda":
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu") if RANKS > 1 and device.type == "mps" else device  # mps can't share


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, ranks) in the process group that torchrun made, or (0, 1) without one."""
    if RANKS == 1:
        yield 0, 1
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DistributedDataParallel imports this. Imported while a group exists, its functions keep the
    # group alive, whose threads sometimes abort the process when Python exits.
    from torch.distributed.nn import functional  # noqa: F401
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(hours=1))  # the others wait while rank 0 encodes
    try:
        yield dist.get_rank(), dist.get_world_size()
    except SystemExit:  # stopped by a signal; on an error torchrun ends the others
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def keep_memory() -> None:
    """Have glibc, Linux's C library, keep for the next step what a step frees. Given back, it would
    be taken from the system page by page again: 3,500 page faults and a sixth of a step's time."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)        # M_MMAP_MAX: no memory mapping for a large tensor alone
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: give back what is free beyond 1 GiB


@contextmanager
def stop_on_signal(model: GPT) -> Iterator[list[int]]:
    """Ctrl-C or SIGTERM ends the training after the current step; a second one at once."""
    stopped = []

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        model.stop_training = True
        signal.signal(number, signal.SIG_DFL)
        with suppress(OSError):  # print may be in use right now
            os.write(2, b"\nstopping after this step; press again to stop at once\n")

    main_thread = threading.current_thread() is threading.main_thread()  # only it has handlers
    before = {number: signal.signal(number, stop)
              for number in (signal.SIGINT, signal.SIGTERM) if main_thread}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------ output


def say(text: str) -> None:
    """Print. If nobody can read it, training continues."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        code = sys.stdout.encoding
        print(text.encode(code, "replace").decode(code), flush=True)
    except (OSError, ValueError):  # python train.py | head: the reader is gone
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe(model: GPT, how: str, ready: dict, train_tokens: int, valid_tokens: int) -> None:
    """Say what is trained, on what, and how often the text is read."""
    step = BATCH_SIZE * ACCUMULATE * MAX_SEQ_LEN
    passes = MAX_STEPS * step / train_tokens
    say(f"model: {sum(p.numel() for p in model.parameters()):,} parameters on {model.device}, "
        f"{how}; {train_tokens:,} tokens to train on, {valid_tokens:,} held out\n"
        f"{MAX_STEPS:,} steps: {MAX_STEPS * step:,} tokens: {passes:.2g} passes over the text")
    if passes < 1:
        say(f"Part of the text is never read; one pass takes MAX_STEPS = {train_tokens // step:,}. "
            f"With so much text a larger model also pays off (EMB_SIZE, NUM_LAYERS, VOCAB_SIZE).")
    if ready["step"]:
        began = f"; it started on {ready['device']}" * (ready["device"] != model.device.type)
        say(f"resuming after step {ready['step']} of {MAX_STEPS}{began}")


def log(row: dict) -> None:
    """A line for each validation, where no terminal shows the bar."""
    if not all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr)):
        say(f"step {row['step']} of {MAX_STEPS}: training {row['train_loss']}, validation "
            f"{row['valid_loss']} nats per token, {row['valid_bits_per_byte']} bits per byte, "
            f"{int(row['tokens_per_second']):,} tokens/s")


def finish(out: Path, rows: list[dict], stopped: list[int]) -> None:
    """Say how to resume if the training was stopped, else show what came out of it."""
    if not rows or int(rows[-1]["step"]) < MAX_STEPS:
        how = "python train.py" if RANKS == 1 else "the same torchrun command"
        where = (f"everything is in {Path(OUT_DIR, 'checkpoint.pt')}. To resume"
                 if (out / "checkpoint.pt").exists() else "before the first step. To start again")
        say(f"\nstopped; {where}: {how}")
        sys.exit(128 + (stopped[0] if stopped else signal.SIGTERM))  # or another rank was stopped
    report(rows)
    for extra in (draw_losses, print_sample):
        try:
            extra(out, rows)
        except Exception as error:  # a failed picture must not end a run
            say(f"{extra.__name__} doesn't work here: {type(error).__name__}: {error}")


def best_of(rows: list[dict]) -> dict:
    """The first row with the lowest validation loss."""
    return min(rows, key=lambda row: min(math.inf, float(row["valid_loss"])))  # NaN: inf


def report(rows: list[dict]) -> None:
    """Print the best result of the run, where everything lies, and the next command."""
    if not rows:
        return
    best = best_of(rows)
    bits, speed = best["valid_bits_per_byte"], int(rows[-1]["tokens_per_second"])
    say(f"""
best validation loss  {best["valid_loss"]} nats per token, {bits} bits per byte
                      at step {best["step"]} of {rows[-1]["step"]}, {int(best["tokens"]):,} tokens
time                  {rows[-1]["seconds"]} s, {speed:,} tokens/s at the end
best model            {Path(OUT_DIR, "model.pt")}
all metrics           {Path(OUT_DIR, "metrics.csv")}
next                  python sample.py
""")


def draw_losses(out: Path, rows: list[dict]) -> None:
    """Draw both losses over tokens as loss.png, for white and dark pages."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # unlike pyplot, it has no global state
    except ImportError:
        return say("No picture: it needs matplotlib (pip install matplotlib)")
    tokens = [int(row["tokens"]) for row in rows]
    valid = [float(row["valid_loss"]) for row in rows]
    best = rows.index(best_of(rows))
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with rc_context(dict.fromkeys(names, "#808080") | {"font.size": 12}):
        figure = Figure(figsize=(8.3, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(tokens, [float(row["train_loss"]) for row in rows],
                  label="training, mean since the last validation")
        axes.plot(tokens, valid, label="held-out text")
        axes.plot(tokens[best], valid[best], "o", color="C1", label=f"best: {valid[best]:.3f}")
        axes.set(xlabel="tokens seen in training", ylabel="loss, nats per token")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.legend(framealpha=0)
        figure.savefig(out / "loss.png", dpi=150, transparent=True)
    say(f"drawn: {Path(OUT_DIR, 'loss.png')}")


def print_sample(out: Path, rows: list[dict]) -> None:
    model, bpe = GPT.load(out / "model.pt"), BPE.load(out / "tokenizer.json")
    ids = model.generate(torch.tensor([model.notes["start"]]), 200, True, 0.8, 50,
                         generator=torch.Generator().manual_seed(SEED))
    say(f"a sample of {ids.shape[1] - 1} tokens:\n\n{bpe.decode(ids[0, 1:].tolist())}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the training, or after it
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")

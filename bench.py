"""bench.py: how fast, how small and how good it is, compared with others on the same machine.

Set the constants, then: python bench.py. It prints a table for each part and writes all numbers,
with a description of the machine, to assets/bench.json, which the pages take their numbers from.

Every installed peer (pip install tokenizers tiktoken rustbpe transformers ctranslate2) adds a row,
measured in turn with ours: A B A B, one unmeasured round, then the median of the others. Seconds
depend on the machine and its load; look at the ratios within one table. While other programs keep
the cores busy, the environment variable OMP_WAIT_POLICY=PASSIVE helps a lot.

Needs: torch, numpy, tqdm, and the scripts beside it. On two cores all parts take about 25 minutes.
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import pickle
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train
from BPE import BPE, GPT2_PATTERN
from GetData import Batches, GetData
from GPT import GPT, pick_dtype

# ------------------------------------------------------------------------------------------------
TEXT_FILE = None       # for the speedrun: tinyshakespeare.txt; None: it is left out
RUSSIAN_FILE = None    # some megabytes of Russian (UTF-8), for the tokenizer; None: it is left out
NANOGPT_DIR = None     # a clone of github.com/karpathy/nanoGPT; None: it is left out
PARTS = ["tokenizer", "training", "generation", "memory", "scale",
         "speedrun"]  # remove what you don't want
ROUNDS = 3             # measured rounds; the median counts
OUT_FILE = "assets/bench.json"

TOKENIZER_SHAPES = [(1, 1024), (100, 8192), (100, 32768)]  # megabytes at most, V
RUSSIAN_V = 16384
# V, T, B, E, H, layers; D = E / H
TRAINING_SHAPES = [(1024, 64, 32, 128, 4, 4), (65, 64, 12, 128, 4, 4), (4096, 256, 8, 384, 6, 6)]
# V, T, E, H, layers, tokens to generate at batch 1
GENERATION_SHAPES = {"small": (1024, 256, 128, 4, 4, 200),
                     "GPT-1 size": (40478, 512, 768, 12, 12, 32)}

# The speedrun: train on the first 90 % of TEXT_FILE, validate on all of the rest. The aims are nats
# per byte: 1.886 is where nanoGPT's CPU recipe ends, 1.4697 what nanoGPT publishes for an A100.
# Short windows learn faster in the first seconds, longer ones win in the end.
SPEEDRUNS = {
    "nanoGPT's result": {"aim": 1.886, "steps": 170, "rate": 6e-3, "warmup": 40, "V": 1024, "T": 32,
                         "B": 16, "E": 96, "H": 3, "layers": 2, "dropout": 0.0, "decay": 0.1,
                         "validations": 1},
    "nanoGPT's time": {"aim": 1.60, "steps": 1600, "rate": 3e-3, "warmup": 200, "V": 1024, "T": 64,
                       "B": 16, "E": 128, "H": 4, "layers": 4, "dropout": 0.0, "decay": 0.1,
                       "validations": 4},
    # It reads the text a dozen times. Without dropout, which takes a sixth of the time, it ended at
    # 1.473 with decay 0.6 and at 1.481 with 0.5.
    "five minutes": {"aim": 1.4697, "seconds": 300, "rate": 3e-3, "warmup": 200, "V": 1024, "T": 64,
                     "B": 16, "E": 160, "H": 5, "layers": 4, "dropout": 0.1, "decay": 0.4,
                     "validations": 3},
}
NANOGPT_OPTIONS = """--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64
    --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000
    --dropout=0.0"""   # of its README, for a CPU
# ------------------------------------------------------------------------------------------------

PEERS = ("tokenizers", "tiktoken", "rustbpe", "transformers", "ctranslate2")
RESULTS: dict = {}


def main() -> None:
    RESULTS["machine"] = machine()
    for part in PARTS:
        PART_FUNCTIONS[part]()
    out = Path(OUT_FILE)
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}  # other parts stay
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(before | RESULTS, indent=1) + "\n", encoding="utf-8")
    print(f"\nall numbers: {OUT_FILE}")


# ------------------------------------------------------------------ measuring and showing


def machine() -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    native, big = pick_dtype(torch.device("cpu")) == "bf16", torch.ones(1 << 15, 1 << 11)
    matrices = {"fp32": torch.randn(1024, 1024)}
    if native:
        matrices["bf16"] = matrices["fp32"].bfloat16()
    seconds = in_turn({name: partial(torch.mm, a, a) for name, a in matrices.items()}, 50, min)
    read = big.nbytes / 1e9 / in_turn({"": partial(torch.mv, big, big[0])}, 20, min)[""]
    about = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
             "os": platform.system(), "python": platform.python_version(),
             "torch": torch.__version__,
             "native_bf16": native,
             **{name: version(name) for name in PEERS if importlib.util.find_spec(name)},
             **{f"matmul_gflops_{name}": rounded(2 * 1024**3 / 1e9 / s)
                for name, s in seconds.items()},
             "read_gb_per_second": rounded(read)}
    show("Machine", [{"what": key, "value": value} for key, value in about.items()])
    return about


def in_turn(functions: dict[str, Callable[[], object]], rounds: int = 0,
            summary: Callable[[list[float]], float] = statistics.median,
            pause: float = 0.0) -> dict[str, float]:
    """Seconds each function takes: median over rounds of A B A B, after one unmeasured round.
    pause: seconds before each call, as idle threads of another process spin for a while."""
    seconds = {name: [] for name in functions}
    for n in range(1 + (rounds or ROUNDS)):
        for name, function in functions.items():
            time.sleep(pause)
            start = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                function()
            if n:
                seconds[name].append(time.perf_counter() - start)
    return {name: summary(measured) for name, measured in seconds.items()}


def rounded(x: float) -> float:
    """Three digits: 12345.6 -> 12300, 0.012345 -> 0.0123."""
    x = float(f"{x:.3g}")
    return int(x) if x == int(x) and abs(x) >= 100 else x


def show(title: str, rows: list[dict]) -> list[dict]:
    """Print a table and return its rows, rounded, for the file."""
    rows = [{key: rounded(value) if isinstance(value, float) else value
             for key, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{title}")
    for line in [columns, *cells]:
        print("  ".join(map(str.ljust, line, widths)).rstrip(), flush=True)
    return rows


def compared(labels: dict, seconds: dict[str, float], unit: str, amount: float) -> list[dict]:
    """A row for each run: its speed, and for ours how many times as fast as each peer it is."""
    rows = []
    for name, s in seconds.items():
        rows.append(labels | {"run": name, unit: amount / s, "seconds": s})
        if name.startswith("ours"):
            rows[-1] |= {f"x {other}": theirs / s for other, theirs in seconds.items()
                         if not other.startswith("ours")}
    return rows


def peer(name: str) -> object | None:
    """The module, or None with a message."""
    if name == "nanoGPT":
        if NANOGPT_DIR is None:
            print("nanoGPT: left out, NANOGPT_DIR is None")
            return None
        spec = importlib.util.spec_from_file_location("nanogpt", Path(NANOGPT_DIR, "model.py"))
        module = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name}: not installed")
        return None


def in_child(code: str) -> list[str]:
    """The lines that code prints in a new process; its start counts, too."""
    process = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False,
                             capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{code}\nfailed:\n{process.stderr[-2000:]}")
    return process.stdout.splitlines()


@contextlib.contextmanager
def own_process(make: str, *arguments: object) -> Iterator[Callable[..., None]]:
    """A process for one model alone: the thread pools of different libraries interfere, and only
    ours keeps its memory. It calls the function `make` of this file, which makes a function of
    whole numbers. Yields one that calls that function over there."""
    code = f"import bench; bench.NANOGPT_DIR = {NANOGPT_DIR!r}; bench.serve({make!r}, *{arguments})"
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process:

        def call(*numbers: int) -> None:
            with contextlib.suppress(BrokenPipeError):
                print(*numbers, file=process.stdin)
            if not process.stdout.readline():
                errors.seek(0)
                raise RuntimeError(f"{arguments[0]} failed:\n{errors.read()[-2000:]}")

        try:
            yield call
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # and it ends


def serve(make: str, *arguments: object) -> None:
    """The other end of own_process: a line of numbers in, a line out when the call is done."""
    answers, sys.stdout = sys.stdout, sys.stderr
    function = globals()[make](*arguments)
    for line in sys.stdin:
        function(*map(int, line.split()))
        print("done", file=answers, flush=True)


# ------------------------------------------------------------------ tokenizer


def tokenizer() -> None:
    """Train and encode, compared with Rust libraries, on the source of Python's standard library
    and on Russian. lines: the length of the code, where it is Python that can be read."""
    python = standard_library()
    rows = [row for size, V in TOKENIZER_SHAPES
            for row in fit_beside("Python", python[: round(size * 1e6)], V)]
    rows += encode_beside("Python", python, TOKENIZER_SHAPES[-1][1])
    if RUSSIAN_FILE:
        rows += fit_beside("Russian", russian(), RUSSIAN_V)
        rows += encode_beside("Russian", russian(), RUSSIAN_V)
    lines = len(Path(sys.modules["BPE"].__file__).read_text(encoding="utf-8").splitlines())
    for row in rows:
        row["lines"] = lines if row["run"].startswith("ours") else ""
    RESULTS["tokenizer"] = show("Tokenizer; x: times as fast as", rows)


def fit_beside(name: str, text: str, V: int) -> list[dict]:
    """Rows: training on the text."""
    rustbpe, tokenizers = map(peer, ("rustbpe", "tokenizers"))
    runs = {"ours": lambda: BPE(V).fit(text)}
    if rustbpe:
        runs["rustbpe"] = lambda: rustbpe.Tokenizer().train_from_iterator([text], V,
                                                                          pattern=GPT2_PATTERN)
    if tokenizers:
        runs["tokenizers (lines)"] = partial(fit_tokenizers, tokenizers, text, V)
    megabytes = len(text.encode()) / 1e6
    labels = {"task": "fit", "text": name, "megabytes": megabytes, "V": V}
    return compared(labels, in_turn(runs), "mb_per_second", megabytes)


def encode_beside(name: str, text: str, V: int) -> list[dict]:
    """Rows: encoding the text with a tokenizer trained on it."""
    rustbpe, tokenizers, tiktoken = map(peer, ("rustbpe", "tokenizers", "tiktoken"))
    bpe, megabytes = BPE(V).fit(text), len(text.encode()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        file, source = Path(folder, "tokenizer.json"), Path(folder, "text.txt")
        bpe.save(file)
        source.write_bytes(text.encode())
        # They have seen no words yet; in_turn calls each of the two runs 1 + ROUNDS times.
        cold = [BPE.load(file) for _ in range(2 * (1 + ROUNDS))]
        runs = {"ours, freshly loaded": lambda: cold.pop().encode(text),
                "ours encode_file, freshly loaded":
                    lambda: cold.pop().encode_file(source, f"{folder}/ids.npy"),
                "ours, after fit": lambda: bpe.encode(text)}
        if tiktoken:
            ranks = {bpe.decode_bytes([i]): i for i in range(len(bpe))}
            theirs = tiktoken.Encoding("bench", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                       special_tokens={})
            print("same ids as tiktoken:", theirs.encode_ordinary(text) == bpe.encode(text))
            runs["tiktoken"] = lambda: theirs.encode_ordinary(text)
            pieces = [text[i : i + 1_000_000] for i in range(0, len(text), 1_000_000)]
            runs["tiktoken, all cores"] = lambda: theirs.encode_ordinary_batch(
                pieces, num_threads=os.cpu_count())
        if rustbpe:
            rust = rustbpe.Tokenizer()
            rust.train_from_iterator([text], V, pattern=GPT2_PATTERN)
            runs["rustbpe"] = lambda: rust.encode(text)
        if tokenizers:
            fast = tokenizers.Tokenizer.from_file(str(file))
            runs["tokenizers (lines)"] = lambda: fast.encode_batch(text.splitlines(keepends=True))
        labels = {"task": "encode", "text": name, "megabytes": megabytes, "V": V}
        return compared(labels, in_turn(runs), "mb_per_second", megabytes)


def russian() -> str:
    """RUSSIAN_FILE, and five copies of it with the letters of the alphabet permuted: new words as
    long and as frequent as the old ones, like those of a larger text."""
    text = Path(RUSSIAN_FILE).read_bytes().decode()
    letters = "абвгдежзийклмнопрстуфхцчшщъыьэюя"
    copies = [text]
    for seed in range(5):
        other = "".join(random.Random(seed).sample(letters, len(letters)))
        copies.append(text.translate(str.maketrans(letters + letters.upper(),
                                                   other + other.upper())))
    return "".join(copies)


def standard_library() -> str:
    """The .py files of the running Python's standard library, about 31 MB, concatenated."""
    texts, root = [], Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            with contextlib.suppress(UnicodeDecodeError):
                texts.append(path.read_bytes().decode())
    return "".join(texts)


def fit_tokenizers(tokenizers, text: str, V: int) -> None:
    """Hugging Face's trainer, with the same split as ours; it works on lines in parallel."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(text.splitlines(keepends=True), tokenizers.trainers.BpeTrainer(
        vocab_size=V, show_progress=False, initial_alphabet=split.alphabet()))


# ------------------------------------------------------------------ training: tokens a second


def nanogpt_model(module, V: int, T: int, E: int, H: int, layers: int) -> torch.nn.Module:
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(block_size=T, vocab_size=V, n_layer=layers, n_head=H,
                                           n_embd=E, dropout=0.0, bias=False))


def transformers_model(module, V: int, T: int, E: int, H: int, layers: int) -> torch.nn.Module:
    return module.GPT2LMHeadModel(module.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=E, n_layer=layers, n_head=H, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))


def training() -> None:
    """fit, compared with nanoGPT's training loop or the same loop around transformers' GPT-2."""
    names = ["ours fp32"] + ["ours bf16"] * RESULTS["machine"]["native_bf16"]
    names += (["nanoGPT fp32"] if peer("nanoGPT") else
              ["transformers fp32"] * bool(peer("transformers")))
    rows = []
    for V, T, B, E, H, layers in TRAINING_SHAPES:
        model = GPT(V, T, E, H, E // H, layers)
        weights = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
        flops = (6 * weights + 12 * layers * E * T) * T * B  # a step, forward and backward
        steps = max(8, round(4e11 / flops))  # fit makes a new optimizer each time: not too few
        with contextlib.ExitStack() as stack:
            seconds = in_turn({name: partial(stack.enter_context(own_process(
                "trainer", name, V, T, B, E, H, layers)), steps) for name in names}, pause=0.3)
        batches = Batches(GetData(random_ids(V), T), B, seed=0)
        loading = in_turn({"": partial(load, batches, steps)})[""]
        labels = {"V, T, B, E, H, layers": f"{V}, {T}, {B}, {E}, {H}, {layers}"}
        for row in compared(labels, seconds, "tokens_per_second", T * B * steps):
            if row["run"].startswith("ours"):
                peak = RESULTS["machine"][f"matmul_gflops_{row['run'].split()[1]}"]
                row |= {"flops_utilisation": flops * steps / row["seconds"] / 1e9 / peak,
                        "loading_share": loading / row["seconds"]}
            rows.append(row)
    RESULTS["training"] = show("Training; x: times as fast as", rows)


def random_ids(V: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, 200_000, dtype=np.uint16)


def trainer(name: str, V: int, T: int, B: int, E: int, H: int,
            layers: int) -> Callable[[int], object]:
    """A function that trains for so many steps."""
    library, dtype = name.split()
    if library == "ours":
        model = GPT(V, T, E, H, E // H, layers, dropout=0.0)
        batches = Batches(GetData(random_ids(V), T), B, seed=0)
        return lambda steps: fit_steps(model, batches, steps, dtype)
    make = nanogpt_model if library == "nanoGPT" else transformers_model
    return nanogpt_loop(make(peer(library), V, T, E, H, layers), random_ids(V), T, B)


def fit_steps(model: GPT, batches: Batches, steps: int, dtype: str) -> None:
    """fit for this many steps; clipping, fused AdamW and a validation of one token included."""
    train.keep_memory()
    valid = [(torch.zeros(1, 1).long(),) * 2]
    model.fit(batches, valid, 1, 1e-4, max_steps=steps, dtype=dtype)


def load(batches: Batches, steps: int) -> None:
    for k in range(steps):
        batches.batch(k)


def nanogpt_loop(model: torch.nn.Module, ids: np.ndarray, T: int,
                 B: int) -> Callable[[int], None]:
    """What nanoGPT's train.py does in a step: its batches, its AdamW, its clipping, one .item()."""
    if hasattr(model, "configure_optimizers"):
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.1)

    def run(steps: int) -> None:
        model.train()
        for _ in range(steps):
            starts = torch.randint(len(ids) - T, (B,))
            x, y = (torch.stack([torch.from_numpy(ids[i + n : i + n + T].astype(np.int64))
                                 for i in starts]) for n in (0, 1))
            if hasattr(model, "configure_optimizers"):
                loss = model(x, y)[1]
            else:
                loss = F.cross_entropy(model(x, use_cache=False).logits.flatten(0, 1), y.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()

    return run


# ------------------------------------------------------------------ generation: tokens a second


def generation() -> None:
    """Batch 1, batch 16 and a prompt of 500 tokens, ours and the peers that are installed."""
    names = ["ours fp32", "ours bf16"]
    names += ["transformers fp32"] * bool(transformers := peer("transformers"))
    if peer("ctranslate2") and transformers:
        names += ["CTranslate2 fp32", "CTranslate2 int8"]
    names += ["nanoGPT fp32"] * bool(peer("nanoGPT"))
    rows = []
    for size, (V, T, E, H, layers, new) in GENERATION_SHAPES.items():
        with contextlib.ExitStack() as stack:
            writers = {name: stack.enter_context(own_process("writer", name, V, T, E, H, layers))
                       for name in names}
            for task, batch, prompt, tokens in (("batch 1", 1, 8, new),
                                                ("batch 16", 16, 8, new // 2),
                                                ("prompt of 500", 1, 500, 1)):
                if prompt + tokens > T:
                    continue
                seconds = in_turn({name: partial(write, batch, prompt, tokens)
                                   for name, write in writers.items()}, pause=0.3)
                rows += compared({"size": size, "task": task}, seconds, "tokens_per_second",
                                 batch * tokens)
        weights = V * E + V + layers * (12 * E * E + 13 * E)  # of the embeddings it reads two rows
        for dtype, width in (("fp32", 4), ("bf16", 2)):
            read = RESULTS["machine"]["read_gb_per_second"]
            rows.append({"size": size, "task": "batch 1", "run": f"bound {dtype} (reading weights)",
                         "tokens_per_second": read * 1e9 / (weights * width)})
    RESULTS["generation"] = show("Generation: top-k 50, top-p 0.95; x: times as fast as", rows)


def writer(name: str, V: int, T: int, E: int, H: int,
           layers: int) -> Callable[[int, int, int], object]:
    """A function (batch, prompt length, new tokens) that generates them."""
    library, dtype = name.split()
    with tempfile.TemporaryDirectory() as folder:
        if library == "ours":
            GPT(V, T, E, H, E // H, layers).save(f"{folder}/model.pt")
            model = GPT.load(f"{folder}/model.pt", dtype=dtype)
            write = partial(model.generate, do_sample=True, top_k=50, top_p=0.95)
        elif library == "nanoGPT":
            model = nanogpt_model(peer("nanoGPT"), V, T, E, H, layers).eval()
            write = partial(model.generate, top_k=50)  # it has no top-p
        else:
            transformers = peer("transformers")
            model = transformers_model(transformers, V, T, E, H, layers).eval()
            write = (partial(transformers_write, model) if library == "transformers" else
                     ctranslate2_writer(dtype, transformers, model, folder, V))
    return lambda batch, prompt, tokens: write(torch.randint(1, V, (batch, prompt)), tokens)


def transformers_write(model: torch.nn.Module, x: torch.Tensor, tokens: int) -> None:
    model.generate(x, attention_mask=torch.ones_like(x), do_sample=True, top_k=50, top_p=0.95,
                   max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)


def ctranslate2_writer(dtype: str, transformers, model: torch.nn.Module, folder: str,
                       V: int) -> Callable:
    """CTranslate2 reads a transformers model from a folder, and needs a tokenizer in it."""
    from tokenizers import Tokenizer, models

    ctranslate2 = peer("ctranslate2")
    words = {"<|endoftext|>": 0} | {f"t{i}": i for i in range(1, V)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        unk_token="<|endoftext|>").save_pretrained(f"{folder}/transformers")
    model.save_pretrained(f"{folder}/transformers")
    kind = {"fp32": "float32"}.get(dtype, dtype)
    ctranslate2.converters.TransformersConverter(f"{folder}/transformers").convert(
        f"{folder}/converted", quantization=kind)
    generator = ctranslate2.Generator(f"{folder}/converted", compute_type=kind,
                                      intra_threads=torch.get_num_threads())
    return lambda x, n: generator.generate_batch(
        [[f"t{i}" for i in row] for row in x.tolist()], max_length=n, min_length=n,
        sampling_topk=50, sampling_topp=0.95, include_prompt_in_result=False)


# ------------------------------------------------------------------ memory


def memory() -> None:
    """The largest resident memory of a process that does one thing; Linux only."""
    if not Path("/proc/self/status").exists():
        print("\nMemory: left out, there is no /proc here")
        return
    rows = [{"process": "import torch and the scripts", "peak_mb": costs("import bench")[1]},
            {"process": f"fit, shape {TRAINING_SHAPES[-1]}",
             "peak_mb": costs(f"import bench\nbench.four_steps(*{TRAINING_SHAPES[-1]})")[1]}]
    V, T, E, H, layers, _ = GENERATION_SHAPES["GPT-1 size"]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.pt"
        GPT(V, T, E, H, E // H, layers).save(path)
        rows.append({"process": "(the file of the GPT-1 size model)",
                     "peak_mb": Path(path).stat().st_size / 1e6})
        for dtype in ("fp32", "bf16"):
            _, own, _ = costs("import bench, torch\nx = torch.ones(1, 8).long()\n"
                              f"bench.GPT.load({path!r}, dtype={dtype!r}).generate(x, 32, True)")
            rows.append({"process": f"load and generate, GPT-1 size, {dtype}", "peak_mb": own})
        text = standard_library()
        BPE(8192).fit(text).save(path)
        for name, times in (("part.txt", 1), ("text.txt", 16)):
            with open(f"{folder}/{name}", "w", encoding="utf-8", newline="") as file:
                file.writelines([text] * times)
        megabytes = Path(folder, "text.txt").stat().st_size / 1e6
        for name, code in (
                (f"BPE.encode_file, {megabytes:.0f} MB",
                 f"BPE.load({path!r}).encode_file('{folder}/text.txt', '{folder}/ids.npy')"),
                (f"BPE.fit, {2 * megabytes:.0f} MB in an iterable",
                 f"text = open('{folder}/part.txt', encoding='utf-8', newline='').read()\n"
                 "BPE(8192).fit(text for _ in range(32))")):
            _, own, worker = costs(f"from BPE import BPE\n{code}")
            rows += [{"process": f"{name}, without its workers", "peak_mb": own},
                     {"process": f"{name}, its largest worker", "peak_mb": worker}]
    RESULTS["memory"] = show("Memory: peak of the process, MB", rows)


def four_steps(V: int, T: int, B: int, E: int, H: int, layers: int) -> None:
    batches = Batches(GetData(list(range(V)), T), B, seed=0)
    fit_steps(GPT(V, T, E, H, E // H, layers), batches, 4, "fp32")


def costs(setup: str, work: str = "") -> tuple[float, float, float]:
    """Of a new process: the seconds of `work`, its largest memory and its largest child's, MB."""
    shown = in_child(f"""{setup}
import re, resource, time
start = time.perf_counter()
{work}
print(time.perf_counter() - start)
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read()).group(1))
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)""")
    seconds, own, child = map(float, shown[-3:])
    return seconds, rounded(own / 1e3), rounded(child / 1e3)


def median_costs(setup: str, work: str) -> list[float]:
    return [statistics.median(one) for one in zip(*(costs(setup, work) for _ in range(ROUNDS)),
                                                  strict=True)]


# ------------------------------------------------------------------ scale


def scale() -> None:
    """How time and memory of each step grow: the constants of train.py, one thing larger at a time.
    Linux only."""
    if not Path("/proc/self/status").exists():
        print("\nScale: left out, there is no /proc here")
        return
    text, rows = standard_library(), []
    with tempfile.TemporaryDirectory() as folder:
        for grown, size in (("", len(text) // 10), ("text x10", len(text))):
            file = f"{folder}/{size}"
            Path(f"{file}.txt").write_bytes(text[:size].encode())
            for step, work in (
                    (f"tokenizer: fit, {len(text) / 1e7:.1f} MB",
                     f"bpe.BPE({train.VOCAB_SIZE}).fit(bpe.read_text('{file}.txt')).save('{file}')"),
                    ("tokenizer: encode_file",
                     f"bpe.BPE.load('{file}').encode_file('{file}.txt', '{file}.npy')")):
                seconds, own, worker = median_costs("import BPE as bpe", work)
                rows.append({"step": step, "grown": grown, "seconds": seconds,
                             "mb": max(own, worker)})
        shape = {"T": train.MAX_SEQ_LEN, "B": train.BATCH_SIZE, "layers": train.NUM_LAYERS}
        longer = {"T": 4 * shape["T"], "B": shape["B"] // 4}  # as many tokens in a batch
        for grown, change in (("", {}), ("context x4", longer), ("text x10", {}),
                              ("layers x4", {"layers": 4 * shape["layers"]})):
            ids = f"{folder}/{len(text) if grown == 'text x10' else len(text) // 10}.npy"
            setup = f"import bench\nmodel, batches = bench.scaled({ids!r}, **{shape | change})"
            for step, work in (
                    ("train: 50000 tokens", "bench.fit_steps(model, batches, 98, 'auto')"),
                    ("generate: 1000 tokens", "bench.generate_thousand(model)")):
                seconds, own, _ = median_costs(setup, work)
                rows.append({"step": step, "grown": grown, "seconds": seconds, "mb": own})
    rows.sort(key=lambda row: row["step"], reverse=True)
    base = {row["step"]: row for row in rows if not row["grown"]}
    for row in rows:
        for key in ("seconds", "mb"):
            row[f"x {key}"] = row[key] / base[row["step"]][key]
    RESULTS["scale"] = show("Scale: one thing larger at a time", rows)


def scaled(ids: str, T: int, B: int, layers: int) -> tuple[GPT, Batches]:
    """A model as train.py makes it, and batches of the ids in a file."""
    model = GPT(train.VOCAB_SIZE, T, train.EMB_SIZE, train.NUM_HEADS, train.HEAD_SIZE, layers, 0.0)
    return model, Batches(GetData(np.load(ids, mmap_mode="r"), T), B, seed=0)


def generate_thousand(model: GPT) -> None:
    """As many windows as make 1,000 tokens, so that no token is generated with a full cache."""
    T = model.sizes["max_seq_len"]
    for _ in range(round(1000 / T)):
        model.generate(torch.ones(1, 1).long(), T, do_sample=True)


# ------------------------------------------------------------------ the speedrun


def speedrun() -> None:
    """How soon and how well it learns TEXT_FILE; a process for each run, timed from its start."""
    if TEXT_FILE is None:
        print("\nSpeedrun: left out, TEXT_FILE is None")
        return
    text, rows, loads = str(Path(TEXT_FILE).resolve()), [], []
    theirs = nanogpt_recipe(text) if NANOGPT_DIR else None
    if theirs:
        rows.append({"run": "nanoGPT's CPU recipe", **theirs})
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in SPEEDRUNS.items():
            start = time.time()
            call = f"bench.learn({text!r}, {settings!r}, {folder + '/model.pt'!r}, {start})"
            run = json.loads(in_child(f"import bench, json\nprint(json.dumps({call}))")[-1])
            best = min(point["nats_per_byte"] for point in run["curve"])
            row = {"run": name, "seconds": run["curve"][-1]["time"] - start, "nats_per_byte": best,
                   "aim": str(settings["aim"]), "aim_after": "not reached"}
            reached = [p for p in run["curve"] if p["nats_per_byte"] <= settings["aim"]]
            if reached:
                row["aim_after"] = reached[0]["time"] - start
                if theirs:
                    row["nanoGPT_seconds / aim_after"] = theirs["seconds"] / row["aim_after"]
            rows.append(row)
            loads.append({"run": name} | run["by_dtype"])
    for row in rows:
        row["nats_per_byte"] = f"{row['nats_per_byte']:.4f}"
        row["bits_per_byte"] = f"{float(row['nats_per_byte']) / math.log(2):.4f}"
    RESULTS["speedrun"] = show("Speedrun: from process start to a validation loss", rows)
    RESULTS["bf16_weights"] = show("Validation loss, nats per byte, by the weights' type", loads)


def learn(text: str, settings: dict, path: str, start: float) -> dict:
    """One run: text -> tokenizer -> ids -> fit -> model file. The curve holds points in time. With
    "seconds" in place of "steps", it takes as many steps as fill them at the speed of a trial."""
    s, curve = settings, []
    data = Path(text).read_bytes()
    split = len(data) * 9 // 10
    bpe = BPE(s["V"]).fit(data[:split].decode(errors="ignore"))
    train_ids, valid = (np.array(bpe.encode(part.decode(errors="ignore")), dtype=np.uint16)
                        for part in (data[:split], data[split:]))
    per_byte = len(valid) / (len(data) - split)  # tokens
    sizes = (len(bpe), s["T"], s["E"], s["H"], s["E"] // s["H"], s["layers"], s["dropout"])
    batches = Batches(GetData(train_ids, s["T"]), s["B"], seed=0)
    held_out = Batches(GetData(valid, s["T"], stride=s["T"]), 64)
    if "seconds" in s:
        trial = partial(fit_steps, GPT(*sizes), batches, 25, "auto")
        a_step = in_turn({"": trial}, 2)[""] / 25
        # the rest is for the validations
        s["steps"] = int(0.95 * (s["seconds"] - (time.time() - start)) / a_step)
    torch.manual_seed(0)
    model = GPT(*sizes)
    train.keep_memory()

    def on_eval(metrics: dict) -> None:
        curve.append({"step": metrics["step"], "time": time.time(),
                      "nats_per_byte": metrics["valid_loss"] * per_byte})
        if metrics["best"]:
            model.save(path)

    model.fit(batches, held_out, 1, s["rate"], max_steps=s["steps"], warmup_steps=s["warmup"],
              weight_decay=s["decay"], eval_every=math.ceil(s["steps"] / s["validations"]),
              on_eval=on_eval)
    by_dtype = {}
    for dtype in ("fp32", "bf16"):
        model = GPT.load(path, dtype=dtype)
        with torch.no_grad():
            loss = sum(F.cross_entropy(model(x).float().flatten(0, 1), y.flatten(), reduction="sum")
                       for x, y in held_out).item()
        by_dtype[dtype] = loss / sum(y.numel() for _, y in held_out) * per_byte
    change = 100 * (by_dtype["bf16"] / by_dtype["fp32"] - 1)
    return {"curve": curve, "by_dtype": {dtype: f"{loss:.4f}" for dtype, loss in by_dtype.items()}
            | {"change": f"{change:+.3f} %"}}


def nanogpt_recipe(text: str) -> dict:
    """The command of nanoGPT's README for a CPU, on this text, in a copy: seconds and its loss."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train.py", "model.py", "configurator.py"):
            shutil.copy(Path(NANOGPT_DIR, name), folder)
        data = Path(folder, "data", "shakespeare_char")
        data.mkdir(parents=True)
        characters = Path(text).read_text(encoding="utf-8")
        vocabulary = sorted(set(characters))
        ids = np.array([vocabulary.index(c) for c in characters], dtype=np.uint16)
        ids[: len(ids) * 9 // 10].tofile(data / "train.bin")
        ids[len(ids) * 9 // 10 :].tofile(data / "val.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(vocabulary)}))
        config = Path(NANOGPT_DIR, "config", "train_shakespeare_char.py").resolve()
        start = time.time()
        shown = subprocess.run([sys.executable, "train.py", str(config), *NANOGPT_OPTIONS.split()],
                               cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds = time.time() - start
    return {"seconds": seconds, "nats_per_byte": float(re.findall(r"val loss ([\d.]+)", shown)[-1])}


PART_FUNCTIONS = {"tokenizer": tokenizer, "training": training, "generation": generation,
                  "memory": memory, "scale": scale, "speedrun": speedrun}


if __name__ == "__main__":
    main()

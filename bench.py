"""bench.py: how fast, how small and how good it is, compared with others on the same machine.

Set the constants, then: python bench.py, or only some parts: python bench.py generation beside.
It prints a table for each part and writes all numbers, with a description of the machine, to
assets/bench.json, which the pages take their numbers from.

Every installed peer (pip install tokenizers tiktoken rustbpe transformers ctranslate2) adds a row,
measured in turn with ours: A B A B, one unmeasured round, then the median of the others. Seconds
depend on the machine and its load; look at the ratios within one table.

Needs: torch, numpy, tqdm, and the scripts beside it. On two cores all take half an hour.
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from csv import DictReader
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import train
from BPE import BPE, GPT2_PATTERN
from GetData import Batches, GetData
from GPT import GPT, pick_dtype

# ------------------------------------------------------------------------------------------------
TEXT_FILE = None       # for the speedrun: tinyshakespeare.txt; None: it is left out
RUSSIAN_FILE = None    # some megabytes of Russian, for the tokenizer; None: it is left out
NANOGPT_DIR = None     # a clone of github.com/karpathy/nanoGPT, its data/shakespeare_char prepared;
                       # None: it is left out
OLD_DIR = None         # another version of these scripts, for `beside` (git worktree add ../old
                       # COMMIT); None: it is left out
PARTS = ["tokenizer", "training", "generation", "beside", "default_run", "speedrun", "memory",
         "scale"]      # remove what you don't want
ROUNDS = 3             # measured rounds; the median counts
OUT_FILE = "assets/bench.json"

TOKENIZER_SHAPES = [(1, 1024), (100, 8192), (100, 32768)]  # megabytes at most, V; Russian: 16384
# V, T, B, E, H, layers; D = E / H
TRAINING_SHAPES = [(1024, 64, 32, 128, 4, 4), (65, 64, 12, 128, 4, 4), (4096, 256, 8, 384, 6, 6)]
# V, T, E, H, layers, tokens to generate at batch 1
GENERATION_SHAPES = {"small": (1024, 256, 128, 4, 4, 200),
                     "GPT-1 size": (40478, 512, 768, 12, 12, 32)}
# V, T, B, E, H, layers, steps: train.py's constants, and a larger model
BESIDE_SHAPES = [(train.VOCAB_SIZE, train.MAX_SEQ_LEN, train.BATCH_SIZE, train.EMB_SIZE,
                  train.NUM_HEADS, train.NUM_LAYERS, 60), (2048, 256, 8, 384, 6, 6, 4)]
BUSY = [0, 2, 4]       # Python loops that never rest

# The speedrun: train on the first 90 % of TEXT_FILE, validate on all of the rest. The aims are nats
# per byte: 1.886 is where nanoGPT's CPU recipe ends, 1.4697 what nanoGPT publishes for an A100.
# Short windows learn faster in the first seconds, longer ones win in the end.
SPEEDRUNS = {  # name: aim, steps (or seconds), rate, warmup, validations; V, T, B, E, H, layers,
    #              dropout, decay
    "nanoGPT's result": (1.886, 170, 6e-3, 40, 1, 1024, 32, 16, 96, 3, 2, 0.0, 0.1),
    "nanoGPT's time": (1.60, 1600, 3e-3, 200, 4, 1024, 64, 16, 128, 4, 4, 0.0, 0.1),
    # It reads the text a dozen times. Without dropout, which takes a sixth of the time, it ended at
    # 1.473 with decay 0.6 and at 1.481 with 0.5.
    "five minutes": (1.4697, "300", 3e-3, 200, 3, 1024, 64, 16, 160, 5, 4, 0.1, 0.4),
}
NANOGPT_OPTIONS = """config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20
    --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128
    --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"""  # of its README, for a CPU
# ------------------------------------------------------------------------------------------------

# Of all processes; train.py sets this variable before it imports torch.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
HERE = Path(__file__).resolve().parent
PEERS = ("tokenizers", "tiktoken", "rustbpe", "transformers", "ctranslate2")
NATIVE_BF16 = pick_dtype(torch.device("cpu")) == "bf16"


def main() -> None:
    show("machine", "Machine", [{"what": key, "value": value} for key, value in machine().items()])
    for part in sys.argv[1:] or PARTS:
        globals()[part]()
    print(f"\nall numbers: {OUT_FILE}")


# ------------------------------------------------------------------ measuring and showing


def machine() -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "os": platform.system(), "python": platform.python_version(),
            "torch": torch.__version__, "native_bf16": NATIVE_BF16,
            **{name: version(name) for name in PEERS if importlib.util.find_spec(name)}}


def in_turn(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds each function takes: median over rounds of A B A B, after one unmeasured round."""
    seconds = {name: [] for name in functions}
    for n in range(1 + ROUNDS):
        for name, function in functions.items():
            time.sleep(0.3)  # idle threads of another process may spin for a while
            start = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                function()
            if n:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured) for name, measured in seconds.items()}


@contextlib.contextmanager
def own_process(setup: str, folder: Path = HERE, **variables: str) -> Iterator[Callable]:
    """A Python process of its own, as the thread pools of different libraries interfere. setup is
    code that defines work(). Yields a function that calls work over there, with whole numbers:
    -> (its result, seconds, MB at most of the process, of its largest child); MB on Linux only."""
    code = f"""{setup}
import json, re, sys, time
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    start = time.perf_counter()
    result = [work(*json.loads(line)), time.perf_counter() - start, 0, 0]
    try:
        import resource
        status = open("/proc/self/status").read()
        result[2] = int(re.search(r"VmHWM:\\s*(\\d+)", status).group(1)) / 1e3
        result[3] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    except (ImportError, OSError):
        pass
    print(json.dumps(result), file=answers, flush=True)"""
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, env=ENVIRONMENT | variables, text=True,
            bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process:

        def call(*numbers: int) -> list:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(numbers), file=process.stdin)
            if not (answer := process.stdout.readline()):
                errors.seek(0)
                raise RuntimeError(f"{setup}\nfailed:\n{errors.read()[-2000:]}")
            return json.loads(answer)

        try:
            yield call
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # and it ends


def costs(setup: str, rounds: int = 1) -> list[float]:
    """Of work() in new processes: seconds, MB, MB of its largest child, medians."""
    measured = []
    for _ in range(rounds):
        with own_process(setup) as call:
            measured.append(call()[1:])
    return [statistics.median(one) for one in zip(*measured, strict=True)]


def rounded(x: object) -> object:
    """Floats to three digits: 12345.6 -> 12300, 0.012345 -> 0.0123."""
    if not isinstance(x, float):
        return x
    x = float(f"{x:.3g}")
    return int(x) if x == int(x) and abs(x) >= 100 else x


def show(name: str, title: str, rows: list[dict]) -> None:
    """Print a table and put its rows, rounded, into OUT_FILE, where other parts stay."""
    rows = [{key: rounded(value) for key, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{title}")
    for line in [columns, *cells]:
        print("  ".join(map(str.ljust, line, widths)).rstrip(), flush=True)
    out = HERE / OUT_FILE
    out.parent.mkdir(exist_ok=True)
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    known[name] = {row["what"]: row["value"] for row in rows} if name == "machine" else rows
    out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def compared(labels: dict, seconds: dict[str, float], unit: str, amount: float) -> list[dict]:
    """A row for each run: its speed, and for ours how many times as fast as each other it is."""
    rows = []
    for name, s in seconds.items():
        rows.append(labels | {"run": name, unit: amount / s, "seconds": s})
        if name.startswith("ours"):
            rows[-1] |= {f"x {other}": theirs / s for other, theirs in seconds.items()
                         if not other.startswith("ours")}
    return rows


def peer(name: str) -> object | None:
    """The module, or None with a message."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    print(f"{name}: not installed")


# ------------------------------------------------------------------ tokenizer


def tokenizer() -> None:
    """Train and encode, compared with Rust libraries, on the source of Python's standard library
    and on Russian. lines: the length of the code, where it is Python that can be read."""
    rustbpe, tokenizers, tiktoken = map(peer, ("rustbpe", "tokenizers", "tiktoken"))
    python, rows = standard_library(), []
    texts = [("Python", python[: round(size * 1e6)], V) for size, V in TOKENIZER_SHAPES]
    if RUSSIAN_FILE:
        texts.append(("Russian", Path(RUSSIAN_FILE).read_text(encoding="utf-8"), 16384))
    for name, text, V in texts:
        lines, megabytes = text.splitlines(keepends=True), len(text.encode()) / 1e6
        labels = {"text": name, "megabytes": megabytes, "V": V}
        bpe, runs = BPE(V), {"ours": lambda text=text, V=V: BPE(V).fit(text)}
        if rustbpe:
            rust = rustbpe.Tokenizer()
            runs["rustbpe"] = partial(rust.train_from_iterator, [text], V, pattern=GPT2_PATTERN)
        if tokenizers:  # with the same split as ours; it works on lines in parallel
            trained = tokenizers.Tokenizer(tokenizers.models.BPE())
            split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            trained.pre_tokenizer = split
            runs["tokenizers (lines)"] = partial(
                trained.train_from_iterator, lines, tokenizers.trainers.BpeTrainer(
                    vocab_size=V, show_progress=False, initial_alphabet=split.alphabet()))
        rows += compared({"task": "fit"} | labels, in_turn(runs), "mb_per_second", megabytes)
        if (name, V) not in (("Python", TOKENIZER_SHAPES[-1][1]), ("Russian", 16384)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            file, source = f"{folder}/tokenizer.json", Path(folder, "text.txt")
            bpe.fit(text).save(file)
            source.write_bytes(text.encode())
            # They have seen no words yet; in_turn calls each of the two runs 1 + ROUNDS times.
            cold = [BPE.load(file) for _ in range(2 * (1 + ROUNDS))]
            runs = {"ours, freshly loaded": lambda text=text, cold=cold: cold.pop().encode(text),
                    "ours encode_file, freshly loaded": lambda source=source, cold=cold:
                        cold.pop().encode_file(source, source.with_suffix(".npy"))}
            if tiktoken:
                ranks = {bpe.decode_bytes([i]): i for i in range(len(bpe))}
                theirs = tiktoken.Encoding("bench", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                           special_tokens={})
                runs["tiktoken"] = partial(theirs.encode_ordinary, text)
                pieces = [text[i : i + 1_000_000] for i in range(0, len(text), 1_000_000)]
                runs["tiktoken, all cores"] = partial(theirs.encode_ordinary_batch, pieces,
                                                      num_threads=os.cpu_count())
            if rustbpe:
                runs["rustbpe"] = partial(rust.encode, text)
            if tokenizers:
                runs["tokenizers (lines)"] = partial(
                    tokenizers.Tokenizer.from_file(file).encode_batch, lines)
            rows += compared({"task": "encode"} | labels, in_turn(runs), "mb_per_second", megabytes)
    length = len((HERE / "BPE.py").read_text(encoding="utf-8").splitlines())
    for row in rows:
        row["lines"] = length if row["run"].startswith("ours") else ""
    show("tokenizer", "Tokenizer; x: times as fast as", rows)


def standard_library() -> str:
    """The .py files of the running Python's standard library, about 31 MB, concatenated."""
    texts, root = [], Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            with contextlib.suppress(UnicodeDecodeError):
                texts.append(path.read_bytes().decode())
    return "".join(texts)


# ------------------------------------------------------------------ training: tokens a second


def training() -> None:
    """fit, compared with nanoGPT's training loop."""
    names = ["ours fp32"] + ["ours bf16"] * NATIVE_BF16 + ["nanoGPT fp32"] * bool(NANOGPT_DIR)
    rows = []
    for shape in TRAINING_SHAPES:
        V, T, B, E, _, layers = shape
        # Some seconds of work; fit makes a new optimizer each time: not too few steps.
        steps = max(8, round(4e11 / ((V * E + layers * (12 * E * E + 2 * E * T)) * 6 * T * B)))
        with contextlib.ExitStack() as stack:
            seconds = in_turn({name: partial(stack.enter_context(own_process(
                f"import train, bench\nwork = bench.trainer{name, *shape}")), steps)
                for name in names})
        rows += compared({"V, T, B, E, H, layers": str(shape)[1:-1]}, seconds, "tokens_per_second",
                         T * B * steps)
    show("training", "Training; x: times as fast as", rows)


def trainer(name: str, V: int, T: int, B: int, E: int, H: int, layers: int) -> Callable:
    """A function that trains for so many steps, on random ids."""
    library, dtype = name.split()
    ids, one = np.random.default_rng(0).integers(0, V, 200_000), torch.zeros(1, 1).long()
    if library == "ours":
        model = GPT(V, T, E, H, E // H, layers, dropout=0.0)
        batches = Batches(GetData(ids, T, stride=T), B, seed=0)
        train.keep_memory()
        return lambda steps: model.fit(batches, [(one, one)], 1, 1e-4, max_steps=steps, dtype=dtype)
    sys.path.append(NANOGPT_DIR)
    import model as nanogpt

    with contextlib.redirect_stdout(sys.stderr):
        theirs = nanogpt.GPT(nanogpt.GPTConfig(T, V, layers, H, E, dropout=0.0, bias=False))

    def work(steps: int) -> None:
        """What nanoGPT's train.py does: its batches, its AdamW, its clipping, one .item()."""
        optimizer = theirs.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
        for _ in range(steps):
            starts = torch.randint(len(ids) - T, (B,))
            x, y = (torch.stack([torch.from_numpy(ids[i + n : i + n + T]) for i in starts])
                    for n in (0, 1))
            loss = theirs(x, y)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()

    return work


# ------------------------------------------------------------------ generation: tokens a second


def generation() -> None:
    """Batch 1, batch 16 and a prompt of 500 tokens, ours and the peers that are installed."""
    names = ["ours fp32", "ours bf16"]
    if peer("transformers"):
        names += ["transformers fp32"]
        names += ["CTranslate2 fp32", "CTranslate2 int8"] * bool(peer("ctranslate2"))
    rows = []
    for size, (*shape, new) in GENERATION_SHAPES.items():
        with contextlib.ExitStack() as stack:
            writers = {name: stack.enter_context(own_process(
                f"import train, bench\nwork = bench.writer{name, *shape}")) for name in names}
            for task, batch, prompt, tokens in (("batch 1", 1, 8, new),
                                                ("batch 16", 16, 8, new // 2),
                                                ("prompt of 500", 1, 500, 1)):
                if prompt + tokens <= shape[1]:  # T
                    seconds = in_turn({name: partial(write, batch, prompt, tokens)
                                       for name, write in writers.items()})
                    rows += compared({"size": size, "task": task}, seconds, "tokens_per_second",
                                     batch * tokens)
    show("generation", "Generation: top-k 50, top-p 0.95; x: times as fast as", rows)


def writer(name: str, V: int, T: int, E: int, H: int, layers: int) -> Callable:
    """A function (batch, prompt length, new tokens) that generates them."""
    library, dtype = name.split()
    with tempfile.TemporaryDirectory() as folder:
        if library == "ours":
            GPT(V, T, E, H, E // H, layers).save(f"{folder}/model.pt")
            model = GPT.load(f"{folder}/model.pt", dtype=dtype)
            write = partial(model.generate, do_sample=True, top_k=50, top_p=0.95)
        else:
            from transformers import GPT2Config, GPT2LMHeadModel

            model = GPT2LMHeadModel(GPT2Config(
                vocab_size=V, n_positions=T, n_embd=E, n_layer=layers, n_head=H, bos_token_id=0,
                eos_token_id=0)).eval()
            write = (ctranslate2_writer(dtype, model, folder, V) if library == "CTranslate2" else
                     lambda x, n: model.generate(
                         x, attention_mask=torch.ones_like(x), do_sample=True, top_k=50, top_p=0.95,
                         max_new_tokens=n, min_new_tokens=n, pad_token_id=0))

    def work(batch: int, prompt: int, tokens: int) -> None:
        write(torch.randint(1, V, (batch, prompt)), tokens)

    return work


def ctranslate2_writer(dtype: str, model: torch.nn.Module, folder: str, V: int) -> Callable:
    """CTranslate2 reads a transformers model from a folder, and needs a tokenizer in it."""
    import ctranslate2
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    end, kind = "<|endoftext|>", "float32" if dtype == "fp32" else dtype
    words = Tokenizer(models.WordLevel({end: 0} | {f"t{i}": i for i in range(1, V)}, end))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token=end, eos_token=end,
                            unk_token=end).save_pretrained(f"{folder}/transformers")
    model.save_pretrained(f"{folder}/transformers")
    ctranslate2.converters.TransformersConverter(f"{folder}/transformers").convert(
        f"{folder}/converted", quantization=kind)
    generator = ctranslate2.Generator(f"{folder}/converted", compute_type=kind,
                                      intra_threads=torch.get_num_threads())
    return lambda x, n: generator.generate_batch(
        [[f"t{i}" for i in row] for row in x.tolist()], max_length=n, min_length=n,
        sampling_topk=50, sampling_topp=0.95, include_prompt_in_result=False) and None


# ------------------------------------------------------------------ beside other programs


def beside() -> None:
    """Training while Python loops keep the cores busy: as train.py does it, without the variable
    that it sets, on one thread, and OLD_DIR's version."""
    runs = {"ours": (HERE, {}), "without GOMP_SPINCOUNT": (HERE, {"GOMP_SPINCOUNT": "300000"}),
            "one thread": (HERE, {"OMP_NUM_THREADS": "1"})}  # 300000 is libgomp's own value
    if OLD_DIR:
        runs["before"] = (Path(OLD_DIR), {})
    rows = []
    for *sizes, steps in BESIDE_SHAPES:
        V, T, B, E, H, layers = sizes
        setup = f"""import train, torch
from GetData import Batches, GetData
from GPT import GPT
model = GPT({V}, {T}, {E}, {H}, {E // H}, {layers}, 0.0)
batches = Batches(GetData(torch.arange(200_000) % {V}, {T}, stride={T}), {B}, seed=0)
train.keep_memory()
def work(steps):
    model.fit(batches, [(torch.zeros(1, 1).long(),) * 2], 1, 1e-4, max_steps=steps)"""
        with contextlib.ExitStack() as stack:
            trainers = {name: partial(stack.enter_context(own_process(setup, folder, **variables)),
                                      steps) for name, (folder, variables) in runs.items()}
            for busy in BUSY:
                loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                         for _ in range(busy)]
                try:
                    seconds = in_turn(trainers)
                finally:
                    for loop in loops:
                        loop.kill()
                        loop.wait()
                labels = {"V, T, B, E, H, layers": str(sizes)[1:-1], "busy": busy}
                rows += compared(labels, seconds, "tokens_per_second", T * B * steps)
    show("beside", "Training beside busy programs; x: times as fast as", rows)


# ------------------------------------------------------------------ the default run


def default_run() -> None:
    """python train.py and python sample.py as they are, in an empty folder, from process start."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for script in ("train.py", "sample.py"):
            start = time.perf_counter()
            with subprocess.Popen([sys.executable, HERE / script], cwd=folder, env=ENVIRONMENT,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                process.stdout.read(1)
                row = {"run": script, "first_character": time.perf_counter() - start}
                process.stdout.read()
            rows.append(row | {"seconds": time.perf_counter() - start})
        with open(Path(folder, "out", "metrics.csv"), newline="") as file:
            metrics = list(DictReader(file))
    rows[0] |= min(metrics, key=lambda row: float(row["valid_loss"])) | {
        "seconds": rows[0]["seconds"], "tokens_per_second": metrics[-1]["tokens_per_second"]}
    show("default_run", "The default run", rows)


# ------------------------------------------------------------------ the speedrun


def speedrun() -> None:
    """How soon and how well it learns TEXT_FILE; a process for each run, timed from its start."""
    if TEXT_FILE is None:
        return print("\nSpeedrun: left out, TEXT_FILE is None")
    rows, theirs = [], None
    if NANOGPT_DIR:
        with tempfile.TemporaryDirectory() as folder:
            start = time.time()
            shown = subprocess.run(
                [sys.executable, "train.py", *NANOGPT_OPTIONS.split(), f"--out_dir={folder}"],
                cwd=NANOGPT_DIR, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True)
        theirs = time.time() - start
        rows.append({"run": "nanoGPT's CPU recipe", "seconds": theirs, "nats_per_byte":
                     float(re.findall(r"val loss ([\d.]+)", shown.stdout)[-1])})
    for name, (aim, *settings) in SPEEDRUNS.items():
        start = time.time()
        with own_process("import train, bench\n"
                         f"work = lambda: bench.learn({start}, *{settings})") as call:
            curve = call()[0]
        row = {"run": name, "seconds": curve[-1][0], "nats_per_byte": min(n for _, n in curve),
               "aim": str(aim), "aim_after": "not reached"}
        if reached := [seconds for seconds, nats in curve if nats <= aim]:
            row["aim_after"] = reached[0]
            if theirs:
                row["nanoGPT_seconds / aim_after"] = theirs / reached[0]
        rows.append(row)
    for row in rows:
        nats = row["nats_per_byte"]
        row |= {"nats_per_byte": f"{nats:.4f}", "bits_per_byte": f"{nats / math.log(2):.4f}"}
    show("speedrun", "Speedrun: from process start to a validation loss", rows)


def learn(start: float, steps: int | str, rate: float, warmup: int, validations: int, V: int,
          T: int, B: int, E: int, H: int, layers: int, dropout: float,
          decay: float) -> list[tuple[float, float]]:
    """One run, text -> tokenizer -> ids -> fit; (seconds, nats per byte) at each validation.
    steps: or, as a str, the seconds to fill, at the speed of a trial."""
    curve, data = [], Path(TEXT_FILE).read_bytes()
    parts = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    bpe = BPE(V).fit(parts[0].decode(errors="ignore"))
    ids, held_out = (np.array(bpe.encode(part.decode(errors="ignore"))) for part in parts)
    torch.manual_seed(0)
    make = partial(GPT, len(bpe), T, E, H, E // H, layers, dropout)
    batches = Batches(GetData(ids, T, stride=T), B, seed=0)
    valid = Batches(GetData(held_out, T, stride=T), 64)
    train.keep_memory()
    if isinstance(steps, str):
        one = torch.zeros(1, 1).long()
        trial = partial(make().fit, batches, [(one, one)], 1, 1e-4, max_steps=25)
        a_step = in_turn({"": trial})[""] / 25
        steps = int(0.95 * (int(steps) - (time.time() - start)) / a_step)  # the rest: validations
    make().fit(batches, valid, 1, rate, max_steps=steps, warmup_steps=warmup, weight_decay=decay,
               eval_every=math.ceil(steps / validations), on_eval=lambda metrics: curve.append(
                   (time.time() - start, metrics["valid_loss"] * len(held_out) / len(parts[1]))))
    return curve


# ------------------------------------------------------------------ memory and scale, on Linux


def memory() -> None:
    """The largest resident memory of a process that does one thing."""
    V, T, E, H, layers, _ = GENERATION_SHAPES["GPT-1 size"]
    largest = "ours fp32", *TRAINING_SHAPES[-1]
    with tempfile.TemporaryDirectory() as folder:
        model, text, python = f"{folder}/model.pt", f"{folder}/text.txt", standard_library()
        GPT(V, T, E, H, E // H, layers).save(model)
        BPE(8192).fit(python).save(f"{folder}/bpe")
        with open(text, "w", encoding="utf-8", newline="") as file:
            file.writelines([python] * 16)
        megabytes = round(Path(text).stat().st_size / 1e6)
        rows = [{"process": "(the file of the GPT-1 size model)",
                 "peak_mb": Path(model).stat().st_size / 1e6}]
        load = "import torch, GPT\ndef work(): GPT.GPT.load({!r}, dtype={!r}).generate(" \
               "torch.ones(1, 8).long(), 32, True)"
        for process, setup in (
                ("import torch and the scripts", "import train\ndef work(): pass"),
                (f"fit, shape {largest[1:]}",
                 f"import train, bench\nwork = lambda: bench.trainer{largest}(4)"),
                ("load and generate, GPT-1 size, fp32", load.format(model, "fp32")),
                ("load and generate, GPT-1 size, bf16", load.format(model, "bf16")),
                (f"BPE.encode_file, {megabytes} MB", f"from BPE import BPE\ndef work(): "
                 f"BPE.load('{folder}/bpe').encode_file({text!r}, '{folder}/ids.npy')")):
            _, own, child = costs(setup)
            rows.append({"process": process, "peak_mb": own, "largest_worker_mb": child or ""})
    show("memory", "Memory: peak of the process, MB", rows)


def scale() -> None:
    """How time and memory grow: the constants of train.py, with one thing larger at a time."""
    python, rows, V = standard_library(), [], train.VOCAB_SIZE
    shape = train.MAX_SEQ_LEN, train.BATCH_SIZE, train.NUM_LAYERS
    with tempfile.TemporaryDirectory() as folder:
        for grown, factors in (("", (1, 1, 1)), ("text x10", (1, 1, 1)),
                               ("context x4", (4, 1 / 4, 1)), ("layers x4", (1, 1, 4))):
            T, B, layers = (int(x * factor) for x, factor in zip(shape, factors, strict=True))
            size = len(python) // (1 if grown == "text x10" else 10)
            file = f"{folder}/{size}"
            model = f"import train, bench\nmodel, batches = bench.scaled('{file}.npy', {T}, {B}, " \
                    f"{layers})\none = bench.torch.ones(1, 1).long()\ndef work():\n"
            steps = {"train: 50000 tokens":
                     f"{model}  model.fit(batches, [(one, one)], 1, 1e-4, max_steps=98)",
                     "generate: 1000 tokens":  # in windows of T, so never with a full cache
                     f"{model}  for _ in range({round(1000 / T)}): model.generate(one, {T}, True)"}
            if not Path(f"{file}.txt").exists():
                Path(f"{file}.txt").write_text(python[:size], encoding="utf-8", newline="")
                steps = {"tokenizer: fit": f"import BPE\ndef work(): BPE.BPE({V}).fit("
                         f"BPE.read_text('{file}.txt')).save('{file}')",
                         "tokenizer: encode_file": f"from BPE import BPE\ndef work(): "
                         f"BPE.load('{file}').encode_file('{file}.txt', '{file}.npy')"} | steps
            for step, setup in steps.items():
                seconds, own, worker = costs(setup, ROUNDS)
                rows.append({"step": step, "grown": grown, "seconds": seconds,
                             "mb": max(own, worker)})
    rows.sort(key=lambda row: row["step"], reverse=True)
    base = {row["step"]: row for row in rows if not row["grown"]}
    for row in rows:
        row |= {f"x {key}": row[key] / base[row["step"]][key] for key in ("seconds", "mb")}
    show("scale", "Scale: one thing larger at a time", rows)


def scaled(ids: str, T: int, B: int, layers: int) -> tuple[GPT, Batches]:
    """A model as train.py makes it, and batches of the ids in a file."""
    train.keep_memory()
    model = GPT(train.VOCAB_SIZE, T, train.EMB_SIZE, train.NUM_HEADS, train.HEAD_SIZE, layers, 0.0)
    return model, Batches(GetData(np.load(ids, mmap_mode="r"), T, stride=T), B, seed=0)


if __name__ == "__main__":
    main()

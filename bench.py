"""bench.py: how fast, how small and how good it is, compared with others on the same machine.

Set the constants, then: python bench.py, or only some parts: python bench.py generation beside.
It prints a table for each part and writes all numbers, with a description of the machine, to
assets/bench.json, which the pages take their numbers from.

Every installed peer (pip install tokenizers tiktoken rustbpe transformers ctranslate2) adds a row,
measured in turn with ours: A B A B, one unmeasured round, then the median of the others. Seconds
depend on the machine and its load; look at the ratios within one table. mb: the most memory that
the process had, or a worker of it, on Linux. On two cores all parts take half an hour.
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
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
PARTS = ["tokenizer", "training", "generation", "beside", "default_run", "speedrun", "scale"]
ROUNDS = 3             # measured rounds; the median counts
OUT_FILE = "assets/bench.json"

TOKENIZER_SHAPES = [(1, 1024), (100, 8192), (100, 32768)]  # megabytes at most, V; Russian: 16384
# V, T, B, E, H, layers; D = E / H
TRAINING_SHAPES = [(1024, 64, 32, 128, 4, 4), (65, 64, 12, 128, 4, 4), (4096, 256, 8, 384, 6, 6)]
# V, T, E, H, layers, tokens to generate at batch 1
GENERATION_SHAPES = {"small": (1024, 256, 128, 4, 4, 200),
                     "GPT-1 size": (40478, 512, 768, 12, 12, 32)}
# Beside 0, 2 and 4 Python loops that never rest: train.py's constants, and a larger model
BESIDE_SHAPES = [(train.VOCAB_SIZE, train.MAX_SEQ_LEN, train.BATCH_SIZE, train.EMB_SIZE,
                  train.NUM_HEADS, train.NUM_LAYERS), (2048, 256, 8, 384, 6, 6)]
BUSY = [0, 2, 4]

# The speedrun: train on the first 90 % of TEXT_FILE, validate on all of the rest. The aims are nats
# per byte: 1.886 is where nanoGPT's CPU recipe ends, 1.4697 what nanoGPT publishes for an A100.
# Short windows learn faster in the first seconds, longer ones win in the end.
SPEEDRUNS = {  # name: aim, steps, rate, warmup, validations; V, T, B, E, H, layers, dropout, decay
    "nanoGPT's result": (1.886, 170, 6e-3, 40, 1, 1024, 32, 16, 96, 3, 2, 0.0, 0.1),
    "nanoGPT's time": (1.60, 1600, 3e-3, 200, 4, 1024, 64, 16, 128, 4, 4, 0.0, 0.1),
    # It reads the text fourteen times, so it needs dropout or more decay.
    "an A100's result": (1.4697, 6000, 3e-3, 200, 3, 1024, 64, 16, 160, 5, 4, 0.1, 0.4),
}
NANOGPT_OPTIONS = """config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20
    --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128
    --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"""  # of its README, for a CPU
# ------------------------------------------------------------------------------------------------

# Of all processes; train.py sets this variable before it imports torch.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
HERE = Path(__file__).resolve().parent
NATIVE_BF16 = pick_dtype(torch.device("cpu")) == "bf16"
PEERS = {name: version(name) for name in ("tokenizers", "tiktoken", "rustbpe", "transformers",
                                          "ctranslate2") if importlib.util.find_spec(name)}


def main() -> None:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    machine = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
               "os": platform.system(), "python": platform.python_version(),
               "torch": torch.__version__, "native_bf16": NATIVE_BF16, **PEERS}
    show("machine", "Machine", [{"what": key, "value": value} for key, value in machine.items()])
    for part in sys.argv[1:] or PARTS:
        globals()[part]()
    print(f"\nall numbers: {OUT_FILE}")


# ------------------------------------------------------------------ measuring and showing


def in_turn(functions: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """What each costs: "seconds", the median over rounds of A B A B, after one unmeasured round,
    and, for the functions of `processes`, "mb"."""
    seconds, results = {name: [] for name in functions}, {}
    for _ in range(1 + ROUNDS):
        for name, function in functions.items():
            time.sleep(0.3)  # idle threads of another process may spin for a while
            start = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                results[name] = function()
            seconds[name].append(time.perf_counter() - start)
    return {name: {"seconds": float(np.median(seconds[name][1:]))}
            | ({"mb": result["mb"]} if isinstance(result, dict) else {})
            for name, result in results.items()}


@contextlib.contextmanager
def processes(setups: dict[str, str]) -> Iterator[dict[str, Callable]]:
    """A Python process for each, as the thread pools of different libraries interfere. A setup is
    code that defines work(). Yields functions that call work over there; arguments and results
    travel as JSON: -> {"result": what work returned, "mb": the peak so far, of it or a child}."""
    calls = {}
    with contextlib.ExitStack() as stack:
        for name, setup in setups.items():
            code = f"""{setup}
import json, re, sys
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    result, mb = work(*json.loads(line)), 0
    try:
        import resource
        status = open("/proc/self/status").read()
        mb = max(int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]),
                 resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1e3
    except (ImportError, OSError):
        pass
    result = json.dumps({{"result": result, "mb": mb}}, default=lambda other: None)
    print(result, file=answers, flush=True)"""
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = stack.enter_context(subprocess.Popen(
                [sys.executable, "-c", code], cwd=HERE, env=ENVIRONMENT, text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors))

            def call(*arguments: object, process=process, errors=errors, setup=setup) -> dict:
                with contextlib.suppress(BrokenPipeError):
                    print(json.dumps(arguments), file=process.stdin)
                if not (answer := process.stdout.readline()):
                    errors.seek(0)
                    raise RuntimeError(f"{setup}\nfailed:\n{errors.read()[-2000:]}")
                return json.loads(answer)

            calls[name] = call
        yield calls


def rounded(x: object) -> object:
    """Floats to three digits: 12345.6 -> 12300, 0.012345 -> 0.0123."""
    if not isinstance(x, float):
        return x
    x = float(f"{x:.3g}")
    return int(x) if x == int(x) and abs(x) >= 100 else x


def show(name: str, title: str, rows: list[dict]) -> None:
    """Print a table and put its rows, rounded, into OUT_FILE, where the other parts stay."""
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
    out.write_text(json.dumps(known | {name: rows}, indent=1) + "\n", encoding="utf-8")


def compared(labels: dict, costs: dict[str, dict], unit: str, amount: float) -> list[dict]:
    """A row for each run: its speed, and for ours how many times as fast as each other it is."""
    rows = []
    for name, cost in costs.items():
        rows.append(labels | {"run": name, unit: amount / cost["seconds"]} | cost)
        if name.startswith("ours"):
            rows[-1] |= {f"x {other}": theirs["seconds"] / cost["seconds"]
                         for other, theirs in costs.items() if not other.startswith("ours")}
    return rows


# ------------------------------------------------------------------ tokenizer


def tokenizer() -> None:
    """Train and encode, compared with Rust libraries, on the source of Python's standard library
    and on Russian."""
    python = standard_library()
    texts = [("Python", python[: round(size * 1e6)], V) for size, V in TOKENIZER_SHAPES]
    if RUSSIAN_FILE:
        texts.append(("Russian", Path(RUSSIAN_FILE).read_text(encoding="utf-8"), 16384))
    rows = [row for text in texts for row in fit_and_encode(*text)]
    show("tokenizer", "Tokenizer; x: times as fast as", rows)


def fit_and_encode(name: str, text: str, V: int) -> Iterator[dict]:
    """The rows of one text; encoding is measured with large vocabularies only."""
    lines, megabytes = text.splitlines(keepends=True), len(text.encode()) / 1e6
    labels = {"text": name, "megabytes": megabytes, "V": V}
    runs = {"ours": lambda: BPE(V).fit(text)}
    if "rustbpe" in PEERS:
        import rustbpe
        rust = rustbpe.Tokenizer()
        runs["rustbpe"] = partial(rust.train_from_iterator, [text], V, pattern=GPT2_PATTERN)
    if "tokenizers" in PEERS:  # with the same split as ours; it works on lines in parallel
        import tokenizers
        trained = tokenizers.Tokenizer(tokenizers.models.BPE())
        split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.pre_tokenizer = split
        runs["tokenizers (lines)"] = partial(
            trained.train_from_iterator, lines, tokenizers.trainers.BpeTrainer(
                vocab_size=V, show_progress=False, initial_alphabet=split.alphabet()))
    yield from compared({"task": "fit"} | labels, in_turn(runs), "mb_per_second", megabytes)
    if V <= 8192:
        return
    with tempfile.TemporaryDirectory() as folder:
        file, source = f"{folder}/tokenizer.json", Path(folder, "text.txt")
        bpe = BPE(V).fit(text)
        bpe.save(file)
        source.write_bytes(text.encode())
        # They have seen no words yet; in_turn calls each of the two runs 1 + ROUNDS times.
        cold = [BPE.load(file) for _ in range(2 * (1 + ROUNDS))]
        runs = {"ours, freshly loaded": lambda: cold.pop().encode(text),
                "ours encode_file, freshly loaded":
                    lambda: cold.pop().encode_file(source, f"{folder}/ids.npy")}
        if "tiktoken" in PEERS:
            import tiktoken
            ranks = {bpe.decode_bytes([i]): i for i in range(len(bpe))}
            theirs = tiktoken.Encoding("bench", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                       special_tokens={})
            runs["tiktoken"] = partial(theirs.encode_ordinary, text)
            pieces = [text[i : i + 1_000_000] for i in range(0, len(text), 1_000_000)]
            runs["tiktoken, all cores"] = partial(theirs.encode_ordinary_batch, pieces,
                                                  num_threads=os.cpu_count())
        if "rustbpe" in PEERS:
            runs["rustbpe"] = partial(rust.encode, text)
        if "tokenizers" in PEERS:
            runs["tokenizers (lines)"] = partial(
                tokenizers.Tokenizer.from_file(file).encode_batch, lines)
        yield from compared({"task": "encode"} | labels, in_turn(runs), "mb_per_second", megabytes)


def standard_library() -> str:
    """The .py files of the running Python's standard library, about 31 MB, concatenated."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    return "".join(file.read_bytes().decode(errors="ignore") for file in files
                   if "site-packages" not in file.parts)


# ------------------------------------------------------------------ training: tokens a second


def training() -> None:
    """fit, compared with nanoGPT's training loop."""
    names = ["ours fp32"] + ["ours bf16"] * NATIVE_BF16 + ["nanoGPT fp32"] * bool(NANOGPT_DIR)
    runs = {name: (name, "") for name in names}
    rows = [row for shape in TRAINING_SHAPES for row in trained(shape, runs)]
    show("training", "Training; x: times as fast as", rows)


def beside() -> None:
    """Training while other programs keep the cores busy: as train.py does it, without the variable
    that it sets (300,000 is libgomp's own value), and on one thread."""
    runs = {"ours": ("ours auto", ""), "one thread": ("ours auto", "OMP_NUM_THREADS='1'"),
            "without GOMP_SPINCOUNT": ("ours auto", "GOMP_SPINCOUNT='300000'")}
    rows = [row for shape in BESIDE_SHAPES for row in trained(shape, runs, BUSY)]
    show("beside", "Training beside busy programs; x: times as fast as", rows)


def trained(shape: tuple, runs: dict[str, tuple], loads: Iterable[int] = (0,)) -> Iterator[dict]:
    """The rows of one shape, beside so many other programs. runs: for each, the name of its
    trainer and a variable of its process."""
    V, T, B, E, _, layers = shape
    # Some seconds of work; fit makes a new optimizer each time: not too few steps.
    steps = max(8, round(4e11 / ((V * E + layers * (12 * E * E + 2 * E * T)) * 6 * T * B)))
    with processes({run: f"import os\nos.environ.update({variable})\nimport train, bench\n"
                         f"work = bench.trainer{name, *shape}"
                    for run, (name, variable) in runs.items()}) as calls:
        for busy in loads:
            loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                     for _ in range(busy)]
            try:
                costs = in_turn({run: partial(call, steps) for run, call in calls.items()})
            finally:
                for loop in loops:
                    loop.kill()
                    loop.wait()
            yield from compared({"V, T, B, E, H, layers": str(shape)[1:-1], "busy": busy}, costs,
                                "tokens_per_second", T * B * steps)


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
    if "transformers" in PEERS:
        names += ["transformers fp32"]
        names += ["CTranslate2 fp32", "CTranslate2 int8"] * ("ctranslate2" in PEERS)
    rows = []
    for size, (*shape, new) in GENERATION_SHAPES.items():
        V, T, E, H, layers = shape
        with tempfile.TemporaryDirectory() as folder:
            GPT(V, T, E, H, E // H, layers).save(f"{folder}/model.pt")
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                write_peers_models(folder, *shape)
            threads = 1 if size == "small" else os.cpu_count()  # there, two mostly wait
            with processes({name: f"import train, bench\nwork = bench.writer{name, folder, threads}"
                            for name in names}) as calls:
                for task, batch, prompt, tokens in (("batch 1", 1, 8, new),
                                                    ("batch 16", 16, 8, new // 2),
                                                    ("prompt of 500", 1, 500, 1)):
                    if prompt + tokens <= T:
                        costs = in_turn({name: partial(call, (batch, prompt), tokens)
                                         for name, call in calls.items()})
                        rows += compared({"size": size, "task": task}, costs, "tokens_per_second",
                                         batch * tokens)
    show("generation", "Generation: top-k 50, top-p 0.95; x: times as fast as", rows)


def write_peers_models(folder: str, V: int, T: int, E: int, H: int, layers: int) -> None:
    """A model of this shape for transformers, and converted for CTranslate2, which reads that one
    from its folder and needs a tokenizer there."""
    if "transformers" not in PEERS:
        return
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    theirs, end = f"{folder}/transformers", "<|endoftext|>"
    GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_embd=E, n_layer=layers, n_head=H,
                               bos_token_id=0, eos_token_id=0)).save_pretrained(theirs)
    if "ctranslate2" in PEERS:
        from ctranslate2.converters import TransformersConverter

        words = Tokenizer(models.WordLevel({end: 0} | {f"t{i}": i for i in range(1, V)}, end))
        PreTrainedTokenizerFast(tokenizer_object=words, bos_token=end, eos_token=end,
                                unk_token=end).save_pretrained(theirs)
        for name, kind in (("fp32", "float32"), ("int8", "int8")):
            TransformersConverter(theirs).convert(f"{folder}/{name}", quantization=kind)


def writer(name: str, folder: str, threads: int = 1) -> Callable:
    """A function ((batch, prompt length), new tokens) that generates; threads: CTranslate2's."""
    library, dtype = name.split()
    if library == "ours":
        model = GPT.load(f"{folder}/model.pt", dtype=dtype)
        return lambda size, n: model.generate(torch.randint(1, 1000, size), n, True, top_k=50,
                                              top_p=0.95)
    if library == "transformers":
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(f"{folder}/transformers")
        return lambda size, n: model.generate(
            torch.randint(1, 1000, size), attention_mask=torch.ones(size), do_sample=True, top_k=50,
            top_p=0.95, max_new_tokens=n, min_new_tokens=n, pad_token_id=0)
    from ctranslate2 import Generator
    model = Generator(f"{folder}/{dtype}", intra_threads=threads)
    return lambda size, n: model.generate_batch(
        [[f"t{i}" for i in row] for row in torch.randint(1, 1000, size).tolist()], max_length=n,
        min_length=n, sampling_topk=50, sampling_topp=0.95, include_prompt_in_result=False)


# ------------------------------------------------------------------ whole runs, and how costs grow


def default_run() -> None:
    """python train.py and python sample.py as they are, in an empty folder, from process start."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for script in ("train.py", "sample.py"):
            start = time.perf_counter()
            subprocess.run([sys.executable, HERE / script], cwd=folder, env=ENVIRONMENT, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            rows.append({"run": script, "seconds": time.perf_counter() - start})
        with open(Path(folder, "out", "metrics.csv"), newline="") as file:
            rows[0] = min(DictReader(file), key=lambda row: float(row["valid_loss"])) | rows[0]
    show("default_run", "The default run", rows)


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
        with processes({name: "import train, bench\n"
                              f"work = lambda: bench.learn({start}, *{settings})"}) as calls:
            curve = calls[name]()["result"]
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


def learn(start: float, *settings: float) -> list[tuple[float, float]]:
    """One run, text -> tokenizer -> ids -> fit; (seconds, nats per byte) at each validation."""
    steps, rate, warmup, validations, V, T, B, E, H, layers, dropout, decay = settings
    curve, data = [], Path(TEXT_FILE).read_bytes()
    parts = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    bpe = BPE(V).fit(parts[0].decode(errors="ignore"))
    ids, held_out = (np.array(bpe.encode(part.decode(errors="ignore"))) for part in parts)
    torch.manual_seed(0)
    train.keep_memory()
    GPT(len(bpe), T, E, H, E // H, layers, dropout).fit(
        Batches(GetData(ids, T, stride=T), B, seed=0),
        Batches(GetData(held_out, T, stride=T), 64), 1, rate, max_steps=steps, warmup_steps=warmup,
        weight_decay=decay, eval_every=math.ceil(steps / validations),
        on_eval=lambda metrics: curve.append(
            (time.time() - start, metrics["valid_loss"] * len(held_out) / len(parts[1]))))
    return curve


def scale() -> None:
    """How time and memory grow: the constants of train.py, with one thing larger at a time."""
    python, rows = standard_library(), []
    for grown, share, longer, deeper in (("", 10, 1, 1), ("text x10", 1, 1, 1),
                                         ("context x4", 0, 4, 1), ("layers x4", 0, 1, 4)):
        T, B = longer * train.MAX_SEQ_LEN, train.BATCH_SIZE // longer
        V, E, H = train.VOCAB_SIZE, train.EMB_SIZE, train.NUM_HEADS
        setups, layers = {}, deeper * train.NUM_LAYERS
        with tempfile.TemporaryDirectory() as folder:
            if share:  # the tokenizer doesn't know the model
                text = python[: len(python) // share]
                Path(folder, "text").write_text(text, encoding="utf-8", newline="")
                BPE(V).fit(text).save(f"{folder}/tokenizer.json")
                begin = f"from BPE import BPE, read_text\nfolder = {folder!r}\nwork = lambda:"
                setups["tokenizer: fit"] = f"{begin} BPE({V}).fit(read_text(folder + '/text'))"
                setups["tokenizer: encode_file"] = f"{begin} BPE.load(folder + '/tokenizer.json')" \
                                                   ".encode_file(folder + '/text', folder + '/ids')"
            if share != 1:  # nor the model the text
                GPT(V, T, E, H, E // H, layers).save(f"{folder}/model.pt")
                setups["train: 50000 tokens"] = f"""import train, bench
fit = bench.trainer{'ours auto', V, T, B, E, H, layers}
work = lambda: fit({round(50_000 / T / B)})"""
                setups["generate: 1000 tokens"] = f"""import train, bench
write = bench.writer{'ours fp32', folder}
work = lambda: [write((1, 1), {T - 1}) for _ in range({round(1000 / T)})]"""  # T: no full cache
            with processes(setups) as calls:
                rows += [{"step": step, "grown": grown} | cost
                         for step, cost in in_turn(calls).items()]
    show("scale", "Scale: one thing larger at a time", rows)


if __name__ == "__main__":
    main()

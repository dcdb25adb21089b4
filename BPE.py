"""Byte-level byte-pair encoding (BPE): text <-> bytes <-> ids; the file is a tokenizer.json.

A text is split into pre-tokens (words, numbers, signs, white space) by a regular expression
(GPT-2, Radford et al. 2019). BPE (Sennrich et al. 2016) begins with the 256 bytes and makes the
most frequent pair of neighbours inside the pre-tokens a new symbol, again and again. Textbook code
does just that: count all pairs, take the best, replace it everywhere. The same thing in numpy:

1. Each distinct pre-token ("word") is kept once, with its count. All words lie in one flat array of
   symbols, a border between two words, the next and previous living place beside each symbol.
2. All occurrences of a pair come into being in one step: when the younger of its symbols is made.
   They are noted then and never updated. Pairs wait in heaps, one for each count; when one comes
   off, occurrences that have died are dropped, and if there were any, it goes back, recounted.
3. So a merge is a dozen array operations, however many words it changes (a short loop if few).
4. Encoding uses the same arrays. Many merges are made at once: a *band* is a run of merges none of
   which uses what another one of them makes; the lowest that is left is made everywhere. Each
   distinct word is encoded once, then looked up.
5. Before the split, a character outside ASCII is folded to one letter that stands for its Unicode
   category. So `re` needs no \\p{L}, no class is large, and the split is exact.
6. Long texts (over 4 million characters) are counted and encoded by worker processes, which run
   this file and nothing else; the caller does a batch while they start.

Ids 0-255 are the bytes, merge i makes id 256 + i, special tokens come last: no text is unknown.
Left out: normalizers, dropout, scripts (\\p{Han}) and \\w in patterns. Ids equal those of tiktoken,
tokenizers and rustbpe for every character that the running Python's `unicodedata` knows; younger
characters round-trip too, but may be split differently.
Needs Python 3.11 and numpy 2 (and tqdm for progress bars, if it is there); no torch, no model.

>>> bpe = BPE(258).fit("low lower lowest")
>>> bpe.merges                                       # "l" + "o", then "lo" + "w"
[(108, 111), (256, 119)]
>>> bpe.encode("slow"), bpe.decode([115, 257])
([115, 257], 'slow')
"""
import codecs
import contextlib
import functools
import gc
import heapq
import json
import os
import pickle
import re
import sys
import threading
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice, product

import numpy as np

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT4_PATTERN = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"""
                r"""| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+""")

PIECE = 1 << 15        # characters split at a time (few: most pieces are pure ASCII, and faster)
BATCH = 1 << 21        # characters that a worker gets at a time
WORKERS_FROM = 3       # batches; for fewer, starting processes (0.1 s) costs more than it brings
MAX_WORKERS = 8        # more than one process can feed
READ_BYTES = 1 << 18   # bytes that read_text reads at a time (malloc reuses small blocks better)
CACHE_WORDS = 1 << 19  # words that are remembered with their ids ...
CACHE_IDS = 1 << 24    # ... and ids in them, before the memory is cleared
FEW = 16               # places up to which a pair is merged by plain Python
NONE = -1              # in an array of symbols: a border between words, or a symbol merged away
WORKER_FLAG = "--bpe-worker"
LOCK = threading.Lock()  # one for the memories of all tokenizers: threads may share one

# Where no pre-token crosses: before a space behind a non-space, behind a single line end between
# non-spaces, between a letter and one of these signs. (`re` counts more as \s than Unicode does.)
SIGNS = ",.;:!?(){}=<>\"，。、；：！？"
CUT = re.compile(rf"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/])|(?<=[^\W\d_])(?=[{SIGNS}])")

# --- text -> words --------------------------------------------------------------------------------

CATEGORIES = ("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po "
              "Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co Cn").split()
# One item of a pattern: class name, set, escape, group, repetition, anything else.
ITEM = re.compile(r"\\[pP](?:\{(?P<name>\^?\w+)\}|(?P<short>\w))|(?P<set>\[(?:\\.|[^][\\])+\])"
                  r"|(?P<space>\\[sS])|(?P<any>\(\?i:[^()]*\))|(?P<end>\$|\\z)|\\[rntf]|\\[^\w\s]"
                  r"|\(\?[:=!>]|\((?!\?)|[)|.]|[*+?][+?]?|\{\d+(?:,\d*)?\}[+?]?"
                  r"|(?P<char>[^][\\(){}^$])")


class Splitter:
    """Splits text into words as a pattern with \\p{..} says, by the standard library's `re`.

    Folded letters: ASCII stands for itself, 128 + i for category i, a few more for characters that
    a pattern can single out. The pattern is translated to that alphabet, where \\p{L} is small.
    ValueError for a pattern that it can't express, and for text with lone surrogates.
    """

    def __init__(self, pattern: str):
        self.pattern, self.published = pattern, pattern in (GPT2_PATTERN, GPT4_PATTERN)
        own = sorted({"\x85", "\u017f", "\u212a"} | {c for c in pattern if not c.isascii()})
        self.own = {c: 128 + len(CATEGORIES) + i for i, c in enumerate(own)}
        letters = [unicodedata.category(chr(b)) for b in range(128)] + CATEGORIES
        self.letters = letters + [unicodedata.category(c) for c in own]  # folded letter -> category
        everything = range(len(self.letters))
        if len(everything) > 255:
            raise self.error("too many different characters outside ASCII")
        self.space = {b for b in everything
                      if self.letters[b][0] == "Z" or 9 <= b <= 13 or b == self.own["\x85"]}
        self.fold = np.full(sys.maxunicode + 1, 255, np.uint8)             # 255: not met so far
        self.fold[:128] = np.arange(128)
        self.fold[list(map(ord, own))] = list(self.own.values())
        try:
            if "".join(m[0] for m in ITEM.finditer(pattern)) != pattern:
                raise self.error("it has something else than classes, sets, groups and repetitions")
            text = ITEM.sub(self.translate, pattern)
            # | ?[..]+| as | [..]+|[..]+|: the same attempts in the same order, 8 % faster in `re`.
            text = re.sub(r"(?<=[^\\]\|) \?(\[(?:\\.|[^]\\])*\]\+)(?=\|)", r" \1|\1", text)
            self.first = re.compile(text, re.ASCII).match
            if self.first(""):
                raise self.error("it matches the empty text")
            # What the pattern leaves out becomes a word of its own: no text gets lost.
            self.all = re.compile(f"{text}|(?:(?!{text})[\\x00-\\xff])+", re.ASCII).findall
        except re.error as error:
            raise self.error(str(error)) from None

    def error(self, why: str) -> ValueError:
        return ValueError(f"pattern {self.pattern!r}: {why}; write it like GPT2_PATTERN")

    def for_oniguruma(self) -> str:
        """The same pattern for the engine of the library tokenizers, where $ also matches at a
        line's end and {1,3}+ means ({1,3})+."""
        text = ITEM.sub(lambda item: r"\z" if item["end"] else item[0], self.pattern)
        one = r"(\\[pP]\{\^?\w+\}|\\.|\[(?:\\.|[^\]\\])+\]|[^)])(\{\d+(?:,\d*)?\})\+"
        text = re.sub(one, r"(?>\1\2)", text)
        if re.search(r"\{[\d,]+\}\+", text):
            raise self.error("(...){m,n}+ can't be written to a file: use an atomic group, (?>...)")
        return text

    def translate(self, item: re.Match, in_set: bool = False, any_case: bool = False) -> str:
        """One item of the pattern, in folded letters."""
        everything, text = set(range(len(self.letters))), item[0]
        if name := item["name"] or item["short"]:
            found = {b for b in everything if self.letters[b].startswith(name.lstrip("^"))}
            if not found:
                raise self.error(f"{text}: give a general category of Unicode, such as L, Lu or N")
            if (text[1] == "P") != (name[0] == "^"):
                found = everything - found
        elif item["space"]:
            found = self.space if text == r"\s" else everything - self.space
        elif item["set"]:
            inside = functools.partial(self.translate, in_set=True, any_case=any_case)
            head = 2 if text[1] == "^" else 1
            calculating = re.search(r"[^\x00-\x7f]-|-[^\x00-\x7f]|&&|--|~~|\|\|", text)
            if calculating or any_case and "-" in text:
                raise self.error(f"{text}: no ranges outside ASCII or in (?i:), no calculating")
            return text[:head] + ITEM.sub(inside, text[head:-1]) + "]"
        elif item["any"]:
            inside = functools.partial(self.translate, any_case=True)
            return f"(?i:{ITEM.sub(inside, text[4:-1])})"
        elif item["end"] and not in_set:
            return r"\Z"                                    # the very end, which $ isn't in `re`
        elif any_case and text in "sSkK":                   # their other case is outside ASCII, too
            found = {ord(text), self.own["\u017f" if text in "sS" else "\u212a"]}
        elif text in self.own and not any_case:
            found = {self.own[text]}
        elif not text.isascii():
            raise self.error(f"{text} can't stand in (?i:)")
        else:
            return "(?:" if text == "(" and not in_set else text
        found = "".join(f"\\x{b:02x}" for b in sorted(found))
        return found if in_set else f"[{found}]"

    def __call__(self, text: str) -> list[str]:
        """Text -> its words. "".join(words) == text."""
        if text.isascii():
            return self.findall(text)
        try:
            code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has the lone surrogate {text[error.start]!r} at {error.start}, which is no "
                "character: replace it (text.encode('utf-8', 'replace').decode())") from None
        for c in np.unique(code[self.fold[code] == 255]).tolist():     # classified when first met
            self.fold[c] = 128 + CATEGORIES.index(unicodedata.category(chr(c)))
        words = self.findall(self.fold[code].tobytes().decode("latin-1"))
        end = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
        changed = np.searchsorted(end, np.flatnonzero(code > 127), side="right")
        for i in np.unique(changed).tolist():               # these get their own letters back
            words[i] = text[end[i - 1] if i else 0:end[i]]
        return words

    def findall(self, letters: str) -> list[str]:
        """Folded letters -> their words. A pattern that matches nothing in front of something gives
        '' and loses a character: known of the published patterns that they don't, else checked."""
        words = self.all(letters)
        if not self.published and sum(map(len, words)) != len(letters):
            raise self.error("it matches the empty text")
        return words

    @functools.cached_property
    def total(self) -> bool:
        """Whether the pattern alone matches everywhere, whatever follows."""
        return all(self.first(chr(b) + behind) for b in range(len(self.letters))
                   for behind in ("", " ", "\n", "a", "1", "!"))

    @functools.cached_property
    def cuttable(self) -> bool:
        """Whether texts may be cut at CUT: known for the published patterns, others are tried."""
        parts = (*"aB1'!/é\u0301中。 \n\r", "'s", "a b", "x\n")
        joined = ("a" + (sign + part) * n for sign in SIGNS for part in parts for n in (1, 2, 3))
        return self.published or all(
            self(text) == self(text[:cut.start()]) + self(text[cut.start():])
            for text in chain(map("".join, product(parts, repeat=3)), joined)
            for cut in CUT.finditer(text))


# --- merging: all words in one array --------------------------------------------------------------

class Words:
    """Words as linked lists in flat arrays (N,): symbol, and the next and previous living place."""

    def __init__(self, words: list[str], byte_ids: np.ndarray):
        text = "\udcff".join(["", *words, ""])           # \udcff: the byte 255, which UTF-8 lacks
        raw = np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
        self.symbol = np.append(byte_ids[:255], NONE)[raw]
        self.next, self.previous = np.arange(1, len(raw) + 1), np.arange(-1, len(raw) - 1)
        self.border = np.flatnonzero(raw == 255)             # before each word, and behind the last

    def join(self, at: np.ndarray, new: int | np.ndarray) -> np.ndarray:
        """Makes the pairs that begin at the places `at` (n,), no two of which overlap, the symbols
        new (or (n,) of them); returns the places freed (n,)."""
        gone = self.next[at]
        after = self.next[gone]
        self.symbol[at], self.symbol[gone] = new, NONE
        self.next[at], self.previous[after] = after, at
        return gone

    def results(self) -> tuple[np.ndarray, np.ndarray]:
        """All symbols left, and where those of each word begin (n words, n + 1 places)."""
        alive = self.symbol != NONE
        return self.symbol[alive], np.append(0, np.cumsum(alive))[self.border]


def learn(words: Words, counts: np.ndarray, num_merges: int) -> Iterator[tuple[int, int]]:
    """Yields the merges: most frequent pair first, ties to the smaller (left, right).

    A pair in many places is merged by numpy, one in few (a list, not an array) by plain Python,
    which is faster there: half of the merges of a large vocabulary are rare.
    """
    symbol, nexts, previous = words.symbol, words.next, words.previous
    weight = np.repeat(np.append(counts, 0), np.diff(words.border, append=len(symbol)))
    symbol_at, next_at, previous_at, weight_at = (        # the same memory; quicker, one at a time
        symbol.data, nexts.data, previous.data, weight.data)
    waiting: dict[int, list[tuple]] = defaultdict(list)     # count -> heap of (left, right, places)
    order: list[int] = []                                   # a heap of these counts, negative
    push, pop = heapq.heappush, heapq.heappop

    def wait(count: int, left: int, right: int, at: np.ndarray | list[int]) -> None:
        if count not in waiting:
            push(order, -count)
        push(waiting[count], (left, right, at))

    def wait_all(pair: np.ndarray, at: np.ndarray, split) -> None:
        """Lets new pairs wait: pair (n,) is sorted, pair[i] begins at the place at[i]."""
        begin = np.concatenate(([0], (pair[1:] != pair[:-1]).nonzero()[0] + 1))
        count = np.add.reduceat(weight[at], begin).tolist()
        kind, begin = pair[begin].tolist(), begin.tolist()
        for n, p, i, j in zip(count, kind, begin, [*begin[1:], len(at)], strict=True):
            if n > 1:
                wait(n, *split(p), at[i:j] if j - i > FEW else at[i:j].tolist())

    at = np.flatnonzero((symbol[:-1] != NONE) & (symbol[1:] != NONE))
    pair = (symbol[at] << 8 | symbol[at + 1]).astype(np.uint16)
    by_pair = np.argsort(pair, kind="stable")
    if len(at):
        wait_all(pair[by_pair], at[by_pair], lambda p: (p >> 8, p & 255))
    for new in range(256, 256 + num_merges):
        while order:
            most = waiting[-order[0]]
            if not most:
                del waiting[-pop(order)]
                continue
            left, right, at = pop(most)
            if isinstance(at, list):
                alive = [p for p in at if symbol_at[p] == left and symbol_at[next_at[p]] == right]
            else:
                alive = at[(symbol[at] == left) & (symbol[nexts[at]] == right)]
                alive = alive if len(alive) > FEW else alive.tolist()
            if len(alive) == len(at):
                break
            count = (sum([weight_at[p] for p in alive]) if isinstance(alive, list)
                     else int(weight[alive].sum()))
            if count > 1:                    # some have died: back, with the new count
                wait(count, left, right, alive)
        else:
            return
        yield left, right
        if isinstance(at, list):
            merged, born = [], defaultdict(list)
            for p in at:
                if symbol_at[p] == left:             # in aaa the second pair is gone by now
                    gone = next_at[p]
                    after = next_at[gone]
                    symbol_at[p], symbol_at[gone] = new, NONE
                    next_at[p], previous_at[after] = after, p
                    merged.append(p)
            for p in merged:
                before, x, y = previous_at[p], symbol_at[previous_at[p]], symbol_at[next_at[p]]
                if x != NONE and x != new:           # (new, new) is there as the (new, y) of before
                    born[x, new].append(before)
                if y != NONE:
                    born[new, y].append(p)
            for (left, right), at in born.items():
                if (count := sum([weight_at[p] for p in at])) > 1:
                    wait(count, left, right, at)
            continue
        if left == right:                            # in a run aaaaa: the first, third ... pair
            i = np.arange(len(at))
            first = np.append(True, nexts[at[:-1]] != at[1:])
            at = at[(i - np.maximum.accumulate(np.where(first, i, 0))) % 2 == 0]
        words.join(at, new)
        # New pairs: (x, new) begins at the place before, (new, y) at the place itself. One array of
        # integers sorts them by pair, then by place; what is NONE comes first and is left out.
        before = previous[at]
        x, y = symbol[before], symbol[nexts[at]]
        x[x == new] = NONE
        key = np.concatenate((x << 33 | before, (y << 1 | 1) << 32 | at))
        key.sort()
        key = key[key.searchsorted(0):]
        if len(key):
            wait_all(key >> 32, key & 0xFFFFFFFF,
                     lambda p, new=new: (new, p >> 1) if p & 1 else (p >> 1, new))


class Merges:
    """The merges in their order, to be looked up and to be made on many words at a time."""

    def __init__(self, merges: list[tuple[int, int]], made: list[int]):
        key = np.array([left << 32 | right for left, right in merges], np.int64)
        self.rank = np.append(np.argsort(key), len(merges))  # place in the sorted keys -> merge
        self.key = np.append(key[self.rank[:-1]], np.iinfo(np.int64).max)
        self.none = len(merges)            # what is no merge ranks behind all merges
        self.made = np.array(made, np.int64)
        use = {symbol: i for i in reversed(range(self.none)) for symbol in merges[i]}  # the first
        band, end = [0], self.none
        for i, symbol in enumerate(made):
            if use.get(symbol, i + 1) <= i:
                raise ValueError(f"merge {use[symbol]} uses the token {symbol}, "
                                 f"which only merge {i} makes")
            band.append(band[-1] + (i == end))
            end = min(self.none if i == end else end, use.get(symbol, self.none))
        last = band[-1] + 1
        self.band = np.array([*band[1:], last], np.min_scalar_type(last))

    def look_up(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Symbols (n,), (n,) -> the merge that joins them (n,), or self.none."""
        key = left << 32 | right           # negative where one of them is NONE
        i = np.searchsorted(self.key, key)
        return np.where(self.key[i] == key, self.rank[i], self.none)

    def encode(self, words: Words) -> None:
        """Makes all merges, band by band in all words at once, with the result of making them one
        by one, in order, in each word alone."""
        symbol, nexts, previous = words.symbol, words.next, words.previous
        rank = np.append(self.look_up(symbol[:-1], symbol[1:]), self.none)   # of the pair from here
        band = self.band[rank]
        while (first := band.min()) < self.band[-1]:
            at = np.flatnonzero(band == first)
            here, left, right = rank[at], rank[previous[at]], rank[nexts[at]]
            # Now: pairs whose overlapping neighbours come later; of aaaaa the first, third ...
            i = np.arange(len(at))
            run = np.maximum.accumulate(np.where(left == here, 0, i))
            now = (left > here)[run] & ((i - run) % 2 == 0) & (right >= here)
            gone = words.join(at[now], self.made[here[now]])
            rank[gone], band[gone] = self.none, self.band[-1]
            changed = np.concatenate((previous[at[now]], at[now]))
            rank[changed] = self.look_up(symbol[changed], symbol[nexts[changed]])
            band[changed] = self.band[rank[changed]]


# --- the tokenizer --------------------------------------------------------------------------------

class BPE:
    """Byte-level BPE tokenizer.

    vocab_size: how many tokens at most, special ones included (at least 256 + len(special_tokens)).
    pattern: what a word (pre-token) is, written as published, with \\p{L}, \\p{N}, \\s, (?i:...).
    special_tokens: names such as "<|endoftext|>", never learnt and never made from text unasked.
    ValueError for a vocab_size too small, a pattern it can't express, names empty or given twice.
    """

    def __init__(self, vocab_size: int, pattern: str = GPT2_PATTERN,
                 special_tokens: Iterable[str] = ()):
        names = [special_tokens] if isinstance(special_tokens, str) else list(special_tokens)
        if len(set(names)) < len(names) or not all(isinstance(n, str) and n for n in names):
            raise ValueError(f"special_tokens={names!r}: give names that differ and aren't empty")
        if vocab_size < 256 + len(names):
            raise ValueError(f"vocab_size={vocab_size}: 256 bytes and {len(names)} special tokens "
                             f"need {256 + len(names)} or more")
        self.vocab_size, self.pattern = int(vocab_size), pattern
        self._split = Splitter(pattern)
        self._set(range(256), [], [], names)

    def _set(self, byte_ids, merges: list, made: list, special, others=()) -> None:
        """byte_ids (256,); merges and the ids that they make; special {name: id}, or names that get
        the next ids; others {id: bytes}: tokens that no merge makes."""
        if not isinstance(special, dict):
            special = {name: 256 + len(merges) + i for i, name in enumerate(special)}
        self.merges: list[tuple[int, int]] = merges
        self.special_tokens: dict[str, int] = special
        self._byte_ids, self._made, self._ready = np.array(byte_ids), made, None
        self._bytes = {i: bytes([b]) for b, i in enumerate(byte_ids)} | dict(others)
        for (left, right), i in zip(merges, made, strict=True):
            self._bytes[i] = self._bytes[left] + self._bytes[right]
        self._bytes |= {i: name.encode() for name, i in special.items()}
        self._forget()

    def _forget(self) -> None:
        """A new memory of words: word -> number k, its ids are _ids[_begin[k]:_begin[k + 1]].
        Ready ids stand in it, too, as words of their own: they encode to themselves."""
        ids = np.array(list(self._bytes), np.uint16 if len(self) <= 65536 else np.uint32)
        self._remember(list(self._bytes), ids, np.arange(len(ids) + 1))

    def _remember(self, words, ids, begin) -> None:
        self._number = defaultdict(None, zip(words, range(len(words)), strict=True))
        self._ids, self._begin = ids, begin

    def _add(self, ids, begin) -> None:                      # both arrays or, out of memory, none
        self._ids, self._begin = (np.append(self._ids, ids.astype(self._ids.dtype)),
                                  np.append(self._begin, begin[1:] + len(self._ids)))

    def __len__(self) -> int:
        """The highest id + 1: the number of tokens (unless a loaded file leaves ids out)."""
        return max(self._bytes) + 1

    def fit(self, text: str | Iterable[str]) -> "BPE":
        """Learns the merges from a text, or an iterable of texts (read once, never held whole).

        Words don't cross the texts of an iterable. The next merge is the most frequent pair inside
        the words, ties go to the smaller (left id, right id). It stops early when no pair occurs
        twice. An item that is no str, or has lone surrogates, is a ValueError.
        """
        counts: Counter[str] = Counter()
        for part in self._spread("_count", self._batches(text, ids=False), "counting words"):
            counts.update(part)
        listed, weight = list(counts), np.fromiter(counts.values(), np.int64, len(counts))
        del counts
        words, special = Words(listed, np.arange(256)), list(self.special_tokens)
        wanted = self.vocab_size - 256 - len(special)
        collecting = gc.isenabled()
        gc.disable()         # no cycles die here, and it would walk the heap again and again
        try:
            merges = list(_progress(learn(words, weight, wanted), "merging", wanted))
        finally:
            if collecting:
                gc.enable()
        self._set(range(256), merges, list(range(256, 256 + len(merges))), special)
        if len(listed) <= CACHE_WORDS and len(words.symbol) <= CACHE_IDS:
            self._number.update((word, i) for i, word in enumerate(listed, len(self._number)))
            self._add(*words.results())               # these words are encoded now
        return self

    def _count(self, pieces: list[str]) -> Counter[str]:
        return Counter(chain.from_iterable(map(self._split, pieces)))

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Text -> ids. Special tokens in it are plain text unless allow_special; then the leftmost,
        of several the longest, becomes its id. Text with lone surrogates is a ValueError.

        >>> bpe = BPE(257, special_tokens=["<|end|>"])
        >>> bpe.encode("a<|end|>", allow_special=True), len(bpe.encode("a<|end|>"))
        ([97, 256], 8)
        """
        if not isinstance(text, str):
            raise ValueError(f"encode takes one str, not {type(text).__name__}")
        parts: list[str | int] = [text]
        if allow_special and self.special_tokens:
            names = sorted(self.special_tokens, key=len, reverse=True)
            parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
            parts[1::2] = map(self.special_tokens.get, parts[1::2])
        if len(text) <= PIECE:
            return self._encode(parts).tolist()
        ids: list[int] = []
        for part in self._spread("_encode", self._batches(parts), "encoding"):
            ids += part.tolist()
        return ids

    def _encode(self, pieces: list[str | int]) -> np.ndarray:
        """Texts and ready ids -> ids (n,): uint16 if every id fits, else uint32."""
        with LOCK:
            if len(self._number) > CACHE_WORDS + len(self._bytes) or len(self._ids) > CACHE_IDS:
                self._forget()
            words: list[str | int] = []
            for piece in pieces:
                words += self._split(piece) if isinstance(piece, str) else [piece]
            self._number.default_factory = count(len(self._number)).__next__    # for new words
            number = np.fromiter(map(self._number.__getitem__, words), np.int64, len(words))
            if new := len(self._number) + 1 - len(self._begin):
                self._ready = self._ready or Merges(self.merges, self._made)
                listed = list(islice(reversed(self._number), new))[::-1]
                fresh = Words(listed, self._byte_ids)
                self._ready.encode(fresh)
                self._add(*fresh.results())
            begin = self._begin[number]
            many = self._begin[number + 1] - begin
            shift = np.repeat(begin - np.cumsum(many) + many, many)
            return self._ids[shift + np.arange(len(shift))]

    def encode_file(self, source: str | os.PathLike | Iterable[str | int],
                    out_path: str | os.PathLike) -> int:
        """Writes the ids of a UTF-8 text file, or of an iterable of texts and ready ids, to a .npy
        file (1-D; uint16 if len(self) <= 65536, else uint32) and returns how many there are.

        An int in the iterable is an id, written as it is (a special token between documents).
        Memory is bounded; the file takes its place only when it is complete. Not UTF-8, lone
        surrogates, an unknown id: ValueError.
        """
        if isinstance(source, (str, os.PathLike)):
            source = read_text(source) if self._split.cuttable else ["".join(read_text(source))]
        dtype, total = self._ids.dtype, 0
        with _replace(out_path) as file:
            file.write(bytes(128))         # the header, as soon as the length is known
            for ids in self._spread("_encode", self._batches(source), "encoding"):
                file.write(ids.tobytes())
                total += len(ids)
            file.seek(0)
            header = {"descr": dtype.str, "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(file, header)      # 128 bytes
        return total

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> bytes, for streams: a character may be spread over several tokens. An unknown id
        is a ValueError."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        try:
            return b"".join(map(self._bytes.__getitem__, ids))
        except (KeyError, TypeError):
            wrong = next(i for i in ids if isinstance(i, list) or i not in self._bytes)
            raise ValueError(f"{wrong!r} is no id of this tokenizer (0 to {len(self) - 1}): "
                             "does it belong to the model?") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; bytes that are no UTF-8 become U+FFFD. An unknown id is a ValueError."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def show(self, text: str | list[int]) -> str:
        """A text (or ids) with | between the tokens, · for a space, escapes for what can't be seen.

        >>> print(BPE(258).fit("low lower lowest").show("low lower"))
        low|·|low|e|r
        """
        ids = self.encode(text) if isinstance(text, str) else text
        tokens = (self.decode_bytes([i]).decode("utf-8", "backslashreplace") for i in ids)
        return "|".join("".join("·" if c == " " else c if c.isprintable() else ascii(c)[1:-1]
                                for c in token) for token in tokens)

    # --- work for several processes ---

    def _batches(self, items: str | Iterable[str | int], ids: bool = True) -> Iterator[list]:
        """Texts, cut where no word crosses, and ready ids, in lists of about BATCH characters."""
        batch, size = [], 0
        for item in [items] if isinstance(items, str) else items:
            if not isinstance(item, str) and not (ids and item in self._bytes):
                no_id = f" and no id (0 to {len(self) - 1})" if ids else ""
                raise ValueError(f"{item!r} is no text{no_id}")
            begin, length = 0, len(item) if isinstance(item, str) else 1
            while begin < length:
                cut = (length > begin + PIECE and self._split.cuttable
                       and CUT.search(item, begin + PIECE))
                end = cut.start() if cut else length
                batch.append(item[begin:end] if isinstance(item, str) else int(item))
                size, begin = size + end - begin, end
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _spread(self, job: str, batches: Iterator[list], title: str) -> Iterator:
        """Yields getattr(self, job)(batch) for each batch, in order; if there are many, from worker
        processes: this file run anew, so that the caller's main module is never imported again and
        no thread is ever forked. This process does the first batch while they start, and every
        batch if none starts."""
        affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        cores = len(affinity(0))
        first = list(islice(batches, WORKERS_FROM))
        workers: list = []
        busy: deque = deque()                        # (worker, the batch that it works on)

        def send(worker, batch: list) -> None:
            busy.append((worker, batch))
            with contextlib.suppress(OSError):
                pickle.dump((job, batch), worker.stdin, pickle.HIGHEST_PROTOCOL)
                worker.stdin.flush()

        def receive() -> tuple:
            worker, batch = busy.popleft()
            try:
                answer = pickle.load(worker.stdout)
            except Exception:
                answer = getattr(self, job)(batch)       # the worker died, or never lived
            if isinstance(answer, Exception):
                raise answer
            return worker, answer

        try:
            frozen = getattr(sys, "frozen", False)       # such a program can't run this file
            if len(first) == WORKERS_FROM and cores > 1 and not frozen:
                with contextlib.suppress(OSError, NameError, TypeError):
                    for _ in range(min(cores, MAX_WORKERS)):
                        workers.append(_start_worker())
                yield getattr(self, job)(first.pop(0))   # while they start
                with LOCK:
                    cache = (list(self._number), self._ids, self._begin)
                state = pickle.dumps((self.pattern, self._byte_ids, self.merges, self._made,
                                      self._bytes, cache if job == "_encode" else None))
                for worker in workers:
                    with contextlib.suppress(OSError):       # receive will find out
                        worker.stdin.write(state)
            for batch in _progress(chain(first, batches), title):
                if not workers:
                    yield getattr(self, job)(batch)
                elif len(busy) < len(workers):
                    send(workers[len(busy)], batch)
                else:
                    worker, answer = receive()
                    send(worker, batch)
                    yield answer
            while busy:
                yield receive()[1]
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()

    # --- files ---

    def save(self, path: str | os.PathLike) -> None:
        """Writes a Hugging Face tokenizer.json; the same tokenizer gives the same bytes.

        tokenizers.Tokenizer.from_file reads it and gives the same ids, but always takes special
        tokens in a text for what they are (our allow_special=True). ValueError for what the format
        can't express.
        """
        letter = _byte_letters()
        name = {i: "".join(map(letter.__getitem__, token)) for i, token in self._bytes.items()}
        name |= {i: text for text, i in self.special_tokens.items()}
        if len(set(name.values())) < len(name):
            twice = Counter(name.values()).most_common(1)[0][0]
            raise ValueError(f"two tokens are both written {twice!r}, which the file format can't "
                             "express: choose other special tokens")
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": self.pattern == GPT2_PATTERN}
        if self.pattern != GPT2_PATTERN:
            regex = {"type": "Split", "pattern": {"Regex": self._split.for_oniguruma()},
                     "behavior": "Isolated", "invert": False}
            split = {"type": "Sequence", "pretokenizers": [regex, split]}
        off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        data = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": text, **off, "special": True}
                             for text, i in self.special_tokens.items()],
            "normalizer": None, "pre_tokenizer": split, "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                        "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {name[i]: i for i in sorted(name)},
                      "merges": [[name[left], name[right]] for left, right in self.merges]}}
        with _replace(path) as file:
            file.write(json.dumps(data, ensure_ascii=False, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BPE":
        """Reads a byte-level BPE tokenizer.json, ours or another's; ids are as in the file. What
        is broken or can't be done exactly is a ValueError that names it."""
        def wrong(why: str) -> ValueError:
            return ValueError(f"{os.fspath(path)}: {why}")

        def once(pairs: list) -> dict:
            if len(found := dict(pairs)) < len(pairs):
                twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
                raise wrong(f"{twice!r} stands there twice")
            return found

        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file, object_pairs_hook=once)
            model = data["model"]
            vocab, merges = model["vocab"], model["merges"]
            special = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
            if model.get("type", "BPE") != "BPE" or (type(vocab), type(merges)) != (dict, list):
                raise wrong(f"its model is {model.get('type')!r}, only byte-level BPE can be read")
            pattern = _read_settings(data, wrong)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise wrong(f"no complete tokenizer.json ({error}): save it again") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise wrong(f"no tokenizer.json of a BPE model ({error!r})") from None

        token_of: dict[int, str] = {}
        for token, i in chain(vocab.items(), special.items()):
            if type(i) is not int or not 0 <= i < 1 << 31:
                raise wrong(f"id {i!r} of {token!r}: ids are whole numbers from 0 to 2**31 - 1")
            if token_of.setdefault(i, token) != token:
                raise wrong(f"id {i} belongs to both {token_of[i]!r} and {token!r}")
            if vocab.get(token, i) != i:
                raise wrong(f"{token!r} has id {vocab[token]} in the vocabulary, added it has {i}")
        byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
        for letter, byte in byte_of.items():
            if letter not in vocab:
                raise wrong(f"no token for byte {byte} ({letter!r}): not byte-level, or incomplete")
        pairs, made = [], []
        for number, merge in enumerate(merges):
            parts = merge.split(" ") if isinstance(merge, str) else merge
            if (not isinstance(parts, list) or len(parts) != 2
                    or not all(isinstance(p, str) and p in vocab for p in parts)):
                raise wrong(f"merge {number} is {merge!r}: it must be two tokens of the vocabulary")
            if (token := "".join(parts)) not in vocab:
                raise wrong(f"merge {number} makes {token!r}, which isn't in the vocabulary")
            pairs.append((vocab[parts[0]], vocab[parts[1]]))
            made.append(vocab[token])
        if len(set(pairs)) < len(pairs):
            raise wrong(f"the merge {Counter(pairs).most_common(1)[0][0]} stands there twice")
        bpe = cls(256 + len(special), pattern, special)
        others = {i: bytes(map(byte_of.get, token)) if byte_of.keys() >= set(token)
                  else token.encode() for token, i in vocab.items()}
        bpe._set([vocab[letter] for letter in byte_of], pairs, made, special, others)
        bpe.vocab_size = len(bpe)
        try:
            bpe._ready = Merges(pairs, made)
        except ValueError as error:
            raise wrong(str(error)) from None
        if model.get("ignore_merges"):     # a word that is a token is taken whole: the same ids?
            whole = {i: token.decode("utf-8", "surrogateescape") for i, token in bpe._bytes.items()
                     if i not in special.values() and b"\xff" not in token}
            words = Words(list(whole.values()), bpe._byte_ids)
            bpe._ready.encode(words)
            ids, begin = words.results()
            if (np.diff(begin) != 1).any() or ids.tolist() != list(whole):
                raise wrong("its model's ignore_merges changes ids, which isn't supported")
        return bpe


def _read_settings(data: dict, wrong) -> str:
    """Refuses by name what BPE.load can't do exactly; returns the split pattern."""
    off = {"normalizer", "truncation", "padding", "single_word", "lstrip", "rstrip", "dropout",
           "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"}
    for settings in (data, data["model"], *(data.get("added_tokens") or [])):
        for name in settings:
            if name in off and settings[name]:
                of = f" of {settings['content']!r}" if "content" in settings else ""
                raise wrong(f"its {name}{of} ({repr(settings[name])[:60]}) isn't supported: "
                            "set it to null or false if you can do without it")
    for name in ("post_processor", "decoder"):
        if (kind := (data.get(name) or {"type": "ByteLevel"})["type"]) != "ByteLevel":
            raise wrong(f"its {name} {kind} isn't supported, only ByteLevel or null")
    before = data.get("pre_tokenizer") or {"type": None}
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    names = [step["type"] for step in steps]
    if names not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise wrong(f"its pre_tokenizer {names} isn't supported, only [Split and] ByteLevel")
    if steps[-1].get("add_prefix_space", True):
        raise wrong("its add_prefix_space isn't supported: set it to false and begin with a space")
    if steps[-1].get("use_regex", True) != (len(steps) == 1):
        raise wrong("its ByteLevel must have use_regex = true alone, = false behind a Split")
    if len(steps) == 1:
        return GPT2_PATTERN
    pattern = steps[0]["pattern"].get("Regex")
    if pattern is None:
        raise wrong("its Split is by a string; only a Regex is supported")
    if part := re.search(r"\{[\d,]+\}\+|\$|\\Z", pattern):
        raise wrong(f"its Split has {part[0]!r}, which libraries read in different ways")
    kind = steps[0].get("behavior"), bool(steps[0].get("invert"))
    if kind != ("Isolated", False) and not (kind == ("Removed", True) and Splitter(pattern).total):
        raise wrong(f"its Split with behavior={kind[0]}, invert={kind[1]} isn't supported")
    return pattern


def _byte_letters() -> list[str]:
    """The 256 letters that stand for the bytes in tokenizer.json (Radford et al. 2019): bytes that
    can be seen in Latin-1 for themselves, for the others those from U+0100 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(b if b in seen else next(hidden)) for b in range(256)]


@contextlib.contextmanager
def _replace(path: str | os.PathLike):
    """A binary file to write that takes the place of `path` only when it is complete."""
    temporary = f"{os.fspath(path)}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise


def read_text(path: str | os.PathLike, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Yields the text of the bytes [start, stop) of a UTF-8 file in pieces of 256 kB, exactly as
    it stands there (byte order mark, \\r\\n), cut where no pre-token can cross. An offset inside a
    character means the next one. Text that offers no place to cut (a single word) stays whole.
    ValueError for offsets outside the file, and with the offset for what is not UTF-8."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise ValueError(f"bytes {start} to {stop} of {os.fspath(path)}: it has {size}")

        def to_character(offset: int) -> int:
            file.seek(offset)
            raw = file.read(4)
            return offset + next((i for i, b in enumerate(raw) if b & 0xC0 != 0x80), len(raw))

        start, stop = to_character(start), to_character(stop)
        file.seek(start)
        decoder = codecs.getincrementaldecoder("utf-8")()
        held, tail = [], ""                     # text since the last cut; its last two characters
        while True:
            raw = file.read(min(READ_BYTES, stop - start))
            undecoded = len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                at = start - undecoded + error.start
                raise ValueError(
                    f"{os.fspath(path)} is not UTF-8 at byte {at} ({error.reason}): find out its "
                    "encoding and convert it (iconv -f ENCODING -t UTF-8)") from None
            start += len(raw)
            if not raw:
                break
            joined, last = tail + text, None
            for begin in (len(joined) - 10_000, 0):        # the last cut, most often near the end
                last = last or deque(CUT.finditer(joined, max(begin, len(tail))), maxlen=1)
            if last:
                cut = last[0].start() - len(tail)
                yield "".join(held) + text[:cut]
                held, text = [], text[cut:]
            held.append(text)
            tail = joined[-2:]
        if text := "".join(held):
            yield text


def _progress(items: Iterable, title: str, total: int | None = None) -> Iterable:
    """The items, with a bar when it takes longer than a second and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, title, total, delay=1, leave=False)


def _start_worker():
    """This file as a process of its own. -P: no file beside it stands in for a standard module."""
    import subprocess
    return subprocess.Popen(
        [sys.executable, "-P", os.path.abspath(__file__), WORKER_FLAG], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # it never multiplies: 50 ms less to start
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))


def _work() -> None:
    """The main loop of a worker: batches in, answers out, until the caller closes the pipe."""
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # Ctrl-C is the caller's business
    source, target = sys.stdin.buffer, sys.stdout.buffer
    pattern, byte_ids, merges, made, others, cache = pickle.load(source)
    bpe = BPE(256, pattern)
    bpe._set(byte_ids, merges, made, {}, others)
    if cache:
        bpe._remember(*cache)
    with contextlib.suppress(EOFError):
        while True:
            job, batch = pickle.load(source)
            try:
                answer = getattr(bpe, job)(batch)
            except Exception as error:                       # raised again at the caller's end
                answer = error
            pickle.dump(answer, target, pickle.HIGHEST_PROTOCOL)
            target.flush()


def draw_tokens(tokens: list[str], path: str) -> None:
    """Draw the tokens of a text as a row of coloured boxes."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("No picture: it needs matplotlib (pip install matplotlib)")
        return
    ends = np.cumsum([len(token) for token in tokens])
    figure, axes = plt.subplots(figsize=(ends[-1] / 8, 0.5), layout="constrained")
    for n, (token, end) in enumerate(zip(tokens, ends.tolist(), strict=True)):
        axes.barh(0, len(token), left=end - len(token), color=f"C{n % 10}", alpha=0.4,
                  edgecolor="black")
        axes.text(end - len(token) / 2, 0, token, ha="center", va="center", family="monospace")
    axes.set_xlim(0, ends[-1])
    axes.axis("off")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"drawn: {path}")


def demo() -> None:
    """Print how a sentence is merged step by step; draw one as a trained tokenizer cuts it."""
    text = "She sells sea shells by the sea shore; the shells she sells are sea shells, I'm sure."
    print(f"The most frequent pair of neighbours becomes a token, again and again:\n\n{text}\n")
    for number in range(1, 13):
        bpe = BPE(256 + number).fit(text)
        left, right = bpe.merges[-1]
        merge = f"{255 + number} = {bpe.show([left])} + {bpe.show([right])}"
        print(merge.ljust(20), bpe.show(text))
    if os.path.exists("out/tokenizer.json"):
        trained = BPE.load("out/tokenizer.json")
        sentence = "If an exception is raised in the else clause, it isn't handled. Éclair 123"
        print(f"\nAs out/tokenizer.json cuts a sentence:\n{trained.show(sentence)}")
        draw_tokens(trained.show(sentence).split("|"), "out/tokens.png")


if __name__ == "__main__":
    _work() if sys.argv[1:] == [WORKER_FLAG] else demo()

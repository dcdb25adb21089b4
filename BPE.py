"""Byte-level byte-pair encoding (BPE): text <-> bytes <-> ids; the file is a tokenizer.json.

A regular expression splits a text into words (GPT-2, Radford et al. 2019). BPE (Sennrich et al.
2016) starts from the 256 bytes and makes the most frequent pair of neighbours inside the words a
new token, again and again. To encode is to make the same merges in the same order.

Stop reading after any part: 1. the idea (textbook code: complete, exact and slow); 2. the engine
(the same merges in all words at once, on arrays); 3. the split (text -> words); 4. the tokenizer
(fit, encode, decode, save, load); 5. large texts (files and worker processes).

Ids 0-255 are the bytes, merge i makes id 256 + i, special tokens come last: no text is unknown. (A
loaded file keeps its own ids.)
Left out: normalizers, dropout, scripts (\\p{Han}) and \\w in patterns. Ids equal those of tiktoken,
tokenizers and rustbpe for every character that the running Python's `unicodedata` knows; newer
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
import heapq
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, chain, cycle, islice, pairwise, starmap

import numpy as np

Pair = tuple[int, int]                      # the ids of two neighbours: (left, right)

# --- 1. the idea ----------------------------------------------------------------------------------

def merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    """Replaces each occurrence of the pair by the id new, from left to right.

    >>> merge([97, 97, 97, 98], (97, 97), 256)       # aaab -> (aa)ab
    [256, 97, 98]
    """
    merged: list[int] = []
    for right in ids:
        if merged and (merged[-1], right) == pair:
            merged[-1] = new
        else:
            merged.append(right)
    return merged


def textbook_fit(words: list[str], num_merges: int) -> list[Pair]:
    """Learns merges: the most frequent pair inside the words, ties to the smaller ids.

    >>> textbook_fit(["low", "lower", "lowest"], 3)          # lo, low, lowe
    [(108, 111), (256, 119), (257, 101)]
    """
    ids = [list(word.encode()) for word in words]
    merges: list[Pair] = []
    for new in range(256, 256 + num_merges):
        counts = Counter(pair for word in ids for pair in pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break                                    # nothing occurs twice
        merges.append(best)
        ids = [merge(word, best, new) for word in ids]
    return merges


def textbook_encode(word: str, merges: list[Pair]) -> list[int]:
    """Makes the merges in the order in which they were learned.

    >>> textbook_encode("slower", [(108, 111), (256, 119), (257, 101)])      # s, lowe, r
    [115, 258, 114]
    """
    ids = list(word.encode())
    for new, pair in enumerate(merges, 256):
        ids = merge(ids, pair, new)
    return ids


# --- 2. the engine: all words at once -------------------------------------------------------------

BORDER, GONE = -1, -2                       # no ids: between two words; merged into its neighbour


def first_of_equals(items: np.ndarray) -> np.ndarray:
    """Where, in a sorted array, each new value begins."""
    return np.concatenate(([0], (items[1:] != items[:-1]).nonzero()[0] + 1))


class Words:
    """All words in one array of ids. A place in it keeps its number: merging writes the new id at
    the left place of a pair and takes the right place out of the chain of neighbours, a ring.

    >>> words = Words(["low", "lower"], range(256))      # borders at the places 0, 4, 10
    >>> words.join(np.array([1, 5]), 256)                # lo -> 256; here other pairs begin now:
    array([0, 1, 4, 5])
    >>> words.id.tolist(), int(words.next[1])
    ([-1, 256, -2, 119, -1, 256, -2, 119, 101, 114, -1], 3)
    """

    def __init__(self, words: Iterable[str], byte_ids: Iterable[int]):
        raw = b"\xff".join([b"", *map(str.encode, words), b""])      # a byte that UTF-8 never has
        self.id = np.array([*byte_ids][:255] + [BORDER])[np.frombuffer(raw, np.uint8)]       # (N,)
        places = np.arange(len(raw))
        self.next, self.previous = np.roll(places, -1), np.roll(places, 1)

    def pairs(self, places: np.ndarray) -> np.ndarray:
        """The pairs that begin at these places, each as one number, left << 32 | right; negative
        if one of the two is no id."""
        return self.id.take(places) << 32 | self.id.take(self.next.take(places))

    def join(self, places: np.ndarray, new: int | np.ndarray) -> np.ndarray:
        """Merges the pairs that begin at these places, no two of which overlap. Returns, sorted,
        where another pair begins now: these places and those before them."""
        gone = self.next[places]
        after = self.next[gone]
        self.id[places], self.id[gone] = new, GONE
        self.next[places], self.previous[after] = after, places
        changed = np.concatenate((self.previous.take(places), places))
        changed.sort()
        return changed[first_of_equals(changed)]

    def results(self, dtype: np.dtype) -> list[bytes]:
        """Each word's ids, as the bytes of an array."""
        ids = self.id[self.id != GONE]
        borders = (np.flatnonzero(ids == BORDER) * dtype.itemsize).tolist()
        raw = ids.astype(dtype).tobytes()
        return [raw[i + dtype.itemsize:j] for i, j in pairwise(borders)]


def run_starts(continues: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each item goes on with the run of the item before it -> the number of the item that
    starts its run, and whether it is the run's first, third ... (of aaaaa, the pairs to merge)."""
    i = np.arange(len(continues))
    start = np.maximum.accumulate(np.where(continues, 0, i))
    return start, (i - start) % 2 == 0


def learn(words: Words, counts: Iterable[int], num_merges: int) -> Iterator[Pair]:
    """textbook_fit for all words: makes and yields the merges, most frequent pair first, ties to
    the smaller ids. counts: how often each word occurs.

    A pair's places are noted once, when the later of its two ids is made; from then on other merges
    can only take places from it. So a pair that leaves the heap with all its places is the most
    frequent one; any other is counted again and put back."""
    # How often the word at each place occurs; the borders up to a place count the words.
    weight = np.array([*counts, 0])[np.cumsum(words.id == BORDER) - 1]       # (N,)
    heap: list[tuple[int, int, np.ndarray]] = []         # (-count, pair, places)

    def note(places: np.ndarray) -> None:
        """The pairs that begin at these places go on the heap, grouped by a sort."""
        pairs = words.pairs(places)
        order = pairs.argsort(kind="stable")
        pairs, places = pairs.take(order), places.take(order)
        starts = first_of_equals(pairs)
        pairs, sums = pairs.take(starts), np.add.reduceat(weight.take(places), starts)
        groups = pairwise([*starts.tolist(), None])      # where each begins and ends
        for pair, count, (i, j) in zip(pairs.tolist(), sums.tolist(), groups, strict=True):
            if pair >= 0 and count > 1:
                heapq.heappush(heap, (-count, pair, places[i:j]))

    note(np.arange(len(words.id)))
    new = 256
    while heap and new < 256 + num_merges:
        _, pair, noted = heapq.heappop(heap)
        places = noted[words.pairs(noted) == pair]       # where it still is
        if len(places) < len(noted):
            if (count := int(weight.take(places).sum())) > 1:
                heapq.heappush(heap, (-count, pair, places))
            continue
        left, right = pair >> 32, pair & 0xFFFFFFFF
        yield left, right
        if left == right:                                # in aaa two of them overlap
            before = words.pairs(words.previous[places])
            places = places[run_starts(before == pair)[1]]
        note(words.join(places, new))
        new += 1


class Merges:
    """The learned merges, to be made in their order in many words at once.

    One by one would be slow. But merges that use nothing another one of them makes can be made
    together (t + h and i + n, but not th + e): those of the ranks from a up to limit[a]. When a is
    the lowest rank in any word, all their pairs are there already."""

    def __init__(self, merges: list[Pair], made: Iterable[int]):
        self.none = len(merges)                          # the rank of what is no merge
        pair = np.array([left << 32 | right for left, right in merges] + [np.iinfo(np.int64).max])
        self.rank = pair.argsort().astype(np.int32)      # in the order of the pairs; none at last
        self.pair, self.made = pair[self.rank], np.array(made, np.int64)
        first_use = {i: rank for rank in reversed(range(self.none)) for i in merges[rank]}
        used = [first_use.get(i, self.none) for i in made]       # who first uses what each makes
        for rank, (use, i) in enumerate(zip(used, made, strict=True)):
            if use <= rank:
                raise ValueError(f"merge {use} uses the token {i}, which only merge {rank} makes")
        self.limit = np.minimum.accumulate(np.array(used[::-1], np.int32))[::-1]

    def look_up(self, pair: np.ndarray) -> np.ndarray:
        """Pairs -> the ranks of their merges, or none."""
        i = np.searchsorted(self.pair, pair)
        return np.where(self.pair[i] == pair, self.rank[i], self.none)

    def apply(self, words: Words) -> None:
        """textbook_encode for all words: makes all merges, as if one by one."""
        # (N,), the rank of the pair that begins at each place
        rank = self.look_up(words.pairs(np.arange(len(words.id))))
        while (lowest := rank.min()) < self.none:
            places = np.flatnonzero(rank < self.limit[lowest])
            here, after = rank[places], rank[words.next[places]]
            before = rank[words.previous[places]]
            # Of two pairs that overlap, the one of the lower rank goes first. Of a run of the same
            # rank (aaaaa) every second one goes, or none while the pair before it is to go first.
            start, odd = run_starts(before == here)
            places = places[(before > here)[start] & odd & (here <= after)]
            gone = words.next[places]
            changed = words.join(places, self.made[rank[places]])
            rank[gone] = self.none
            rank[changed] = self.look_up(words.pairs(changed))


# --- 3. the split: text -> words ------------------------------------------------------------------

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT4_PATTERN = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"""
                r"""| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+""")
LLAMA3_PATTERN = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
                  r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""")
O200K_PATTERN = "".join(fr"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]{a}"
                        fr"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]{b}(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
                        for a, b in ("*+", "+*")) + (
    r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""")
# Known of these: they match everywhere, and none of their words crosses a CUT.
KNOWN = {GPT2_PATTERN, GPT4_PATTERN, LLAMA3_PATTERN, O200K_PATTERN,
         QWEN2_PATTERN := LLAMA3_PATTERN.replace("{1,3}", "")}

# Before a space behind a non-space, behind a single line end between non-spaces, between a letter
# and one of these signs. (`re` counts more as \s than Unicode does.)
CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/])"
                 r"|(?<=[^\W\d_])(?=[,.;:!?(){}=<>\"，。、；：！？])")

# `re` knows no \p{L}. So a text's characters are folded to 161 letters, and the pattern is
# translated to them: ASCII stays, another character becomes the letter of its category. \x85, a
# line end, and long s and the Kelvin sign, an s and a k to (?i:...), have letters of their own.
CATEGORIES = ("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po "
              "Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co Cn").split()
CATEGORY_OF = [unicodedata.category(chr(b)) for b in range(128)] + CATEGORIES + ["Cc", "Ll", "Lu"]
NEXT_LINE, LONG_S, KELVIN = 158, 159, 160
EVERY = set(range(161))
SPACE = {b for b in EVERY if CATEGORY_OF[b][0] == "Z" or 9 <= b <= 13} | {NEXT_LINE}
FOLD = np.full(sys.maxunicode + 1, 255, np.uint8)        # 255: its category hasn't been asked yet
FOLD[:128] = range(128)
FOLD[[0x85, 0x17F, 0x212A]] = NEXT_LINE, LONG_S, KELVIN

# One item of a pattern: class name, set, white space, (?i:...), end of the text, anything else.
ITEM = re.compile(r"(?P<class>\\[pP](?:\{\^?\w+\}|\w))|(?P<set>\[(?:\\.|[^][\\])+\])"
                  r"|(?P<space>\\[sS])|(?P<any>\(\?i:[^()]*\))|(?P<end>\$|\\z)|\\[rntf]|\\[^\w\s]"
                  r"|\(\?[:=!>]|\((?!\?)|[)|.]|[*+?][+?]?|\{\d+(?:,\d*)?\}[+?]?"
                  r"|[^][\\(){}^$]")


def translate(item: re.Match, in_set: bool = False, any_case: bool = False) -> str:
    """One item of a pattern, in folded letters; ValueError for what can't be translated."""
    text = item[0]
    if item["class"]:                                    # \p{L}, \P{L}, \p{^L}, \pL
        found = {b for b in EVERY if CATEGORY_OF[b].startswith(text[2:].strip("{^}"))}
        if not found:
            raise ValueError(f"{text}: give a general category of Unicode, such as L, Lu or N")
        found = EVERY - found if (text[1] == "P") != ("^" in text) else found
    elif item["space"]:
        found = SPACE if text == r"\s" else EVERY - SPACE
    elif item["set"]:
        if re.search(r"&&|--|~~|\|\|", text) or any_case and "-" in text:
            raise ValueError(f"{text}: no ranges in (?i:), no set operations")
        head = 2 if text[1] == "^" else 1
        return text[:head] + ITEM.sub(lambda i: translate(i, True, any_case), text[head:-1]) + "]"
    elif item["any"]:
        return text[:4] + ITEM.sub(lambda i: translate(i, any_case=True), text[4:-1]) + ")"
    elif item["end"] and not in_set:
        return r"\Z"                                     # the very end, which $ isn't in `re`
    elif any_case and text in "sSkK":
        found = {ord(text), LONG_S if text in "sS" else KELVIN}
    elif not text.isascii():
        raise ValueError(f"{text}: a pattern may have only ASCII and classes")
    else:
        return "(?:" if text == "(" and not in_set else text
    folded = "".join(f"\\x{b:02x}" for b in sorted(found))
    return folded if in_set else f"[{folded}]"


def fold(text: str) -> str:
    """A text in folded letters; ValueError for lone surrogates."""
    try:
        code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    except UnicodeEncodeError as error:
        raise ValueError(f"lone surrogate {text[error.start]!r} at {error.start}, no character: "
                         "take text.encode('utf-8', 'replace').decode()") from None
    for c in np.unique(code[FOLD[code] == 255]).tolist():
        FOLD[c] = 128 + CATEGORIES.index(unicodedata.category(chr(c)))
    return FOLD[code].tobytes().decode("latin-1")


class Splitter:
    """Splits text into words as a pattern with \\p{..} says, by the standard library's `re`.
    ValueError for a pattern that can't be translated, and for text with lone surrogates."""

    def __init__(self, pattern: str):
        self.pattern, self.known = pattern, pattern in KNOWN
        try:
            if "".join(m[0] for m in ITEM.finditer(pattern)) != pattern:
                raise ValueError("only classes, sets, groups and repetitions are supported")
            text = ITEM.sub(translate, pattern)
            if re.match(text, "", re.ASCII):
                raise ValueError("it matches the empty text")
            # What a pattern leaves out becomes a word of its own: no text gets lost.
            rest = "" if self.known else f"|(?:(?!{text})[\\x00-\\xff])+"
            self.find_all = re.compile(text + rest, re.ASCII).findall
        except (ValueError, re.error) as error:
            raise self.error(str(error)) from None

    def error(self, why: str) -> ValueError:
        return ValueError(f"pattern {self.pattern!r}: {why}; write it like GPT2_PATTERN")

    def __call__(self, text: str) -> list[str]:
        """Text -> its words. "".join(words) == text."""
        folded = text if text.isascii() else fold(text)
        words = self.find_all(folded)
        if not self.known and "" in words:               # in front of something, say: a*(?=b)
            raise self.error("it matches the empty text")
        if folded is text:
            return words
        return [text[i:j] for i, j in pairwise(accumulate(map(len, words), initial=0))]

    def for_oniguruma(self) -> str:
        """The same pattern for the engine of the library tokenizers, where $ also matches at a
        line's end and {1,3}+ means ({1,3})+."""
        text = ITEM.sub(lambda item: r"\z" if item["end"] else item[0], self.pattern)
        one = r"(\\[pP]\{\^?\w+\}|\\.|\[(?:\\.|[^\]\\])+\]|[^)])(\{\d+(?:,\d*)?\})\+"
        text = re.sub(one, r"(?>\1\2)", text)
        if re.search(r"\{[\d,]+\}\+", text):
            raise self.error("(...){m,n}+ can't be written to a file: use an atomic group, (?>...)")
        return text


# --- 4. the tokenizer -----------------------------------------------------------------------------

CACHE_WORDS = 1 << 19  # words that are remembered with their ids ...
CACHE_BYTES = 1 << 25  # ... and bytes in them, before the memory is emptied


class BPE:
    """Byte-level BPE tokenizer.

    vocab_size: how many tokens at most, special ones included (at least 256 + len(special_tokens)).
    pattern: what a word is, written as published, with \\p{L}, \\p{N}, \\s, (?i:...).
    special_tokens: names such as "<|endoftext|>", never learned, made from text only when asked.
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
        self._set([], range(0), {name: i for i, name in enumerate(names, 256)})

    def _set(self, merges: list[Pair], made: Iterable[int], special: dict[str, int],
             byte_ids: Iterable[int] = range(256), others: dict[int, bytes] | None = None,
             whole: dict[str, int] | None = None) -> None:
        """made: the ids that the merges make. others: tokens that no merge makes. whole: words that
        are one token, whatever the merges say. Everything is replaced at once: an interrupt leaves
        the old tokenizer or the new one."""
        token = {i: bytes([b]) for b, i in enumerate(byte_ids)} | (others or {})
        for (left, right), i in zip(merges, made, strict=True):
            token[i] = token[left] + token[right]
        token |= {i: name.encode() for name, i in special.items()}
        dtype = np.dtype(np.uint16 if max(token) < 65536 else np.uint32)
        fixed = {item: i.to_bytes(dtype.itemsize, sys.byteorder)         # never forgotten
                 for item, i in [*((i, i) for i in token), *(whole or {}).items()]}
        vars(self).update(
            merges=merges, special_tokens=special, _token=token, _byte_ids=byte_ids,
            _merges=Merges(merges, made), _dtype=dtype, _whole=whole, _fixed=fixed,
            _known=dict(fixed), _room=CACHE_BYTES,
            _state=(merges, made, special, byte_ids, others, whole))

    def __len__(self) -> int:
        """The highest id + 1: the number of tokens (unless a loaded file leaves ids out)."""
        return max(self._token) + 1

    def fit(self, text: str | Iterable[str]) -> "BPE":
        """Learns the merges from a text, or an iterable of texts (read once, never held whole).

        Words don't cross the texts of an iterable. The next merge is the most frequent pair inside
        the words, ties go to the smaller (left id, right id). It stops early when no pair occurs
        twice. An item that is no str, or has lone surrogates, is a ValueError; a special token's
        name in a text is plain text, and a warning.
        """
        counts, written = Counter(), Counter()           # words; names of special tokens

        def checked(texts: Iterable[str]) -> Iterator[str]:
            for item in texts:
                if not isinstance(item, str):
                    raise ValueError(f"{item!r} is no text")
                written.update({name: item.count(name) for name in self.special_tokens})
                yield item

        batches = self._batches(checked([text] if isinstance(text, str) else text))
        for part in spread(self._count, batches, "counting words"):
            counts.update(part)
        for name, times in (+written).items():
            warnings.warn(f"{name!r} is written {times} times in the text, where it is plain text, "
                          "not the special token: if it divides documents, cut the text there and "
                          "give encode_file its id between them", stacklevel=2)
        words, wanted = Words(counts, range(256)), self.vocab_size - 256 - len(self.special_tokens)
        merges = list(_progress(learn(words, counts.values(), wanted), "merging", wanted))
        end = 256 + len(merges)
        special = {name: i for i, name in enumerate(self.special_tokens, end)}
        self._set(merges, range(256, end), special)
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
        ids: list[int] = []
        for part in spread(self._encode, self._batches(parts), "encoding"):
            ids += np.frombuffer(part, self._dtype).tolist()
        return ids

    def _encode(self, pieces: list[str | int]) -> bytes:
        """Texts and ready ids -> their ids, as the bytes of an array."""
        known, words = self._known, []       # this one, though another thread may start a new one
        for piece in pieces:
            words += self._split(piece) if isinstance(piece, str) else [piece]
        if new := list(set(words).difference(known)):
            merging = Words(new, self._byte_ids)
            self._merges.apply(merging)
            known |= zip(new, merging.results(self._dtype), strict=True)  # no interrupt parts them
            self._room -= len(merging.id)
            if len(known) > CACHE_WORDS or self._room < 0:
                self._known, self._room = dict(self._fixed), CACHE_BYTES
        return b"".join(map(known.__getitem__, words))

    def encode_file(self, source: str | os.PathLike | Iterable[str | int],
                    out_path: str | os.PathLike) -> int:
        """Writes the ids of a UTF-8 text file, or of an iterable of texts and ready ids, to a .npy
        file (1-D; uint16 if len(self) <= 65536, else uint32) and returns how many there are.

        An int in the iterable is an id, written as it is (a special token between documents).
        Memory is bounded (if the pattern is one of KNOWN); the file takes its place only when it is
        complete. Not UTF-8, lone surrogates, an unknown id: ValueError.
        """
        if isinstance(source, (str, os.PathLike)):
            source = read_text(source) if self._split.known else ["".join(read_text(source))]
        total = 0
        with _replace(out_path) as file:
            file.write(bytes(128))         # the header, as soon as the length is known
            for ids in spread(self._encode, self._batches(source), "encoding"):
                file.write(ids)
                total += len(ids) // self._dtype.itemsize
            file.seek(0)
            header = {"descr": self._dtype.str, "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(file, header)      # 128 bytes
        return total

    def _batches(self, items: Iterable[str | int]) -> Iterator[list[str | int]]:
        """Texts, cut where no word crosses, and ready ids, in lists of about BATCH characters."""
        batch, size = [], 0
        for item in items:
            is_text = isinstance(item, str)
            if not is_text and item not in self._token:
                raise ValueError(f"{item!r} is no text and no id (0 to {len(self) - 1})")
            for piece in cut(item) if is_text and self._split.known else [item]:
                batch.append(piece)
                size += len(piece) if is_text else 1
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> bytes, for streams: a character may be spread over several tokens. An unknown id
        is a ValueError."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            return b"".join(map(self._token.__getitem__, ids))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{error.args[0]!r} is no id of this tokenizer (0 to {len(self) - 1})"
                             ": does it belong to the model?") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; bytes that are not UTF-8 become U+FFFD. An unknown id is a ValueError."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def show(self, text: str | list[int]) -> str:
        """A text (or ids) with | between the tokens, · for a space, escapes for what can't be seen:
        \\xc3 is a byte that is only a part of a character.

        >>> print(BPE(258).fit("low lower lowest").show("low lower"))
        low|·|low|e|r
        """
        ids = self.encode(text) if isinstance(text, str) else text
        tokens = (self.decode_bytes([i]).decode("utf-8", "backslashreplace") for i in ids)
        return "|".join("".join("·" if c == " " else c if c.isprintable() else ascii(c)[1:-1]
                                for c in token) for token in tokens)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a Hugging Face tokenizer.json; the same tokenizer gives the same bytes.

        tokenizers.Tokenizer.from_file reads it and gives the same ids, but always takes special
        tokens in a text for what they are (our allow_special=True). ValueError for what the format
        can't express.
        """
        name = {i: t.decode("latin-1").translate(BYTE_LETTERS) for i, t in self._token.items()}
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
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": bool(self._whole),
                      "vocab": {name[i]: i for i in sorted(name)},
                      "merges": [[name[left], name[right]] for left, right in self.merges]}}
        with _replace(path) as file:
            file.write(json.dumps(data, ensure_ascii=False, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BPE":
        """Reads a byte-level BPE tokenizer.json, ours or another's; ids are as in the file. What
        is broken or can't be done exactly is a ValueError that names it."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls._read(json.load(file, object_pairs_hook=_once))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            why = f"not a complete tokenizer.json ({error}): save it again"
        except (KeyError, TypeError, AttributeError) as error:
            why = f"not a BPE tokenizer.json ({error!r})"
        except ValueError as error:
            why = str(error)
        raise ValueError(f"{os.fspath(path)}: {why}")

    @classmethod
    def _read(cls, data: dict) -> "BPE":
        """The tokenizer that the content of a tokenizer.json describes."""
        model = data["model"]
        vocab, listed = model["vocab"], model["merges"]
        special = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
        if model.get("type", "BPE") != "BPE" or (type(vocab), type(listed)) != (dict, list):
            raise ValueError(f"its model is {model.get('type')!r}, only byte-level BPE can be read")
        pattern, token_of, merges, made = _split_pattern(data), {}, [], []
        for token, i in chain(vocab.items(), special.items()):
            if type(i) is not int or not 0 <= i < 1 << 31:
                raise ValueError(f"{token!r} has id {i!r}: use whole numbers from 0 to 2**31 - 1")
            if token_of.setdefault(i, token) != token or vocab.get(token, i) != i:
                raise ValueError(f"id {i} of {token!r}: each token needs one id, each id one token")
        byte_of = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
        if missing := [f"{byte} ({x!r})" for x, byte in byte_of.items() if x not in vocab]:
            raise ValueError(f"no token for byte {', '.join(missing)[:60]}: not byte-level?")
        for rank, entry in enumerate(listed):
            try:
                left, right = entry.split(" ") if isinstance(entry, str) else entry
                merges.append((vocab[left], vocab[right]))
                made.append(vocab[left + right])
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"merge {rank} is {entry!r}: it must be two tokens that make a "
                                 "third, all of them in the vocabulary") from None
        if len(set(merges)) < len(merges):
            raise ValueError(f"the merge {Counter(merges).most_common(1)[0][0]} appears twice")
        others, whole = {}, {}
        for token, i in vocab.items():
            byte_level = byte_of.keys() >= set(token)
            others[i] = bytes(map(byte_of.get, token)) if byte_level else token.encode()
            if model.get("ignore_merges") and byte_level and token not in special:
                with contextlib.suppress(UnicodeDecodeError):
                    whole[others[i].decode()] = i        # a word that is a token is taken whole
        bpe = cls(256 + len(special), pattern, special)
        bpe._set(merges, made, special, list(map(vocab.get, byte_of)), others, whole)
        bpe.vocab_size = len(bpe)
        return bpe


# The 256 letters that stand for the bytes in tokenizer.json (Radford et al. 2019): bytes that can
# be seen in Latin-1 for themselves, for the others those from U+0100 on.
_others = map(chr, range(256, 512))
BYTE_LETTERS = [chr(b) if chr(b).isprintable() and b != 32 else next(_others) for b in range(256)]

# BPE.load refuses a file that sets one of these.
NOT_DONE = {"normalizer", "truncation", "padding", "single_word", "lstrip", "rstrip", "dropout",
            "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"}


def _split_pattern(data: dict) -> str:
    """The split pattern of a tokenizer.json; refuses by name what can't be done exactly."""
    def refuse(found: object, what: str) -> None:
        if found:
            raise ValueError(f"its {what} can't be reproduced exactly; supported: ByteLevel, "
                             "alone or after a Split by a Regex (Isolated, false), add_prefix_space"
                             " false, nothing that changes the text or adds tokens")

    for part in (data, data["model"], *(data.get("added_tokens") or [])):
        for name in part.keys() & NOT_DONE:
            refuse(part[name], f"{name} {part[name]!r:.60}")
    level = {"type": "ByteLevel"}
    decoder, after = data.get("decoder") or level, data.get("post_processor") or level
    refuse(decoder["type"] != "ByteLevel", f"decoder {decoder['type']}")
    for step in after.get("processors", [after]):
        adds_nothing = [[*part] for part in step.get("single", ())] == [["Sequence"]]
        refuse(step["type"] != "ByteLevel" and not adds_nothing, f"post_processor {step['type']}")
    before = data.get("pre_tokenizer") or {"type": None}
    *split, level = before.get("pretokenizers", [before])
    kinds = [step["type"] for step in (*split, level)]
    refuse(kinds not in (["ByteLevel"], ["Split", "ByteLevel"]), f"pre_tokenizer {kinds}")
    refuse(level.get("add_prefix_space", True), "add_prefix_space")
    refuse(level.get("use_regex", True) == bool(split), "use_regex (true without a Split)")
    if not split:
        return GPT2_PATTERN
    pattern = split[0]["pattern"].get("Regex")
    refuse(not pattern, "Split by a string")
    for odd in re.findall(r"\{[\d,]+\}\+|\$|\\Z", pattern):
        refuse(odd, f"{odd} in a Split, which libraries read in different ways,")
    way = split[0].get("behavior"), bool(split[0].get("invert"))
    refuse(way != ("Isolated", False) and not (way == ("Removed", True) and pattern in KNOWN),
           "Split with behavior={}, invert={}".format(*way))
    return pattern


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, in which no name may appear twice."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"{Counter(n for n, _ in pairs).most_common(1)[0][0]!r} appears twice")
    return found


# --- 5. large texts: files and worker processes ---------------------------------------------------

PIECE = 1 << 15        # characters split at a time (few: most pieces are pure ASCII, and faster)
BATCH = 1 << 21        # characters that a worker gets at a time
WORKERS_FROM = 3       # batches; for fewer, starting processes (0.1 s) costs more than it saves
MAX_WORKERS = 8        # more than one process can feed
READ_BYTES = 1 << 18   # bytes that read_text reads at a time (malloc reuses small blocks better)
WORKER_FLAG = "--bpe-worker"


def cut(text: str, searched: int = 0) -> Iterator[str]:
    """Yields the text in pieces of about PIECE characters; no word crosses from one to the next, if
    the pattern is one of KNOWN. What offers no place to cut (a single word) stays whole. searched:
    how many characters at the beginning are known to offer none."""
    begin = 0
    while place := CUT.search(text, max(begin + PIECE, searched)):
        yield text[begin:place.start()]
        begin = place.start()
    yield text[begin:]


def read_text(path: str | os.PathLike, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Yields the bytes [start, stop) of a UTF-8 file as text, exactly as it is (byte order mark,
    \\r\\n), in pieces as from cut(). ValueError, with the offset, for what is not UTF-8."""
    decoder, rest, raw = codecs.getincrementaldecoder("utf-8")(), "", None
    with open(path, "rb") as file:
        file.seek(start)
        while raw != b"":
            raw = file.read(READ_BYTES if stop is None else max(0, min(READ_BYTES, stop - start)))
            undecoded, searched = len(decoder.getstate()[0]), len(rest)
            try:
                rest += decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{os.fspath(path)} is not UTF-8 at byte {start - undecoded + error.start} "
                    f"({error.reason}): convert it (iconv -f ITS_ENCODING -t UTF-8)") from None
            *pieces, rest = cut(rest, searched)
            yield from pieces
            start += len(raw)
    if rest:
        yield rest


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
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise
    finally:
        with contextlib.suppress(OSError):               # after the replacement it is gone
            os.remove(temporary)


def _progress(items: Iterable, title: str, total: int | None = None) -> Iterable:
    """The items, with a bar when it takes longer than a second and tqdm is installed."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm
        return tqdm(items, title, total, delay=1, leave=False)
    return items


def spread(work: Callable[[list], object], batches: Iterable[list], title: str) -> Iterator:
    """Yields work(batch), work being a method of a BPE, for each batch, in order. If there are
    many, worker processes do it; this one does those that no worker answers."""
    batches = iter(batches)
    first = list(islice(batches, WORKERS_FROM))
    if len(first) < WORKERS_FROM:
        yield from map(work, first)
        return

    def answer(worker: subprocess.Popen | None, batch: list) -> object:
        with contextlib.suppress(Exception):             # no worker, it died, or says other things
            return pickle.load(worker.stdout)["answer"]
        return work(batch)                               # here an error of work itself is raised

    workers, busy = _start_workers(work) or [None], deque()      # busy: workers and their batches
    try:
        for worker, batch in zip(cycle(workers), _progress(chain(first, batches), title)):
            answers = [answer(*busy.popleft())] if len(busy) == len(workers) else []
            _send(worker, batch)
            busy.append((worker, batch))
            yield from answers
        yield from starmap(answer, busy)
    finally:
        for worker in filter(None, workers):
            worker.kill()
            worker.communicate()


def _start_workers(work: Callable[[list], object]) -> list[subprocess.Popen]:
    """A process for each core, which knows the tokenizer: this file run by itself, so that the
    caller's main module is never imported again and no thread is ever forked."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers, bpe = [], work.__self__
    if cores and cores > 1 and not getattr(sys, "frozen", False):
        with contextlib.suppress(OSError, TypeError, NameError):         # no Python or file to run
            while len(workers) < min(cores, MAX_WORKERS):
                workers.append(subprocess.Popen(         # -P: no file here hides a module
                    [sys.executable, "-P", os.path.abspath(__file__), WORKER_FLAG],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},      # 50 ms less to start
                    creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0)))
    for worker in workers:
        _send(worker, (work.__name__, bpe.pattern, bpe._state))
    return workers


def _send(worker: subprocess.Popen | None, message: object) -> None:
    with contextlib.suppress(AttributeError, OSError):   # no worker, or it has died
        pickle.dump(message, worker.stdin, pickle.HIGHEST_PROTOCOL)
        worker.stdin.flush()


def _work() -> None:
    """The main loop of a worker: batches in, answers out, until it is killed. What fails here ends
    it, and the caller does that batch itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # Ctrl-C is the caller's business
    source, target = sys.stdin.buffer, sys.stdout.buffer
    job, pattern, state = pickle.load(source)
    bpe = BPE(256, pattern)
    bpe._set(*state)
    while True:
        answer = getattr(bpe, job)(pickle.load(source))
        pickle.dump({"answer": answer}, target, pickle.HIGHEST_PROTOCOL)
        target.flush()


def draw_tokens(tokens: list[str], path: str | os.PathLike) -> None:
    """Draws the tokens of a text, as `show(text).split("|")` gives them, as a row of pale boxes
    with nothing behind them, which can be read on a white and on a black page."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture: it needs matplotlib (pip install matplotlib)")
        return
    ends = list(accumulate(map(len, tokens), initial=0))
    figure = Figure(figsize=(max(1, ends[-1] / 8), 0.5), layout="constrained")
    axes = figure.subplots()
    for n, (token, (start, end)) in enumerate(zip(tokens, pairwise(ends), strict=True)):
        axes.barh(0, end - start, left=start, color=colormaps["Pastel1"](n % 9), edgecolor="gray")
        axes.text((start + end) / 2, 0, token, ha="center", va="center", family="monospace",
                  parse_math=False)
    axes.set_xlim(0, max(1, ends[-1]))
    axes.axis("off")
    figure.savefig(path, dpi=150, transparent=True)
    print(f"drawn: {path}")


def demo() -> None:
    """Prints how the textbook form merges a sentence step by step, and that the engine agrees."""
    text = "She sells sea shells by the sea shore; the shells she sells are sea shells, I'm sure."
    words = Splitter(GPT2_PATTERN)(text)
    ids = [list(word.encode()) for word in words]
    name = {i: chr(i).replace(" ", "·") for i in range(128)}
    print(f"The most frequent pair of neighbours becomes a token, again and again:\n\n{text}\n")
    merges = textbook_fit(words, 12)
    for new, (left, right) in enumerate(merges, 256):
        ids = [merge(word, (left, right), new) for word in ids]
        name[new] = name[left] + name[right]
        print(f"{new} = {name[left]} + {name[right]}".ljust(20),
              "|".join(name[i] for word in ids for i in word))
    bpe = BPE(256 + 12).fit(text)
    same = bpe.merges == merges and bpe.encode(text) == [i for word in ids for i in word]
    print(f"\nThe engine, which does all words at once, gives the same: {same}")


if __name__ == "__main__":
    _work() if sys.argv[1:] == [WORKER_FLAG] else demo()

"""Byte-level byte-pair encoding (BPE): text <-> bytes <-> ids; the file is a tokenizer.json.

A regular expression splits a text into words (GPT-2, Radford et al. 2019). BPE (Sennrich et al.
2016) starts from the 256 bytes and makes the most frequent pair of neighbours inside the words a
new token, again and again. To encode is to make the same merges in the same order. Ids 0-255 are
the bytes, merge i makes id 256 + i, special tokens come last; a loaded file keeps its own ids.

Stop reading after any part: 1. the idea (textbook code: complete, exact and slow); 2. the engine
(the same merges in all words at once); 3. the split; 4. the tokenizer; 5. files and processes.

Left out: dropout, tokens that aren't bytes, several splits one after another, \\p{Han} and \\w. Ids
equal those of tiktoken, tokenizers and rustbpe for every character that the running Python's
`unicodedata` knows. Needs Python 3.11, numpy 2 (tqdm for bars, if it is there); no torch, no model.

>>> bpe = BPE(258).fit("low lower lowest")
>>> bpe.merges, bpe.encode("slow"), bpe.decode([115, 257])           # "l" + "o", then "lo" + "w"
([(108, 111), (256, 119)], [115, 257], 'slow')
"""
import codecs
import contextlib
import gc
import heapq
import json
import os
import re
import signal
import sys
import threading
import types
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, chain, islice, pairwise, starmap
from multiprocessing import get_context, parent_process

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


class Words:
    """All words end to end in one array of ids, with a border before, between and behind them. A
    place never moves: merging writes the new id at the left place of a pair and takes the right
    place out of the chain of neighbours, a ring (behind the last place comes the first).

        place         0   1   2   3   4   5   6   7   8   9  10
        id            |   l   o   w   |   l   o   w   e   r   |
        lo merged     |  lo   .   w   |  lo   .   w   e   r   |       next[1] = 3, previous[3] = 1

    >>> words = Words(["low", "lower"], range(256))
    >>> words.join(np.array([1, 5]), 256)                # all lo
    >>> words.id
    array([ -1, 256,  -2, 119,  -1, 256,  -2, 119, 101, 114,  -1])
    """

    def __init__(self, words: Iterable[str], byte_ids: Iterable[int]):
        raw = b"\xff".join([b"", *map(str.encode, words), b""])      # a byte that UTF-8 never has
        ids = np.array([*byte_ids][:255] + [BORDER])                 # so 255 marks a border
        self.id = ids[np.frombuffer(raw, np.uint8)]                  # (N,)
        places = np.arange(len(raw))
        self.next, self.previous = np.roll(places, -1), np.roll(places, 1)

    def pairs(self, places: np.ndarray) -> np.ndarray:
        """The pairs that begin here, each as one number, left << 32 | right; negative: no pair."""
        return self.id.take(places) << 32 | self.id.take(self.next.take(places))

    def join(self, places: np.ndarray, new: int | np.ndarray) -> None:
        """Merges the pairs that begin at these places; no two overlap."""
        gone = self.next[places]
        after = self.next[gone]
        self.id[places], self.id[gone] = new, GONE
        self.next[places], self.previous[after] = after, places


def run_starts(continues: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """continues[i]: item i is in the same run as item i - 1. Returns where each item's run starts,
    and whether it is the run's first, third ...: of aaaaa, the pairs to merge."""
    i = np.arange(len(continues))
    start = np.maximum.accumulate(np.where(continues, 0, i))
    return start, (i - start) % 2 == 0


def learn(words: Words, counts: Iterable[int], num_merges: int) -> Iterator[Pair]:
    """textbook_fit for all words: makes and yields the merges, most frequent pair first, ties to
    the smaller ids. counts: how often each word occurs.

    An id only ever gives way to a newer one. Of two ids that become neighbours at least one is new:
    so a pair appears in one step, with the later of its two ids, at all its places, which are noted
    then. Later merges only take places away. Hence a count on the heap is never too low: a pair
    that leaves it with all its places is the most frequent one; any other is counted again and put
    back, if it still occurs twice."""
    weight = np.array([*counts, 0])[np.cumsum(words.id == BORDER) - 1]       # (N,), of the word
    heap: list[tuple[int, int, np.ndarray]] = []         # (-count, pair, places)

    def note(places: np.ndarray) -> None:
        """The pairs that begin at these places go on the heap, grouped by a sort."""
        pairs = words.pairs(places)
        order = pairs.argsort(kind="stable")
        pairs, places = pairs.take(order), places.take(order)
        starts = np.concatenate(([0], (pairs[1:] != pairs[:-1]).nonzero()[0] + 1))
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
        words.join(places, new)                          # other pairs begin there now, and before
        before = words.previous.take(places)
        note(np.concatenate((before[words.id.take(before) != new], places)))     # each once
        new += 1


class Merges:
    """The merges of a tokenizer; the rank of a pair is its place among them. In a word the pair of
    the lowest rank is merged, the leftmost of several, until none is left: so does apply_to_one.

    In many words at once, merges that use nothing another one of them makes can be made together
    (t + h and i + n, but not th + e). limit[a] is the first rank that uses what a merge of rank a
    or later makes. If a is the lowest rank in all the words, the ranks a ... limit[a] - 1, a band,
    can be merged at once: all their pairs are there already, and merging them makes none of them.
    (A foreign file may list a merge before the one that makes what it uses: then limit is None, and
    each word is merged alone.)

    made: the id that each merge makes. byte_ids: the id of each byte."""

    def __init__(self, merges: list[Pair], made: list[int], byte_ids: Iterable[int]):
        self.made, self.byte_ids, self.none = np.array(made, np.int64), byte_ids, len(merges)
        self.rank_of = {pair: rank for rank, pair in enumerate(merges)}
        ids = np.fromiter(chain.from_iterable(merges), np.int64).reshape(-1, 2)
        pair = np.append(ids[:, 0] << 32 | ids[:, 1], np.iinfo(np.int64).max)
        self.rank = pair.argsort().astype(np.int32)      # of the sorted pairs; the last is no merge
        self.pair = pair[self.rank]
        users, first = np.unique(ids, return_index=True)
        first_use = dict(zip(users.tolist(), (first // 2).tolist(), strict=True))    # of each id
        used = np.array([first_use.get(i, self.none) for i in made], np.int32)
        in_order = (used > np.arange(self.none)).all()
        self.limit = np.minimum.accumulate(used[::-1])[::-1] if in_order else None

    def apply_to_one(self, word: str) -> list[int]:
        """The ids of one word, by a heap of (rank, place): for few words quicker than arrays."""
        ids = [*map(self.byte_ids.__getitem__, word.encode()), BORDER]       # a ring, as in Words
        following, previous = [*range(1, len(ids)), 0], [*range(-1, len(ids) - 1)]
        heap = [(self.rank_of[pair], place) for place, pair in enumerate(pairwise(ids))
                if pair in self.rank_of]
        heapq.heapify(heap)
        while heap:
            rank, place = heapq.heappop(heap)
            right = following[place]
            if self.rank_of.get((ids[place], ids[right])) == rank:           # it is still there
                ids[place], ids[right] = int(self.made[rank]), GONE
                following[place] = after = following[right]
                previous[after] = place
                for begin in (previous[place], place):
                    pair = ids[begin], ids[following[begin]]
                    if pair in self.rank_of:
                        heapq.heappush(heap, (self.rank_of[pair], begin))
        return [i for i in ids if i >= 0]

    def look_up(self, pair: np.ndarray) -> np.ndarray:
        """Pairs -> the ranks of their merges, or none."""
        i = np.searchsorted(self.pair, pair)
        return np.where(self.pair[i] == pair, self.rank[i], self.none)

    def apply(self, texts: Iterable[str], dtype: np.dtype) -> list[bytes]:
        """textbook_encode for many words: the ids of each, as the bytes of an array."""
        words = Words(texts, self.byte_ids)
        rank = self.look_up(words.pairs(np.arange(len(words.id))))   # (N,), of each place's pair
        while (lowest := rank.min()) < self.none:
            places = np.flatnonzero(rank < self.limit[lowest])
            here, after = rank[places], rank[words.next[places]]
            before = rank[words.previous[places]]
            # Of two pairs that overlap, the one of the lower rank goes first. Of a run of the same
            # rank (aaaaa) every second one goes, or none while the pair before it is to go first.
            start, odd = run_starts(before == here)
            places = places[(before > here)[start] & odd & (here <= after)]
            gone = words.next[places]
            words.join(places, self.made[rank[places]])
            rank[gone] = self.none
            changed = np.concatenate((words.previous[places], places))
            rank[changed] = self.look_up(words.pairs(changed))
        ids = words.id[words.id != GONE]
        borders = (np.flatnonzero(ids == BORDER) * dtype.itemsize).tolist()
        raw = ids.astype(dtype).tobytes()
        return [raw[i + dtype.itemsize:j] for i, j in pairwise(borders)]


# --- 3. the split: text -> words ------------------------------------------------------------------

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT4_PATTERN = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"""
                r"""| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+""")
LLAMA3_PATTERN = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
                  r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""")
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
O200K_PATTERN = (r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
                 r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
                 r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"""
                 r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
                 r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""")
# Known of these: they match everywhere, and none of their words crosses a CUT.
KNOWN = {GPT2_PATTERN, GPT4_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, O200K_PATTERN}

# Before a space behind a non-space, behind a single line end between non-spaces, between a letter
# and one of these signs: in the text as it is, and so in its normal form, too. (`re` counts more as
# \s than Unicode does. No sign with which special tokens end: <end>, User:.)
CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/／])"
                 r"|(?<=[a-zA-Zа-яё一-鿿ぁ-ゖァ-ヺ])(?=[,.;!?({<\"，。、；：！？])")


def can_be_cut(name: str) -> bool:
    """Whether cut() might cut this special token in two."""
    return bool(CUT.search("." + name, 2))               # "." for whatever stands before it


# `re` knows no \p{L}. So text and pattern are folded to an alphabet of 192 letters: \x00-\x9f, then
# one for each category of the other characters, \xa0 for Lu. Only long s and the Kelvin sign stay
# what they are: (?i:s) and (?i:k) match them.
CATEGORIES = ("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po "
              "Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co Cn").split()
KEPT = [*range(160), ord("\u017f"), ord("\u212a")]
CATEGORY_OF = {chr(c): unicodedata.category(chr(c)) for c in KEPT}
CATEGORY_OF |= {chr(160 + i): category for i, category in enumerate(CATEGORIES)}
SPACE = {c for c, kind in CATEGORY_OF.items() if kind[0] == "Z" or c in "\t\n\v\f\r\x85"}
FOLD = np.full(sys.maxunicode + 1, 255, "<u2")           # 255: its category hasn't been asked yet
FOLD[KEPT] = KEPT

# What a pattern may have: what the ones above need, which all engines read alike.
CLASS = r"\\[pP]\{\w+\}|\\[sS]"
LETTER = r"""\\[rntf.*+?|^$(){}&~/-]|[\w !"#%',/:;<=>@`]"""
ITEM = (rf"\[\^?(?:{CLASS}|\w-\w|{LETTER}|[.*+?$()])+\]|{CLASS}|{LETTER}|\(\?[:>]|\(\?!(?=\\S\))"
        r"|\(\?i:(?:['|a-zA-Z]|\[[a-zA-Z]+\])+\)|[)|.]|[*+?][+?]?|\{\d+(?:,\d+)?\}(?![+?])")


def members(name: re.Match) -> str:
    """\\p{L}, \\P{L}, \\s or \\S -> the folded letters in it, as they stand in a set."""
    kind = name[0][3:-1]
    found = {c for c in CATEGORY_OF if CATEGORY_OF[c].startswith(kind)} if kind else SPACE
    if not found:
        raise ValueError(f"{name[0]}: give a general category of Unicode, such as L, Lu or N")
    return re.escape("".join(found if name[0][1] in "ps" else CATEGORY_OF.keys() - found))


class Splitter:
    """Splits text into words as a pattern with \\p{..} says, by the standard library's `re`.
    ValueError for a pattern that can't be translated, and for text with half a surrogate pair."""

    def __init__(self, pattern: str):
        self.known, self.normal = pattern in KNOWN, None     # normal: "NFC" or "NFKC", made before
        try:
            if rest := pattern[re.match(f"(?a:{ITEM})*", pattern).end():]:
                raise ValueError(f"{rest:.20}: only ASCII, sets, classes, groups, repetitions")
            sets = re.sub(rf"({CLASS})(?![^[]*\])", r"[\1]", pattern)  # a class alone becomes a set
            text = re.sub(CLASS, members, sets)
            if re.match(text, ""):
                raise ValueError("it matches the empty text")
            # What a pattern leaves out becomes a word of its own: no text gets lost.
            rest = "" if self.known else f"|(?:(?!{text})(?s:.))+"
            self.find_all = re.compile(text + rest).findall
        except (ValueError, re.error) as error:
            raise ValueError(f"pattern {pattern!r}: {error}; write it like GPT4_PATTERN") from None

    def __call__(self, text: str) -> list[str]:
        """Text -> its words. "".join(words) == text, in the normal form."""
        if text.isascii():
            return self.find_all(text)
        if self.normal:
            text = unicodedata.normalize(self.normal, text)
        try:
            code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        except UnicodeEncodeError as error:
            raise ValueError(f"half a character at {error.start}: take text.encode('utf-16', "
                             "'surrogatepass').decode('utf-16', 'replace')") from None
        for c in np.unique(code[FOLD[code] == 255]).tolist():
            FOLD[c] = 160 + CATEGORIES.index(unicodedata.category(chr(c)))
        words = self.find_all(FOLD[code].tobytes().decode("utf-16-le"))
        return [text[i:j] for i, j in pairwise(accumulate(map(len, words), initial=0))]


# --- 4. the tokenizer -----------------------------------------------------------------------------

MEMORY = 1 << 26       # bytes, about, of words that are remembered with their ids
FEW = 500              # characters of new words: up to so many a plain loop is quicker than arrays


class BPE:
    """Byte-level BPE tokenizer.

    vocab_size: how many tokens at most, special ones included (at least 256 + len(special_tokens)).
    pattern: what a word is, written as published, with \\p{L}, \\p{N}, \\s, (?i:...).
    special_tokens: names such as "<|endoftext|>", never learned, made from text only when asked.
    Words end where a text of an iterable ends (an open file gives lines; read_text cuts no word).
    ValueError for a vocab_size or a pattern that won't do, for names empty or given twice; for a
    text that is no str, has half a character or isn't UTF-8."""

    def __init__(self, vocab_size: int, pattern: str = GPT2_PATTERN,
                 special_tokens: Iterable[str] = ()):
        names = [special_tokens] if isinstance(special_tokens, str) else list(special_tokens)
        if len(set(names)) < len(names) or not all(isinstance(n, str) and n for n in names):
            raise ValueError(f"special_tokens={names!r}: give names that differ and aren't empty")
        if not isinstance(vocab_size, (int, np.integer)) or vocab_size < 256 + len(names):
            raise ValueError(f"vocab_size={vocab_size}: bytes and special tokens need "
                             f"{256 + len(names)} or more")
        self.vocab_size, self.pattern, self._split = int(vocab_size), pattern, Splitter(pattern)
        self._learned([], names)

    def _learned(self, merges: list[Pair], names: Iterable[str]) -> None:
        """The ids that the header names: bytes, merges, special tokens."""
        token = {b: bytes([b]) for b in range(256)}
        for new, (left, right) in enumerate(merges, 256):
            token[new] = token[left] + token[right]
        special = {name: i for i, name in enumerate(names, len(token))}
        self._set(Merges(merges, [*token][256:], range(256)), token, special)

    def _set(self, merges: "Merges", token: dict[int, bytes], special: dict[str, int],
             ignore_merges: bool = False) -> None:
        """token: the bytes of each id. ignore_merges: a word that is a token becomes that token.
        All is replaced at once: an interrupt leaves the old tokenizer or the new one."""
        names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        dtype = np.dtype(np.uint16 if max(*token, *special.values()) < 65536 else np.uint32)
        whole = {t.decode("utf-8", "surrogateescape"): i for i, t in token.items() if ignore_merges}
        vars(self).update(
            merges=[*merges.rank_of], special_tokens=special, _merges=merges, _dtype=dtype,
            _token=token | {i: name.encode() for name, i in special.items()},
            _names=re.compile(f"({names})") if names else None,
            _whole=whole | {i: i for i in special.values()},     # what becomes one id in any case
            _known={}, _room=MEMORY)                             # words -> the bytes of their ids

    def __len__(self) -> int:
        """The highest id + 1: the number of tokens (unless a loaded file leaves ids out)."""
        return max(self._token) + 1

    def __getstate__(self) -> dict:          # a copy meets its words by itself
        return vars(self) | {"_known": {}, "_room": MEMORY}

    def fit(self, text: str | Iterable[str]) -> "BPE":
        """Learns the merges from a text, or an iterable of texts (read once, never held whole): the
        next one is the most frequent pair inside the words, ties go to the smaller (left id, right
        id), until no pair occurs twice. Nothing is learned from special tokens or across them."""
        counts: Counter[str] = Counter()
        for part in spread(self._count, self._batches(text, True), "counting words"):
            counts.update(part)
        words, wanted = Words(counts, range(256)), self.vocab_size - 256 - len(self.special_tokens)
        pairs = _progress(learn(words, counts.values(), wanted), "merging", wanted)
        self._learned(list(pairs), self.special_tokens)
        return self

    def _count(self, pieces: list[str | int]) -> Counter[str]:
        words = (self._split(piece) for piece in pieces if isinstance(piece, str))
        return Counter(chain.from_iterable(words))

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Text -> ids. Special tokens in it are plain text unless allow_special; then the leftmost,
        of several the longest, becomes its id. None is ever added (add_special_tokens=False in
        other libraries)."""
        if not isinstance(text, str):
            raise ValueError(f"encode takes one str, not {_kind(text)}")
        ids = b"".join(spread(self._encode, self._batches(text, allow_special), "encoding"))
        return np.frombuffer(ids, self._dtype).tolist()

    def _encode(self, pieces: list[str | int]) -> bytes:
        """Texts and ids of special tokens -> all ids, as the bytes of an array."""
        known, merges, words = self._known, self._merges, []     # a thread may start a new memory
        for piece in pieces:
            words += self._split(piece) if isinstance(piece, str) else [piece]
        if new := set(words).difference(known):
            ids = {word: [self._whole[word]] for word in new & self._whole.keys()}
            new.difference_update(ids)
            if few := merges.limit is None or sum(map(len, new)) < FEW:
                ids |= {word: merges.apply_to_one(word) for word in new}
            found = {word: np.array(ids[word], self._dtype).tobytes() for word in ids}
            if not few:
                found |= zip(new, merges.apply(new, self._dtype), strict=True)
            known |= found                               # at once: an interrupt leaves no half word
            self._room -= sum(map(len, new)) + 128 * len(found)
            if self._room < 0:
                self._known, self._room = {}, MEMORY
        return b"".join(map(known.__getitem__, words))

    def encode_file(self, source: str | os.PathLike | Iterable[str],
                    out_path: str | os.PathLike, allow_special: bool = False) -> int:
        """Writes the ids of a UTF-8 text file, or of an iterable of texts, to a .npy file (1-D;
        uint16 if len(self) <= 65536, else uint32) and returns how many there are. Memory is bounded
        if the pattern is one of KNOWN (and no special token to find can_be_cut); no half file is
        left."""
        if isinstance(source, (str, os.PathLike)):
            names = self.special_tokens if allow_special else ()
            bounded = self._split.known and not any(map(can_be_cut, names))
            source = read_text(source) if bounded else ["".join(read_text(source))]
        with _replace(out_path) as file:
            file.write(bytes(128))         # the header, as soon as the length is known
            file.writelines(spread(self._encode, self._batches(source, allow_special), "encoding"))
            total = (file.tell() - 128) // self._dtype.itemsize
            file.seek(0)
            header = {"descr": self._dtype.str, "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(file, header)      # 128 bytes
        return total

    def _batches(self, texts: str | Iterable[str], special: bool) -> Iterator[list[str | int]]:
        """Yields texts, cut where no word crosses, in lists of about BATCH characters. special: the
        special tokens in a text become ids."""
        batch, size, names = [], 0, self._names if special else None
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise ValueError(f"{_kind(text)} among the texts: give one str at a time")
            for n, part in enumerate(names.split(text) if names else [text]):
                whole = n % 2 or not self._split.known   # every second part is a special token
                for piece in [part] if whole else cut([part]):
                    batch.append(self.special_tokens[part] if n % 2 else piece)
                    size += len(piece)
                    if size >= BATCH:
                        yield batch
                        batch, size = [], 0
        if batch:
            yield batch

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> bytes, for streams: a character may be spread over tokens. Errors as in decode."""
        try:
            row = ids.tolist() if hasattr(ids, "tolist") else ids
            return b"".join(map(self._token.__getitem__, row))
        except KeyError as error:
            raise ValueError(f"{error!s:.40} is no id: they go up to {len(self) - 1}") from None
        except TypeError:
            raise ValueError(f"ids are {_kind(ids)}: give one row of them") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text (in the normal form of a loaded tokenizer, if it has one); bytes that are not
        UTF-8 become U+FFFD. An unknown id is a ValueError."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def show(self, text: str | list[int]) -> str:
        """A text (or ids) with | between tokens, · for a space, \\xc3 for a part of a character.

        >>> print(BPE(258).fit("low lower lowest").show("low lower"))
        low|·|low|e|r
        """
        ids = self.encode(text) if isinstance(text, str) else text
        shown = "|".join(self.decode_bytes([i]).decode("utf-8", "backslashreplace") for i in ids)
        shown = shown.replace(" ", "·")
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a Hugging Face tokenizer.json; the same tokenizer gives the same bytes.
        tokenizers.Tokenizer.from_file reads it and gives the same ids, but always takes special
        tokens in a text for what they are. ValueError if one of them looks like another token."""
        name = {i: "".join(map(BYTE_LETTERS.__getitem__, t)) for i, t in self._token.items()}
        name |= {i: text for text, i in self.special_tokens.items()}
        if len(set(name.values())) < len(name):
            raise ValueError(f"{[*self.special_tokens]}: a special token looks like another token")
        off = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        way = dict(type="Split", pattern={"Regex": self.pattern}, behavior="Isolated", invert=False)
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        data = {
            "version": "1.0", "post_processor": None, "decoder": level,
            "added_tokens": [dict(id=i, content=n, **off) for n, i in self.special_tokens.items()],
            "normalizer": self._split.normal and {"type": self._split.normal},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [way, level]},
            "model": {"type": "BPE", "ignore_merges": len(self._whole) > len(self.special_tokens),
                      "vocab": {name[i]: i for i in sorted(name)},
                      "merges": [[name[left], name[right]] for left, right in self.merges]}}
        with _replace(path) as file:
            file.write(json.dumps(data, ensure_ascii=False, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BPE":
        """Reads a byte-level BPE tokenizer.json, ours or another's (GPT-4o's, gpt-oss's, Llama 3's,
        Qwen 3's); ids are as in the file. A post-processor that puts special tokens around the text
        is left out, as encode adds none. ValueError for what is broken or can't be done exactly."""
        collecting = gc.isenabled()
        gc.disable()                 # up to half of the time for a large file: it finds nothing
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
            pattern, normal = _how_it_splits(data)
            vocab, pairs = data["model"]["vocab"], data["model"]["merges"]
            special = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
            seen: dict[int, str] = {}
            for name, i in (vocab | special).items():
                if (type(i) is not int or not 0 <= i < 1 << 31 or vocab.get(name, i) != i
                        or seen.setdefault(i, name) != name):
                    raise ValueError(f"{name!r} has id {i!r}: give whole numbers that differ")
            ids, made = [], []
            for pair in pairs:
                left, right = pair.split(" ") if isinstance(pair, str) else pair
                ids.append((vocab[left], vocab[right]))
                made.append(vocab[left + right])
            merges = Merges(ids, made, [vocab[c] for c in BYTE_LETTERS])
            if len(merges.rank_of) < len(pairs):
                raise ValueError("a merge appears twice")
            token = {i: bytes(map(BYTE_OF.__getitem__, name)) for name, i in vocab.items()
                     if name not in special}
            bpe = cls(256 + len(special), pattern, special)
            bpe._set(merges, token, special, data["model"].get("ignore_merges"))
            bpe.vocab_size, bpe._split.normal = len(bpe), normal
            return bpe
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{os.fspath(path)} can't be read as byte-level BPE: {why}") from None
        finally:
            if collecting:
                gc.enable()


# The letters that stand for the bytes in tokenizer.json (Radford et al. 2019): bytes that can be
# seen in Latin-1 for themselves, for the others those from U+0100 on.
_others = map(chr, range(256, 512))
BYTE_LETTERS = [chr(b) if chr(b).isprintable() and b != 32 else next(_others) for b in range(256)]
BYTE_OF = {c: b for b, c in enumerate(BYTE_LETTERS)}


def _how_it_splits(data: dict) -> tuple[str, str | None]:
    """The split pattern and normal form of a tokenizer.json. ValueError for what isn't done."""
    pattern, model, added = None, data["model"], data.get("added_tokens") or []
    match data.get("pre_tokenizer"):
        case {"type": "ByteLevel", "add_prefix_space": False} as step if step.get("use_regex", 1):
            pattern = GPT2_PATTERN
        case {"pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": way, **more},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}:
            if way == "Isolated" or way == "Removed" and more.get("invert") and regex in KNOWN:
                pattern = regex
    normal, after = data.get("normalizer") or {"normalizers": []}, data.get("post_processor") or {}
    forms = [form["type"] for form in normal.get("normalizers", [normal])]
    templates = [step["single"] for step in after.get("processors", [after]) if "single" in step]
    bytes_back = (data.get("decoder") or {"type": "ByteLevel"})["type"] == "ByteLevel"
    wrong = [(name, data.get(name)) for name, done in (
        ("model", model.get("type", "BPE") == "BPE"), ("pre_tokenizer", pattern),
        ("normalizer", forms in ([], ["NFC"], ["NFKC"])), ("decoder", bytes_back),
        ("post_processor", all(str(t).count("'Sequence'") == 1 for t in templates))) if not done]
    names = ["truncation", "padding", "single_word", "lstrip", "rstrip", "dropout", "byte_fallback",
             "continuing_subword_prefix", "end_of_word_suffix"]
    if forms or len({bool(token.get("normalized")) for token in added}) > 1:
        names.append("normalized")  # if mixed, the two kinds are sought one by one
    wrong += [(name, part[name]) for part in (data, model, *added) for name in names
              if part.get(name)]
    if wrong:
        name, value = wrong[0]
        raise ValueError(f"its {name} is {json.dumps(value):.300}; what is done: BPE, ByteLevel "
                         "without a prefix space, alone (use_regex true) or behind one Split by a "
                         "Regex (Isolated; use_regex false), NFC, NFKC, special tokens around")
    return pattern, forms[0] if forms else None


def _kind(item: object) -> str:
    """What a message says of an argument: its type and shape, not what is in it."""
    shape = np.shape(item if hasattr(item, "shape") else np.array(item, object))
    return f"a {type(item).__name__} of shape {tuple(shape)}" if shape else f"{item!r:.40}"


# --- 5. large texts: files and worker processes ---------------------------------------------------

PIECE = 1 << 15        # characters split at a time (few: most pieces are pure ASCII, and faster)
BATCH = 1 << 21        # characters that a worker gets at a time
WORKERS_FROM = 3       # batches; for fewer, starting processes (0.2 s) costs more than it saves
READ_BYTES = 1 << 18   # bytes that read_text reads at a time (malloc reuses small blocks better)
STARTING = threading.Lock()      # held while a process is started


def cut(texts: Iterable[str]) -> Iterator[str]:
    """Yields a text, given in parts, in pieces of about PIECE characters; no word crosses from one
    to the next, if the pattern is one of KNOWN. What offers no place to cut stays whole."""
    rest = ""
    for text in texts:
        begin, searched = 0, len(rest)                   # the rest has been searched already
        rest += text
        while place := CUT.search(rest, max(begin + PIECE, searched)):
            yield rest[begin:place.start()]
            begin = place.start()
        rest = rest[begin:]
    if rest:
        yield rest


def read_text(path: str | os.PathLike, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Yields the bytes [start, stop) of a UTF-8 file as text, exactly as it is (byte order mark,
    \\r\\n), in pieces as from cut(). ValueError, with the offset, for what is not UTF-8."""
    stop = sys.maxsize if stop is None else stop
    with open(path, "rb") as file:
        file.seek(start)
        blocks = iter(lambda: file.read(max(0, min(READ_BYTES, stop - file.tell()))), b"")
        try:
            yield from cut(codecs.iterdecode(blocks, "utf-8"))
        except UnicodeDecodeError as error:
            at = file.tell() - len(error.object) + error.start
            raise ValueError(f"byte {at} of {os.fspath(path)} is not UTF-8: convert it") from None


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
        return tqdm(items, title, total, delay=1, leave=False, disable=sys.stderr is None)
    return items


def spread(work: Callable[[list], object], batches: Iterable[list], title: str) -> Iterator:
    """Yields work(batch) for each batch, in order, work being a method of a BPE. Worker processes
    do it if there are many; what none of them answers (one was killed, say) is done here."""
    batches, waiting, pool = iter(batches), deque(), None        # waiting: batches, their futures
    first = list(islice(batches, WORKERS_FROM))
    if len(first) < WORKERS_FROM:
        yield from map(work, first)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores or 1, 8)                         # one process can't feed more
    with contextlib.suppress(ImportError, NotImplementedError, OSError):         # no semaphores
        if workers > 1 and not (parent_process() or getattr(sys, "frozen", False)):
            from concurrent.futures import ProcessPoolExecutor
            pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (work,))

    def submit(batch: list):
        """A new process would import what `__main__` says, the caller's script: so an empty
        module stands there meanwhile."""
        with contextlib.suppress(Exception), STARTING:
            main = sys.modules["__main__"]
            try:
                sys.modules["__main__"] = types.ModuleType("__main__")
                return pool.submit(_do, batch)
            finally:
                sys.modules["__main__"] = main

    def answer(batch: list, future) -> object:
        with contextlib.suppress(Exception):
            return future.result()
        return work(batch)

    try:
        for batch in _progress(chain(first, batches), title):
            waiting.append((batch, submit(batch) if pool else None))
            if len(waiting) > 2 * workers or not pool:
                yield answer(*waiting.popleft())
        yield from starmap(answer, waiting)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[list], object]) -> None:
    """The start of a worker. Ctrl-C is the caller's business, and the caller's end is its own."""
    _do.work, caller = work, parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: caller.join() or os._exit(1), daemon=True).start()


def _do(batch: list) -> object:
    return _do.work(batch)


def demo() -> None:
    """Prints how a sentence is merged step by step."""
    text = "She sells sea shells by the sea shore; the shells she sells are sea shells, I'm sure."
    print(f"The most frequent pair of neighbours becomes a token, again and again:\n\n{text}\n")
    for new in range(256, 268):
        bpe = BPE(new + 1).fit(text)
        left, right = ([i] for i in bpe.merges[-1])
        print(f"{new} = {bpe.show(left)} + {bpe.show(right)}".ljust(20), bpe.show(text))


if __name__ == "__main__":
    demo()

"""GetData: a long sequence of token ids -> windows (x, y) to learn from.

    x = data[i : i+T],   y = data[i+1 : i+T+1]

The target of every position is simply the next token, so one window of T tokens is T examples at
once (Radford et al. 2018, section 3.1, equation 1). GetData cuts windows, Batches shuffles them
into batches. An array or a memmap is never copied whole: an .npy of any size is read window by
window.

Does not know: text, tokenizer, downloads. Needs: torch, numpy. Copy this file alone and it works.
"""

from collections.abc import Iterator
from numbers import Integral

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class GetData(Dataset):
    """All windows of seq_len tokens whose targets exist.

    data: a 1-D sequence of ids: a list, a numpy array or memmap, or a tensor.
    seq_len: T, tokens in a window. device: where x and y are put.
    stride: window i begins at i·stride; 1 gives every window, seq_len gives each token once.

    >>> x, y = GetData([10, 11, 12, 13, 14], seq_len=3)[1]
    >>> x, y
    (tensor([11, 12, 13]), tensor([12, 13, 14]))
    """

    def __init__(self, data, seq_len: int, device: torch.device | str = "cpu", stride: int = 1):
        seq_len, stride = whole_number("seq_len", seq_len), whole_number("stride", stride)
        if isinstance(data, Tensor):
            data = data.detach().cpu().numpy()  # shares the memory of a CPU tensor
        elif not isinstance(data, np.ndarray):
            data = np.asarray(data, dtype=np.int64 if len(data) == 0 else None)
        if data.ndim != 1 or data.dtype.kind not in "iu":
            raise ValueError(
                f"data of shape {data.shape} and type {data.dtype}: it must be one sequence of "
                f"whole numbers, shape (n,); encode the text first"
            )
        if len(data) < seq_len + 1:
            raise ValueError(
                f"{len(data)} tokens of data, but one window needs seq_len + 1 = {seq_len + 1}: "
                f"use more text or a smaller seq_len"
            )
        self.data, self.seq_len, self.device, self.stride = data, seq_len, device, stride

    def __getstate__(self) -> dict:
        """What a DataLoader's worker process gets: for a memory-mapped file, where the data is in
        it, not the data. The worker opens it again."""
        data = root = self.data
        while isinstance(root.base, np.ndarray):  # a slice's base is what it was cut from
            root = root.base
        if (not isinstance(root, np.memmap) or root.filename is None or root.mode == "c"
                or not data.flags.c_contiguous):
            return vars(self)  # not in a file, or not in this form
        place = root.offset + data.ctypes.data - root.ctypes.data  # in the file, slices too
        return vars(self) | {"data": (root.filename, data.dtype, "r", place, len(data))}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if isinstance(self.data, tuple):
            self.data = np.memmap(*self.data)

    def __len__(self) -> int:
        return (len(self.data) - self.seq_len - 1) // self.stride + 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Window i: x and y, int64, (T,) each. IndexError outside 0 … len-1 (or -len … -1)."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"window {i}: there are {len(self)}")
        x, y = self.windows(np.array([i % len(self)]))
        return x[0], y[0]

    def windows(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """The windows at these indices, cut out in one step: x and y, int64, (B, T) each."""
        starts = np.asarray(indices, dtype=np.int64) * self.stride
        rows = self.data[starts[:, None] + np.arange(self.seq_len + 1)]  # (B, T + 1)
        rows = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        return rows[:, :-1], rows[:, 1:]


class Batches:
    """The windows of a GetData as batches (x, y), (B, T) each; what train.py feeds to GPT.fit.

    With a seed they are shuffled for training: every window comes once before any comes again, and
    all batches are full. Batch k is a function of (seed, k) alone, so a run that was stopped
    resumes with exactly the batch that would have come next. With seed=None, for validation: in
    order, the last batch may be shorter.

    rank of ranks: this process's share of every batch, for training on several processes.
    ValueError if batch_size can't be divided evenly.
    """

    def __init__(self, dataset: GetData, batch_size: int, seed: int | None = None,
                 rank: int = 0, ranks: int = 1):
        batch_size = whole_number("batch_size", batch_size)
        if seed is not None and batch_size % ranks:
            raise ValueError(f"batch_size={batch_size} on {ranks} processes: pick a multiple")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        """Batches in one pass over the windows."""
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.batch(k) for k in range(len(self)))

    def batch(self, k: int) -> tuple[Tensor, Tensor]:
        """Batch k; with a seed, k may exceed len(self): then the windows are shuffled again."""
        n = len(self.dataset)
        indices = np.arange(k * self.batch_size, (k + 1) * self.batch_size)[self.rank :: self.ranks]
        if self.seed is None:
            indices = indices[indices < n]
        else:
            rounds = indices // n  # a batch may hold the end of one pass and the start of the next
            indices = np.concatenate([shuffled(indices[rounds == r] % n, n, self.seed, int(r))
                                      for r in np.unique(rounds)])
        return self.dataset.windows(indices)


def whole_number(name: str, value: int) -> int:
    """The value as an int. ValueError, naming it, unless it is a whole number, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r}: pick a whole number, 1 or more")
    return int(value)  # numpy's whole numbers are Integral, too


def shuffled(indices: np.ndarray, n: int, seed: int, key: int) -> np.ndarray:
    """Where shuffle number `key` of 0 … n-1, with this seed, puts these indices.

    The shuffle is computed, not stored: ten billion windows need no table of 80 GB. A Feistel
    network of 6 rounds (Luby and Rackoff 1988) permutes the numbers below the next power of 4;
    what lands outside 0 … n-1 goes through again ("cycle walking", Black and Rogaway 2002).

    >>> sorted(shuffled(np.arange(5), n=5, seed=0, key=0).tolist())
    [0, 1, 2, 3, 4]
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)  # bits in each half of a number
    low = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence([seed, key]).generate_state(6, np.uint64)
    result = np.array(indices, dtype=np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> np.uint64(half), result[outside] & low
        for round_key in keys:
            mixed = (right + round_key) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        result[outside] = left << np.uint64(half) | right
        outside = result >= n
    return result.astype(np.int64)


def demo() -> None:
    """Print the windows of a short sequence of ids and the order in which training sees them."""
    data = list(range(100, 110))
    dataset = GetData(data, seq_len=4)
    print(f"data: {data}\n{len(dataset)} windows of 4 tokens; y is x one step later:\n")
    for i in range(len(dataset)):
        x, y = dataset[i]
        print(f"  window {i}: x = {x.tolist()}  y = {y.tolist()}")
    print("\nShuffled into batches of 2, two passes (only the first token of each x is shown):")
    batches = Batches(dataset, batch_size=2, seed=1)
    for k in range(2 * len(batches)):
        print(f"  batch {k}: {batches.batch(k)[0][:, 0].tolist()}")


if __name__ == "__main__":
    demo()

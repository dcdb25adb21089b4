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
    """Windows of seq_len tokens and, one token later, their targets.

    data: a 1-D sequence of ids: a list, a numpy array or memmap, or a tensor.
    seq_len: T, tokens in a window. device: where x and y are put.
    stride: window i begins at i·stride; 1 gives every window, seq_len gives each token once.

    >>> x, y = GetData([10, 11, 12, 13, 14], seq_len=3)[1]
    >>> x, y
    (tensor([11, 12, 13]), tensor([12, 13, 14]))
    """

    def __init__(self, data, seq_len: int, device: torch.device | str = "cpu", stride: int = 1):
        for name, value in (("seq_len", seq_len), ("stride", stride)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}={value!r}: pick a whole number, 1 or more")
        if isinstance(data, Tensor):
            data = data.detach().cpu().numpy()  # shares the memory of a CPU tensor
        elif not isinstance(data, np.ndarray):
            data = np.asarray(data, dtype=np.int64 if len(data) == 0 else None)
        if data.ndim != 1 or data.dtype.kind not in "iu":
            raise ValueError(f"data of shape {data.shape} and type {data.dtype}: it must be one "
                             f"sequence of whole numbers, shape (n,); encode the text first")
        if len(data) < seq_len + 1:
            raise ValueError(f"{len(data)} tokens of data, but a window needs seq_len + 1 = "
                             f"{seq_len + 1}: use more text or a smaller seq_len")
        self.data, self.seq_len, self.device, self.stride = data, int(seq_len), device, int(stride)

    def __len__(self) -> int:
        return (len(self.data) - self.seq_len - 1) // self.stride + 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Window i: x and y, int64, (T,) each. IndexError outside 0 … len-1 (or -len … -1)."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"window {i}: there are {len(self)}")
        x, y = self.windows(np.array([i % len(self) * self.stride]))
        return x[0], y[0]

    def windows(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """The windows that begin at these tokens, cut out in one step: x and y, int64, (B, T)."""
        rows = self.data[starts[:, None] + np.arange(self.seq_len + 1)]  # (B, T + 1)
        rows = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        return rows[:, :-1], rows[:, 1:]

    def __getstate__(self) -> dict:
        """What a DataLoader's worker process gets: for a memory-mapped file, where the data is in
        it, not the data. The worker maps it again."""
        data = root = self.data
        while isinstance(root.base, np.ndarray):  # a slice's base is what it was cut from
            root = root.base
        in_file = isinstance(root, np.memmap) and root.filename and root.mode != "c"
        if in_file and data.flags.c_contiguous:
            place = root.offset + data.ctypes.data - root.ctypes.data
            data = (root.filename, data.dtype, "r", place, len(data))
        return vars(self) | {"data": data}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if isinstance(self.data, tuple):
            self.data = np.memmap(*self.data)


class Batches:
    """The windows of a GetData as batches (x, y), (B, T) each; what train.py feeds to GPT.fit.

    seed=None, for validation: in order, and the last batch may be shorter.

    With a seed, for training: shuffled, and every batch is full. Each pass over the data draws an
    offset, cuts windows at offset + i·stride and takes them in a random order. With stride=seq_len
    it reads every token once, except for fewer than 2·T at the ends, and each pass cuts at other
    places. Batch k is a function of (seed, k) alone, so a run that was stopped resumes with exactly
    the batch that would have come next. The order of one pass stays in memory: 0.6 GB for ten
    billion tokens with stride=64. A stride of 1 would need 64 times as much, and more.

    rank of ranks: this process's share of every batch, for training on several processes.
    ValueError if batch_size can't be divided evenly.
    """

    def __init__(self, dataset: GetData, batch_size: int, seed: int | None = None,
                 rank: int = 0, ranks: int = 1):
        if batch_size < 1 or batch_size % ranks:
            raise ValueError(f"batch_size={batch_size} on {ranks} processes: pick a multiple of "
                             f"{ranks}, so that each has the same share of a batch")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.ranks = rank, ranks
        self.room = len(dataset.data) - dataset.seq_len  # places where a window can begin
        self.per_pass = len(dataset)  # windows; shuffled, as many as fit behind any offset
        if seed is not None:
            self.per_pass = max(1, self.room // dataset.stride)
        self.drawn = (-1, 0, np.empty(0))  # a pass, its offset and its order: see shuffled

    def __len__(self) -> int:
        """Batches in one pass over the data."""
        return -(-self.per_pass // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.batch(k) for k in range(len(self)))

    def batch(self, k: int) -> tuple[Tensor, Tensor]:
        """Batch k; with a seed, k may exceed len(self): then further passes begin."""
        numbers = np.arange(k * self.batch_size, (k + 1) * self.batch_size)[self.rank :: self.ranks]
        passes, places = np.divmod(numbers, self.per_pass)
        if self.seed is None:
            return self.dataset.windows(places[passes == 0] * self.dataset.stride)
        return self.dataset.windows(np.concatenate(  # a batch may end one pass and begin the next
            [self.shuffled(int(n), places[passes == n]) for n in np.unique(passes)]))

    def shuffled(self, n: int, places: np.ndarray) -> np.ndarray:
        """Where the windows begin that have these places in the order of pass n."""
        if n != self.drawn[0]:
            self.drawn = (-1, 0, np.empty(0))  # frees the last order before the next is drawn
            rng = np.random.default_rng([self.seed, n])
            offset = int(rng.integers(min(self.dataset.stride, self.room)))
            order = np.arange(self.per_pass, dtype=np.min_scalar_type(self.per_pass))
            rng.shuffle(order)
            self.drawn = n, offset, order
        _, offset, order = self.drawn
        return offset + order[places].astype(np.int64) * self.dataset.stride


def demo() -> None:
    """Print the windows of a short sequence of ids and the order in which training sees them."""
    dataset = GetData(range(100, 118), seq_len=4, stride=4)
    print("Windows of 4 tokens of 100 … 117; y is x one step later:\n")
    for i, (x, y) in enumerate(dataset):
        print(f"  window {i}: x = {x.tolist()}  y = {y.tolist()}")
    print("\nTwo passes, shuffled into batches of 2; each cuts the data at other places:")
    batches = Batches(dataset, batch_size=2, seed=1)
    for k in range(2 * len(batches)):
        print(f"  batch {k}: {batches.batch(k)[0].tolist()}")


if __name__ == "__main__":
    demo()

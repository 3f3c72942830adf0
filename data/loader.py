"""Shards -> batches, by arithmetic alone: a batch is a pure function of (seed, step, rank, world).

1. `rows` cuts a split into rows of S + 1 tokens: stories packed end to end, or one story a row.
2. `Order` permutes the rows of each epoch; it keeps no state, so a run resumes by knowing its step.
3. The global batch of a step is G rows in that order; rank r takes rows [r G // W, (r + 1) G // W) of it.
4. Every rank cuts its rows into equally many micro-batches; filler rows, whose targets count nothing, even them out.
5. Threads prepare coming steps while the model works on this one.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig
from data.settings import UserError
from data.shards import Split
from data.splitmix import mix64

IGNORE = -100  # the target of a place that does not count


@dataclass
class Batch:
    """B rows of S tokens."""

    tokens: Tensor  # (B, S) int64
    targets: Tensor  # (B, S) int64, IGNORE where nothing counts: after the end of a story and in filler
    index: Tensor  # (B,) int64: place in the global batch, the key of random numbers
    positions: Tensor | None = None  # (B, S) int64 from the start of each story, with mask_documents only
    documents: Tensor | None = None  # (B, S) int64: which story of the row

    def to(self, device: torch.device) -> "Batch":
        """On `device`, without waiting for the copy."""
        fields = (self.tokens, self.targets, self.index, self.positions, self.documents)
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in fields))  # type: ignore[arg-type]


@dataclass
class Step:
    """One rank's share of an optimizer step."""

    micro_batches: list[Batch]
    real_tokens: int  # targets that count in the *global* batch, over all ranks


class Rows:
    """The rows of a split; `pack` fills them with stories end to end, else each holds one, cut or padded."""

    def __init__(
        self, split: Split, seq_len: int, pack: bool, bos: int, pad: int, mask_documents: bool = False
    ) -> None:
        self.split, self.seq_len, self.pack = split, seq_len, pack
        self.bos, self.pad, self.mask_documents = bos, pad, mask_documents
        per_shard = [max(0, (s.tokens - 1) // seq_len) if pack else s.documents for s in split.shards]
        self._first = np.concatenate([[0], np.cumsum(per_shard, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def _find(self, row: int) -> tuple[int, int]:
        """Global row -> (shard, row inside the shard)."""
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        return shard, int(row - self._first[shard])

    def read(self, row: int) -> np.ndarray:
        """Tokens of a row: (S + 1,), or fewer where one story is shorter."""
        number, inside = self._find(row)
        shard = self.split.shard(number)
        start = inside * self.seq_len if self.pack else int(shard.starts[inside])
        stop = start + self.seq_len + 1
        return shard.tokens[start : stop if self.pack else min(stop, int(shard.starts[inside + 1]))]

    def real_tokens(self, rows: np.ndarray) -> int:
        """Targets that count in these rows: all but the bos of a next story."""
        total = 0
        for row in rows.tolist():
            number, inside = self._find(row)
            starts = self.split.shard(number).starts
            if self.pack:
                first = inside * self.seq_len + 1
                new = np.searchsorted(starts, [first, first + self.seq_len])
                total += self.seq_len - int(new[1] - new[0])
            else:
                total += min(int(starts[inside + 1] - starts[inside]) - 1, self.seq_len)
        return total

    def batch(self, rows: list[int | None], index: list[int], trim: bool = False) -> Batch:
        """The rows as a batch, None as filler; `trim` cuts the width to the longest row."""
        read = [np.empty(0, np.int64) if row is None else self.read(row) for row in rows]
        width = max((len(r) for r in read), default=0) if trim else self.seq_len + 1
        tokens = np.full((len(rows), max(width, 2)), self.pad, np.int64)
        targets = np.full_like(tokens, IGNORE)
        for i, row in enumerate(read):
            tokens[i, : len(row)] = targets[i, : len(row)] = row
        targets[targets == self.bos] = IGNORE
        x, y = tokens[:, :-1].copy(), targets[:, 1:].copy()
        batch = Batch(torch.from_numpy(x), torch.from_numpy(y), torch.tensor(index, dtype=torch.int64))
        if self.mask_documents:
            documents = np.cumsum(x == self.bos, axis=1)
            place = np.arange(x.shape[1])
            begin = np.maximum.accumulate(np.where(x == self.bos, place, 0), axis=1)
            batch.documents, batch.positions = torch.from_numpy(documents), torch.from_numpy(place - begin)
        return batch


class Order:
    """A permutation of 0..n-1 for each epoch: a keyed Feistel network with cycle walking.

    Integer arithmetic of our own, since no library promises the same random stream across its versions.
    """

    ROUNDS = 6

    def __init__(self, seed: int, n: int) -> None:
        self.seed, self.n = seed, n
        self.half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the endless sequence of epochs -> rows."""
        epoch, x = np.divmod(positions.astype(np.uint64), np.uint64(self.n))
        x = self._cipher(x, epoch)
        while (out := x >= self.n).any():
            x[out] = self._cipher(x[out], epoch[out])
        return x.astype(np.int64)

    def _cipher(self, x: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        left, right = x >> half, x & mask
        for number in range(self.ROUNDS):
            key = mix64(epoch ^ mix64(np.full_like(epoch, (self.seed * self.ROUNDS + number) & (2**64 - 1))))
            left, right = right, left ^ (mix64(right ^ key) & mask)
        return (left << half) | right


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch of G rows falls on W ranks."""

    global_batch_size: int
    micro_batch_size: int  # at most; what is used is `rows`
    world: int = 1

    @property
    def micro_batches(self) -> int:
        """Micro-batches a step, the same on every rank."""
        return -(-self._most // self.micro_batch_size)

    @property
    def rows(self) -> int:
        """Rows in each micro-batch, filler included."""
        return -(-self._most // self.micro_batches)

    @property
    def filler(self) -> int:
        """Filler rows a step, over all ranks."""
        return self.rows * self.micro_batches * self.world - self.global_batch_size

    @property
    def _most(self) -> int:
        return -(-self.global_batch_size // self.world)

    def of(self, rank: int) -> list[list[int | None]]:
        """Places in the global batch that `rank` takes, by micro-batch; None is filler."""
        size, world = self.global_batch_size, self.world
        mine: list[int | None] = list(range(rank * size // world, (rank + 1) * size // world))
        mine += [None] * (self.rows * self.micro_batches - len(mine))
        return [mine[i : i + self.rows] for i in range(0, len(mine), self.rows)]


class Loader:
    """The steps of a run for one rank."""

    def __init__(
        self, rows: Rows, share: BatchLayout, seed: int, rank: int = 0, workers: int = 1, pin: bool = False
    ) -> None:
        """Raises UserError when the split holds less than one global batch."""
        if len(rows) < share.global_batch_size:
            raise UserError(
                f"train.global_batch_size={share.global_batch_size}: the corpus holds {len(rows)} rows of "
                f"data.seq_len={rows.seq_len}, less than one step; take a smaller batch or row, or more stories"
            )
        self.rows, self.share, self.rank = rows, share, rank
        self.order = Order(seed, len(rows))
        self.workers, self.pin = workers, pin

    def step(self, step: int) -> Step:
        """This rank's part of `step` (from 0)."""
        size = self.share.global_batch_size
        chosen = self.order(np.arange(step * size, (step + 1) * size))
        batches = []
        for places in self.share.of(self.rank):
            rows = [None if p is None else int(chosen[p]) for p in places]
            batches.append(self.rows.batch(rows, [size if p is None else p for p in places]))
        if self.pin:
            for batch in batches:
                for name, value in vars(batch).items():
                    setattr(batch, name, None if value is None else value.pin_memory())
        return Step(batches, self.rows.real_tokens(chosen))

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Steps start..stop-1, prepared ahead by `workers` threads."""
        if self.workers == 0:
            yield from map(self.step, range(start, stop))
            return
        ahead: deque[Future[Step]] = deque()
        with ThreadPoolExecutor(self.workers, "loader") as pool:
            try:
                for step in range(start, stop + self.workers + 1):
                    if step < stop:
                        ahead.append(pool.submit(self.step, step))
                    if step > start + self.workers and ahead:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()


def training_rows(split: Split, config: DataConfig, bos: int, pad: int) -> Rows:
    """The rows that the `data` section asks for."""
    return Rows(split, config.seq_len, config.pack, bos, pad, config.mask_documents)


def story_rows(split: Split, seq_len: int, bos: int, pad: int) -> Rows:
    """Whole stories one a row, as evaluation takes them."""
    return Rows(split, seq_len, False, bos, pad)

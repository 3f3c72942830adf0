"""Shards -> batches, by arithmetic alone: a batch is a pure function of (seed, step, rank, world).

The training loop takes the batches of each step from a `Loader`, which combines these parts:

1. `Rows` cuts a split into rows of S + 1 tokens: stories concatenated, or one story per row.
2. `Order` permutes the rows of each epoch. It has no state, so a run needs only its step to resume.
3. The global batch of a step is the next G rows in that order; rank r gets rows [r G // W, (r + 1) G // W) of it.
4. `BatchLayout` splits the rows of each rank into equally many micro-batches of equal size. Padding rows, whose targets
   are all IGNORE, fill the last ones.
5. Threads prepare the following steps while the model computes the current one.

A *real token* is a token whose target is not IGNORE. Only real tokens enter the loss.

Letters: B rows of a micro-batch, S tokens per row, G rows of a global batch, W ranks.
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

IGNORE = -100  # the target of a token that does not enter the loss


@dataclass
class Batch:
    """A micro-batch: B rows of S tokens."""

    tokens: Tensor  # (B, S) int64
    targets: Tensor  # (B, S) int64; IGNORE after the end of a story and in padding rows
    index: Tensor  # (B,) int64: position in the global batch, from which random numbers are derived
    positions: Tensor | None = None  # (B, S) int64, counted from the start of each story; only with mask_documents
    documents: Tensor | None = None  # (B, S) int64: the number of the story in its row; only with mask_documents

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`, without waiting for the copy."""
        positions, documents = self.positions, self.documents
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.index.to(device, non_blocking=True),
            None if positions is None else positions.to(device, non_blocking=True),
            None if documents is None else documents.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory, from which copies to a GPU are asynchronous."""
        positions, documents = self.positions, self.documents
        return Batch(
            self.tokens.pin_memory(),
            self.targets.pin_memory(),
            self.index.pin_memory(),
            None if positions is None else positions.pin_memory(),
            None if documents is None else documents.pin_memory(),
        )


@dataclass
class Step:
    """The micro-batches of one rank in an optimizer step."""

    micro_batches: list[Batch]
    real_tokens: int  # of the *global* batch, over all ranks


class Rows:
    """The rows of a split: with `pack` they are filled with concatenated stories, else each holds one story."""

    def __init__(
        self, split: Split, seq_len: int, pack: bool, bos: int, pad: int, mask_documents: bool = False
    ) -> None:
        self.split, self.seq_len, self.pack = split, seq_len, pack
        self.bos, self.pad, self.mask_documents = bos, pad, mask_documents
        if pack:
            rows_per_shard = [max(0, (shard.tokens - 1) // seq_len) for shard in split.shards]
        else:
            rows_per_shard = [shard.documents for shard in split.shards]
        self._first_rows = np.concatenate([[0], np.cumsum(rows_per_shard, dtype=np.int64)])  # of each shard

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def _locate(self, row: int) -> tuple[int, int]:
        """Row of the split -> (shard, row inside the shard)."""
        shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return shard, int(row - self._first_rows[shard])

    def read(self, row: int) -> np.ndarray:
        """Tokens of a row: (S + 1,), or fewer if the row holds one story that is shorter."""
        number, row_in_shard = self._locate(row)
        shard = self.split.shard(number)
        if self.pack:
            start = row_in_shard * self.seq_len
            return shard.tokens[start : start + self.seq_len + 1]
        start, end = int(shard.starts[row_in_shard]), int(shard.starts[row_in_shard + 1])
        return shard.tokens[start : min(start + self.seq_len + 1, end)]

    def real_tokens(self, rows: np.ndarray) -> int:
        """The number of real tokens in these rows. The target of a token before the next story is bos, thus IGNORE."""
        total = 0
        for row in rows.tolist():
            number, row_in_shard = self._locate(row)
            starts = self.split.shard(number).starts
            if self.pack:
                first_target = row_in_shard * self.seq_len + 1
                first_bos, end_bos = np.searchsorted(starts, [first_target, first_target + self.seq_len])
                total += self.seq_len - int(end_bos - first_bos)
            else:
                total += min(int(starts[row_in_shard + 1] - starts[row_in_shard]) - 1, self.seq_len)
        return total

    def batch(self, rows: list[int | None], index: list[int], trim: bool = False) -> Batch:
        """The rows as a batch; None is a padding row. `trim` cuts the width to the longest row."""
        row_tokens = [np.empty(0, np.int64) if row is None else self.read(row) for row in rows]
        width = max((len(r) for r in row_tokens), default=0) if trim else self.seq_len + 1
        tokens = np.full((len(rows), max(width, 2)), self.pad, np.int64)
        targets = np.full_like(tokens, IGNORE)
        for i, row in enumerate(row_tokens):
            tokens[i, : len(row)] = row
            targets[i, : len(row)] = row
        targets[targets == self.bos] = IGNORE
        inputs, targets = tokens[:, :-1].copy(), targets[:, 1:].copy()
        batch = Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.tensor(index, dtype=torch.int64))
        if self.mask_documents:
            is_bos = inputs == self.bos
            column = np.arange(inputs.shape[1])
            story_start = np.maximum.accumulate(np.where(is_bos, column, 0), axis=1)
            batch.documents = torch.from_numpy(np.cumsum(is_bos, axis=1))
            batch.positions = torch.from_numpy(column - story_start)
        return batch


class Order:
    """A permutation of 0..n-1 for each epoch: a keyed Feistel network with cycle walking.

    It uses its own integer arithmetic, because no library promises the same random stream in all its versions.
    """

    ROUNDS = 6

    def __init__(self, seed: int, n: int) -> None:
        self.seed, self.n = seed, n
        self.half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the endless sequence of epochs -> rows."""
        epoch, x = np.divmod(positions.astype(np.uint64), np.uint64(self.n))
        x = self._cipher(x, epoch)
        while (outside := x >= self.n).any():
            x[outside] = self._cipher(x[outside], epoch[outside])
        return x.astype(np.int64)

    def _cipher(self, x: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        half_bits, mask = np.uint64(self.half_bits), np.uint64((1 << self.half_bits) - 1)
        left, right = x >> half_bits, x & mask
        for number in range(self.ROUNDS):
            key = mix64(epoch ^ mix64(np.full_like(epoch, (self.seed * self.ROUNDS + number) & (2**64 - 1))))
            left, right = right, left ^ (mix64(right ^ key) & mask)
        return (left << half_bits) | right


@dataclass(frozen=True)
class BatchLayout:
    """How the G rows of a global batch are distributed over W ranks and their micro-batches."""

    global_batch_size: int
    micro_batch_size: int  # an upper limit; the size that is used is `rows`
    world: int = 1

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step, the same on every rank."""
        return -(-self._max_rows_per_rank // self.micro_batch_size)

    @property
    def rows(self) -> int:
        """Rows per micro-batch, padding included."""
        return -(-self._max_rows_per_rank // self.micro_batches)

    @property
    def padding_rows(self) -> int:
        """Padding rows per step, over all ranks."""
        return self.rows * self.micro_batches * self.world - self.global_batch_size

    @property
    def _max_rows_per_rank(self) -> int:
        return -(-self.global_batch_size // self.world)

    def indices(self, rank: int) -> list[list[int | None]]:
        """For each micro-batch of `rank` the positions of its rows in the global batch; None is a padding row."""
        size, world = self.global_batch_size, self.world
        rows: list[int | None] = list(range(rank * size // world, (rank + 1) * size // world))
        rows += [None] * (self.rows * self.micro_batches - len(rows))
        return [rows[i : i + self.rows] for i in range(0, len(rows), self.rows)]


class Loader:
    """The steps of a run for one rank."""

    def __init__(
        self, rows: Rows, layout: BatchLayout, seed: int, rank: int = 0, workers: int = 1, pin: bool = False
    ) -> None:
        """Raises UserError if the split holds less than one global batch."""
        if len(rows) < layout.global_batch_size:
            raise UserError(
                f"train.global_batch_size={layout.global_batch_size}: the corpus holds {len(rows)} rows of "
                f"data.seq_len={rows.seq_len}, fewer than one step needs; use a smaller batch, shorter rows or more "
                "stories"
            )
        self.rows, self.layout, self.rank = rows, layout, rank
        self.order = Order(seed, len(rows))
        self.workers, self.pin = workers, pin

    def step(self, step: int) -> Step:
        """The micro-batches of this rank in `step`, which is counted from 0."""
        size = self.layout.global_batch_size
        global_batch = self.order(np.arange(step * size, (step + 1) * size))
        batches = []
        for indices in self.layout.indices(self.rank):
            rows = [None if i is None else int(global_batch[i]) for i in indices]
            batch = self.rows.batch(rows, [size if i is None else i for i in indices])
            batches.append(batch.pin_memory() if self.pin else batch)
        return Step(batches, self.rows.real_tokens(global_batch))

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Steps start..stop-1, prepared in advance by `workers` threads."""
        if self.workers == 0:
            yield from map(self.step, range(start, stop))
            return
        in_progress: deque[Future[Step]] = deque()
        with ThreadPoolExecutor(self.workers, "loader") as pool:
            try:
                for step in range(start, stop):
                    in_progress.append(pool.submit(self.step, step))
                    if len(in_progress) > self.workers + 1:
                        yield in_progress.popleft().result()
                while in_progress:
                    yield in_progress.popleft().result()
            finally:
                for future in in_progress:
                    future.cancel()


def training_rows(split: Split, config: DataConfig, bos: int, pad: int) -> Rows:
    """The rows that the `data` section describes."""
    return Rows(split, config.seq_len, config.pack, bos, pad, config.mask_documents)


def story_rows(split: Split, seq_len: int, bos: int, pad: int) -> Rows:
    """One whole story per row, as evaluation needs them."""
    return Rows(split, seq_len, False, bos, pad)

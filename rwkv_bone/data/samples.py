"""From documents to batches of (idx, targets), -100 where there is no loss.

A sample is one row: some pieces of the token stream. A piece of T inputs reads T + 1 tokens x_0 .. x_T: idx = x_0 .. x_{T-1},
targets = x_1 .. x_T where these are trained. Ways to cut documents (`--dataload`):

    pad     a document, cut to ctx_len + 1 tokens
    only    the same, one a batch, never padded
    chunk   every document in consecutive pieces of ctx_len; a piece begins with the token that the one before ended with, so
            each token (but a document's first) is predicted once
    pack    such pieces, several in one row. Before each but the first lies one separator slot (idx 0, no target), and
            `reset` is true at each piece's first token: there the model begins with an empty state
    get     RWKV-LM's slices of the stream, across documents, in its order: with N = tokens // ctx_len slots and P the largest
            prime <= N - 1 that is 2 mod 3, sample i = 1, 2, ... reads at slot (int(P (sqrt 5 - 1) / 2) i^3) mod P. As cubing is
            one to one modulo such a P, an epoch of P samples meets every slot < P once.

Padding is on the right, idx 0 and target -100: it changes no loss. Token 0 inside a document is a token like others.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UserError
from ..terminal import counted
from .documents import Documents

DATALOADS = ("pad", "only", "chunk", "pack", "get")
EMPTY = -1  # the sample that fills up where samples do not divide among devices: no token, no target
BLOCK = 1 << 22  # tokens whose masks are counted at once
ROUND = 16  # rows are padded to the longest of the batch, rounded up to a multiple of this


class Row(NamedTuple):
    idx: np.ndarray  # int64 (T,)
    targets: np.ndarray  # int64 (T,), -100 where there is no loss
    firsts: np.ndarray  # places in the row where a piece begins
    tokens: int  # T without separators


class Samples:
    """The rows of one epoch: `len(samples)`, `samples[i]` -> Row, `samples[EMPTY]` -> a row without slots.

    lengths  int64 (n,), slots of each row
    tokens   int64 (n,), of these the real tokens;   trained   int64 (n,), those with a loss
    cut      tokens that no row predicts;   cut_documents   documents that lose some at --ctx_len
    too_short   documents of less than two tokens, which have nothing to predict
    """

    def __init__(self, documents: Documents, dataload: str = "pad", ctx_len: int = 512):
        if dataload not in DATALOADS:
            raise UserError(f"--dataload {dataload} is not known; choose from {', '.join(DATALOADS)}")
        if ctx_len < 1:
            raise UserError(f"--ctx_len {ctx_len}: at least 1")
        self.documents, self.dataload, self.ctx_len = documents, dataload, ctx_len
        inputs = documents.sizes - 1  # tokens that have a successor
        self.too_short = int(np.count_nonzero(inputs < 1))
        starts, inputs = documents.starts[inputs >= 1], inputs[inputs >= 1]
        self.cut, self.cut_documents, row_of = 0, 0, None
        if dataload == "get":
            self.begin = magic_slots(len(documents.tokens), ctx_len) * ctx_len
            self.length = np.full(len(self.begin), ctx_len)
            self.cut = len(documents.tokens) - 1 - len(self.begin) * ctx_len
        elif dataload in ("pad", "only"):
            self.begin, self.length = starts, np.minimum(inputs, ctx_len)
            self.cut, self.cut_documents = int((inputs - self.length).sum()), int(np.count_nonzero(inputs > self.length))
        else:
            self.begin, self.length = _chunks(starts, inputs, ctx_len)
            if dataload == "pack":
                row_of = pack(self.length, ctx_len)
                order = np.argsort(row_of, kind="stable")
                self.begin, self.length, row_of = self.begin[order], self.length[order], row_of[order]
        n_pieces = len(self.begin)
        self.row = np.arange(n_pieces + 1) if row_of is None else np.flatnonzero(np.diff(row_of, prepend=-1, append=n_pieces))
        trained = self.length
        if documents.mask is not None:  # the targets of a piece are one token later than its inputs
            trained = ones_between(documents.mask, self.begin + 1, self.begin + 1 + self.length)
        if n_pieces == 0 or not trained.any():
            masked = f"the mask leaves out every token that fits into --ctx_len {ctx_len}; {self.cure()}"
            raise UserError(f"{documents.name}: nothing to train, {masked if n_pieces else 'no document has two tokens'}")
        self.tokens = np.add.reduceat(self.length, self.row[:-1])
        self.trained = np.add.reduceat(trained, self.row[:-1])
        self.lengths = self.tokens + np.diff(self.row) - 1

    def cure(self) -> str:
        """What to do where samples hold no trained token."""
        longer = "a larger --ctx_len, --dataload chunk, or " if self.dataload in ("pad", "only") else ""
        return f"give {longer}--loss_mask all"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Row:
        pieces = range(self.row[i], self.row[i + 1]) if i != EMPTY else ()
        total = int(self.lengths[i]) if i != EMPTY else 0
        idx, targets = np.zeros(total, np.int64), np.full(total, -100, np.int64)
        firsts, at, real = [], 0, 0
        for piece in pieces:
            T = int(self.length[piece])
            tokens, trained = self.documents.span(int(self.begin[piece]), T + 1)
            idx[at : at + T] = tokens[:-1]
            targets[at : at + T] = np.where(trained[1:], tokens[1:], -100)
            firsts.append(at)
            at += T + 1  # a separator follows, unless the row ends
            real += T
        return Row(idx, targets, np.array(firsts, np.int64), real)


def ones_between(mask: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """int64 (n,): how many entries of `mask` (0 or 1) are 1 in each begin <= i < end; block by block, for a mask may be large."""
    counts, before = np.zeros(len(begin), np.int64), 0
    begin_order, end_order = np.argsort(begin, kind="stable"), np.argsort(end, kind="stable")
    sorted_begin, sorted_end = begin[begin_order], end[end_order]
    for lo in range(0, len(mask) + 1, BLOCK):
        sums = np.concatenate([[0], np.cumsum(mask[lo : lo + BLOCK], dtype=np.int64)]) + before  # ones before lo, lo + 1, ...
        before = sums[-1]
        for order, places, sign in ((begin_order, sorted_begin, -1), (end_order, sorted_end, 1)):
            here = slice(*np.searchsorted(places, [lo, lo + BLOCK]))
            counts[order[here]] += sign * sums[places[here] - lo]
    return counts


def _chunks(starts: np.ndarray, inputs: np.ndarray, ctx_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of `inputs` inputs -> begin and length of all their pieces, in order."""
    count = -(-inputs // ctx_len)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)  # of the piece in its document
    return np.repeat(starts, count) + number * ctx_len, np.minimum(np.repeat(inputs, count) - number * ctx_len, ctx_len)


def pack(lengths: np.ndarray, ctx_len: int) -> np.ndarray:
    """For each piece its row, so that a row's pieces and the separators between them fill at most ctx_len slots.

    Best fit, longest first: each piece goes where it leaves the least room. Rows are numbered as they are begun.
    """
    rows_by_room: list[list[int]] = [[] for _ in range(ctx_len + 2)]  # with one slot more, each piece brings its own separator
    some = 0  # bit k: there is a row with room k
    row_of, n_rows = np.empty(len(lengths), np.int64), 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[piece]) + 1
        fitting = some >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                some ^= 1 << room
        else:
            room, row = ctx_len + 1, n_rows
            n_rows += 1
        row_of[piece] = row
        if room > need:
            rows_by_room[room - need].append(row)
            some |= 1 << (room - need)
    return row_of


def magic_prime(n_tokens: int, ctx_len: int) -> int:
    """The largest prime that is 2 mod 3 and at most n_tokens // ctx_len - 1."""
    n = n_tokens // ctx_len - 1
    if n < 2:
        raise UserError(f"--dataload get needs 3 x ctx_len tokens, got {n_tokens} for ctx_len {ctx_len}; lower it, or take chunk")
    while not (n % 3 == 2 and all(n % d for d in range(2, math.isqrt(n) + 1))):
        n -= 1
    return n


def magic_slots(n_tokens: int, ctx_len: int) -> np.ndarray:
    """int64 (P,): the slots that samples i = 1 .. P of an epoch read."""
    P = magic_prime(n_tokens, ctx_len)
    assert P < 1 << 31  # products of two residues fit into int64
    i = np.arange(1, P + 1, dtype=np.int64) % P
    factor = int(P * ((math.sqrt(5) - 1) / 2))
    return i * i % P * i % P * factor % P


def padded_length(longest, round_to: int, ctx_len: int):
    """Slots of a row in a batch whose longest row has `longest` (a number or an array): rounded up, but not beyond ctx_len."""
    rounded = -(-np.maximum(longest, 1) // round_to) * round_to
    return np.maximum(np.minimum(rounded, ctx_len), longest)


def collate(rows: list[Row], ctx_len: int, round_to: int = ROUND, with_reset: bool = False) -> dict[str, torch.Tensor]:
    """Rows -> a batch, padded on the right to `padded_length`.

    idx      int64 (B, T), 0 where there is padding;   targets   int64 (B, T), -100 where there is no loss
    tokens   int64 (), real tokens in the batch
    reset    bool (B, T), only with_reset: true at the first token of each piece
    """
    T = int(padded_length(max(len(row.idx) for row in rows), round_to, ctx_len))
    idx, targets = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), -100, np.int64)
    reset = np.zeros((len(rows), T), bool)
    for b, row in enumerate(rows):
        idx[b, : len(row.idx)] = row.idx
        targets[b, : len(row.idx)] = row.targets
        reset[b, row.firsts] = True
    batch = {"idx": idx, "targets": targets, "reset": reset} if with_reset else {"idx": idx, "targets": targets}
    return {name: torch.from_numpy(array) for name, array in batch.items()} | {
        "tokens": torch.tensor(sum(row.tokens for row in rows))
    }


class BatchSampler:
    """Which samples make each batch of one device, by arithmetic alone: any batch of any epoch at once.

    An epoch's order is a shuffle by (seed, epoch), the same on every device. Of it, place p is sample p // world_size of
    device p % world_size; where samples do not divide, the last places are EMPTY. So devices have disjoint samples, equally
    many batches of equal sizes (the last may be short), and together every sample once.
    """

    def __init__(self, n: int, micro_bsz: int, rank: int = 0, world_size: int = 1, seed: int = 0, shuffle: bool = True):
        if micro_bsz < 1:
            raise UserError(f"--micro_bsz {micro_bsz}: at least 1")
        assert n > 0 and 0 <= rank < world_size and seed >= 0
        self.n, self.micro_bsz, self.rank, self.world_size = n, micro_bsz, rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.samples_per_device = -(-n // world_size)
        self.batches_per_epoch = -(-self.samples_per_device // micro_bsz)
        self._order: tuple[int, np.ndarray] | None = None  # epoch, order

    def order(self, epoch: int) -> np.ndarray:
        """int64 (samples_per_device * world_size,): all samples of the epoch and what fills up."""
        if self._order is None or self._order[0] != epoch:
            order = np.full(self.samples_per_device * self.world_size, EMPTY, np.int64)
            # RandomState: numpy promises that its streams never change, so a resumed run meets the same order
            generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
            order[: self.n] = generator.permutation(self.n) if self.shuffle else np.arange(self.n)
            self._order = (epoch, order)
        return self._order[1]

    def batch(self, epoch: int, number: int) -> list[int]:
        """Samples of this device in batch `number` of the epoch."""
        assert 0 <= number < self.batches_per_epoch
        mine = self.order(epoch)[self.rank :: self.world_size]
        return mine[number * self.micro_bsz : (number + 1) * self.micro_bsz].tolist()


@dataclass(frozen=True)
class Summary:
    """One epoch, over all devices."""

    name: str
    dataload: str
    documents: int
    tokens: int  # in the documents
    longest: int  # document, in tokens
    rows: list[str]  # lines about rows of the files: left out, changed, fields not read
    too_short: int  # documents with nothing to predict
    samples: int
    slots: int  # of all batches, padding and separators among them
    inputs: int  # slots with a real token
    trained: int  # tokens with a loss
    untrained_samples: int  # samples without any
    cut: int  # tokens of the documents that no sample predicts
    cut_documents: int  # documents cut to ctx_len
    batches: int  # a device

    @property
    def padding(self) -> float:
        """Share of the slots without a real token."""
        return 1 - self.inputs / self.slots

    def lines(self) -> list[str]:
        """For people."""
        short = f"; left out: {counted(self.too_short, 'document')} of a single token" if self.too_short else ""
        of = f" of {counted(self.cut_documents, 'document')}" if self.cut_documents else ""
        lines = [
            f"{self.name}: {counted(self.documents, 'document')}, {counted(self.tokens, 'token')}, "
            f"longest {self.longest:,}{short}",
            *self.rows,
            f"{counted(self.samples, 'sample')} (--dataload {self.dataload}), {counted(self.batches, 'batch', 'es')} a device, "
            f"padding {self.padding:.1%}, cut {counted(self.cut, 'token')}{of} ({self.cut / max(self.tokens, 1):.1%})",
            f"{counted(self.trained, 'token')} trained, {self.trained / self.inputs:.1%} of the {self.inputs:,} read",
        ]
        if self.cut > 0.05 * self.tokens:
            cure = f"--ctx_len {self.longest} takes the longest whole" + ", --dataload chunk cuts none" * (self.dataload == "pad")
            lines.append(f"warning: {self.cut / self.tokens:.0%} of the tokens are cut off: {cure}")
        if self.untrained_samples:
            why = "their answers lie beyond --ctx_len" if self.dataload in ("pad", "only") else "pieces of questions alone"
            lines.append(f"{counted(self.untrained_samples, 'sample')} with no trained token ({why}?)")
        return lines


def summary_of(samples: Samples, sampler: BatchSampler, round_to: int = ROUND) -> Summary:
    """Counts of the first epoch."""
    documents = samples.documents
    lengths = np.append(samples.lengths, 0)[sampler.order(0)].reshape(-1, sampler.world_size)  # (samples, devices)
    firsts = np.arange(0, len(lengths), min(sampler.micro_bsz, len(lengths)))  # of each batch
    sizes = np.diff(firsts, append=len(lengths))
    slots = int(padded_length(np.maximum.reduceat(lengths, firsts), round_to, samples.ctx_len).sum(1) @ sizes)
    return Summary(
        name=documents.name,
        dataload=samples.dataload,
        documents=len(documents),
        tokens=documents.total_tokens,
        longest=int(documents.sizes.max()),
        rows=documents.tally.lines(),
        too_short=samples.too_short,
        samples=len(samples),
        slots=slots,
        inputs=int(samples.tokens.sum()),
        trained=int(samples.trained.sum()),
        untrained_samples=int(np.count_nonzero(samples.trained == 0)),
        cut=samples.cut,
        cut_documents=samples.cut_documents,
        batches=sampler.batches_per_epoch,
    )

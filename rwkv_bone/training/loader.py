"""A run's data: documents cut into samples once, and which micro batches each step takes, from any step on."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from ..config import TrainConfig
from ..data.documents import Documents, data_of, open_documents
from ..data.encode import parse_fields
from ..data.marks import between_marks
from ..data.samples import ROUND, BatchSampler, Samples, collate, padded_length, summary_of
from ..data.templates import Template
from ..data.tokenizer import Tokenizer, open_tokenizer
from ..errors import UserError
from ..models import LanguageModel
from ..terminal import counted
from .show import show_document

Micro = dict[str, Tensor]


def split(documents: Documents, share: float) -> tuple[Documents, Documents]:
    """Hold `share` of the documents out, at even distances: those to train on, and those held out."""
    n = len(documents)
    held = np.unique(np.linspace(0, n - 1, max(1, round(share * n))).astype(np.int64))
    if len(held) == n:
        raise UserError(f"--val_split {share} of {counted(n, 'document')} leaves none to train on")
    return some_of(documents, np.setdiff1d(np.arange(n), held)), some_of(documents, held)


def some_of(documents: Documents, which) -> Documents:
    starts, sizes = documents.starts[which], documents.sizes[which]
    return Documents(documents.tokens, starts, sizes, documents.mask, documents.name, documents.tally)


def rows_of(documents: Documents, rows: str) -> Documents:
    """The documents FIRST:LAST (either may be left out), counted from 0 up to LAST without it."""
    first, _, last = rows.partition(":")
    chosen = some_of(documents, slice(int(first or 0), int(last) if last else None))
    if not len(chosen):
        raise UserError(f"--data_rows {rows} of {counted(len(documents), 'document')} leaves none to train on")
    return chosen


def marked(documents: Documents, begin: list[int], end: list[int]) -> np.ndarray:
    """The mask of documents that are trained from one mark's tokens up to the other's."""
    mask = np.zeros(len(documents.tokens), np.uint8)
    for start, size in zip(documents.starts, documents.sizes):
        mask[start : start + size] = between_marks(documents.tokens[start : start + size], begin, end)
    return mask


class Epochs:
    """Batches of samples on one device, by arithmetic alone: any batch of any epoch at once."""

    def __init__(self, samples: Any, sampler: BatchSampler, collate: Callable[[list], Micro]):
        self.samples, self.sampler, self.collate = samples, sampler, collate

    def __len__(self) -> int:
        return self.sampler.batches_per_epoch

    def batch(self, epoch: int, number: int) -> Micro:
        return self.collate([self.samples[i] for i in self.sampler.batch(epoch, number)])


class TrainingData:
    """Samples, and how they make micro batches and steps. An objective with samples of its own gives these and a `collate`.

    samples     `len`, `[i]` -> a sample, `[EMPTY]` -> one without content, `lengths` and `trained` int64 (n,)
    collate     samples -> a micro batch, which holds "tokens", its number of real tokens
    held_out    the same of held-out data, or None
    """

    def __init__(self, config: TrainConfig, samples: Any, collate: Callable[[list], Micro], held_out: Any = None):
        self.config, self.samples, self.collate, self.held_out_samples = config, samples, collate, held_out
        self.round_to = ROUND
        self.shuffle = config.data_shuffle
        self.tokenizer: Tokenizer | None = None  # that the data are in; None: not known
        self.read_text = False  # whether it made tokens of text
        self.template: Template | None = None  # that made text of the rows; None where there are none
        self.documents: Documents | None = None
        self.lines: list[str] = []  # more that `describe` says
        self.cure = "give other data"

    @classmethod
    def of_documents(
        cls, documents: Documents, config: TrainConfig, validation: Documents | None = None
    ) -> "TrainingData":
        if config.dataload == "only" and config.micro_bsz != 1:
            cure = "say 1, or --dataload pad"
            raise UserError(f"--dataload only takes one document a batch, not --micro_bsz {config.micro_bsz}; {cure}")
        samples = Samples(documents, config.dataload, config.ctx_len)
        round_to = 1 if config.dataload == "only" else ROUND

        def make(rows) -> Micro:
            return collate(rows, config.ctx_len, round_to, with_reset=config.dataload == "pack")

        held_out = None if validation is None else Samples(validation, "chunk", config.ctx_len)
        data = cls(config, samples, make, held_out)
        data.round_to, data.documents, data.cure = round_to, documents, samples.cure()
        data.shuffle = config.data_shuffle and config.dataload != "get"  # whose order is its own
        if validation is not None:
            data.lines.append(f"validation on {counted(len(validation), 'document')}, {validation.total_tokens:,} tokens")
        return data

    @classmethod
    def open(cls, config: TrainConfig, model: LanguageModel) -> "TrainingData":
        """Open --data_file with the tokenizer it needs; every token is checked against the vocabulary."""
        if config.dataload == "pack" and (why := model.cannot("pack")):
            raise UserError(f"--dataload pack: {why}; use --dataload pad")
        vocab_size = model.sizes.vocab_size
        kind = data_of(config.data_file, config.data_type)[1]
        if kind != "jsonl" and (config.fields or config.template or config.format != "auto"):
            raise UserError(f"--fields, --template and --format are for rows, and {config.data_file} is {kind}")
        template = Template.open(config.template) if config.template else Template.of_model(model.text, model.template)
        tokenizer: Tokenizer | None = None
        needed = kind in ("jsonl", "utf-8") or config.loss_mask == "marked"
        try:
            tokenizer = open_tokenizer(config.tokenizer, vocab_size, config.vocab_file or None, config.encoding, model.text)
        except UserError:
            if needed or config.tokenizer != "auto":
                raise
        options: dict[str, Any] = {
            "loss_mask": "all" if config.loss_mask in ("none", "marked") else config.loss_mask,
            "fields": parse_fields(config.fields),
            "template": template,
            "format": config.format,
        }

        def opened(path: str) -> Documents:
            documents = open_documents(path, config.data_type, tokenizer, vocab_size, **options)
            if config.loss_mask == "marked":
                assert tokenizer is not None
                documents.mask = marked(documents, *map(tokenizer.encode, config.loss_marks))
            return documents

        documents = opened(config.data_file)
        if config.data_rows:
            documents = rows_of(documents, config.data_rows)
        validation = opened(config.val_file) if config.val_file else None
        if config.val_split:
            documents, validation = split(documents, config.val_split)
        data = cls.of_documents(documents, config, validation)
        data.tokenizer, data.read_text = tokenizer, needed
        data.template = template if kind == "jsonl" else None
        return data

    @property
    def asks(self) -> bool:
        """Whether the documents are questions of which only the answers are trained."""
        return self.template is not None and self.documents is not None and self.documents.mask is not None

    # ------------------------------------------------ steps

    def epochs(self, rank: int = 0, world: int = 1, seed: int = 0) -> Epochs:
        sampler = BatchSampler(len(self.samples), self.config.micro_bsz, rank, world, seed, self.shuffle)
        return Epochs(self.samples, sampler, self.collate)

    def micro_batches_per_epoch(self, world: int) -> int:
        """Of one device."""
        per_device = -(-len(self.samples) // world)
        return -(-per_device // self.config.micro_bsz)

    def steps_per_epoch(self, world: int) -> int:
        """Optimiser steps that an epoch takes on `world` devices."""
        c = self.config
        steps = -(-self.micro_batches_per_epoch(world) // c.accumulate_grad_batches)
        return c.epoch_steps if c.repeat_data and c.epoch_steps else min(steps, c.epoch_steps or steps)

    def places(self, step: int, world: int) -> list[tuple[int, int]]:
        """(pass over the data, number of the micro batch in it) of each micro batch of step `step`, from 0.

        Without a cap a step does not reach over the end of a pass. With --epoch_steps an epoch goes on where the last one ended.
        """
        c, n = self.config, self.micro_batches_per_epoch(world)
        per_pass = -(-n // c.accumulate_grad_batches)
        whole_pass, at = divmod(step, per_pass)
        first = at * c.accumulate_grad_batches
        return [(whole_pass, number) for number in range(first, min(first + c.accumulate_grad_batches, n))]

    def steps(self, rank: int, world: int, seed: int, first: int, last: int) -> Iterator[list[Micro]]:
        """The micro batches of steps `first` to `last` - 1 of the run, on one device."""
        epochs = self.epochs(rank, world, seed)
        return ([epochs.batch(*place) for place in self.places(step, world)] for step in range(first, last))

    def held_out(self, rank: int, world: int) -> Iterator[Micro] | None:
        """The held-out samples in whole, in order; None without any."""
        if self.held_out_samples is None:
            return None
        sampler = BatchSampler(len(self.held_out_samples), self.config.micro_bsz, rank, world, shuffle=False)
        batches = Epochs(self.held_out_samples, sampler, self.collate)
        return (batches.batch(0, number) for number in range(len(batches)))

    # ------------------------------------------------ what is known before the first step

    def unseen(self, world: int) -> int:
        """Samples that no step of the run meets."""
        c = self.config
        total = self.steps_per_epoch(world) * c.epoch_count
        per_pass = -(-self.micro_batches_per_epoch(world) // c.accumulate_grad_batches)
        met = total * c.accumulate_grad_batches * c.micro_bsz * world
        return 0 if total >= per_pass else max(0, len(self.samples) - met)

    def check_trained(self, world: int, seed: int) -> None:
        """UserError if no sample of the run, on all devices, holds anything to train.

        That some sample of the data does is known already; with --epoch_steps it need not be one that the run meets.
        """
        if not self.unseen(world):
            return
        trained = np.append(self.samples.trained, 0)  # the last is EMPTY's
        met = len(self.samples) - self.unseen(world)
        if not trained[self.epochs(0, world, seed).sampler.order(0)[:met]].any():
            steps = self.steps_per_epoch(world) * self.config.epoch_count
            raise UserError(
                f"{self.config.data_file}: nothing to train, none of the samples in {steps:,} steps holds a trained "
                f"token (--epoch_steps {self.config.epoch_steps}); {self.cure}"
            )

    def longest_row(self) -> int:
        """The most tokens of a row, padding counted."""
        return int(padded_length(self.samples.lengths.max(), self.round_to, self.config.ctx_len))

    def invariants(self) -> dict[str, Any]:
        """What a run that is resumed must find again."""
        tokens = {} if self.documents is None else {"tokens": self.documents.total_tokens}
        return {"samples": len(self.samples), **tokens, "trained tokens": int(self.samples.trained.sum())}

    def describe(self, world: int) -> list[str]:
        """Lines for people; UserError where it is known by now that nothing would be trained."""
        if self.config.random_seed >= 0 or not self.shuffle:  # else the order is drawn later
            self.check_trained(world, max(self.config.random_seed, 0))
        lines = []
        if self.documents is not None:
            lines += summary_of(self.samples, self.epochs(0, world).sampler, self.round_to).lines()
        if self.tokenizer is not None and self.read_text:
            lines.append(f"tokenizer: {self.tokenizer}")
        if self.config.epoch_steps > (steps := self.steps_per_epoch(world)):
            asked = f"--epoch_steps {self.config.epoch_steps}"
            lines.append(f"{asked} is more than the data hold: an epoch has {counted(steps, 'step')}; for more, --epoch_count")
        if unseen := self.unseen(world):
            lines.append(f"--epoch_steps {self.config.epoch_steps}: the run ends with {counted(unseen, 'sample')} unseen")
        return lines + self.lines

    def first_document(self) -> list[str]:
        """Lines with its text, what is trained marked; none where the tokenizer is not known."""
        return show_document(self.documents, self.tokenizer) if self.documents is not None and self.tokenizer is not None else []

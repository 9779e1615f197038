"""From the data room's batches to optimiser steps: which micro batches a step takes, from any step on."""

import contextlib
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..config import TrainConfig
from ..data.documents import Documents, data_of, open_documents
from ..data.encode import parse_fields
from ..data.samples import Batches, padded_length
from ..data.templates import Template
from ..data.tokenizer import Tokenizer, open_tokenizer
from ..errors import UserError
from .show import show_document


class Steps(Dataset):
    """Item i is the list of micro batches of optimiser step `first + i`, for one device."""

    def __init__(self, batches: Batches, first: int, last: int, per_epoch: int, accumulate: int):
        self.batches, self.first, self.last = batches, first, last
        self.per_epoch, self.accumulate = per_epoch, accumulate

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, i: int) -> list[dict]:
        if i >= len(self):
            raise IndexError(i)
        epoch, step = divmod(self.first + i, self.per_epoch)
        start = step * self.accumulate
        stop = min(start + self.accumulate, self.batches.sampler.batches_per_epoch)
        return [self.batches.batch(epoch, number) for number in range(start, stop)]


def make_tokenizer(config: TrainConfig, vocab_size: int) -> Tokenizer:
    return open_tokenizer(config.tokenizer, vocab_size, config.vocab_file or None, config.encoding)


def split(documents: Documents, share: float) -> tuple[Documents, Documents]:
    """Hold `share` of the documents out, at even distances: those to train on, and those held out."""
    n = len(documents)
    held = np.unique(np.linspace(0, n - 1, max(1, round(share * n))).astype(np.int64))
    if len(held) == n:
        raise UserError(f"--val_split {share} of {n} documents leaves none to train on")
    rest = np.setdiff1d(np.arange(n), held)
    trained_on, held_out = (
        Documents(documents.tokens, documents.starts[which], documents.sizes[which], documents.mask, documents.name)
        for which in (rest, held)
    )
    return trained_on, held_out


class TrainingData:
    """The documents of a run and how they are cut into samples, micro batches and steps."""

    def __init__(self, documents: Documents, config: TrainConfig, vocab_size: int = 0, validation: Documents | None = None):
        self.documents, self.config, self.vocab_size, self.validation = documents, config, vocab_size, validation
        self.samples = len(self.batches().samples)
        self.read_by: Tokenizer | None = None  # what made tokens of the text; None where the data are tokens
        self.template: Template | None = None  # what made texts of the rows; None where there are none
        if validation is not None:
            self.held_out(0, 1)  # refuses, before the first step, what holds nothing to measure

    @classmethod
    def open(cls, config: TrainConfig, vocab_size: int) -> "TrainingData":
        """Open --data_file with the tokenizer it needs; every token is checked against the vocabulary."""
        kind = data_of(config.data_file, config.data_type)[1]
        if kind != "jsonl" and (config.fields or config.template or config.format != "auto"):
            raise UserError(f"--fields, --template and --format are for jsonl, and {config.data_file} is none")
        tokenizer = make_tokenizer(config, vocab_size) if kind in ("jsonl", "utf-8") else None
        template = Template.open(config.template or "world")
        options: dict[str, Any] = {
            "loss_mask": "all" if config.loss_mask == "none" else config.loss_mask,
            "fields": parse_fields(config.fields),
            "template": template,
            "format": config.format,
        }
        documents = open_documents(config.data_file, config.data_type, tokenizer, vocab_size, **options)
        validation = None
        if config.val_file:
            validation = open_documents(config.val_file, config.data_type, tokenizer, vocab_size, **options)
        if config.val_split:
            documents, validation = split(documents, config.val_split)
        data = cls(documents, config, vocab_size, validation)
        data.read_by, data.template = tokenizer, template if kind == "jsonl" else None
        return data

    def held_out(self, rank: int, world: int) -> Batches:
        """The held-out documents in whole: chunks of ctx_len, in order."""
        c = self.config
        assert self.validation is not None
        return Batches(self.validation, "chunk", c.ctx_len, c.micro_bsz, rank, world, shuffle=False)

    def tokenizer(self) -> Tokenizer:
        return make_tokenizer(self.config, self.vocab_size)

    def batches(self, rank: int = 0, world: int = 1, seed: int = 0) -> Batches:
        c = self.config
        return Batches(self.documents, c.dataload, c.ctx_len, c.micro_bsz, rank, world, seed, c.data_shuffle)

    def steps_per_epoch(self, world: int) -> int:
        """Optimiser steps that an epoch takes on `world` devices."""
        per_device = -(-self.samples // world)
        micro_batches = -(-per_device // self.config.micro_bsz)
        steps = -(-micro_batches // self.config.accumulate_grad_batches)
        return min(steps, self.config.epoch_steps or steps)

    def loader(self, rank: int, world: int, seed: int, first: int, last: int) -> DataLoader:
        """Steps `first` to `last` - 1 of the run."""
        batches = self.batches(rank, world, seed)
        steps = Steps(batches, first, last, self.steps_per_epoch(world), self.config.accumulate_grad_batches)
        # a generator of its own: else beginning to iterate takes a number from those of dropout
        return DataLoader(steps, batch_size=None, num_workers=0, generator=torch.Generator())

    def check_trained(self, world: int, seed: int) -> None:
        """UserError if no sample of the run, on all devices and in all epochs, holds a trained token.

        That some sample of the data does is known already; with --epoch_steps it need not be one that the run meets.
        """
        c = self.config
        if not c.epoch_steps:
            return
        batches = self.batches(0, world, seed)
        trained = np.append(batches.samples.trained, 0)  # the last is EMPTY's
        steps = self.steps_per_epoch(world)
        met = steps * c.accumulate_grad_batches * c.micro_bsz * world  # the first so many places of an epoch's order
        if any(trained[batches.sampler.order(epoch)[:met]].any() for epoch in range(c.epoch_count)):
            return
        raise UserError(
            f"{self.documents.name}: nothing to train, none of the samples in {steps * c.epoch_count:,} steps holds a trained "
            f"token (--epoch_steps {c.epoch_steps}); {batches.samples.cure()}"
        )

    def longest_row(self) -> int:
        """The most tokens of a row, padding counted."""
        batches = self.batches()
        return int(padded_length(batches.samples.lengths.max(), batches.round_to, self.config.ctx_len))

    def describe(self, world: int) -> list[str]:
        """Lines for people; UserError where it is known by now that nothing would be trained."""
        if self.config.random_seed >= 0 or not self.config.data_shuffle:  # else the order is drawn later
            self.check_trained(world, max(self.config.random_seed, 0))
        lines = self.batches(0, world).summary().lines()
        if self.read_by is not None:
            lines.append(f"tokenizer: {self.read_by}")
        if self.config.dry_run:
            with contextlib.suppress(UserError):  # tokens, and no tokenizer is known that gave them
                lines += show_document(self.documents, self.read_by or self.tokenizer())
        steps, all_steps = self.steps_per_epoch(world), self.batches(0, world).sampler.batches_per_epoch
        if steps * self.config.accumulate_grad_batches < all_steps:
            lines.append(f"--epoch_steps {steps} ends each epoch before all of it was seen")
        if self.validation is not None:
            lines.append(f"validation on {len(self.validation):,} documents, {self.validation.total_tokens:,} tokens")
        return lines

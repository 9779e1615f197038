"""What the model answers to --sample_prompt: before the first step, every --sample_every steps, and at the end.

Each answer is a line of samples.jsonl, {"step", "prompt", "text"}; step 0 is before the first. Answers are greedy, so that two of
them differ by what was learnt alone; they take no random number, and change nothing of the training.
"""

from typing import Any, NamedTuple

import torch

from ..config import TrainConfig
from ..data.templates import Template
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..generate.chat import as_asked
from ..generate.sampling import GREEDY, generate
from ..models import LanguageModel
from .loader import TrainingData
from .outputs import RunFolder

TOKENS = 100  # the longest answer
FILE = "samples.jsonl"


class Sample(NamedTuple):
    """One answer."""

    step: int  # after which it was given
    prompt: str
    text: str


class Sampler:
    """Asks the prompts, in the training's own template where that has questions: only their answers are trained."""

    def __init__(self, prompts: tuple[str, ...], tokenizer: Tokenizer, template: Template | None):
        self.prompts, self.tokenizer, self.template = prompts, tokenizer, template

    @classmethod
    def of(cls, config: TrainConfig, data: TrainingData) -> "Sampler | None":
        """None where nothing is to be asked; UserError where the data's tokenizer is not known."""
        if not config.sample_prompt:
            return None
        if data.tokenizer is None:
            raise UserError("--sample_prompt: the data's tokenizer is not known; give --tokenizer")
        return cls(config.sample_prompt, data.tokenizer, data.template if data.asks else None)

    @torch.no_grad()
    def ask(self, model: LanguageModel, step: int) -> list[Sample]:
        """The model's answers. It is left in training mode."""
        texts: list[Any] = list(self.prompts)
        stops: tuple[str, ...] = ()
        if self.template is not None:
            texts, stops = as_asked(self.template, self.tokenizer, texts), self.template.stops
        model.eval()
        try:
            answers = generate(model, self.tokenizer, texts, GREEDY, TOKENS, stops)
        finally:
            model.train()
        return [Sample(step, prompt, answer.text.strip()) for prompt, answer in zip(self.prompts, answers)]


def read_samples(folder: RunFolder) -> list[Sample]:
    """All answers of a run so far, in order."""
    return [Sample(**line) for line in folder.lines(FILE)]


def first_and_last(samples: list[Sample]) -> list[tuple[str, str, str]]:
    """(prompt, answer before the first step, answer after the last) of each prompt that has both."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    return [(prompt, s[0].text, s[-1].text) for prompt, s in by_prompt.items() if s[0].step < s[-1].step]


def in_lines(samples: list[Sample]) -> str:
    """For the terminal."""
    return "\n".join(f"sample after step {s.step}: {one_line(s.prompt)}\n           {one_line(s.text)}" for s in samples)


def one_line(text: str, width: int = 85) -> str:
    """A text's words on one line, cut where it is longer than `width`."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return words if len(words) <= width else words[: width - 3] + "..."

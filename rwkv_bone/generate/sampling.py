"""Sampling: continue prompts, many at once, with a model.

    for completion in completions(model, tokenizer, prompts, GREEDY, max_tokens=100): ...

A model's memory is a state of fixed size, so a batch is rows of one state: prompts of any lengths are read without padding,
a finished row makes room for a waiting prompt, and text that many prompts share is read once. What a prompt gives does not
depend on the others: it draws from its own random numbers (on the same hardware; products of other shapes round differently,
which may tip a near tie).

Temperature, top-p and penalties are those of the `rwkv` package (PIPELINE_ARGS), in its order:
    logits[t] -= alpha_presence + alpha_frequency * count[t]     for each token t that was sampled before
    p = softmax(logits); tokens below the probability at which the sorted p first sum to top_p are dropped, then all but top_k
    p ** (1 / temperature), normalised, is sampled               (temperature 0: the largest logit)
    count *= alpha_decay, then count[t] += 1                     (of a lone space, tab or digit: += 0)
"""

import hashlib
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..models import LanguageModel, State
from ..models.base import join, select

TOKENS_AT_ONCE = 16384  # tokens of all prompts that one forward reads: bounds the memory of activations


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; the defaults are the `rwkv` package's."""

    temperature: float = 1.0
    top_p: float = 0.85
    top_k: int = 0  # 0: no such limit
    alpha_presence: float = 0.2
    alpha_frequency: float = 0.2
    alpha_decay: float = 0.996

    def __post_init__(self):
        for f in fields(self):
            value, top = getattr(self, f.name), 1 if f.name in ("top_p", "alpha_decay") else math.inf
            low = -math.inf if f.name in ("alpha_presence", "alpha_frequency") else 0
            if not (low <= value <= top and math.isfinite(value)):
                wanted = "a number" if low < 0 else f"from 0 to {top}" if top == 1 else "at least 0"
                raise UserError(f"--{f.name} must be {wanted}, not {value}")

    @property
    def penalises(self) -> bool:
        return self.alpha_presence != 0 or self.alpha_frequency != 0


DEFAULT = Sampling()
GREEDY = Sampling(temperature=0, alpha_presence=0, alpha_frequency=0)


@dataclass(frozen=True)
class Completion:
    """What one prompt gave."""

    index: int  # of the prompt
    text: str  # without the stop string
    tokens: list[int]  # as sampled, without the end of document
    reason: str  # "end" of document, "stop" string, or "length"


# ---------------------------------------------------------------- states and logits


@torch.inference_mode()
def read(model: LanguageModel, prompts: Sequence[Sequence[int]], state: State | None = None) -> tuple[Tensor, State]:
    """Logits (B, V) after each of B prompts of at least one token, and their state.

    `state` (of batch 1) is where all of them begin; None: at nothing. Rows are read side by side up to the end of the
    shortest, the others up to the end of the next, and so on: nothing is padded, so each row is what it is alone.
    What it returns serves no backward pass: made in inference mode, which is quicker.
    """
    B, device = len(prompts), model.device
    order = sorted(range(B), key=lambda i: -len(prompts[i]))  # the longest first: rows that go on are the first n
    lengths = [len(prompts[i]) for i in order]
    idx = torch.zeros(B, lengths[0], dtype=torch.int64)
    for row, i in enumerate(order):
        idx[row, : lengths[row]] = torch.tensor(prompts[i])
    idx = idx.to(device)
    if state is not None:
        state = select(state, torch.zeros(B, dtype=torch.int64, device=device))
    ends, at, n = [], 0, B  # ends: (logits, state) of the rows that ended, the shortest first
    for end in sorted({*lengths, *range(0, lengths[0], max(1, TOKENS_AT_ONCE // B))} - {0}):
        hidden, state = model.hidden(idx[:n, at:end], state)
        going_on = sum(length > end for length in lengths[:n])
        if going_on < n:
            ends.append((model.head(hidden[going_on:, -1]), select(state, slice(going_on, n))))
            state = select(state, slice(going_on))
        at, n = end, going_on
    logits, states = zip(*reversed(ends))
    back = torch.tensor(order).argsort().to(device)
    return torch.cat(logits)[back], select(join(states), back)


@torch.inference_mode()
def step(model: LanguageModel, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """Logits (B, V) after one more token (B,) of each row, and the new state."""
    hidden, state = model.hidden(tokens.unsqueeze(1), state)
    return model.head(hidden[:, -1]), state


def sample(logits: Tensor, sampling: Sampling, draws: Sequence[float]) -> Tensor:
    """A token (B,) for each row of logits (B, V), already penalised; draws: for each row a random number in [0, 1).

    The draw goes through the kept tokens in the order of the vocabulary, so that equal probabilities, of which bf16 makes
    many, lie in the same order in any batch.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    p = logits.float().softmax(-1)
    top_p = p.masked_fill(p < smallest_kept(p, sampling.top_p), 0) if sampling.top_p < 1 else p
    if 0 < sampling.top_k < p.shape[-1]:
        least = p.topk(sampling.top_k).values[:, -1:]
        equal = p == least  # of those, the first ones
        room = sampling.top_k - (p > least).sum(-1, keepdim=True)
        top_p = top_p.masked_fill((p < least) | (equal & (equal.cumsum(-1) > room)), 0)
    weights = top_p if sampling.temperature == 1 else (top_p.log() / sampling.temperature).softmax(-1)
    sums = weights.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    drawn = torch.tensor(draws, dtype=torch.float64, device=logits.device).unsqueeze(-1) * total
    drawn = torch.minimum(drawn, total.nextafter(torch.zeros_like(total)))  # a draw just below 1 may round to it
    return (sums <= drawn).sum(-1)


def smallest_kept(p: Tensor, top_p: float) -> Tensor:
    """(B, 1): the probability at which the sorted p (B, V) first sum to top_p."""
    for count in (min(1024, p.shape[-1]), p.shape[-1]):  # all of them are seldom needed, and slow to sort
        values = p.topk(count).values
        before = (values.cumsum(-1, dtype=torch.float64) < top_p).sum(-1, keepdim=True)
        if count == p.shape[-1] or (before < count).all():
            return values.gather(-1, before.clamp(max=count - 1))
    raise AssertionError("the last count is all")


# ---------------------------------------------------------------- rows


class Row:
    """One prompt on its way: what it said so far, and when it is over."""

    def __init__(self, index: int, prompt: list[int], tokenizer: Tokenizer, stop, max_tokens: int, seed: str, on_text):
        self.index, self.prompt, self.tokenizer, self.stop, self.max_tokens = index, prompt, tokenizer, stop, max_tokens
        self.random = random.Random(int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big"))
        self.on_text = on_text or (lambda index, piece: None)
        self.stream = tokenizer.stream()
        self.tokens: list[int] = []
        self.text, self.shown = "", 0

    def push(self, token: int) -> Completion | None:
        """Take one more token; the completion if it was the last."""
        self.tokens.append(token)
        end = self.tokenizer.end
        if token in self.tokenizer.stops:
            return self._finish(self.tokenizer.decode(self.tokens[:-1]), "end", self.tokens[:-1])
        # an end of several tokens is a whole character: it stands on such a border
        if len(self.tokens) % len(end) == 0 and tuple(self.tokens[-len(end) :]) == end:
            return self._finish(self.tokenizer.decode(self.tokens[: -len(end)]), "end", self.tokens[: -len(end)])
        searched = len(self.text)
        self.text += self.stream(token)
        found = [self.text.find(s, max(0, searched - len(s))) for s in self.stop]
        if any(at >= 0 for at in found):
            return self._finish(self.text[: min(at for at in found if at >= 0)], "stop", self.tokens)
        if len(self.tokens) == self.max_tokens:
            return self._finish(self.tokenizer.decode(self.tokens), "length", self.tokens)
        begun = max((n for s in self.stop for n in range(len(s)) if self.text.endswith(s[:n])), default=0)
        self._show(self.text[: len(self.text) - begun])  # what may be the start of a stop string waits
        return None

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.on_text(self.index, text[self.shown :])
            self.shown = len(text)

    def _finish(self, text: str, reason: str, tokens: list[int]) -> Completion:
        self._show(text)
        return Completion(self.index, text, tokens, reason)


class Batch:
    """Rows that are sampled together: their logits, their state, and for penalties what each has said."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, sampling: Sampling):
        self.model, self.tokenizer, self.sampling = model.for_sampling(), tokenizer, sampling
        self.rows: list[Row] = []
        self.logits = torch.empty(0, model.sizes.vocab_size, device=model.device)
        self.state: State = []
        counted = model.sizes.vocab_size if sampling.penalises else 0
        self.said = self.logits.new_zeros(2, 0, counted)  # per row and token: sampled before, and the count
        self.uncounted: dict[int, bool] = {}

    def add(self, new: list[Row], state: State) -> None:
        """Read the prompts of more rows, which begin at `state`."""
        logits, state = read(self.model, [row.prompt for row in new], state)
        if logits.isnan().any():
            raise UserError("the model's output is not a number: the weights are damaged, or the training diverged")
        self.logits = torch.cat([self.logits, logits]) if self.rows else logits
        self.state = join([self.state, state]) if self.rows else state
        self.said = torch.cat([self.said, self.said.new_zeros(2, len(new), self.said.shape[-1])], 1)
        self.rows += new

    def step(self) -> list[Completion]:
        """One more token of each row; the rows that are done with it leave."""
        logits = self.logits
        if self.sampling.penalises:
            logits = logits.float() - self.sampling.alpha_presence * self.said[0] - self.sampling.alpha_frequency * self.said[1]
        chosen = sample(logits, self.sampling, [row.random.random() for row in self.rows])
        tokens = chosen.tolist()
        done = [row.push(token) for row, token in zip(self.rows, tokens)]
        if self.sampling.penalises:
            self.count(tokens, chosen)
        if any(done):
            kept = [i for i, completion in enumerate(done) if not completion]
            self.rows = [self.rows[i] for i in kept]
            places = torch.tensor(kept, dtype=torch.int64, device=chosen.device)
            chosen, self.state, self.said = chosen[places], select(self.state, places), self.said[:, places]
        if self.rows:
            self.logits, self.state = step(self.model, chosen, self.state)
        return [completion for completion in done if completion]

    def count(self, tokens: list[int], chosen: Tensor) -> None:
        """Note what each row said."""
        for token in tokens:
            if token not in self.uncounted:
                self.uncounted[token] = self.tokenizer.decode([token]) in " \t0123456789"
        each = torch.arange(len(tokens), device=chosen.device)
        self.said[0, each, chosen] = 1
        self.said[1] *= self.sampling.alpha_decay
        self.said[1, each, chosen] += self.said.new_tensor([float(not self.uncounted[t]) for t in tokens])


def completions(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling = DEFAULT,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 32,
    state: State | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> Iterator[Completion]:
    """Continue every prompt; yields each completion as it is done.

    prompts     texts, which begin a document, or lists of tokens; an empty one is taken as the end of a document
    stop        strings that end a completion, beside the tokenizer's end of document
    seed        a prompt's random numbers come of seed and prompt, and of how often it came before: the same in any batch
    batch_size  rows at once;   state: where each prompt begins (batch 1), e.g. after text that they share
    on_text     called with (index of the prompt, piece of text) as the text appears: whole characters, no stop strings
    """
    if max_tokens < 1 or batch_size < 1:
        raise UserError(f"--max_tokens {max_tokens} and --batch_size {batch_size} must be at least 1")
    if "" in stop:
        raise UserError("a stop string must not be empty")
    rows: list[Row] = []
    repeats: Counter[tuple[int, ...]] = Counter()
    for index, prompt in enumerate(prompts):
        tokens = [*tokenizer.begin, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        read_first = tuple(tokens) or tokenizer.end
        source = f"{seed} {repeats[read_first]} {read_first}"
        rows.append(Row(index, list(read_first), tokenizer, stop, max_tokens, source, on_text))
        repeats[read_first] += 1
    waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
    batch = Batch(model, tokenizer, sampling)
    while waiting or batch.rows:
        room = batch_size - len(batch.rows)
        if waiting and (not batch.rows or room >= batch_size / 4):  # a few at a time: a token of few rows costs that of many
            batch.add([waiting.popleft() for _ in range(min(room, len(waiting)))], state)
        yield from batch.step()


def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]], *args, **kwargs
) -> list[Completion]:
    """All `completions`, in the order of the prompts."""
    return sorted(completions(model, tokenizer, prompts, *args, **kwargs), key=lambda completion: completion.index)

"""Sampling: continue prompts, many at once, with a model and an adapter.

    python -m rwkv_bone.generate --model M.pth [--peft_checkpoint A.pth] --prompt "In the beginning" [--prompt ...]
    python -m rwkv_bone.generate --model M.pth --chat

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

import argparse
import contextlib
import hashlib
import io
import json
import math
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.templates import Template
from ..data.tokenizer import ENCODINGS, KINDS, Tokenizer, open_tokenizer
from ..errors import Parser, UserError, run
from ..files.adapters import load_adapter
from ..files.atomic import atomic
from ..files.models import load_model
from ..interop.rwkv_peft import Foreign
from ..models import Execution, LanguageModel, State
from ..models.base import join, select
from ..ops.wkv6 import OPS
from ..peft import merge

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

    prompts     texts or lists of tokens; an empty one is taken as the end of a document
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
        read_first = tuple(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt) or tokenizer.end
        source = f"{seed} {repeats[read_first]} {read_first}"
        rows.append(Row(index, list(read_first), tokenizer, stop, max_tokens, source, on_text))
        repeats[read_first] += 1
    waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
    rows, device = [], model.device
    logits = torch.empty(0, model.sizes.vocab_size, device=device)  # of `rows`, as their state `carried`
    carried: State = []
    said = torch.zeros(2, 0, model.sizes.vocab_size, device=device)  # per row and token: sampled before, and the count
    uncounted: dict[int, bool] = {}
    while waiting or rows:
        room = batch_size - len(rows)
        if waiting and (not rows or room >= batch_size / 4):  # a few at a time, as a token of few rows costs that of many
            new = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            new_logits, new_state = read(model, [row.prompt for row in new], state)
            if new_logits.isnan().any():
                raise UserError("the model's output is not a number: the weights are damaged, or the training diverged")
            logits = torch.cat([logits, new_logits]) if rows else new_logits
            carried = join([carried, new_state]) if rows else new_state
            if sampling.penalises:
                said = torch.cat([said, said.new_zeros(2, len(new), said.shape[-1])], 1)
            rows += new
        if sampling.penalises:
            logits = logits.float() - sampling.alpha_presence * said[0] - sampling.alpha_frequency * said[1]
        chosen = sample(logits, sampling, [row.random.random() for row in rows])
        tokens = chosen.tolist()
        done = [row.push(token) for row, token in zip(rows, tokens)]
        yield from (completion for completion in done if completion)
        if sampling.penalises:
            for token in tokens:
                if token not in uncounted:
                    uncounted[token] = tokenizer.decode([token]) in " \t0123456789"
            each = torch.arange(len(rows), device=device)
            said[0, each, chosen] = 1
            said[1] *= sampling.alpha_decay
            said[1, each, chosen] += torch.tensor([float(not uncounted[t]) for t in tokens], device=device)
        if any(done):
            kept = [i for i, completion in enumerate(done) if not completion]
            rows = [rows[i] for i in kept]
            places = torch.tensor(kept, dtype=torch.int64, device=device)
            chosen, carried, said = chosen[places], select(carried, places), said[:, places] if sampling.penalises else said
        if rows:
            logits, carried = step(model, chosen, carried)


def generate(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]], *args, **kwargs) -> list[Completion]:
    """All `completions`, in the order of the prompts."""
    return sorted(completions(model, tokenizer, prompts, *args, **kwargs), key=lambda completion: completion.index)


# ---------------------------------------------------------------- chat


class Conversation:
    """A chat that remembers: the state after all that was said, and the tokens not yet read into it."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, template: Template | None = None, system: str = ""):
        self.model, self.tokenizer, self.template = model, tokenizer, template or Template.open()
        self.messages = as_messages("", system)[:-1]
        self.state: State | None = None
        self.unread: list[int] = []
        self.turns = 0

    def ask(self, message: str, sampling: Sampling = DEFAULT, max_tokens: int = 1000, seed: int = 0, on_text=None) -> str:
        """The reply to a message. An interrupt (Ctrl-C) ends the reply, and what was said so far counts."""
        self.messages.append({"role": "user", "content": message})
        tokens = [*self.unread, *self.tokenizer.encode(self.template.turn(self.messages))]
        if len(tokens) > 1:
            _, self.state = read(self.model, [tokens[:-1]], self.state)
        pieces: list[str] = []

        def say(_, piece: str) -> None:
            pieces.append(piece)
            if on_text:
                on_text(piece)

        with contextlib.suppress(KeyboardInterrupt):
            generate(
                self.model, self.tokenizer, [tokens[-1:]], sampling, max_tokens, self.template.stops,
                seed=seed + self.turns, state=self.state, on_text=lambda index, piece: say(index, piece),
            )  # fmt: skip
        self.turns += 1
        reply = "".join(pieces).rstrip()
        # The state stands before the reply, which is read again with the next message: what was sampled may go beyond
        # its end (into "User:"), and is not always how the tokenizer cuts the text.
        self.unread = [tokens[-1], *self.tokenizer.encode(reply + self.template.turn_end)]
        self.messages.append({"role": "assistant", "content": reply.strip()})
        return reply


def as_messages(prompt: str, system: str = "", given: str = "") -> list[dict[str, Any]]:
    """A question as messages, with a system message and an input where there are some."""
    user = {"role": "user", "content": prompt} | ({"input": given} if given else {})
    return [{"role": "system", "content": system}, user] if system else [user]


def chat(model: LanguageModel, tokenizer: Tokenizer, template: Template, sampling: Sampling, max_tokens: int, seed: int, system: str):
    """Talk on the terminal until the input ends."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (lines can be edited and recalled)
        print("/new forgets the conversation, Ctrl-C ends a reply, Ctrl-D ends the chat.\n")
    conversation = Conversation(model, tokenizer, template, system)
    while True:
        try:
            message = input("User: ").strip()
        except EOFError:
            print()
            return
        if not sys.stdin.isatty():  # from a pipe: no terminal has shown it
            print(message)
        if message == "/new":
            conversation = Conversation(model, tokenizer, template, system)
        elif message:
            print("\nAssistant:", end="", flush=True)
            conversation.ask(message, sampling, max_tokens, seed, on_text=lambda piece: print(piece, end="", flush=True))
            print("\n")


# ---------------------------------------------------------------- command line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", "--load_model", required=True, metavar="M.pth", help="RWKV-6 .pth")
    group.add_argument("--peft_checkpoint", default="", metavar="A.pth", help="adapter to merge into it first")
    group.add_argument("--lora_alpha", type=float, help="alpha of RWKV-PEFT's LoRA files, which do not say it")
    group.add_argument("--lora_init", "--pissa_init", default="", metavar="F.pth", help="init_pissa.pth of RWKV-PEFT's PiSSA")
    group.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: bf16 on a GPU, fp32 on the CPU")
    group.add_argument("--op", default="auto", choices=OPS, help="WKV6 kernel; torch needs no compiler")
    group.add_argument("--tokenizer", default="auto", help="auto (by vocabulary size), byte, world, or a tokenizer.json")
    group.add_argument("--vocab_file", default="", help="World vocabulary file, where no installed package has it")
    group.add_argument("--encoding", default="utf-8", choices=("utf-8", "utf-16-le"), help="of the byte tokenizer")


def open_model(args: argparse.Namespace) -> LanguageModel:
    """The model of --model and --peft_checkpoint, merged and ready to run."""
    device = pick_device(args.device)
    if args.op in ("cpu", "cuda") and args.op != device.type:
        raise UserError(f"--op {args.op} does not run on --device {device}; leave it out")
    dtype = DTYPES.get(args.dtype) or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    model = load_model(args.model, dtype, device, Execution(args.op))
    told = args.lora_alpha is not None or args.lora_init
    args.trained_with = args.trained_template = None
    if args.peft_checkpoint:
        info = load_adapter(model, args.peft_checkpoint, foreign=Foreign(args.lora_alpha, args.lora_init))
        if told and "foreign" not in info:
            raise UserError(f"{args.peft_checkpoint}: says all of itself; leave --lora_alpha and --lora_init out")
        args.trained_with, args.trained_template = info.get("tokenizer"), info.get("template")
        merge(model)
    elif told:
        raise UserError("--lora_alpha and --lora_init belong to a --peft_checkpoint")
    model.requires_grad_(False).eval()
    return model


def tokenizer_of(args: argparse.Namespace, model: LanguageModel) -> Tokenizer:
    """The tokenizer that the flags of an opened model ask for; a warning if its adapter learned from another's tokens."""
    tokenizer = open_tokenizer(args.tokenizer, model.sizes.vocab_size, args.vocab_file or None, args.encoding)
    if cure := other_tokenizer(args.trained_with, tokenizer):
        print(f"warning: {args.peft_checkpoint} was not trained with {tokenizer}; give {cure}", file=sys.stderr, flush=True)
    return tokenizer


def other_tokenizer(trained_with: Any, tokenizer: Tokenizer) -> str:
    """The flags that give the tokenizer of an adapter's record; "" if it is this one, or the record says nothing that we know."""
    if not isinstance(trained_with, dict):
        return ""
    kind, encoding = trained_with.get("kind"), trained_with.get("encoding")
    flags = []
    if kind in KINDS and kind != tokenizer.kind:
        flags.append("--tokenizer " + ("PATH/tokenizer.json" if kind == "tokenizer.json" else kind))
    if encoding in ENCODINGS and encoding != tokenizer.encoding:
        flags.append(f"--encoding {encoding}")
    return " ".join(flags)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device takes auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; python -m rwkv_bone.doctor says why")
    return device


def add_sampling_flags(parser: argparse.ArgumentParser, default: Sampling, batch_size: int = 32) -> None:
    group = parser.add_argument_group("sampling")
    texts = {
        "temperature": ("--temperature", "above 1 wilder, below 1 tamer, 0: always the likeliest token"),
        "top_p": ("--top_p", "sample among the likeliest tokens that have this probability together"),
        "top_k": ("--top_k", "and among so many at most; 0: any number"),
        "alpha_presence": ("--alpha_presence", "--presence_penalty", "subtracted from the logit of what was said before"),
        "alpha_frequency": ("--alpha_frequency", "--frequency_penalty", "and this for each time it was said"),
        "alpha_decay": ("--alpha_decay", "--penalty_decay", "what is left of such a count after each token"),
    }
    for f in fields(Sampling):
        *names, text = texts[f.name]
        value = getattr(default, f.name)
        group.add_argument(*names, dest=f.name, type=f.type, default=value, help=f"{text} (default: {value})")
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same samples (default: 0)")
    text = f"prompts at once (default: {batch_size})"
    group.add_argument("--batch_size", type=int, default=batch_size, help=text)


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling)})


@contextlib.contextmanager
def memory_advice(advice: str):
    """Say what to do where a GPU's memory does not suffice."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"the GPU's memory is full; {advice}") from None


def read_prompts(path: str) -> list[str]:
    """Prompts of a file: .jsonl has {"prompt": ...} in each line, any other file one prompt a line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompt_file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt_file {path} is no UTF-8 text") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"--prompt_file {path} holds no prompt")
    if not path.endswith(".jsonl"):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"--prompt_file {path}, prompt {number}: broken JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f'--prompt_file {path}, prompt {number}: wanted {{"prompt": TEXT}}')
        prompts.append(row["prompt"])
    return prompts


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="rwkv_bone.generate", description="Continue prompts, or chat, with an RWKV-6 model.", allow_abbrev=False)
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    group.add_argument("--prompt_file", default="", help='a prompt a line, or .jsonl with {"prompt": ...} a line')
    group.add_argument("--instruct", action="store_true", help="put each prompt as a question, as in training")
    group.add_argument("--chat", action="store_true", help="talk to the model on the terminal")
    group.add_argument("--template", default="", metavar="world|g1|FILE", help="chat template (default: the one of training)")
    group.add_argument("--system", default="", help="system message, with --instruct and --chat")
    group.add_argument("--input", default="", help="text that the instruction is about, with --instruct (Alpaca's input)")
    group.add_argument("--samples", type=int, default=1, help="continuations of each prompt (default: 1)")
    group.add_argument("--max_tokens", type=int, default=256, help="longest continuation, in tokens (default: 256)")
    group.add_argument("--stop", action="append", default=[], help="text that ends a continuation; may be given several times")
    group.add_argument("--out", default="", metavar="F.jsonl", help="write prompts and continuations there, not to the terminal")
    add_sampling_flags(parser, DEFAULT)
    add_model_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    sampling = sampling_of(args)
    prompts = args.prompt + (read_prompts(args.prompt_file) if args.prompt_file else [])
    if args.chat == bool(prompts):
        raise UserError("give --prompt or --prompt_file, or --chat" if not prompts else "--chat takes no prompts")
    if args.samples < 1 or args.max_tokens < 1:
        raise UserError(f"--samples {args.samples} and --max_tokens {args.max_tokens} must be at least 1")
    model = open_model(args)
    tokenizer = tokenizer_of(args, model)
    template = Template.open(args.template) if args.template else Template.of(args.trained_template)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    with memory_advice("take a smaller --batch_size, or --device cpu"):
        if args.chat:
            chat(model, tokenizer, template, sampling, args.max_tokens, args.seed, args.system)
            return
        asked = [prompt for prompt in prompts for _ in range(args.samples)]
        stop = tuple(args.stop)
        if args.instruct:
            stop += template.stops
        texts = [template.prompt(as_messages(prompt, args.system, args.input)) if args.instruct else prompt for prompt in asked]
        each = completions(
            model, tokenizer, texts, sampling, args.max_tokens, stop, args.seed, args.batch_size,
            on_text=show if len(asked) == 1 and not args.out else None,
        )  # fmt: skip
        if len(asked) == 1 and not args.out:
            list(each)
            print()
        elif args.out:
            write(args.out, asked, each)
        else:
            print_in_order(asked, each)


def show(index: int, piece: str) -> None:
    print(piece, end="", flush=True)


def print_in_order(prompts: list[str], each: Iterator[Completion]) -> None:
    ready: dict[int, Completion] = {}
    shown = 0
    for completion in each:
        ready[completion.index] = completion
        while shown in ready:
            print(f"--- {shown + 1} of {len(prompts)}: {prompts[shown]}\n{ready.pop(shown).text}", flush=True)
            shown += 1


def write(path: str, prompts: list[str], each: Iterator[Completion]) -> None:
    with atomic(path) as file:
        for c in sorted(each, key=lambda c: c.index):
            line = {"prompt": prompts[c.index], "text": c.text, "tokens": len(c.tokens), "reason": c.reason}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    print(f"{len(prompts)} continuations in {path}")


if __name__ == "__main__":
    run(main)

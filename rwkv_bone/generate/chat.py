"""Chat: a conversation that carries the model's state from turn to turn, and its dialogue on the terminal."""

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from ..data.templates import Template
from ..data.tokenizer import Tokenizer
from ..models import LanguageModel, State
from .sampling import DEFAULT, Sampling, generate, read

HELP = """/reset forgets the conversation, /system TEXT begins another with this system message,
/exit or Ctrl-D ends the chat, Ctrl-C ends a reply, /help shows this."""


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
        turn = self.template.turn(self.messages)
        begin = () if self.template.whole else self.tokenizer.begin
        encoded = self.tokenizer.encode_after(turn) if self.unread else [*begin, *self.tokenizer.encode(turn)]
        tokens = [*self.unread, *encoded]
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
        self.unread = [tokens[-1], *self.tokenizer.encode_after(reply + self.template.turn_end)]
        self.messages.append({"role": "assistant", "content": reply.strip()})
        return reply


def as_messages(prompt: str, system: str = "", given: str = "") -> list[dict[str, Any]]:
    """A question as messages, with a system message and an input where there are some."""
    user = {"role": "user", "content": prompt} | ({"input": given} if given else {})
    return [{"role": "system", "content": system}, user] if system else [user]


def as_asked(
    template: Template, tokenizer: Tokenizer, prompts: Iterable[str], system: str = "", given: str = ""
) -> list[str | list[int]]:
    """Questions as `completions` takes them; their answers end at `template.stops`."""
    texts = [template.prompt(as_messages(prompt, system, given)) for prompt in prompts]
    # a template that is whole has written the beginning of the document
    return [tokenizer.encode(text) for text in texts] if template.whole else list(texts)


def chat(
    model: LanguageModel, tokenizer: Tokenizer, template: Template, sampling: Sampling, max_tokens: int, seed: int, system: str
):
    """Talk on the terminal until the input ends."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (lines can be edited and recalled)
        print(f"{HELP}\n")
    conversation = Conversation(model, tokenizer, template, system)
    while True:
        try:
            message = input("User: ").strip()
        except EOFError:
            print()
            return
        if not sys.stdin.isatty():  # from a pipe: no terminal has shown it
            print(message)
        word, _, rest = message.partition(" ")
        if word in ("/exit", "/quit"):
            return
        if word in ("/reset", "/new", "/system"):
            system = rest.strip() if word == "/system" else system
            conversation = Conversation(model, tokenizer, template, system)
        elif message.startswith("/"):
            print(HELP if word == "/help" else f"no command {word}\n{HELP}")
        elif message:
            print("\nAssistant:", end="", flush=True)
            conversation.ask(message, sampling, max_tokens, seed, on_text=lambda piece: print(piece, end="", flush=True))
            print("\n")

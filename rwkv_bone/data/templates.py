"""Chat templates: from the messages of a conversation to text, and which of it is trained.

    template = Template.open("world")                                 "world", "g1", or a jinja2 file of one's own
    template.segments(messages) -> [(text, trained), ...]             message: {"role": ..., "content": ...}
    template.prompt(messages) -> text                                 what to ask a model with: the text before the answer

The built-in ones are templates/*.jinja. They are jinja2 as in the rest of the field: `messages`, `tools`,
`add_generation_prompt`, `bos_token`, `eos_token`, `raise_exception` and `tojson` mean what they mean in transformers, and
`{% generation %} ... {% endgeneration %}` stands around what is trained. The filter `no_blank_lines` strips a text and makes one
line end of several; rows whose text it changes are counted.

A stretch of trained text is tokenised by itself. So a prompt has the very tokens that it has when a model is asked, and the
border is exact ("Assistant:" is followed by " answer": in the World vocabulary a space belongs to the word after it).
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import UserError
from .tokenizer import unicode_bytes

FOLDER = Path(__file__).with_name("templates")
BUILT_IN = ("world", "g1")
OWN = "the model's own"
# Marks in a rendered text. They are halves of surrogate pairs, which no text of a file holds: rows with such are refused.
BORDER, END, CHANGED = "\udff0", "\udff1", "\udff2"
AS_IT_IS, STRIPPED = "\udff3", "\udff4"  # the place of a message's text, and one to which `no_blank_lines` was applied
Message = dict[str, Any]  # role, content; perhaps input, reasoning_content, tool_calls
# A piece of a text: its beginning, and messages' texts, each with what follows it: which message's, which of its, stripped?
Form = tuple[str, list[tuple[int, str, bool, str]]]


class Generation(Extension):
    """`{% generation %}`: a border before and after."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        border = nodes.Output([nodes.TemplateData(BORDER)]).set_lineno(line)
        return [border, *body, border]


def has_blank_lines(text: str) -> bool:
    return ("\n" in text and "\n\n" in text) or ("\r" in text and "\r\n" in text)  # one character is found ten times faster


def without_blank_lines(text: str) -> str:
    return re.sub("\n\n+", "\n", text.replace("\r\n", "\n"))


def no_blank_lines(text: str) -> str:
    """The filter."""
    text = text.strip().replace(AS_IT_IS, STRIPPED)
    return without_blank_lines(text) + CHANGED if has_blank_lines(text) else text


def _split(text: str) -> tuple[list[str], bool]:
    """A rendered text without its marks: as `Template.pieces` has it."""
    pieces = text.replace(CHANGED, "").split(BORDER)
    if not pieces[-1]:
        del pieces[-1]
    return pieces, CHANGED in text


def refuse_marks(conversations: Sequence[tuple[list[Message], Any]]) -> None:
    """UserError for text that holds halves of surrogate pairs: some of them are the marks of a template."""
    for messages, tools in conversations:
        for value in (*(value for message in messages for value in message.values()), tools):
            if type(value) is not str:
                unicode_bytes(to_json(value))
            elif not value.isascii():
                unicode_bytes(value)


def with_input(message: Message) -> Message:
    """A question with the text that it is about as one text: templates of other programs know no `input`."""
    if "input" not in message:
        return message
    return {"role": message["role"], "content": f"{message['content']}\n\n{message['input']}"}


def raise_exception(message: str) -> NoReturn:
    raise UserError(message)


def to_json(value, indent=None, ensure_ascii: bool = False, **options) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


class Template:
    """name     for messages and records: "world", "g1", the path of a file, or OWN
    source   the jinja2 text
    tokens   special tokens of the model that a template may use: bos_token, eos_token, ...
    whole    whether it writes the beginning and the end of a document too, as those that come with models do

    A template that does not say by `{% generation %}` what is trained is asked: an answer is what it puts after the text that it
    gives as a prompt (`add_generation_prompt`), up to and with its mark for the end of the answer.
    """

    def __init__(self, name: str, source: str, tokens: Mapping[str, str] | None = None, whole: bool = False):
        self.name, self.source, self.tokens, self.whole = name, source, dict(tokens or {}), whole
        kind = jinja2.Environment if name in BUILT_IN else ImmutableSandboxedEnvironment  # files are not trusted
        environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        environment.filters |= {"no_blank_lines": no_blank_lines, "tojson": to_json}
        environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
            "bos_token": "",
            "eos_token": "",
            "add_generation_prompt": False,
            **self.tokens,
        }
        self._forms: dict[tuple, list[Form]] = {}
        try:
            self._one = environment.from_string(source)
            # many conversations by one call: setting up a call takes longer than rendering a short one
            self._many = environment.from_string(
                "{% for messages, tools in conversations %}\n" + source.removesuffix("\n") + END + "{% endfor %}"
            )
        except (jinja2.TemplateError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise UserError(f"the template {name}{line}: {error}") from None

    @classmethod
    def open(cls, which: str = "world") -> "Template":
        """A built-in template by its name, a jinja2 file, or a tokenizer_config.json with a chat_template."""
        path = FOLDER / f"{which}.jinja" if which in BUILT_IN else Path(which)
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(f"cannot read the template {which}: {reason}; give world, g1 or a jinja2 file") from None
        try:
            config = json.loads(source)
        except (ValueError, RecursionError):
            return cls(str(which), source)
        if not (isinstance(config, dict) and isinstance(config.get("chat_template"), str)):
            raise UserError(f"the template {which} is JSON, an earlier form; templates are jinja2 files now: begin with a copy "
                            f"of {FOLDER / 'world.jinja'}, and name your fields by --fields")  # fmt: skip
        given = {name: config.get(name) for name in ("bos_token", "eos_token")}
        tokens = {name: t.get("content") if isinstance(t, dict) else t for name, t in given.items()}
        return cls(str(which), config["chat_template"], {name: t if isinstance(t, str) else "" for name, t in tokens.items()})

    @classmethod
    def of_model(cls, text: Any, usual: str) -> "Template":
        """The one that came with a model (models/base.py, OwnText), else the one called `usual`."""
        return cls(OWN, text.template, text.tokens, whole=True) if text and text.template else cls.open(usual)

    def identity(self) -> dict[str, Any]:
        """What an adapter's record keeps: `Template.of(...)` makes the same again."""
        if self.name in BUILT_IN:
            return {"name": self.name}
        return {"name": self.name, "source": self.source, "tokens": self.tokens, "whole": self.whole}

    @classmethod
    def of(cls, identity: Any) -> "Template":
        """The template of an adapter's record; World's where it says nothing that is known."""
        identity = identity if isinstance(identity, dict) else {}
        name, source = identity.get("name"), identity.get("source")
        if isinstance(name, str) and isinstance(source, str):
            tokens = identity.get("tokens")
            return cls(name, source, tokens if isinstance(tokens, dict) else {}, identity.get("whole") is True)
        return cls.open(name if name in BUILT_IN else "world")

    def __reduce__(self):
        return Template, (self.name, self.source, self.tokens, self.whole)

    @property
    def marks(self) -> bool:
        """Whether it says what is trained."""
        return re.search(r"\{%[-+]?\s*generation\b", self.source) is not None

    def pieces(self, conversations: Sequence[tuple[list[Message], Any]]) -> list[tuple[list[str], bool]]:
        """For each (messages, tools) its text in pieces, alternately not trained and trained, and whether blank lines went."""
        found = [self._filled(*conversation) for conversation in conversations]
        rest = [conversation for conversation, pieces in zip(conversations, found) if pieces is None]
        refuse_marks(rest)
        rendered = iter(self._rendered(rest) if rest else ())
        return [_split(next(rendered)) if pieces is None else pieces for pieces in found]

    def _rendered(self, conversations: Sequence[tuple[list[Message], Any]]) -> list[str]:
        """Texts with BORDER around what is trained, and CHANGED where blank lines went."""
        if not self.marks:
            return [self._marked(*conversation) for conversation in conversations]
        texts = self._call(self._many, conversations=conversations).split(END)
        assert len(texts) == len(conversations) + 1
        return [text.replace(BORDER + BORDER, "") for text in texts[:-1]]

    def _filled(self, messages: list[Message], tools) -> tuple[list[str], bool] | None:
        """The built-in templates put each text in as it is, or without blank lines, and do not look at it otherwise. So what
        stands around the texts is rendered once for all conversations of one shape: five times faster. None: render it."""
        if tools or self.name not in BUILT_IN:
            return None
        shape = tuple([m["role"] if len(m) == 2 else (m["role"], *(n for n in m if n != "role" and m[n])) for m in messages])
        forms = self._forms.get(shape)
        if forms is None:
            if len(self._forms) > 1000 or any("tool_calls" in message for message in messages):
                return None
            forms = self._forms[shape] = self._shaped(messages)
        pieces, changed = [], False
        for piece, places in forms:
            for number, name, stripped, following in places:
                text = messages[number][name]
                if stripped:
                    text = text.strip()
                    if has_blank_lines(text):
                        text, changed = without_blank_lines(text), True
                piece = f"{piece}{text}{following}"
            pieces.append(piece)
        return pieces, changed

    def _shaped(self, messages: list[Message]) -> list[Form]:
        """The pieces of conversations of this shape, with the places of the messages' texts."""
        where: list[tuple[int, str]] = []
        marked: list[Message] = []
        for number, message in enumerate(messages):
            marked.append({"role": message["role"]})
            for name in message:
                if name != "role" and (message[name] or name == "content"):
                    marked[-1][name] = f"{AS_IT_IS}{len(where)}{AS_IT_IS}"
                    where.append((number, name))
        texts, forms = _split(self._rendered([(marked, None)])[0])[0], []
        for text in texts:
            beginning, *parts = re.split(f"([{AS_IT_IS}{STRIPPED}])([0-9]+)[{AS_IT_IS}{STRIPPED}]", text)
            places = zip(parts[::3], parts[1::3], parts[2::3])
            forms.append((beginning, [(*where[int(n)], mark == STRIPPED, following) for mark, n, following in places]))
        return forms

    def _text(self, messages: list[Message], tools, ask: bool = False) -> str:
        """A conversation's text by a template without marks; ask: and what begins the answer."""
        messages = [with_input(message) for message in messages]
        return self._call(self._one, messages=messages, tools=tools, add_generation_prompt=ask)

    def _marked(self, messages: list[Message], tools) -> str:
        """The text with BORDER around its answers, by a template without marks."""
        whole, marked, at = self._text(messages, tools), "", 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, content = self._text(messages[:number], tools, ask=True), message["content"].strip()
            after = self._text(messages[: number + 1], tools)
            asked, (_, said, closing) = len(before), after.rpartition(content) if content else ("", "", "")
            if whole.startswith(after) and after.startswith(before) and after[asked:].strip():
                answer = after[asked:]
                # white space after the mark that ends an answer is no longer the model's to say
                end = asked + len(answer if said and not closing.strip() else answer.rstrip())
            elif content and whole.startswith(before + content):  # the template leaves something out of earlier answers: thoughts
                end = asked + len(content)
                end += len(closing.rstrip()) if whole.startswith(closing.rstrip(), end) else 0
            else:
                continue
            marked += whole[at:asked] + BORDER + whole[asked:end] + BORDER
            at = end
        return marked + whole[at:]

    def _call(self, compiled: jinja2.Template, **variables) -> str:
        try:
            return compiled.render(**variables)
        except UserError:
            raise
        except Exception as error:  # a template may fail in any way
            raise UserError(f"the template {self.name}: {error}") from None

    def segments(self, messages: list[Message], tools=None) -> list[tuple[str, bool]]:
        """The conversation's text in stretches (text, trained), neighbours differing."""
        pieces, _ = self.pieces([(messages, tools)])[0]
        return [(piece, bool(i % 2)) for i, piece in enumerate(pieces) if piece]

    def prompt(self, messages: list[Message], tools=None) -> str:
        """What to ask a model with after `messages`, the last of them a user's: the text that training has before the answer."""
        return "".join(self.before_answer(messages, tools))

    def turn(self, messages: list[Message], tools=None) -> str:
        """The last stretch of `prompt`: what follows the answer before it."""
        return self.before_answer(messages, tools)[-1]

    def before_answer(self, messages: list[Message], tools=None) -> list[str]:
        """`prompt` in stretches: a text that is not trained and an answer in turns, at last the text before the new answer."""
        if not self.marks:
            whole, asked = self._marked(messages, tools), self._text(messages, tools, ask=True)
            told = len(whole.replace(BORDER, ""))
            return [piece.replace(CHANGED, "") for piece in (whole + asked[told:]).split(BORDER)]
        answered = [*messages, {"role": "assistant", "content": "x"}]
        return self.pieces([(answered, tools)])[0][0][:-1]

    @cached_property
    def turn_end(self) -> str:
        """The trained text between an answer and the next turn: World's blank line."""
        return self._after_answer({"role": "user", "content": "question"})[0]

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer, beside the tokenizer's end of document."""
        nexts = ({"role": "user", "content": "question"}, {"role": "user", "content": "question", "input": "text"})
        after = [self._after_answer(message) for message in nexts]
        return tuple(dict.fromkeys(end.strip() or (end + turn).rstrip() for end, turn in after if (end + turn).strip()))

    def _after_answer(self, following: Message) -> tuple[str, str]:
        """What follows the text of an answer: the rest of its trained stretch, and what precedes the next message's text."""
        messages = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "answer"}, following]
        text = BORDER.join(self.pieces([(messages, None)])[0][0])
        end, _, turn = text.rpartition("answer")[2].partition(BORDER)
        return end, turn.partition("question")[0]

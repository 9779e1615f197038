"""Chat templates: from the messages of a conversation to text, and which of it is trained.

    template = Template.open("world")                                 "world", "g1", or a jinja2 file of one's own
    template.segments(messages) -> [(text, trained), ...]             message: {"role": ..., "content": ...}
    template.prompt(messages) -> text                                 what to ask a model with: the text before the answer

The built-in ones are templates/*.jinja. They are jinja2 as in the rest of the field: `messages`, `tools`, `add_generation_prompt`,
`bos_token`, `eos_token`, `raise_exception` and `tojson` mean what they mean in transformers, and
`{% generation %} ... {% endgeneration %}` stands around what is trained. The filter `no_blank_lines` strips a text and makes one
line end of several; rows whose text it changes are counted.

A stretch of trained text is tokenised by itself. So a prompt has the very tokens that it has when a model is asked, and the
border is exact ("Assistant:" is followed by " answer": in the World vocabulary a space belongs to the word after it).
"""

import datetime
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import UserError

FOLDER = Path(__file__).with_name("templates")
BUILT_IN = ("world", "g1")
# Marks in a rendered text. They are halves of surrogate pairs, which no text of a file holds: rows with such are refused.
BORDER, END, CHANGED = "\udff0", "\udff1", "\udff2"
Message = dict[str, Any]  # role, content; perhaps input, reasoning_content, tool_calls


class Generation(Extension):
    """`{% generation %}`: a border before and after."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        border = nodes.Output([nodes.TemplateData(BORDER)]).set_lineno(line)
        return [border, *body, border]


def no_blank_lines(text: str) -> str:
    text = text.strip()
    if "\n\n" not in text and "\r\n" not in text:
        return text
    return re.sub("\n\n+", "\n", text.replace("\r\n", "\n")) + CHANGED


def raise_exception(message: str) -> NoReturn:
    raise UserError(message)


def to_json(value, indent=None, ensure_ascii: bool = False, **options) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


class Template:
    """name     for messages and records: "world", "g1" or the path of a file
    source   the jinja2 text
    bos_token, eos_token   texts of a model's own, where its template uses them
    """

    def __init__(self, name: str, source: str, bos_token: str = "", eos_token: str = ""):
        self.name, self.source = name, source
        kind = jinja2.Environment if name in BUILT_IN else ImmutableSandboxedEnvironment  # files are not trusted
        environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        environment.filters |= {"no_blank_lines": no_blank_lines, "tojson": to_json}
        environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
            "bos_token": bos_token,
            "eos_token": eos_token,
            "add_generation_prompt": False,
        }
        self._tokens = (bos_token, eos_token)
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
        tokens = [config.get(name) or "" for name in ("bos_token", "eos_token")]
        return cls(str(which), config["chat_template"], *(t["content"] if isinstance(t, dict) else t for t in tokens))

    def identity(self) -> dict[str, str]:
        """What an adapter's record keeps: `Template.of(...)` makes the same again."""
        return {"name": self.name} if self.name in BUILT_IN else {"name": self.name, "source": self.source}

    @classmethod
    def of(cls, identity: Any) -> "Template":
        """The template of an adapter's record; World's where it says nothing that is known."""
        identity = identity if isinstance(identity, dict) else {}
        name, source = identity.get("name"), identity.get("source")
        if isinstance(name, str) and isinstance(source, str):
            return cls(name, source)
        return cls.open(name if name in BUILT_IN else "world")

    def __reduce__(self):
        return Template, (self.name, self.source, *self._tokens)

    @property
    def marks(self) -> bool:
        """Whether it says what is trained."""
        return re.search(r"\{%[-+]?\s*generation\b", self.source) is not None

    def render(self, conversations: Sequence[tuple[list[Message], Any]]) -> list[str]:
        """For each (messages, tools) its text, with BORDER before and after what is trained, and CHANGED where blank lines went."""
        text = self._call(self._many, conversations=conversations)
        rendered = text.split(END)
        assert len(rendered) == len(conversations) + 1
        return [text.replace(BORDER + BORDER, "") for text in rendered[:-1]]

    def _call(self, compiled: jinja2.Template, **variables) -> str:
        try:
            return compiled.render(**variables)
        except UserError:
            raise
        except Exception as error:  # a template may fail in any way
            raise UserError(f"the template {self.name}: {error}") from None

    def segments(self, messages: list[Message], tools=None) -> list[tuple[str, bool]]:
        """The conversation's text in stretches (text, trained), neighbours differing."""
        pieces = self.render([(messages, tools)])[0].replace(CHANGED, "").split(BORDER)
        return [(piece, bool(i % 2)) for i, piece in enumerate(pieces) if piece]

    def prompt(self, messages: list[Message], tools=None) -> str:
        """What to ask a model with after `messages`, the last of them a user's: the text that training has before the answer."""
        return "".join(self._before_answer(messages, tools))

    def turn(self, messages: list[Message], tools=None) -> str:
        """The last stretch of `prompt`: what follows the answer before it."""
        return self._before_answer(messages, tools)[-1]

    def _before_answer(self, messages: list[Message], tools) -> list[str]:
        if not self.marks:
            return [self._call(self._one, messages=messages, tools=tools, add_generation_prompt=True).replace(CHANGED, "")]
        answered = [*messages, {"role": "assistant", "content": "x"}]
        return self.render([(answered, tools)])[0].replace(CHANGED, "").split(BORDER)[:-2]

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
        text = self.render([(messages, None)])[0].rpartition("answer")[2].replace(CHANGED, "")
        end, _, turn = text.partition(BORDER)
        return end, turn.partition("question")[0]

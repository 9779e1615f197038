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

FOLDER = Path(__file__).with_name("templates")
BUILT_IN = ("world", "g1")
OWN = "the model's own"
# Marks in a rendered text. They are halves of surrogate pairs, which no text of a file holds: rows with such are refused.
BORDER, END, CHANGED = "\udff0", "\udff1", "\udff2"
AS_IT_IS, STRIPPED = "\udff3", "\udff4"  # the place of a message's text, and one to which `no_blank_lines` was applied
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
    if text == AS_IT_IS:
        return STRIPPED
    text = text.strip()
    if "\n\n" not in text and "\r\n" not in text:
        return text
    return re.sub("\n\n+", "\n", text.replace("\r\n", "\n")) + CHANGED


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
        self._forms: dict[tuple[str, ...], tuple[str, list[bool]]] = {}
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

    def render(self, conversations: Sequence[tuple[list[Message], Any]]) -> list[str]:
        """For each (messages, tools) its text, with BORDER around what is trained, and CHANGED where blank lines went."""
        texts = [self._filled(*conversation) for conversation in conversations]
        rest = [conversation for conversation, text in zip(conversations, texts) if text is None]
        rendered = iter(self._rendered(rest) if rest else ())
        return [next(rendered) if text is None else text for text in texts]

    def _rendered(self, conversations: Sequence[tuple[list[Message], Any]]) -> list[str]:
        if not self.marks:
            return [self._marked(*conversation) for conversation in conversations]
        texts = self._call(self._many, conversations=conversations).split(END)
        assert len(texts) == len(conversations) + 1
        return [text.replace(BORDER + BORDER, "") for text in texts[:-1]]

    def _filled(self, messages: list[Message], tools) -> str | None:
        """The built-in templates put each text in as it is, or without blank lines, and do not look at it otherwise. So what
        stands around the texts is rendered once for all conversations of the same roles: five times faster. None: render it."""
        if tools or self.name not in BUILT_IN:
            return None
        roles = tuple([message["role"] if len(message) == 2 else "" for message in messages])
        if roles not in self._forms:
            if "" in roles or len(self._forms) > 1000:
                return None
            text = self._rendered([([{"role": role, "content": AS_IT_IS} for role in roles], None)])[0]
            places = re.findall(f"[{AS_IT_IS}{STRIPPED}]", text)
            assert len(places) == len(roles)
            form = re.sub(f"[{AS_IT_IS}{STRIPPED}]", "%s", text.replace("%", "%%"))
            self._forms[roles] = form, [place == STRIPPED for place in places]
        form, stripped = self._forms[roles]
        contents = [no_blank_lines(m["content"]) if strip else m["content"] for m, strip in zip(messages, stripped)]
        return form % tuple(contents)

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
        pieces = self.render([(messages, tools)])[0].replace(CHANGED, "").split(BORDER)
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

"""From a row of a file to the messages of a conversation, or to a text; what is left out, changed and not read is counted.

    {"text": ...}                        as it stands. Where it is wholly turns of one kind (User / Assistant, Instruction /
                                         Input / Response, Question / Answer), only the answers are trained
    {"question": ..., "answer": ...}     one turn: any of QUESTIONS with any of ANSWERS, `input` or `context` beside it
    {"messages": [...]}                  or "conversations"; of {"role", "content"} or {"from", "value"}

Beside a question or messages: system (or system_prompt), history (pairs, or messages), tools, reasoning of the answer.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import UserError
from ..terminal import counted
from .templates import Message

QUESTIONS = ("question", "prompt", "instruction", "query", "problem", "input")
ANSWERS = ("answer", "response", "output", "completion", "solution")
USUAL = {("question", "answer"), ("question", "solution"), ("prompt", "response"), ("prompt", "completion"),
         ("query", "response"), ("instruction", "output"),
         ("instruction", "response"), ("problem", "solution"), ("input", "output")}  # fmt: skip
OTHER_NAMES = {  # a field of ours -> what it may be called, the first that a row holds
    "messages": ("messages", "conversations", "conversation"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "reasoning": ("reasoning_content", "reasoning", "thinking"),
    "role": ("role", "from"),
    "content": ("content", "value"),
}
NAMES = ("text", *dict.fromkeys((*QUESTIONS, *ANSWERS, *OTHER_NAMES)))
FORMATS = ("auto", "text", "messages", *QUESTIONS)
REFUSED = {  # fields that mean something which is not done here
    "chosen": "preference pairs are not trained; --fields answer=chosen trains the preferred answers",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is trained; leave such rows out"),
}
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation"), "tool"),
}
READ_OF_MESSAGES = {"role", "from", "content", "value", "tool_calls", "function_call", *OTHER_NAMES["reasoning"],
                    "weight", "tool_call_id", "id"}  # fmt: skip
EMPTY: tuple[Any, ...] = (None, "", [], {})
MARKERS = "(System|User|Assistant|Instruction|Input|Response|Question|Answer):"
FIRST_TURN = re.compile(rf"\s*{MARKERS}")
NEXT_TURN = tuple(re.compile(gap + MARKERS) for gap in (r"\n\s*\n", r"\n"))  # after blank lines, or else only line ends
FAMILIES = ({"System", "User", "Assistant"}, {"System", "Instruction", "Input", "Response"}, {"System", "Question", "Answer"})
ANSWERING = {"Assistant", "Response", "Answer"}


class LeftOut(Exception):
    """The row has nothing to train; the reason."""


@dataclass
class Tally:
    """What happened to the rows: counts, with the place of the first where there is one. Adds up; goes through JSON.

    rows       read;   turns   of these, texts of which only the answers are trained
    left_out   reason -> [rows, first place];   changed   likewise;   unread   field -> rows in which it holds something
    """

    rows: int = 0
    turns: int = 0
    left_out: dict[str, list] = field(default_factory=dict)
    changed: dict[str, list] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)

    def note(self, which: dict[str, list], reason: str, place: str, count: int = 1) -> None:
        which.setdefault(reason, [0, place])[0] += count

    def add(self, other: "Tally") -> None:
        """`other` comes after this one."""
        self.rows, self.turns = self.rows + other.rows, self.turns + other.turns
        for mine, theirs in ((self.left_out, other.left_out), (self.changed, other.changed)):
            for reason, (count, place) in theirs.items():
                self.note(mine, reason, place, count)
        for name, count in other.unread.items():
            self.unread[name] = self.unread.get(name, 0) + count

    @property
    def skipped(self) -> int:
        """Rows left out."""
        return sum(count for count, _ in self.left_out.values())

    def reasons(self) -> str:
        """9 empty answers (first: line 41), 3 ..."""
        ordered = sorted(self.left_out.items(), key=lambda item: -item[1][0])
        return ", ".join(f"{count:,} {reason} (first: {place})" for reason, (count, place) in ordered)

    def nothing(self) -> str:
        """Why there is no document."""
        return f"left out: {self.reasons()}" if self.rows else "it is empty"

    def lines(self) -> list[str]:
        """For people."""
        lines = []
        if self.skipped:
            warning = "warning: " if self.skipped > 0.01 * self.rows else ""
            lines.append(f"{warning}{self.skipped:,} of {self.rows:,} rows left out: {self.reasons()}")
        lines += [f"{counted(count, 'row')} changed: {what} (first: {place})" for what, (count, place) in self.changed.items()]
        if self.turns:
            lines.append(f"{counted(self.turns, 'text row')} of turns (User: ... Assistant: ...), only the answers are trained; "
                         "--loss_mask all trains everything")  # fmt: skip
        if self.unread:
            counts = (name + (f" ({counted(n, 'row')})" if n < self.rows else "") for name, n in self.unread.items())
            lines.append(f"fields not read: {', '.join(counts)}")
        return lines


class Conversation(NamedTuple):
    messages: list[Message]
    tools: list | None


class Plan(NamedTuple):
    """How rows with certain fields are read."""

    kind: str  # "text", "messages" or "pair"
    question: str  # names in the file
    answer: str
    names: dict[str, str]  # those of OTHER_NAMES that the row has: ours -> the file's
    unread: tuple[str, ...]


class RowReader:
    """fields   {our name: the file's name}, as in {"question": "problem"}
    format   "auto", or what to take a row for that can be read in several ways: "text", "messages" or one of QUESTIONS
    """

    def __init__(self, fields: dict[str, str], format: str = "auto"):
        if format not in FORMATS:
            raise UserError(f"format {format!r} is not known; choose from {', '.join(FORMATS)}")
        if unknown := [name for name in fields if name not in NAMES]:
            raise UserError(f"--fields: there is no field {unknown[0]!r}; fields are {', '.join(sorted(NAMES))}")
        self.fields, self.format = fields, format
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._role, self._content = ((fields.get(n, n), *OTHER_NAMES[n]) for n in ("role", "content"))
        self._read_of_messages = READ_OF_MESSAGES | set(fields.values())

    def __call__(self, row: dict, tally: Tally) -> str | Conversation:
        """A text, or a conversation. LeftOut where there is nothing to train; UserError for what cannot be read."""
        keys = tuple([key for key, value in row.items() if value is not None])
        plan = self._plans.get(keys)
        if plan is None:
            if len(self._plans) > 10_000:  # rows that all differ
                self._plans.clear()
            plan = self._plans[keys] = self._plan(row, keys)
        tally.rows += 1
        for name in plan.unread:
            if row[name] not in EMPTY:
                tally.unread[name] = tally.unread.get(name, 0) + 1
        if plan.kind == "text":
            text = row[plan.question]
            if not isinstance(text, str | None):
                raise UserError(f"{plan.question!r} is {kind_of(text)}, wanted text")
            if not text:
                raise LeftOut("empty texts")
            return text
        messages = self._messages(row[plan.question], tally) if plan.kind == "messages" else self._pair(row, plan, tally)
        tools = None
        if plan.names:
            messages = [*self._before(row, plan, messages, tally), *messages]
            tools = parsed(row.get(plan.names.get("tools", ""))) or None
            if not isinstance(tools, list | None):
                raise UserError(f"{plan.names['tools']!r} is {kind_of(tools)}, wanted a list")
        return Conversation(messages, tools)

    def _plan(self, row: dict, keys: Iterable[str]) -> Plan:
        def column(name: str, keys) -> str | None:
            names = [self.fields[name]] if name in self.fields else [name, *OTHER_NAMES.get(name, ())]
            free = (n for n in names if name in self.fields or n not in self.fields.values())
            return next((n for n in free if n in keys), None)

        for held in (keys, tuple(row)):  # fields without a value count where there are no others
            found: dict[str, str] = {n: c for n in NAMES if (c := column(n, held)) is not None}
            questions = [n for n in QUESTIONS if n in found and n != "input"] or [n for n in ("input",) if n in found]
            pairs = [(q, a) for q in questions for a in ANSWERS if a in found]
            given = [pair for pair in pairs if pair[0] in self.fields and pair[1] in self.fields]
            pairs = given or [pair for pair in pairs if pair in USUAL] or pairs
            kinds = [kind for kind in ("text", "messages") if kind in found] + list(dict.fromkeys(q for q, _ in pairs))
            if self.format != "auto":
                kinds = [kind for kind in kinds if kind == self.format]
                pairs = [pair for pair in pairs if pair[0] == self.format]
            if kinds:
                break
        unclaimed = set(row) - set(found.values())
        if refused := [n for n in REFUSED if n in unclaimed and row[n] not in EMPTY and kinds != ["text"]]:
            raise UserError(f"{refused[0]!r} cannot be used: {REFUSED[refused[0]]}")
        if not kinds:
            wanted = "text, messages or a pair such as question and answer" if self.format == "auto" else self.format
            raise UserError(f"wanted {wanted}, got the fields {', '.join(map(repr, row)) or '(none)'}; name them by --fields")
        if len(kinds) > 1:
            raise UserError(f"the row can be read as {' or '.join(kinds)}; say which by --format")
        kind = kinds[0] if kinds[0] in ("text", "messages") else "pair"
        if kind == "pair" and len(pairs) > 1:
            answers = [found[answer] for _, answer in pairs]
            raise UserError(f"the answer may be {' or '.join(answers)}; say which by --fields answer={answers[0]}")
        question, answer = pairs[0] if kind == "pair" else (kind, "")
        names = {n: c for n, c in found.items() if n in OTHER_NAMES and n not in ("messages", "role", "content", question)}
        if kind != "pair":
            names = {} if kind == "text" else {n: c for n, c in names.items() if n in ("system", "history", "tools")}
        read = {found[question], found.get(answer), *names.values()}
        return Plan(kind, found[question], found.get(answer, ""), names, tuple(n for n in row if n not in read))

    def _pair(self, row: dict, plan: Plan, tally: Tally) -> list[Message]:
        prompt, completion = row[plan.question], row[plan.answer]
        if isinstance(prompt, list) and isinstance(completion, list):  # two pieces of one conversation
            return self._messages(prompt + completion, tally)
        question, answer = as_text(prompt, plan.question), as_text(completion, plan.answer)
        user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        if plan.names:
            columns = (plan.names.get(name) for name in ("input", "reasoning"))
            given, thought = (as_text(row[name], name) if name else "" for name in columns)
            if not question.strip():
                user["content"] = question = given
            elif given.strip():
                user["input"] = given
            if thought.strip():
                assistant["reasoning_content"] = thought
        if not question.strip():
            raise LeftOut("empty questions")
        if not answer.strip():
            raise LeftOut("empty answers")
        return [user, assistant]

    def _before(self, row: dict, plan: Plan, messages: list[Message], tally: Tally) -> list[Message]:
        """The system message and the history that stand beside a question or messages."""
        before: list[Message] = []
        if "system" in plan.names and (text := as_text(row[plan.names["system"]], plan.names["system"])).strip():
            own = [m["content"] for m in messages[:1] if m["role"] == "system"]
            if own and own[0].strip() != text.strip():
                raise UserError(f"{plan.names['system']!r} differs from the system message; keep one of them")
            before += [{"role": "system", "content": text}] * (not own)
        if "history" in plan.names and (history := parsed(row[plan.names["history"]])) not in EMPTY:
            if not isinstance(history, list) or not all(isinstance(turn, dict | list) for turn in history):
                raise UserError(f"{plan.names['history']!r} is not a list of pairs or messages")
            if messages and messages[0]["role"] == "system":
                raise UserError(f"{plan.names['history']!r} would come before the system message; give it in a field 'system'")
            turns = []
            for turn in history:
                if isinstance(turn, list) and len(turn) == 2:
                    turn = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn)]
                turns += turn if isinstance(turn, list) else [turn]
            before += self._messages(turns, tally, trained=False)
        return before

    def _messages(self, given, tally: Tally, trained: bool = True) -> list[Message]:
        given = parsed(given)
        if not isinstance(given, list):
            raise UserError(f"'messages' is {kind_of(given)}, wanted a list")
        messages: list[Message] = []
        for number, message in enumerate(given):
            if not isinstance(message, dict):
                raise UserError(f"message {number} is {kind_of(message)}, wanted an object with role and content")
            try:
                made = self._message(message)
            except UserError as error:
                raise UserError(f"message {number}: {error}") from None
            for name in message.keys() - self._read_of_messages:
                if message[name] not in EMPTY:
                    tally.unread[f"{name} of messages"] = tally.unread.get(f"{name} of messages", 0) + 1
            if made:
                messages.append(made)
        if trained and not any(m["role"] == "assistant" for m in messages):
            raise LeftOut("conversations without an answer")
        return messages

    def _message(self, message: dict) -> Message | None:
        """One message in our form; None for an empty system message."""
        role = next((message[n] for n in self._role if n in message), None)
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"the role {role!r} is not known; known are {', '.join(ROLES)}")
        name = next((n for n in self._content if n in message), "content")
        content = message.get(name)
        if not isinstance(content, str):
            content = "".join(map(part_text, content)) if isinstance(content, list) else as_text(content, name)
        made: Message = {"role": ROLES[role], "content": content}
        if len(message) > 2:
            self._extras(message, made)
        if role == "function_call" and isinstance(call := parsed(content), dict):
            made |= {"content": "", "tool_calls": [{"type": "function", "function": call_of(call)}]}
        if made["content"].strip() or made["role"] == "tool":
            return made
        if made["role"] == "system":
            return None
        if made["role"] == "user":
            raise LeftOut("empty questions")
        if not ("tool_calls" in made or "reasoning_content" in made):
            raise LeftOut("empty answers")
        return made

    def _extras(self, message: dict, made: Message) -> None:
        if message.get("weight") not in (None, 1):
            raise UserError(f"weight {message['weight']!r} cannot be used: every answer is trained; remove the field")
        for name in OTHER_NAMES["reasoning"]:
            if message.get(name) not in EMPTY:
                made["reasoning_content"] = as_text(message[name], name)
                break
        calls = parsed(message.get("tool_calls")) or ([{"function": c}] if (c := message.get("function_call")) else None)
        if calls:
            if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
                raise UserError("tool_calls is not a list of objects")
            made["tool_calls"] = [{"type": "function", "function": call_of(call.get("function", call))} for call in calls]


def call_of(function) -> dict:
    """{"name": ..., "arguments": {...}}, the arguments as an object although they often come as JSON in a text."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError("a tool call has no function name")
    return {"name": function["name"], "arguments": parsed(function.get("arguments")) or {}}


def parsed(value):
    """The list or object that a text holds as JSON (as in .csv); anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def part_text(part) -> str:
    """The text of one part of a content that is a list."""
    if isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, str):
        return part
    what = f"of the type {part.get('type')!r}" if isinstance(part, dict) else kind_of(part)
    raise UserError(f"a part of the content is {what}; only text can be trained")


def as_text(value, name: str) -> str:
    """A field as text: numbers and booleans as JSON writes them, null as nothing."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise UserError(f"{name!r} is {kind_of(value)}, wanted text")


def kind_of(value) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


def turns(text: str) -> list[tuple[str, bool]] | None:
    """The stretches of a text that is wholly turns, answers trained: what follows the colon, up to the next marker. Else None."""
    first = FIRST_TURN.match(text)
    if first is None or first[1] in ANSWERING:
        return None
    for pattern in NEXT_TURN:
        marks = [first, *pattern.finditer(text, first.end())]
        names = [mark[1] for mark in marks]
        family = next((f for f in FAMILIES if next((n for n in names if n != "System"), "User") in f), FAMILIES[0])
        marks = [mark for mark in marks if mark[1] in family]
        if not any(mark[1] in ANSWERING for mark in marks):
            continue
        segments, at = [], 0
        for mark, following in zip(marks, [*marks[1:], None]):
            if mark[1] in ANSWERING:
                end = following.start(1) if following else len(text)
                segments += [(text[at : mark.end()], False), (text[mark.end() : end], True)]
                at = end
        return [*segments, (text[at:], False)] if at < len(text) else segments
    return None

"""Rows: whatever form they have, the right text is trained, and what is left out, changed or not read is counted by name."""

import itertools
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_bone.data.encode import RowEncoder, parse_fields
from rwkv_bone.data.files import BEGINNING, Batch
from rwkv_bone.data.templates import Template
from rwkv_bone.data.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from rwkv_bone.errors import UserError

SHARED = Path(__file__).parents[1] / "../shared/data"
shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
BYTES = ByteTokenizer(257)
G1 = Template.open("g1")


def encode(*rows, **options):
    return RowEncoder(BYTES, **options).encode(Batch("f", "line", 1, list(rows), 0, BEGINNING))


def split(row, **options):
    """The row's document as text: trained stretches in [ ], / for the end of document."""
    done = encode(row, **options)
    assert len(done.sizes) == 1
    mask = [1] * len(done.tokens) if done.mask is None else done.mask.tolist()
    shown, before = "", 0
    for token, trained in zip(done.tokens.tolist(), mask):
        shown += ("[" if trained > before else "]" if trained < before else "") + (chr(token - 1) if token else "/")
        before = trained
    return shown + "]" * before


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


HI, HO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
CALL = {"id": "1", "type": "function", "function": {"name": "sky", "arguments": '{"at": "sea"}'}}
CALLED = '```json\n{"name": "sky", "arguments": {"at": "sea"}}\n```'


@pytest.mark.parametrize("row, wanted", [
    ({"text": " a\n\n\r\nb ", "meta": 1}, "[ a\n\n\r\nb /]"),
    ({"question": "1+1?", "answer": "2"}, "User: 1+1?\n\nAssistant:[ 2/]"),
    ({"prompt": "q", "response": "a", "id": 7}, "User: q\n\nAssistant:[ a/]"),
    ({"prompt": "q", "completion": "a"}, "User: q\n\nAssistant:[ a/]"),
    ({"instruction": "q", "response": "a"}, "User: q\n\nAssistant:[ a/]"),
    ({"query": "q", "response": "a"}, "User: q\n\nAssistant:[ a/]"),
    ({"problem": "q", "solution": "a", "answer": "b"}, "User: q\n\nAssistant:[ a/]"),
    ({"question": "q", "solution": "a"}, "User: q\n\nAssistant:[ a/]"),
    ({"input": "q", "output": "a"}, "User: q\n\nAssistant:[ a/]"),
    ({"question": "q", "answer": 0}, "User: q\n\nAssistant:[ 0/]"),
    ({"question": "q", "answer": False}, "User: q\n\nAssistant:[ false/]"),
    ({"question": 1, "answer": 2.5}, "User: 1\n\nAssistant:[ 2.5/]"),
    ({"question": "q", "answer": "a", "solution": None}, "User: q\n\nAssistant:[ a/]"),
    ({"instruction": "Add", "input": "1 1", "output": "2"}, "Instruction: Add\n\nInput: 1 1\n\nResponse:[ 2/]"),
    ({"instruction": "Sum", "context": "1 1", "response": "2"}, "Instruction: Sum\n\nInput: 1 1\n\nResponse:[ 2/]"),
    ({"instruction": "Add", "input": "", "output": "2"}, "User: Add\n\nAssistant:[ 2/]"),
    ({"instruction": "Add", "input": None, "output": "2"}, "User: Add\n\nAssistant:[ 2/]"),
    ({"instruction": "", "input": "Add", "output": "2"}, "User: Add\n\nAssistant:[ 2/]"),
    ({"question": " a\r\n\r\n\nb\n", "answer": "\n\nc\n\n\nd\n"}, "User: a\nb\n\nAssistant:[ c\nd/]"),
    ({"question": "q", "reasoning": "r", "answer": "a"}, "User: q\n\nAssistant:[ <think>r</think>a/]"),
    ({"instruction": "q", "input": "", "output": "a", "system": "S", "history": [["x", "y"]]},
     "System: S\n\nUser: x\n\nAssistant:[ y\n\n]User: q\n\nAssistant:[ a/]"),
    ({"prompt": [HI], "completion": [HO]}, "User: Hi\n\nAssistant:[ Ho/]"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system_prompt": "S"},
     "System: S\n\nUser: q\n\nAssistant:[ a/]"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(CALL["function"])},
                        {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}]},
     f"User: q\n\nAssistant:[ {CALLED}\n\n]User: Function output:\nr\n\nAssistant:[ a/]"),
    (chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Bye"), ("assistant", "So long")),
     "System: Be brief.\n\nUser: Hi\n\nAssistant:[ Ho\n\n]User: Bye\n\nAssistant:[ So long/]"),
    (chat(("user", "Hi"), ("assistant", "Ho"), ("user", "Bye")), "User: Hi\n\nAssistant:[ Ho\n\n]User: Bye/"),
    (chat(("system", ""), ("user", "Hi"), ("assistant", "Ho")), "User: Hi\n\nAssistant:[ Ho/]"),
    (chat(("system", None), ("user", "Hi"), ("assistant", "Ho")), "User: Hi\n\nAssistant:[ Ho/]"),
    (chat(("developer", "D"), ("user", "Hi"), ("assistant", "Ho")), "System: D\n\nUser: Hi\n\nAssistant:[ Ho/]"),
    (chat(("system", "S"), ("user", "Hi"), ("assistant", "Ho"), system="S"), "System: S\n\nUser: Hi\n\nAssistant:[ Ho/]"),
    (chat(("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), ("assistant", "Ho")),
     "User: Hi\n\nAssistant:[ Ho/]"),
    (chat(("user", "Hi"), ("assistant", "Ho"), history=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]),
     "User: x\n\nAssistant:[ y\n\n]User: Hi\n\nAssistant:[ Ho/]"),
    ({"messages": [HI, {**HO, "thinking": "hm"}]}, "User: Hi\n\nAssistant:[ <think>hm</think>Ho/]"),
    ({"messages": [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "dry"}, HO],
      "tools": [{"name": "sky"}]},
     'System: Tools:\n{"name": "sky"}\nReturn only a JSON function call.\n\nUser: Hi\n\n'
     f"Assistant:[ {CALLED}\n\n]User: Function output:\ndry\n\nAssistant:[ Ho/]"),
    ({"messages": json.dumps([HI, HO]), "tools": "[]"}, "User: Hi\n\nAssistant:[ Ho/]"),
])  # fmt: skip
def test_only_answers_and_what_ends_them_are_trained(row, wanted):
    assert split(row) == wanted
    for mask in ("all", "pad"):
        assert split(row, loss_mask=mask) == "[" + wanted.replace("[", "").replace("]", "") + "]"


@pytest.mark.parametrize("row, wanted", [
    (chat(("system", "a\n\nb"), ("user", "c\r\n\r\nd"), ("assistant", "e\n\nf\r\n"), ("user", "g"), ("assistant", "h")),
     "System: a\nb\n\nUser: c\nd\n\nAssistant:[ e\n\nf\r\n\n\n]User: g\n\nAssistant:[ h/]"),
    ({"instruction": "Add", "input": "1\n\n1", "output": "2"}, "User: Add\n1\n1\n\nAssistant:[ 2/]"),
    ({"messages": [HI, {**HO, "reasoning_content": "a\n\nb"}]}, "User: Hi\n\nAssistant:[ <think>a\n\nb</think>Ho/]"),
])  # fmt: skip
def test_g1_keeps_an_answers_blank_lines(row, wanted):
    assert split(row, template=G1) == wanted


@pytest.mark.parametrize("text, wanted", [
    ("User: a\n\nAssistant: b\n\nmore\n\nUser: c\n\nAssistant: d",
     "User: a\n\nAssistant:[ b\n\nmore\n\n]User: c\n\nAssistant:[ d/]"),
    ("System: s\n\nUser: a\r\n\r\nAssistant: b\n\n", "System: s\n\nUser: a\r\n\r\nAssistant:[ b\n\n/]"),
    ("\n\nUser: a\n\nAssistant: b\n\nUser: c", "\n\nUser: a\n\nAssistant:[ b\n\n]User: c/"),
    ("Instruction: a\n\nInput: b\n\nResponse: c\n\nAnswer: 5", "Instruction: a\n\nInput: b\n\nResponse:[ c\n\nAnswer: 5/]"),
    ("Question: a\nAnswer: b", "Question: a\nAnswer:[ b/]"),
    ("He said:\n\nUser: a\n\nAssistant: b", "[He said:\n\nUser: a\n\nAssistant: b/]"),
    ("Assistant: b", "[Assistant: b/]"),
    ("User: a", "[User: a/]"),
])  # fmt: skip
def test_a_text_that_is_wholly_turns_trains_their_answers(text, wanted):
    assert split({"text": text}) == wanted
    assert encode({"text": text}).tally.turns == (wanted[0] != "[")
    assert split({"text": text}, loss_mask="all") == f"[{text}/]"


def test_fields_may_have_other_names():
    row = {"problem": "1+1", "solution": "two", "answer": "2"}
    assert split(row, fields={"question": "problem", "answer": "answer"}).endswith("[ 2/]")
    assert split(row, fields={"question": "problem", "answer": "solution"}).endswith("[ two/]")
    row = {"talk": [{"who": "human", "says": "a"}, {"who": "gpt", "says": "b"}]}
    assert split(row, fields=parse_fields("messages=talk,role=who,content=says")).endswith("[ b/]")
    assert split({"prompt": "a", "chosen": "b", "rejected": "c"}, fields={"answer": "chosen"}).endswith("[ b/]")
    with pytest.raises(UserError, match="name=NAME_IN_THE_FILE"):
        parse_fields("question")
    with pytest.raises(UserError, match="no field 'questoin'"):
        RowEncoder(BYTES, fields={"questoin": "q"})


def test_format_settles_what_a_row_is():
    row = {"text": "a", "question": "b", "answer": "c"}
    assert split(row, format="text") == "[a/]" and split(row, format="question").endswith("[ c/]")
    with pytest.raises(UserError, match="wanted prompt, got the fields"):
        split(row, format="prompt")
    with pytest.raises(UserError, match="choose from auto, text, messages, question, prompt, instruction"):
        RowEncoder(BYTES, format="poem")
    with pytest.raises(UserError, match="loss_mask 'qa' is not known"):
        RowEncoder(BYTES, loss_mask="qa")


@pytest.mark.parametrize("row, message", [
    ({"txt": "a"}, "wanted text, messages or a pair.*got the fields 'txt'; name them by --fields"),
    ({}, r"got the fields \(none\)"),
    ({"text": 5}, "'text' is a number, wanted text"),
    ({"question": "a", "answer": ["b"]}, "'answer' is a list, wanted text"),
    ({"text": "a", "question": "b", "answer": "c"}, "the row can be read as text or question; say which by --format"),
    ({"question": "a", "answer": "b", "solution": "c"}, "answer or solution; say which by --fields answer="),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'chosen' cannot be used: preference pairs"),
    ({"question": "a", "answer": "b", "image": "x.png"}, "'image' cannot be used: only text"),
    ({"messages": "a"}, "'messages' is a text, wanted a list"),
    ({"messages": ["a"]}, "message 0 is a text, wanted an object with role and content"),
    (chat(("robot", "a")), "message 0: the role 'robot' is not known; known are system"),
    (chat(("user", {"a": 1})), "message 0: 'content' is an object"),
    (chat(("user", [{"type": "image_url"}])), "message 0: a part of the content is of the type 'image_url'"),
    ({"messages": [HI, {**HO, "weight": 0}]}, "message 1: weight 0 cannot be used"),
    ({"messages": [HI, {**HO, "tool_calls": [{"x": 1}]}]}, "message 1: a tool call has no function name"),
    (chat(("system", "a"), ("user", "b"), ("assistant", "c"), system="d"), "'system' differs from the system message"),
    (chat(("user", "b"), ("assistant", "c"), history="d"), "'history' is not a list of pairs or messages"),
    ({"text": "a\ud800"}, r"character 1 is U\+D800"),
    ({"question": "a", "answer": "b\udff0c"}, r"character 1 is U\+DFF0"),  # such characters mark the borders of what is trained
    ({"messages": [HI, HO], "tools": [{"name": "\udff1"}]}, r"U\+DFF1"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_by_line(row, message):
    with pytest.raises(UserError, match=f"f, line 2: .*{message}"):
        encode({"text": "fine"}, row, format="auto")


@pytest.mark.parametrize("row, reason", [
    ({"text": ""}, "empty texts"), ({"text": None}, "empty texts"),
    ({"question": "a", "answer": " "}, "empty answers"), ({"question": "", "answer": "a"}, "empty questions"),
    ({"instruction": "a", "input": "b", "output": None}, "empty answers"),
    ({"messages": []}, "conversations without an answer"), (chat(("user", "a")), "conversations without an answer"),
    (chat(("user", "a"), ("assistant", "")), "empty answers"), (chat(("user", ""), ("assistant", "a")), "empty questions"),
])  # fmt: skip
def test_rows_left_out_are_counted_by_reason(row, reason):
    done = encode(*[{"text": "a"}] * 3, row, row)
    assert len(done.sizes) == 3 and done.tally.left_out == {reason: [2, "f, line 4"]} and done.tally.skipped == 2
    assert done.tally.lines() == [f"warning: 2 of 5 rows left out: 2 {reason} (first: f, line 4)"]


def test_changes_and_fields_that_nothing_reads_are_counted():
    blank, plain = {"question": "a\n\nb", "answer": "c"}, {"question": "a", "answer": "c"}
    tally = encode(plain, blank, {**blank, "source": "x", "empty": ""}, {**plain, "source": "y"}, loss_mask="all").tally
    tally.add(encode({"messages": [HI, {**HO, "name": "Bob"}]}).tally)
    assert tally.unread == {"source": 2, "name of messages": 1}
    assert [(count, place) for count, place in tally.changed.values()] == [(2, "f, line 2")]
    assert tally.lines()[-1] == "fields not read: source (2 rows), name of messages (1 row)"
    assert not encode(chat(("user", "a"), ("assistant", "b\n\nc")), template=G1).tally.changed
    assert encode(*[{"text": "a"}] * 199, {"text": ""}).tally.lines()[0].startswith("1 of 200 rows left out")


@shared
def test_the_prompt_has_the_tokens_that_asking_it_gives():
    tokenizer, template = open_tokenizer(), Template.open("world")
    rows = [json.loads(line) for line in (SHARED / "gsm8k/train.jsonl").read_text().splitlines()[:200]]
    done = RowEncoder(tokenizer).encode(Batch("f", "line", 1, rows, 0, BEGINNING))
    ends = done.sizes.cumsum()
    for row, end, size in zip(rows, ends, done.sizes):
        tokens, mask = done.tokens[end - size : end].tolist(), done.mask[end - size : end].tolist()
        asked = tokenizer.encode(template.prompt([{"role": "user", "content": row["question"]}]))
        assert tokens[: len(asked)] == asked and mask == [0] * len(asked) + [1] * (size - len(asked))
        assert tokens[len(asked) :] == [*tokenizer.encode(" " + row["answer"].replace("\n\n", "\n")), 0]


class Spaceless(Tokenizer):
    """Characters but spaces, with two tokens before a document and one after."""

    begin, end, vocab_size = (1, 2), (3,), 256

    def encode(self, text):
        return [ord(c) for c in text if c != " "]


def test_documents_begin_and_end_where_a_stretch_has_no_token():
    rows = [{"text": text} for text in ("ab", " ", " ", "c")]
    done = RowEncoder(Spaceless()).encode(Batch("f", "line", 1, rows, 0, BEGINNING))
    assert done.sizes.tolist() == [5, 3, 3, 4]
    assert done.tokens.tolist() == [1, 2, 97, 98, 3, 1, 2, 3, 1, 2, 3, 1, 2, 99, 3]


# --- templates


parts = st.sampled_from(["a", " b ", "\n\nc\n\n\nd", "e\r\nf", "%s", "{{ g }}", "é", "User:"])
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": parts},
    optional={"input": parts | st.just(""), "reasoning_content": parts | st.just("")},
)


@given(st.lists(st.lists(message, min_size=1, max_size=5), min_size=1, max_size=4), st.sampled_from(["world", "g1"]))
def test_many_conversations_at_once_are_what_each_is_by_itself(batch, name):
    built_in = Template.open(name)
    by_jinja = Template("a copy", built_in.source)  # which takes no short cut
    talks = [(messages, None) for messages in batch]
    assert built_in.pieces(talks) == by_jinja.pieces(talks) == [by_jinja.pieces([talk])[0] for talk in talks]
    for talk in talks:
        found = built_in.segments(*talk)
        assert not any(a[1] == b[1] for a, b in itertools.pairwise(found))
        assert any(trained for _, trained in found) == any(message["role"] == "assistant" for message in talk[0])


@pytest.mark.parametrize("name, with_input", [
    ("world", "Instruction: q\n\nInput: i\n\nResponse:"), ("g1", "User: q\ni\n\nAssistant:")])  # fmt: skip
def test_a_model_is_asked_with_the_text_that_trained_it(name, with_input):
    template, question = Template.open(name), {"role": "user", "content": "q"}
    assert template.prompt([{**question, "input": "i"}]) == with_input
    assert template.prompt([{"role": "system", "content": "S"}, question]) == "System: S\n\nUser: q\n\nAssistant:"
    assert template.turn([HI, HO, question]) == "User: q\n\nAssistant:"
    assert template.turn_end == "\n\n" and "\n\nUser:" in template.stops
    again = Template.of(json.loads(json.dumps(template.identity())))
    assert again.source == template.source == pickle.loads(pickle.dumps(template)).source


CHATML = ("{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}"
          "{{ m.content }}<|end|>\n{% endgeneration %}{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}\n")  # fmt: skip


def test_a_template_of_ones_own_is_jinja_as_in_transformers(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(CHATML)
    template = Template.open(str(path))
    assert split({"question": "q", "answer": "a"}, template=template) == "<|user|>q<|end|>\n<|assistant|>[a<|end|>\n/]"
    assert template.prompt([HI]) == "<|user|>Hi<|end|>\n<|assistant|>" and template.stops == ("<|end|>",)
    assert Template.of(template.identity()).source == CHATML
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    (text,), (spans,) = transformers.render_jinja_template([[HI, HO, HI, HO]], chat_template=CHATML,
                                                           return_assistant_tokens_mask=True)  # fmt: skip
    ours = template.segments([HI, HO, HI, HO])
    assert "".join(piece for piece, _ in ours) == text
    assert [piece for piece, trained in ours if trained] == [text[a:b] for a, b in spans]
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": {"content": "<s>"}}))
    assert split({"question": "q", "answer": "a"}, template=Template.open(str(config)), loss_mask="all") == "[<s>q/]"
    with pytest.raises(UserError, match="does not mark what is trained"):
        split({"question": "q", "answer": "a"}, template=Template.open(str(config)))


@pytest.mark.parametrize("content, message", [
    ("{% for", "line 1: "), ('{"pairs": []}', "is JSON, an earlier form.*world.jinja"),
    ("{{ messages.x.y }}{% generation %}{% endgeneration %}", "x"),
    ("{% generation %}{{ raise_exception('no tools') }}{% endgeneration %}", "no tools"),
    ("{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}", "unsafe"),
])  # fmt: skip
def test_a_bad_template_is_one_line(tmp_path, content, message):
    (tmp_path / "t").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        split({"question": "q", "answer": "a"}, template=Template.open(str(tmp_path / "t")))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read the template none"):
        Template.open("none")

"""jsonl: the right text is trained, every defect is named by file and line, and the command writes what others read."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_bone.data import jsonl
from rwkv_bone.data.binidx import BinidxDocuments, BinidxWriter
from rwkv_bone.data.jsonl import Pair, RowEncoder, Templates, encode_files, find_files, parse_fields
from rwkv_bone.data.jsonl_to_binidx import Progress, convert
from rwkv_bone.data.tokenizer import ByteTokenizer, open_tokenizer
from rwkv_bone.errors import UserError

SHARED = Path(__file__).parents[1] / "../shared/data"
shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
BYTES = ByteTokenizer(257)


def rows(path, *content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def split(row, **options):
    """(whole text, [trained stretches]) of a row, with <end> for the end of document, in bytes."""
    tokens, mask = RowEncoder(BYTES, **options)(row)
    mask = [1] * len(tokens) if mask is None else mask
    runs, before = [], 0
    for token, trained in zip(tokens, mask):
        shown = BYTES.decode([token]) or "<end>"
        if trained and before:
            runs[-1] += shown
        elif trained:
            runs.append(shown)
        before = trained
    return BYTES.decode(tokens), runs


def test_a_text_is_left_as_it_is_and_trained_whole():
    assert split({"text": " a\n\n\r\nb ", "meta": 1}) == (" a\n\n\r\nb ", [" a\n\n\r\nb <end>"])


@pytest.mark.parametrize(
    "row, prompt, answer",
    [
        ({"question": "1+1?", "answer": "2"}, "User: 1+1?\n\nAssistant:", " 2"),
        ({"prompt": "Hi", "response": "Ho", "id": 7}, "User: Hi\n\nAssistant:", " Ho"),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "Instruction: Add\n\nInput: 1 1\n\nResponse:", " 2"),
        ({"instruction": "Add", "input": "", "output": "2"}, "User: Add\n\nAssistant:", " 2"),
        ({"instruction": "Add", "input": None, "output": "2"}, "User: Add\n\nAssistant:", " 2"),
        ({"instruction": "Add", "output": "2"}, "User: Add\n\nAssistant:", " 2"),
        ({"question": " a\r\n\r\n\nb\n", "answer": "\n\nc\n\n\nd\n"}, "User: a\nb\n\nAssistant:", " c\nd"),
    ],
)
def test_only_the_answer_and_the_end_of_a_pair_are_trained(row, prompt, answer):
    assert split(row) == (prompt + answer, [answer + "<end>"])
    for mask in ("all", "pad"):
        assert split(row, loss_mask=mask) == (prompt + answer, [prompt + answer + "<end>"])


def test_each_answer_of_a_chat_is_trained_with_its_end_but_no_marker():
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Bye"), ("assistant", "So long")]
    text, trained = split({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert text == "System: Be brief.\n\nUser: Hi\n\nAssistant: Ho\n\nUser: Bye\n\nAssistant: So long"
    assert trained == [" Ho\n\n", " So long<end>"]
    text, trained = split({"messages": [{"role": r, "content": c} for r, c in turns[:4]]})
    assert trained == [" Ho\n\n"] and text.endswith("User: Bye"), "the end after a question is no answer"


def test_fields_may_have_other_names():
    row = {"problem": "1+1", "solution": "two", "answer": "2"}
    assert split(row, fields={"question": "problem", "answer": "solution"})[1] == [" two<end>"]
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert split(row, fields=parse_fields("messages=conversations,role=from,content=value"))[1] == [" b<end>"]
    with pytest.raises(UserError, match="name=NAME_IN_THE_FILE"):
        parse_fields("question")
    with pytest.raises(UserError, match="no template has a field 'questoin'"):
        RowEncoder(BYTES, fields={"questoin": "q"})


def test_templates_of_ones_own_replace_what_they_name(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"pairs": [{"prompt": "Q {q} in { x }\nA", "answer": "> {a}!"}], "blank_lines": "keep"}))
    templates = Templates.from_file(path)
    row = {"q": "x\n\ny", "a": "{q}"}
    assert split(row, templates=templates) == ("Q x\n\ny in { x }\nA> {q}!", ["> {q}!<end>"])
    path.write_text(json.dumps({"chat": {"markers": {"me": "<", "you": ">"}, "trained": ["you"], "before": "", "after": "|"}}))
    row = {"messages": [{"role": "you", "content": "a"}, {"role": "me", "content": "b"}]}
    assert split(row, templates=Templates.from_file(path)) == (">a|<b", ["a|"])
    assert Templates.from_file(path).pairs == Templates().pairs


@pytest.mark.parametrize(
    "content, message",
    [
        ("[", "no template file"),
        ("[]", "no template file"),
        ('{"pear": []}', "no template file.*pear"),
        ('{"pairs": [{"prompt": "a"}]}', "no template file.*answer"),
        ('{"pairs": [{"prompt": "a", "answer": "b"}]}', "'answer' that names a field"),
        ('{"pairs": [{"prompt": 1, "answer": "{b}"}]}', "a pair needs a text"),
        ('{"chat": {"markers": {"a": 1}}}', "a text for each role"),
        ('{"chat": {"markers": []}}', "a text for each role"),
        ('{"chat": {"trained": ["bot"]}}', "role 'bot' is to be trained but has no marker"),
        ('{"chat": {"colour": 1}}', "no template file.*colour"),
        ('{"blank_lines": "some"}', "drop or keep"),
    ],
)
def test_a_bad_template_file_is_one_line(tmp_path, content, message):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        Templates.from_file(tmp_path / "t.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read the template"):
        Templates.from_file(tmp_path / "none.json")


@shared
def test_the_prompt_has_the_tokens_that_asking_it_gives():
    tokenizer = open_tokenizer()
    encoder = RowEncoder(tokenizer)
    for line in (SHARED / "gsm8k/train.jsonl").read_text().splitlines()[:200]:
        tokens, mask = encoder(json.loads(line))
        prompt, answer = encoder.segments(json.loads(line))
        n = mask.index(1)
        assert tokens[:n] == tokenizer.encode(prompt[0]) and tokens[n:] == [*tokenizer.encode(answer[0]), 0]
        assert set(mask[n:]) == {1} and tokens == [*tokenizer.encode(prompt[0] + answer[0]), 0]


@given(st.lists(st.sampled_from([{"text": "x"}, {"question": "a", "answer": "bc"}, {"text": ""}]), max_size=9), st.booleans())
def test_batches_equal_rows_one_by_one(tmp_path_factory, content, zipped):
    path = tmp_path_factory.mktemp("r") / ("x.jsonl.gz" if zipped else "x.jsonl")
    data = "\n\n".join(map(json.dumps, content)).encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    encoder = RowEncoder(BYTES)
    wanted = [encoder(row) for row in content]
    batches = list(encode_files([str(path)], encoder))
    assert sum(batch.skipped for batch in batches) == wanted.count(None)
    wanted = [(tokens, mask or [1] * len(tokens)) for tokens, mask in filter(None, wanted)]
    found = []
    for batch in batches:
        mask = np.ones(len(batch.tokens), int) if batch.mask is None else batch.mask
        cuts = np.cumsum(batch.sizes)[:-1]
        if len(batch.sizes):
            found += [(a.tolist(), b.tolist()) for a, b in zip(np.split(batch.tokens, cuts), np.split(mask, cuts))]
    assert found == wanted


BROKEN = [
    (b'{"text": "a"}\n{"text": \n', "line 2: broken JSON"),
    (b'{"text": "a"}\n\n\n[1]\n', "line 4: the line is a list, wanted an object"),
    (b"5", "line 1: the line is a number"),
    (b'{"text": "\xff"}', "line 1: byte 10 is no UTF-8"),
    (b'{"txt": "a"}', "line 1: wanted text, messages or a pair.*got the fields 'txt'; name them by --fields"),
    (b"{}", r"line 1: .*got the fields \(none\)"),
    (b'{"text": 5}', "line 1: 'text' is a number, wanted text"),
    (b'{"question": "a", "answer": ["b"]}', "line 1: 'answer' is a list, wanted text"),
    (b'{"text": "a", "question": "b", "answer": "c"}', "line 1: the row can be read as text or question; say which by --format"),
    (b'{"messages": "a"}', "line 1: 'messages' is a text, wanted a list"),
    (b'{"messages": ["a"]}', "line 1: message 0 is a text, wanted an object with role and content"),
    (b'{"messages": [{"role": "bot", "content": "a"}]}', "line 1: message 0 has the role 'bot'; known are system, user"),
    (b'{"messages": [{"role": "user", "content": 1}]}', "line 1: 'content' is a number"),
    (b'{"text": "a\\ud800"}', r"line 1: character 1 is U\+D800"),
    (b"[" * 100_000, "line 1: "),
    (b'{"text": ' + b"1" * 5000 + b"}", "line 1: "),
]


@pytest.mark.parametrize("content, message", BROKEN, ids=[message[:30] for _, message in BROKEN])
def test_a_broken_line_is_named_by_file_and_number(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.jsonl, " + message) as caught:
        list(encode_files(find_files(tmp_path / "x.jsonl"), RowEncoder(BYTES)))
    assert "\n" not in str(caught.value)


def test_line_numbers_hold_across_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "BATCH_BYTES", 40)
    path = rows(tmp_path / "x.jsonl", *[{"text": "a"}] * 50)
    with open(path, "a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match="line 51: broken JSON"):
        list(encode_files([path], RowEncoder(BYTES)))


scraps = st.lists(st.sampled_from(['{"text":', '"a"', "}", "[", "\n", "null", ","]))


@given(st.binary(max_size=60) | scraps.map("".join).map(str.encode))
def test_any_bytes_give_documents_or_a_user_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("b")
    for name in ("x.jsonl", "x.jsonl.gz"):
        (folder / name).write_bytes(content)
        try:
            list(encode_files([str(folder / name)], RowEncoder(BYTES)))
        except UserError as error:
            assert str(folder / name) in str(error)


def test_a_cut_gz_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-9])
    with pytest.raises(UserError, match=r"cannot read .*x\.jsonl\.gz: Compressed file ended"):
        list(encode_files([str(tmp_path / "x.jsonl.gz")], RowEncoder(BYTES)))
    with pytest.raises(UserError, match=r"y\*\.jsonl: no such file"):
        find_files([str(tmp_path / "y*.jsonl")])
    with pytest.raises(UserError, match=r"is not a file; for all in a folder say .*\*\.jsonl"):
        find_files([str(tmp_path)])


def test_an_endless_line_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE", 100)
    (tmp_path / "x.jsonl").write_bytes(b" " * 101)
    with pytest.raises(UserError, match=r"line 1 is longer than 0 MiB; is this jsonl"):
        list(encode_files([str(tmp_path / "x.jsonl")], RowEncoder(BYTES)))


def test_globs_come_in_order_of_name(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    found = find_files([str(tmp_path / "c.txt"), str(tmp_path / "*.jsonl")])
    assert [os.path.basename(path) for path in found] == ["c.txt", "a.jsonl", "b.jsonl"]


def test_an_unknown_loss_mask_is_refused():
    with pytest.raises(UserError, match="loss_mask 'qa' is not known; choose from answer, all, pad"):
        RowEncoder(BYTES, loss_mask="qa")


def test_format_settles_what_a_row_is():
    row = {"text": "a", "question": "b", "answer": "c"}
    assert split(row, format="text")[0] == "a" and split(row, format="question")[1] == [" c<end>"]
    with pytest.raises(UserError, match="wanted prompt, got the fields"):
        split(row, format="prompt")
    with pytest.raises(UserError, match="choose from auto, text, messages, question, instruction, prompt"):
        RowEncoder(BYTES, format="poem")


@pytest.mark.parametrize("empty", [
    {"text": ""}, {"text": None}, {"question": "a", "answer": " "}, {"instruction": "a", "input": "b", "output": ""},
    {"messages": []}, {"messages": [{"role": "user", "content": "a"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
])  # fmt: skip
def test_rows_without_anything_to_train_are_left_out(empty):
    assert RowEncoder(BYTES)(empty) is None


# --- the command


def command(*args, **options):
    argv = [sys.executable, "-m", "rwkv_bone.data.jsonl_to_binidx", *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, **options)


@shared
@pytest.mark.parametrize("source, name, options", [
    ("sample.jsonl", "sample_text_document.int32", ["--dtype", "int32"]),
    ("unicode.jsonl", "unicode_text_document.int32", ["--dtype", "int32", "--workers", "2"]),
    ("sample.shuffled.jsonl", "sample.make_data.uint16", []),
])  # fmt: skip
def test_the_command_writes_the_golden_files_byte_for_byte(tmp_path, source, name, options):
    done = command(SHARED / "binidx" / source, "out/x", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for end in (".bin", ".idx"):
        assert (tmp_path / f"out/x{end}").read_bytes() == (SHARED / f"binidx/{name}{end}").read_bytes()
    assert sorted(os.listdir(tmp_path / "out")) == ["x.bin", "x.idx"]
    assert done.stderr == "" and "\x1b" not in done.stdout and "\r" not in done.stdout


@shared
def test_the_command_reports_what_it_wrote(tmp_path):
    done = command(SHARED / "gsm8k/test.jsonl", SHARED / "binidx/unicode.jsonl", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    docs = BinidxDocuments(tmp_path / "x")
    assert len(docs) == 1319 + 17
    for line in (
        "documents  1,336 (1 empty rows left out)",
        f"tokens     {docs.total_tokens:,}, ",
        f"longest    {docs.sizes.max()} tokens",
        f"trained    {docs.mask.sum():,} tokens ({docs.mask.mean():.1%})",
    ):
        assert line in done.stdout
    assert "MB/s" in done.stdout and "x.mask.bin" in done.stdout
    assert docs.mask_of(1319).all() and not docs.mask_of(0).all()


def test_many_processes_write_what_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "BATCH_BYTES", 300)
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 90, 400).tolist()
    content = [{"question": "q" * n, "answer": "a" * (n % 7)} if n % 3 else {"text": "t" * n} for n in lengths]
    path = rows(tmp_path / "x.jsonl", *content)
    made = [convert(path, tmp_path / name, RowEncoder(BYTES), workers=n) for n, name in ((1, "one"), (3, "three"))]
    assert made[0].documents == made[1].documents > 100 and made[0].skipped == made[1].skipped > 0
    for end in (".bin", ".idx", ".mask.bin"):
        assert (tmp_path / f"one{end}").read_bytes() == (tmp_path / f"three{end}").read_bytes()


def test_a_broken_line_in_a_worker_stops_the_command_in_one_line(tmp_path):
    path = rows(tmp_path / "x.jsonl", *[{"text": "a"}] * 9)
    with open(path, "a") as file:
        file.write("{")
    done = command(path, tmp_path / "out", "--vocab_size", 257, "--workers", 2)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}, line 10: broken JSON") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["x.jsonl"]


@pytest.mark.parametrize("args, message", [
    (["x.jsonl"], "the following arguments are required: out"),
    (["x.jsonl", "y.jsonl"], "looks like an input; add a name"),
    (["none.jsonl", "out"], "none.jsonl: no such file"),
    (["x.jsonl", "out", "--vocab_size", "50277"], "give --tokenizer"),
    (["empty.jsonl", "out", "--vocab_size", "257"], "no document, 1 empty rows"),
    (["x.jsonl", "out", "--vocab_size", "257", "--template", "none"], "cannot read the template"),
])  # fmt: skip
def test_a_mistaken_command_ends_with_code_2_and_writes_nothing(tmp_path, args, message):
    rows(tmp_path / "x.jsonl", {"text": "a"})
    rows(tmp_path / "empty.jsonl", {"text": ""})
    done = command(*args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["empty.jsonl", "x.jsonl"]


def test_existing_files_need_overwrite(tmp_path):
    path = rows(tmp_path / "x.jsonl", {"text": "a"})
    assert command(path, tmp_path / "o", "--vocab_size", 257).returncode == 0
    done = command(path, tmp_path / "o", "--vocab_size", 257)
    assert done.returncode == 2 and "o.idx is there already" in done.stderr
    assert command(path, tmp_path / "o", "--vocab_size", 257, "--overwrite").returncode == 0


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_file_of_that_name_and_no_process(tmp_path, number, workers):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "%s"}\n' % (b"a long line " * 80) * 40_000)  # 39 MB: seconds of work
    argv = [sys.executable, "-m", "rwkv_bone.data.jsonl_to_binidx", path, tmp_path / "o", "--vocab_size", "257"]
    process = subprocess.Popen([*argv, "--workers", str(workers)], stderr=subprocess.PIPE)
    deadline = time.time() + 60
    written = tmp_path / "o.bin.part"
    while not (written.exists() and written.stat().st_size > 1 << 20) and time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = children.read_text().split() if children.exists() else []
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert sorted(os.listdir(tmp_path)) == ["o.bin.part", "o.idx.part", "o.part", "x.jsonl"] and "Traceback" not in stderr
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.time() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if os.path.exists(f"/proc/{child}")], "workers outlive the command"


KILLED = """
import os, signal, sys
from rwkv_bone.data import jsonl, jsonl_to_binidx as program
jsonl.BATCH_BYTES, program.SAVE_SECONDS, left = 2000, 0, int(sys.argv[1])
def report(self, *_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
program.Progress.__call__ = report
program.main(sys.argv[2:])
"""


def killed(after: int, *args) -> subprocess.CompletedProcess:
    """Run the command with a save after each small batch and SIGKILL at its `after`-th report; 0: to the end."""
    argv = [sys.executable, "-c", KILLED, after, *args, "--vocab_size", 257]
    return subprocess.run([str(arg) for arg in argv], capture_output=True, text=True, check=False)


def lots(path: Path, count: int, masked_from: int) -> str:
    pairs = [{"question": f"{i}?" * (i % 9), "answer": "a" * (i % 50)} for i in range(masked_from, count)]
    rows(path.with_suffix(".plain"), *({"text": f"{i} é"} for i in range(masked_from)), *pairs)
    content = path.with_suffix(".plain").read_bytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("names", [["x.jsonl"], ["x.jsonl.gz"], ["x.jsonl.gz", "y.jsonl"]], ids=" ".join)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, names, workers):
    inputs = [lots(tmp_path / name, 1000, masked_from=100 if i == 0 else 0) for i, name in enumerate(names)]
    assert killed(0, *inputs, tmp_path / "whole").returncode == 0
    outputs, before = [], 0
    for after in (2, 4, 5, 6, 0):  # 4: the first report is of what was there
        done = killed(after, *inputs, tmp_path / "parts", "--workers", workers)
        assert done.returncode == (-signal.SIGKILL if after else 0), done.stderr
        assert not (tmp_path / "parts.idx").exists() or not after
        outputs.append(done.stdout)
        for left in tmp_path.glob("parts*part"):  # what was written after the last save, in part
            with left.open("ab") as file:
                file.write(b'{"le')
    for said in outputs[1:]:
        count = int(re.search(r"parts.part: going on after ([\d,]+) documents", said)[1].replace(",", ""))
        assert count > before
        before = count
    for end in (".bin", ".idx", ".mask.bin"):
        assert (tmp_path / f"parts{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
    assert not list(tmp_path.glob("*part")) and not list(tmp_path.glob("*.tmp"))
    of_whole, of_parts = (killed(0, *inputs, tmp_path / name, "--overwrite").stdout for name in ("whole", "parts"))
    assert of_whole.splitlines()[:4] == of_parts.splitlines()[:4]
    assert outputs[-1].splitlines()[1:5] == of_whole.splitlines()[:4]  # the counts are those of all


@pytest.mark.parametrize("change", ["input", "option", "lost", "torn"])
def test_a_killed_run_begins_anew_where_an_input_or_an_option_changed(tmp_path, change):
    path = lots(tmp_path / "x.jsonl", 300, masked_from=100)
    assert killed(3, path, tmp_path / "parts").returncode == -signal.SIGKILL
    options = ["--loss_mask", "all"] if change == "option" else []
    if change == "input":
        lots(tmp_path / "x.jsonl", 300, masked_from=99)
    if change == "lost":
        os.truncate(tmp_path / "parts.bin.part", 100)
    if change == "torn":
        journal = tmp_path / "parts.part"
        journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0] + b"\0\0\0\n")
    done = killed(0, path, tmp_path / "parts", *options)
    assert done.returncode == 0 and "going on" not in done.stdout
    assert ("another input or other options; beginning anew" in done.stdout) == (change in ("input", "option"))
    assert killed(0, path, tmp_path / "whole", *options).returncode == 0
    for file in tmp_path.glob("whole.*"):
        assert file.read_bytes() == (tmp_path / file.name.replace("whole", "parts")).read_bytes()
    assert len(list(tmp_path.glob("whole.*"))) == len(list(tmp_path.glob("parts.*"))) == (2 if change == "option" else 3)


def test_two_runs_of_one_name_do_not_mix(tmp_path):
    path = rows(tmp_path / "x.jsonl", {"text": "a"})
    encoder = RowEncoder(BYTES)
    with pytest.raises(KeyboardInterrupt), BinidxWriter(tmp_path / "o", "uint16", key="k"):
        with pytest.raises(UserError, match="is being written by another process"):
            convert(path, tmp_path / "o", encoder)
        raise KeyboardInterrupt
    assert convert(path, tmp_path / "o", encoder).documents == 1


def test_memory_does_not_grow_with_the_file(tmp_path):
    program = (
        "import resource, sys\nfrom rwkv_bone.data.jsonl_to_binidx import main\n"
        "main(sys.argv[1:]); print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for copies in (3_000, 24_000):
        path = tmp_path / f"{copies}.jsonl"
        path.write_bytes(b'{"text": "%s"}\n' % (b"a long line " * 80) * copies)
        argv = [sys.executable, "-c", program, path, tmp_path / str(copies), "--vocab_size", "257", "--workers", "1"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split("peak")[1]))
    assert peaks[1] < peaks[0] + 4096, "KiB; the file grew by 20 MB"


class Terminal:
    def __init__(self, tty):
        self.tty, self.text = tty, ""

    def isatty(self):
        return self.tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    bar, plain = Terminal(True), Terminal(False)
    for stream in (bar, plain):
        progress = Progress(stream)
        for done in range(0, 101, 10):
            progress(done, 100, done)
        progress.close()
    assert "[###############               ]  50% 50 documents" in bar.text and bar.text.count("\n") == 1
    assert "\r" not in plain.text and 2 <= plain.text.count("\n") <= 5


def test_a_pair_may_lack_a_prompt():
    templates = Templates(pairs=(Pair("", "{poem}"),))
    assert split({"poem": "a"}, templates=templates) == ("a", ["a<end>"])

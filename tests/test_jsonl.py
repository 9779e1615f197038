"""Files of rows: every kind gives the same, defects are named by file and line, and the command writes what others read."""

import gzip
import itertools
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
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_bone.data import files, jsonl_to_binidx
from rwkv_bone.data.binidx import BinidxDocuments, BinidxWriter
from rwkv_bone.data.documents import Documents, data_of
from rwkv_bone.data.encode import RowEncoder, encode_files
from rwkv_bone.data.files import find_files
from rwkv_bone.data.jsonl_to_binidx import convert
from rwkv_bone.data.tokenizer import ByteTokenizer
from rwkv_bone.errors import UserError
from tests.runs import Done, forked, program

SHARED = Path(__file__).parents[1] / "../shared/data"
shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
BYTES = ByteTokenizer(257)


def rows(path, *content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def texts(*paths):
    """Each document of the files as (text, trained)."""
    found = []
    for batch in encode_files(find_files(list(paths)), RowEncoder(BYTES), text=data_of(paths)[1] == "utf-8"):
        mask = np.ones(len(batch.tokens), bool) if batch.mask is None else batch.mask != 0
        cuts = np.cumsum(batch.sizes)[:-1]
        if len(batch.sizes):
            pieces = zip(np.split(batch.tokens, cuts), np.split(mask, cuts))
            found += [(BYTES.decode(tokens), BYTES.decode(tokens[trained])) for tokens, trained in pieces]
    return found


# --- files

PAIRS = [{"question": "1+1?", "answer": "2"}, {"question": 'say "é, ü"\nnow', "answer": "é"}, {"question": "q", "answer": "a"}]
MEANT = [("User: 1+1?\n\nAssistant: 2", " 2"), ('User: say "é, ü"\nnow\n\nAssistant: é', " é"), ("User: q\n\nAssistant: a", " a")]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PAIRS)
COLUMNS = 'id,question,answer\r\n1,1+1?,2\r\n2,"say ""é, ü""\nnow",é\r\n3,q,a\r\n'


def parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path, row_group_size=2)


@pytest.mark.parametrize("name, content", [
    ("x.jsonl", LINES), ("x.jsonl", LINES.replace("\n", "\r\n")), ("x.jsonl", "\n \n" + LINES.replace("\n", " \n\n")),
    ("x.jsonl", LINES.rstrip()), ("x.jsonl.gz", LINES), ("x.json", LINES),
    ("x.json", json.dumps(PAIRS)), ("x.json", json.dumps(PAIRS, indent=2)), ("x.jsonl", json.dumps(PAIRS, indent=1)),
    ("x.json.gz", json.dumps(PAIRS)), ("x.json", "[\n" + LINES.strip().replace("}\n", "},\n") + "\n]\n"),
    ("x.json", "\n".join(json.dumps(row, indent=2) for row in PAIRS)),
    ("x.json", json.dumps({"version": "1", "tags": ["a"], "data": PAIRS})), ("x.json", json.dumps({"train": PAIRS}, indent=1)),
    ("x.csv", COLUMNS), ("x.csv.gz", COLUMNS), ("x.tsv", COLUMNS.replace("é, ü", "é; ü").replace(",", "\t").replace("; ", ", ")),
    ("x.parquet", None),
])  # fmt: skip
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, name, content, mark):
    path = tmp_path / name
    if content is None:
        parquet(path)
    else:
        data = mark + content.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert texts(path) == MEANT


@pytest.mark.parametrize("content", [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"question": "a", "answer": "b"},
])  # fmt: skip
def test_one_pretty_printed_object_is_a_row(tmp_path, content):
    (tmp_path / "x.json").write_text(json.dumps(content, indent=2))
    assert texts(tmp_path / "x.json") == [("User: a\n\nAssistant: b", " b")]


def test_text_files_are_a_document_each_and_a_folder_stands_for_its_files(tmp_path):
    for name, content in (("b.txt", "User: a\r\n\nAssistant: b"), ("a.txt", "\ufeffA"), ("README.md", "-"), (".hidden.txt", "-")):
        (tmp_path / name).write_text(content, newline="")
    both = [("A", "A"), ("User: a\r\n\nAssistant: b", "User: a\r\n\nAssistant: b")]
    assert texts(tmp_path) == texts(tmp_path / "*.txt") == texts(tmp_path / "a.txt", tmp_path / "b.txt") == both
    rows(tmp_path / "c.jsonl", {"text": "a"})
    with pytest.raises(UserError, match=r"several kinds of data \(\.jsonl, \.txt\); name one: '.*\*\.jsonl'"):
        find_files(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no data file"):
        find_files(tmp_path / "none")
    with pytest.raises(UserError, match=r"y\*\.jsonl: no such file"):
        find_files(str(tmp_path / "y*.jsonl"))


BROKEN = [
    ("x.jsonl", b'{"text": "a"}\n{"text": \n', ", line 2: broken JSON"),
    ("x.jsonl", b'{"text": "a"}\n\n\n[1]\n', ", line 4: the line is a list, wanted an object"),
    ("x.jsonl", b'{"text": "a"}\nnull', ", line 2: the line is null"),
    ("x.jsonl", b'{"text": "a"} {"text": "b"}', ", line 1: broken JSON"),
    ("x.jsonl", b"5", ", line 1: the line is a number"),
    ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ", line 2: byte 10 is no UTF-8"),
    ("x.jsonl", b'{"text": ', ", line 1: broken JSON"),
    ("x.jsonl", b'{"text": ' + b"1" * 5000 + b"}", ", line 1: "),
    ("x.jsonl", b'{"a": ' * 100_000, ", line 1: "),
    ("x.json", b"[" * 100_000, ", row 1: broken JSON"),
    ("x.json", b'[{"text": "a"}, 5]', ", row 2 is a number"),
    ("x.json", b'[{"text": "a"} {"text": "b"}]', ", row 1: broken JSON"),
    ("x.json", b'[{"text": "a"},', ": broken JSON: the array has no end"),
    ("x.json", b'[{"text": "a"}] x', ": broken JSON: something follows"),
    ("x.json", b'[{"text": "\xff"}]', ": byte 11 is no UTF-8"),
    ("x.json", b'{\n"train": [{"text": "a"}],\n"test": [{"text": "b"}]}', ", row 1: wanted text"),
    ("x.csv", b"question,answer\nq,a\nq\n", ", row 2 has 1 fields where the first line names 2"),
    ("x.csv", b"text,text\na,b\n", ": two columns have the same name"),
    ("x.csv", b'text\n"a', ", row 1: unexpected end"),
    ("x.csv", b"text\n\xff\n", ": 0xff is no UTF-8"),
    ("x.parquet", b"PAR1", "Parquet|parquet"),
    ("x.txt", b"\xff", ": byte 0 is no UTF-8"),
    ("x.txt", b"", " is empty"),
    ("x.txt", b'{"text": "a"}\n{"text": "b"}\n', " holds JSON objects.*give --data_type jsonl"),
    ("x.txt", b'[\n{"text": "a"}]', " holds JSON objects"),
    ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000)[:-9], ": Compressed file ended"),
]


@pytest.mark.parametrize("name, content, message", BROKEN, ids=[f"{name}: {message[:30]}" for name, _, message in BROKEN])
def test_a_broken_file_is_named_with_the_line_or_row(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(name)}.*{message}") as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_line_numbers_hold_across_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BATCH_BYTES", 40)
    path = rows(tmp_path / "x.jsonl", *[{"text": "a"}] * 50)
    with open(path, "a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match="line 51: broken JSON"):
        texts(path)


scraps = st.lists(st.sampled_from(['{"text":', '"a"', "}", "[", "]", "\n", "null", ",", '{"text": "b"}', '"', "text"]))


@settings(max_examples=40)
@given(st.binary(max_size=60) | scraps.map("".join).map(str.encode))
def test_any_bytes_give_documents_or_a_user_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("b")
    for name in ("x.jsonl", "x.json.gz", "x.csv", "x.txt", "x.parquet"):
        (folder / name).write_bytes(content)
        try:
            texts(folder / name)
        except UserError as error:
            assert str(folder / name) in str(error)


def test_an_endless_line_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 100)
    (tmp_path / "x.jsonl").write_bytes(b" " * 101)
    with pytest.raises(UserError, match=r"line 1 is longer than 0 MiB; is this jsonl"):
        texts(tmp_path / "x.jsonl")


# --- the command


def command(*args, cwd=Path()) -> Done:
    """From the server: a fork would wait for ever for the World tokenizer's threads, which it does not have."""
    return program(["-m", "rwkv_bone.data.jsonl_to_binidx", *args], cwd)


@shared
@pytest.mark.parametrize("source, name, options", [
    ("sample.jsonl", "sample_text_document.int32", ["--dtype", "int32"]),
    ("unicode.jsonl", "unicode_text_document.int32", ["--dtype", "int32", "--workers", "2", "--loss_mask", "all"]),
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
        "documents  1,336",
        "1 of 1,337 rows left out: 1 empty texts (first: ",
        f"tokens     {docs.total_tokens:,}, ",
        f"longest    {docs.sizes.max()} tokens",
        f"trained    {docs.mask.sum():,} tokens ({docs.mask.mean():.1%})",
    ):
        assert line in done.stdout
    assert "MB/s" in done.stdout and "x.mask.bin" in done.stdout
    trained = [mask.all() for _, mask in Documents.from_binidx(tmp_path / "x")]
    assert trained[1319] and not trained[0]


def test_many_processes_write_what_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BATCH_BYTES", 300)
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 90, 400).tolist()
    content = [{"question": "q" * n, "answer": "a" * (n % 7)} if n % 3 else {"text": "t" * n} for n in lengths]
    path = rows(tmp_path / "x.jsonl", *content)
    made = [convert(path, tmp_path / name, RowEncoder(BYTES), workers=n) for n, name in ((1, "one"), (3, "three"))]
    assert made[0].documents == made[1].documents > 100 and made[0].tally == made[1].tally and made[0].tally.skipped > 0
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
    (["empty.jsonl", "out", "--vocab_size", "257"], "no document; left out: 1 empty texts (first: empty.jsonl, line 1)"),
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


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 2), (signal.SIGINT, 1), (signal.SIGKILL, 2)])
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


def killed(after: int, *args) -> Done:
    """Run the command with a save after each small batch and SIGKILL at its `after`-th batch; 0: to the end."""
    reports = itertools.count(1)

    def work() -> None:
        files.BATCH_BYTES, jsonl_to_binidx.SAVE_SECONDS = 2000, 0
        jsonl_to_binidx.Progress.update = lambda *_: next(reports) == after and os.kill(os.getpid(), signal.SIGKILL)
        jsonl_to_binidx.main([*map(str, args), "--vocab_size", "257"])

    return forked(work)


def lots(path: Path, count: int, masked_from: int) -> str:
    pairs = [{"question": f"{i}?" * (i % 9), "answer": "a" * (i % 50)} for i in range(masked_from, count)]
    rows(path.with_suffix(".plain"), *({"text": f"{i} é"} for i in range(masked_from)), *pairs)
    content = path.with_suffix(".plain").read_bytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.mark.parametrize("names, workers", [(["x.jsonl"], 1), (["x.jsonl.gz", "y.jsonl"], 1), (["x.jsonl.gz", "y.jsonl"], 2)])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, names, workers):
    inputs = [lots(tmp_path / name, 1000, masked_from=100 if i == 0 else 0) for i, name in enumerate(names)]
    of_whole = killed(0, *inputs, tmp_path / "whole")
    assert of_whole.returncode == 0
    outputs, before = [], 0
    for after in (1, 3, 5, 0):
        done = killed(after, *inputs, tmp_path / "parts", "--workers", workers)
        assert done.returncode == (-signal.SIGKILL if after else 0), done.stdout
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
    assert outputs[-1].splitlines()[1:5] == of_whole.stdout.splitlines()[:4]  # the counts are those of all


@pytest.mark.parametrize("change", ["input", "option", "lost", "torn"])
def test_a_killed_run_begins_anew_where_an_input_or_an_option_changed(tmp_path, change):
    path = lots(tmp_path / "x.jsonl", 300, masked_from=100)
    assert killed(2, path, tmp_path / "parts").returncode == -signal.SIGKILL
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


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    program = (
        "import sys\nfrom rwkv_bone.data.jsonl_to_binidx import main\nmain(sys.argv[1:])\n"
        "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    peaks = []
    for copies in (3_000, 24_000):
        path = tmp_path / f"{copies}.jsonl"
        path.write_bytes(b'{"text": "%s"}\n' % (b"a long line " * 80) * copies)
        argv = [sys.executable, "-c", program, path, tmp_path / str(copies), "--vocab_size", "257", "--workers", "1"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split("peak")[1]))
    assert peaks[1] < peaks[0] + 4096, "KiB; the file grew by 20 MB"


@pytest.mark.parametrize("name, content", [
    ("x.jsonl", LINES * 9), ("x.json", json.dumps(PAIRS * 9)), ("x.csv", COLUMNS + "4,q,a\r\n" * 99), ("x.parquet", None)])
def test_reading_goes_on_at_the_end_of_any_batch(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(files, "BATCH_BYTES", 100)
    path = tmp_path / name
    parquet(path) if content is None else path.write_text(content, newline="")

    def read(start=files.BEGINNING):
        return [(batch.end, list(batch.rows())) for batch in files.read_batches([str(path)], start=start)]

    whole = read()
    assert len(whole) > 1 or content is None
    for number, (end, _) in enumerate(whole, 1):
        assert [row for _, rows in read(end) for row in rows] == [row for _, rows in whole[number:] for row in rows]

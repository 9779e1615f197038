"""rwkv-bone download, against a small server that speaks the hub's protocol: HEAD with size and hash, a redirect, ranges."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from rwkv_bone.files.known import KNOWN
from tests.runs import ROOT

pytest.importorskip("huggingface_hub", reason="the extra download")
CONTENT = os.urandom(300_000)
G1, OLD, NEW = "BlinkDL/rwkv7-g1", KNOWN["g1-0.1b"].file, "rwkv7-g1z-0.1b-20991231-ctx8192.pth"
OTHERS = ("rwkv7a-g1z-0.1b-20991231-ctx8192.pth", "rwkv7-g1z-0.4b-20991231-ctx8192.pth", "rwkv7-g1-0.1b-20250307-ctx4096.pth")
NAMES = [OLD, NEW, *OTHERS]


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stated, stall_after, asked_from = hashlib.sha256(CONTENT).hexdigest(), 0, []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        if "/resolve/" not in self.path or "missing" in self.path:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        sizes = {"X-Linked-Size": len(CONTENT), "X-Linked-Etag": f'"{self.stated}"', "X-Repo-Commit": "0" * 40}
        return self.answer(302, {**sizes, "ETag": '"pointer"', "Location": f"{self.cdn}/file"})

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            files = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in NAMES]
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(files).encode())
        if "/resolve/" in self.path:
            return self.do_HEAD()
        if self.path != "/file":
            return self.answer(404, {})
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.asked_from.append(first)
        ranged = {"Content-Range": f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}"} if first else {}
        return self.answer(206 if first else 200, ranged, CONTENT[first:])

    def answer(self, code, headers, body=b""):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if 0 < self.stall_after < len(body):
            self.wfile.write(body[: self.stall_after])
            self.wfile.flush()
            time.sleep(60)
        self.wfile.write(body)


@pytest.fixture
def hub():
    """The handler of a server that runs, as a class whose attributes a test may set; `endpoint` is its address."""
    handler = type("Served", (Hub,), {"asked_from": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.endpoint, handler.cdn = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    yield handler
    server.shutdown()


def start(hub, folder, *words) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "rwkv_bone", "download", *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def download(hub, folder, *words) -> tuple[int, str]:
    process = start(hub, folder, *words)
    out, errors = process.communicate(timeout=60)
    return process.returncode, out + errors


def test_a_known_name_gets_the_newest_release_of_its_size_checked(hub, tmp_path):
    code, said = download(hub, tmp_path, "g1-0.1b", "--out", "models")
    assert code == 0 and (tmp_path / "models" / NEW).read_bytes() == CONTENT, said
    assert f"models/{NEW} saved: 300,000 bytes, sha256 {hub.stated}" in said and f"train --load_model models/{NEW}" in said
    assert os.listdir(tmp_path / "models") == [NEW]
    code, said = download(hub, tmp_path, f"{G1}/{NEW}", "--out", "models")
    assert code == 0 and "is here already" in said and hub.asked_from == [0]


def test_an_interrupted_download_goes_on_where_it_was(hub, tmp_path):
    hub.stall_after = 200_000
    process = start(hub, tmp_path, f"{G1}/{NEW}")
    while not list(tmp_path.glob("*.partial")) or not hub.asked_from:
        time.sleep(0.05)
    process.kill()
    process.wait()
    (partial,) = tmp_path.glob("*.partial")
    partial.write_bytes(CONTENT[:123_456])  # what reached the disk, by whatever buffer
    hub.stall_after = 0
    code, said = download(hub, tmp_path, f"{G1}/{NEW}")
    assert code == 0 and hub.asked_from == [0, 123_456] and "120.6 KiB are here" in said
    assert (tmp_path / NEW).read_bytes() == CONTENT and not partial.exists()


def test_what_is_not_what_the_hub_states_is_not_kept(hub, tmp_path):
    hub.stated = "0" * 64
    code, said = download(hub, tmp_path, f"{G1}/{NEW}")
    assert code == 2 and "the hub states 0000" in said and not list(tmp_path.glob("*.p*"))


def test_a_file_of_that_name_is_never_replaced(hub, tmp_path):
    (tmp_path / NEW).write_bytes(b"mine")
    code, said = download(hub, tmp_path, f"{G1}/{NEW}")
    assert code == 2 and "is not the hub's file" in said and (tmp_path / NEW).read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("g2", "no model 'g2' is known; there are g1-0.1b, "),
        ("0.4b", "did you mean g1-0.4b?"),
        (f"{G1}/missing.pth", "missing.pth from http"),
        ("world6-3b", "and RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth is known with c7c4e68e"),
    ],
)
def test_what_cannot_be_had_is_one_line(hub, tmp_path, words, message):
    code, said = download(hub, tmp_path, words)
    assert code == 2 and message in said and said.startswith("error: ") and said.count("\n") == 1


def test_a_server_that_is_not_there_is_one_line(hub, tmp_path):
    hub.endpoint = "http://127.0.0.1:9"
    code, said = download(hub, tmp_path, f"{G1}/{NEW}")
    assert code == 2 and said.splitlines()[-1].startswith("error: BlinkDL/rwkv7-g1/") and "Traceback" not in said


def test_the_known_names_are_listed(hub, tmp_path):
    code, said = download(hub, tmp_path)
    assert code == 0 and all(f"\n{name} " in said for name in KNOWN)
    assert max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize("model", KNOWN.values(), ids=KNOWN)
def test_the_newest_file_of_a_known_model_is_its_own_where_no_other_is_there(model):
    assert model.newest([]) == model.newest([model.file, "README.md"]) == model.file

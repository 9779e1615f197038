"""rwkv-bone download: get a base model from the Hugging Face hub, or from a mirror of it that HF_ENDPOINT names.

    rwkv-bone download                         the known names
    rwkv-bone download g1-0.1b                 the newest release of that size, into this folder
    rwkv-bone download OWNER/REPOSITORY/FILE.pth

What was interrupted goes on where it was. A file appears under its name when its size and hash are those that the hub states.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..errors import Parser, UserError, hint
from ..terminal import Progress, in_bytes, next_command
from .known import KNOWN, Known

EXTRA = "pip install 'rwkv-bone[download]'"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="rwkv-bone download", description="Get a base model from the Hugging Face hub.", allow_abbrev=False)
    parser.add_argument("name", nargs="?", default="", help="one of the known names, or OWNER/REPOSITORY/FILE; none: list them")
    parser.add_argument("--out", default=".", metavar="FOLDER", help="where to put it (default: here)")
    args = parser.parse_args(argv)
    if not args.name:
        print(listing())
        return 0
    print(f"{fetch(args.name, Path(args.out))}")
    return 0


def listing() -> str:
    """The known models as a table."""
    rows = [("name", "GB", "licence", "for"), *((m.name, f"{m.gb:.1f}", m.licence, m.use) for m in KNOWN.values())]
    lines = [f"{name:12} {gb:>5}  {licence:10}  {use}" for name, gb, licence, use in rows]
    repositories = ", ".join(dict.fromkeys(m.repository for m in KNOWN.values()))
    return "\n".join([*lines, "", f"download NAME gets the newest file of that size, from {repositories}"])


def fetch(name: str, folder: Path) -> str:
    """Download a model; what to say at the end. UserError for an unknown name, and whatever the hub or the network refuses."""
    hub = open_hub()
    repository, file, known = find(hub, name)
    endpoint = hub.constants.ENDPOINT
    url = hub.hf_hub_url(repository, file)
    there = asked(name, endpoint, lambda: hub.get_hf_file_metadata(url))
    if there.size is None or not there.etag:
        raise UserError(f"{url}: the server states neither size nor hash; is HF_ENDPOINT a mirror of the hub?")
    digest = there.etag if re.fullmatch("[0-9a-f]{64}", there.etag) else ""  # of large files, those in LFS
    if known and file == known.file and known.sha256 and digest != known.sha256:
        raise UserError(f"{url}: its hash is {digest or 'not stated'}, and {file} is known with {known.sha256}; do not use it")
    path = folder / file.rpartition("/")[2]
    partial = path.with_name(f"{path.name}.{re.sub('[^0-9a-zA-Z]', '', there.etag)[:12]}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            if path.is_file() and path.stat().st_size == there.size and (not digest or sha256(path) == digest):
                return said(path, there.size, digest, "is here already")
            cure = "move it away, or give another --out"
            raise UserError(f"{path} exists and is not the hub's file ({in_bytes(there.size)}); {cure}")
        have = partial.stat().st_size if partial.exists() else 0
        if have > there.size:  # none of ours
            raise UserError(f"{partial} is larger than the hub's file; remove it")
        if (free := shutil.disk_usage(folder).free) < there.size - have:
            raise UserError(f"{folder}: {in_bytes(free)} are free, and {in_bytes(there.size - have)} are needed")
        begun = f", {in_bytes(have)} are here" if have else ""
        print(f"{repository}/{file}: {in_bytes(there.size)} from {endpoint}{begun}", flush=True)
        with open(partial, "ab") as into:
            asked(name, endpoint, lambda: hub.file_download.http_get(
                url, into, resume_size=have, headers=hub.utils.build_hf_headers(), expected_size=there.size,
                displayed_filename=path.name), partial)  # fmt: skip
        if digest and (found := sha256(partial)) != digest:
            partial.unlink()
            raise UserError(f"{url}: what came has the hash {found}, and the hub states {digest}; it was removed, try again")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None
    return said(path, there.size, digest, "saved")


def said(path: Path, size: int, digest: str, what: str) -> str:
    checked = f"sha256 {digest}" if digest else "the hub states no sha256"
    following = next_command("train", load_model=path, data_file="mine.jsonl", proj_dir="out/mine")
    return f"{path} {what}: {size:,} bytes, {checked}\nnext       {following}"


def find(hub: Any, name: str) -> tuple[str, str, Known | None]:
    """(repository, file, the known model) of a name."""
    if known := KNOWN.get(name.lower()):
        try:
            files = hub.HfApi().list_repo_files(known.repository)
        except Exception:  # a mirror may have no list: the file that is known is tried
            files = []
        return known.repository, known.newest(files), known
    if name.count("/") >= 2 and not name.startswith(("/", ".")):
        owner, repository, file = name.split("/", 2)
        return f"{owner}/{repository}", file, None
    near = [known for known in KNOWN if name.lower() in known]
    raise UserError(f"no model {name!r} is known; there are {', '.join(KNOWN)}, or give OWNER/REPOSITORY/FILE{hint(near)}")


def open_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError:
        raise UserError(f"downloads need the package huggingface_hub: {EXTRA}") from None
    return huggingface_hub


def asked(name: str, endpoint: str, call: Any, partial: Path | None = None) -> Any:
    """What the hub answers. Its client raises the errors of several libraries; all of them become one line."""
    try:
        return call()
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        kept = f"; {in_bytes(partial.stat().st_size)} are kept, the same command goes on" if partial and partial.exists() else ""
        mirror = "" if "HF_ENDPOINT" in os.environ else "; a mirror can be named by HF_ENDPOINT"
        raise UserError(f"{name} from {endpoint}: {text[:300]}{kept}{mirror}") from None


def sha256(path: Path) -> str:
    """Of a file's content, with a progress line where that takes long."""
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb") as file, Progress(path.stat().st_size, unit="B", label="checking", leave=False) as progress:
        while block := file.read(1 << 22):
            digest.update(block)
            progress.update(progress.done + len(block))
    return digest.hexdigest()

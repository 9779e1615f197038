"""Build a shared library from the sources in cpp/ or cuda/ on first use, with ninja, and keep it in the user's cache.

The libraries have a plain C interface and are called through ctypes: without torch's headers they compile in seconds.
A library's file name carries a hash of its sources, compiler and flags, so that a changed source is a new library and
nothing is ever rebuilt in place. Two processes may start at once (a lock on a file, which the kernel releases when its
holder dies), and a build may be killed at any time (it works in a folder of its own and renames the result).
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

WITHOUT_COMPILER = "or use --op torch, which needs none"


@dataclass(frozen=True)
class Object:
    """One object file: `source` compiled with `flags`. A source may appear several times with different flags."""

    source: Path
    flags: tuple[str, ...] = ()


def source(path: str) -> Path:
    """The file of a kernel's source, as "cpp/NAME.cpp": beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent, package):
        if (folder / path).is_file():
            return folder / path
    raise UserError(
        f"the kernels' sources are missing: looked for {package.parent / path} and {package / path}; "
        f"reinstall rwkv-bone, {WITHOUT_COMPILER}"
    )


def user_cache() -> Path:
    """The folder of built libraries: rwkv-bone in $XDG_CACHE_HOME or ~/.cache; for a user without a home `private_folder`."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv-bone"
    except RuntimeError:  # neither $HOME nor an entry in the list of users
        return private_folder()


def private_folder() -> Path:
    """A folder of this user's among the temporary files, which no other user can write, lest a library be placed there."""
    if not hasattr(os, "getuid"):  # Windows, where temporary files are the user's own
        return Path(tempfile.mkdtemp(prefix="rwkv-bone-"))
    folder = Path(tempfile.gettempdir()) / f"rwkv-bone-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        folder = Path(tempfile.mkdtemp(prefix="rwkv-bone-"))
    return folder


def cache_dir() -> Path:
    """The user's cache if it can be written, else (said on stderr) a private folder for temporary files."""
    folder = user_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        fallback = private_folder()
        print(f"rwkv-bone: cannot write {folder} ({error.strerror}); building in {fallback}", file=sys.stderr)
        return fallback


def cxx_compiler() -> str:
    """The path of a C++ compiler: $CXX as every build tool reads it (conda sets it), else the usual names."""
    names = [f"{platform.machine()}-conda-linux-gnu-c++", "g++", "c++", "clang++"]
    if os.environ.get("CXX"):
        names.insert(0, os.environ["CXX"])
    for name in names:
        if path := shutil.which(name):
            return path
    raise UserError(
        f"the CPU kernel needs a C++ compiler and none of {', '.join(names)} is on PATH; "
        f"apt install g++ (or conda install -c conda-forge cxx-compiler), {WITHOUT_COMPILER}"
    )


def ninja_binary() -> str:
    """The path of ninja: on PATH, or where PyPI's package put it (its folder is often not on PATH)."""
    if path := shutil.which("ninja"):
        return path
    try:
        import ninja
    except ImportError:
        raise UserError(f"building the kernels needs ninja; pip install ninja, {WITHOUT_COMPILER}") from None
    return str(Path(ninja.BIN_DIR) / "ninja")


def build(
    name: str,
    objects: Sequence[Object],
    compiler: str,
    *,
    flags: Sequence[str] = (),
    link_flags: Sequence[str] = ("-shared",),
    cache: Path | None = None,
) -> Path:
    """The path of the shared library `name` made of `objects`, built now if it is not in the cache.

    `compiler` (g++, clang++, nvcc) compiles each object with `flags` and its own flags and links them with
    `link_flags`. All headers in the sources' folders count as included.
    """
    if os.name != "posix":
        raise UserError(f"the kernels build on Linux and macOS, not on {platform.system()}; use --op torch")
    files = [o.source for o in objects]
    for folder in sorted({file.parent for file in files}):
        files += sorted([*folder.glob("*.h"), *folder.glob("*.cuh")])
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    recipe = [
        *(file.read_text() for file in files),
        compiler, version, platform.machine(),
        *(f"{o.source.name} {o.flags}" for o in objects),
        repr((tuple(flags), tuple(link_flags))),
    ]  # fmt: skip
    key = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:16]
    library = (cache or user_cache()) / f"{name}-{key}.so"
    if not library.exists():
        ninja = ninja_binary()
        library = (cache or cache_dir()) / library.name
        with lock(library.with_suffix(".lock")) as alone:
            if not library.exists():  # another process may have built it while we waited
                for stale in library.parent.glob(f"{library.stem}.build-*") if alone else ():  # of builds that were killed
                    shutil.rmtree(stale, ignore_errors=True)
                _run_ninja(name, library, objects, compiler, flags, link_flags, ninja)
    return library


def load(library: Path) -> ctypes.CDLL:
    """The library, loaded. A file that cannot be loaded (a full disk, another machine's) is told with its path."""
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise UserError(f"cannot load {library}: {error}; delete it to build it anew, {WITHOUT_COMPILER}") from error


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `path`, which goes with the process that holds it, however that ends.

    Yields whether it is held: without locks (on Windows, on some file systems) two processes build, each in its own folder.
    """
    with open(path, "w") as file:
        alone = True
        try:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"rwkv-bone: waiting for another process that builds {path.stem}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            alone = False
        yield alone


def _run_ninja(name, library: Path, objects: Sequence[Object], compiler, flags, link_flags, ninja: str) -> None:
    print(f"rwkv-bone: building {name} with {Path(compiler).name}, once ... ", end="", file=sys.stderr, flush=True)
    start = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix=f"{library.stem}.build-", dir=library.parent))
    try:
        rules = [f"rule compile\n  command = {_shell(compiler, *flags)} $flags -c $in -o $out\n"]
        outputs = []
        for i, o in enumerate(objects):
            outputs.append(f"{i}.o")
            rules.append(f"build {i}.o: compile {_escape(str(o.source))}\n  flags = {_shell(*o.flags)}\n")
        rules.append(f"rule link\n  command = {_shell(compiler, *link_flags)} $in -o $out\n")
        rules.append(f"build {name}.so: link {' '.join(outputs)}\n")
        (work / "build.ninja").write_text("\n".join(rules))
        result = subprocess.run(
            [ninja, "-C", str(work), f"{name}.so"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if result.returncode != 0:
            print("failed", file=sys.stderr)
            log = library.with_suffix(".log")
            log.write_text(result.stdout)
            raise UserError(f"{name} did not compile: {_first_error(result.stdout)}; full log: {log}; {WITHOUT_COMPILER}")
        os.replace(work / f"{name}.so", library)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{time.monotonic() - start:.0f} s, kept in {library.parent}", file=sys.stderr)


def _first_error(log: str) -> str:
    for line in log.splitlines():
        if re.search(r"\berror\b|\bfatal\b|undefined reference|No space left|not found|Killed", line, re.IGNORECASE):
            return line.strip()
    return log.strip().splitlines()[-1] if log.strip() else "no output"


def _shell(*words: str) -> str:
    import shlex

    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


def _escape(path: str) -> str:
    """A path as ninja wants it in a build line."""
    return re.sub(r"([$ :])", r"$\1", path)

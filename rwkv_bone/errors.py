"""The one exception that means "the input is bad", not "the program is": shown as one line, exit code 2. How commands end."""

import argparse
import difflib
import errno
import io
import os
import re
import select
import signal
import sys
from collections.abc import Mapping, Sequence


class UserError(ValueError):
    """Bad input. The message is one line: what was wanted, what came, what to do.

    Names out of damaged files may be in it: what a terminal would not print as it stands is shown as "?", an endless name by its
    beginning and end, and the line itself is not endless.
    """

    def __init__(self, message: str):
        short = re.sub(r"\S{300,}", lambda name: f"{name[0][:100]}...{name[0][-30:]}", message[:20000])
        line = "".join(c if c.isprintable() else "?" for c in short[:1001])
        super().__init__(line if len(line) <= 1000 else line[:1000] + "...")


def hint(near: list[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""


def checked(words: Sequence[str]) -> list[str]:
    """The words of a command line; UserError where a script with Windows line ends passed them."""
    for n, word in enumerate(words):
        if not isinstance(word, str):
            raise UserError(f"{word!r} in a command line: wanted text, not a {type(word).__name__}")
        if word == "--" or word.endswith("=--"):  # which argparse would make an empty list of
            raise UserError(f"{word} in a command line: has no meaning here; leave it out")
        if word.endswith("\r"):
            after = " ".join(words[: n + 1][-2:]).strip()
            cure = "remove them: sed -i 's/\\r$//' SCRIPT"
            raise UserError(f"a carriage return after {after!r}: this script has Windows line ends; {cure}")
    return list(words)


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    elsewhere: Mapping[str, str] = {}  # what other programs call a flag -> its name here

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):  # type: ignore[override]
        words = checked(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            raise UserError(self.unknown(unknown[0], words))
        return parsed

    def unknown(self, word: str, words: list[str]) -> str:
        """What to say of a word that is neither a flag nor a value."""
        if not word.strip():
            before = words[words.index(word) - 1] if words.index(word) else "the command"
            return f"a blank argument after {before}: a backslash with a blank behind it in a script, or an empty variable"
        flag = word.split("=")[0].replace("-", "_").replace("__", "--", 1) if word.startswith("-") else ""
        known = [flag] if flag in self._option_string_actions else [self.elsewhere[flag]] if flag in self.elsewhere else []
        near = known or difflib.get_close_matches(flag, self._option_string_actions, 1, cutoff=0.75)
        return f"unknown {'flag' if flag else 'word'} {word}" + (hint(near) or "; see --help")

    def error(self, message: str):
        raise UserError(message)


def run(main) -> None:
    """Call `main()` for a command line: a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    SIGTERM, and SIGHUP of a terminal that is closed, are an exit like any other, with the code 128 + signal, so that files half
    written are removed; a SIGHUP that the caller ignores (nohup) stays ignored. Where nobody reads on (`... | head -1`) the end
    is quiet, with the code 141 that a program killed by SIGPIPE has. Text that the terminal's encoding lacks is escaped.
    """
    for number in [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]:  # Windows has no SIGHUP
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            code = main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            print(f"error: {UserError(f'{str(error.filename)[:80]}...: a file name that is too long')}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        finally:
            sys.stdout.flush()  # the last lines, too, may find nobody
    except BrokenPipeError:
        if not any(map(unread, (1, 2))):  # another pipe: an error like any other
            raise
        for stream in (1, 2):  # what is still in their buffers is not tried again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        code = 128 + 13
    sys.exit(code)


def unread(stream: int) -> bool:
    """Whether the file descriptor `stream` is a pipe that nobody reads any more; on Windows, which does not tell, yes."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(stream, 0)  # only what is always told: errors
    return any(event & select.POLLERR for _, event in poll.poll(0))

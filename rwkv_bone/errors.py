"""The one exception that means "the input is bad", not "the program is": shown as one line, exit code 2. How commands end."""

import argparse
import difflib
import os
import select
import signal
import sys
from collections.abc import Mapping


class UserError(ValueError):
    """Bad input. The message is one line: what was wanted, what came, what to do.

    Names out of damaged files may be in it: what a terminal would not print as it stands is shown as "?", and it is not endless.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else "?" for c in message[:1001])
        super().__init__(line if len(line) <= 1000 else line[:1000] + "...")


def hint(near: list[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    elsewhere: Mapping[str, str] = {}  # what other programs call a flag -> its name here

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            name = message.split(": ", 1)[1].split()[0]
            flag = name.split("=")[0].replace("-", "_").replace("__", "--", 1) if name.startswith("-") else ""
            known = [flag] if flag in self._option_string_actions else [self.elsewhere[flag]] if flag in self.elsewhere else []
            near = known or difflib.get_close_matches(flag, self._option_string_actions, 1)
            message = f"unknown {'flag' if flag else 'word'} {name}" + (hint(near) or "; see --help")
        raise UserError(message)


def run(main) -> None:
    """Call `main()` for a command line: a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    SIGTERM is an exit like any other, with code 143, so that files half written are removed. Where nobody reads on
    (`... | head -1`) the end is quiet, with the code 141 that a program killed by SIGPIPE has.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        try:
            code = main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
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
    """Whether the file descriptor `stream` is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream, 0)  # only what is always told: errors
    return any(event & select.POLLERR for _, event in poll.poll(0))

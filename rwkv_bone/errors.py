"""The one exception that means "the input is bad", not "the program is": shown as one line, exit code 2."""

import signal
import sys


class UserError(ValueError):
    """Bad input. The message is one line: what was wanted, what came, what to do.

    Names out of damaged files may be in it: what a terminal would not print as it stands is shown as "?", and it is not endless.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else "?" for c in message[:1001])
        super().__init__(line if len(line) <= 1000 else line[:1000] + "...")


def run(main) -> None:
    """Call `main()` for a command line: a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    SIGTERM is an exit like any other, with code 143, so that files half written are removed.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)

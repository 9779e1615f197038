"""Signals that ask a run to save and end."""

import os
import signal
import time

ECHO_SECONDS = 0.2  # within which a second signal is the first one's echo
LAUNCHER_SECONDS = 2.0  # the same under a launcher, which passes a signal on that the key has sent already
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "LOCAL_RANK")  # in the environment of their processes
# SIGUSR1: what a SLURM job asks to be sent before its time is up
STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


class Signals:
    """Asks for an end after the current step. A second signal, unless it is the first one's echo, ends the run at once."""

    def __init__(self):
        self.received, self.at = 0, 0.0
        self.echo = LAUNCHER_SECONDS if any(name in os.environ for name in LAUNCHERS) else ECHO_SECONDS

    def handle(self, number: int, frame) -> None:
        if not self.received:
            self.received, self.at = number, time.monotonic()
            print(f"\n{signal.Signals(number).name}: saving after this step (a second one ends it without)", flush=True)
        elif time.monotonic() - self.at > self.echo:
            print("ended without saving; --resume auto continues from the last checkpoint", flush=True)
            raise SystemExit(128 + number)

    def __enter__(self) -> "Signals":
        self.handlers = {s: signal.signal(s, self.handle) for s in STOP if signal.getsignal(s) is not signal.SIG_IGN}  # nohup
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

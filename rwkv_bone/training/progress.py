"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm

from ..terminal import clock
from .module import StepRecord

LINE_SECONDS = 10.0  # at least so long between two plain lines


def say(text: str) -> None:
    """A line of its own, above the bar where there is one."""
    tqdm.write(text)
    sys.stdout.flush()


class Progress:
    """Shows one step after the other: loss (smoothed), lr, real tokens/s, time to go."""

    def __init__(self, start: int, total: int):
        stream = sys.stdout
        self.start, self.total, self.stream = start, total, stream
        self.loss = self.seconds = self.tokens = 0.0
        self.losses = 0  # steps that had one
        self.shown_at = 0.0
        self.bar = None
        if stream.isatty():
            shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=total, initial=start, file=stream, dynamic_ncols=True, bar_format=shape)

    def update(self, record: StepRecord) -> None:
        done = record.step - self.start
        if record.loss is not None:
            self.losses += 1
            self.loss += (record.loss - self.loss) * max(0.05, 1 / self.losses)
        if done > 1:  # the first step builds and warms up
            self.seconds += record.seconds
            self.tokens += record.tokens
        rate = self.tokens / self.seconds if self.seconds else record.tokens / record.seconds
        loss = "no trained token" if record.loss is None else f"loss {self.loss:.4f}"
        values = f"epoch {record.epoch}, {loss}, lr {record.lr:.3g}, {rate:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(values, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        if record.step in (self.start + 1, self.total) or now - self.shown_at >= LINE_SECONDS:
            self.shown_at = now
            each = self.seconds / (done - 1) if done > 1 else record.seconds
            left = clock(each * (self.total - record.step))
            print(f"step {record.step}/{self.total}, {values}, {left} to go", file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

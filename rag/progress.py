"""How far long work has got: a bar on a terminal, plain lines elsewhere.

    for batch in progress(batches, total, "Answering", "questions", size=len): ...

Each line has the rate and the time left.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

MOST_SECONDS = 60  # between two lines about some work, however long it takes


class Pace:
    """When the next line about some work is due in a log file, and how fast the work has gone so far.

    Lines come after 20 seconds, after a minute, and then once a minute: a short work soon says that it goes on, and a
    long one does not fill the log.

    Args:
        unit: what is counted, in the plural.
        every: seconds before the first line; between the next two it is twice as long, up to `MOST_SECONDS`.
        digits: behind the point, of the rate.

    Attributes:
        seconds: from the beginning to the last call of `line_is_due`.
    """

    def __init__(self, unit: str, every: float = 20, digits: int = 1):
        self.unit, self.every, self.digits, self.seconds = unit, every, digits, 0.0
        self._start = self._last_line = time.monotonic()

    def line_is_due(self) -> bool:
        """Whether a line is to be printed now."""
        now = time.monotonic()
        self.seconds = now - self._start
        if now - self._last_line < self.every:
            return False
        self._last_line, self.every = now, min(2 * self.every, MOST_SECONDS)
        return True

    def rate(self, done: int, total: int | None = None) -> str:
        """Units a second, and the time left where more than is done is to be done in `total`."""
        rate = done / max(self.seconds, 1e-6)
        text = f"{rate:,.{self.digits}f} {self.unit}/s"
        if total is None:
            return text
        return f"{text}, {self._interval(done, total)} left"

    def time_left(self, done: int, total: int) -> str:
        """The time left now, if the rest of `total` is done as fast as what is done."""
        self.seconds = time.monotonic() - self._start
        return self._interval(done, total)

    def _interval(self, done: int, total: int) -> str:
        return tqdm.format_interval((total - done) * self.seconds / done) if done else "?"


def progress(
    iterable: Iterable, total: int | None, desc: str, unit: str, size: Callable[[Any], int] = lambda item: 1
) -> Iterator:
    """Go through an iterable while its rate and the time left are shown on stderr.

    On a terminal as a bar, elsewhere (a log file) as lines, which become rarer (`Pace`). `size` says how many units an
    item holds, where that is not one (the questions of a batch).
    """
    if sys.stderr.isatty():
        with tqdm(total=total, desc=desc, unit=f" {unit}", unit_scale=total is None or total >= 10**6) as bar:
            for item in iterable:
                yield item
                bar.update(size(item))
        return
    done, pace = 0, Pace(unit)
    for item in iterable:
        yield item
        done += size(item)
        if done != total and pace.line_is_due():
            print(_progress_line(done, total, pace, desc), file=sys.stderr, flush=True)
    pace.line_is_due()
    print(_progress_line(done, total, pace, desc), file=sys.stderr, flush=True)


def _progress_line(done: int, total: int | None, pace: Pace, desc: str) -> str:
    if total is None or done >= total:
        return f"{desc}: {done:,} {pace.unit} in {tqdm.format_interval(pace.seconds)}, {pace.rate(done)}"
    return f"{desc}: {done:,} of {total:,} {pace.unit}, {pace.rate(done, total)}"

"""How far long work has got: a bar on a terminal, plain lines elsewhere.

for batch in progress(batches, total, "Answering", "questions", size=len): ...
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm


def progress(
    iterable: Iterable, total: int | None, desc: str, unit: str, size: Callable[[Any], int] = lambda item: 1
) -> Iterator:
    """Go through an iterable while its rate and the time left are shown on stderr.

    On a terminal as a bar, elsewhere (a log file) as a line about every ten seconds. `size` says how many units an
    item holds, where that is not one (the questions of a batch).
    """
    if sys.stderr.isatty():
        with tqdm(total=total, desc=desc, unit=f" {unit}", unit_scale=total is None or total >= 10**6) as bar:
            for item in iterable:
                yield item
                bar.update(size(item))
        return
    done, start = 0, time.monotonic()
    last_line = start
    for item in iterable:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - last_line >= 10:
            last_line = now
            print(_progress_line(done, total, now - start, desc, unit), file=sys.stderr, flush=True)
    print(_progress_line(done, total, time.monotonic() - start, desc, unit), file=sys.stderr, flush=True)


def _progress_line(done: int, total: int | None, seconds: float, desc: str, unit: str) -> str:
    rate = done / max(seconds, 1e-6)
    if total is None or done >= total:
        return f"{desc}: {done:,} {unit} in {tqdm.format_interval(seconds)}, {rate:,.1f} {unit}/s"
    left = tqdm.format_interval((total - done) / rate) if done else "?"
    return f"{desc}: {done:,} of {total:,} {unit}, {rate:,.1f} {unit}/s, {left} left"

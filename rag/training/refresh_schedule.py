"""When an index is made anew beside the training: --refresh_index "0-1000:500,1000-:1000", steps and their interval.

    schedule = RefreshSchedule.parse("0-1000:500,1000-:1000")
    schedule.is_due(500)          # True: the passages are embedded by the context encoder as it is behind 500 steps
    schedule.swap_step(500)       # 1000: from the step behind that on the new index is searched

Both depend on the number of steps alone and on no clock, so that a run has the losses of any other run of its seed,
however long the embedding takes. Nothing is due at step 0: there the index is that of the encoder.
"""

import re
from dataclasses import dataclass

EXAMPLE = "give steps:interval, such as 0-1000:500,1000-:1000"
PART = re.compile(r"(\d{1,9})-(\d{0,9}):(\d{1,9})")


@dataclass(frozen=True)
class RefreshRange:
    """Steps from `start` to before `end` (None: to the training's last), at whose multiples of `interval` is begun."""

    start: int
    end: int | None
    interval: int

    def holds(self, step: int) -> bool:
        return self.start <= step and (self.end is None or step < self.end)

    def first_behind(self, step: int) -> int | None:
        """The first multiple of the interval in the range that is more than `step`; None where there is none."""
        first = max(step + 1, self.start, 1)
        due = -(-first // self.interval) * self.interval
        return due if self.holds(due) else None


@dataclass(frozen=True)
class RefreshSchedule:
    """Ranges of steps in their order, none of which overlap."""

    ranges: tuple[RefreshRange, ...]

    @classmethod
    def parse(cls, text: str) -> "RefreshSchedule":
        """What the flag says, which has no `schedule_problems`."""
        matches = [PART.fullmatch(part) for part in _parts(text)]
        return cls(tuple(RefreshRange(int(m[1]), int(m[2]) if m[2] else None, int(m[3])) for m in matches if m))

    def is_due(self, step: int) -> bool:
        """Whether a refresh begins behind this many optimizer steps."""
        return step > 0 and any(one.holds(step) and step % one.interval == 0 for one in self.ranges)

    def swap_step(self, begun: int) -> int:
        """Behind how many steps the index of the refresh that began at `begun` is taken: an interval later, or sooner
        where another refresh begins; at once where it began by another schedule."""
        interval = next((one.interval for one in self.ranges if one.holds(begun)), 0)
        later = [due for one in self.ranges if (due := one.first_behind(begun)) is not None]
        return min([begun + interval, *later])

    def is_used_within(self, steps: float) -> bool:
        """Whether an index is taken before the last of so many steps."""
        firsts = [due for one in self.ranges if (due := one.first_behind(0)) is not None]
        return self.swap_step(min(firsts)) < steps


def schedule_problems(text: str) -> list[str]:
    """What is wrong with --refresh_index."""
    flag = f"--refresh_index {text!r}"
    parts = _parts(text)
    if wrong := [part for part in parts if not PART.fullmatch(part)]:
        return [f"{flag}: {wrong[0]!r} says no steps and interval; {EXAMPLE}"]
    ranges = RefreshSchedule.parse(text).ranges
    for one, part in zip(ranges, parts, strict=True):
        if one.interval < 1:
            return [f"{flag}: the interval of {part!r} must be 1 or more; {EXAMPLE}"]
        if one.end is not None and one.end <= one.start:
            return [f"{flag}: {part!r} ends before it begins; {EXAMPLE}"]
        if one.first_behind(0) is None:
            return [f"{flag}: no step of {part!r} is a multiple of its interval; {EXAMPLE}"]
    for one, other, part in zip(ranges, ranges[1:], parts[1:], strict=False):
        if one.end is None or other.start < one.end:
            return [f"{flag}: {part!r} begins before the part in front of it ends; {EXAMPLE}"]
    return []


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]

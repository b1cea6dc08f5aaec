"""The table of `benchmarks/gpu.py`: ours, the public way, the limit by counting, the bar, and whether it is met.

    print(markdown(settings, Found(settings, measured)))

A limit is what counting predicts at the ceilings that were measured in the same run: arithmetic at the rate of a large
matrix product, bytes at the rate of a copy.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.gpu_parts.answers import KINDS, PRECISIONS, answers_case
from benchmarks.gpu_parts.embedding import EMBEDDING
from benchmarks.gpu_parts.measuring import Measured, Settings
from benchmarks.gpu_parts.search import EQUALITY, LOADING, QUESTIONS, opening_case, search_case
from benchmarks.gpu_parts.training import COMPILED, LOOP, attention_dropouts, step_case

COLUMNS = ("what", "ours", "public way", "ratio", "limit by counting", "bar", "met")
# Of AdamW for a float32 weight: weight, gradient and two moments are read, all but the gradient written.
OPTIMIZER_BYTES = 28


class Found:
    """What was measured by case and side, and what follows from it."""

    def __init__(self, settings: Settings, measured: Iterable[Measured]):
        self.figures: dict[tuple[str, str], dict] = {}
        for one in measured:
            self.figures.setdefault((one.case, one.side), {}).update(one.figures)
        chip = self.figures.get(("chip", "chip"), {})
        ceilings = [chip.get(name, math.nan) for name in ("bf16_tflops", "fp32_tflops", "copy_tb", "bus_gb")]
        self.bf16, self.fp32, self.copy, self.bus = (
            ceilings[0] * 1e12,
            ceilings[1] * 1e12,
            ceilings[2] * 1e12,
            ceilings[3] * 1e9,
        )
        for (case, _), figures in self.figures.items():
            self._count(case, figures)
        self._compare(settings)

    def get(self, case: str, name: str, side: str = "ours"):
        """A figure; None where it was not measured, or hangs on one that was not."""
        figure = self.figures.get((case, side), {}).get(name)
        return None if isinstance(figure, float) and math.isnan(figure) else figure

    def _count(self, case: str, figures: dict) -> None:
        """Rates, shares of the peak, and limits."""
        flop = figures.get("flop", 0.0)
        if "context_tokens" in figures:
            seconds = figures["ms"] / 1e3
            figures["tokens_per_second"] = figures["context_tokens"] / seconds
            figures["share"] = flop / seconds / self.bf16
            figures["limit_ms"] = 1e3 * (flop / self.bf16 + OPTIMIZER_BYTES * figures["weights"] / self.copy)
        elif "passages_per_second" in figures and flop:
            figures["share"] = flop * figures["passages_per_second"] / self.bf16
            figures["limit_passages_per_second"] = self.bf16 / flop
        elif "bytes" in figures:  # a search waits for the slower of the two
            figures["limit_ms"] = 1e3 * max(figures["bytes"] / self.copy, flop / self.bf16)
        elif flop:
            figures["limit_ms"] = 1e3 * flop / (self.fp32 if case.endswith("float32") else self.bf16)
        if "bus_bytes" in figures:
            figures["limit_s_a_million"] = figures["bus_bytes"] / self.bus

    def _compare(self, settings: Settings) -> None:
        """Figures of ours beside others of ours."""
        step = self.figures.get((step_case(settings.batches[0], 0.1), "ours"), {})
        loop = self.figures.get((LOOP, "ours"), {})
        if "ms" in step and "ms" in loop:
            loop["of_step"] = step["ms"] / loop["ms"]
        pairs = [(search_case(questions, "int8"), search_case(questions, "fp16"), "ms") for questions in QUESTIONS]
        for case, beside, name in [*pairs, (opening_case("int8"), opening_case("fp16"), "gib")]:
            if self.get(case, name) is not None and self.get(beside, name):
                self.figures[case, "ours"]["of_fp16"] = self.get(case, name) / self.get(beside, name)


@dataclass(frozen=True)
class Bar:
    """What a figure of ours is held against, by itself or beside the public way's, which may be None."""

    text: str
    holds: Callable[[float, float | None], bool | None]  # None: it cannot be said


def at_most(value: float, text: str) -> Bar:
    return Bar(f"at most {text}", lambda ours, public: ours <= value)


def at_least(value: float, text: str) -> Bar:
    return Bar(f"at least {text}", lambda ours, public: ours >= value)


def times_as_fast(value: float) -> Bar:
    """Of seconds."""
    return Bar(f"{value:g}x as fast", lambda ours, public: None if public is None else public >= value * ours)


def of_public(value: float) -> Bar:
    return Bar(f"{value:g} of the public way", lambda ours, public: None if public is None else ours <= value * public)


@dataclass(frozen=True)
class Line:
    """A row of the table: a figure of a case, how it is printed and what it is held against.

    The ratio is that of speeds where `better` says which is the faster; else ours is divided by the public way's.
    """

    what: str
    case: str
    figure: str
    form: str = "{:,.1f}"
    bars: tuple[Bar, ...] = ()
    better: str = ""  # lower or higher


def lines(settings: Settings) -> list[Line]:
    made = [line for case, batch in step_cases(settings) for line in step_lines(case, batch == settings.batches[0])]
    return [*made, *loop_lines(settings), *answer_lines(settings), *search_lines(), *embedding_lines()]


def step_cases(settings: Settings) -> list[tuple[str, int]]:
    return [(step_case(batch, p), batch) for p in attention_dropouts(settings) for batch in settings.batches]


def step_lines(case: str, is_small: bool) -> list[Line]:
    share = at_least(0.3, "30%") if is_small else at_least(0.4, "40%")
    return [
        Line(f"{case}, ms", case, "ms", bars=(times_as_fast(3),) if is_small else (), better="lower"),
        Line("share of the bf16 peak", case, "share", "{:.1%}", (share,)),
        Line("context tokens a second", case, "tokens_per_second", "{:,.0f}", better="higher"),
        Line("padding", case, "padding", "{:.1%}", (at_most(0.02, "2%"),)),
        Line("peak memory, MiB", case, "peak_mib", "{:,.0f}", (of_public(0.6),)),
        Line("kernels a step", case, "kernels", "{:,.0f}"),
        Line("copies to the host a step", case, "device_reads", "{:,.1f}", (at_most(1, "1 (question vectors)"),)),
        Line("numbers the host asks for, a step", case, "scalars", "{:,.1f}", (at_most(0, "0"),)),
        Line("waits for the device a step", case, "waits", "{:,.1f}"),
        Line("device busy (under the profiler)", case, "busy", "{:.0%}"),
        Line("loss of the first batch, no dropout", case, "loss", "{:.4f}"),
    ]


def loop_lines(settings: Settings) -> list[Line]:
    small = settings.batches[0]
    return [
        Line(f"--compile, batch {small}, ms a step", COMPILED, "ms"),
        Line("its first step, s", COMPILED, "first_s"),
        Line("the five behind it, s", COMPILED, "settling_s"),
        Line(f"finetune_rag.py, batch {small}, ms a step", LOOP, "ms"),
        Line("its rate, of the step's by itself", LOOP, "of_step", "{:.0%}", (at_least(0.9, "90%"),)),
        Line("tokens_per_second that it logs", LOOP, "logged_rate", "{:,.0f}"),
    ]


def answer_lines(settings: Settings) -> list[Line]:
    made = []
    for kind, times, most in (("RAG-Sequence", 30, 3.0), ("RAG-Token", 8, 1.5)):
        assert kind in KINDS
        for batch in settings.answer_batches:
            for precision in PRECISIONS:
                case, bars = answers_case(kind, batch, precision), [times_as_fast(times)]
                if precision == "bfloat16" and batch == settings.answer_batches[1]:
                    bars.append(at_most(most, f"{most:g} ms"))
                made += [
                    Line(f"{case}, ms a question", case, "ms", "{:,.2f}", tuple(bars), "lower"),
                    Line("kernels a batch", case, "kernels", "{:,.0f}"),
                    Line("answers equal to ours in float32", case, "as_float32", "{:.0%}"),
                ]
    return made


def search_lines() -> list[Line]:
    made = [
        Line("loading a million vectors, s", LOADING, "s_a_million", "{:.2f}", (at_most(0.3, "0.3 s"),)),
        Line(f"passages found, {EQUALITY}", EQUALITY, "same", "{:.2%}"),
        Line("vectors that are searched", opening_case("fp16"), "rows", "{:,.0f}"),
        Line("loading them, s", opening_case("fp16"), "s"),
    ]
    for questions, most in zip(QUESTIONS, (17, 120), strict=True):
        case = search_case(questions, "fp16")
        made.append(Line(f"{case}, ms", case, "ms", bars=(at_most(most, f"{most} ms"),)))
    half = (at_most(0.5, "half"),)
    made.append(Line("memory of int8, of fp16's", opening_case("int8"), "of_fp16", "{:.0%}", half))
    for questions in QUESTIONS:
        case = search_case(questions, "int8")
        made += [
            Line(f"{case}, ms", case, "ms"),
            Line("its time, of fp16's", case, "of_fp16", "{:.0%}", half),
            Line("its recall of fp16's passages", case, "recall", "{:.2%}"),
        ]
    return made


def embedding_lines() -> list[Line]:
    rate = (at_least(9000, "9,000"),)
    return [
        Line("passages embedded a second", EMBEDDING, "passages_per_second", "{:,.0f}", rate, "higher"),
        Line("share of the bf16 peak", EMBEDDING, "share", "{:.1%}", (at_least(0.25, "25%"),)),
        Line("device busy (under the profiler)", EMBEDDING, "busy", "{:.0%}", (at_least(0.9, "90%"),)),
    ]


def cells(line: Line, found: Found, is_first: bool) -> tuple[str, ...]:
    """A row of the table as text; why a case was not measured stands in its first row."""
    figures = {side: found.get(line.case, line.figure, side) for side in ("ours", "public")}
    ours, public = figures.values()
    held = [None if ours is None else bar.holds(ours, public) for bar in line.bars]
    met = "no" if False in held else "not measured" if None in held else "yes"
    limit = found.get(line.case, f"limit_{line.figure}")
    shown = {side: "" if figure is None else line.form.format(figure) for side, figure in figures.items()}
    for side, text in shown.items():
        if not text and is_first:
            shown[side] = str(found.get(line.case, "problem", side) or "").replace("|", "/")
    return (
        line.what, shown["ours"] or "-", shown["public"], _ratio(line, ours, public),
        "" if limit is None else line.form.format(limit), ", ".join(bar.text for bar in line.bars),
        met if line.bars else "",
    )  # fmt: skip


def _ratio(line: Line, ours: float | None, public: float | None) -> str:
    if not ours or not public:
        return ""
    if not line.better:
        return f"{ours / public:.2f}" if line.bars else ""
    return f"{public / ours if line.better == 'lower' else ours / public:.1f}x"


def markdown(settings: Settings, found: Found) -> str:
    rows, seen = [COLUMNS, ("---",) * len(COLUMNS)], set()
    for line in lines(settings):
        rows.append(cells(line, found, line.case not in seen))
        seen.add(line.case)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

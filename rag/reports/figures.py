"""Charts as SVG that stands in the page itself and takes its colors from the page's theme.

    svg = line_chart({"loss": [(1, 4.2), (2, 3.9)]}, x="step")

matplotlib draws with colors that stand for the page's variables; letters stay letters.
"""

import io
import re
from typing import Any

from rag.errors import UserError

INK, MUTED, LINE = "#010101", "#020202", "#030303"
SERIES = [f"#0a000{n}" for n in range(1, 7)]
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line"} | {
    color: f"--c{n}" for n, color in enumerate(SERIES, start=1)
}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are the user's: a dollar is a dollar
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; the page sets its own
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.2,
}
MOST_SERIES = len(SERIES)
LONGEST_NAME = 28


def load_matplotlib() -> Any:
    """The package, which few commands need.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UserError("--output_path: the page's charts need matplotlib; pip install matplotlib") from error
    return matplotlib


def line_chart(
    series: dict[str, list[tuple[float, float]]],
    x: str,
    *,
    percent: bool = False,
    diagonal: bool = False,
    marks: bool = False,
) -> str:
    """Curves of (x, y) by name, the first `MOST_SERIES` of them.

    Args:
        x: what the horizontal axis is.
        percent: values are fractions, shown as percent from 0 to 100.
        diagonal: draw where x and y are equal.
        marks: mark the points.
    """
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"{x} {list(series)}"}):
        figure = matplotlib.figure.Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.subplots()
        scale = 100 if percent else 1
        if diagonal:
            axes.plot([0, scale], [0, scale], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        for color, (name, points) in zip(SERIES, series.items(), strict=False):
            xs, ys = zip(*points, strict=True)
            dots = "o" if marks or len(points) < 12 else ""
            across = [scale * one for one in xs] if diagonal else xs
            axes.plot(across, [scale * one for one in ys], color=color, label=_short(name), marker=dots, markersize=3.5)
        axes.set_xlabel(x)
        if percent:
            axes.set_ylim(-2, 102)
        else:
            axes.margins(y=0.08)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        if not diagonal and all(float(tick).is_integer() for points in series.values() for tick, _ in points):
            axes.xaxis.get_major_locator().set_params(integer=True)
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=2)
        return themed(figure)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def themed(figure: Any) -> str:
    """A figure as an `<svg>` element whose colors are the page's variables."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r"font-family: [^;]*; ?|<style.*?</style>", "", svg, flags=re.DOTALL)  # the page's, and for all of it
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    return re.sub(r">\s+<", "><", re.sub(r"\n\s*", " ", svg))

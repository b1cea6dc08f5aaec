"""Draw the plots of the docs from the committed figures.

    python docs/plots.py

reads docs/figures/*.json and writes docs/images/*.svg, the same bytes each time with the same matplotlib.
`--from_run OUTPUT_DIR` first takes the validations of a finetuning run (its metrics.json) into
docs/figures/quickstart_em.json. Needs matplotlib, which is in the extra `dev`.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
EM_FIGURES = DOCS / "figures" / "quickstart_em.json"
STYLE = {
    "svg.hashsalt": "docs",  # ids within the file that do not change from run to run
    "svg.fonttype": "none",  # letters as text: small, and searchable
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],  # the first one comes with matplotlib
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.axisbelow": True,
}
COLORS = {"HNSW128,Flat": "#2f6db5", "HNSW32,SQ8": "#c9772b", "Flat": "#4a8f4a", "IVF1024,PQ64": "#8d5ba3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from_run", metavar="OUTPUT_DIR", help="Output folder of a finetuning run to take EM from.")
    args = parser.parse_args()
    if args.from_run is not None:
        take_validations(Path(args.from_run))
    with matplotlib.rc_context(STYLE):
        save(draw_index_kinds(load("index_kinds.json")), "index_kinds.svg")
        save(draw_em(load("quickstart_em.json")), "quickstart_em.svg")


def load(name: str) -> dict:
    return json.loads((DOCS / "figures" / name).read_text(encoding="utf-8"))


def take_validations(run: Path) -> None:
    """Replace the validations in the committed figures by those of a run's metrics.json: step, EM as a fraction."""
    rows = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["val"]
    figures = load(EM_FIGURES.name)
    figures["validations"] = [{"step": row["step"], "em": round(row["val_em"], 4)} for row in rows]
    EM_FIGURES.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def save(figure: Figure, name: str) -> None:
    figure.savefig(DOCS / "images" / name, format="svg", metadata={"Date": None}, facecolor="white")


# --- Plots ------------------------------------------------------------------------------------------------------------


def draw_index_kinds(figures: dict) -> Figure:
    """Recall@5 against questions a second, a line a kind of index, a point an effort of search."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for kind in figures["kinds"]:
        speed = [point["questions_per_second"] for point in kind["points"]]
        recall = [point["recall_at_5"] for point in kind["points"]]
        label = f"{kind['index']}: {kind['passages']:,} passages, {kind['mib']:,} MiB"
        axes.plot(speed, recall, marker="o", color=COLORS[kind["index"]], label=label)
        for point in kind["points"]:
            is_fastest = point["questions_per_second"] == max(speed)
            axes.annotate(
                point["effort"] or "exact search",
                (point["questions_per_second"], point["recall_at_5"]),
                textcoords="offset points",
                xytext=(7 if is_fastest else -3, -13 if kind["index"] == "HNSW32,SQ8" else 5),
                ha="left" if is_fastest else "right",
                fontsize=8,
                color="#555b63",
            )
    axes.set(xscale="log", xlim=(20, 130_000), ylim=(0, 1.1), xlabel="questions a second", ylabel="recall@5")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="lower left", fontsize=9, frameon=False, bbox_to_anchor=(0.0, 0.28))
    return figure


def draw_em(figures: dict) -> Figure:
    """Exact match over the steps of the quickstart's finetuning, and on the test questions before and after."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in figures["validations"]]
    axes.plot(
        steps,
        [100 * row["em"] for row in figures["validations"]],
        marker="o",
        color="#2f6db5",
        label=f"{figures['validation_questions']} validation questions",
    )
    test = figures["test"]
    axes.plot(
        [0, steps[-1]],
        [100 * test["em_before"], 100 * test["em_after"]],
        linestyle="none",
        marker="D",
        color="#c9772b",
        label=f"{test['questions']} test questions, before and after",
    )
    axes.set(xlim=(-8, steps[-1] + 8), ylim=(-3, 100), xlabel="optimizer steps", ylabel="exact match, %")
    axes.legend(loc="upper left", fontsize=9, frameon=False)
    return figure


if __name__ == "__main__":
    main()

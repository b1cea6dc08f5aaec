"""Files of evaluations and of a training, made up: what `report_rag.py` reads."""

import json
import random
from pathlib import Path

CITIES = ["Oslo", "Paris", "Rome", "Vienna", "Lisbon", "Berlin", "Madrid", "London"]
STARTS = [
    "what is the capital of",
    "which city governs",
    "where does the king live in",
    "who lives in",
    "name the seat of",
]


def write_gold(path: Path, n: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    lines = [f"{draw.choice(STARTS)} land {at}?\t{[draw.choice(CITIES), f'city {at}']!r}" for at in range(n)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_evaluation(
    path: Path, gold: Path, accuracy: float, n_docs: int = 3, words: int = 12, seed: int = 1, **more
) -> Path:
    """Answers of which `accuracy` are right, and records with all that there may be; `more` into every record."""
    draw = random.Random(seed)
    answers, records = [], []
    for at, line in enumerate(gold.read_text().splitlines()):
        question, right = line.split("\t")[0], line.split("'")[1]
        answers.append(right if draw.random() < accuracy else f"not {draw.choice(CITIES)} at all")
        holder = draw.randrange(2 * n_docs)
        texts = [" ".join(draw.choices(["river", "hill", "bridge", "king"], k=words)) for _ in range(n_docs)]
        if holder < n_docs:
            texts[holder] += f" {right} lies here"
        shares = [draw.random() for _ in range(n_docs)]
        records.append(
            {
                "id": at + 1,
                "question": question,
                "answer": answers[-1],
                "doc_ids": [at * n_docs + k for k in range(n_docs)],
                "titles": [f"Title {at} {k}" for k in range(n_docs)],
                "texts": texts,
                "scores": sorted((60 + 3 * draw.random() for _ in range(n_docs)), reverse=True),
                "posteriors": [share / sum(shares) for share in shares],
            }
            | more
        )
    return write_files(path, answers, records)


def write_files(path: Path, answers: list[str], records: list[dict] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{answer}\n" for answer in answers))
    if records is not None:
        Path(f"{path}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def write_run(folder: Path, steps: int = 60) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"step": step, "loss": 5 / (1 + step / 20), "lr": 1e-4 * (1 - step / steps), "grad_norm": 3.0, "epoch": 0}
        | {"tokens_per_second": 1000.0, "distinct_docs": 0.9}
        for step in range(0, steps, 10)
    ]
    (folder / "training_log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    validation = {"step": steps, "epoch": 0, "step_count": 1, "val_em": 0.5, "val_avg_em": 0.5, "val_avg_loss": 1.5}
    (folder / "metrics.json").write_text(json.dumps({"train": [], "val": [validation], "test": []}))
    (folder / "hparams.json").write_text(json.dumps({"model": {"model_name_or_path": "some/model"}, "data": {}}))
    return folder

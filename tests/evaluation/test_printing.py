"""What eval_rag.py prints of scores: a line of settings that fits on a terminal, and a table."""

from rag.evaluation.printing import made_with, print_scores

CHECKPOINT = "output/quickstart/finetuned/checkpoint1"
SETTINGS = {
    "model_name_or_path": {"path": CHECKPOINT, "digest": "0"},
    "model_type": "rag_sequence",
    "evaluation_set": {"path": "questions", "digest": "1"},
    "n_docs": 2,
    "num_beams": 2,
    "decoding": "thorough",
    "precision": "float32",
}
INDEX = {"kind": "IndexHNSWFlat", "ef_search": 128, "passages": 2825, "dimension": 384}
FULL = f"{CHECKPOINT} (rag_sequence), index HNSWFlat ef_search 128, n_docs 2, num_beams 2, float32"


def test_what_tells_most_stands_in_a_line():
    assert made_with(SETTINGS, INDEX) == FULL
    assert made_with(SETTINGS | {"decoding": "fast"}, {"kind": "BM25", "k1": 1.5}).endswith(
        ", index BM25, n_docs 2, num_beams 2, decoding fast, float32"
    )
    closed_book = {"model_name_or_path": {"path": "m", "digest": None}, "model_type": "bart", "num_beams": 4}
    assert made_with(closed_book | {"precision": "bfloat16"}, {}) == "m (bart), num_beams 4, bfloat16"
    assert made_with(None, {}) == "made with unknown settings"


def test_a_long_path_loses_its_beginning():
    long = SETTINGS | {"model_name_or_path": {"path": f"{'a/' * 60}checkpoint1", "digest": "0"}}
    line = made_with(long, INDEX)
    assert len(line) == 120 and line.startswith("...") and "/checkpoint1 (rag_sequence), " in line


def test_the_table_of_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ranges = {"em": (0.78, 0.872), "attribution_prior": (0.9, 1.0)}
    print_scores({"em": 0.828, "attribution_prior": 1.0}, ranges, 1250, FULL, f"{tmp_path}/answers.txt.scores.json")
    assert capsys.readouterr().out.splitlines() == [
        FULL,
        "1,250 questions     percent  [95% interval]",
        "EM:                   82.80  [78.0, 87.2]",
        "Attribution-prior:   100.00  [90.0, 100.0]",
        "settings: answers.txt.scores.json",
    ]

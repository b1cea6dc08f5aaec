"""Bad input, a row a case, of reports, logs, the hub, KILT's gold and passages of another system."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import QUESTIONS
from tests.faults.cases import CONSOLIDATE, EVAL, FINETUNE, KNOWLEDGE, REPORT, Cases, require_answered_well
from tests.faults.makers import NOT_JSON, Change, Changed, Copy, File, Of, Special, apply, cut, first_line, utf16

CASES = Cases()
refused, works, cleanly = CASES.refused, CASES.works, CASES.cleanly

PIPE, GONE = "is a device or a pipe, not a file", "does not exist"
KINDS = {"fifo": PIPE, "device": PIPE, "link": GONE, "loop": GONE, "below": GONE, "folder": "is a folder, not a file"}
NO_TEXT: dict[str, Change] = {"empty": b"", "binary": bytes(range(128, 256)) * 9, "UTF-16": utf16}
NO_FILE = {"missing": "{out}/none", "''": "", "too long": "x" * 300, "too deep": "x/" * 3000}

# --- Reports ----------------------------------------------------------------------------------------------------------


def answers(**changes: Change) -> Of:
    """A copy of the evaluation with other content in what stands beside the predictions, by the name's end."""

    def make(world: Path, folder: Path) -> Path:
        for name in ("answers.txt", "answers.txt.jsonl"):
            shutil.copy(world / name, folder)
        for name, change in changes.items():
            apply(change, folder / "answers.txt.jsonl", folder / f"answers.txt.{name.replace('_', '.')}")
        return folder / "answers.txt"

    return Of(make)


def record(**values) -> Change:
    """The first record with other values."""
    return lambda old: first_line(json.dumps(json.loads(old.split(b"\n")[0]) | values).encode())(old)


for flag, source in (("--predictions_path", "answers.txt"), ("--gold_data_path", "gold.qa")):
    for kind, what in KINDS.items():
        is_short = (flag, kind) == ("--gold_data_path", "fifo")
        refused(REPORT, f"{flag} is a {kind}", {flag: Special(kind)}, f"{flag} .*{what}", is_short)
    refused(REPORT, f"{flag} ' '", {flag: " "}, f"{flag} ' ' names nothing")
    for name, change in NO_TEXT.items():
        refused(REPORT, f"{flag} is {name}", {flag: Changed(source, change)}, flag)
    refused(REPORT, f"{flag} with a line more", {flag: Changed(source, lambda old: old + old[:20] + b"\n")}, flag)
for flag in ("--predictions_path", "--gold_data_path", "--run_dir"):
    for name, value in NO_FILE.items():
        refused(REPORT, f"{flag} {name}", {flag: value}, flag)
for kind in KINDS:
    refused(REPORT, f"--run_dir is a {kind}", {"--run_dir": Special(kind)}, "--run_dir", short=kind == "folder")
    refused(REPORT, f"--output_path is a {kind}", {"--output_path": Special(kind)}, "--output_path")
for value in ("", " ", "/proc/x", "/proc/x/y", "/sys/x", "x" * 300, "x/" * 3000):
    refused(REPORT, f"--output_path {value[:9]!r}", {"--output_path": value}, "--output_path")
works(REPORT, "--output_path is a file", {"--output_path": File(b"old")})
for name, path in {"the predictions": "answers.txt", "their records": "answers.txt.jsonl",
                   "the log": "run/training_log.jsonl", "the gold": "gold.qa"}.items():  # fmt: skip
    refused(REPORT, f"--output_path is {name}", {"--output_path": f"{{world}}/{path}"}, "--output_path .* is read")
BROKEN_RECORDS: dict[str, Change] = {
    "empty": b"", "cut": cut(0.5), "a list": first_line(b"[1]"), "nested": first_line(b"[" * 100_000),
    "a line less": lambda old: old.split(b"\n", 1)[1], "binary": b"\xff" * 99, "UTF-16": utf16,
    "a question 3": record(question=3), "scores of text": record(scores=["1", "2", "3"]),
    "posteriors NaN": record(posteriors=[float("nan")] * 3), "titles null": record(titles=None),
    "texts too few": record(texts=["a"]), "ids of text": record(doc_ids=["a"] * 3), "rank 0": record(answer_rank=0),
    "a probability of text": record(answer_log_prob="x"),
}  # fmt: skip
for name, change in BROKEN_RECORDS.items():
    refused(
        REPORT,
        f"records {name}",
        {"--predictions_path": answers(jsonl=change)},
        "answers.txt.jsonl",
        short=name == "cut",
    )
works(REPORT, "no records", {"--predictions_path": answers(jsonl=None)})
works(REPORT, "records with less", {"--predictions_path": answers(jsonl=lambda old: b"{}\n" * 8)})
for end in ("scores_json", "settings_json"):
    for name, content in NOT_JSON.items():
        changes = {"--predictions_path": answers(**{end: content})}
        if name == "an empty object":
            works(REPORT, f"{end} {name}", changes)
        else:
            refused(REPORT, f"{end} {name}", changes, re.escape(f"answers.txt.{end.replace('_', '.')} is damaged"))
for name in ("metrics.json", "hparams.json"):
    for kind, content in NOT_JSON.items():
        if kind != "an empty object":
            refused(REPORT, f"{name} {kind}", {"--run_dir": Copy("run", {name: content})}, re.escape(name))
for name, line in {"text": b"{oops", "a list": b"[1]", "no step": b"{}", "step NaN": b'{"step": NaN}',
                   "nested": b"[" * 100_000, "binary": b"\xff"}.items():  # fmt: skip
    changed = Copy("run", {"training_log.jsonl": first_line(line)})
    refused(REPORT, f"a row of the log {name}", {"--run_dir": changed}, "training_log.jsonl, line 1")
works(REPORT, "half a last row", {"--run_dir": Copy("run", {"training_log.jsonl": cut(0.99)})}, short=True)
works(REPORT, "a log alone", {"--run_dir": Copy("run", {"metrics.json": None, "hparams.json": None})})
works(REPORT, "metrics alone", {"--run_dir": Copy("run", {"training_log.jsonl": None})})
works(REPORT, "a log of NaN", {"--run_dir": Copy("run", {"training_log.jsonl": b'{"step": 1, "loss": NaN}\n' * 3})})
NOTHING = dict.fromkeys(("--predictions_path", "--gold_data_path", "--run_dir"))
refused(REPORT, "of nothing", NOTHING, "--run_dir and --predictions_path are missing", short=True)
refused(REPORT, "gold alone", {"--predictions_path": None}, "--gold_data_path")
refused(REPORT, "predictions twice", {"--predictions_path": ["{world}/answers.txt"] * 2}, "twice")
refused(REPORT, "kilt by name", {"--gold_data_mode": "kilt"}, "--gold_data_mode")
refused(REPORT, "titles that are answers", {"--gold_data_mode": "titles"}, "--gold_data_path")
refused(REPORT, "one answer a line that has more", {"--gold_data_mode": "ans"}, "--gold_data_path")
patterns = {"--gold_data_mode": "regex", "--gold_data_path": Changed("gold.qa", first_line(b"q\t['(']"))}
refused(REPORT, "a pattern that is none", patterns, "line 1")
for kind, changes in {"a training alone": {"--predictions_path": None, "--gold_data_path": None},
                      "answers alone": {"--run_dir": None, "--gold_data_path": None},
                      "KILT's gold": {"--gold_data_path": "{world}/kilt.jsonl"}}.items():  # fmt: skip
    works(REPORT, kind, changes)
works(REPORT, "as it should be", {}, short=True)
refused(REPORT, "a flag with a typo", {"--prediction_path": "x"}, "prediction_path")

# --- Logs and the hub -------------------------------------------------------------------------------------------------

UNKNOWN = {"nothing": "nothing is none of", "tensorbord": "did you mean tensorboard", "": "names nothing",
           ",": "names nothing", "csv,CSV": "CSV is none of", "/etc": "is none of",
           "jsonl;csv": "is none of"}  # fmt: skip
for value, says in UNKNOWN.items():
    refused(
        FINETUNE, f"--report_to {value!r}", {"--report_to": value}, f"--report_to.*{says}", short=value == "tensorbord"
    )
works(FINETUNE, "--report_to twice the same", {"--report_to": "csv,csv"})
works(FINETUNE, "--report_to two", {"--report_to": ["csv", "tensorboard"]})
cleanly(
    FINETUNE, "--report_to what may lack", {"--report_to": "mlflow"}, "--report_to mlflow needs .* pip install mlflow"
)
refused(
    FINETUNE, "--logger_name against --report_to", {"--logger_name": "wandb", "--report_to": "csv"}, "--logger_name"
)
refused(FINETUNE, "--nan_policy", {"--nan_policy": "ignore"}, "--nan_policy")
for script in (EVAL, FINETUNE):
    for value in ("0", "-1", "nan", "inf", "x"):
        refused(script, f"--rank_timeout {value}", {"--rank_timeout": value}, "rank_timeout")
    for value in ("hub:", "hub:/", "hub:a b/c", "hub:nameless"):
        refused(script, f"--passages_path {value}", {"--passages_path": value}, "--passages_path.* names no dataset")
    refused(script, "--passages_path of nobody", {"--passages_path": "hub:nobody/nothing"}, "--passages_path")
for script in (CONSOLIDATE, KNOWLEDGE):
    for value in (
        "",
        " ",
        "nameless",
        "a/b/c",
        "a b/c",
        "/x",
        "x/",
        "../x",
        "a/..",
        "a/" + "x" * 200,
        "https://a.b/c/d",
        "a/b.git",
    ):
        refused(
            script,
            f"--push_to_hub {value[:12]!r}",
            {"--push_to_hub": value},
            "--push_to_hub",
            short=value == "nameless",
        )
for flag, value in (("--search", "who"), ("--verify", True), ("--append", True)):
    refused(KNOWLEDGE, f"{flag} of nothing", {flag: value, "--push_to_hub": "alice/rag"}, flag)
for value in ("x", "0", "-1", "nan", "inf", ""):
    refused(
        CONSOLIDATE,
        f"--question_encoder_scale {value!r}",
        {"--question_encoder_scale": value},
        "question_encoder_scale",
    )

# --- Passages of another system ---------------------------------------------------------------------------------------

FOUND = "--passages_file"
NO_FINDS: dict[str, Change] = {
    "no JSON": first_line(b"who\tA"), "a list": first_line(b"[1]"), "nested": first_line(b"[" * 100_000),
    "no titles": first_line(b'{"question": "x", "texts": ["a"], "scores": [1]}'),
    "no passages": first_line(b'{"question": "x", "titles": [], "texts": [], "scores": []}'),
    "score NaN": first_line(b'{"question": "x", "titles": ["a"], "texts": ["a"], "scores": [NaN]}'),
    "half a character": first_line(b'{"question": "x", "titles": ["a"], "texts": ["\\ud800"], "scores": [1]}'),
    "a blank line": lambda old: b"\n" + old, "other passages": lambda old: old.replace(b"a river", b"a sea", 1) + old,
    "cut": cut(0.99),
}  # fmt: skip
for script in (EVAL, FINETUNE):
    for kind in KINDS:
        refused(script, f"{FOUND} is a {kind}", {FOUND: Special(kind)}, f"{FOUND} .* is not a file")
    for name, value in NO_FILE.items():
        refused(script, f"{FOUND} {name}", {FOUND: value}, FOUND, short=(script, name) == (EVAL, "missing"))
    for name, change in (NO_TEXT | NO_FINDS).items():
        says = f"{FOUND}.*line" if name in NO_FINDS else FOUND
        refused(script, f"{FOUND} {name}", {FOUND: Changed("found.jsonl", change)}, says)
    refused(script, f"{FOUND} .json of lines", {FOUND: File(b"{}\n{}\n", "found.json")}, FOUND)
    lacking = Changed("found.jsonl", lambda old: old.split(b"\n", 1)[1])
    refused(script, f"{FOUND} lacks a question", {FOUND: lacking}, f"{FOUND}.*no passages for", short=script == EVAL)
    both = {FOUND: "{world}/found.jsonl"}
    refused(script, f"{FOUND} and an index", both | {"--index_name": "custom"}, FOUND)
    refused(script, f"{FOUND} and passages", both | {"--passages_path": "{world}/passages"}, FOUND)
    refused(script, "given, and no file", {"--index_name": "given"}, FOUND)
    works(script, f"{FOUND} as it should be", both)
    works(script, f"{FOUND} with a BOM", {FOUND: Changed("found.jsonl", lambda old: b"\xef\xbb\xbf" + old)})
    works(script, f"{FOUND} with CRLF", {FOUND: Changed("found.jsonl", lambda old: old.replace(b"\n", b"\r\n"))})

# --- KILT's gold, and what is scored beside EM ------------------------------------------------------------------------

KILT = {"--gold_data_mode": "kilt"}
TITLES = {"--eval_mode": "retrieval"}
QUESTION = QUESTIONS[0][0]


def kilt(*outputs) -> Changed:
    """KILT's gold with other outputs in its first line."""
    return Changed("kilt.jsonl", first_line(json.dumps({"input": QUESTION, "output": outputs}).encode()))


NO_KILT = {
    "of qa": "{world}/gold.qa", "of titles": "{world}/titles", "a list of records": File(b"[{}]\n"),
    "of DPR": "{world}/dpr.json", "without outputs": kilt(), "outputs of text": kilt("paris"),
    "an answer 3": kilt({"answer": 3}),
    "without an answer": kilt({"provenance": [{"title": "paris"}]}),
    "provenance of text": kilt({"answer": "paris", "provenance": "paris"}),
    "a page without a title": kilt({"answer": "paris", "provenance": [{"wikipedia_id": "1"}]}),
    "nested": Changed("kilt.jsonl", first_line(b"[" * 100_000)), "a line less": Changed("kilt.jsonl", cut(0.5)),
    "a blank line": Changed("kilt.jsonl", lambda old: b"\n" + old), "UTF-16": Changed("kilt.jsonl", utf16),
}  # fmt: skip
for name, value in NO_KILT.items():
    refused(EVAL, f"KILT's gold {name}", KILT | {"--gold_data_path": value}, "--gold_data_path", short=name == "of qa")
for name in ("of qa", "without outputs", "provenance of text", "a page without a title", "UTF-16"):
    changes = KILT | TITLES | {"--gold_data_path": NO_KILT[name]}
    refused(EVAL, f"KILT's pages {name}", changes, "--gold_data_path")
works(EVAL, "KILT's gold", {"--gold_data_path": "{world}/kilt.jsonl"}, "EM: ")
works(
    EVAL,
    "KILT's questions",
    KILT | {"--gold_data_path": "{world}/kilt.jsonl", "--evaluation_set": "{world}/kilt.jsonl"},
)
nameless = {"--evaluation_set": Changed("kilt.jsonl", lambda old: old[:40] + old[40:].replace(b'"input"', b'"x"', 1))}
refused(EVAL, "a record without a question", nameless, "line 2")
works(EVAL, "--contains", {"--contains": True}, "(?i)contains")
refused(EVAL, "--contains maybe", {"--contains": "maybe"}, "contains")
refused(
    EVAL, "--contains of passages", TITLES | {"--contains": True, "--gold_data_path": "{world}/titles"}, "--contains"
)
refused(EVAL, "--precision", {"--precision": "fp8"}, "--precision")
refused(EVAL, "--answers_path of answers", {"--answers_path": "{world}/gold.qa"}, "--answers_path")


@pytest.mark.parametrize("case", CASES.parameters())
def test_bad_records(world, tmp_path, case):
    require_answered_well(case, world, tmp_path / "case")

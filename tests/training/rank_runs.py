"""Small runs of `finetune_rag.py`, alone or as one of two ranks, and what has come of them."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune_rag
from rag.files import load_json, read_lines

# 7 examples in batches of 4 make 2 steps an epoch, the last of 3 examples: one on rank 0, two on rank 1. With a small
# epsilon AdamW would move what has a gradient by rounding only (the keys' biases) by a whole learning rate; with this
# one, six steps move it by less than twice its gradient.
SETTINGS = """--eval_batch_size 2 --num_workers 0 --accelerator cpu --num_train_epochs 3 --learning_rate 0.003
--max_source_length 32 --log_every_n_steps 1 --n_docs 2 --dropout 0 --warmup_steps 2 --adam_epsilon 1e-2
--enable_model_summary false""".split()  # noqa: SIM905
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32, sums in another order
LEFT_BY_A_RUN = {".lock", "metrics.json", "hparams.json", "git_log.json", "training_log.jsonl", "last.ckpt"}
LEFT_BY_A_RUN |= {f"checkpoint{number}{suffix}" for number in (1, 2, 3) for suffix in ("", ".ckpt")}
LEFT_BY_A_TEST = {"test_results.txt", "test_generations.txt"}


def outcome(out: Path) -> dict:
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    names = (
        "loss",
        "lr",
        "lr_question_encoder",
        "grad_norm",
        "grad_norm_question_encoder",
        "doc_entropy",
        "distinct_docs",
    )
    metrics = {
        split: [{name: value for name, value in row.items() if "time" not in name} for row in rows]
        for split, rows in load_json(out / "metrics.json").items()
        if split != "train"  # the last batch's
    }
    return {
        "folder": out,
        "files": {path.name for path in out.iterdir()},
        "log": {name: [row[name] for row in log if name in row] for name in names},
        "metrics": metrics,
        "answers": read_lines(out / "test_generations.txt") if (out / "test_generations.txt").exists() else None,
        "weights": torch.load(out / "last.ckpt", weights_only=True)["state_dict"],
    }


def assert_same(found: dict, expected: dict, rtol: float, atol: float) -> None:
    assert found["files"] == expected["files"]
    assert found["answers"] == expected["answers"]
    for name, values in expected["log"].items():
        assert values, name
        # Of the question encoder's gradients most cancels: they are rounded as what they are the difference of.
        terms = max(expected["log"]["grad_norm"]) if name == "grad_norm_question_encoder" else 0.0
        np.testing.assert_allclose(found["log"][name], values, rtol, atol + rtol * terms, err_msg=name)
    for split, rows in expected["metrics"].items():
        for row, other in zip(found["metrics"][split], rows, strict=True):
            assert row == pytest.approx(other, rel=1e-3), split
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, msg=name, rtol=rtol, atol=atol)


def frozen_of(outcome: dict) -> dict:
    """Without what is logged of a question encoder that learns."""
    log = {name: values for name, values in outcome["log"].items() if not name.endswith("_question_encoder")}
    return outcome | {"log": log}


def two_ranks(words: list, out: Path, *flags) -> list[str]:
    return [*words, "--train_batch_size", "2", "--output_dir", str(out), *map(str, flags)]


def train(rank: int, words: list[str], out: Path, terminated_at: int | None = None, ranks: int = 2):
    """A rank of a job on one node: its metrics or exit status, and what it has written to in the output folder."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    written = []

    def note(event: str, arguments: tuple) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree")
        if writes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            # Not the folder itself, of which each rank asks whether it can be written.
            written.extend(str(one) for one in arguments[:2] if str(one).startswith(f"{out}/"))

    sys.addaudithook(note)
    if terminated_at is not None and rank == 1:
        terminate_at(terminated_at)
    try:
        return finetune_rag.main(finetune_rag.parse_args(words)), written
    except SystemExit as end:
        return end.code, written


def terminate_at(global_step: int) -> None:
    from rag.training.qa_module import GenerativeQAModule

    step = GenerativeQAModule.training_step

    def training_step(module, batch, batch_idx):
        if module.global_step == global_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, batch_idx)

    GenerativeQAModule.training_step = training_step

"""Runs that take long enough to be ended, begun again with the same command, and compared with one that nothing ended.

job = Job(world, "finetune", folder)
process = job.start()
job.wait_for_progress(process)
process.kill()
assert job.finish().status == 0 and not differences(job.out, reference)
"""

import json
import re
import shutil
import time
from pathlib import Path

from tests.cards import lasting
from tests.conftest import PASSAGES, QUESTIONS
from tests.faults.processes import Process, Seen, run, start

SCRIPTS = {"eval": "eval_rag.py", "retrieval": "eval_rag.py", "finetune": "finetune_rag.py",
           "lora": "finetune_rag.py", "knowledge": "use_own_knowledge_dataset.py",
           "append": "use_own_knowledge_dataset.py", "refresh": "finetune_rag.py"}  # fmt: skip
LONGER = {
    "eval": {"--evaluation_set": "{world}/many.source", "--gold_data_path": "{world}/many.target",
             "--gold_data_mode": "ans", "--eval_batch_size": 2},
    "retrieval": {"--evaluation_set": "{world}/many.source", "--gold_data_path": "{world}/many.target",
                  "--eval_mode": "retrieval", "--k": [1, 2], "--eval_batch_size": 2},
    "knowledge": {"--csv_path": "{world}/many.tsv", "--batch_size": 2, "--num_shards": 30},
    "append": {"--csv_path": "{world}/more.tsv", "--batch_size": 2, "--num_shards": 20, "--append": True},
    "finetune": {"--max_steps": None, "--num_train_epochs": 6, "--save_interval": 0.002, "--learning_rate": 1e-3,
                 "--do_train": True, "--do_predict": True, "--train_batch_size": 2, "--log_every_n_steps": 5},
}  # fmt: skip
LONGER["lora"] = LONGER["finetune"] | {"--lora_r": 4, "--lora_dropout": 0.1}
LONGER["refresh"] = LONGER["finetune"] | {
    "--train_context_encoder": True, "--context_encoder_name_or_path": "{world}/context_encoder",
    "--over_retrieve": 4, "--refresh_index": "0-10:5,12-:6",
}  # fmt: skip
VARIES = re.compile(r"gen_time|per_second|seconds|queries")  # in two runs of one command
DESCRIBES = {"hparams.json", "git_log.json"}  # a folder's and a machine's names


def write_longer_data(world: Path) -> None:
    questions = [f"{question} {word}" for word in ("river", "city", "sea", "castle") for question, _ in QUESTIONS] * 2
    answers = [answer for _, answer in QUESTIONS] * 8
    (world / "many.source").write_text("".join(f"{question}\n" for question in questions))
    (world / "many.target").write_text("".join(f"{answer}\n" for answer in answers))
    for name, times in {"many.tsv": 20, "more.tsv": 8}.items():
        rows = [f"{title} {name[0]}{i}\t{text} {'river ' * i}\n" for i in range(times) for title, text in PASSAGES]
        (world / name).write_text("".join(rows))


class Job:
    """One kind of run in a folder of its own.

    Args:
        begin: the output of an earlier run, which is continued.
        changes: flags.
    """

    def __init__(self, world, kind: str, folder: Path, begin: Path | None = None, changes: dict | None = None):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.out, self.script = folder, folder / "out", SCRIPTS[kind]
        self.flags = world.flags_of(self.script, folder, LONGER[kind] | (changes or {}))
        if begin is not None:
            shutil.copytree(begin, self.out)

    def start(self) -> Process:
        self.before = self._state()
        return start(self.script, self.flags, self.folder)

    def finish(self) -> Seen:
        return run(self.script, self.flags, self.folder, seconds=240)

    def wait_for_progress(self, process: Process, more: float = 0.0) -> bool:
        """Until the run has written anything, and `more` seconds; False where it has ended by then."""
        while self._state() == self.before:
            if process.poll() is not None:
                return False
            time.sleep(0.005)
        time.sleep(more)
        return process.poll() is None

    def _state(self) -> dict[str, tuple[int, int]]:
        state = {}
        for path in self.out.rglob("*"):
            try:
                status = path.lstat()
            except OSError:  # it is just being replaced
                continue
            state[str(path)] = (status.st_size, status.st_mtime_ns)
        return state


def differences(out: Path, reference: Path) -> list[str]:
    """The files that one folder has and the other has not, and those that say something else."""
    mine, theirs = (
        {str(p.relative_to(f)) for p in f.rglob("*") if p.is_file() and p.suffix != ".lock" and p.name != ".lock"}
        for f in (out, reference)
    )
    found = [f"{name} too much" for name in mine - theirs] + [f"{name} is missing" for name in theirs - mine]
    for name in mine & theirs - DESCRIBES:
        if content(out / name) != content(reference / name):
            found.append(f"{name} is another")
    return sorted(found)


def content(path: Path):
    """What counts of a file: numbers without times and places, a checkpoint's tensors."""
    if path.suffix == ".ckpt":
        import torch

        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["epoch"]  # a run that is resumed at its end has counted the last one
        return _plain(checkpoint)
    if path.suffix in (".json", ".xxh3"):
        return re.sub(r"/[^\" ]*/out\b", "out", json.dumps(_plain(json.loads(path.read_text())), sort_keys=True))
    if path.name == "training_log.jsonl":  # steps that were made twice may be told twice
        rows = map(json.loads, path.read_text().splitlines())
        return {(row["step"], name): value for row in rows for name, value in row.items() if not VARIES.search(name)}
    if path.name == "test_results.txt":
        return [line for line in path.read_text().splitlines() if not VARIES.search(line)]
    return lasting(path)


def _plain(value):
    if hasattr(value, "numpy"):
        return str(value.dtype), value.numpy().tobytes()
    if isinstance(value, dict):
        left_out = ("hyper_parameters", "loops", "callbacks", "checksums")
        return {str(k): _plain(v) for k, v in value.items() if k not in left_out and not VARIES.search(str(k))}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value

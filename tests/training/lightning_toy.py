"""A model of nine weights with dropout, and its data: what the tests of the Lightning files train in milliseconds."""

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from callbacks_rag import build_callbacks
from lightning_base import Seq2SeqDataModule, build_logger, build_trainer
from rag.training.arguments import parse_args
from rag.training.base_module import BaseTransformer


class ToyTokenizer:
    """Characters as ids."""

    def __call__(self, text=None, text_target=None, return_tensors=None, **_):
        rows = [[ord(character) % 7 + 1 for character in line] for line in text or text_target]
        if return_tensors is None:
            return {"input_ids": rows}
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


class ToyModule(BaseTransformer):
    """Learns to answer example i with 1; EM of validation N is `scores[N - 1]`."""

    def __init__(self, args, scores=()):
        super().__init__(args)
        self.scores, self.trained_on, self.rows = scores, [], []
        self.dropout = 0.5 if args.model.dropout is None else args.model.dropout
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(8, 1)

    def answers(self, batch):
        inputs = torch.stack([(torch.arange(8.0) + 1) * (index + 1) % 5 for index in batch["index"]])
        return self.linear(torch.nn.functional.dropout(inputs, self.dropout, training=self.training))

    def training_step(self, batch, batch_idx):
        self.trained_on.append(batch["index"])
        losses = self.losses(batch)
        loss = losses.mean() * batch["loss_weight"]
        self.log("loss", self.note_losses(loss, losses, batch), prog_bar=True)
        return loss

    def losses(self, batch):
        return (self.answers(batch) - 1).pow(2).flatten()

    def validation_step(self, batch, batch_idx):
        self.rows += [
            {"index": index, "answer": answer}
            for index, answer in zip(batch["index"], self.answers(batch).flatten().tolist(), strict=True)
        ]

    test_step = validation_step

    def on_validation_epoch_end(self):
        rows, self.rows = self.gather_rows(self.rows), []
        done = self.trainer.checkpoint_callback.validations
        self.log("val_em", float(self.scores[done]) if self.scores else sum(row["answer"] for row in rows))
        self.log("val_examples", float(len(rows)))

    def on_test_epoch_end(self):
        rows, self.rows = self.gather_rows(self.rows), []
        self.log("test_sum", sum(row["answer"] for row in rows))

    def export(self, folder: Path):
        (folder / "weights.json").write_text(json.dumps(self.linear.weight.tolist()))


def write_data(folder: Path, train=11, val=5, test=5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", val), ("test", test)):
        for side in ("source", "target"):
            (folder / f"{split}.{side}").write_text("".join(f"line {i}{' long' * (i % 3)}\n" for i in range(count)))
    return folder


def toy_args(folder: Path, *flags: str):
    """Arguments for a run in `folder`/out over `folder`/data, on the CPU, without extras that take time."""
    data = folder / "data" if (folder / "data").exists() else write_data(folder / "data")
    words = f"--model_name_or_path toy --data_dir {data} --output_dir {folder / 'out'} --train_batch_size 2"
    words += " --eval_batch_size 2 --num_workers 0 --accelerator cpu --devices 1 --num_sanity_val_steps 1"
    words += " --learning_rate 0.1 --num_train_epochs 2 --log_every_n_steps 1 --enable_model_summary false"
    return parse_args([*words.split(), *flags])


def fit(args, scores=(), extra_callbacks=(), module_class=ToyModule) -> tuple[pl.Trainer, ToyModule]:
    trainer = build_trainer(args, [*build_callbacks(args), *extra_callbacks], build_logger(args))
    module = module_class(args, scores)
    data = Seq2SeqDataModule(args.data, args.training.seed, ToyTokenizer())
    trainer.fit(module, datamodule=data, ckpt_path=args.run.resume_from_checkpoint)
    return trainer, module


class Killed(BaseException):
    """Ends a run where it stands, as a kill would."""


class At(pl.Callback):
    """Does something at the n-th call of a hook; ends the run unless told otherwise."""

    def __init__(self, hook: str, n: int, do=None):
        self.left, self.do = n, do or self._kill
        setattr(self, hook, self._count)

    def _count(self, trainer, *_):
        self.left -= not trainer.sanity_checking
        if self.left == 0:
            self.do()

    @staticmethod
    def _kill():
        raise Killed


if __name__ == "__main__":  # as one of several processes
    fit(toy_args(Path(sys.argv[1]), *sys.argv[2:]))

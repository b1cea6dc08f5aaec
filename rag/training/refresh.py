"""The index follows the context encoder: it is made anew beside the training, and taken by all ranks between two steps.

    refresh = IndexRefresh(args)                     # a callback; --refresh_index
    trainer = build_trainer(args, [refresh, ...], logger)
    refresh.finish(trainer, module, "output/checkpoint3")        # at the end: output/knowledge

At a step that `refresh_schedule` names, rank 0 writes the context encoder and starts to build an index of it
(`index_build`). It is taken at the step that the schedule names for that, which waits for it if it must: no clock
decides which index a step searches. A checkpoint says which one was searched and which one was being built, so that a
run goes on with both, whatever has ended it. A build that fails leaves the index as it is.

    output/refresh/step_500/context_encoder     as it was behind 500 steps
                           /knowledge           passages, embeddings and index, as use_own_knowledge_dataset.py's

These stay as long as `last.ckpt` speaks of them, encoders as long as any checkpoint does, so that
their indexes can be made again.
"""

import logging
import re
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from rag.distributed.ranks import Ranks
from rag.errors import UserError
from rag.files import remove, shown
from rag.index.arguments import HUB_PREFIX
from rag.index.index_files import read_description
from rag.index.knowledge_index import KnowledgeIndex
from rag.training.arguments import FinetuneArguments
from rag.training.context_encoder import FOLDER, save_context_encoder
from rag.training.index_build import BuildOrder, IndexBuild, device_problem
from rag.training.refresh_schedule import RefreshSchedule
from rag.training.reports import raise_on_all_ranks

logger = logging.getLogger(__name__)

REFRESH, KNOWLEDGE = "refresh", "knowledge"  # folders in --output_dir
OF_A_CHECKPOINT = re.compile(rf"checkpoint\d+/{FOLDER}")  # an encoder that a training has written
PASSAGES = "my_knowledge_dataset"  # in a folder of knowledge
MOST_AT_A_TIME = 10.0  # seconds that rank 0 waits before it tells the others that it still waits


class IndexRefresh(Callback):
    """Makes the index anew as --refresh_index says, and at the end of the training.

    Attributes:
        current: the step whose context encoder made the index that is searched; None for the one that was given.
        pending: the step whose index is being built; None where none is.
        lost: seconds that the training waited for any of it.
    """

    def __init__(self, args: FinetuneArguments):
        retrieval, self.output_dir = args.retrieval, Path(args.run.output_dir)
        self.schedule = RefreshSchedule.parse(retrieval.refresh_index) if retrieval.refresh_index else None
        self.retrieval, self.run_code = retrieval, args.run.trust_remote_code
        self.timeout, self.resumes = args.run.rank_timeout, args.run.resume_from_checkpoint is not None
        self.current: int | None = None
        self.pending: int | None = None
        self.handled: int | None = None  # the step at whose beginning it was last asked what is due
        self.build: IndexBuild | None = None  # rank 0's
        self.lost, self.swaps, self.began = 0.0, 0, time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"current": self.current, "pending": self.pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.current, self.pending = state_dict["current"], state_dict["pending"]

    # --- Around the training ---

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be made anew, before anything is trained. Collective."""
        if stage != "fit":
            return
        self.ranks = Ranks(self.timeout)
        self.given = own_knowledge(pl_module.retriever)
        problem = self.ranks.from_rank_zero("what a refresh needs", self._problem)
        if problem is not None:
            raise_on_all_ranks(trainer, problem)

    def _problem(self) -> str | None:
        """Why the index cannot be made anew, if so."""
        if self.given is None:
            return (
                None
                if self.schedule is None
                else (
                    "--refresh_index: only an index of your own is made anew, of passages and FAISS index in files "
                    "(--index_name custom); leave it out"
                )
            )
        device, address = self.retrieval.refresh_device, self.retrieval.ray_address
        if (problem := device_problem(device, address)) is not None:
            return problem
        for name in (REFRESH, KNOWLEDGE):
            if (self.output_dir / name).exists() and not (self.output_dir / name).is_dir():
                return f"--output_dir {self.output_dir}: its {name} is no folder; remove it, or give another"
            if (self.output_dir / name).absolute() in Path(self.given[0]).absolute().parents:
                return (
                    f"--passages_path {self.given[0]} lies in {shown(self.output_dir / name)}, where the training "
                    "writes; give another --output_dir"
                )
        if self._holds_foreign_knowledge():
            return (
                f"--output_dir {self.output_dir} holds {KNOWLEDGE} that no training made, where the trained index is "
                "to lie; give another --output_dir"
            )
        return None

    def _holds_foreign_knowledge(self) -> bool:
        passages = self.output_dir / KNOWLEDGE / PASSAGES
        try:
            made_by = read_description(passages, "--output_dir").encoder
        except UserError:  # one of our own that is damaged is made again
            made_by = ""
        if not made_by:
            return passages.exists() and not self.resumes
        return OF_A_CHECKPOINT.fullmatch("/".join(Path(made_by).parts[-2:])) is None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Go on with the index that was searched, and with the one that was being built. Collective."""
        if trainer.is_global_zero:
            lefts = "step_*" if trainer.ckpt_path is None else ".*"  # an earlier run's; what a kill left half removed
            for left in (self.output_dir / REFRESH).glob(lefts):
                remove(left)
        if self.given is None:
            return
        self.pending = None if self.schedule is None else self.pending
        steps = trainer.estimated_stepping_batches
        if self.schedule is not None and trainer.is_global_zero and not self.schedule.is_used_within(steps):
            logger.warning(
                f"--refresh_index {self.retrieval.refresh_index}: none of the {steps} steps of this training searches "
                "an index that is made anew; shorter intervals would"
            )
        for step in (self.current, self.pending):
            if step is not None:
                self.ranks.on_rank_zero("context encoder of a refresh", partial(self._find, trainer, step))
        if self.current is not None and (failure := self._reopen(pl_module, self.current)) is not None:
            raise_on_all_ranks(
                trainer,
                f"--resume_from_checkpoint {trainer.ckpt_path}: the index of step {self.current}, which it searched, "
                f"cannot be made again ({failure})",
            )
        if self.pending is not None and self.ranks.rank == 0:
            self._start(self.pending)
        self.began = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before a step: take the index that is due, then begin with the next. Collective."""
        step = trainer.global_step
        if self.schedule is None or step == self.handled:  # also with half of a step's gradients
            return
        self.handled, began = step, time.monotonic()
        if self.pending is not None and step >= self.schedule.swap_step(self.pending):
            self._swap(pl_module, step)
        if self.schedule.is_due(step):
            self.ranks.on_rank_zero("begin of a refresh", lambda: self._begin(pl_module, step))
            self.pending = step
        self.lost += time.monotonic() - began

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and self.swaps:
            seconds = time.monotonic() - self.began
            print(
                f"--refresh_index: indexes taken: {self.swaps}; of {seconds:.1f} s the training stood still for "
                f"{self.lost:.2f} s ({100 * self.lost / seconds:.2f}%)",
                flush=True,
            )

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.build is not None:
            self.build.stop()
            self.build = None

    # --- One refresh ---

    def _paths(self, step: int) -> tuple[Path, Path]:
        """The context encoder and the knowledge of a refresh."""
        folder = self.output_dir / REFRESH / f"step_{step}"
        return folder / FOLDER, folder / KNOWLEDGE

    def _begin(self, pl_module: Any, step: int) -> None:
        """Rank 0: write the context encoder as it is and start to build its index; remove what no checkpoint needs."""
        self._remove_unused()
        for left in self._paths(step)[0].parent.glob(f".{FOLDER}.*"):  # half written when a run was killed
            remove(left)
        save_context_encoder(pl_module.context_encoder, pl_module.context_tokenizer, self._paths(step)[0])
        self._start(step)

    def _start(self, step: int) -> None:
        self._stop()
        self.build = IndexBuild(self._order(self.retrieval.refresh_device or "cpu", beside=True), *self._paths(step))
        self.build.start()

    def _order(self, device: str | None, beside: bool) -> BuildOrder:
        assert self.given is not None, "`setup` has asked for it"
        processes, address = self.retrieval.refresh_processes, self.retrieval.ray_address
        return BuildOrder(*self.given, device, processes, address, beside, self.run_code)

    def _find(self, trainer: pl.Trainer, step: int) -> None:
        """Rank 0: the context encoder of a refresh is there, or beside the checkpoint of another run's folder."""
        encoder = self._paths(step)[0]
        if encoder.is_dir():
            return
        beside = Path(trainer.ckpt_path or "").parent / encoder.relative_to(self.output_dir)
        if not beside.is_dir():
            raise UserError(
                f"--resume_from_checkpoint {trainer.ckpt_path}: {shown(beside)}, which made the index that it "
                "searched, is gone; give a later checkpoint"
            )
        encoder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(beside, encoder)

    def _reopen(self, pl_module: Any, step: int) -> str | None:
        """Take the index of a refresh that was searched, made again where it is gone; why not, if so. Collective."""
        knowledge = self._paths(step)[1]

        def is_there() -> bool:
            try:
                return read_description(knowledge / PASSAGES).is_finished
            except UserError:  # damaged: it is made again
                return False

        if self.ranks.from_rank_zero("index of a refresh", is_there) and not self._take(pl_module.retriever, knowledge):
            return None
        if self.ranks.rank == 0:
            self._start(step)
        return self._await("index of a refresh") or self._take(pl_module.retriever, knowledge)

    def _await(self, what: str) -> str | None:
        """Wait for rank 0's build; why there is no index, if so. Collective."""

        def look() -> tuple[bool, str | None]:
            assert self.build is not None, "rank 0 has started it"
            return self.build.is_over(min(MOST_AT_A_TIME, self.timeout / 4)), self.build.failure

        is_over = False
        while not is_over:
            is_over, failure = self.ranks.from_rank_zero(what, look)
        self.build = None
        return failure

    def _swap(self, pl_module: Any, step: int) -> None:
        """Take the index that is due, or say why there is none. Collective."""
        assert self.pending is not None
        began, begun = time.monotonic(), self.pending
        failure = self._await("refresh of the index")
        built = time.monotonic()
        failure = failure or self._take(pl_module.retriever, self._paths(begun)[1])
        self.pending = None
        if failure is None:
            self.current, self.swaps = begun, self.swaps + 1
        if self.ranks.rank != 0:
            return
        if failure is None:
            print(
                f"step {step}: the index of step {begun} is taken (waited {built - began:.2f} s for it, opened it in "
                f"{time.monotonic() - built:.2f} s)",
                flush=True,
            )
        else:
            kept = "given" if self.current is None else f"of step {self.current}"
            logger.warning(f"step {step}: the index of step {begun} failed ({failure}); the one {kept} stays")

    def _take(self, retriever: Any, knowledge: Path) -> str | None:
        """All ranks take an index, or none does; why not, if so. Collective."""
        paths = str(knowledge / PASSAGES), str(index_in(knowledge))
        try:
            index = self.ranks.all_or_none("opening of a new index", lambda: retriever.open_beside(*paths))
        except UserError as error:
            return str(error)
        retriever.take_index(index)
        return None

    # --- What is not needed any more ---

    def _remove_unused(self, at_the_end: bool = False) -> None:
        """Rank 0: remove indexes that neither this run nor last.ckpt needs, and encoders that no checkpoint does."""
        try:
            states = {path.name: self._state_in(path) for path in self.output_dir.glob("*.ckpt")}
        except Exception as error:  # a damaged checkpoint: whoever goes on from it says so
            logger.debug(f"nothing is removed: {error}")
            return
        used = {None if at_the_end else self.pending, self.current}
        searched = used | {(states.get("last.ckpt") or {}).get("current")}
        if not at_the_end:
            searched.add((states.get("last.ckpt") or {}).get("pending"))
        spoken_of = searched | {step for state in states.values() for step in (state or {}).values()}
        for folder in (self.output_dir / REFRESH).glob("step_*"):
            step = int(folder.name.removeprefix("step_"))
            if step not in spoken_of:
                remove(folder)
                continue
            if step not in searched:
                remove(folder / KNOWLEDGE)
            if at_the_end or step not in searched:
                remove(folder / f"{KNOWLEDGE}.log")
        if at_the_end and not any((self.output_dir / REFRESH).glob("*")):
            remove(self.output_dir / REFRESH)

    def _state_in(self, checkpoint: Path) -> dict[str, int | None] | None:
        """What a checkpoint says of indexes; its weights are mapped, not read."""
        saved = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        return saved["callbacks"].get(self.state_key)

    # --- The end ---

    def finish(self, trainer: pl.Trainer, pl_module: Any, exported: Path) -> Path | None:
        """Embed all passages by the context encoder of an exported checkpoint, into `knowledge` in --output_dir.

        Collective. The retriever searches it from then on. If the run is killed meanwhile, the same command resumes it.

        Args:
            exported: folder of the checkpoint.

        Returns:
            the folder; None where the passages are none of your own.

        Raises:
            UserError: it cannot be built.
        """
        flag = "use_own_knowledge_dataset.py --dpr_ctx_encoder_model_name"
        encoder, knowledge = exported / FOLDER, self.output_dir / KNOWLEDGE
        if self.given is None:
            if trainer.is_global_zero:
                print(
                    f"The trained context encoder: {shown(encoder)}; an index of it: {flag} {shown(encoder)}",
                    flush=True,
                )
            return None
        if self.ranks.rank == 0:
            print(f"All passages are embedded by {shown(encoder)}", flush=True)
            torch.cuda.empty_cache() if torch.cuda.is_available() else None
            self.build = IndexBuild(self._order(self.retrieval.refresh_device, beside=False), encoder, knowledge)
            self.build.start()
        failure = self._await("embedding of all passages") or self._take(pl_module.retriever, knowledge)
        if failure is not None:
            raise_on_all_ranks(
                trainer,
                f"--output_dir {self.output_dir}: {shown(encoder)} is trained, but its index could not be built "
                f"({failure}); the same command goes on with it",
            )
        pl_module.rescore = None  # stored vectors are the encoder's own again
        if trainer.is_global_zero:
            self._remove_unused(at_the_end=True)
            flags = {
                "model_name_or_path": exported,
                "passages_path": knowledge / PASSAGES,
                "index_path": index_in(knowledge),
            }
            print(
                "Next: python eval_rag.py",
                *(f"--{name} {shown(path)}" for name, path in flags.items()),
                "...",
                flush=True,
            )
        return knowledge


def own_knowledge(retriever: Any) -> tuple[str, str] | None:
    """Passages and index of a retriever that searches your own, in files; None of any other."""
    index = retriever.index
    if retriever.config.index_name != "custom" or not isinstance(index, KnowledgeIndex) or index.index_path is None:
        return None
    path = retriever.config.passages_path
    if path is None or path.startswith(HUB_PREFIX):
        files = index.dataset.cache_files
        path = str(Path(files[0]["filename"]).parent) if files else None
    return None if path is None else (path, index.index_path)


def index_in(knowledge: Path) -> Path:
    """The FAISS file or folder of shards in a folder of knowledge."""
    return knowledge / read_description(knowledge / PASSAGES).index

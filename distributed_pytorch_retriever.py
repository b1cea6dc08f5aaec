"""Rank 0 searches for every rank: one open index a job, over torch.distributed. Or each rank searches a part of it.

    retriever = RagPyTorchDistributedRetriever.from_pretrained(checkpoint, passages_path="...", index_path="...")
    retriever.init_retrieval()              # collective, once the process group is up
    retriever.retrieve(vectors, n_docs=5)   # collective

Query vectors travel to rank 0 and ids come back; passages and their vectors are read on each rank, from files that are
memory-mapped. Only vectors that nothing but the open index can give (`index.vectors_from` "index") travel too.

With `--index_device cuda` each rank holds its part of the vectors on its own device. Rank 0 hands it everybody's
questions, and takes the best of what the parts find. The answers are those of one device that holds all.
"""

from collections import defaultdict

import numpy as np
import torch

from rag.distributed.ranks import PendingOutcome, RankError, Ranks, Transfer, world_size
from rag.errors import UserError
from rag.retrieval.remote import best_of_shards, pack_found, search_to_send, unpack_found
from rag.retrieval.retriever import RagKnowledgeRetriever


class RagPyTorchDistributedRetriever(RagKnowledgeRetriever):
    """`RagKnowledgeRetriever` whose searches all run on rank 0, or each on all ranks, where these have devices.

    In one process it does what its parent does.

    Args:
        config: `RagConfig`.
        question_encoder_tokenizer: as transformers' `RagRetriever`.
        generator_tokenizer: as transformers' `RagRetriever`.
        index: used in place of the one the config describes; `init_retrieval` opens it.
        timeout: seconds that rank 0 waits for the slowest rank's questions; the others wait twice as long for answers.

    A deep copy is the retriever itself: the ranks count its retrievals.
    """

    def __init__(self, config, question_encoder_tokenizer, generator_tokenizer, index=None, timeout: float = 600.0):
        super().__init__(config, question_encoder_tokenizer, generator_tokenizer, index, init_retrieval=False)
        self.timeout = timeout
        self.ranks: Ranks | None = None
        self.is_sliced = False  # whether each rank holds a part of the vectors
        self.retrievals = 0  # so far, for the messages
        self.room: defaultdict[int, int] = defaultdict(int)  # questions that a rank's first message has room for
        self.expected: list[Transfer] = []  # rank 0: the others' first messages of the next retrieval

    def init_retrieval(self, distributed_port: int | None = None) -> None:
        """Rank 0 opens the index, or every rank its part; where one cannot, all fail. A second call does nothing.

        Collective: every rank calls this, after the process group is up.

        Args:
            distributed_port: unused; the public suite needed a port of its own.
        """
        if self.ranks is None or self.ranks.size != world_size():
            self.ranks = Ranks(self.timeout)
            self.is_sliced = self._hold_slices()
            if not self.is_sliced:
                self.ranks.from_rank_zero("start of the retrieval", super().init_retrieval)
            if self.ranks.rank == 0:
                self._expect("retrieval 1", 0)

    def _hold_slices(self) -> bool:
        """Every rank its part of the vectors on its device; False where rank 0 is to search, also for lack of room."""
        ranks, index = self.ranks, self.index
        if ranks.size == 1 or not getattr(index, "can_be_sliced", False):
            return False
        fallbacks: list[str | None] = []
        ranks.in_rounds(
            "loading of vectors",
            [0],
            lambda _: index.init_slice(ranks.rank, ranks.size),
            lambda _, parts: fallbacks.extend(parts),
        )
        fallback = ranks.from_rank_zero("start of the retrieval", lambda: next(filter(None, fallbacks), None))
        if fallback is not None:
            index.leave_slice(fallback)
        return fallback is None

    def _open_search(self, index, paths: tuple[str, str]) -> None:
        """Rank 0 opens the index, or every rank its part."""
        assert self.ranks is not None, "call init_retrieval() on every rank first"
        if self.is_sliced:
            if (fallback := index.init_slice(self.ranks.rank, self.ranks.size)) is not None:
                raise UserError(fallback)
        elif self.ranks.rank == 0:
            super()._open_search(index, paths)

    def _search(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """As the parent's. Collective: every rank calls this equally often, with any number of queries, also none."""
        assert self.ranks is not None, "call init_retrieval() on every rank first"
        if self.ranks.size == 1:
            return super()._search(queries, n_docs)
        self.retrievals += 1
        search = self._search_for_all if self.ranks.rank == 0 else self._search_on_rank_zero
        doc_ids, vectors = search(queries, n_docs, f"retrieval {self.retrievals}")
        return doc_ids, self.index.embeddings.gather(doc_ids) if vectors is None else vectors

    def __deepcopy__(self, memo: dict) -> "RagPyTorchDistributedRetriever":
        return self

    def __getstate__(self) -> dict:
        """For another process, which calls `init_retrieval` itself."""
        return self.__dict__ | {
            "ranks": None,
            "is_sliced": False,
            "retrievals": 0,
            "room": defaultdict(int),
            "expected": [],
        }

    def _search_on_rank_zero(self, queries: np.ndarray, n_docs: int, step: str) -> tuple[np.ndarray, np.ndarray | None]:
        """This rank's queries to rank 0, its ids back, and vectors where they are not at hand here."""
        ranks, failure = self.ranks, None
        outcome = ranks.receive_outcome(0, step, size=0 if self.is_sliced else len(queries) * n_docs)
        sent = [ranks.send(message, 0, step) for message in pack(queries, n_docs, self.room[ranks.rank])]
        self.room[ranks.rank] = len(queries)
        if self.is_sliced:
            outcome, failure = self._search_own_slice(outcome, queries, n_docs, step)
        try:
            follows, doc_ids = outcome.wait()
        except (RankError, UserError) as error:
            raise error from failure
        for transfer in sent:
            transfer.wait()
        doc_ids = doc_ids.reshape(len(queries), n_docs)
        if not follows:
            return doc_ids, None
        return doc_ids, ranks.receive((*doc_ids.shape, queries.shape[1]), torch.float32, 0, step).wait()

    def _search_own_slice(self, announced: PendingOutcome, queries: np.ndarray, n_docs: int, step: str):
        """Everybody's queries from rank 0, once it has `announced` them, and what this rank's part holds for them back.

        Returns the outcome of the retrieval, on its way here, and what went wrong on this rank, if anything did.
        """
        ranks, failure = self.ranks, None
        total = int(announced.wait()[0])
        everybody = ranks.receive((total, queries.shape[1]), torch.float32, 0, step)
        outcome = ranks.receive_outcome(0, step, size=len(queries) * n_docs)
        asked, found = everybody.wait(), np.zeros(2 * total * n_docs, dtype=np.int64)
        try:
            found = pack_found(*self.index.search(asked, n_docs))
        except Exception as error:
            failure = error
        for transfer in ranks.send_outcome(0, step, failure, values=found):
            transfer.wait()
        return outcome, failure

    def _search_slices(self, queries: np.ndarray, n_docs: int, step: str) -> np.ndarray:
        """Rank 0: the ids (B, n_docs) that are best of what all parts hold; each rank searches its own."""
        ranks, shape = self.ranks, (len(queries), n_docs)
        answers = [ranks.receive_outcome(rank, step, size=2 * len(queries) * n_docs) for rank in ranks.others]
        sent = [ranks.send(queries, rank, step) for rank in ranks.others]
        found, failure = [], None
        try:
            found.append(self.index.search(queries, n_docs))
        except Exception as error:
            failure = error
        deadline = ranks.deadline()
        for pending in [*sent, *answers]:  # also after a failure: every message is to find its receiver
            try:
                result = pending.wait(deadline)
            except (RankError, UserError) as error:
                failure = failure or error
            else:
                if isinstance(pending, PendingOutcome):
                    found.append(unpack_found(result[1], shape))
        if failure is not None:
            raise failure
        return best_of_shards(found, n_docs)

    def _search_for_all(self, queries: np.ndarray, n_docs: int, step: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Rank 0: everybody's queries, one search, to everybody their answers; an error goes to everybody."""
        ranks = self.ranks
        everybody, shapes, failure = self._gather(queries, n_docs, step)
        ids_of, vectors_of = [np.zeros(shape, dtype=np.int64) for shape in shapes], None
        if self.is_sliced:
            ranks.announce(step, failure, str(sum(map(len, everybody))))
        if failure is None:
            try:
                doc_ids, vectors = self._find(np.concatenate(everybody), n_docs, step)
                bounds = np.cumsum([len(one) for one in everybody])[:-1]
                ids_of, vectors_of = (
                    np.split(doc_ids, bounds),
                    vectors if vectors is None else np.split(vectors, bounds),
                )
            except Exception as error:
                failure = error
        ranks.announce(step, failure, "" if vectors_of is None else "vectors follow", ids_of[1:])
        self._expect(f"retrieval {self.retrievals + 1}", queries.shape[1])
        if vectors_of is None:
            return ids_of[0], None
        for rank in ranks.others:
            ranks.send(vectors_of[rank], rank, step).wait()
        return ids_of[0], vectors_of[0]

    def _find(self, queries: np.ndarray, n_docs: int, step: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Rank 0: the ids, and the vectors where the other ranks cannot read them."""
        if self.is_sliced:
            return self._search_slices(queries, n_docs, step), None
        return search_to_send(self.index, queries, n_docs)[1:]

    def _expect(self, step: str, d: int) -> None:
        """Post the receives of the next retrieval, `step`, whose queries will be as long, `d`.

        A message that is awaited travels at once. Otherwise gloo's threads ask back and forth, and may wait for each
        other until the next tick of the operating system's clock, four milliseconds.
        """
        shapes = [(HEAD + self.room[rank] * d,) for rank in self.ranks.others]
        self.expected = [
            self.ranks.receive(shape, torch.float32, rank, step)
            for rank, shape in zip(self.ranks.others, shapes, strict=True)
        ]

    def _gather(self, queries: np.ndarray, n_docs: int, step: str):
        """Every rank's queries, the shape (B, n_docs) of the ids that it expects, and what went wrong, if anything did.

        Rank 0 receives from each rank, also after a failure: each is to learn of it instead of waiting for ever.
        """
        ranks, deadline, d = self.ranks, self.ranks.deadline(), queries.shape[1]
        everybody, shapes, failure = [queries], [(len(queries), n_docs)], None
        if not self.expected:  # the retrieval before failed
            self._expect(step, d)
        firsts, self.expected = self.expected, []
        for rank, first in zip(ranks.others, firsts, strict=True):
            rows, wanted, rank_queries = 0, n_docs, queries[:0]
            try:
                rows, wanted, rank_queries = unpack(first.wait(deadline), d)
                if rank_queries is None:
                    rank_queries = ranks.receive((rows, d), torch.float32, rank, step).wait(deadline)
            except RankError as error:
                failure = failure or error
            self.room[rank] = rows
            everybody.append(rank_queries)
            shapes.append((rows, wanted))
        for rank, (_, wanted) in enumerate(shapes):
            if wanted != n_docs and failure is None:
                failure = RankError(f"{step}: rank {rank} asks for {wanted} passages a question, rank 0 for {n_docs}")
        return everybody, shapes, failure


# --- Messages to rank 0 -----------------------------------------------------------------------------------------------
# The fewer messages, the fewer waits for the operating system: questions go with their number in one, where they are no
# more than those of the retrieval before, and in a second one where they are.

HEAD = 4  # float32 places that hold two int64


def pack(queries: np.ndarray, n_docs: int, room: int) -> list[np.ndarray]:
    """Queries (B, d) float32 as one message with room for `room` of them, or as one without any and one with all."""
    first = np.zeros(HEAD + room * queries.shape[1], dtype=np.float32)
    first[:HEAD] = np.array([len(queries), n_docs]).view(np.float32)
    if len(queries) > room:
        return [first, queries]
    first[HEAD : HEAD + queries.size] = queries.reshape(-1)
    return [first]


def unpack(first: np.ndarray, d: int) -> tuple[int, int, np.ndarray | None]:
    """B, n_docs and the queries (B, d), or None in place of these where they are in a second message."""
    rows, n_docs = map(int, first[:HEAD].view(np.int64))
    if HEAD + rows * d > len(first):
        return rows, n_docs, None
    return rows, n_docs, first[HEAD : HEAD + rows * d].reshape(rows, d)

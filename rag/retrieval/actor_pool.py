"""Ray actors that hold the same passages: the least busy one answers, and one that died is passed over.

    pool = ActorPool(actors, timeout=600)
    pending = pool.begin(queries.tobytes(), dimension, n_docs)
    scores, doc_ids, vectors = pool.finish(pending, deadline)

An actor that died is restarted by Ray while the others answer.
"""

import logging
import statistics
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from rag.distributed.ray_cluster import first_line
from rag.errors import JobError, UserError

logger = logging.getLogger(__name__)

# Seconds beyond the usual after which a worker that has not answered counts as busy.
SHORTEST_PATIENCE = 0.02


class ActorPool:
    """Actors that hold the same passages, any of which may answer.

    Args:
        actors: handles, this rank's preferred one first.
        timeout: seconds an answer may take, the restart of dead actors included; for the messages.
    """

    def __init__(self, actors: list, timeout: float):
        self.actors = actors
        # Ray's own retries would wait for the restart of an actor, while another one is free.
        self.searches = {actor: actor.search.options(max_task_retries=0) for actor in actors}
        self.timeout = timeout
        self.seconds: deque[float] = deque(maxlen=32)  # what the last answers took

    def begin(self, *arguments) -> "PendingSearch":
        """Begin `RayRetriever.search(*arguments)` in this rank's preferred actor."""
        return self._begin(self.actors[0], arguments)

    def _begin(self, actor, arguments: tuple) -> "PendingSearch":
        return PendingSearch(actor, arguments, time.monotonic(), self.searches[actor].remote(*arguments))

    def finish(
        self, pending: "PendingSearch", deadline: float
    ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray | None]:
        """What `RayRetriever.search` returns, from the least busy actor where the first one is busy or has died."""
        import ray

        while True:
            try:
                answer = self._first_answer(pending, deadline)
            except ray.exceptions.GetTimeoutError as error:
                raise JobError(f"no retrieval worker answered within {self.timeout:g} s") from error
            except ray.exceptions.RayActorError as error:
                logger.warning(f"a retrieval worker died, another one searches: {first_line(error)}")
                pending = self._begin(self._least_busy(self.actors, [], deadline), pending.arguments)
                continue
            self.seconds.append(time.monotonic() - pending.start)
            return answer

    def _first_answer(self, pending: "PendingSearch", deadline: float):
        """The answer of the search's actor or, where it takes long, of another one if that comes first."""
        import ray

        patience = SHORTEST_PATIENCE + 4 * statistics.median(self.seconds or [0])
        if len(self.actors) > 1 and time.monotonic() + patience < deadline:
            try:
                return ray.get(pending.answer, timeout=patience)
            except ray.exceptions.GetTimeoutError:
                others = [actor for actor in self.actors if actor is not pending.actor]
            if (free := self._least_busy(others, [pending.answer], deadline)) is not None:
                answers = [pending.answer, self._begin(free, pending.arguments).answer]
                ready, _ = ray.wait(answers, num_returns=1, timeout=max(deadline - time.monotonic(), 0))
                return ray.get(ready or answers, timeout=0)[0]
        return ray.get(pending.answer, timeout=max(deadline - time.monotonic(), 0))

    def _least_busy(self, actors: list, answers: list, deadline: float):
        """The actor that answers first, None where one of `answers` comes before.

        An actor answers its calls in turn, one that died when it was restarted.
        """
        import ray

        calls = {actor.init_retrieval.remote(): actor for actor in actors}
        while calls:
            ready, _ = ray.wait([*answers, *calls], num_returns=1, timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                raise JobError(f"none of {len(self.actors)} retrieval workers was free within {self.timeout:g} s")
            if ready[0] in answers:
                return None
            actor = calls.pop(ready[0])
            try:
                ray.get(ready[0])
                return actor
            except ray.exceptions.RayActorError:  # Ray does not restart it
                self.actors.remove(actor)
        if answers:
            return None
        raise JobError("every retrieval worker has died for good")


@dataclass
class PendingSearch:
    """A search that has begun in an actor."""

    actor: object
    arguments: tuple  # of `RayRetriever.search`
    start: float  # by `time.monotonic`
    answer: object  # Ray's reference to it


def call_all(actors: list, method: str, *args, timeout: float) -> list:
    """What a method of every actor returns.

    Raises:
        UserError: an actor raised it.
        JobError: they did not all answer in time.
    """
    import ray

    try:
        return ray.get([getattr(actor, method).remote(*args) for actor in actors], timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except ray.exceptions.GetTimeoutError as error:
        raise JobError(
            f"{len(actors)} retrieval workers were not ready after {timeout:g} s; `ray status` tells what they wait for"
        ) from error

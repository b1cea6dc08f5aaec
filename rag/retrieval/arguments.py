"""The flags of reranking: declared once, parsed by every script that retrieves.

@dataclass
class AnswerArguments(SearchArguments, RerankArguments): ...
raise_problems(args.rerank_problems(n_docs=5))
args.depth_for(n_docs=5)                       # passages to fetch
"""

from dataclasses import dataclass

from rag.command_line.flags import flag
from rag.errors import UserError

UPR = "upr"  # a --reranker that is no path
RERANK_DEPTH = 50
MOST_RERANKED = 100_000


@dataclass(kw_only=True)
class RerankArguments:
    """What orders the passages that the index has found."""

    reranker: str | None = flag(
        None,
        "Fetch --rerank_depth passages a question and keep the best by other scores than the index's: upr is the "
        "generator's own log p(question | passage), anything else a CrossEncoder (folder or hub name).",
    )
    rerank_depth: int | None = flag(None, "Passages a question that --reranker reads; left out, 50, or --n_docs.")

    def rerank_problems(self, n_docs: int | None) -> list[str]:
        """What is out of range; `n_docs` is None where it is not known yet."""
        depth = self.rerank_depth
        if self.reranker is None:
            return [] if depth is None else [f"--rerank_depth {depth} is for --reranker; give it, too, or leave it out"]
        if not self.reranker.strip():
            return ["--reranker '' names nothing; give upr or a CrossEncoder, or leave it out"]
        if depth is None:
            return []
        if not 1 <= depth <= MOST_RERANKED:
            return [f"--rerank_depth {depth} must be from 1 to {MOST_RERANKED:,}"]
        if n_docs is not None and depth < n_docs:
            return [f"--rerank_depth {depth} is less than the {n_docs} passages that are kept; give {n_docs} or more"]
        return []

    def depth_for(self, n_docs: int) -> int:
        """Passages to fetch where `n_docs` are kept.

        Raises:
            UserError: fewer are asked for.
        """
        for problem in self.rerank_problems(n_docs):
            raise UserError(problem)
        return max(RERANK_DEPTH, n_docs) if self.rerank_depth is None else self.rerank_depth

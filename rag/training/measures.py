"""What is measured of answers and of the passages that they were made of: pure functions, without the module.

metrics = means(module.gather_rows(rows), "val")
"""

import numpy as np
import torch


def means(rows: list[dict], stage: str) -> dict[str, float]:
    """Each measure's mean over all examples, and the share of distinct passages among all that were fetched."""
    names = sorted(rows[0].keys() - {"index", "answer", "doc_ids"})
    metrics = {f"{stage}_{name}": sum(row[name] for row in rows) / len(rows) for name in names}
    if "doc_ids" in rows[0]:
        metrics[f"{stage}_distinct_docs"] = distinct_share(np.array([row["doc_ids"] for row in rows]))
    return metrics


def distinct_share(doc_ids: np.ndarray) -> float:
    """Distinct passages over passages fetched, doc_ids (B, n_docs): near 0 where all questions fetch the same ones."""
    found = doc_ids[doc_ids >= 0]
    return len(np.unique(found)) / max(len(found), 1)


def doc_entropy(doc_scores: torch.Tensor) -> torch.Tensor:
    """Entropy of p(z|x), nats, of doc_scores (..., n_docs): 0 where one passage has it all, at most log n_docs."""
    log_probabilities = doc_scores.detach().float().log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities.clamp(min=-1e4)).sum(-1)

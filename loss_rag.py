"""The training objective: negative log-likelihood of an answer, marginalised over the retrieved passages.

RAG-Sequence  -log sum_z p(z|x) prod_t p(y_t | x, z, y_<t)         (Lewis et al. 2020, section 2.1)
RAG-Token     -sum_t log sum_z p(z|x) p(y_t | x, z, y_<t)

    decoder_input_ids, targets = decoder_inputs_and_targets(labels, model.generator.config)
    nll = rag_sequence_nll(logits, doc_scores, targets, pad_token_id, label_smoothing)         # (B,) nats

All sums are taken in float32, whatever the precision of the logits: sums of 50,000 half-precision log-probabilities
overflow. The values are those of transformers' `RagSequenceForGeneration` and `RagTokenForGeneration`.
"""

import torch


def decoder_inputs_and_targets(labels: torch.Tensor, generator_config) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder reads and what it is to say, each step, for right-padded answers `labels` (B, T).

    The decoder starts from the generator's `decoder_start_token_id`, in training as in generation; an answer whose
    tokeniser already puts that token first (BERT's [CLS]) is not given a second one.

    Returns:
        decoder_input_ids (B, T') and targets (B, T'), the inputs moved one to the left and padded; T' is T or T + 1.
    """
    start = generator_config.decoder_start_token_id
    if not (labels[:, 0] == start).all():
        labels = torch.cat([labels.new_full((len(labels), 1), start), labels], dim=1)
    targets = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), generator_config.pad_token_id)], dim=1)
    return labels, targets


def rag_sequence_nll(logits, doc_scores, targets, pad_token_id: int, label_smoothing: float = 0.0) -> torch.Tensor:
    """RAG-Sequence loss of each example.

    Args:
        logits: (B * n_docs, T, V), the documents of an example in a row.
        doc_scores: (B, n_docs), -inf for a document that is to have no probability.
        targets: (B, T) int64, right-padded.
        pad_token_id: positions with this target count nothing.
        label_smoothing: share of the target's probability that is spread over the vocabulary.

    Returns:
        (B,) float32, nats.
    """
    n_docs = doc_scores.shape[1]
    document_logprobs = torch.log_softmax(doc_scores.float(), dim=1)  # (B, n_docs)
    logprobs, smooth = _token_logprobs(logits, targets.repeat_interleave(n_docs, dim=0), pad_token_id, label_smoothing)
    nll = -(logprobs.sum(1).view(-1, n_docs) + document_logprobs).logsumexp(1)
    if not label_smoothing:
        return nll
    # transformers adds the document's log-probability to every word of one position before it sums over them.
    vocabulary = logits.shape[-1]
    smooth_nll = -(smooth.sum(1).view(-1, n_docs) + vocabulary * document_logprobs).logsumexp(1)
    return _smoothed(nll, smooth_nll, label_smoothing, vocabulary)


def rag_token_nll(logits, doc_scores, targets, pad_token_id: int, label_smoothing: float = 0.0) -> torch.Tensor:
    """RAG-Token loss of each example; arguments and result as `rag_sequence_nll`."""
    batch, n_docs = doc_scores.shape
    document_logprobs = torch.log_softmax(doc_scores.float(), dim=1).unsqueeze(-1)  # (B, n_docs, 1)
    if not label_smoothing:
        logprobs, _ = _token_logprobs(logits, targets.repeat_interleave(n_docs, dim=0), pad_token_id, 0.0)
        marginal = (logprobs.view(batch, n_docs, -1) + document_logprobs).logsumexp(1)  # (B, T)
        return -marginal.masked_fill(targets == pad_token_id, 0.0).sum(1)
    # Smoothing spreads over the marginal distribution, so that here the whole of it is needed.
    logprobs = torch.log_softmax(logits.float(), dim=-1).view(batch, n_docs, *logits.shape[1:])
    marginal = (logprobs + document_logprobs.unsqueeze(-1)).logsumexp(1)  # (B, T, V)
    is_pad = targets == pad_token_id
    nll = -marginal.gather(-1, targets.unsqueeze(-1)).squeeze(-1).masked_fill(is_pad, 0.0).sum(1)
    smooth_nll = -marginal.sum(-1).masked_fill(is_pad, 0.0).sum(1)
    return _smoothed(nll, smooth_nll, label_smoothing, logits.shape[-1])


def sequence_nll(logits, targets, pad_token_id: int, label_smoothing: float = 0.0) -> torch.Tensor:
    """Loss of a generator without retrieval: logits (B, T, V), targets (B, T) to (B,) float32, nats."""
    logprobs, smooth = _token_logprobs(logits, targets, pad_token_id, label_smoothing)
    nll = -logprobs.sum(1)
    return _smoothed(nll, -smooth.sum(1), label_smoothing, logits.shape[-1]) if label_smoothing else nll


def _token_logprobs(logits, targets, pad_token_id: int, label_smoothing: float):
    """Log-probability of each target and, if smoothing needs it, its sum over the vocabulary; both (N, T), 0 at pads.

    Only the normaliser is computed over the vocabulary: no second copy of the logits is kept for the backward pass.
    """
    logits = logits.float()
    normaliser = logits.logsumexp(-1)  # (N, T)
    is_pad = targets == pad_token_id
    logprobs = (logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser).masked_fill(is_pad, 0.0)
    if not label_smoothing:
        return logprobs, None
    return logprobs, (logits.sum(-1) - logits.shape[-1] * normaliser).masked_fill(is_pad, 0.0)


def _smoothed(nll, smooth_nll, label_smoothing: float, vocabulary: int):
    return (1.0 - label_smoothing) * nll + label_smoothing / vocabulary * smooth_nll

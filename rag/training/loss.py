"""The training objective: negative log-likelihood of an answer, marginalized over the retrieved passages.

RAG-Sequence  -log sum_z p(z|x) prod_t p(y_t | x, z, y_<t)         (Lewis et al. 2020, section 2.1)
RAG-Token     -sum_t log sum_z p(z|x) p(y_t | x, z, y_<t)

    decoder_input_ids, targets = decoder_inputs_and_targets(labels, model.generator.config)
    nll = rag_sequence_nll(hidden, output_layer, doc_scores, targets, pad_token_id, label_smoothing)   # (B,) nats

Logits (B * n_docs, T, V) are never held in whole. All sums over them are taken in float32, also where the model is in
half precision: sums of 50,000 half-precision log-probabilities overflow. A model in float64 has all in float64. The
values are those of transformers' `RagSequenceForGeneration` and `RagTokenForGeneration`.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from rag.generation.forward import CHUNK_VOCABULARY, full_precision
from rag.generation.logprobs import target_logprobs
from rag.packing import Packing


def decoder_inputs_and_targets(labels: torch.Tensor, generator_config) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder reads and what it is to say, each step, for right-padded answers `labels` (B, T).

    The decoder starts from the generator's `decoder_start_token_id`, in training as in generation; an answer whose
    tokenizer already puts that token first (BERT's [CLS]) is not given a second one.

    Returns:
        decoder_input_ids (B, T') and targets (B, T'), the inputs moved one to the left and padded; T' is T or T + 1.
    """
    start = generator_config.decoder_start_token_id
    if not generator_config.is_encoder_decoder or not (labels[:, 0] == start).all():
        labels = torch.cat([labels.new_full((len(labels), 1), start), labels], dim=1)
    targets = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), generator_config.pad_token_id)], dim=1)
    return labels, targets


def rag_sequence_nll(
    hidden,
    output_layer,
    doc_scores,
    targets,
    pad_token_id: int,
    label_smoothing: float = 0.0,
    answers: Packing | None = None,
    note_logprobs: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """RAG-Sequence loss of each example.

    Args:
        hidden: (B * n_docs, T, d) the decoder's last hidden states, the documents of an example in a row; or (R, d).
        output_layer: weight (V, d) and bias (V) that make logits of them.
        doc_scores: (B, n_docs), -inf for a document that is to have no probability.
        targets: (B, T) int64, right-padded.
        pad_token_id: positions with this target count nothing.
        label_smoothing: share of the target's probability that is spread over the vocabulary.
        answers: where the B * n_docs answers' tokens lie in a packed `hidden` (R, d); what it leaves out is padding.
        note_logprobs: is told the log-probability of each target under each document, (B, n_docs, T); 0 of padding.

    Returns:
        (B,) float32 (float64 of a model in float64), nats.
    """
    n_docs, (weight, bias) = doc_scores.shape[1], output_layer
    document_logprobs = torch.log_softmax(full_precision(doc_scores), dim=1)  # (B, n_docs)
    targets = targets.repeat_interleave(n_docs, dim=0)
    is_pad = targets == pad_token_id
    logprobs, normalizer = target_logprobs(hidden, weight, bias, targets, answers)  # (B * n_docs, T)
    logprobs = logprobs.masked_fill(is_pad, 0.0)
    if note_logprobs is not None:
        note_logprobs(logprobs.unflatten(0, (-1, n_docs)))
    nll = -(logprobs.sum(1).view(-1, n_docs) + document_logprobs).logsumexp(1)
    if not label_smoothing:
        return nll
    # transformers adds the document's log-probability to every word of one position before it sums over them.
    logit_sum = _padded(_logit_sum(hidden, *output_layer), answers, targets.shape[1])
    smooth = logit_sum - len(weight) * normalizer
    smooth = smooth.masked_fill(is_pad, 0.0).sum(1).view(-1, n_docs)
    smooth_nll = -(smooth + len(weight) * document_logprobs).logsumexp(1)
    return _smoothed(nll, smooth_nll, label_smoothing, len(weight))


def rag_token_nll(
    hidden,
    output_layer,
    doc_scores,
    targets,
    pad_token_id: int,
    label_smoothing: float = 0.0,
    answers: Packing | None = None,
    note_logprobs: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """RAG-Token loss of each example; arguments and result as `rag_sequence_nll`."""
    batch, n_docs = doc_scores.shape
    document_logprobs = torch.log_softmax(full_precision(doc_scores), dim=1).unsqueeze(-1)  # (B, n_docs, 1)
    is_pad = targets == pad_token_id
    weight, bias = output_layer
    logprobs, normalizer = target_logprobs(hidden, weight, bias, targets.repeat_interleave(n_docs, dim=0), answers)
    logprobs = logprobs.view(batch, n_docs, -1)
    if note_logprobs is not None:
        note_logprobs(logprobs.masked_fill(is_pad.unsqueeze(1), 0.0))
    marginal = (logprobs + document_logprobs).logsumexp(1)  # (B, T)
    nll = -marginal.masked_fill(is_pad, 0.0).sum(1)
    if not label_smoothing:
        return nll
    # Smoothing spreads over the marginal distribution, of which every word is needed, a part of them at a time.
    priors = (document_logprobs - normalizer.view(batch, n_docs, -1)).unsqueeze(-1)  # (B, n_docs, T, 1)
    hidden = _padded(hidden, answers, targets.shape[1]).unflatten(0, (batch, n_docs))
    smooth = sum(
        checkpoint(_sum_of_marginal_logprobs, hidden, *part, priors, use_reentrant=False)
        for part in zip(*(tensor.split(CHUNK_VOCABULARY) for tensor in output_layer), strict=True)
    )  # (B, T)
    return _smoothed(nll, -smooth.masked_fill(is_pad, 0.0).sum(1), label_smoothing, len(output_layer[0]))


def _sum_of_marginal_logprobs(hidden, weight, bias, priors) -> torch.Tensor:
    """Over the words of `weight`, of log sum_z exp(logit + prior): (B, n_docs, T, d) to (B, T)."""
    return (full_precision(linear(hidden, weight, bias)) + priors).logsumexp(1).sum(-1)


def _logit_sum(hidden, weight, bias) -> torch.Tensor:
    """Sum of the logits over the vocabulary, (..., d) to (...) float32. Float16, as of autocast, ends at 65,504."""
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, weight, bias = map(full_precision, (hidden, weight, bias))
        return hidden @ weight.sum(0) + bias.sum()


def sequence_nll(logits, targets, pad_token_id: int, label_smoothing: float = 0.0) -> torch.Tensor:
    """Loss of a generator without retrieval: logits (B, T, V), targets (B, T) to (B,) float32, nats.

    Only the normalizer is computed over the vocabulary: no second copy of the logits is kept for the backward pass.
    """
    logits = full_precision(logits)
    normalizer = logits.logsumexp(-1)  # (B, T)
    is_pad = targets == pad_token_id
    nll = (normalizer - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).masked_fill(is_pad, 0.0).sum(1)
    if not label_smoothing:
        return nll
    vocabulary = logits.shape[-1]
    smooth_nll = (vocabulary * normalizer - logits.sum(-1)).masked_fill(is_pad, 0.0).sum(1)
    return _smoothed(nll, smooth_nll, label_smoothing, vocabulary)


def _smoothed(nll, smooth_nll, label_smoothing: float, vocabulary: int):
    return (1.0 - label_smoothing) * nll + label_smoothing / vocabulary * smooth_nll


def _padded(rows: torch.Tensor, answers: Packing | None, width: int) -> torch.Tensor:
    """Packed rows (R, ...) to (N, width, ...); what is padded already stays so."""
    return rows if answers is None else answers.unpack(rows, width)

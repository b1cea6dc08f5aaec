"""Answers of a RAG model from contexts that were already retrieved: every context is encoded once.

contexts = retrieve_contexts(model.rag, retriever, input_ids, attention_mask, n_docs=5)
token_ids = generate_answers(model, contexts.input_ids, contexts.attention_mask, contexts.doc_scores, n_docs=5)
"""

import torch
from torch.nn.functional import log_softmax, pad
from transformers import RagSequenceForGeneration, RagTokenForGeneration
from transformers.modeling_outputs import BaseModelOutput


@torch.no_grad()
def generate_answers(
    model: RagSequenceForGeneration | RagTokenForGeneration,
    context_input_ids: torch.Tensor,
    context_attention_mask: torch.Tensor,
    doc_scores: torch.Tensor,
    *,
    n_docs: int,
    num_beams: int = 4,
    num_return_sequences: int = 1,
    min_length: int = 1,
    max_length: int = 50,
    do_deduplication: bool = True,
    decoding: str = "thorough",
    **generate_kwargs,
) -> torch.Tensor:
    """The best answers to B questions, (B * num_return_sequences, T), best first, padded with the generator's pad id.

    Args:
        context_input_ids: (B * n_docs, S), the documents of a question in a row.
        context_attention_mask: (B * n_docs, S).
        doc_scores: (B, n_docs); -inf where there is no document: that slot gets no probability and is not read.
        do_deduplication: RAG-Sequence: let equal candidates of several documents stand once.
        decoding: RAG-Sequence: "thorough" scores every candidate under every document, "fast" only under the
            documents whose beams found it (Lewis et al. 2020, section 2.5).
        generate_kwargs: whatever else the generator's `generate` takes (bad_words_ids, length_penalty, ...).
    """
    settings = {"num_beams": num_beams, "min_length": min_length, "max_length": max_length, **generate_kwargs}
    doc_scores = _with_a_document(doc_scores)
    if isinstance(model, RagTokenForGeneration):
        answers = model.generate(
            context_input_ids=context_input_ids,
            context_attention_mask=context_attention_mask,
            doc_scores=doc_scores,
            n_docs=n_docs,
            num_return_sequences=num_return_sequences,
            **settings,
        )
        return _blank_after_eos(answers, model.generation_config)

    present = doc_scores.flatten() > float("-inf")  # (B * n_docs)
    context_attention_mask = context_attention_mask[present]
    encoded = model.generator.get_encoder()(context_input_ids[present], attention_mask=context_attention_mask)[0]
    candidates = model.generator.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded.clone()),
        attention_mask=context_attention_mask,
        num_return_sequences=num_beams,
        **settings,
    )
    candidates = _blank_after_eos(candidates, model.generator.generation_config)
    documents = present.view(-1, n_docs).sum(1).tolist()  # of each question
    answers = []
    for scores, own_candidates, own_encoded, own_mask in zip(
        doc_scores,
        candidates.split([n * num_beams for n in documents]),
        encoded.split(documents),
        context_attention_mask.split(documents),
        strict=True,
    ):
        if do_deduplication:
            own_candidates = torch.stack(list({tuple(c.tolist()): c for c in own_candidates}.values()))
        scores = _marginal_log_probs(model, own_candidates, own_encoded, own_mask, scores[scores > float("-inf")])
        answers.append(own_candidates[scores.topk(min(num_return_sequences, len(scores))).indices])
    return _stack(answers, num_return_sequences, model.config.generator.pad_token_id)


def _with_a_document(doc_scores: torch.Tensor) -> torch.Tensor:
    """A question for which nothing was found is answered from its first context, which holds the question alone."""
    lost = doc_scores.isneginf().all(1, keepdim=True)
    return doc_scores.masked_fill(lost & (torch.arange(doc_scores.shape[1], device=lost.device) == 0), 0.0)


def _marginal_log_probs(model, candidates, encoded, mask, doc_scores) -> torch.Tensor:
    """log sum_z p(z) p(candidate | z): candidates (C, T), encoded (n, S, d), mask (n, S), doc_scores (n) to (C)."""
    n, c = len(encoded), len(candidates)
    logits = model.generator(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded.repeat(c, 1, 1)),
        attention_mask=mask.repeat(c, 1),
        decoder_input_ids=candidates.repeat_interleave(n, 0),
    ).logits
    target = pad(candidates[:, 1:], (0, 1), value=model.config.generator.pad_token_id)
    log_probs = log_softmax(logits.float(), -1).view(c, n, *logits.shape[1:])
    log_probs = log_probs.gather(-1, target[:, None, :, None].expand(-1, n, -1, 1)).squeeze(-1)  # (C, n, T)
    padding = target == model.config.generator.pad_token_id  # (C, T)
    log_probs = log_probs.masked_fill(padding.unsqueeze(1), 0.0)
    bos = model.config.bos_token_id or getattr(model.config.generator, "bos_token_id", None)
    first = 1 if bos is not None and (target[:, 0] == bos).all() else 0
    # As transformers' get_nll: the document's probability stands on the second token, and an empty answer has none.
    doc_log_probs = log_softmax(doc_scores.float(), -1) * ~padding[:, 1:2]  # (C, n)
    return (log_probs[:, :, first:].sum(-1) + doc_log_probs).logsumexp(-1)


def _blank_after_eos(sequences: torch.Tensor, settings) -> torch.Tensor:
    """Pads behind the first end: transformers' beam search fills with that very token where the pad id is 0."""
    ended = torch.isin(sequences[:, 1:], torch.tensor(settings.eos_token_id, device=sequences.device)).cumsum(1)
    behind = pad(ended, (2, 0))[:, :-1] > 0
    return sequences.masked_fill(behind, settings.pad_token_id)


def _stack(answers: list[torch.Tensor], rows: int, pad_token_id: int) -> torch.Tensor:
    """Answers of different lengths, (at most rows, T_i) a question, to (B * rows, T)."""
    length = max(a.shape[1] for a in answers)
    return torch.cat([pad(a, (0, length - a.shape[1], 0, rows - len(a)), value=pad_token_id) for a in answers])

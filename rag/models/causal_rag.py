"""RAG models whose generator is a causal language model (Llama, Qwen, ...): transformers' own take encoder-decoders.

    model = RagSequenceForCausalLM.from_pretrained("path/to/checkpoint")
    token_ids = generate_answers(model, contexts.input_ids, contexts.attention_mask, contexts.doc_scores, n_docs=5)

Question encoder, generator and config stand where transformers' RAG models have them, under the same names, so that all
else of the suite takes either. The generator reads prompts (rag/models/prompts.py) and says what follows.
"""

from typing import Any, NoReturn

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    RagSequenceForGeneration,
    RagTokenForGeneration,
)

NOT_HERE = (
    "a RAG model with a causal language model does not run by itself: rag.retrieval.retriever.retrieve_contexts finds "
    "its passages, rag.generation.decoding.generate_answers answers, rag.generation.forward.answer_states trains"
)


def _parts(config: Any, question_encoder: Any, generator: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Both, new ones by the config where they are not given."""
    if question_encoder is None:
        question_encoder = AutoModel.from_config(config.question_encoder)
    if generator is None:
        generator = AutoModelForCausalLM.from_config(config.generator)
    return question_encoder, generator


class _OfLanguageModel:
    """What both have in the place of transformers' own: parts of other classes, and no way to run by themselves."""

    def __init__(self, config=None, question_encoder=None, generator=None, retriever=None, **kwargs):
        parts = _parts(config, question_encoder, generator)
        super().__init__(config, *parts, retriever, **kwargs)  # type: ignore[call-arg]  # of transformers' class

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(NOT_HERE)

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(NOT_HERE)


class RagSequenceForCausalLM(_OfLanguageModel, RagSequenceForGeneration):
    """log p(y|x) = log sum_z p(z|x) prod_t p(y_t | prompt(x, z), y_<t).

    Args:
        config: of the whole; left out, it is made of the parts' own.
        question_encoder: left out, a new one by the config.
        generator: any of transformers' causal language models; left out, a new one by the config.
        retriever: a `RagRetriever`, or None.
    """


class RagTokenForCausalLM(_OfLanguageModel, RagTokenForGeneration):
    """log p(y|x) = sum_t log sum_z p(z|x) p(y_t | prompt(x, z), y_<t); arguments as `RagSequenceForCausalLM`'s."""


CAUSAL_CLASSES = {"rag_sequence": RagSequenceForCausalLM, "rag_token": RagTokenForCausalLM}

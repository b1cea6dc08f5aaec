"""Fusion-in-Decoder (Izacard & Grave 2021, arXiv 2007.01282): passages are encoded apart, one decoder reads them all.

    model = RagFidForGeneration.from_pretrained("path/to/checkpoint")
    token_ids = generate_answers(model, contexts.input_ids, contexts.attention_mask, contexts.doc_scores, n_docs=100)

Question encoder, generator and config stand where transformers' RAG models have them, under the same names, so that a
checkpoint of any of these is one of the others, and all else of the suite takes either.
"""

from typing import Any, NoReturn

from transformers import PreTrainedConfig, RagSequenceForGeneration

from rag.errors import UserError

# Their encoders give each passage positions of its own, and their cross-attention has no bias: the order of passages
# changes nothing.
FUSED = ("bart", "t5", "mt5")
NOT_HERE = (
    "a Fusion-in-Decoder does not run by itself: rag.retrieval.retriever.retrieve_contexts finds its passages, "
    "rag.generation.decoding.generate_answers answers, rag.training.fusion.fused_nll trains"
)


class RagFidForGeneration(RagSequenceForGeneration):
    """log p(y|x) = sum_t log p(y_t | x, all z, y_<t): the documents' scores decide which are read, and no more.

    Args:
        config: of the whole; left out, it is made of the parts' own.
        question_encoder: left out, a new one by the config.
        generator: a BART, T5 or mT5; left out, a new one by the config.
        retriever: a `RagRetriever`, or None.
    """

    fuses_passages = True  # what rag.generation knows it by

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(NOT_HERE)

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(NOT_HERE)


def require_fusable(generator: PreTrainedConfig, source: str) -> None:
    """Raise `UserError` unless a generator with this config can be that of a Fusion-in-Decoder.

    Args:
        source: the flag that named it, and its value.
    """
    if generator.model_type not in FUSED:
        raise UserError(
            f"{source}: --model_type fid takes a generator of {', '.join(FUSED)}, not of {generator.model_type}; give "
            "--model_type rag_sequence or rag_token, or another generator"
        )

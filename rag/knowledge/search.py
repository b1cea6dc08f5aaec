"""Look at knowledge: the passages that it has for a question, and a RAG model's answer from them.

    encoder, tokenizer = load_question_encoder(description, "path/to/encoder")
    search_passages(Path("output/my_knowledge"), description, encoder, tokenizer, ["Where is Oslo?"], n_docs=5)
    answer_question("Where is Oslo?", "path/to/rag_checkpoint", {"passages_path": ..., "index_path": ...})

The passages are printed as they are returned.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rag.errors import UserError, printable, raise_problems
from rag.index.bm25 import open_bm25
from rag.index.hybrid import HybridIndex
from rag.index.index_files import IndexDescription
from rag.index.knowledge_index import KnowledgeIndex
from rag.knowledge.arguments import PASSAGES_FOLDER
from rag.knowledge.printing import print_passages
from rag.models.checkpoints import load_model, load_tokenizer, weights_digest
from rag.models.encoders import load_encoder
from rag.models.fit import complete_start, require_fit, vocabulary_problems
from rag.models.questions import encode_questions, with_prompt

if TYPE_CHECKING:
    from rag.knowledge.reranking import SearchReranker

RAG_FLAG = "--rag_model_name"
QUESTION_ENCODER_FLAG = "--question_encoder_name_or_path"


def load_question_encoder(
    description: IndexDescription,
    name: str | None = None,
    pooling: str = "auto",
    rag_model_name: str | None = None,
    prompt: str | None = None,
):
    """The encoder of questions and its tokenizer: as named, the RAG checkpoint's, or the one that embedded passages.

    Args:
        prompt: before every question, in place of the one that the encoder's folder names.

    Raises:
        UserError: none of them is there, or it is not what it was when the passages were embedded.
    """
    if name is not None:
        encoder = load_encoder(name, "question", pooling, flag=QUESTION_ENCODER_FLAG, prompt=prompt)
        return encoder, _question_tokenizer(name, encoder)
    if rag_model_name is not None:
        model, tokenizer = load_model(rag_model_name, flag=RAG_FLAG), load_tokenizer(rag_model_name, flag=RAG_FLAG)
        if model.config.model_type != "rag":
            raise UserError(f"{RAG_FLAG} {rag_model_name} is a {model.config.model_type} model; give a RAG checkpoint")
        require_fit(model, tokenizer, f"{RAG_FLAG} {rag_model_name}")
        return model.rag.question_encoder, tokenizer.question_encoder
    remedy = f"give {QUESTION_ENCODER_FLAG}, or {RAG_FLAG} CHECKPOINT"
    if description.input == "title, text":  # DPR: questions have an encoder of their own
        raise UserError(f"--search needs the question encoder that belongs to {description.encoder}; {remedy}")
    pooling = "auto" if description.normalize else description.pooling  # only "auto" normalizes
    encoder = load_encoder(description.encoder, "question", pooling, flag=QUESTION_ENCODER_FLAG, prompt=prompt)
    if weights_digest(encoder) != description.encoder_digest:
        raise UserError(f"--search: {description.encoder} is not what it was when the passages were embedded; {remedy}")
    return encoder, _question_tokenizer(description.encoder, encoder)


def _question_tokenizer(name: str, encoder):
    tokenizer = load_tokenizer(name, flag=QUESTION_ENCODER_FLAG)
    raise_problems(vocabulary_problems(encoder, tokenizer, f"{QUESTION_ENCODER_FLAG} {name}"))
    return with_prompt(tokenizer, encoder.config)


def search_passages(
    output: Path, description: IndexDescription, encoder, tokenizer, questions: list[str], n_docs: int,
    columns: int | None = None, fusion: dict[str, Any] | None = None, rescore: "SearchReranker | None" = None, **effort
) -> list[list[dict]]:  # fmt: skip
    """Print the passages of a knowledge folder for each question, best first, and return them.

    Args:
        output: the folder, which `description` describes.
        encoder: of questions, with its tokenizer.
        columns: as of `print_passages`.
        fusion: of a hybrid search (`fusion_of`); None to search by vectors alone.
        rescore: a `SearchReranker`; None for the index's own scores.
        effort: ef_search and nprobe.

    Returns:
        for each question a list of dicts of id, score (inner product, fused or reranked), title and text.
    """
    for warning in description.encoder_mismatches(encoder.config):
        print(f"Warning: {warning}")
    passages_path = output / PASSAGES_FOLDER
    index = KnowledgeIndex.load_from_disk(description.dimension, passages_path, output / description.index, **effort)
    if fusion is not None:
        words = open_bm25(SimpleNamespace(passages_path=str(passages_path), index_path=None))
        index = HybridIndex(index, words, **fusion)
    index.init_index()
    tokens = encode_questions(tokenizer, questions, padding=True, return_tensors="pt")
    with torch.inference_mode():
        vectors = encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"])[0].numpy()  # (Q, d)
    if vectors.shape[1] != description.dimension:
        raise UserError(
            f"{QUESTION_ENCODER_FLAG}: questions have {vectors.shape[1]} dimensions, the passages of {output} "
            f"{description.dimension}; give the question encoder that belongs to {description.encoder}"
        )
    if isinstance(index, HybridIndex):
        vectors = np.concatenate([vectors, index.encode_questions(questions)], axis=1)
    scores, ids = index.search(vectors, min(n_docs if rescore is None else rescore.depth, len(index)))
    if rescore is not None:
        scores, ids = rescore(index, questions, ids, n_docs)
    docs = index.get_doc_dicts(ids)
    return [print_passages(*row, columns) for row in zip(questions, ids, scores, docs, strict=True)]


def answer_question(question: str, rag_model_name: str, index_flags: dict[str, str]) -> str:
    """Print the passages that a RAG model retrieves for a question, their scores, and its answer; return the answer."""
    from rag.generation.decoding import generate_answers
    from rag.generation.families import require_family
    from rag.generation.trial import require_runs
    from rag.retrieval.retriever import RagKnowledgeRetriever, retrieve_contexts

    model = load_model(rag_model_name, config_overrides=index_flags, flag=RAG_FLAG)
    tokenizer = load_tokenizer(rag_model_name, flag=RAG_FLAG)
    require_family(model.config.generator, f"{RAG_FLAG} {rag_model_name}")
    require_fit(model, tokenizer, f"{RAG_FLAG} {rag_model_name}")
    complete_start(model, tokenizer, f"{RAG_FLAG} {rag_model_name}")
    require_runs(model, tokenizer, f"{RAG_FLAG} {rag_model_name}")
    retriever = RagKnowledgeRetriever(model.config, tokenizer.question_encoder, tokenizer.generator)
    retriever.init_retrieval()
    n_docs = min(model.config.n_docs, len(retriever.index))
    tokens = encode_questions(tokenizer.question_encoder, [question], return_tensors="pt")
    with torch.inference_mode():
        contexts = retrieve_contexts(
            model.rag, retriever, tokens["input_ids"], tokens["attention_mask"], n_docs, [question]
        )
        ids = generate_answers(model, contexts.input_ids, contexts.attention_mask, contexts.doc_scores, n_docs=n_docs)
    answer = tokenizer.generator.decode(ids[0], skip_special_tokens=True).strip()
    print_passages(question, contexts.doc_ids[0], contexts.doc_scores[0].numpy(), contexts.docs[0])
    print(printable(f"Answer: {answer}"))
    return answer

"""Look at knowledge: the passages that it has for a question, and a RAG model's answer from them.

search_passages(parse_args(["--output_dir", "output/my_knowledge", "--search", "Where is Oslo?"]))
ask("Where is Oslo?", "path/to/rag_checkpoint", {"passages_path": ..., "index_path": ...})
"""

from pathlib import Path

import numpy as np
import torch

from rag.errors import UserError
from rag.index.index_files import encoder_mismatches, read_description
from rag.index.knowledge_index import KnowledgeIndex
from rag.knowledge.arguments import PASSAGES_FOLDER, KnowledgeArguments
from rag.models.checkpoints import load_encoder, load_model, load_tokenizer, weights_digest

RAG_FLAG = "--rag_model_name"
ENCODER_FLAG = "--question_encoder_name_or_path"


def search_passages(args: KnowledgeArguments) -> list[list[dict]]:
    """Print the passages of --output_dir for each of --search, best first, and return them.

    Returns:
        for each question a list of dicts of id, score (inner product), title and text.
    """
    assert args.search, "no question"
    output = Path(args.output_dir)
    made_by = read_description(output / PASSAGES_FOLDER)
    if made_by.get("index") is None:
        raise UserError(f"--search: the index of {output} is not finished; run the command that was building it first")
    encoder, tokenizer = load_question_encoder(args, made_by)
    for warning in encoder_mismatches(made_by, encoder.config):
        print(f"Warning: {warning}")
    index = KnowledgeIndex.load_from_disk(
        made_by["dimension"], output / PASSAGES_FOLDER, output / made_by["index"],
        ef_search=args.ef_search, nprobe=args.nprobe,
    )  # fmt: skip
    index.init_index()
    tokens = tokenizer(args.search, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        vectors = encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"])[0].numpy()  # (Q, d)
    if vectors.shape[1] != made_by["dimension"]:
        raise UserError(
            f"{ENCODER_FLAG}: questions have {vectors.shape[1]} dimensions, the passages of {output} "
            f"{made_by['dimension']}; give the question encoder that belongs to {made_by['encoder']}"
        )
    scores, ids = index.search(vectors, min(args.n_docs, len(index)))
    return [
        show(question, *found)
        for question, *found in zip(args.search, ids, scores, index.get_doc_dicts(ids), strict=True)
    ]


def load_question_encoder(args: KnowledgeArguments, made_by: dict):
    """The encoder of questions and its tokenizer: as given, the RAG checkpoint's, or the one that embedded passages."""
    name = args.question_encoder_name_or_path
    if name is not None:
        encoder = load_encoder(name, "question", args.question_encoder_pooling, flag=ENCODER_FLAG)
        return encoder, load_tokenizer(name, flag=ENCODER_FLAG)
    if args.rag_model_name is not None:
        encoder = load_model(args.rag_model_name, flag=RAG_FLAG).rag.question_encoder
        return encoder, load_tokenizer(args.rag_model_name, flag=RAG_FLAG).question_encoder
    name = made_by["encoder"]
    remedy = f"give {ENCODER_FLAG}, or {RAG_FLAG} CHECKPOINT"
    if made_by["input"] == "title, text":  # DPR: questions have an encoder of their own
        raise UserError(f"--search needs the question encoder that belongs to {name}; {remedy}")
    pooling = "auto" if made_by["normalize"] else made_by["pooling"]  # only "auto" normalises
    encoder = load_encoder(name, "question", pooling, flag=ENCODER_FLAG)
    if weights_digest(encoder) != made_by["encoder_digest"]:
        raise UserError(f"--search: {name} is not what it was when the passages were embedded; {remedy}")
    return encoder, load_tokenizer(name, flag=ENCODER_FLAG)


def show(question: str, ids: np.ndarray, scores: np.ndarray, docs: dict) -> list[dict]:
    """Print a question and its passages; -1 among the ids ends them."""
    print(f"Question: {question}")
    found = [
        {"id": int(number), "score": float(score), "title": title, "text": text}
        for number, score, title, text in zip(ids, scores, docs["title"], docs["text"], strict=True)
        if number >= 0
    ]
    for passage in found:
        print(f"  {passage['score']:8.3f}  {passage['title']}: {passage['text']}")
    return found


def ask(question: str, rag_model_name: str, index_flags: dict) -> str:
    """Print the passages that a RAG model finds for a question, their scores, and its answer; return the answer."""
    from rag.generation.decoding import generate_answers
    from rag.retrieval.retriever import RagKnowledgeRetriever, retrieve_contexts

    model = load_model(rag_model_name, config_overrides=index_flags, flag=RAG_FLAG)
    tokenizer = load_tokenizer(rag_model_name, flag=RAG_FLAG)
    retriever = RagKnowledgeRetriever(model.config, tokenizer.question_encoder, tokenizer.generator)
    retriever.init_retrieval()
    n_docs = min(model.config.n_docs, len(retriever.index))
    tokens = tokenizer.question_encoder(question, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        found = retrieve_contexts(model.rag, retriever, tokens["input_ids"], tokens["attention_mask"], n_docs)
        ids = generate_answers(model, found.input_ids, found.attention_mask, found.doc_scores, n_docs=n_docs)
    answer = tokenizer.generator.decode(ids[0], skip_special_tokens=True).strip()
    show(question, found.doc_ids[0], found.doc_scores[0].numpy(), found.docs[0])
    print(f"Answer: {answer}")
    return answer

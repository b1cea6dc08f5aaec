"""The retriever of one process: question vectors in, passages and generator contexts out.

    retriever = RagKnowledgeRetriever.from_pretrained(checkpoint, passages_path="...", index_path="...")
    contexts = retrieve_contexts(model.rag, retriever, input_ids, attention_mask, n_docs=5)

A subclass changes only where the search runs (`_search`); passage text is read on the rank that needs it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import RagConfig, RagRetriever
from transformers.models.rag.retrieval_rag import Index

from rag.errors import UserError
from rag.index.arguments import INDEX_FLAGS
from rag.index.columns import require_finite
from rag.index.given_passages import GivenPassages
from rag.index.knowledge_index import KnowledgeIndex
from rag.index.sources import open_index, open_own
from rag.models.checkpoints import load_tokenizer
from rag.models.custom_code import code_beside
from rag.models.limits import most_tokens, settle_vector_size
from rag.models.loading import MODEL_FLAG
from rag.models.prompts import encode_prompts, template_of, with_template
from rag.models.questions import bare_questions, with_prompt
from rag.models.tokens import token_rows
from rag.packing import Heads, right_padded_lengths, to_device
from rag.retrieval.finding import Rescoring, find_passages

# Contexts are padded to the longest of the batch, rounded up: tensor cores like multiples of 8.
CONTEXT_MULTIPLE = 8
# What `save_pretrained` writes of an index in memory, named as transformers' retriever names it.
PASSAGES_FOLDER, INDEX_FILE = "hf_dataset", "hf_dataset_index.faiss"


class RagKnowledgeRetriever(RagRetriever):
    """`transformers.RagRetriever` over a memory-mapped `KnowledgeIndex`.

    Returns what transformers' own returns, but contexts are padded to the longest of the batch instead of
    `max_combined_length`, a batch is searched in one call whatever `config.retrieval_batch_size` is, and a slot for
    which no passage was found has id -1 and no text. Arguments as transformers'.

    A deep copy shares the open index; a pickle opens its files again.

    Attributes:
        contexts: contexts made so far.
        cut_contexts: those that were longer than `context_length`, so that title and passage were cut.
    """

    contexts = 0
    cut_contexts = 0

    @staticmethod
    def _build_index(config: RagConfig) -> Index:
        return open_index(config)

    @classmethod
    def from_pretrained(cls, retriever_name_or_path, indexed_dataset=None, **kwargs) -> "RagKnowledgeRetriever":
        """Config and tokenizers from a RAG checkpoint; keyword arguments override its config.

        Args:
            retriever_name_or_path: folder or hub name of a RAG checkpoint.
            indexed_dataset: a dataset with a FAISS index on its column "embeddings", in place of the config's index.
        """
        config = cls._config(retriever_name_or_path, **kwargs)
        return cls(
            config,
            *cls._tokenizers(retriever_name_or_path, config),
            index=cls._index_of(config, indexed_dataset),
        )

    @staticmethod
    def _config(retriever_name_or_path, config: RagConfig | None = None, **kwargs) -> RagConfig:
        if config is None:
            with code_beside(str(retriever_name_or_path)):
                config, unknown = RagConfig.from_pretrained(retriever_name_or_path, return_unused_kwargs=True, **kwargs)
            for name in unknown.keys() & set(INDEX_FLAGS):
                setattr(config, name, unknown[name])
            settle_vector_size(config, str(retriever_name_or_path), MODEL_FLAG)
        return config

    @staticmethod
    def _tokenizers(retriever_name_or_path, config: RagConfig):
        tokenizer = load_tokenizer(str(retriever_name_or_path), "rag_sequence")
        with_prompt(tokenizer.question_encoder, config.question_encoder)
        with_template(tokenizer.generator, config.generator)
        return tokenizer.question_encoder, tokenizer.generator

    @classmethod
    def _index_of(cls, config: RagConfig, indexed_dataset) -> Index:
        if indexed_dataset is None:
            return cls._build_index(config)
        config.index_name = "custom"
        return KnowledgeIndex.from_dataset(indexed_dataset, config.retrieval_vector_size)

    def save_pretrained(self, save_directory) -> None:
        """Write config and tokenizers and, where they are in memory alone, passages and index beside them.

        The config then has the paths of these, as it has with transformers' retriever.

        Args:
            save_directory: folder, made if need be.
        """
        folder = Path(save_directory).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.index, KnowledgeIndex) and self.config.index_name == "custom" and self.index.in_memory:
            self.index.save(folder / PASSAGES_FOLDER, folder / INDEX_FILE)
            self.config.passages_path, self.config.index_path = str(folder / PASSAGES_FOLDER), str(folder / INDEX_FILE)
        super().save_pretrained(save_directory)

    def init_retrieval(self) -> None:
        """Open the index; a second call does nothing."""
        if not self.index.is_initialized():
            self.index.init_index()

    def open_beside(self, passages_path: str, index_path: str) -> KnowledgeIndex:
        """Another index over the same passages, opened for `take_index`; until then the old one is searched.

        Not collective: each rank opens what it searches and reads. Vectors that a device holds make room for the new
        ones first.

        Raises:
            UserError: it cannot be opened, or holds another number of passages.
        """
        index = open_own(self.config, passages_path, index_path)
        if len(index) != len(self.index):
            raise UserError(
                f"--index_path {index_path} is of {len(index)} passages, and {len(self.index)} were searched so far"
            )
        if isinstance(self.index, KnowledgeIndex):
            self.index.device_search = None
        self._open_search(index, (passages_path, index_path))
        return index

    def _open_search(self, index: KnowledgeIndex, paths: tuple[str, str]) -> None:
        """Open what is searched for this process of an index; `paths` are those of its passages and its FAISS file."""
        index.init_index()

    def take_index(self, index: Any) -> None:
        """Search an index that `open_beside` has opened from now on. Every rank calls this between two retrievals."""
        self.index = index

    def retrieve(self, question_hidden_states: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
        """The `n_docs` passages of largest inner product for each question, best first.

        Args:
            question_hidden_states: (B, d) float32.
            n_docs: passages a question.

        Returns:
            retrieved_doc_embeds (B, n_docs, d) float32, doc_ids (B, n_docs) int64, and B dicts with every column of
            the passages, of which all but title and text are read on first use. Where too few passages were
            found: id -1, a zero vector, empty strings.

        Raises:
            UserError: the vectors are not as long as the index's, or the embedding of a passage that was found holds
                NaN or infinity.
        """
        queries = np.ascontiguousarray(question_hidden_states, dtype=np.float32)
        has_vectors = isinstance(self.index, KnowledgeIndex) and self.index.reads_vectors
        if has_vectors and queries.shape[1:] != (self.index.vector_size,):
            raise UserError(
                f"the question vectors have shape {queries.shape}, but {self.index.index_origin} searches for those of "
                f"shape (questions, {self.index.vector_size}); take the question encoder that it was built for"
            )
        doc_ids, doc_embeds = self._search(queries, n_docs)
        require_finite(doc_embeds, doc_ids, getattr(self.index, "origin", "the index"))
        return doc_embeds, doc_ids, self.index.get_doc_dicts(doc_ids)

    def _search(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries (B, d) float32 to doc_ids (B, n_docs) int64 and their embeddings (B, n_docs, d) float32."""
        return self.index.get_top_docs(queries, n_docs)

    def postprocess_docs(self, docs, input_strings, prefix, n_docs, return_tensors=None):
        """Generator inputs "prefix title / text // question", (B * n_docs, S), a question's documents in a row.

        A causal language model's are those of its template.

        Args:
            docs: B dicts of the lists "title" and "text".
            input_strings: B questions.
            prefix: before each context; None for none.
            n_docs: documents a question.
            return_tensors: "pt" for torch tensors, "np" for arrays, None for lists.

        Returns:
            Token ids and mask, int64, padded to the longest context. Where one is longer than `context_length`,
            its title and passage are cut, never its question.

        Raises:
            ValueError: `return_tensors` is another one.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f'return_tensors {return_tensors!r} is none of "pt", "np" and None')
        if template_of(self.generator_tokenizer) is None:
            input_ids, mask = self._contexts(docs, input_strings, prefix or "", n_docs)
        else:
            input_ids, mask, _ = self.prompts(docs, input_strings, n_docs)
        if return_tensors is None:
            return input_ids.tolist(), mask.tolist()
        return (torch.from_numpy(input_ids), torch.from_numpy(mask)) if return_tensors == "pt" else (input_ids, mask)

    def prompts(self, docs: list[dict], questions: list[str], n_docs: int) -> tuple[np.ndarray, np.ndarray, Heads]:
        """What a causal language model reads, as `postprocess_docs` returns it, and which prompts begin alike."""
        passages = [
            (title, text)
            for doc in docs
            for title, text in zip(map(bare_title, doc["title"][:n_docs]), doc["text"][:n_docs], strict=True)
        ]
        asked = [question for question in questions for _ in range(n_docs)]
        rows, lengths, cut = encode_prompts(self.generator_tokenizer, passages, asked, self.context_length)
        self.cut_contexts += cut
        firsts: dict[tuple[int, ...], int] = {}
        first = [firsts.setdefault(tuple(row[:n]), i) for i, (row, n) in enumerate(zip(rows, lengths, strict=True))]
        return *self._as_arrays(rows), Heads(np.array(lengths), np.array(first))

    def _contexts(
        self, docs: list[dict], input_strings: list[str], prefix: str, n_docs: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """What an encoder-decoder reads."""
        contexts = [
            self._context(title, text, question, prefix)
            for question, passages in zip(input_strings, docs, strict=True)
            for title, text in zip(passages["title"][:n_docs], passages["text"][:n_docs], strict=True)
        ]
        max_length = self.context_length
        rows = token_rows(self.generator_tokenizer, contexts)
        for row, ids in enumerate(rows):
            if len(ids) > max_length:
                rows[row] = self._cut(contexts[row], input_strings[row // n_docs], max_length)
                self.cut_contexts += 1
        return self._as_arrays(rows)

    def _as_arrays(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        self.contexts += len(rows)
        # 300 is no multiple of 8
        return _padded(rows, self.generator_tokenizer.pad_token_id, gcd(CONTEXT_MULTIPLE, self.context_length))

    @property
    def context_length(self) -> int:
        """Tokens of a context: the config's `max_combined_length`, or fewer where the generator reads no more."""
        readable = most_tokens(self.config.generator)
        return self.config.max_combined_length if readable is None else min(self.config.max_combined_length, readable)

    def _cut(self, context: str, question: str, max_length: int) -> list[int]:
        """The tokens of a context that is too long, with fewer of its title and passage.

        Separator and question stay whole, unless these alone are too long: then the question is cut at its end.
        """
        tokenizer = self.generator_tokenizer
        tail = (self.config.doc_sep + question).replace("  ", " ").lstrip(" ")
        start = len(context) - len(tail)
        if tokenizer.is_fast:
            encoding = tokenizer.backend_tokenizer.encode(context)  # untruncated, as `token_rows` has set it
            special = encoding.special_tokens_mask
            words = [n for n, is_special in enumerate(special) if not is_special]
            before, after = encoding.ids[: words[0]], encoding.ids[words[-1] + 1 :]
            head = [encoding.ids[n] for n in words if encoding.offsets[n][1] <= start]
            tail_ids = [encoding.ids[n] for n in words if encoding.offsets[n][1] > start]
        else:
            bare, head, tail_ids = (
                tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                for text in (context, context[:start], context[start:])
            )
            whole = tokenizer(context, verbose=False)["input_ids"]
            first = next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
            before, after = whole[:first], whole[first + len(bare) :]
        room = max_length - len(before) - len(after)
        head = head[: max(0, room - len(tail_ids))]
        return [*before, *head, *tail_ids[:room], *after][:max_length]

    def _context(self, title: str, text: str, question: str, prefix: str) -> str:
        context = prefix + bare_title(title) + self.config.title_sep + text + self.config.doc_sep + question
        return context.replace("  ", " ")


def bare_title(title: str) -> str:
    """Without the quotation marks around it."""
    return title.removeprefix('"').removesuffix('"')


def _padded(rows: list[list[int]], pad_token_id: int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N) of token ids as ids and mask (N, S) int64, padded on the right, S a multiple of `multiple`."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(-(-lengths.max() // multiple) * multiple) < lengths[:, None]
    input_ids = np.full(mask.shape, pad_token_id, dtype=np.int64)
    input_ids[mask] = np.concatenate(rows)
    return input_ids, mask.astype(np.int64)


def require_n_docs(index: Index, n_docs: int, flag: str = "--n_docs") -> None:
    """Raise `UserError` if an index holds fewer passages than are to be fetched for each question.

    Passages that were found already may be fewer for any question.
    """
    if isinstance(index, KnowledgeIndex) and not isinstance(index, GivenPassages) and n_docs > len(index):
        raise UserError(f"{flag} {n_docs} is more than the {len(index)} passages of the index; ask for fewer")


def require_passages_for(index: Index, questions: Iterable[str], source: str, prefix: str = "") -> None:
    """Raise `UserError` if passages that were found already (`GivenPassages`) lack those of a question.

    Args:
        source: where the questions are from, for the message.
        prefix: what will stand before each of them.
    """
    if isinstance(index, GivenPassages):
        index.expect(questions, source, prefix)


@dataclass
class RetrievedContexts:
    """What the generator reads for a batch of B questions, and where it came from.

    Attributes:
        input_ids: (B * n_docs, S) int64, the documents of a question in a row.
        attention_mask: (B * n_docs, S) int64.
        doc_scores: (B, n_docs), inner products of question and passage, differentiable in the question encoder, or
            BM25, fused, given or reranked scores; -inf in a slot without a passage, so that it gets no probability.
        doc_ids: (B, n_docs) int64 row numbers in the index, -1 in a slot without a passage.
        docs: B dicts of the passages' columns, among them the lists "title" and "text".
        lengths: (B * n_docs) tokens of each context, on the host; None where padding stands before or between them.
        n_tokens: of all contexts.
        heads: which contexts of a causal language model begin alike; None of an encoder-decoder's.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    doc_scores: torch.Tensor
    doc_ids: np.ndarray
    docs: list[dict]
    lengths: np.ndarray | None
    n_tokens: int
    heads: Heads | None = None


def retrieve_contexts(
    rag,
    retriever: RagRetriever,
    input_ids,
    attention_mask,
    n_docs=None,
    texts: list[str] | None = None,
    questions: list[str] | None = None,
    lengths: np.ndarray | None = None,
    rescore: Rescoring | None = None,
) -> RetrievedContexts:
    """Encode the questions, fetch their passages, tokenize the contexts (the first half of `RagModel.forward`).

    Args:
        rag: a `RagModel`; gradients reach its question encoder through `doc_scores`.
        retriever: any `RagRetriever`. Collective where the retriever's `retrieve` is.
        input_ids: (B, S) questions, in the question encoder's tokens.
        attention_mask: (B, S).
        n_docs: passages a question; None for the config's.
        texts: the questions as they were written, for an index that reads text; None for what their tokens say.
        questions: what their tokens say (`bare_questions`), where the device need not be asked for it.
        lengths: as of `question_vectors`.
        rescore: as of `find_passages`.
    """
    n_docs, device = n_docs or rag.config.n_docs, input_ids.device
    if questions is None:
        questions = bare_questions(retriever.question_encoder_tokenizer, input_ids)
    tokens = {"input_ids": input_ids, "attention_mask": attention_mask}
    found = find_passages(rag.question_encoder, retriever, tokens, texts or questions, n_docs, lengths, rescore)
    heads = None
    if template_of(retriever.generator_tokenizer) is None:
        prefix = getattr(rag.generator.config, "prefix", None)
        context_ids, context_mask = retriever.postprocess_docs(
            found.docs, questions, prefix, n_docs, return_tensors="pt"
        )
    else:
        *arrays, heads = retriever.prompts(found.docs, questions, n_docs)
        context_ids, context_mask = map(torch.from_numpy, arrays)

    return RetrievedContexts(
        input_ids=to_device(context_ids, device),
        attention_mask=to_device(context_mask, device),
        doc_scores=found.scores,
        doc_ids=found.doc_ids,
        docs=found.docs,
        lengths=right_padded_lengths(context_mask),
        n_tokens=int(context_mask.cpu().numpy().sum()),
        heads=heads,
    )

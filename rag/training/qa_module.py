"""`GenerativeQAModule`: the joint training step of question encoder and generator, and its validation.

    module = GenerativeQAModule(args, model, tokenizer, retriever)
    trainer.fit(module, datamodule=data)
    module = GenerativeQAModule.load_from_checkpoint("output/checkpoint3.ckpt")

One step: question encoder -> retriever -> contexts -> generator -> marginal likelihood, or that of one decoder over all
contexts (fid). A model without retrieval (bart, t5) skips the first three. Metrics are exact over all examples of all
ranks.
"""

import argparse
import logging
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning.plugins import MixedPrecision
from transformers import PreTrainedModel, RagSequenceForGeneration, RagTokenForGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from rag.casting import hold_frozen_weights
from rag.errors import UserError, raise_problems
from rag.files import write_lines
from rag.generation.answering import answering_model
from rag.generation.decoding import answer_prompts, generate_answers
from rag.generation.forward import answer_states, output_layer
from rag.generation.fusion import is_fusion
from rag.generation.stacks import is_sharded, use_packed_rows
from rag.generation.trial import FLAGS_DECIDE
from rag.metrics import calculate_exact_match, f1_score
from rag.models.adapters import has_adapters, learning_summary
from rag.models.checkpoints import save_model
from rag.models.loading import MODEL_FLAG
from rag.models.prompts import decode_answers
from rag.models.questions import bare_questions
from rag.packing import right_padded_lengths, to_device
from rag.public_names import Replaced
from rag.retrieval.arguments import UPR
from rag.retrieval.finding import learns_from
from rag.retrieval.reranking import open_reranker
from rag.retrieval.retriever import RetrievedContexts, retrieve_contexts
from rag.training.arguments import RetrievalArguments
from rag.training.base_module import BaseTransformer
from rag.training.context_encoder import FOLDER as CONTEXT_ENCODER
from rag.training.context_encoder import FreshScores, open_context_encoder, save_context_encoder
from rag.training.fusion import fused_nll
from rag.training.loading import (
    adapt,
    base_of_run,
    load_model_and_tokenizer,
    load_trained_parts,
    open_retriever,
    read_lightning_checkpoint,
)
from rag.training.loss import decoder_inputs_and_targets, rag_sequence_nll, rag_token_nll, sequence_nll
from rag.training.measures import distinct_share, doc_entropy, means
from rag.training.namespaces import add_flags, add_run_flags
from rag.training.reports import collects_gradients
from rag.training.retrieval_problems import fusion_problems
from rag.training.retriever_loss import RETRIEVER_LOSSES, Teacher, taught
from rag.training.run_card import making_of, measured

logger = logging.getLogger(__name__)

EMBEDDINGS = {"shared", "embed_tokens", "embed_positions"}  # as BART and T5 name those of words and positions
HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# A Fusion-in-Decoder is a RagSequenceForGeneration, too, with a step of its own (fusion.py).
RAG_LOSSES = {RagSequenceForGeneration: rag_sequence_nll, RagTokenForGeneration: rag_token_nll}


class GenerativeQAModule(BaseTransformer):
    """A RAG model, or a bare generator as closed-book baseline, that learns to answer questions.

    Args:
        args: `FinetuneArguments`, or a namespace or a dict of all settings.
        model: `RagSequenceForGeneration`, `RagTokenForGeneration`, `RagFidForGeneration` or any encoder-decoder
            language model; None loads what `args` names, with its tokenizer.
        tokenizer: `RagTokenizer` for a RAG model, else the model's own.
        retriever: a `RagRetriever` for a RAG model; opened by `setup` on every rank. Without a `model`, None opens the
            index in this process.
    """

    val_metric = "em"

    pad = Replaced("the tokenizers have it: `question_tokenizer.pad_token_id` and `answer_tokenizer.pad_token_id`")
    save_metrics = Replaced("callbacks_rag.MetricsWriter writes metrics.json from what the module logs")

    def __init__(self, args, model=None, tokenizer=None, retriever=None):
        super().__init__(args)
        args = self.args
        if model is None:
            model, tokenizer = load_model_and_tokenizer(args)
            retriever = retriever or open_retriever(model, tokenizer)
        else:
            adapt(model, args)
        self.model = model
        self.rag_loss = next((loss for kind, loss in RAG_LOSSES.items() if isinstance(model, kind)), None)
        assert (self.rag_loss is None) == (retriever is None)
        self.retriever_loss = RETRIEVER_LOSSES.get(args.training.retriever_loss)  # None: the answers' own
        self.retriever = retriever
        if self.rag_loss:
            model.set_retriever(retriever)  # for `self.model(...)` and `self.model.generate(...)`
        self.tokenizer = tokenizer
        self.question_tokenizer = tokenizer.question_encoder if self.rag_loss else tokenizer
        self.answer_tokenizer = tokenizer.generator if self.rag_loss else tokenizer
        self.is_fused = is_fusion(model)
        raise_problems(fusion_problems(args, self.is_fused, f"{MODEL_FLAG} {args.model.model_name_or_path}"))
        self.context_encoder, self.rescore = None, self._reranker() if self.rag_loss else None
        if args.model.train_context_encoder and args.run.do_train:
            self.context_encoder, self.context_tokenizer = open_context_encoder(args, retriever)
            packed = args.model.attn_implementation == "auto"
            self.rescore = FreshScores(
                self.context_encoder, self.context_tokenizer, args.retrieval.over_retrieve, packed=packed
            )
        # BM25 does without the question encoder, and so do rerankers and a Fusion-in-Decoder's likelihood; parameters
        # that get no gradient would keep other ranks waiting.
        is_asked = bool(self.rag_loss) and not args.model.freeze_question_encoder
        is_asked = is_asked and (learns_from(retriever) if self.rescore is None else self.rescore.learns)
        self.lacks_a_teacher = is_asked and self.is_fused and self.retriever_loss is None
        self.question_encoder_is_frozen = bool(self.rag_loss) and (not is_asked or self.lacks_a_teacher)
        self._freeze()
        if has_adapters(model) or args.model.freeze_generator:
            self.learn_beside(base_of_run(args))
        self.packs_questions = args.model.attn_implementation == "auto"
        if self.rag_loss or not self.generator.config.is_encoder_decoder:
            use_packed_rows(self.generator)
        if args.model.gradient_checkpointing:  # of the generator, which reads n_docs contexts where a question is read
            self.generator.activation_checkpointing_enable()
        if args.model.compile:  # layer by layer: all are alike, so that one of encoder and decoder each is compiled
            for layer in self.generator.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.compile(dynamic=True)  # every batch has lengths of its own
        self.thread = ThreadPoolExecutor(1)
        self.prefetching: Future | None = None  # the retrieval of the next training batch
        self.tokens, self.counted_since = 0, None  # read since that time: what tokens_per_second is made of
        self.answering: list[PreTrainedModel] = []  # one at most, and in a list no part of this module
        self.rows: list[dict] = []  # what was measured of each example since the validation or test began
        self.measured: dict[str, float] = {}  # by the last validation, of the weights that are exported next

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | os.PathLike,
        map_location: Any = None,
        hparams_file: str | os.PathLike | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        *,
        model=None,
        tokenizer=None,
        retriever=None,
        **changes: Any,
    ) -> "GenerativeQAModule":
        """The trained module of a Lightning checkpoint, whose settings say which model, tokenizer and index it needs.

        Args:
            map_location: the device to put it on.
            hparams_file: `hparams.json` to read the settings of, in place of the checkpoint's.
            strict: whether the weights must be exactly the model's; left out, they must.
            weights_only: without effect: nothing is ever unpickled.
            model: in place of the one that the training started from; its weights are replaced.
            tokenizer: in place of that model's.
            retriever: in place of one that searches in this process and is opened here.
            changes: settings to take in place of the checkpoint's (`passages_path="moved/here"`).

        Raises:
            UserError: the checkpoint, its model or its index cannot be found or read.
        """
        args, weights = read_lightning_checkpoint(checkpoint_path, hparams_file, **changes)
        model, tokenizer = load_trained_parts(checkpoint_path, args, model, tokenizer)
        module = cls(args, model=model, tokenizer=tokenizer, retriever=retriever or open_retriever(model, tokenizer))
        try:
            module.load_state_dict(weights, strict=strict is not False)
        except ValueError as error:
            raise UserError(f"{checkpoint_path} does not fit its model: {error}") from error
        return module if map_location is None else module.to(map_location)

    @staticmethod
    def add_model_specific_args(parser: argparse.ArgumentParser, root_dir: str | None = None):
        """Add every flag of `finetune_rag.py` but the retriever's to a plain parser, and return it."""
        return add_run_flags(BaseTransformer.add_model_specific_args(parser, root_dir))

    @staticmethod
    def add_retriever_specific_args(parser: argparse.ArgumentParser):
        """Add the flags of the retriever and its index to a plain parser, and return it."""
        return add_flags(parser, RetrievalArguments)

    add_ray_specific_args = add_retriever_specific_args  # Ray's flags are among them

    def _reranker(self):
        """What --reranker names, no part of this module; None where it names nothing."""
        retrieval = self.args.retrieval
        depth = retrieval.depth_for(self.model.config.n_docs)
        return open_reranker(retrieval.reranker, depth, self.model, self.answer_tokenizer)

    @property
    def generator(self):
        return self.model.generator if self.rag_loss else self.model

    def _freeze(self) -> None:
        if self.question_encoder_is_frozen:
            self.model.rag.question_encoder.requires_grad_(False)
        if self.args.model.freeze_generator:
            self.generator.requires_grad_(False)
        if self.args.model.freeze_embeds:
            for name, module in self.generator.named_modules():
                if name.rpartition(".")[2] in EMBEDDINGS:
                    module.requires_grad_(False)

    def setup(self, stage: str) -> None:
        """Open the index. Collective where the retriever's `init_retrieval` is; a second call does nothing."""
        if stage == "fit":
            self.train()  # transformers loads models in evaluation mode, which Lightning leaves as it is
            if self.trainer.is_global_zero:
                print(learning_summary(self.model, self.context_encoder), flush=True)
                if self.lacks_a_teacher:
                    print("The question encoder stays as it is: a Fusion-in-Decoder teaches it by --retriever_loss")
        if self.retriever is not None:
            self.retriever.init_retrieval()

    def on_fit_start(self) -> None:
        plugin, is_frozen = self.trainer.precision_plugin, self.args.model.freeze_generator
        is_frozen = is_frozen or has_adapters(self.generator)
        is_written = self.base is not None and any(".generator." in name for name in self.base.changed)
        if isinstance(plugin, MixedPrecision) and is_frozen and not is_written:
            hold_frozen_weights(self.generator, HALVES[plugin.precision])

    def train(self, mode: bool = True):
        """What is frozen works without dropout: a question finds the same passages each time."""
        super().train(mode)
        if self.question_encoder_is_frozen:
            self.model.rag.question_encoder.eval()
        if self.args.model.freeze_generator:
            self.generator.eval()
        return self

    def forward(self, input_ids: torch.Tensor, **kwargs: Any):
        """transformers' outputs for questions (B, S); a RAG model retrieves for them. No step goes this way."""
        return self.model(input_ids, **kwargs)

    def ids_to_clean_text(self, generated_ids: torch.Tensor) -> list[str]:
        """Answers of token ids (B, T), each on one line."""
        texts = decode_answers(self.answer_tokenizer, generated_ids)
        return [" ".join(text.split()) for text in texts]

    def calc_generative_metrics(self, preds: list[str], target: list[str]) -> dict[str, float]:
        """EM and F1, means over the answers. Called with one answer at a time; a subclass may return other measures."""
        f1 = sum(map(f1_score, preds, target)) / max(len(preds), 1)
        return calculate_exact_match(preds, target) | {"f1": f1}

    # --- The step -----------------------------------------------------------------------------------------------------

    def prepare_batch(self, batch: dict) -> dict:
        """A batch that is still on the host with all that the step would otherwise have to ask the device for."""
        config = self.generator.config
        decoder_input_ids, targets = decoder_inputs_and_targets(batch["labels"], config)
        places = torch.arange(1, targets.shape[1] + 1)
        lengths = ((targets != config.pad_token_id) * places).amax(1).clamp(min=1).numpy()  # (B)
        prepared = {
            "decoder_input_ids": decoder_input_ids,
            "decoder_targets": targets,
            "decoder_lengths": lengths,
            "n_tokens": int(batch["attention_mask"].sum()),
        }
        if self.rag_loss and "contexts" not in batch:
            prepared |= self._on_the_host(batch)
        if self.device.type == "cuda":
            prepared |= {name: value.pin_memory() for name, value in prepared.items() if torch.is_tensor(value)}
        return batch | prepared

    def on_before_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        return self.prepare_batch(batch)

    def negative_log_likelihood(
        self,
        batch: dict,
        label_smoothing: float = 0.0,
        note_teacher: Callable[[Any], None] | None = None,
    ):
        """Loss of each example (B,), nats, and the contexts that were read (None without retrieval).

        Collective where the retriever's `retrieve` is: every rank calls this equally often.

        Args:
            batch: input_ids, attention_mask and labels (B, S), best as `prepare_batch` returned it.
            note_teacher: of a RAG model: is told what the retriever's own loss learns from (`Teacher`). The passages'
                scores then get no gradient of this loss.
        """
        if "decoder_targets" not in batch:
            batch = self.prepare_batch(move_data_to_device(batch, torch.device("cpu")))
            batch = move_data_to_device(batch, self.device)
        decoder_input_ids, targets = batch["decoder_input_ids"], batch["decoder_targets"]
        pad_token_id = self.generator.config.pad_token_id
        lengths = batch["decoder_lengths"]
        if not self.rag_loss and self.generator.config.is_encoder_decoder:
            logits = self.generator(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                decoder_input_ids=decoder_input_ids,
                use_cache=False,
            ).logits
            return sequence_nll(logits, targets, pad_token_id, label_smoothing), None
        contexts, nll, note_logprobs = None, rag_sequence_nll, None
        if self.rag_loss:
            contexts, nll = batch["contexts"].result() if "contexts" in batch else self._retrieve(batch), self.rag_loss
        if self.is_fused and contexts is not None:
            name = self.args.training.retriever_loss
            return fused_nll(self.generator, contexts, batch, label_smoothing, note_teacher, name), contexts
        if contexts is None:  # a question is its only passage
            prompts = batch["input_ids"], batch["attention_mask"]
            hidden, answers = answer_states(self.generator, *prompts, decoder_input_ids, decoder_lengths=lengths)
            scores = torch.zeros(len(targets), 1, device=targets.device)
        else:
            hidden, answers = answer_states(
                self.generator, contexts.input_ids, contexts.attention_mask, decoder_input_ids,
                lengths=contexts.lengths, heads=contexts.heads, decoder_lengths=lengths,
            )  # fmt: skip
            scores = contexts.doc_scores
            if note_teacher is not None:
                scores, note_logprobs = scores.detach(), partial(self._note_teacher, note_teacher, lengths)
        layer = output_layer(self.generator)
        return nll(hidden, layer, scores, targets, pad_token_id, label_smoothing, answers, note_logprobs), contexts

    def _note_teacher(self, note: Callable[[Teacher], None], lengths: np.ndarray, log_probs: torch.Tensor) -> None:
        per_token = isinstance(self.model, RagTokenForGeneration)
        note(Teacher(log_probs.detach(), to_device(lengths, self.device), per_token))

    def _step(self, batch: dict) -> tuple[torch.Tensor]:
        """The mean loss over a batch, nats. Collective where the retriever's `retrieve` is."""
        return (self.negative_log_likelihood(batch, self.args.model.label_smoothing)[0].mean(),)

    def _retrieve(self, batch: dict) -> RetrievedContexts:
        if "questions" not in batch:  # ahead of the batch's transfer
            batch = batch | self._on_the_host(batch)
        ids, mask = (to_device(batch[name], self.device) for name in ("input_ids", "attention_mask"))
        return retrieve_contexts(
            self.model.rag, self.retriever, ids, mask,
            texts=batch.get("source"), questions=batch["questions"], lengths=batch["question_lengths"],
            rescore=self.rescore,
        )  # fmt: skip

    def _on_the_host(self, batch: dict) -> dict[str, Any]:
        """What retrieval needs to know of the questions' tokens."""
        packs = self.packs_questions and not is_sharded(self.model)
        return {
            "questions": bare_questions(self.question_tokenizer, batch["input_ids"]),
            "question_lengths": right_padded_lengths(batch["attention_mask"]) if packs else None,
        }

    def can_prefetch(self, device: torch.device) -> bool:
        """Whether the next batch's passages are known before this step's update, and searching leaves the device free.

        On a CPU the two would share the cores: steps were measured to take 7% longer.
        """
        rescore, is_upr = self.rescore, self.args.retrieval.reranker == UPR  # whose generator changes at each step
        is_known = self.question_encoder_is_frozen and not is_upr and (rescore is None or not rescore.learns)
        return is_known and device.type != "cpu"

    def prefetch_retrieval(self, batch: dict) -> Future:
        """Retrieve for a batch in another thread, while the device works on the batch before.

        Collective where the retriever's `retrieve` is.
        """
        self.prefetching = self.thread.submit(self._retrieve_unobserved, batch)
        return self.prefetching

    @torch.no_grad()
    def _retrieve_unobserved(self, batch: dict) -> RetrievedContexts:
        """`_retrieve` without gradients, in the precision of a step: both belong to a thread."""
        precision = self.trainer.precision_plugin
        with precision.forward_context() if isinstance(precision, MixedPrecision) else nullcontext():
            return self._retrieve(batch)

    def on_train_batch_start(self, batch, batch_idx) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.counted_since is None:
            self.tokens, self.counted_since = 0, time.perf_counter()

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        """Mean over the examples, so that neither batch size nor number of ranks changes the size of a step."""
        losses, contexts = self._training_losses(batch)
        loss = losses.mean() * batch["loss_weight"]
        self.log("loss", self.note_losses(loss, losses, batch), prog_bar=True)
        self.tokens += int(batch["decoder_lengths"].sum()) + (
            batch["n_tokens"] if contexts is None else contexts.n_tokens
        )
        if contexts is not None:
            self._log_retrieval(batch, contexts)
        return loss

    def _training_losses(self, batch: dict) -> tuple[torch.Tensor, RetrievedContexts | None]:
        """The loss of each example (B,), nats: the answer's and, where the retriever has one of its own, that."""
        training, label_smoothing = self.args.training, self.args.model.label_smoothing
        if self.retriever_loss is None:
            return self.negative_log_likelihood(batch, label_smoothing)
        teachers: list[Any] = []
        nll, contexts = self.negative_log_likelihood(batch, label_smoothing, teachers.append)
        lesson = teachers[0], contexts.doc_scores, training.retriever_temperature, training.teacher_temperature
        losses = self.retriever_loss(*lesson)
        if self.is_log_step():
            logged = {"answer_loss": nll, "retriever_loss": losses}
            if training.retriever_loss != "emdr2":  # which has no temperature to be chosen
                logged["teacher_entropy"] = doc_entropy(taught(self.retriever_loss, *lesson).log())
            for name, own in logged.items():
                self.log(name, own.detach().mean() * batch["loss_weight"], sync_dist=True)
        return nll + training.retriever_loss_weight * losses, contexts

    def _log_retrieval(self, batch: dict, contexts: RetrievedContexts) -> None:
        """The signs of collapse, over the batch of all ranks. Collective."""
        if not self.is_log_step():
            return
        ids = zip(batch["index"], contexts.doc_ids.tolist(), strict=True)
        rows = self.gather_rows([{"index": index, "doc_ids": doc_ids} for index, doc_ids in ids])
        if (made := getattr(self.retriever, "contexts", 0)) > 0:  # of this rank, since the training began
            self.log("cut_contexts", self.retriever.cut_contexts / made)
        self.log("distinct_docs", distinct_share(np.array([row["doc_ids"] for row in rows])))
        self.log("doc_entropy", doc_entropy(contexts.doc_scores).mean() * batch["loss_weight"], sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if (made := getattr(self.retriever, "contexts", 0)) > 0:
            checkpoint["contexts"] = {"made": made, "cut": self.retriever.cut_contexts}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count on, so that a resumed run logs the shares that the unbroken one does."""
        super().on_load_checkpoint(checkpoint)
        if self.retriever is not None and (counts := checkpoint.get("contexts")):
            self.retriever.contexts, self.retriever.cut_contexts = counts["made"], counts["cut"]

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        is_logged = self.trainer.global_step % self.trainer.log_every_n_steps == 0
        if is_logged and not collects_gradients(self.trainer):
            assert self.counted_since is not None
            now = time.perf_counter()  # the device has just been waited for, to log this step
            self.log("tokens_per_second", self.tokens / (now - self.counted_since), sync_dist=True, reduce_fx="sum")
            self.tokens, self.counted_since = 0, now
        # Retriever and tokenizers serve one thread at a time, and a validation's workers are forked: with a tokenizer
        # that is at work in another thread, its lock would be copied as taken, for good.
        wait([self.prefetching] if self.prefetching else [])

    # --- Validation and test ------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.rows, self.counted_since = [], None  # the next training batch begins to count anew
        self.answering.clear()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self._measure(batch, self.args.data.val_max_target_length)

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self._measure(batch, self.args.data.test_max_target_length)

    def _measure(self, batch: dict, max_length: int) -> None:
        """Note loss, answer, EM and F1 of each example; passages are retrieved once for loss and answer."""
        nll, contexts = self.negative_log_likelihood(batch)
        started = time.perf_counter()
        token_ids = self._generate(batch, contexts, max_length)  # (B, T)
        seconds = (time.perf_counter() - started) / len(token_ids)
        lengths, losses = (token_ids != self.generator.config.pad_token_id).sum(1).tolist(), nll.tolist()
        entropies = None if contexts is None else doc_entropy(contexts.doc_scores).tolist()
        for i, answer in enumerate(self.ids_to_clean_text(token_ids)):  # one line each in test_generations.txt
            measures = self._best_measures(answer, batch["answers"][i] if "answers" in batch else [batch["target"][i]])
            row = {
                "index": batch["index"][i],
                "answer": answer,
                "avg_loss": losses[i],
                "avg_gen_time": seconds,
                "avg_gen_len": lengths[i],
            } | {f"avg_{name}": float(value) for name, value in measures.items()}
            if contexts is not None and entropies is not None:
                row["doc_ids"] = contexts.doc_ids[i].tolist()
                row["doc_entropy"] = entropies[i]
            self.rows.append(row)

    def _best_measures(self, answer: str, right_answers: list[str]) -> dict[str, float]:
        """Each measure against the right answer that is best for it."""
        each = [self.calc_generative_metrics([answer], [right]) for right in right_answers]
        return {name: max(measures[name] for measures in each) for name in each[0]}

    def _answering_model(self) -> PreTrainedModel:
        """The model; in mixed precision a copy with weights that need no casting, kept while they do not change."""
        kind = self.device.type
        if not torch.is_autocast_enabled(kind):
            return self.model
        if not self.answering:
            self.answering.append(answering_model(self.model, torch.get_autocast_dtype(kind)))
        return self.answering[0]

    def _generate(self, batch: dict, contexts: RetrievedContexts | None, max_length: int) -> torch.Tensor:
        lengths = {"min_length": 1, "max_length": max_length}
        settings: dict[str, Any] = {"num_beams": self.args.data.num_beams, **lengths, **FLAGS_DECIDE}
        model = self._answering_model()
        if contexts is None and not model.config.is_encoder_decoder:
            return answer_prompts(model, batch["input_ids"], batch["attention_mask"], **settings)
        if contexts is None:
            return model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
        return generate_answers(
            model,
            contexts.input_ids,
            contexts.attention_mask,
            contexts.doc_scores,
            n_docs=contexts.doc_scores.shape[1],
            heads=contexts.heads,
            **settings,
        )

    def on_validation_epoch_end(self) -> None:
        """`val_em` steers checkpoints and early stopping; a subclass may name another measure by `val_metric`."""
        self.answering.clear()
        rows = self.gather_rows(self.rows)
        metrics = means(rows, "val")
        self.measured = measured(metrics, len(rows), self.global_step, self.current_epoch)
        if self.trainer.is_global_zero and not math.isfinite(metrics["val_avg_loss"]):
            logger.warning(f"validation at step {self.trainer.global_step}: the loss is {metrics['val_avg_loss']}")
        self.log_dict({**metrics, f"val_{self.val_metric}": metrics[f"val_avg_{self.val_metric}"]}, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Write test_results.txt and test_generations.txt, the answers in the order of test.source."""
        self.answering.clear()
        rows = self.gather_rows(self.rows)
        metrics = means(rows, "test")
        self.log_dict(metrics, sync_dist=True)
        if self.trainer.is_global_zero:
            lines = [f"{name}: {value:.6f}" for name, value in metrics.items()]
            write_lines(lines, self.output_dir / "test_results.txt")
            write_lines([row["answer"] for row in rows], self.output_dir / "test_generations.txt")

    def export(self, folder: str | Path) -> None:
        """Write model and tokenizer in Hugging Face format, for `from_pretrained` and `eval_rag.py`.

        Of a model with adapters, or with a frozen generator, what learned alone (`rag.models.bases`), for `load_model`.

        A fast tokenizer also saves how it padded and cut last, which is no property of the model: that is left out.
        """
        for tokenizer in (self.question_tokenizer, self.answer_tokenizer):
            if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
                backend.no_padding()
                backend.no_truncation()
        save_model(self.model, folder, self.tokenizer, self.base, making_of(self))
        if self.context_encoder is not None:
            save_context_encoder(self.context_encoder, self.context_tokenizer, Path(folder) / CONTEXT_ENCODER)

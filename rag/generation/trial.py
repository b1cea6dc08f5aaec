"""Whether a loaded model runs at all: what is wrong with its settings of dropout, heads, tokens or search shows there.

    require_runs(model, tokenizer, "--model_name_or_path path", num_beams=4, train=True)

transformers checks few of the settings in a checkpoint; the others would end the first batch, when files are written.
"""

from typing import Any

import torch
from transformers import PreTrainedModel, RagConfig

from rag.errors import UserError, one_line
from rag.generation.causal_decoder import CausalDecoder
from rag.generation.decoding import answer_prompts, generate_answers
from rag.generation.forward import answer_states, full_precision, output_layer

# What a checkpoint's generation settings do not decide here: lengths are the flags', and one answer is wanted.
FLAGS_DECIDE: dict[str, Any] = {
    "num_return_sequences": 1, "max_new_tokens": None, "min_new_tokens": None, "return_dict_in_generate": False,
}  # fmt: skip
LARGEST_PENALTY = 100  # on length: an exponent, of which Python would take whole powers without end
# Their attention becomes another, for good, at the first text that is short.
NOT_TRIED = {"big_bird", "bigbird_pegasus"}
TEXT = "a ?"


def require_runs(
    model: PreTrainedModel, tokenizer: Any, source: str, *, answers: bool = True, train: bool = False, **settings: Any
) -> None:
    """Run every part of a model on a text of two words; the model and torch's random numbers stay as they are.

    Args:
        tokenizer: a `RagTokenizer` for a RAG model.
        source: the flag that named the model, and its value.
        answers: run the generator, too.
        train: as in training, with dropout.
        settings: of `generate`, but for the lengths.

    Raises:
        UserError: one fails, or a question's vector or a word's score is no number.
    """
    settings = FLAGS_DECIDE | settings | {"min_length": 1, "max_length": 3}
    rag = isinstance(model.config, RagConfig)
    generator = model.generator if rag else model
    try:
        penalty = generator.generation_config.length_penalty
        if penalty is not None and not (isinstance(penalty, int | float) and abs(penalty) <= LARGEST_PENALTY):
            raise ValueError(f"length_penalty {penalty!r} is no penalty")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model.train(train)
            if rag and _is_tried(model.question_encoder):
                ids, mask = _tokens(tokenizer.question_encoder, model.question_encoder)
                _require_numbers(model.question_encoder(ids, attention_mask=mask)[0].isfinite(), "a question's vector")
            if answers and _is_tried(generator):
                ids, mask = _tokens(tokenizer.generator if rag else tokenizer, generator)
                _require_numbers(~generator(ids, attention_mask=mask, labels=ids).logits.isnan(), "a word's score")
                model.eval()
                if not generator.config.is_encoder_decoder:
                    _require_same_words(generator, ids, mask)
                if rag:
                    generate_answers(model, ids, mask, torch.zeros(1, 1, device=ids.device), n_docs=1, **settings)
                elif generator.config.is_encoder_decoder:
                    model.generate(ids, attention_mask=mask, **settings)
                else:
                    answer_prompts(model, ids, mask, **settings)
    except Exception as error:  # each family and each setting in its own way
        reason = one_line(error, 200) or type(error).__name__
        raise UserError(
            f"{source}: the model cannot be run with the settings in its config.json and generation_config.json "
            f"({reason}); correct them, or give another checkpoint"
        ) from error
    finally:
        model.eval()


def _is_tried(part: PreTrainedModel) -> bool:
    return part.config.model_type not in NOT_TRIED


def _tokens(tokenizer: Any, part: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, (1, S)."""
    tokens = tokenizer(TEXT, return_tensors="pt").to(part.device)
    return tokens["input_ids"], tokens["attention_mask"]


def _require_same_words(generator: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Whether a language model says the same read our ways, which see its layers and its output layer alone."""
    start = torch.full_like(ids[:, :1], generator.config.decoder_start_token_id)
    whole, whole_mask = torch.cat([ids, start], 1), torch.cat([mask, torch.ones_like(start)], 1)
    expected = full_precision(generator(whole, attention_mask=whole_mask).logits[:, -1])
    trained, _ = answer_states(generator, ids, mask, start)
    answered = CausalDecoder(generator).read(ids, mask).root
    rounding = 0.05 if trained.dtype in (torch.bfloat16, torch.float16) else 1e-3
    for hidden in (trained, answered):
        found = full_precision(torch.nn.functional.linear(hidden, *output_layer(generator)))
        if not torch.allclose(found, expected, rtol=0, atol=rounding * float(expected.abs().max())):
            raise ValueError(
                f"a {generator.config.model_type} model scales its scores, or attends, in a way that is not known here"
            )


def _require_numbers(are_numbers: torch.Tensor, what: str) -> None:
    if not are_numbers.all():
        raise ValueError(f"{what} is NaN or infinite")

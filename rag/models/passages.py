"""How an encoder reads passages: what is put before them, how they are cut into tokens, and how many it can read.

reader = PassageReader(encoder, tokenizer)
tokens = reader.tokenize([("Oslo", "Oslo is in Norway."), ...])      # {"input_ids": [[...], ...], ...}
"""

from typing import Any

from transformers import PreTrainedModel

from rag.errors import UserError, is_failure, one_line
from rag.models.limits import most_tokens

# What a tokenizer that knows of no limit says, and the tokens that are read where nothing names one: most encoders'.
ANY_LENGTH, TOKENS_OF_NO_LIMIT = int(1e30), 512

CONTEXT_ENCODER_FLAG = "--dpr_ctx_encoder_model_name"  # of use_own_knowledge_dataset.py

Passages = list[tuple[str, str]]  # titles and texts

FITTING = "put the tokenizer beside the encoder that belongs to it"


class PassageReader:
    """Turns (title, text) into tokens.

    A DPR encoder reads title and text as a pair, as it was trained to; any other reads "title text": sentence encoders
    were trained on plain text (MiniLM, nq_gold, 500 questions: gold passage first 0.900, as a pair 0.888).

    Args:
        flag: the one that gave the encoder, for the messages.

    Attributes:
        max_length: tokens an encoder can read; longer passages are cut.
        prompt: text before every passage.
        lower_case: whether passages are lower-cased first.
    """

    def __init__(self, encoder: PreTrainedModel, tokenizer, flag: str = CONTEXT_ENCODER_FLAG):
        self.tokenizer, self.flag = tokenizer, flag
        self.as_pair = encoder.config.model_type == "dpr"
        backbone = encoder.config if self.as_pair else encoder.config.backbone
        own = getattr(encoder.config, "max_seq_length", None) or ANY_LENGTH
        self.max_length = min(tokenizer.model_max_length, most_tokens(backbone) or ANY_LENGTH, own)
        if self.max_length == ANY_LENGTH:  # nothing names a limit
            self.max_length = TOKENS_OF_NO_LIMIT
        if self.max_length < 1:
            raise UserError(f"{flag}: its tokenizer says model_max_length {self.max_length}; mend it there")
        self.prompt = getattr(encoder.config, "passage_prompt", "")
        if self.prompt and len(tokenizer(self.prompt)["input_ids"]) >= self.max_length:
            raise UserError(
                f"{flag}: the passage prompt {self.prompt[:80]!r} leaves no room for a passage in the "
                f"encoder's {self.max_length} tokens; give another encoder"
            )
        self.lower_case = getattr(encoder.config, "lower_case", False)
        # Each batch is padded on its own, after all were tokenized to be sorted: the slower way, which it warns of.
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True

    def description(self) -> dict[str, Any]:
        """Fields of `IndexDescription`: what bears on the vectors beside the encoder's weights and their precision."""
        return {
            "input": "title, text" if self.as_pair else "title text",
            "passage_prompt": self.prompt,
            "max_length": self.max_length,
        }

    def tokenize(self, passages: Passages) -> dict[str, list[list[int]]]:
        """The encoder's inputs by name, a list for each passage.

        Raises:
            UserError: the tokenizer cannot read them.
        """
        texts: list[str] | None
        if self.as_pair:
            titles, texts = map(list, zip(*passages, strict=True))
        else:
            titles, texts = [self.prompt + f"{title} {text}".strip() for title, text in passages], None
            if self.lower_case:
                titles = [title.lower() for title in titles]
        try:
            # DPR was trained, and the public suite embeds, without telling title and text apart by token types.
            return self.tokenizer(
                titles, texts, truncation=True, max_length=self.max_length, return_token_type_ids=False
            )
        except BaseException as error:  # the tokenizers package has no class of its own for it
            if not is_failure(error):
                raise
            reason = one_line(error, 120)
            raise UserError(f"{self.flag}: its tokenizer cannot read the passages ({reason}); {FITTING}") from error

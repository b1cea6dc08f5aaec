"""Which families of generators answer in a RAG model, and how.

    require_family(config.generator, "--generator_name_or_path path/to/model")

BART's and T5's decoders are run over trees of tokens (token_trees.py). The others run as transformers wrote them, to
the same results: each is compared with transformers' own RAG models in tests/generation/test_families.py. What is not
listed is refused before anything is made of it. Causal language models are not listed: each is tried when it is loaded
(trial.py), and refused where its layers cannot be told what they attend to.
"""

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from rag.errors import UserError

# Contexts are encoded from embeddings, in groups of similar length, and answers decoded as trees.
FAST = ("bart", "t5", "mt5")
# Contexts are encoded from token ids, all at the length of the longest, and answers decoded as whole sequences.
PLAIN = (
    "bigbird_pegasus", "blenderbot", "blenderbot-small", "led", "longt5", "m2m_100", "marian", "mbart", "mvp",
    "pegasus", "pegasus_x", "plbart", "umt5",
)  # fmt: skip


def require_family(config: Any, source: str) -> None:
    """Raise `UserError` unless a generator with this config can be part of a RAG model.

    Args:
        source: the flag that named it, and its value.
    """
    kind = type(config)
    is_causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    if config.model_type not in FAST + PLAIN and (config.is_encoder_decoder or not is_causal):
        raise UserError(
            f"{source}: a {config.model_type} model cannot be a RAG model's generator; give a causal language model "
            f"(llama, qwen3, ...) or one of {', '.join(sorted(FAST + PLAIN))}"
        )

"""A generator's weights in 4 or 8 bits by bitsandbytes, frozen, on a GPU: what LoRA's adapters are trained beside.

    kwargs = quantized_loading("4bit", config)      # of from_pretrained

4 bits are NormalFloat4 with quantized scales (Dettmers et al. 2023, QLoRA), multiplied in bfloat16; 8 bits LLM.int8().
Embeddings, norms, the output layer and the question encoder keep their precision.
"""

import importlib.util
import os
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, RagConfig

KINDS = ("4bit", "8bit")
PACKAGES = ("bitsandbytes", "accelerate")
# By the names that transformers' generators have for their output layers.
OUTPUT_LAYERS = ["lm_head", "output_projection", "embed_out", "output_layer"]


def quantization_problems(kind: str | None, on_cpu: bool) -> list[str]:
    """Why weights cannot be quantized here: a list of none or one line."""
    if kind is None:
        return []
    if on_cpu:
        return [f"--load_in_{kind}: such weights are multiplied by a CUDA GPU, and none is used here; leave it out"]
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return (
        [f"--load_in_{kind} needs packages that are not installed: pip install {' '.join(missing)}"] if missing else []
    )


def quantized_loading(kind: str | None, config: PreTrainedConfig) -> dict[str, Any]:
    """The keyword arguments of `from_pretrained` that have it quantize a generator; none where `kind` is None.

    Args:
        config: of the generator, or of a RAG model, whose generator alone is quantized.
    """
    if kind is None:
        return {}
    assert kind in KINDS, kind
    return {"quantization_config": quantization_config(kind, config), "device_map": {"": own_gpu()}}


def quantization_config(kind: str, config: PreTrainedConfig) -> BitsAndBytesConfig:
    """transformers' settings of bitsandbytes."""
    kept = [*OUTPUT_LAYERS, *(["rag.question_encoder", "question_encoder"] if isinstance(config, RagConfig) else [])]
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=kept,
    )


def own_gpu() -> int:
    """The GPU of this rank of a job, as its launcher numbers it."""
    return int(os.environ.get("LOCAL_RANK", 0)) % max(torch.cuda.device_count(), 1)

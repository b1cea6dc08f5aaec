"""A model for answering alone, in half precision, beside the one that is trained.

    answering = answering_model(model, torch.bfloat16)      # once, before a validation
    token_ids = generate_answers(answering, ...)

Its generator's weights are cast once. Autocast would cast the weights of the model itself at their uses.
"""

import copy

import torch
from transformers import PreTrainedModel, RagConfig


def answering_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a model in evaluation mode whose generator's weights are in `dtype`, without gradients.

    A RAG model's copy shares question encoder and retriever with it; a bare generator is copied whole. Nothing of the
    model itself is changed; what it learns afterwards the copy does not know. Weights that are in `dtype` are shared.
    """
    rag = model.rag if isinstance(model.config, RagConfig) else None
    generator = model if rag is None else rag.generator
    # What `deepcopy` finds here it does not copy: neither large tensors twice, nor what is shared at all.
    copies: dict[int, object] = {}
    quantized = [part for part in generator.modules() if any(map(_is_packed, part.parameters(recurse=False)))]
    copies |= {id(part): part for part in quantized}
    for weight in (weight for weight in generator.parameters() if not _is_packed(weight)):
        copies[id(weight)] = torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    for buffer in generator.buffers():
        copies[id(buffer)] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    if rag is not None:
        shared = (rag.question_encoder, rag.retriever, rag.ctx_encoder)
        copies |= {id(part): part for part in shared if part is not None}
    answering = copy.deepcopy(model, copies)
    if rag is None:
        return answering.eval()
    answering.rag.generator.eval()
    answering.training = answering.rag.training = False  # the shared question encoder goes on as it is
    return answering


def _is_packed(weight: torch.Tensor) -> bool:
    """Whether it is quantized: of no use in another dtype."""
    return not weight.is_floating_point()

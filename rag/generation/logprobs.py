"""Log-probabilities of given words, without logits of all words.

    logprobs, normalizers = target_logprobs(hidden, *output_layer(generator), targets)       # (N, T), nats

Logits (N * T, V) are made for a part of the vocabulary at a time, in training, in its backward pass and in scoring.
"""

import torch

from rag.generation.forward import CHUNK_VOCABULARY, full_precision
from rag.packing import Packing


def target_logprobs(hidden, weight, bias, targets, answers: Packing | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and the log-normalizer of its distribution, both (N, T) float32; 0 as padding.

    The logits (N, T, V) never exist in whole: they are made for a part of the vocabulary at a time, and once more in
    the backward pass.

    Args:
        hidden: (N, T, d), or (R, d) where `answers` says which.
        weight: (V, d).
        bias: (V).
        targets: (N, T) int64.
    """
    own_targets = targets.flatten() if answers is None else answers.pack(targets)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (hidden, weight))
    with torch.autocast(device, enabled=False):
        rows = hidden if hidden.dim() == 2 else hidden.flatten(0, 1)
        logprobs, normalizers = _TargetLogprobs.apply(rows, weight, bias.to(weight), own_targets)
    if answers is None:
        return logprobs.view(targets.shape), normalizers.view(targets.shape)
    return answers.unpack(logprobs, targets.shape[1]), answers.unpack(normalizers, targets.shape[1])


class _TargetLogprobs(torch.autograd.Function):
    """hidden (R, d), weight (V, d), bias (V), targets (R) to log-probabilities (R) and log-normalizers (R).

    Of a frozen output layer the backward pass needs the words' mean by their probabilities alone, (R, d): it is summed
    beside the normalizer, and the logits are not made again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        target_logits = full_precision(hidden.new_zeros(len(hidden)))
        normalizers = []
        is_frozen = ctx.needs_input_grad[:3] == (True, False, False)
        means, so_far = full_precision(torch.zeros_like(hidden)), target_logits.new_full((len(hidden), 1), -torch.inf)
        for logits, place, is_here, words in _parts_of_logits(hidden, weight, bias, targets):
            target_logits += logits.gather(1, place).squeeze(1).masked_fill(~is_here, 0.0)
            highest = logits.amax(1, keepdim=True)
            # In place, where logsumexp would make a copy and, on a CPU, take several times as long.
            normalizers.append(logits.sub_(highest).exp_().sum(1).log_() + highest.squeeze(1))
            if is_frozen:
                highest, before = torch.maximum(highest, so_far), highest
                means.mul_((so_far - highest).exp_())
                means.addcmul_(full_precision(logits.to(hidden.dtype) @ weight[words]), (before - highest).exp_())
                so_far = highest
        normalizer = torch.stack(normalizers).logsumexp(0)
        if is_frozen:
            means.mul_((so_far - normalizer.unsqueeze(1)).exp_())
        ctx.is_frozen = is_frozen
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, means)
        return target_logits - normalizer, normalizer

    @staticmethod
    def backward(ctx, logprob_gradient, normalizer_gradient):
        """d logprob / d logit is 1 at the target less the probability, d normalizer / d logit the probability."""
        hidden, weight, bias, targets, normalizer, means = ctx.saved_tensors
        if ctx.is_frozen:
            gradient = means * (normalizer_gradient - logprob_gradient).unsqueeze(1)
            gradient.addcmul_(full_precision(weight[targets]), logprob_gradient.unsqueeze(1))
            return gradient.to(hidden.dtype), None, None, None
        hidden_gradient = full_precision(torch.zeros_like(hidden))
        weight_gradient = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        bias_gradient = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        for logits, place, is_here, words in _parts_of_logits(hidden, weight, bias, targets):
            probabilities = logits.sub_(normalizer.unsqueeze(1)).exp_()
            gradient = probabilities.mul_((normalizer_gradient - logprob_gradient).unsqueeze(1))
            gradient.scatter_add_(1, place, logprob_gradient.masked_fill(~is_here, 0.0).unsqueeze(1))
            if bias_gradient is not None:
                bias_gradient[words] = gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            hidden_gradient += gradient @ weight[words]
            if weight_gradient is not None:
                torch.mm(gradient.T, hidden, out=weight_gradient[words])
        return hidden_gradient.to(hidden.dtype), weight_gradient, bias_gradient, None


def words_at_a_time(rows: int, device: torch.device) -> int:
    """How many words' logits of `rows` are made in one pass: few for a CPU's caches, what 512 MiB hold elsewhere."""
    return CHUNK_VOCABULARY if device.type == "cpu" else max(CHUNK_VOCABULARY, 2**27 // max(rows, 1))


def _parts_of_logits(hidden, weight, bias, targets):
    """Logits (R, C) float32 of C words at a time, each row's target among these (R, 1), whether it is there, and which
    words they are."""
    step = words_at_a_time(len(hidden), hidden.device)
    for start in range(0, len(weight), step):
        words = slice(start, min(start + step, len(weight)))
        logits = full_precision(torch.addmm(bias[words], hidden, weight[words].T))
        is_here = (targets >= words.start) & (targets < words.stop)
        yield logits, (targets - start).clamp(0, words.stop - start - 1).unsqueeze(1), is_here, words

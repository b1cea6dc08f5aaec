"""Steps whose loss or gradients are not finite: found before they change a weight, told with their questions.

step = OptimizerStep()
step.add(mean_loss, nll, batch["index"], batch["source"])    # each batch whose gradients it collects
if not step.is_finite(gradient_norm): ...                    # waits for the device
optimizer.found_inf = pending.add(7, step, gradient_norm)    # does not: the device leaves the step out by itself
for number, step, norm in pending.left_out(): ...            # later
"""

import math
from typing import Any

import torch
from torch.nn.utils import get_total_norm

from rag.errors import ReportedError, UserError
from rag.training.sharding import local_part

QUESTIONS_TOLD = 3
CHARACTERS_TOLD = 80  # of a question


class NonFiniteError(UserError):
    """A step had a loss or gradients that are not finite; the weights are as they were before it."""


class NonFiniteElsewhereError(NonFiniteError, ReportedError):
    """The same, on a rank that leaves it to rank 0 to say so."""


class LeftOutError(NonFiniteError):
    """An earlier step had; the device left it out, and the weights are as if its examples had not been there."""


class LeftOutElsewhereError(LeftOutError, ReportedError):
    """The same, on a rank that leaves it to rank 0 to say so."""


ELSEWHERE = {NonFiniteError: NonFiniteElsewhereError, LeftOutError: LeftOutElsewhereError}


class OptimizerStep:
    """The losses of the batches whose gradients one optimizer step collects, on their device until they are asked."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.examples: list[tuple[torch.Tensor, list[int], list[str]]] = []

    def add(
        self, mean_loss: torch.Tensor, nll: torch.Tensor, indexes: list[int] | None, questions: list[str] | None
    ) -> None:
        """Note a batch.

        Args:
            mean_loss: a number, the same on every rank.
            nll: the loss of each example (B,).
            indexes: of the examples, which other code's batches may lack, as their questions.
        """
        self.losses.append(mean_loss.detach().float())
        if indexes is not None and questions is not None:
            self.examples.append((nll.detach(), indexes, questions))

    def is_finite(self, norm: torch.Tensor | None) -> bool:
        """Whether the mean losses, and the gradients' norm if it is given, are; waits for the device, once."""
        return bool(self.finiteness(norm))

    def finiteness(self, norm: torch.Tensor | None) -> torch.Tensor:
        """The same as a bool on the device, which is not waited for."""
        values = self.losses + ([] if norm is None else [norm.detach().float()])
        return torch.stack(values).isfinite().all() if values else torch.tensor(True)

    def rows(self) -> list[dict[str, Any]]:
        """This rank's examples whose loss is not finite, or all where each is: "index" and "question"."""
        every = [
            {"index": index, "question": question, "is_finite": math.isfinite(loss)}
            for nll, indexes, questions in self.examples
            for loss, index, question in zip(nll.tolist(), indexes, questions, strict=True)
        ]
        return [row for row in every if not row["is_finite"]] or every

    def description(self, norm: torch.Tensor | None, rows: list[dict[str, Any]]) -> str:
        """What is not finite, and the questions of the examples whose loss is not; else those of all of them.

        Args:
            rows: of all ranks.
        """
        losses = [loss for loss in map(float, self.losses) if not math.isfinite(loss)]
        what = f"the loss is {losses[0]}" if losses else f"the gradients' norm is {float(norm or 0)}"
        worst = [row for row in rows if not row["is_finite"]] or rows
        told = [repr(row["question"][:CHARACTERS_TOLD]) for row in worst[:QUESTIONS_TOLD]]
        more = f" and {len(worst) - len(told)} more" if len(worst) > len(told) else ""
        return what + (f" (questions: {', '.join(told)}{more})" if told else "")


class PendingSteps:
    """Optimizer steps of which the device knows whether they are finite, and this process does not yet."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, OptimizerStep, torch.Tensor | None, torch.Tensor]] = []

    def add(self, number: int, step: OptimizerStep, norm: torch.Tensor | None) -> torch.Tensor:
        """Note a step; 1.0 on the device if it is to be left out, else 0.0: what fused optimizers call `found_inf`."""
        is_finite = step.finiteness(norm)
        self.steps.append((number, step, norm, is_finite))
        return (~is_finite).float()

    def left_out(self) -> list[tuple[int, OptimizerStep, torch.Tensor | None]]:
        """Those noted since the last call that were not finite, with their numbers and norms; one read."""
        steps, self.steps = self.steps, []
        if not steps:
            return []
        are_finite = torch.stack([is_finite for *_, is_finite in steps]).tolist()
        return [step[:3] for step, is_finite in zip(steps, are_finite, strict=True) if not is_finite]


def gradient_norm(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """The norm of all gradients together."""
    return get_total_norm([parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None])


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def weights_are_finite(module: torch.nn.Module) -> bool:
    """Whether every weight of a module is, of a sharded one this rank's part; one pass over them."""
    weights = [local_part(weight.detach()) for weight in module.parameters() if weight.is_floating_point()]
    return bool(get_total_norm([weight for weight in weights if weight.numel()], math.inf).isfinite())

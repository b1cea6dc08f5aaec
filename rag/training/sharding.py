"""`--strategy fsdp`: each rank holds a slice of every weight that learns, of its gradient and of its moments (FSDP2).

    register_sharding()
    trainer = pl.Trainer(strategy=SHARDED)   # as lightning_base.build_trainer does

In a step the ranks gather the weights of one transformer layer after the other, forward and backward, and each keeps
its slice of the mean gradient; all else that learns (embeddings, the output layer) is gathered for the whole step. So
**every rank calls each layer as a module and equally often in a step**. What is frozen is whole on every rank: a frozen
question encoder may be asked by another thread. Validation and test do not keep step (answers have lengths of their
own): for them every rank holds the whole weights once, without gradients and moments. Checkpoints are those of any
other strategy, so that a run may be resumed by another number of ranks.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry
from pytorch_lightning.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rag.errors import UserError
from rag.generation.stacks import is_sharded

SHARDED = "fully_sharded"  # Lightning keeps the name fsdp for a strategy of its own, of the first edition, on GPUs only


def register_sharding() -> None:
    """Have Lightning know the strategy by name."""
    StrategyRegistry.register(SHARDED, ShardedStrategy, "weights, gradients and moments in slices", override=True)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it: its slice, which may be empty, or all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it. Collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class ShardedStrategy(DDPStrategy):
    """FSDP2 over all ranks, which meet, reduce and broadcast as those of `DDPStrategy` do."""

    stand_in: "StandIn | None" = None

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the module that is to be trained, whose weights are those that it starts from. Collective."""
        self.accelerator.setup(trainer)
        module = self.lightning_module
        self.precision_plugin.convert_module(module)
        if trainer.state.fn == TrainerFn.FITTING and not is_sharded(module):
            self.stand_in = StandIn(module)
            shard(module, init_device_mesh(self.root_device.type, (self.world_size,)))
        assert self.stand_in is not None or not is_sharded(module), "another Trainer has sharded this module"
        self.model_to_device()  # what is not sharded
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def teardown(self) -> None:
        """As its parents, which move the weights to the CPU, too; slices belong to the devices of their mesh."""
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator, self.checkpoint_io):
            part.teardown()

    # --- Validation and test ------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Collective."""
        if self.stand_in is not None:
            self.stand_in.enter()

    def on_validation_end(self) -> None:
        """Behind the callbacks' hooks, so that the best weights are exported whole."""
        if self.stand_in is not None:
            self.stand_in.leave()

    on_test_start, on_test_end = on_validation_start, on_validation_end

    @contextmanager
    def holding(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Have this rank's module hold other weights, all of them by their names. Not collective."""
        assert self.stand_in is not None
        self.stand_in.enter(weights)
        try:
            yield
        finally:
            self.stand_in.leave()

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on rank 0, none on the others. Collective."""
        gathered: dict[int, Any] = {}  # once, what has several names
        state = {}
        for name, weight in self.lightning_module.state_dict(keep_vars=True).items():
            if id(weight) not in gathered:
                gathered[id(weight)] = self._for_rank_zero(weight)
            state[name] = gathered[id(weight)]
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole moments on rank 0, none on the others. Collective."""
        state = super().optimizer_state(optimizer)
        of_weights = {
            index: {name: self._for_rank_zero(value) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": of_weights if self.is_global_zero else {}}

    def _for_rank_zero(self, value: Any) -> Any:
        """Collective. The slices are gathered one weight after the other, so that a device holds little of them."""
        if not isinstance(value, torch.Tensor):
            return value
        value, was_sharded = whole(value.detach()), isinstance(value, DTensor)
        return value.cpu() if was_sharded and self.is_global_zero else value

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's slices of whole weights; not collective."""
        own = self.lightning_module.state_dict()
        state = {name: _slice_of(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        super().load_model_state_dict({"state_dict": state}, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's slices of whole moments; not collective."""
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            of_weights = {
                index: {name: _slice_of(value, weights[index]) for name, value in values.items()}
                for index, values in state["state"].items()
            }
            states.append({**state, "state": of_weights})
        super().load_optimizer_state_dict({"optimizer_states": states})


def _slice_of(value: Any, like: Any) -> Any:
    """This rank's slice of a whole tensor, where one of that shape is sharded; else the value as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard(module: pl.LightningModule, mesh: DeviceMesh) -> None:
    """Leave each rank of a mesh with its slice of what learns; what is frozen stays as it is."""
    dropping = [part for part in module.modules() if getattr(part, "layerdrop", 0)]
    if dropping:
        raise UserError(
            f"--strategy fsdp: {type(dropping[0]).__name__} leaves out layers ({dropping[0].layerdrop:g} of them), and "
            "no rank knows which ones another has left out; give --encoder_layerdrop 0 --decoder_layerdrop 0, or "
            "--strategy ddp_find_unused_parameters_true"
        )
    frozen = {weight for weight in module.parameters() if not weight.requires_grad}
    sharded = [fully_shard(part, mesh=mesh, ignored_params=frozen) for part in [*_layers_of(module), module]]
    for part in sharded:
        part.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")  # gloo has no mean
    register_fsdp_forward_method(module, "training_step")


def _layers_of(module: nn.Module) -> list[nn.Module]:
    """The outermost elements of lists of modules that learn and share no weight with any other part."""
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        names_of.setdefault(weight, []).append(name)
    shared = {weight for weight, names in names_of.items() if len(names) > 1}
    layers: list[nn.Module] = []

    def visit(part: nn.Module) -> None:
        for child in part.children():
            if not isinstance(part, nn.ModuleList):
                visit(child)
            elif not shared.intersection(child.parameters()) and any(w.requires_grad for w in child.parameters()):
                layers.append(child)

    visit(module)
    return layers


class StandIn:
    """The parts of a module that learn, with whole weights, which take the place of the sharded ones for a while.

    A plain model, so that generation and export know nothing of slices. Between whiles it has no memory for what is
    sharded; what is frozen is the same in both.

    Args:
        module: not sharded yet.
    """

    def __init__(self, module: pl.LightningModule):
        self.module = module
        self.sharded = {
            name: part for name, part in module.named_children() if any(w.requires_grad for w in part.parameters())
        }
        known: dict[int, Any] = {id(weight): _without_memory(weight) for weight in module.parameters()}
        if (retriever := getattr(module, "retriever", None)) is not None:
            known[id(retriever)] = retriever  # of which there is one
        self.parts = copy.deepcopy(self.sharded, known)

    def enter(self, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Take the place, with the ranks' weights. Collective, unless other weights are given, by their names."""
        with torch.inference_mode(False), torch.no_grad():
            for name, part in self.sharded.items():
                whole_of = (lambda name, _: weights[name]) if weights is not None else (lambda _, weight: whole(weight))
                _copy_weights(part, self.parts[name], f"{name}.", whole_of)
                self.parts[name].eval()
                setattr(self.module, name, self.parts[name])

    def leave(self) -> None:
        """Give the place back, and the memory."""
        for name, part in self.sharded.items():
            setattr(self.module, name, part)
            self.parts[name].to("meta")


def _without_memory(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)


def _copy_weights(source: nn.Module, target: nn.Module, prefix: str, whole_of: Callable[..., torch.Tensor]) -> None:
    """Have a copy of a module hold its weights, whole, those that have several names once, and its buffers."""
    copies: dict[int, nn.Parameter] = {}
    for place, part in source.named_modules():
        its_copy = target.get_submodule(place)
        for name, weight in part.named_parameters(recurse=False, remove_duplicate=False):
            if id(weight) not in copies:
                full_name = ".".join(filter(None, (prefix.rstrip("."), place, name)))
                tensor = whole_of(full_name, weight.detach()).to(weight.device)
                copies[id(weight)] = nn.Parameter(tensor, requires_grad=False)
            setattr(its_copy, name, copies[id(weight)])
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            setattr(its_copy, name, buffer)

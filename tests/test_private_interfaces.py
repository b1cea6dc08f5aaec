"""What the project uses of libraries beyond their public interface: a row says which library moved what.

All versions are pinned, so that at an upgrade these tests say what moved, before something else fails in an odd place.
A row finds the code that it is about by tokens: `parts._of_a_name`, "def name" of an overridden method, "name=" of a
keyword argument, "'text'" of a string. Each stands in one file of the project. A new private use needs a new row.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from tests.product_tokens import names_of_product, places_of, tokens_of_product

DOCUMENTED = {"os._exit"}  # not private, whatever its name


@dataclass(frozen=True)
class Row:
    library: str
    name: str  # what may move
    tokens: tuple[str, ...]
    check: Callable[[Path], None]  # is given an empty folder; raises where something moved


ROWS: list[Row] = []


def row(library: str, name: str, *tokens: str):
    """Register a check as a row."""

    def register(check: Callable[[Path], None]) -> Callable[[Path], None]:
        ROWS.append(Row(library, name, tokens, check))
        return check

    return register


def require(condition: object, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def require_parameters(function: Callable, *names: str) -> None:
    """Fail where the function has no parameters of these names."""
    missing = [name for name in names if name not in inspect.signature(function).parameters]
    require(not missing, f"it has no parameter {', '.join(missing)}")


# --- transformers -----------------------------------------------------------------------------------------------------


@row("transformers", "PreTrainedConfig._attn_implementation", "config._attn_implementation")
def _(folder):
    from transformers import BartConfig

    config = BartConfig(attn_implementation="sdpa")
    require(config._attn_implementation == "sdpa", "it does not name the attention that was chosen")
    config._attn_implementation = "eager"
    require("eager" not in config.to_json_string(), "it is written into config.json")


@row("transformers", "GenerationMixin._prepare_generation_config", "_prepare_generation_config")
def _(folder):
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 4, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    model = BartForConditionalGeneration(BartConfig(vocab_size=8, max_position_embeddings=8, **sizes, **heads))
    config, unknown = model._prepare_generation_config(None, num_beams=3, no_such_setting=1)
    require(config.num_beams == 3, "it does not take over the settings")
    require(config.length_penalty == 1.0, "it does not fill in the defaults")
    require(unknown == {"no_such_setting": 1}, "it does not return the unknown settings")


@row("transformers", "GenerationMixin._prepare_special_tokens", "_prepare_special_tokens")
def _(folder):
    from transformers import GenerationMixin

    parameters = list(inspect.signature(GenerationMixin._prepare_special_tokens).parameters)
    expected = ["self", "generation_config", "kwargs_has_attention_mask", "device"]
    require(parameters[:4] == expected, f"its parameters are {parameters}")


@row("transformers", "GenerationMixin._get_logits_processor", "_get_logits_processor")
def _(folder):
    from transformers import GenerationMixin

    names = ("generation_config", "input_ids_seq_length", "encoder_input_ids", "logits_processor", "device")
    require_parameters(GenerationMixin._get_logits_processor, *names)


@row("transformers", "cached_file(_raise_exceptions_for_...)",
     "_raise_exceptions_for_missing_entries=", "_raise_exceptions_for_connection_errors=")  # fmt: skip
def _(folder):
    from transformers.utils.hub import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    for path in (str(folder), "no/checkpoint"):
        found = cached_file(path, "none.json", cache_dir=str(folder), local_files_only=True, **quiet)
        require(found is None, f"a missing file of {path} is {found}")


@row("transformers", "hf_argparser.py, which loads without the package", "'hf_argparser.py'")
def _(folder):
    package = importlib.util.find_spec("transformers").submodule_search_locations[0]
    tree = ast.parse(Path(package, "hf_argparser.py").read_text(encoding="utf-8"))
    relative = [ast.unparse(node) for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    require(not relative, f"it now has {relative}")
    parser = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "HfArgumentParser")
    methods = {node.name for node in parser.body if isinstance(node, ast.FunctionDef)}
    require("parse_args_into_dataclasses" in methods, f"the parser's methods are {sorted(methods)}")


@row("transformers", "set_truncation_and_padding of a fast tokenizer", "set_truncation_and_padding",
     "backend_tokenizer.encode_batch_fast")  # fmt: skip
def _(folder):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    parameters = list(inspect.signature(PreTrainedTokenizerFast.set_truncation_and_padding).parameters)
    expected = ["padding_strategy", "truncation_strategy", "max_length", "stride", "pad_to_multiple_of", "padding_side"]
    require(parameters[1:] == expected, f"its parameters are {parameters}")
    require(hasattr(Tokenizer, "encode_batch_fast"), "tokenizers has no encode_batch_fast")


@row("transformers", "T5Attention._relative_position_bucket", "_relative_position_bucket")
def _(folder):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-40, 1)
    buckets = T5Attention._relative_position_bucket(distances, bidirectional=False, num_buckets=32, max_distance=128)
    require(buckets[-16:].tolist() == [*range(15, -1, -1)], f"the distances 15 to 0 are in {buckets[-16:].tolist()}")


@row("transformers", "the parts of BART's decoder", "decoder.embed_positions", "decoder.layernorm_embedding")
def _(folder):
    from transformers.models.bart.modeling_bart import BartConfig, BartDecoder

    sizes = {"vocab_size": 8, "d_model": 4, "decoder_ffn_dim": 4, "decoder_layers": 1, "max_position_embeddings": 8}
    decoder = BartDecoder(BartConfig(decoder_attention_heads=1, **sizes))
    attention = {"q_proj", "k_proj", "v_proj", "out_proj"}
    layer = {"self_attn", "self_attn_layer_norm", "encoder_attn", "encoder_attn_layer_norm", "fc1", "fc2"}
    layer |= {"final_layer_norm", "activation_fn"}
    require_parts(decoder, {"layers", "embed_tokens", "embed_positions", "layernorm_embedding"})
    require_parts(decoder.layers[0], layer)
    require_parts(decoder.layers[0].self_attn, attention)
    require_parts(decoder.layers[0].encoder_attn, attention)
    require_parameters(decoder.embed_positions.forward, "input_ids", "position_ids")


@row("transformers", "the parts of T5's decoder", "EncDecAttention.k", "relative_attention_bias")
def _(folder):
    from transformers import T5Config, T5EncoderModel
    from transformers.models.t5.modeling_t5 import T5Block, T5Stack

    sizes = {"vocab_size": 8, "d_model": 4, "d_kv": 4, "d_ff": 4, "num_layers": 1, "num_heads": 1}
    require_parts(T5EncoderModel(T5Config(**sizes)).encoder, {"embed_tokens", "block", "final_layer_norm"})
    require(T5Stack, "T5Stack is gone")
    own, cross, feed_forward = T5Block(T5Config(is_decoder=True, **sizes), has_relative_attention_bias=True).layer
    require_parts(own, {"layer_norm", "SelfAttention"})
    require_parts(cross, {"layer_norm", "EncDecAttention"})
    require_parts(own.SelfAttention, {"q", "k", "v", "o", "relative_attention_bias", "relative_attention_num_buckets"})
    require_parts(own.SelfAttention, {"relative_attention_max_distance"})
    require_parts(cross.EncDecAttention, {"q", "k", "v", "o"})
    require(callable(feed_forward), "the third part of a block is no layer")


def require_parts(module, names: set[str]) -> None:
    missing = sorted(name for name in names if not hasattr(module, name))
    require(not missing, f"{type(module).__name__} has no {', '.join(missing)}")


@row("transformers", "RagRetriever._build_index", "def _build_index")
def _(folder):
    from transformers import RagConfig, RagRetriever

    class Retriever(RagRetriever):
        @staticmethod
        def _build_index(config):
            return "index"

    config = RagConfig(question_encoder={"model_type": "dpr"}, generator={"model_type": "bart"})
    built = Retriever(config, None, None, init_retrieval=False).index
    require(built == "index", f"a retriever's index is {built!r}, not what the method returns")


# --- Lightning --------------------------------------------------------------------------------------------------------


@cache
def lightning_trainer():
    import pytorch_lightning as pl

    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)


@row("pytorch-lightning", "_SubprocessScriptLauncher and its _call_children_scripts",
     "launchers._SubprocessScriptLauncher", "_call_children_scripts")  # fmt: skip
def _(folder):
    from pytorch_lightning.plugins.environments import LightningEnvironment
    from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

    launcher = _SubprocessScriptLauncher(LightningEnvironment(), 2, 1)
    require(launcher.procs == [], f"a new launcher has the processes {launcher.procs}")
    require(launcher.cluster_environment, "the launcher does not keep its cluster environment")
    for method in (launcher._call_children_scripts, launcher.launch, launcher.kill):
        require(callable(method), f"{method} cannot be called")


@row("pytorch-lightning", "Strategy._configure_launcher, which sets Strategy._launcher", "def _configure_launcher")
def _(folder):
    from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry

    known = StrategyRegistry["ddp"]
    require({"strategy", "init_params", "description"} <= set(known), f"a registered strategy has {sorted(known)}")
    strategy = DDPStrategy()
    strategy._launcher = "launcher"
    require(strategy.launcher == "launcher", f"the strategy's launcher is {strategy.launcher!r}")
    inspect.signature(strategy._configure_launcher).bind()


@row("pytorch-lightning", "_FitLoop._load_combined_loader_states", "_load_combined_loader_states")
def _(folder):
    loop = lightning_trainer().fit_loop
    inspect.signature(loop._load_combined_loader_states).bind()
    require(hasattr(loop, "_combined_loader_states_to_load"), "the loop does not keep the states of the loaders")


@row("pytorch-lightning", "_FitLoop._should_accumulate", "_should_accumulate")
def _(folder):
    inspect.signature(lightning_trainer().fit_loop._should_accumulate).bind()


@row("pytorch-lightning", "_TrainingEpochLoop._should_check_val_fx(data_fetcher), _FitLoop._data_fetcher",
     "_should_check_val_fx", "_data_fetcher", "batch_progress.is_last_batch")  # fmt: skip
def _(folder):
    loop = lightning_trainer().fit_loop
    inspect.signature(loop.epoch_loop._should_check_val_fx).bind(loop._data_fetcher)
    require(loop.epoch_loop.batch_progress.is_last_batch is False, "a loop that has not begun is at its last batch")


@row("pytorch-lightning", "_TrainingEpochLoop._batches_that_stepped, the loggers' step", "_batches_that_stepped")
def _(folder):
    trainer = lightning_trainer()
    require(trainer.fit_loop.epoch_loop._batches_that_stepped == 0, "a loop that has not begun has made steps")
    trainer.fit_loop.epoch_progress.current.completed += 1
    require(trainer.current_epoch == 1, "the trainer's epoch is not the number of those that are completed")


@row("pytorch-lightning", "Trainer._logger_connector, which has a step's row before it is logged", "_logger_connector")
def _(folder):
    connector = lightning_trainer()._logger_connector
    written = inspect.getsource(type(connector).update_train_step_metrics)
    require(connector.should_update_logs in (True, False), "it does not say whether this step is logged")
    require('self.log_metrics(self.metrics["log"])' in written, "what is logged of a step is not in metrics['log']")


@row("pytorch-lightning", "Trainer._signal_connector.received_sigterm", "_signal_connector")
def _(folder):
    trainer = lightning_trainer()
    for received in (True, False):
        trainer._signal_connector.received_sigterm = received
        require(trainer.received_sigterm is received, "the trainer does not read it")


@row("pytorch-lightning", "_TrainingEpochLoop._broadcast_sigterm_tensor", "_broadcast_sigterm_tensor")
def _(folder):
    inspect.signature(lightning_trainer().fit_loop.epoch_loop._broadcast_sigterm_tensor).bind()


@row("pytorch-lightning", "SIGTERMException, whose code is the exit status", "exception.code")
def _(folder):
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    require(issubclass(SIGTERMException, SystemExit), "it is no SystemExit any more")


# --- Ray --------------------------------------------------------------------------------------------------------------


@row("ray", "_private.services.get_ray_address_from_environment", "services.get_ray_address_from_environment")
def _(folder):
    from ray._private.services import get_ray_address_from_environment

    inspect.signature(get_ray_address_from_environment).bind(None, None)


@row("ray", "_private.ray_constants.ENABLE_RAY_CLUSTER, by which a node listens on the loopback interface only",
     "ray._private.ray_constants", "ray_constants.ENABLE_RAY_CLUSTER")  # fmt: skip
def _(folder):
    import ray
    from ray._private import ray_constants, services

    require(isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool), f"it is {ray_constants.ENABLE_RAY_CLUSTER!r}")
    if ray.is_initialized():
        return  # the address is settled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        address = services.get_node_ip_address()
    require(address in ("127.0.0.1", "::1"), f"without it a node listens on {address}")


@row("ray", "_raylet.AuthenticationTokenLoader and _raylet.Config", "_raylet.AuthenticationTokenLoader",
     "_raylet.Config")  # fmt: skip
def _(folder):
    from ray._raylet import AuthenticationTokenLoader, Config

    loader = AuthenticationTokenLoader.instance()
    require(callable(loader.reset_cache), "the loader has no reset_cache")
    require(isinstance(loader.has_token(ignore_auth_mode=True), bool), "the loader does not say whether it has a token")
    require(callable(Config.initialize), "Config has no initialize")


@row("ray", "init(_temp_dir)", "_temp_dir=")
def _(folder):
    import ray

    require('"_temp_dir"' in inspect.getsource(ray.init), "it takes no _temp_dir")


# --- FAISS ------------------------------------------------------------------------------------------------------------


def hnsw_index(rows: int):
    import faiss

    index = faiss.IndexHNSWFlat(4, 8)
    index.add(np.random.default_rng(0).standard_normal((rows, 4), dtype=np.float32))
    return index


@row("faiss-cpu", "the layout of an HNSW index's file", "'<4siqqq?i'", "'<iifQQ'")
def _(folder):
    import faiss

    from rag.index import faiss_mapping

    path = folder / "index.faiss"
    faiss.write_index(hnsw_index(50), str(path))
    index = faiss_mapping._map_hnsw(path)
    require(index is not None, "the file has other parts")
    require(faiss.serialize_index(index).tobytes() == path.read_bytes(), "the mapped index is another one")


@row("faiss-cpu", "MaybeOwnedVector.create_view", "create_view", "faiss.MaybeOwnedVectorInt32",
     "faiss.MaybeOwnedVectorUInt8", "faiss.cast_integer_to_void_ptr")  # fmt: skip
def _(folder):
    import faiss

    for kind, dtype in ((faiss.MaybeOwnedVectorInt32, np.int32), (faiss.MaybeOwnedVectorUInt8, np.uint8)):
        numbers = np.arange(5, dtype=dtype)
        view = kind.create_view(faiss.cast_integer_to_void_ptr(numbers.ctypes.data), len(numbers), kind().owner)
        require(view.size() == 5, f"{kind.__name__} of 5 numbers has {view.size()}")


@row("faiss-cpu", "hnsw.random_level, one number for each vector added", "hnsw.random_level")
def _(folder):
    import faiss

    index, vectors = hnsw_index(40), hnsw_index(15).reconstruct_n(0, 15)
    resumed = faiss.deserialize_index(faiss.serialize_index(index))
    for _ in range(40):
        resumed.hnsw.random_level()
    for one in (index, resumed):
        one.add(vectors)
    same = faiss.serialize_index(resumed).tobytes() == faiss.serialize_index(index).tobytes()
    require(same, "an index that was written and read goes on in another way")


# --- datasets, torch, bm25s, argparse ---------------------------------------------------------------------------------


def dataset():
    from datasets import Dataset

    return Dataset.from_dict({"title": ["a", "b"]})


@row("datasets", "state.json of a saved dataset", "'_data_files'", "'_fingerprint'", "'_format_columns'",
     "'_format_kwargs'", "'_format_type'", "'_output_all_columns'", "'_split'")  # fmt: skip
def _(folder):
    from datasets import load_from_disk

    dataset().save_to_disk(str(folder / "saved"))
    state = json.loads((folder / "saved" / "state.json").read_text(encoding="utf-8"))
    names = {"_data_files", "_fingerprint", "_format_columns", "_format_kwargs", "_format_type", "_output_all_columns"}
    require(set(state) == names | {"_split"}, f"it holds {sorted(state)}")
    files = [set(file) for file in state["_data_files"]]
    require(files == [{"filename"}], f"of a file it says {files}")
    fingerprints = []
    for name in ("one", "one", "other"):  # what is loaded has a fingerprint that follows from this one
        (folder / "saved" / "state.json").write_text(json.dumps(state | {"_fingerprint": name}), encoding="utf-8")
        fingerprints.append(load_from_disk(str(folder / "saved"))._fingerprint)
    require(fingerprints[0] == fingerprints[1] != fingerprints[2], f"of it follow the fingerprints {fingerprints}")


@row("datasets", "Dataset._fingerprint", "dataset._fingerprint")
def _(folder):
    require(dataset()._fingerprint == dataset()._fingerprint, "equal datasets have different ones")


@row("datasets", "Dataset._indices, None where the rows lie in order", "dataset._indices")
def _(folder):
    require(dataset()._indices is None, "a new dataset has some")
    require(dataset().select([1, 0])._indices is not None, "a selection has none")


@row("pytorch-lightning", "checkpoint_connector.py, whose functions restore a run", "'checkpoint_connector.py'")
def _(folder):
    from pytorch_lightning.trainer.connectors import checkpoint_connector

    names = [name for name in dir(checkpoint_connector._CheckpointConnector) if "restore" in name]
    expected = {"restore_model", "restore_training_state", "restore_callbacks", "restore_optimizers_and_schedulers"}
    require(expected <= {*names}, f"its functions are {names}")
    require(hasattr(checkpoint_connector._CheckpointConnector, "resume_start"), "it has no resume_start")


@row("torch", "Optimizer._step_supports_amp_scaling of a fused AdamW", "_step_supports_amp_scaling")
def _(folder):
    import torch

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)
    require(optimizer._step_supports_amp_scaling is True, f"it is {optimizer._step_supports_amp_scaling}")
    source = inspect.getsource(torch.amp.GradScaler.step)
    require("_step_supports_amp_scaling" in source, "GradScaler does not ask for it")


@row("torch", "_int_mm, the product of int8 in int32", "torch._int_mm")
def _(folder):
    import torch

    left, right = torch.full((32, 8), -127, dtype=torch.int8), torch.full((16, 8), 127, dtype=torch.int8)
    products = torch._int_mm(left, right.T)
    require(products.dtype == torch.int32 and (products == -8 * 127 * 127).all(), f"it gives {products[0, 0]}")


@row("bm25s", "BM25.scores, vocab_dict, build_index_from_ids and get_scores_from_ids", "bm25.scores", "bm25.vocab_dict",
     "bm25.build_index_from_ids", "bm25.get_scores_from_ids")  # fmt: skip
def _(folder):
    import bm25s

    bm25 = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    bm25.scores = bm25.build_index_from_ids(range(3), [[0, 1], [1, 2, 2], [1]], show_progress=False)
    bm25.vocab_dict = {}
    bm25.save(folder, show_progress=False)
    scores = bm25s.BM25.load(folder, mmap=True, load_vocab=False).get_scores_from_ids(np.array([2.0]))
    require(scores.shape == (3,) and scores.argmax() == 1, f"a word of the second text gives the scores {scores}")
    require(scores[0] == scores[2] == 0, f"texts without the word have the scores {scores}")


@row("argparse", "ArgumentParser._option_string_actions, ._add_action, argparse._ActionsContainer",
     "_option_string_actions", "_add_action", "argparse._ActionsContainer")  # fmt: skip
def _(folder):
    import argparse

    parser = argparse.ArgumentParser()
    require(isinstance(parser, argparse._ActionsContainer), "a parser is none")
    require("--help" in parser._option_string_actions, "it does not hold --help")
    other = argparse.ArgumentParser(add_help=False)
    other._add_action(parser._option_string_actions["--help"])
    require("--help" in other._option_string_actions, "_add_action does not add an option")


# --- The tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.library}-{row.name}".replace(" ", "_"))
def test_a_private_interface_is_as_the_project_uses_it(row, tmp_path):
    try:
        row.check(tmp_path)
    except Exception as error:
        release = "" if row.library == "argparse" else f" {version(row.library)}"
        places = ", ".join(place for token in row.tokens for place in places_of(token))
        pytest.fail(
            f"{row.library}{release}: {row.name} is gone or works differently: {type(error).__name__}: {error}; "
            f"used by {places}"
        )


@pytest.mark.parametrize("token", [token for row in ROWS for token in row.tokens])
def test_a_private_interface_is_used_in_one_file(token):
    files = {place.split(":")[0] for place in places_of(token)}
    assert len(files) < 2, f"{token} is used in {', '.join(sorted(files))}: let one of them offer it to the others"
    assert files, f"nothing uses {token} any more: remove it from its row"


def test_every_private_use_has_a_row():
    own, known = names_of_product(), [token for row in ROWS for token in row.tokens]
    for text, places in tokens_of_product().items():
        if text.startswith(("'", '"', "def ")) or text in DOCUMENTED:
            continue
        parts = [part for part in text.removesuffix("=").split(".") if part.isidentifier()]
        if any(re.match("_[^_]", part) and part not in own for part in parts):
            covered = any(f".{token}." in f".{text}." for token in known)
            assert covered, f"{text} ({', '.join(places)}) is private and has no row in {Path(__file__).name}"


@row("torch", "aten._flash_attention_forward", "aten._flash_attention_forward")
def _(folder):
    import torch

    names = [one.name for one in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    first = ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    require(names[:10] == [*first, "return_debug_mask"], "its arguments come in another order")
    require("scale" in names, "it has no scale")


@row("torch", "_foreach_copy_", "torch._foreach_copy_")
def _(folder):
    import torch

    copies = [torch.zeros(2, dtype=torch.bfloat16)]
    torch._foreach_copy_(copies, [torch.ones(2)])
    require(copies[0].tolist() == [1, 1], "it does not copy into another dtype")


@row("torch", "Optimizer.found_inf of fused AdamW", "optimizer.found_inf")
def _(folder):
    import torch

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
    optimizer._step_supports_amp_scaling = False
    for found, changes in ((1.0, False), (0.0, True)):
        weight.grad, optimizer.found_inf = torch.ones(2), torch.tensor(found)
        before = weight.tolist()
        optimizer.step()
        require((weight.tolist() != before) is changes, f"with {found} its step does something else")
    require(float(optimizer.state[weight]["step"]) == 1, "it counts a step that is left out")


@row("torch", "aten._flash_attention_backward", "aten._flash_attention_backward")
def _(folder):
    import torch

    names = [one.name for one in torch.ops.aten._flash_attention_backward.default._schema.arguments]
    first = ["grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k"]
    require(
        names[:14] == [*first, "dropout_p", "is_causal", "rng_state", "unused"], "its arguments come in another order"
    )
    results = torch.ops.aten._flash_attention_forward.default._schema.returns
    require(
        [one.name for one in results][:4] == ["output", "softmax_logsumexp", "rng_state", "unused"], "or its results"
    )


@row("torch", "Module._compiled_call_impl", "layer._compiled_call_impl")
def _(folder):
    import torch

    module = torch.nn.Linear(1, 1)
    require(not module._compiled_call_impl, "it is set before it is compiled")
    module.compile(backend="eager")
    require(module._compiled_call_impl, "it does not say that it was compiled")


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@row("torch", "Module's hooks", *(f"'{name}'" for name in HOOKS))
def _(folder):
    import torch

    module = torch.nn.Linear(1, 1)
    require(not any(vars(module)[name] for name in HOOKS), "a new module has hooks")
    module.register_forward_hook(print)
    module.register_forward_pre_hook(print)
    module.register_full_backward_hook(print)
    module.register_full_backward_pre_hook(print)
    require(all(vars(module)[name] for name in HOOKS), "it does not hold its hooks there")


@row("peft", "where its linear layer and its buffers are", "'peft.tuners._buffer_dict'", "'peft.tuners.lora.layer'")
def _(folder):
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.lora.layer import Linear

    require(BufferDict.__module__ == "peft.tuners._buffer_dict", "its buffers are elsewhere")
    require((Linear.__module__, Linear.__name__) == ("peft.tuners.lora.layer", "Linear"), "its layer is elsewhere")

"""The names that other code imports of the public suite: each is here, or says what to use in its place."""

import importlib
import inspect
import logging
import re
import subprocess
import sys

import pytest

from rag.public_names import Replaced, module_getattr, replaced_method, warn_of_uncalled_methods
from tests.conftest import ROOT

# The public suite at fccd0cd: what each module defines, and the methods of its classes, without those of an underscore
# but for `_step`, which subclasses call.
PUBLIC_NAMES = {
    "utils_rag": """encode_line trim_batch Seq2SeqDataset Seq2SeqDataset.get_char_lens Seq2SeqDataset.collate_fn
        flatten_list save_git_info save_json load_json get_git_info lmap pickle_save normalize_answer f1_score
        exact_match_score calculate_exact_match is_rag_model set_extra_model_params""",
    "callbacks_rag": """count_trainable_parameters get_checkpoint_callback get_early_stopping_callback
        Seq2SeqLoggingCallback Seq2SeqLoggingCallback.on_batch_end Seq2SeqLoggingCallback.on_train_start
        Seq2SeqLoggingCallback.on_test_end Seq2SeqLoggingCallback.on_validation_end""",
    "lightning_base": """MODEL_MODES arg_to_scheduler arg_to_scheduler_choices arg_to_scheduler_metavar BaseTransformer
        BaseTransformer.load_hf_checkpoint BaseTransformer.get_lr_scheduler BaseTransformer.configure_optimizers
        BaseTransformer.test_step BaseTransformer.test_epoch_end BaseTransformer.total_steps BaseTransformer.setup
        BaseTransformer.get_dataloader BaseTransformer.train_dataloader BaseTransformer.val_dataloader
        BaseTransformer.test_dataloader BaseTransformer.on_save_checkpoint BaseTransformer.add_model_specific_args
        InitCallback InitCallback.on_sanity_check_start LoggingCallback LoggingCallback.on_batch_end
        LoggingCallback.on_validation_end LoggingCallback.on_test_end add_generic_args generic_train""",
    "distributed_pytorch_retriever": """RagPyTorchDistributedRetriever RagPyTorchDistributedRetriever.init_retrieval
        RagPyTorchDistributedRetriever.retrieve""",
    "distributed_ray_retriever": """RayRetriever RayRetriever.create_rag_retriever RayRetriever.init_retrieval
        RayRetriever.retrieve RagRayDistributedRetriever RagRayDistributedRetriever.init_retrieval
        RagRayDistributedRetriever.retrieve RagRayDistributedRetriever.get_tokenizers
        RagRayDistributedRetriever.from_pretrained""",
    "eval_rag": """infer_model_type metric_max_over_ground_truths get_scores get_precision_at_k evaluate_batch_retrieval
        evaluate_batch_e2e get_args main""",
    "finetune_rag": """AttrDict CustomDDP CustomDDP.init_ddp_connection GenerativeQAModule GenerativeQAModule.forward
        GenerativeQAModule.ids_to_clean_text GenerativeQAModule._step GenerativeQAModule.pad
        GenerativeQAModule.training_step GenerativeQAModule.validation_step GenerativeQAModule.validation_epoch_end
        GenerativeQAModule.save_metrics GenerativeQAModule.calc_generative_metrics GenerativeQAModule.test_step
        GenerativeQAModule.test_epoch_end GenerativeQAModule.get_dataset GenerativeQAModule.get_dataloader
        GenerativeQAModule.train_dataloader GenerativeQAModule.val_dataloader GenerativeQAModule.test_dataloader
        GenerativeQAModule.on_save_checkpoint GenerativeQAModule.add_model_specific_args
        GenerativeQAModule.add_retriever_specific_args GenerativeQAModule.add_ray_specific_args main""",
    "parse_dpr_relevance_data": "main",
    "consolidate_rag_checkpoint": "consolidate",
    "use_own_knowledge_dataset": """device split_text split_documents embed main RagExampleArguments
        ProcessingArguments IndexHnswArguments""",
}
NAMES = [(module, name) for module, names in PUBLIC_NAMES.items() for name in names.split()]


def documented() -> dict[tuple[str, str], tuple[str, str]]:
    """Status and note of each name, by module and name, as docs/differences.md has them."""
    rows, module = {}, ""
    for line in (ROOT / "docs" / "differences.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("### "):
            module = line.removeprefix("### ")
        elif match := re.fullmatch(r"\| `([\w.]+)` \| (\w+) \|(.*)\|", line):
            rows[module, match[1]] = (match[2], match[3].strip())
    return rows


def find(module: str, name: str):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_the_table_has_every_name_and_counts_them():
    rows = documented()
    assert list(rows) == NAMES and len(NAMES) == 107
    statuses = [status for status, _ in rows.values()]
    assert set(statuses) == {"same", "changed", "gone"}
    text = " ".join((ROOT / "docs" / "differences.md").read_text(encoding="utf-8").split())
    counts = {status: statuses.count(status) for status in set(statuses)}
    assert f"its 107 names {counts['same']} are the same here, {counts['changed']} are here with" in text
    assert f"and {counts['gone']} are gone" in text


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda part: part)
def test_a_public_name_is_here_or_says_what_to_use(module, name):
    status, note = documented()[module, name]
    if status != "gone":
        assert find(module, name) is not None
        return
    assert note
    with pytest.raises((ImportError, AttributeError)) as error:
        find(module, name)
    message = str(error.value)
    assert "\n" not in message and "of the public suite has no place here: " in message
    assert message.partition("here: ")[2].startswith(note)


def test_a_name_that_is_gone_says_so_in_an_import():
    with pytest.raises(ImportError, match="Lightning's own strategy will do"):
        from finetune_rag import CustomDDP  # noqa: F401
    with pytest.raises(ImportError, match="KnowledgeArguments has the settings of all three"):
        from use_own_knowledge_dataset import ProcessingArguments  # noqa: F401
    with pytest.raises(AttributeError, match="module 'finetune_rag' has no attribute 'nothing'"):
        importlib.import_module("finetune_rag").nothing  # noqa: B018


def test_scripts_stay_light_until_a_heavy_name_is_used():
    code = (
        "import sys, finetune_rag, eval_rag, use_own_knowledge_dataset, consolidate_rag_checkpoint\n"
        "from use_own_knowledge_dataset import split_text\n"
        "print(sorted({'torch', 'transformers', 'pytorch_lightning', 'datasets', 'faiss'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


class Parent:
    old = Replaced("`new` does it")


def test_a_replaced_method_is_absent_and_a_subclass_that_defines_it_is_warned(caplog):
    class Child(Parent):
        def old(self):
            return 1

    assert not hasattr(Parent(), "old") and Child().old() == 1
    assert isinstance(replaced_method(Parent, "old"), Replaced)
    assert replaced_method(Child, "old") is None and replaced_method(Parent, "other") is None
    with caplog.at_level(logging.WARNING):
        warn_of_uncalled_methods(Child)
        warn_of_uncalled_methods(Parent)
    assert [record.getMessage() for record in caplog.records] == ["Child.old is never called: `new` does it"]


def test_names_are_imported_when_they_are_used():
    look_up = module_getattr("here", {"sqrt": "math"}, {"gone": "leave it out"})
    assert look_up("sqrt")(4) == 2
    with pytest.raises(ImportError, match=r"^here\.gone of the public suite has no place here: leave it out$"):
        look_up("gone")


def test_signatures_are_the_public_ones():
    """The arguments that other code gives by place or by name come first, under their names."""
    expected = {
        ("utils_rag", "encode_line"): "tokenizer line max_length padding_side pad_to_max_length return_tensors",
        ("utils_rag", "Seq2SeqDataset"): "tokenizer data_dir max_source_length max_target_length type_path n_obs "
        "src_lang tgt_lang prefix",
        ("utils_rag", "save_json"): "content path indent",
        ("utils_rag", "save_git_info"): "folder_path",
        ("utils_rag", "set_extra_model_params"): "extra_params hparams config",
        ("utils_rag", "calculate_exact_match"): "output_lns reference_lns",
        ("callbacks_rag", "get_checkpoint_callback"): "output_dir metric",
        ("callbacks_rag", "get_early_stopping_callback"): "metric patience",
        ("lightning_base", "add_generic_args"): "parser root_dir",
        ("lightning_base", "generic_train"): "model args early_stopping_callback logger custom_ddp_plugin "
        "extra_callbacks checkpoint_callback logging_callback",
        ("eval_rag", "get_scores"): "args preds_path gold_data_path",
        ("eval_rag", "get_precision_at_k"): "args preds_path gold_data_path",
        ("eval_rag", "evaluate_batch_e2e"): "args rag_model questions",
        ("eval_rag", "evaluate_batch_retrieval"): "args rag_model questions",
        ("consolidate_rag_checkpoint", "consolidate"): "model_type generator_name_or_path "
        "question_encoder_name_or_path dest_dir config_name_or_path generator_tokenizer_name_or_path "
        "question_encoder_tokenizer_name_or_path",
        ("use_own_knowledge_dataset", "split_text"): "text n character",
        ("use_own_knowledge_dataset", "split_documents"): "documents",
        ("use_own_knowledge_dataset", "embed"): "documents ctx_encoder ctx_tokenizer",
    }
    for (module, name), arguments in expected.items():
        found = list(inspect.signature(find(module, name)).parameters)
        assert found[: len(arguments.split())] == arguments.split(), name

"""Small models and knowledge made on the spot: no hub, no download, fractions of a second each."""

import copy
import gc
import os
import signal
from pathlib import Path
from types import MethodType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
gc.set_threshold(10_000, 10, 10)  # as every script does
# In the background of a script pytest begins without Ctrl-C, which those it starts would lack, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = """the of in is a river city capital country lies on and with people what where which who many live near flows
through paris london rome berlin vienna madrid lisbon oslo france england italy germany austria spain portugal norway
seine thames tiber spree danube manzanares tagus akerselva two three four million old large small mountain lake sea
castle bridge tower museum language french english italian german spanish norwegian""".split()  # noqa: SIM905

PASSAGES = [
    ("paris", "paris is the capital of france and lies on the river seine"),
    ("london", "london is the capital of england and lies on the river thames"),
    ("rome", "rome is the capital of italy and lies on the river tiber"),
    ("berlin", "berlin is the capital of germany and lies on the river spree"),
    ("vienna", "vienna is the capital of austria and lies on the danube"),
    ("madrid", "madrid is the capital of spain and lies on the manzanares"),
    ("lisbon", "lisbon is the capital of portugal and lies on the tagus near the sea"),
    ("oslo", "oslo is the capital of norway and the akerselva flows through the city with a castle and a museum"),
]
QUESTIONS = [(f"what is the capital of {country}", city) for country, city in [
    ("france", "paris"), ("england", "london"), ("italy", "rome"), ("germany", "berlin"),
    ("austria", "vienna"), ("spain", "madrid"), ("portugal", "lisbon"), ("norway", "oslo"),
]]  # fmt: skip
DIMENSION = 16
BYTES_OF_A_WORKER = 3 * 2**29  # torch, transformers and Lightning, and what the largest tests hold
LONG = "the castle and the museum of oslo " * 30  # 210 words: three passages


def pytest_configure(config):
    """Hide the GPUs: what is picked for want of a flag is the same on every machine. `-m cuda` runs what needs one."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU that it can see: `make test-cuda`, and `make test` where there is one")


@pytest.fixture(autouse=True, scope="session")
def no_bfloat16_units():
    """`--precision auto` is float32 in this process, whatever the machine has: vectors are the same on every one."""
    from rag.models import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "multiplies_bfloat16", lambda: False)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    """The workers of `-n auto`: one for each core that this process may use, if there is memory for it."""
    import psutil

    cores = len(os.sched_getaffinity(0))
    workers = min(cores, psutil.virtual_memory().available // BYTES_OF_A_WORKER)
    return workers if workers > 1 else 0


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real questions and passages beside the checkout; tests that want them skip where they are not."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA


def _word_tokenizer(specials: dict[str, str], template: str):
    """A whole-word, lower-casing fast tokenizer over WORDS."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate([*specials.values(), *dict.fromkeys(WORDS), "/", "?", ".", ","])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[(token, vocabulary[token]) for token in specials.values()],
    )
    return tokenizer


@pytest.fixture(scope="session")
def bert_tokenizer():
    from transformers import BertTokenizerFast

    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return BertTokenizerFast(
        tokenizer_object=_word_tokenizer(specials, "[CLS] $A [SEP]"),
        model_input_names=["input_ids", "attention_mask"],
        **specials,
    )


@pytest.fixture(scope="session")
def bart_tokenizer():
    """BART's layout: <s> 0, <pad> 1, </s> 2, <unk> 3; `<s> a </s>`."""
    from transformers import PreTrainedTokenizerFast

    specials = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=_word_tokenizer(specials, "<s> $A </s>"), **specials)


@pytest.fixture(scope="session")
def t5_tokenizer():
    """T5's layout: <pad> 0, </s> 1, <unk> 2; `a </s>`, no beginning-of-sequence token."""
    from transformers import PreTrainedTokenizerFast

    specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=_word_tokenizer(specials, "$A </s>"), **specials)


def saved(model, tokenizer, folder: Path) -> Path:
    """The folder, with both in it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _dpr_config(vocabulary: int):
    from transformers import DPRConfig

    return DPRConfig(
        vocab_size=vocabulary, hidden_size=DIMENSION, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.5,
    )  # fmt: skip


@pytest.fixture(scope="session")
def question_encoder(bert_tokenizer):
    import torch
    from transformers import DPRQuestionEncoder

    torch.manual_seed(6)
    return DPRQuestionEncoder(_dpr_config(len(bert_tokenizer))).eval()


@pytest.fixture(scope="session")
def context_encoder_folder(bert_tokenizer, question_encoder, tmp_path_factory) -> Path:
    """A DPR context encoder with the question encoder's own weights, so that equal words attract."""
    from transformers import DPRContextEncoder

    folder = tmp_path_factory.mktemp("context_encoder")
    encoder = DPRContextEncoder(question_encoder.config)
    encoder.ctx_encoder.load_state_dict(question_encoder.question_encoder.state_dict())
    encoder.save_pretrained(folder)
    bert_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def question_encoder_folder(bert_tokenizer, question_encoder, tmp_path_factory) -> Path:
    return saved(question_encoder, bert_tokenizer, tmp_path_factory.mktemp("question_encoder"))


@pytest.fixture(scope="session")
def bart(bart_tokenizer):
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(1)
    config = BartConfig(
        vocab_size=len(bart_tokenizer), d_model=DIMENSION, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=128,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, init_std=0.3, bos_token_id=0, pad_token_id=1,
        eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def bart_folder(bart, bart_tokenizer, tmp_path_factory) -> Path:
    return saved(bart, bart_tokenizer, tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="session")
def t5(t5_tokenizer):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(2)
    config = T5Config(
        vocab_size=len(t5_tokenizer), d_model=DIMENSION, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1,
        num_heads=2, dropout_rate=0.0, initializer_factor=1.0, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def t5_folder(t5, t5_tokenizer, tmp_path_factory) -> Path:
    return saved(t5, t5_tokenizer, tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def llama_tokenizer():
    """As of many language models: no beginning, an end token that is the padding, too, and another special token."""
    from transformers import PreTrainedTokenizerFast

    specials = {"unk_token": "<unk>", "bos_token": "<begin>", "eos_token": "<end>"}
    backend = _word_tokenizer(specials | {"colon": ":"}, "$A")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<end>", **specials)


def make_language_model(family: str, vocabulary: int, **sizes):
    """A tiny causal language model of a family, its weights large enough that its words differ."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(3)
    config = CONFIG_MAPPING[family](
        vocab_size=vocabulary, hidden_size=DIMENSION, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, pad_token_id=2, **sizes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def llama(llama_tokenizer):
    return make_language_model("llama", len(llama_tokenizer))


@pytest.fixture(scope="session")
def llama_folder(llama, llama_tokenizer, tmp_path_factory) -> Path:
    return saved(llama, llama_tokenizer, tmp_path_factory.mktemp("llama"))


def write_index(factory: str, vectors, path: Path) -> None:
    """A FAISS index by inner product of a kind that needs no training, over float32 vectors (rows, d)."""
    import numpy as np

    from rag.index.build import IndexPlan
    from rag.index.index_files import write_faiss_index

    index = IndexPlan(factory, vectors.shape[1]).empty()
    index.add(np.ascontiguousarray(vectors))
    write_faiss_index(index, path)


@pytest.fixture(scope="session")
def knowledge(question_encoder, bert_tokenizer, tmp_path_factory) -> dict:
    """Eight passages with embeddings and an HNSW index on disk: the flags that open them."""
    import torch
    from datasets import Dataset, Features, List, Value

    folder = tmp_path_factory.mktemp("knowledge")
    titles, texts = map(list, zip(*PASSAGES, strict=True))
    with torch.no_grad():
        vectors = question_encoder(**bert_tokenizer(texts, padding=True, return_tensors="pt"))[0].numpy()
    features = Features(
        {"title": Value("string"), "text": Value("string"), "embeddings": List(Value("float32"), length=DIMENSION)}
    )
    rows = {"title": titles, "text": texts, "embeddings": list(vectors)}
    Dataset.from_dict(rows, features=features).save_to_disk(folder / "my_knowledge_dataset")
    index_path = folder / "my_knowledge_dataset_hnsw_index.faiss"
    write_index("HNSW8,Flat", vectors, index_path)
    return {
        "index_name": "custom",
        "passages_path": str(folder / "my_knowledge_dataset"),
        "index_path": str(index_path),
    }


@pytest.fixture
def csv_path(tmp_path) -> Path:
    """Nine documents, eleven passages."""
    path = tmp_path / "documents.csv"
    rows = [*PASSAGES, ("oslo", LONG)]
    path.write_text("title\ttext\n" + "".join(f"{title}\t{text}\n" for title, text in rows))
    return path


@pytest.fixture
def flags(csv_path, context_encoder_folder, tmp_path) -> dict:
    """The flags of use_own_knowledge_dataset.py for these."""
    return {
        "--csv_path": csv_path,
        "--dpr_ctx_encoder_model_name": context_encoder_folder,
        "--output_dir": tmp_path / "out",
        "--m": 8,
    }


def make_rag(model_class, question_encoder, generator, knowledge, **config):
    """A RAG model of the given parts, with copies of their weights."""
    from transformers import RagConfig

    rag_config = RagConfig.from_question_encoder_generator_configs(
        question_encoder.config, generator.config, retrieval_vector_size=DIMENSION, n_docs=3, max_combined_length=48,
        **knowledge, **config,
    )  # fmt: skip
    for name in ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id", "vocab_size"):
        setattr(rag_config, name, getattr(generator.config, name, None))
    if not hasattr(rag_config.generator, "bos_token_id"):  # T5: transformers' loss asks for it
        rag_config.generator.bos_token_id = None
    return model_class(
        config=rag_config, question_encoder=copy.deepcopy(question_encoder), generator=copy.deepcopy(generator)
    ).eval()


def in_float64(model):
    """The same model with all of its weights and sums in float64, where a wrong term stands out from the rounding.

    What float32 gives depends on the instruction set, the number of threads and the shapes: equality is shown in
    float64. Also of T5's norms, of which transformers takes the variance in float32 whatever the weights are.
    """
    from torch.nn.functional import rms_norm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    def forward(norm, hidden_states):
        return rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)

    for module in model.double().modules():
        if isinstance(module, T5LayerNorm):
            module.forward = MethodType(forward, module)
    return model


def assert_the_generator_alone_learned(start, checkpoint: Path) -> None:
    """The checkpoint of a run that began at `start` has other weights in its generator alone, and the loss fell."""
    import torch

    from rag.files import load_json
    from rag.models.checkpoints import load_model

    losses = [validation["val_avg_loss"] for validation in load_json(checkpoint.parent / "metrics.json")["val"]]
    assert losses[-1] < losses[0]
    before, after = load_model(str(start)).state_dict(), load_model(str(checkpoint)).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("decoder" in name for name in changed) and not any("question_encoder" in name for name in changed)


def assert_equal_but_for_rounding(found, expected) -> None:
    """Tensors, arrays, or dicts of these, differ by no more than 1024 roundings of the largest value in `expected`.

    Each value is a sum of some hundred to some thousand products, and what cancels in it may be as large as the largest
    value: a bound on a value's relative error would not hold. 1024 roundings are 1e-4 of the largest in float32, 2e-13
    in float64.
    """
    import torch

    if not isinstance(expected, dict):
        found, expected = {"": found}, {"": expected}
    assert found.keys() == expected.keys()
    found, expected = ({name: torch.as_tensor(one) for name, one in side.items()} for side in (found, expected))
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        bound = 1024 * torch.finfo(tensor.dtype).eps * largest
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=bound, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.fixture(scope="session")
def rag_sequence(question_encoder, bart, knowledge):
    from transformers import RagSequenceForGeneration

    return make_rag(RagSequenceForGeneration, question_encoder, bart, knowledge)


@pytest.fixture(scope="session")
def rag_token(question_encoder, bart, knowledge):
    from transformers import RagTokenForGeneration

    return make_rag(RagTokenForGeneration, question_encoder, bart, knowledge)


@pytest.fixture(scope="session")
def retriever(rag_sequence, bert_tokenizer, bart_tokenizer):
    from rag.retrieval.retriever import RagKnowledgeRetriever

    return RagKnowledgeRetriever(rag_sequence.config, bert_tokenizer, bart_tokenizer)


@pytest.fixture(scope="session")
def checkpoint(request, question_encoder, bert_tokenizer, knowledge, tmp_path_factory):
    """A function that makes the folder of a tiny RAG checkpoint: `checkpoint("rag_sequence", "bart")`."""

    def make(model_type: str = "rag_sequence", generator: str = "bart") -> Path:
        from transformers import RagTokenizer

        from rag.models.causal_rag import CAUSAL_CLASSES
        from rag.models.checkpoints import MODEL_CLASSES, save_model
        from rag.models.prompts import PLAIN, settle_language_model

        folder = tmp_path_factory.mktemp(f"{model_type}_{generator}")
        part, classes = copy.deepcopy(request.getfixturevalue(generator)), MODEL_CLASSES
        tokenizer = RagTokenizer(bert_tokenizer, copy.deepcopy(request.getfixturevalue(f"{generator}_tokenizer")))
        if not part.config.is_encoder_decoder:
            settle_language_model(part, tokenizer.generator, PLAIN, "--generator_name_or_path x")
            classes = CAUSAL_CLASSES
        model = make_rag(classes[model_type], question_encoder, part, knowledge)
        save_model(model, folder, tokenizer)
        return folder

    return make


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """A finetuning data folder: eight questions in each of train, val and test."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "val", "test"):
        (folder / f"{split}.source").write_text("".join(f"{question}\n" for question, _ in QUESTIONS))
        (folder / f"{split}.target").write_text("".join(f"{answer}\n" for _, answer in QUESTIONS))
    return folder


@pytest.fixture
def ahead(monkeypatch):
    """Retrieval for the next batch beside the step on a CPU, too, where it is not worth it."""
    from rag.training.qa_module import GenerativeQAModule

    monkeypatch.setattr(GenerativeQAModule, "can_prefetch", lambda module, device: module.question_encoder_is_frozen)

"""Bad input, a row a case: told in lines that name the flag, with status 2 and nothing left; what is right works.

What a row says is in cases.py. test_bad_records.py has the rows of reports, logs, the hub and KILT.
"""

import re

import numpy as np
import pytest

from tests.faults.cases import CONSOLIDATE, EVAL, FINETUNE, KNOWLEDGE, PARSE, Cases, require_answered_well
from tests.faults.makers import (
    NOT_JSON,
    Changed,
    Copy,
    File,
    Index,
    Passages,
    Special,
    cut,
    first_line,
    flip,
    huge_header,
    inside,
    settings,
    utf16,
)

CASES = Cases()
refused, works, cleanly = CASES.refused, CASES.works, CASES.cleanly

# --- Files that are read ----------------------------------------------------------------------------------------------

READ = [(EVAL, "--evaluation_set"), (EVAL, "--gold_data_path"), (KNOWLEDGE, "--csv_path"), (PARSE, "--src_path")]
for script, flag in READ:
    for kind in ("fifo", "device", "link", "loop", "below"):
        refused(
            script, f"{flag} is a {kind}", {flag: Special(kind)}, flag, short=(kind, flag) == ("fifo", "--csv_path")
        )
    for name, content in {
        "empty": b"",
        "binary": bytes(range(128, 256)) * 9,
        "UTF-16": "a\tb\n".encode("utf-16"),
    }.items():
        refused(script, f"{flag} is {name}", {flag: File(content)}, flag)
    refused(script, f"{flag} missing", {flag: "{out}/none"}, flag)
    refused(script, f"{flag} ''", {flag: ""}, flag)
for script, flag in [(EVAL, "--evaluation_set"), (EVAL, "--gold_data_path"), (PARSE, "--src_path")]:
    refused(script, f"{flag} is a folder", {flag: Special("folder")}, flag)
for side in ("train.source", "train.target", "val.source"):
    for name, change in {"empty": b"", "UTF-16": utf16, "gone": None, "a line more": lambda old: old + b"x\n",
                         "blank line": lambda old: b" \n" + old}.items():  # fmt: skip
        refused(FINETUNE, f"{side} {name}", {"--data_dir": Copy("data", {side: change})}, re.escape(side))
    for name, change in {"BOM": lambda old: b"\xef\xbb\xbf" + old, "CRLF": lambda old: old.replace(b"\n", b"\r\n"),
                         "U+2028": lambda old: old.replace(b" ", "\u2028".encode(), 1),
                         "a line of a megabyte": lambda old: b"what " * 200_000 + old}.items():  # fmt: skip
        works(FINETUNE, f"{side} {name}", {"--data_dir": Copy("data", {side: change})})

# --- Gold -------------------------------------------------------------------------------------------------------------

NO_ANSWERS = [
    b"[]", b"[1, 2]", b"'x'", b"[" * 100_000, b"-" * 100_000 + b"1", b"[" + b"9" * 100_000 + b"]", b"{'a': 1}",
    b"[None]", b"[['a']]", b"[", b"set()",
]  # fmt: skip
for line in [b"only a question", *(b"q\t" + answers for answers in NO_ANSWERS)]:
    changes = {"--gold_data_path": Changed("gold.qa", first_line(line))}
    refused(EVAL, f"gold line {line[:20]!r}", changes, "line 1", short=line == b"q\t[]")
for line in (b'q\t["a", "\\u00e9"]', b'"q"\t"[\'a\', ""b\'s""]"', b"q\t['a' 'b']", b"q\t('a', 'b')", b"q\t['', 'a']"):
    works(EVAL, f"gold line {line!r}", {"--gold_data_path": Changed("gold.qa", first_line(line))})

# --- Data by name -----------------------------------------------------------------------------------------------------

NO_EXAMPLES = {
    "empty": b"", "binary": bytes(range(128, 256)) * 9, "an array of numbers": b"[1]", "deep": b"[" * 100_000,
    "a blank line": lambda old: b"\n" + old, "no answers": b'{"question": "q"}\n', "a list": b'["q", "a"]\n',
    "an answer of numbers": b'{"question": "q", "answers": [1]}\n', "half an emoji": b'{"question": "\\ud83d"}\n',
    "a blank question": b'{"question": " ", "answer": "a"}\n', "blank answers": b'{"question": "q", "answer": " "}\n',
    "no question": b'{"questions": "q", "answer": "a"}\n', "a digit without end": b'{"question": ' + b"9" * 100_000,
}  # fmt: skip
BY_NAME = {EVAL: {"--evaluation_set": None, "--gold_data_path": None}, FINETUNE: {"--data_dir": None}}
for script, no_files in BY_NAME.items():
    split = "train.jsonl" if script == FINETUNE else "validation.jsonl"
    works(script, "--dataset_name", no_files | {"--dataset_name": "{world}/named"})
    for kind in ("fifo", "device", "link", "loop", "below", "folder"):
        refused(script, f"--dataset_name is a {kind}", no_files | {"--dataset_name": Special(kind)}, "--dataset_name")
    for value in ("", "{out}/none", "no/such/path", "nobody/nothing", "x" * 300, "x/" * 3000, "{world}/gold.qa"):
        refused(script, f"--dataset_name {value[:20]!r}", no_files | {"--dataset_name": value}, "--dataset_name")
    for name, change in NO_EXAMPLES.items():
        changes = no_files | {"--dataset_name": Copy("named", {split: change})}
        refused(script, f"data by name, {name}", changes, "--dataset_name", short=(script, name) == (EVAL, "deep"))
for name, content in {"no Parquet": (b"PAR1", "x.parquet"), "an open quote": (b'question,answer\n"q,a\n', "x.csv"),
                      "no columns": (b"only text\n", "x.tsv"), "of no kind": (b"q\ta\n", "x.txt")}.items():  # fmt: skip
    refused(EVAL, f"data by name, {name}", BY_NAME[EVAL] | {"--dataset_name": File(*content)}, "--dataset_name")

# --- Outputs ----------------------------------------------------------------------------------------------------------

WRITTEN = [
    (EVAL, "--predictions_path"), (FINETUNE, "--output_dir"), (KNOWLEDGE, "--output_dir"), (CONSOLIDATE, "--dest"),
    (PARSE, "--evaluation_set"), (PARSE, "--gold_data_path"),
]  # fmt: skip
for script, flag in WRITTEN:
    for kind in ("fifo", "device", "link", "loop", "below"):
        refused(script, f"{flag} is a {kind}", {flag: Special(kind)}, flag, short=(script, kind) == (EVAL, "below"))
    for value in ("", " ", "/proc/x", "/proc/x/y", "/sys/x", "x" * 300):
        refused(script, f"{flag} {value[:9]!r}", {flag: value}, flag)
for script, flag in [(FINETUNE, "--output_dir"), (KNOWLEDGE, "--output_dir"), (CONSOLIDATE, "--dest")]:
    refused(script, f"{flag} is a file", {flag: File(b"keep")}, flag)

NAMED = {
    EVAL: ["model_name_or_path", "evaluation_set", "gold_data_path", "predictions_path", "passages_path", "index_path",
           "config_file"],
    FINETUNE: ["model_name_or_path", "data_dir", "output_dir", "passages_path", "index_path", "resume_from_checkpoint",
               "tokenizer_name", "config_name", "cache_dir"],
    KNOWLEDGE: ["csv_path", "dpr_ctx_encoder_model_name", "output_dir"],
    CONSOLIDATE: ["generator_name_or_path", "question_encoder_name_or_path", "dest", "config_name_or_path"],
    PARSE: ["src_path", "evaluation_set", "gold_data_path"],
}  # fmt: skip
for script, names in NAMED.items():
    for name in names:
        refused(script, f"--{name}, a name that is too long", {f"--{name}": "x" * 300}, name)
        refused(script, f"--{name}, folders that are too many", {f"--{name}": "x/" * 3000}, name)

# --- Numbers ----------------------------------------------------------------------------------------------------------

WHOLE = ["0", "-1", "x", "", "2.5", "nan", "1e3"]
for script, names in {
    EVAL: ["n_docs", "num_beams", "eval_batch_size", "max_source_length", "max_length", "ef_search", "nprobe"],
    FINETUNE: ["train_batch_size", "eval_batch_size", "num_beams", "max_source_length", "max_target_length", "n_docs",
               "num_train_epochs", "gradient_accumulation_steps", "max_combined_length", "num_retrieval_workers"],
    KNOWLEDGE: ["batch_size", "tokens_per_batch", "num_shards", "m", "num_index_shards", "n_docs", "num_proc",
                "num_encoding_processes"],
}.items():  # fmt: skip
    for name in names:
        for value in WHOLE:
            refused(script, f"--{name} {value!r}", {f"--{name}": value}, name, short=(name, value) == ("n_docs", "0"))
for name in (
    "learning_rate",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "dropout",
    "label_smoothing",
    "save_interval",
):
    for value in ("nan", "inf", "-1", "x"):
        refused(FINETUNE, f"--{name} {value}", {f"--{name}": value}, name)
for name, values in {
    "seed": ["-1", 2**32, 2**70, "x"], "max_time": ["30", "xx", "-1"], "limit_val_batches": ["0", "-1", "nan"],
    "val_check_interval": ["0", "1000", "-1", "nan", "x"], "check_val_every_n_epoch": ["0", "-1"],
    "precision": ["16-mixed"],
    "log_every_n_steps": ["0", "-1"], "num_sanity_val_steps": ["-2"], "val_max_target_length": ["0", "1"],
    "max_steps": ["-5", "x"], "warmup_steps": ["-1"], "strategy": ["xyz", "deepspeed"], "accelerator": ["xyz", "tpu"],
    "devices": ["0", "abc", "-3"], "num_nodes": ["0", "2"],
}.items():  # fmt: skip
    for value in values:
        refused(FINETUNE, f"--{name} {value}", {f"--{name}": value}, name)
for value in (10**9, 10**12):
    refused(EVAL, f"--n_docs {value}", {"--n_docs": value}, "n_docs")
    refused(
        EVAL, f"--k {value}", {"--eval_mode": "retrieval", "--gold_data_path": "{world}/titles", "--k": value}, "--k"
    )
    cleanly(EVAL, f"--num_beams {value}", {"--num_beams": value}, "num_beams")
    cleanly(EVAL, f"--max_length {value}", {"--max_length": value}, "max_length")
works(KNOWLEDGE, "--batch_size 10^9", {"--batch_size": 10**9})
FACTORIES = [
    "bogus", "IVF1000,Flat", "HNSW0", "HNSW1,Flat", "PCA64,Flat", "IVF0,Flat", "PQ7", "LSH", "IDMap,Flat", "NSG32",
    "Flat" * 500, "HNSW-5", "HNSW1000000,Flat", "Flat,Flat",
]  # fmt: skip
for value in FACTORIES:
    refused(
        KNOWLEDGE, f"--index_factory {value[:20]}", {"--index_factory": value}, "index_factory", short=value == "HNSW0"
    )

# --- Checkpoints ------------------------------------------------------------------------------------------------------

BROKEN = {
    "config.json": NOT_JSON | {"of no known model": settings(model_type="nothing"),
                               "n_docs three": settings(n_docs="three"),
                               "architectures a number": settings(architectures=7),
                               "a name that is none": inside("question_encoder", _name_or_path=1.5),
                               "dropout 1.5": inside("generator", dropout=1.5),
                               "no dropout": inside("generator", activation_dropout=None),
                               "-1 heads": inside("question_encoder", num_attention_heads=-1),
                               "vectors NaN": inside("question_encoder", layer_norm_eps=float("nan")),
                               "code beside it": settings(model_type="evil", auto_map={"AutoConfig": "evil.C"})},
    "generation_config.json": {"cut": b"{", "a list": b"[1]","a start of -1": settings(decoder_start_token_id=-1),
                                          "a penalty of text": settings(length_penalty="x"),
                                          "an end of NaN": settings(eos_token_id=float("nan"))},
    "model.safetensors": {"empty": b"", "cut": cut(0.6), "garbage": b"\xff" * 999, "gone": None, "huge": huge_header,
                          "a flipped header": flip(0.001)},
    "generator_tokenizer/tokenizer.json": {"empty": b"", "cut": cut(0.5), "binary": b"\0\xff" * 50},
}  # fmt: skip
for script, flag in [(EVAL, "--model_name_or_path"), (FINETUNE, "--model_name_or_path")]:
    for file, ways in BROKEN.items():
        for name, change in ways.items():
            refused(script, f"{file} {name}", {flag: Copy("rag", {file: change})}, "model_name_or_path|n_docs")
    for value in ("", "{out}/none", "{world}/gold.qa", "nobody/nothing", "{world}/question_encoder"):
        refused(script, f"{flag} {value}", {flag: value}, "model_name_or_path", short=(script, value) == (EVAL, ""))
for part, flag in {
    "generator": "--generator_name_or_path",
    "question_encoder": "--question_encoder_name_or_path",
}.items():
    for file, change in {"config.json": b"[1]", "model.safetensors": cut(0.5), "tokenizer.json": b"{"}.items():
        refused(CONSOLIDATE, f"{part}'s {file}", {flag: Copy(part, {file: change})}, part)
encoder = Copy("context_encoder", {"model.safetensors": cut(0.5)})
refused(KNOWLEDGE, "encoder cut", {"--dpr_ctx_encoder_model_name": encoder}, "dpr_ctx_encoder_model_name")

# --- Index and passages -----------------------------------------------------------------------------------------------


def filled(index, vectors):
    index.add(vectors)
    return index


def longer(vectors):
    """One after the other: what is nearest is no more what has the largest product."""
    return vectors * np.arange(1, 9, dtype=np.float32)[:, None]


def numbered(index, vectors):
    index.add_with_ids(vectors, np.arange(100, 108))
    return index


INDEXES = {
    "of too few": lambda faiss, v: filled(faiss.IndexFlatIP(16), v[:7]),
    "of 32 dimensions": lambda faiss, v: filled(faiss.IndexFlatIP(32), v.repeat(2, 1)),
    "cut": lambda faiss, v: faiss.serialize_index(filled(faiss.IndexFlatIP(16), v)).tobytes()[:-50],
    "HNSW cut": lambda faiss, v: faiss.serialize_index(filled(faiss.index_factory(16, "HNSW8", 0), v)).tobytes()[:-50],
    "empty": lambda faiss, v: b"",
    "of bits": lambda faiss, v: faiss.serialize_index_binary(faiss.IndexBinaryFlat(64)).tobytes(),
}
COLUMNS = {
    "no embeddings": lambda c: {"title": c["title"], "text": c["text"]},
    "no title": lambda c: {"text": c["text"], "embeddings": c["embeddings"]},
    "titles are numbers": lambda c: c | {"title": list(range(8))},
    "embeddings are texts": lambda c: c | {"embeddings": [str(v) for v in c["embeddings"]]},
    "an embedding is missing": lambda c: c | {"embeddings": [None, *c["embeddings"][1:]]},
    "an embedding is short": lambda c: c | {"embeddings": [c["embeddings"][0][:5], *c["embeddings"][1:]]},
    "embeddings are NaN": lambda c: c | {"embeddings": [[float("nan")] * 16] * 8},
}
DATASET = {"data-*.arrow": {"empty": b"", "cut": cut(0.5), "garbage": b"\xff" * 999, "gone": None},
           "state.json": {"cut": b"{", "gone": None}, "dataset_info.json": {"cut": b"{", "gone": None}}  # fmt: skip
for script in (EVAL, FINETUNE):
    here = {"--passages_path": "{world}/passages", "--index_path": "{world}/index.faiss"}
    for name, build in INDEXES.items():
        refused(script, f"index {name}", here | {"--index_path": Index(build)}, "index_path")
    for name, change in COLUMNS.items():
        refused(
            script, f"passages, {name}", here | {"--passages_path": Passages(change)}, "passages_path|embeddings|title"
        )
    for file, ways in DATASET.items():
        for name, change in ways.items():
            changes = here | {"--passages_path": Copy("passages", {file: change})}
            refused(script, f"passages, {file} {name}", changes, "passages_path")
    by_distance = {
        "--index_path": Index(lambda faiss, v: filled(faiss.index_factory(16, "HNSW8,Flat"), longer(v))),
        "--passages_path": Passages(lambda c: c | {"embeddings": longer(np.array(c["embeddings"])).tolist()}),
    }
    refused(script, "index of distances", by_distance, "index_path")
    cleanly(script, "index with ids of its own", here | {"--index_path": Index(
        lambda faiss, v: numbered(faiss.index_factory(16, "IDMap,Flat", 0), v))}, "index_path")  # fmt: skip

# --- Settings, documents, relevance data ------------------------------------------------------------------------------

for name, content in NOT_JSON.items():
    if name not in ("an empty object",):
        refused(EVAL, f"--config_file {name}", {"--config_file": File(content, "c.json")}, "config_file")
NO_SETTINGS = {"a key twice": b"n_docs: 3\nn_docs: 2", "an unknown key": b"n_dox: 3", "a number as key": b"3: 4",
               "a dict": b"n_docs: {a: 1}"}  # fmt: skip
for name, content in NO_SETTINGS.items():
    changes = {"--n_docs": None, "--config_file": File(content, "c.yaml")}
    refused(EVAL, f"--config_file with {name}", changes, "n_do|3", short=name == "a key twice")
for name, content in {
    "without a tab": b"only text\n",
    "blank line": b"\na\tb\n",
    "title only": b"title\t \n",
    "header only": b"title\ttext\n",
}.items():
    refused(KNOWLEDGE, f"documents {name}", {"--csv_path": File(content)}, "csv_path")
NO_DOCUMENTS = [
    b"{oops", b"[" * 100_000, b'{"text": ' + b"9" * 100_000 + b"}", b'{"title": 3, "text": "a"}', b'{"text": NaN}',
    b'{"text": "a\\ud800"}', b"3", b"",
]  # fmt: skip
for line in NO_DOCUMENTS:
    refused(KNOWLEDGE, f"JSON line {line[:20]!r}", {"--csv_path": File(line + b"\n", "x.jsonl")}, "line 1")
for name, content in {
    "BOM": b"\xef\xbb\xbfa\tb c\n",
    "CRLF": b"a\tb c\r\n",
    "a megabyte": b"a\t" + b"the " * 250_000 + b"\n",
}.items():
    works(KNOWLEDGE, f"documents with {name}", {"--csv_path": File(content)})

# --- Language models --------------------------------------------------------------------------------------------------

LLAMA, BARE = {"--generator_name_or_path": "{world}/llama"}, "--generator_name_or_path"
RAG_LLAMA, LORA = {"--model_name_or_path": "{world}/llama_rag"}, {"--model_name_or_path": "{world}/llama_lora"}
works(CONSOLIDATE, "a language model", LLAMA, "Title: {title}", short=True)
refused(
    CONSOLIDATE, "chat without a chat template", LLAMA | {"--prompt_template": "chat"}, "has no chat template", True
)
refused(CONSOLIDATE, "a template of an encoder-decoder", {"--prompt_template": "chat"}, "--prompt_template")
refused(
    CONSOLIDATE, "a template that is not there", LLAMA | {"--prompt_template": "none.txt"}, "--prompt_template none"
)
for content in (b"", b"nothing", b"{text}", b"{question}:", b"{text} {question}", b"{question} {text}:", b"\xff\xfe"):
    template = LLAMA | {"--prompt_template": File(content)}
    refused(
        CONSOLIDATE, f"a template {content[:24]!r}", template, "--prompt_template|in.txt", short=content == b"{text}"
    )
for kind in ("fifo", "device", "folder", "link"):
    refused(CONSOLIDATE, f"a template {kind}", LLAMA | {"--prompt_template": Special(kind)}, "--prompt_template")
works(CONSOLIDATE, "a template of one's own", LLAMA | {"--prompt_template": File(b"the {text} where {question} :")})
NO_END = {name: settings(eos_token_id=None) for name in ("config.json", "generation_config.json")}
NO_END |= {"tokenizer_config.json": settings(eos_token=None, pad_token=None)}
refused(CONSOLIDATE, "no end token", {BARE: Copy("llama", NO_END)}, "end token")
NO_OTHER = {"tokenizer_config.json": settings(unk_token=None, bos_token=None)}
refused(CONSOLIDATE, "nothing to pad with", {BARE: Copy("llama", NO_OTHER)}, "pad")
for text in ("{text}", "", 7, "{question}:"):
    changed = {"config.json": inside("generator", prompt_template=text)}
    for script in (EVAL, FINETUNE):
        refused(
            script, f"a kept template {text!r}", {"--model_name_or_path": Copy("llama_rag", changed)}, "prompt_template"
        )
for script in (EVAL, FINETUNE):
    works(script, "a RAG model with a language model", RAG_LLAMA)
    refused(
        script, "causal of a BART", {"--model_name_or_path": "{world}/generator", "--model_type": "causal"}, "causal"
    )
    refused(script, "causal of a RAG model", RAG_LLAMA | {"--model_type": "causal"}, "--model_type causal")
    for file in ("base.json", "generator_adapter/adapter_config.json", "generator_adapter/adapter_model.safetensors"):
        for name, change in {"cut": cut(0.5), "empty": b"", "a list": b"[1]", "gone": None}.items():
            if change is None and file == "base.json":
                continue
            damaged = {"--model_name_or_path": Copy("llama_lora", {file: change}), "--lora_r": 2}
            if script == EVAL:
                del damaged["--lora_r"]
            refused(script, f"adapters whose {file} is {name}", damaged, "llama_lora", short=name == "cut")
    other = {"--model_name_or_path": Copy("llama_lora", {"base.json": settings(digest="0" * 32)})}
    refused(
        script,
        "adapters of another base",
        other | ({"--lora_r": 2} if script == FINETUNE else {}),
        "another base",
        True,
    )
    gone = {"--model_name_or_path": Copy("llama_lora", {"base.json": settings(name_or_path="/none")})}
    refused(script, "a base that is gone", gone | ({"--lora_r": 2} if script == FINETUNE else {}), "base")
works(EVAL, "a language model alone", {"--model_name_or_path": "{world}/llama", "--model_type": "causal"})
works(EVAL, "adapters", LORA)
works(FINETUNE, "adapters that are trained on", LORA | {"--lora_r": 2})
works(FINETUNE, "adapters", RAG_LLAMA | {"--lora_r": 2}, "LoRA r 2", short=True)
works(FINETUNE, "adapters of an encoder-decoder and an encoder", {"--lora_r": 2, "--question_encoder_lora_r": 2})
refused(FINETUNE, "adapters of another rank", LORA | {"--lora_r": 3}, "--lora_r")
refused(FINETUNE, "4 bits on a CPU", RAG_LLAMA | {"--lora_r": 2, "--load_in_4bit": "true"}, "--load_in_4bit.*GPU", True)
refused(FINETUNE, "8 bits on a CPU", RAG_LLAMA | {"--lora_r": 2, "--load_in_8bit": "true"}, "--load_in_8bit.*GPU")
for changes in (
    {"--lora_r": 0}, {"--lora_alpha": 4}, {"--lora_r": 2, "--lora_dropout": 1}, {"--lora_r": 2, "--lora_alpha": "nan"},
    {"--lora_r": 2, "--lora_target_modules": "none"}, {"--load_in_4bit": "true"}, {"--question_encoder_lora_r": -1},
    {"--freeze_generator": "true", "--freeze_question_encoder": "true"}, {"--freeze_generator": "true", "--lora_r": 2},
):  # fmt: skip
    refused(FINETUNE, f"adapters by {changes}", RAG_LLAMA | changes, "--(lora|load|question|freeze)")
refused(CONSOLIDATE, "merging a whole checkpoint", {"--merge_adapters": "{world}/llama_rag"}, "--merge_adapters")

NO_RECORDS = [
    b"{}", b"[3]", b"[null]", b'[{"question": null}]', b'[{"question": "q", "positive_ctxs": "abc"}]', b"[" * 100_000,
    b'[{"question": "', b'[{"id": ' + b"9" * 100_000 + b"}]", b"[] x",
]  # fmt: skip
for content in NO_RECORDS:
    refused(PARSE, f"records {content[:24]!r}", {"--src_path": File(content)}, "src_path")
for script in (EVAL, FINETUNE, KNOWLEDGE, CONSOLIDATE, PARSE):
    works(script, "as it should be", {}, short=script in (EVAL, KNOWLEDGE))
    refused(script, "a flag with a typo", {"--evalution_set": "x"}, "evalution_set")


@pytest.mark.parametrize("case", CASES.parameters())
def test_bad_input(world, tmp_path, case):
    require_answered_well(case, world, tmp_path / "case")

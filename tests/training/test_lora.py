"""LoRA in training: what learns, what checkpoints hold, how a run goes on, and what comes of it in evaluation."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import consolidate_rag_checkpoint
import eval_rag
import finetune_rag
from rag.errors import UserError
from rag.files import load_json, read_lines
from rag.models.adapters import has_adapters, plan_of
from rag.models.checkpoints import load_model
from rag.training.qa_module import GenerativeQAModule
from tests.cards import lasting
from tests.conftest import assert_equal_but_for_rounding
from tests.distributed.many_ranks import run_ranks
from tests.training.rank_runs import TOLERANCE, assert_same, outcome, train, two_ranks
from tests.training.test_finetune_rag import SMALL, run, run_killed_at

LORA = ["--lora_r", 4]


@pytest.fixture(scope="module")
def model_folder(checkpoint):
    return checkpoint("rag_sequence", "bart")


def weights_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def size_of(path):
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    ("model_type", "generator"), [("rag_sequence", "bart"), ("rag_token", "t5"), ("rag_sequence", "llama")]
)
def test_a_run_leaves_adapters_alone(model_type, generator, checkpoint, data_dir, tmp_path, capsys):
    """The Lightning checkpoints, the exported folders; both give what was trained."""
    base, out = checkpoint(model_type, generator), tmp_path / "out"
    run(base, data_dir, out, *LORA, "--question_encoder_lora_r", 2, "--do_train", "--do_predict")
    said = capsys.readouterr().out
    assert "LoRA r 4 on " in said and " and LoRA r 2 on 6 layers of the question encoder: " in said
    assert said.count("parameters learn") == 1
    trained = weights_of(out / "last.ckpt")
    assert trained and all(".lora_" in name for name in trained)
    assert {path.name for path in (out / "checkpoint2").iterdir()} == {
        "config.json", "generation_config.json", "base.json", "generator_adapter", "question_encoder_adapter",
        "question_encoder_tokenizer", "generator_tokenizer", "README.md",
    }  # fmt: skip
    assert load_json(out / "checkpoint2" / "base.json")["name_or_path"] == str(base)
    apart = load_model(str(out / "checkpoint2"), keep_adapters=True)
    own = apart.state_dict()
    assert all(torch.equal(own[name.removeprefix("model.")], weight) for name, weight in trained.items())
    before = load_model(str(base)).state_dict()
    for name, weight in own.items():
        if ".lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer.", ".")]), name
    merged = load_model(str(out / "checkpoint2"))
    assert not has_adapters(merged) and merged.state_dict().keys() == before.keys()
    assert any(not torch.equal(weight, before[name]) for name, weight in merged.state_dict().items())

    # The exported checkpoint, merged, answers as the training's test did.
    tested = run(out / "checkpoint2", data_dir, tmp_path / "test", "--do_predict")
    results = dict(line.split(": ") for line in read_lines(out / "test_results.txt"))
    assert tested["test_avg_loss"] == pytest.approx(float(results["test_avg_loss"]), rel=1e-4)
    assert read_lines(tmp_path / "test" / "test_generations.txt") == read_lines(out / "test_generations.txt")


def test_a_question_encoder_that_learns_in_full_is_beside_the_adapters(model_folder, data_dir, tmp_path):
    out = tmp_path / "out"
    run(model_folder, data_dir, out, *LORA, "--max_steps", 2)
    trained, best = load_file(out / "checkpoint1" / "trained.safetensors"), weights_of(out / "checkpoint1.ckpt")
    assert {name for name in best if ".lora_" not in name} == {f"model.{name}" for name in trained}
    assert all(name.startswith("rag.question_encoder.") for name in trained)
    merged = load_model(str(out / "checkpoint1")).state_dict()
    assert all(torch.equal(merged[name], weight) for name, weight in trained.items())
    module = GenerativeQAModule.load_from_checkpoint(out / "checkpoint1.ckpt")
    own = module.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in best.items())


@pytest.mark.parametrize(("generator", "flags"), [("bart", ["--dropout", 0.5]), ("llama", ["--bf16"])])
def test_a_frozen_generator_works_without_dropout_and_is_not_saved(
    generator, flags, checkpoint, data_dir, tmp_path, capsys
):
    model_folder, out = checkpoint("rag_sequence", generator), tmp_path / "out"
    run(model_folder, data_dir, out, "--freeze_generator", *flags)
    assert capsys.readouterr().out.count("parameters learn") == 1
    trained = weights_of(out / "last.ckpt")
    assert trained and all("question_encoder." in name for name in trained)
    before = load_model(str(model_folder)).state_dict()
    assert any(not torch.equal(before[name.removeprefix("model.")], weight) for name, weight in trained.items())
    module = GenerativeQAModule.load_from_checkpoint(out / "last.ckpt").train()
    assert not module.generator.training and module.model.rag.question_encoder.training
    exported = load_model(str(out / "checkpoint2")).state_dict()
    assert all(torch.equal(exported[name.removeprefix("model.")], weight) for name, weight in trained.items())
    assert all(torch.equal(before[name], exported[name]) for name in before if ".generator." in name)


@pytest.mark.parametrize("generator", ["bart", "t5", "llama"])
def test_a_bare_generator_learns_by_adapters(generator, request, data_dir, tmp_path):
    folder, out = request.getfixturevalue(f"{generator}_folder"), tmp_path / "out"
    flags = ["--model_name_or_path", folder, "--data_dir", data_dir, "--output_dir", out]
    words = [*flags, *SMALL[: SMALL.index("--n_docs")], *LORA, "--lora_dropout", 0.1]
    finetune_rag.main(finetune_rag.parse_args([str(word) for word in words]))
    assert all(".lora_" in name for name in weights_of(out / "last.ckpt"))
    assert not has_adapters(load_model(str(out / "checkpoint1")))


def test_eval_rag_measures_adapters_and_tells_them_apart(checkpoint, data_dir, knowledge, tmp_path):
    """The answers of the training's test; predictions of other adapters are not continued."""
    base, out, lines = checkpoint("rag_sequence", "bart"), tmp_path / "out", tmp_path / "lines.txt"
    run(base, data_dir, out, *LORA, "--do_train", "--do_predict")
    best = max(load_json(out / "metrics.json")["val"], key=lambda row: (row["val_em"], row["step"]))["step"] // 2
    shutil.copytree(out / f"checkpoint{best}", tmp_path / "copy")
    flags = {
        "evaluation_set": data_dir / "test.source", "gold_data_path": data_dir / "test.target",
        "gold_data_mode": "ans", "predictions_path": lines, "n_docs": 2, "num_beams": 1, "max_length": 25,
        "model_name_or_path": tmp_path / "copy", **knowledge,
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    eval_rag.main(eval_rag.parse_args(words))
    assert read_lines(lines) == read_lines(out / "test_generations.txt")
    path = tmp_path / "copy" / "generator_adapter" / "adapter_model.safetensors"
    save_file({name: weight * 2 for name, weight in load_file(path).items()}, path)
    with pytest.raises(UserError, match=r"model_name_or_path"):
        eval_rag.main(eval_rag.parse_args(words))


@pytest.mark.parametrize(
    ("generator", "parts"),
    [
        ("bart", []),
        ("bart", ["--freeze_question_encoder"]),
        ("llama", ["--question_encoder_lora_r", 2]),
        ("llama", ["--gradient_checkpointing"]),
    ],
)
def test_a_killed_run_goes_on_to_the_same_end(generator, parts, checkpoint, data_dir, tmp_path, monkeypatch):
    """To the bit, with dropout of what adapters read; exports that were damaged meanwhile are made again."""
    model_folder = checkpoint("rag_sequence", generator)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*LORA, *parts, "--lora_dropout", 0.2, "--num_train_epochs", 3, "--save_interval", 1e-6]
    run(model_folder, data_dir, whole, *flags)
    for deadly in (1, 4):
        run_killed_at(monkeypatch, deadly, model_folder, data_dir, killed, *flags)
    (killed / "checkpoint1" / "generator_adapter" / "adapter_model.safetensors").write_bytes(b"")
    shutil.rmtree(killed / "checkpoint2")
    run(model_folder, data_dir, killed, *flags)
    for name in ("last.ckpt", "checkpoint1.ckpt", "checkpoint2.ckpt", "checkpoint3.ckpt"):
        expected, found = weights_of(whole / name), weights_of(killed / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(weight, found[key]) for key, weight in expected.items()), name
    for number in (1, 2, 3):
        for file in (whole / f"checkpoint{number}").rglob("*"):
            if file.is_file():
                own = killed / f"checkpoint{number}" / file.relative_to(whole / f"checkpoint{number}")
                assert lasting(own) == lasting(file), file


def test_a_run_goes_on_from_exported_adapters(model_folder, data_dir, tmp_path):
    """Its base is the first one's; what was trained before and is frozen now is not lost."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(model_folder, data_dir, first, *LORA, "--max_steps", 2)
    run(first / "checkpoint1", data_dir, second, *LORA, "--freeze_question_encoder", "--max_steps", 2)
    one, other = (load_model(str(out / "checkpoint1"), keep_adapters=True).state_dict() for out in (first, second))
    assert load_json(second / "checkpoint1" / "base.json") == load_json(first / "checkpoint1" / "base.json")
    moved = [name for name in one if not torch.equal(one[name], other[name])]
    assert moved and all(".lora_" in name for name in moved)
    before = load_model(str(model_folder)).state_dict()
    encoder = [name for name in before if "question_encoder" in name]
    assert any(not torch.equal(before[name], other[name]) for name in encoder)
    # It does not train on what the checkpoint does not have, and says what it has.
    for flags, message in (
        ([], "has adapters of its generator; give --lora_r 4 to train them on, or merge them first"),
        (["--lora_r", 8], r"has adapters of other settings \(--lora_r was 4 and is 8; --lora_alpha was 8 and is 16\)"),
        ([*LORA, "--lora_target_modules", "fc1"], "they were of 16 layers and would be of 2"),
    ):
        with pytest.raises(UserError, match=message):
            run(first / "checkpoint1", data_dir, tmp_path / "third", *flags, "--max_steps", 1)


def test_adapters_beside_a_generator_that_was_trained_in_full(model_folder, data_dir, tmp_path):
    """Its weights are no base's; merged they are."""
    first, whole = tmp_path / "first", tmp_path / "whole"
    run(model_folder, data_dir, first, "--question_encoder_lora_r", 2, "--max_steps", 1)
    flags = [*LORA, "--question_encoder_lora_r", 2, "--max_steps", 1]
    with pytest.raises(UserError, match="has a generator that was trained in full"):
        run(first / "checkpoint1", data_dir, tmp_path / "second", *flags)
    words = ["--merge_adapters", str(first / "checkpoint1"), "--dest", str(whole)]
    consolidate_rag_checkpoint.main(consolidate_rag_checkpoint.parse_args(words))
    run(whole, data_dir, tmp_path / "second", *flags)


def test_checkpoints_of_other_adapters_or_another_base_are_refused(model_folder, checkpoint, data_dir, tmp_path):
    out, resume = tmp_path / "out", ["--max_steps", 3, "--resume_from_checkpoint"]
    run(model_folder, data_dir, out, *LORA, "--max_steps", 2)
    with pytest.raises(UserError, match=r"--resume_from_checkpoint .* does not fit .*its adapters are of another base"):
        changed = tmp_path / "changed"
        shutil.copytree(model_folder, changed)
        model = load_model(str(changed))
        model.rag.generator.model.shared.weight.data.add_(0.1)
        model.save_pretrained(changed)
        run(changed, data_dir, tmp_path / "a", *LORA, *resume, out / "last.ckpt")
    with pytest.raises(UserError, match="it lacks 0 of the weights that learn here and has 21 others"):
        flags = ["--freeze_question_encoder", *resume]
        run(model_folder, data_dir, tmp_path / "b", *LORA, *flags, out / "last.ckpt")
    with pytest.raises(UserError, match="does not fit the model and its settings"):
        run(model_folder, data_dir, tmp_path / "c", "--lora_r", 2, *resume, out / "last.ckpt")
    with pytest.raises(UserError, match="does not fit the model and its settings"):
        run(model_folder, data_dir, tmp_path / "d", *resume, out / "last.ckpt")


def test_a_checkpoint_is_loaded_beside_its_own_base(checkpoint, data_dir, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(checkpoint("rag_sequence", "bart"), base)
    run(base, data_dir, out, *LORA, "--freeze_question_encoder", "--max_steps", 2)
    module = GenerativeQAModule.load_from_checkpoint(out / "last.ckpt", strict=True)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    for weight in module.parameters():
        weight.data.zero_()
    module.load_hf_checkpoint(out / "checkpoint1")
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
    model = load_model(str(base))
    model.rag.generator.model.shared.weight.data.add_(0.1)
    model.save_pretrained(base)
    with pytest.raises(UserError, match=r"last\.ckpt holds what was trained of another base than .*base"):
        GenerativeQAModule.load_from_checkpoint(out / "last.ckpt")
    with pytest.raises(UserError, match="holds adapters of another base"):
        GenerativeQAModule.load_from_checkpoint(out / "checkpoint1.ckpt")


def test_what_is_saved_is_small(model_folder, data_dir, tmp_path):
    run(model_folder, data_dir, tmp_path / "full", "--max_steps", 1)
    run(model_folder, data_dir, tmp_path / "lora", "--max_steps", 1, "--lora_r", 1, "--freeze_question_encoder")
    weights = {
        name: sum(size_of(file) for file in (tmp_path / name / "checkpoint1").rglob("*.safetensors"))
        for name in ("full", "lora")
    }
    assert weights["lora"] < 0.3 * weights["full"]  # two thirds of such a small file are the names
    assert size_of(tmp_path / "lora" / "last.ckpt") < 0.8 * size_of(tmp_path / "full" / "last.ckpt")


@pytest.mark.parametrize("further", [[], ["--gradient_checkpointing"], ["--bf16"]])
@pytest.mark.parametrize("generator", ["bart", "t5", "llama"])
def test_loss_and_gradients_are_those_of_the_merged_model(generator, further, checkpoint, data_dir, tmp_path):
    """Of the adapters' own: d loss / d W of the merged model, through the product of A and B."""
    base = checkpoint("rag_sequence", generator)
    words = ["--model_name_or_path", base, "--data_dir", data_dir, "--output_dir", tmp_path, *SMALL, *LORA, *further]
    words = [str(word) for word in [*words, "--freeze_question_encoder"]]
    module = GenerativeQAModule(finetune_rag.parse_args(words))
    module.setup("validate")
    torch.manual_seed(1)
    for name, weight in module.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    module.export(tmp_path / "exported")
    plain_words = [str(tmp_path / "exported") if word == str(base) else word for word in words]
    plain_words[plain_words.index("--lora_r") : plain_words.index("--lora_r") + 2] = ["--do_predict"]
    plain = GenerativeQAModule(finetune_rag.parse_args(plain_words))
    plain.setup("validate")
    assert has_adapters(module.model) and not has_adapters(plain.model)

    questions = ["what is the capital of france", "what is the capital of spain ? it lies near the sea"]
    tokens = module.question_tokenizer(questions, padding=True, return_tensors="pt")
    labels = module.answer_tokenizer(["paris", "madrid the city"], padding=True, return_tensors="pt")["input_ids"]
    batch = {**tokens, "labels": labels, "source": questions}
    with torch.autocast("cpu", torch.bfloat16, enabled="--bf16" in further):
        losses = [one.train().negative_log_likelihood(batch)[0] for one in (module, plain)]
    tolerance = {"rtol": 0.05, "atol": 0.1} if "--bf16" in further else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(*losses, **tolerance)
    for loss in losses:
        loss.sum().backward()
    if "--bf16" in further:
        return
    plain_weights, found, expected = dict(plain.named_parameters()), {}, {}
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A"):
            gradient = plain_weights[f"{name}.weight"].grad * layer.scaling["default"]
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            found |= {f"{name} A": a.grad, f"{name} B": b.grad}
            expected |= {f"{name} A": b.detach().T @ gradient, f"{name} B": gradient @ a.detach().T}
    assert len(found) == 2 * len(plan_of(module.generator).targets)
    assert_equal_but_for_rounding(found, expected)


@pytest.mark.parametrize("generator", ["bart", "t5", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_those_of_the_merged_model(generator, dtype, checkpoint, data_dir, tmp_path):
    """The trees of tokens read the weights of the linear layers: with what the adapters add to them."""
    from rag.generation.answering import answering_model
    from rag.generation.decoding import generate_answers
    from rag.generation.plain_decoder import decoder_of

    base = checkpoint("rag_sequence", generator)
    words = ["--model_name_or_path", base, "--data_dir", data_dir, "--output_dir", tmp_path, *SMALL, *LORA]
    module = GenerativeQAModule(finetune_rag.parse_args([str(word) for word in words]))
    torch.manual_seed(3)
    for name, weight in module.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.5)
    module.export(tmp_path / "exported")
    models = [module.model.eval(), load_model(str(tmp_path / "exported")), load_model(str(base))]
    if dtype != torch.float32:
        models = [answering_model(model, dtype) for model in models]
    ids = torch.randint(4, 40, (6, 9))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        hidden = []
        for model in models:
            decoder = decoder_of(model.generator)
            memory = decoder.read(ids, mask)
            tokens = torch.randint(4, 40, (1, 3), generator=torch.manual_seed(0)).expand(6, -1)
            ancestors = torch.ones(3, 3).tril().bool()[None]
            hidden.append(decoder.decode(tokens, torch.arange(3)[None], ancestors, memory).float())
        answers = [
            generate_answers(model, ids, mask, torch.zeros(2, 3), n_docs=3, num_beams=3, max_length=8)
            for model in models
        ]
    if dtype == torch.float32:
        assert_equal_but_for_rounding(hidden[0], hidden[1])
        assert torch.equal(answers[0], answers[1])
    else:
        assert (hidden[0] - hidden[1]).norm() < 0.05 * hidden[1].norm()
    assert (hidden[0] - hidden[2]).norm() > 0.2 * hidden[1].norm()


@pytest.mark.slow
@pytest.mark.parametrize("further", [[], ["--freeze_question_encoder"], ["--question_encoder_lora_r", "2"]])
def test_two_ranks_are_one(further, words, alone, tmp_path):
    """`ddp` waits for no weight that has no gradient."""
    flags = ["--lora_r", "4", *further]
    argv = two_ranks(words, tmp_path / "out", "--do_train", "--do_predict", *flags)
    run_ranks(train, 2, tmp_path, argv, tmp_path / "out", seconds=120)
    found, expected = outcome(tmp_path / "out"), alone(1, *flags)
    if "--freeze_question_encoder" in further:
        found["log"], expected = dict(found["log"]), dict(expected)
        for one in (found, expected):
            one["log"] = {name: values for name, values in one["log"].items() if values}
    assert_same(found, expected, **TOLERANCE)


@pytest.mark.slow
def test_two_ranks_are_one_with_a_language_model(words, checkpoint, tmp_path):
    """As are a run of two ranks that is asked to end and goes on, and one that is not."""
    place = words.index("--dropout")  # its config has none
    words = ["--model_name_or_path", str(checkpoint("rag_token", "llama")), *words[2:place], *words[place + 2 :]]
    flags = ["--lora_r", "4", "--question_encoder_lora_r", "2", "--max_combined_length", "64", "--do_train"]
    one, two = tmp_path / "one", tmp_path / "two"
    argv = [*words, *flags, "--train_batch_size", "4", "--output_dir", str(one)]
    finetune_rag.main(finetune_rag.parse_args(argv))
    for end in (4, None):
        ends = run_ranks(train, 2, tmp_path, two_ranks(words, two, *flags), two, end, seconds=120)
        if end is not None:
            assert [status for status, _ in ends] == [143, 143]
    assert_same(outcome(two), outcome(one), **TOLERANCE)


# --- Flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora_r 0", "--lora_r 0 must be 1 or more"),
        ("--lora_r 4 --lora_alpha 0", "--lora_alpha 0.0 must be more than 0"),
        ("--lora_r 4 --lora_dropout 1", "--lora_dropout 1.0 must be a probability"),
        ("--lora_alpha 16", "--lora_alpha is for adapters; give --lora_r"),
        ("--lora_dropout 0.1", "--lora_dropout is for adapters; give --lora_r"),
        ("--lora_target_modules q_proj", "--lora_target_modules is for adapters; give --lora_r"),
        ("--lora_r 4 --freeze_generator", "--lora_r and --freeze_generator contradict each other"),
        ("--question_encoder_lora_r 4 --freeze_question_encoder", "contradict each other"),
        ("--question_encoder_lora_r 4 --index_name bm25 --passages_path x", "and --index_name bm25 contradict"),
        ("--freeze_generator --freeze_question_encoder", "nothing would learn"),
        ("--freeze_generator --index_name bm25 --passages_path x", "nothing would learn"),
        ("--freeze_generator --model_type bart", "nothing would learn"),
        ("--load_in_4bit --load_in_8bit --lora_r 4", "--load_in_4bit and --load_in_8bit contradict each other"),
        ("--load_in_4bit", "what is quantized cannot be trained; give --lora_r 16"),
        ("--lora_r 4 --strategy fsdp", "--strategy fsdp shares out what learns, and --lora_r 4 leaves little"),
        ("--freeze_generator --strategy fsdp", "--strategy fsdp .* --freeze_generator"),
    ],
)
def test_flags_that_cannot_be_meant(flags, message):
    words = ["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o", *flags.split()]
    with pytest.raises(UserError, match=message) as error:
        finetune_rag.parse_args(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", ["--lora_r 4 --freeze_embeds", "--question_encoder_lora_r 2 --lora_dropout 0.1"])
def test_flags_that_can(flags):
    finetune_rag.parse_args(["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o", *flags.split()])


def test_a_missing_package_is_one_line(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    words = ["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o", "--question_encoder_lora_r", "4"]
    with pytest.raises(UserError, match=r"^--question_encoder_lora_r needs a package .*: pip install peft$"):
        finetune_rag.parse_args(words)


def test_layers_that_are_not_there_are_told_with_some_that_are(model_folder, data_dir, tmp_path):
    with pytest.raises(
        UserError, match=r"^--lora_target_modules gate_proj: a bart model has no such .*; it has fc1 fc2"
    ):
        run(model_folder, data_dir, tmp_path / "out", *LORA, "--lora_target_modules", "fc1", "gate_proj")
    with pytest.raises(UserError, match="--lora_target_modules lm_head: a bart model has no such linear layers"):
        run(model_folder, data_dir, tmp_path / "out", *LORA, "--lora_target_modules", "lm_head")


def test_a_generator_without_question_encoder_has_no_adapters_of_one(bart_folder, data_dir, tmp_path):
    with pytest.raises(UserError, match=r"--question_encoder_lora_r: .* has no question encoder"):
        words = ["--model_name_or_path", bart_folder, "--data_dir", data_dir, "--output_dir", tmp_path / "out"]
        flags = [*words, *SMALL[: SMALL.index("--n_docs")], "--question_encoder_lora_r", 2]
        finetune_rag.main(finetune_rag.parse_args([str(word) for word in flags]))


@pytest.fixture
def wide_checkpoint(request, question_encoder_folder, tmp_path):
    """Of a generator whose sizes bitsandbytes' kernels can divide."""

    def make(generator: str):
        part, tokenizer = (request.getfixturevalue(name) for name in (generator, f"{generator}_tokenizer"))
        config = copy.deepcopy(part.config)
        sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
        if generator == "llama":
            sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128}
        config.update(sizes | {"init_std": 0.1, "initializer_range": 0.1})
        torch.manual_seed(3)
        type(part)(config).save_pretrained(tmp_path / "generator")
        tokenizer.save_pretrained(tmp_path / "generator")
        words = ["--generator_name_or_path", tmp_path / "generator", "--dest", tmp_path / "wide"]
        words = [str(word) for word in [*words, "--question_encoder_name_or_path", question_encoder_folder]]
        return consolidate_rag_checkpoint.main(consolidate_rag_checkpoint.parse_args(words))

    return make


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("generator", ["llama", "bart"])
def test_adapters_beside_quantized_weights(
    bits, generator, wide_checkpoint, knowledge, data_dir, tmp_path, monkeypatch
):
    """By bitsandbytes' kernels for CPUs, where it is installed."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # of these kernels none has a backward pass
    monkeypatch.setattr("rag.models.quantization.own_gpu", lambda: "cpu")
    monkeypatch.setattr("lightning_base.quantization_problems", lambda *given: [])
    train_quantized(bits, wide_checkpoint(generator), knowledge, data_dir, tmp_path)


@pytest.mark.cuda
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("generator", ["llama", "bart"])
def test_adapters_beside_quantized_weights_on_a_gpu(bits, generator, wide_checkpoint, knowledge, data_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    on_gpu = ["--accelerator", "gpu", "--devices", 1]
    train_quantized(bits, wide_checkpoint(generator), knowledge, data_dir, tmp_path, *on_gpu)


def train_quantized(bits, base, knowledge, data_dir, tmp_path, *further):
    """A run that goes on, and what it exports."""
    whole = tmp_path / "whole"
    search = [word for name, value in knowledge.items() for word in (f"--{name}", value)]
    flags = [*search, "--max_combined_length", 48, *LORA, f"--load_in_{bits}", "--do_train", *further]
    run(base, data_dir, whole, *flags, "--do_predict")
    assert load_json(whole / "checkpoint1" / "base.json")["quantization"] == bits
    trained = weights_of(whole / "last.ckpt")
    assert all(".lora_" in name or "question_encoder" in name for name in trained)
    merged, before = load_model(str(whole / "checkpoint2")).state_dict(), load_model(str(base)).state_dict()
    assert merged.keys() == before.keys() and all(weight.dtype == before[name].dtype for name, weight in merged.items())
    # From an exported checkpoint, which must be read as it was.
    message = f"was trained beside weights in {bits}; give --load_in_{bits}, or merge"
    with pytest.raises(UserError, match=message):
        run(whole / "checkpoint2", data_dir, tmp_path / "other", *search, *LORA, *further)
    run(whole / "checkpoint2", data_dir, tmp_path / "other", *flags, "--max_steps", 1, "--bf16")
    resumed = ["--resume_from_checkpoint", whole / "checkpoint1.ckpt", "--do_predict"]
    run(base, data_dir, tmp_path / "resumed", *flags, *resumed)
    again = weights_of(tmp_path / "resumed" / "last.ckpt")
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if further else {"rtol": 0, "atol": 0}  # a GPU adds in any order
    for name, weight in trained.items():
        torch.testing.assert_close(again[name], weight, msg=name, **tolerance)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_weights_need_a_gpu(bits, model_folder, data_dir, tmp_path):
    with pytest.raises(UserError, match=rf"^--load_in_{bits}: .* CUDA GPU, and none is used here; leave it out$"):
        run(model_folder, data_dir, tmp_path / "out", *LORA, f"--load_in_{bits}")
    assert {path.name for path in (tmp_path / "out").rglob("*")} <= {".lock"}

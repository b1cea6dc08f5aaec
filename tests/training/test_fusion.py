"""Training a Fusion-in-Decoder: plain passes over states joined by hand, one passage, whole runs, what is refused."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import RagTokenizer
from transformers.modeling_outputs import BaseModelOutput

import eval_rag
import report_rag
from rag import packing
from rag.errors import UserError
from rag.files import load_json, read_lines, write_lines
from rag.generation import logprobs
from rag.generation.stacks import use_packed_rows
from rag.models.checkpoints import load_model
from rag.models.fid_rag import RagFidForGeneration
from rag.packing import right_padded_lengths
from rag.retrieval.retriever import RagKnowledgeRetriever
from rag.training import loss as loss_module
from rag.training.arguments import parse_args
from rag.training.fusion import TEACHERS, fused_nll
from rag.training.loss import decoder_inputs_and_targets, sequence_nll
from rag.training.qa_module import GenerativeQAModule
from rag.training.retriever_loss import RETRIEVER_LOSSES
from tests.conftest import QUESTIONS, assert_equal_but_for_rounding, in_float64
from tests.distributed.many_ranks import run_ranks
from tests.generation.test_decoding import MAKE, N_DOCS, VOCABULARY, make_contexts
from tests.training.rank_runs import TOLERANCE, assert_same, frozen_of, outcome, train, two_ranks
from tests.training.test_finetune_rag import run, run_killed_at

# Of five questions: all passages, a gap, no passage at all, the first one missing, a single one.
IS_THERE = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]], dtype=bool)


def make_batch(generator, seed: int = 0):
    """Contexts as `retrieve_contexts` finds them, some missing, and answers of 1 to 6 tokens."""
    pad = generator.config.pad_token_id
    ids, mask, scores = make_contexts(pad, seed)
    doc_ids = np.where(IS_THERE, np.arange(N_DOCS), -1)
    scores = scores.masked_fill(torch.from_numpy(~IS_THERE), float("-inf"))
    contexts = SimpleNamespace(
        input_ids=ids, attention_mask=mask, doc_scores=scores, doc_ids=doc_ids, lengths=right_padded_lengths(mask)
    )
    torch.manual_seed(seed)
    lengths = torch.tensor([[5], [2], [1], [6], [3]])
    labels = torch.randint(3, VOCABULARY, (5, 6)).masked_fill(torch.arange(6) >= lengths, pad)
    inputs, targets = decoder_inputs_and_targets(labels, generator.config)
    batch = {"decoder_input_ids": inputs, "decoder_targets": targets, "decoder_lengths": lengths[:, 0].numpy()}
    return contexts, batch


def read_plainly(generator, contexts, batch, question: int, passages: list[int], **outputs):
    """transformers' outputs for one answer, from the states of some passages, each encoded without the others."""
    width = len(IS_THERE[0])
    states = []
    for passage in passages:
        row = question * width + passage
        own = contexts.input_ids[row : row + 1, : int(contexts.attention_mask[row].sum())]
        states.append(generator.get_encoder()(own)[0])
    states = torch.cat(states, 1)
    return generator(
        encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=torch.ones(1, states.shape[1]),
        decoder_input_ids=batch["decoder_input_ids"][question : question + 1], use_cache=False, **outputs,
    )  # fmt: skip


def passages_of(question: int) -> list[int]:
    return np.flatnonzero(IS_THERE[question]).tolist() or [0]


def plain_nll(generator, contexts, batch, question: int, passages: list[int], label_smoothing: float = 0.0):
    logits = read_plainly(generator, contexts, batch, question, passages).logits
    targets = batch["decoder_targets"][question : question + 1]
    return sequence_nll(logits, targets, generator.config.pad_token_id, label_smoothing)[0]


def gradients_of(generator, loss) -> dict[str, torch.Tensor]:
    generator.zero_grad()
    loss.sum().backward()
    return {name: weight.grad.clone() for name, weight in generator.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("kind", MAKE)
def test_loss_and_gradients_are_those_of_plain_passes(kind, packs, label_smoothing, dtype, monkeypatch):
    """With contexts in several groups and the vocabulary in several parts; also padded, as other attention needs it."""
    monkeypatch.setattr(packing, "GROUP_COST", 1)
    for module in (loss_module, logprobs):
        monkeypatch.setattr(module, "CHUNK_VOCABULARY", 16)
    generator = MAKE[kind](0)
    generator = generator if dtype == torch.float64 else generator.float()
    contexts, batch = make_batch(generator)
    plain = [plain_nll(generator, contexts, batch, n, passages_of(n), label_smoothing) for n in range(5)]
    expected = torch.stack(plain)
    expected_gradients = gradients_of(generator, expected)
    if packs:
        use_packed_rows(generator)
    loss = fused_nll(generator, contexts, batch, label_smoothing)
    assert loss.dtype == dtype
    assert_equal_but_for_rounding(loss, expected)
    assert_equal_but_for_rounding(gradients_of(generator, loss), expected_gradients)


@pytest.mark.parametrize("kind", MAKE)
def test_one_passage_is_the_plain_generator_and_the_order_changes_nothing(kind):
    generator = MAKE[kind](1)
    use_packed_rows(generator)
    contexts, batch = make_batch(generator)
    loss = fused_nll(generator, contexts, batch)
    row = 4 * N_DOCS + 2  # the last question's only passage
    logits = generator(
        input_ids=contexts.input_ids[row : row + 1], attention_mask=contexts.attention_mask[row : row + 1],
        decoder_input_ids=batch["decoder_input_ids"][4:],
    ).logits  # fmt: skip
    alone = sequence_nll(logits, batch["decoder_targets"][4:], generator.config.pad_token_id)
    assert loss[4].item() == pytest.approx(alone.item(), abs=1e-6)

    order = [3, 1, 0, 2]
    rows = (np.arange(5)[:, None] * N_DOCS + order).ravel()
    turned = copy.copy(contexts)
    turned.input_ids, turned.attention_mask = contexts.input_ids[rows], contexts.attention_mask[rows]
    turned.lengths, turned.doc_ids = contexts.lengths[rows], contexts.doc_ids[:, order]
    with_passages = [0, 1, 3, 4]
    assert_equal_but_for_rounding(fused_nll(generator, turned, batch)[with_passages], loss[with_passages])


# --- What it teaches the retriever ------------------------------------------------------------------------------------


def teacher_of(name, generator, contexts, batch):
    noted = []
    fused_nll(generator, contexts, batch, 0.0, noted.append, name)
    return noted[0]


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("kind", MAKE)
def test_a_passage_alone_and_all_but_it_are_read_as_by_plain_passes(kind, packs):
    generator = MAKE[kind](2)
    contexts, batch = make_batch(generator)
    if packs:
        use_packed_rows(generator)
    alone = teacher_of("pdist", generator, contexts, batch)
    without = teacher_of("loop", generator, contexts, batch).all_but_each(contexts.doc_scores)
    assert alone.lengths.tolist() == [5, 2, 1, 6, 3]
    with torch.no_grad():
        for question in range(5):
            for passage in passages_of(question):
                expected = -plain_nll(generator, contexts, batch, question, [passage])
                assert alone.answers[question, passage].item() == pytest.approx(expected.item(), abs=1e-9)
                others = [other for other in passages_of(question) if other != passage]
                if others:
                    expected = -plain_nll(generator, contexts, batch, question, others)
                    assert without[question, passage].item() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("kind", MAKE)
def test_attention_is_that_of_a_plain_pass_times_the_values(kind):
    generator = MAKE[kind](3)
    contexts, batch = make_batch(generator)
    plain = copy.deepcopy(generator)
    plain.set_attn_implementation("eager")
    values: list[torch.Tensor] = []
    for layer in plain.get_decoder().layers if kind == "bart" else plain.get_decoder().block:
        module = layer.encoder_attn.v_proj if kind == "bart" else layer.layer[1].EncDecAttention.v
        module.register_forward_hook(lambda _, __, value: values.append(value))
    use_packed_rows(generator)
    found = teacher_of("adist", generator, contexts, batch).attention
    is_read = torch.tensor([[passage in passages_of(n) for passage in range(N_DOCS)] for n in range(5)])
    assert found.dtype == torch.float64 and (found[~is_read] == 0).all() and (found[is_read] > 0).all()
    for question in range(5):
        values.clear()
        passages, length = passages_of(question), batch["decoder_lengths"][question]
        with torch.no_grad():
            shares = read_plainly(plain, contexts, batch, question, passages, output_attentions=True).cross_attentions
        assert len(shares) == len(values) == 2  # layers
        of_layers = []
        for own, value in zip(shares, values, strict=True):
            norms = value[0].unflatten(-1, (own.shape[1], -1)).norm(dim=-1)  # (S, heads)
            of_layers.append((own[0, :, :length] * norms.T[:, None]).mean((0, 1)))
        of_tokens = torch.stack(of_layers).mean(0)  # (S)
        starts = 0
        for passage in passages:
            end = starts + contexts.lengths[question * N_DOCS + passage]
            expected = of_tokens[starts:end].sum().item()
            assert found[question, passage].item() == pytest.approx(expected, rel=1e-9)
            starts = end


def test_attention_of_padded_contexts_is_refused():
    """As tokenizers leave them that pad on the left, of a retriever that is none of ours."""
    generator = MAKE["t5"](3)
    contexts, batch = make_batch(generator)
    use_packed_rows(generator)
    rows = [torch.tensor(part).flip(1) for part in (contexts.input_ids.tolist(), contexts.attention_mask.tolist())]
    left = SimpleNamespace(**(vars(contexts) | {"input_ids": rows[0], "attention_mask": rows[1], "lengths": None}))
    with pytest.raises(UserError, match=r"--retriever_loss adist .* take a tokenizer .* with padding_side right"):
        teacher_of("adist", generator, left, batch)


def test_adist_of_worked_numbers():
    """Attention of 0.6 and 0.3 at a temperature of 0.3 teaches 0.731 and 0.269; a missing passage nothing."""
    teacher = SimpleNamespace(attention=torch.tensor([[0.6, 0.0, 0.3]]))
    scores = torch.tensor([[0.2, float("-inf"), 0.2]], requires_grad=True)
    loss = RETRIEVER_LOSSES["adist"](teacher, scores, 1.0, 0.3)
    shares = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]
    assert loss.item() == pytest.approx(sum(share * math.log(2 * share) for share in shares), abs=1e-6)
    loss.sum().backward()
    assert scores.grad.tolist()[0] == pytest.approx([0.5 - shares[0], 0.0, 0.5 - shares[1]], abs=1e-6)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_changes_neither_the_loss_nor_the_dropout(name):
    generator = MAKE["bart"](4)
    use_packed_rows(generator)
    generator.train()
    contexts, batch = make_batch(generator)
    losses = []
    for note in (None, lambda teacher: None):
        torch.manual_seed(1)
        losses.append(fused_nll(generator, contexts, batch, 0.1, note, name))
    assert torch.equal(*losses) and generator.training and all(part.training for part in generator.modules())


def test_every_loss_of_the_retrievers_own_has_a_teacher():
    assert TEACHERS.keys() == RETRIEVER_LOSSES.keys()


# --- Steps and runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(checkpoint):
    return {name: checkpoint("fid", name) for name in ("bart", "t5")}


@pytest.fixture
def step(model_folder, bert_tokenizer, request):
    """A function that takes one step with dropout under given flags: losses and gradients."""

    def take(name, *flags):
        model = load_model(str(model_folder[name]), config_overrides={"dropout": 0.1})
        assert isinstance(model, RagFidForGeneration)
        tokenizer = RagTokenizer(bert_tokenizer, request.getfixturevalue(f"{name}_tokenizer"))
        args = parse_args(["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o", *flags])
        retriever = RagKnowledgeRetriever(model.config, tokenizer.question_encoder, tokenizer.generator)
        module = GenerativeQAModule(args, model, tokenizer, retriever).train()
        if not args.training.bf16:
            in_float64(module.model)
        module.is_log_step = lambda: False
        retriever.init_retrieval()
        batch = dict(bert_tokenizer([question for question, _ in QUESTIONS], padding=True, return_tensors="pt"))
        answers = [answer + " of the sea" * (i % 3) for i, (_, answer) in enumerate(QUESTIONS)]
        batch["labels"] = module.answer_tokenizer(text_target=answers, padding=True, return_tensors="pt").input_ids
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.training.bf16):
            losses = module._training_losses(module.prepare_batch(batch))[0]
        losses.mean().backward()
        return losses.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}

    return take


def of_the_encoder(gradients) -> set[str]:
    return {name for name in gradients if ".question_encoder." in name}


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("flags", [[], ["--retriever_loss", "adist"]])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(name, flags, step):
    losses, gradients = step(name, *flags)
    again, checkpointed = step(name, "--gradient_checkpointing", *flags)
    assert bool(of_the_encoder(gradients)) == bool(flags)
    assert_equal_but_for_rounding(again, losses)
    assert_equal_but_for_rounding(checkpointed, gradients)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_bf16_is_near_full_precision(name, step):
    losses, gradients = step(name, "--retriever_loss", "adist", "--dropout", "0")
    half, half_gradients = step(name, "--retriever_loss", "adist", "--bf16")
    torch.testing.assert_close(half.double(), losses, rtol=0.2, atol=0.2)
    assert half_gradients.keys() == gradients.keys()
    assert all(gradient.dtype == torch.float32 for gradient in half_gradients.values())


@pytest.mark.parametrize("retriever_loss", RETRIEVER_LOSSES)
def test_the_generator_learns_the_same_whatever_teaches_the_retriever(retriever_loss, step):
    _, expected = step("bart")
    _, gradients = step("bart", "--retriever_loss", retriever_loss)
    encoder = of_the_encoder(gradients)
    assert encoder and not of_the_encoder(expected)
    assert max(gradients[name].abs().max() for name in encoder) > 1e-6
    generator = {name: gradient for name, gradient in gradients.items() if name not in encoder}
    assert_equal_but_for_rounding(generator, expected)


def test_a_run_learns_and_its_checkpoint_is_evaluated(model_folder, data_dir, tmp_path, capsys):
    """The test's answers are those of `eval_rag.py` (of T5, whose words are all good); nothing has posteriors."""
    out = tmp_path / "out"
    run(model_folder["t5"], data_dir, out, "--do_train", "--do_predict", "--num_train_epochs", 4, "--num_beams", 1)
    said = capsys.readouterr().out
    assert "The question encoder stays as it is: a Fusion-in-Decoder teaches it by --retriever_loss" in said
    validations = load_json(out / "metrics.json")["val"]
    assert validations[-1]["val_avg_loss"] < validations[0]["val_avg_loss"]
    best = max(range(4), key=lambda n: (validations[n]["val_avg_em"], n))
    folder = out / f"checkpoint{best + 1}"
    assert load_json(folder / "config.json")["architectures"] == ["RagFidForGeneration"]
    assert "Fusion-in-Decoder of" in (folder / "README.md").read_text()
    before, after = load_model(str(model_folder["t5"])).state_dict(), load_model(str(folder)).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("generator" in name for name in moved) and not of_the_encoder(moved)

    write_lines([question for question, _ in QUESTIONS], tmp_path / "q")
    write_lines([answer for _, answer in QUESTIONS], tmp_path / "a")
    words = ["--model_name_or_path", folder, "--evaluation_set", tmp_path / "q", "--gold_data_path", tmp_path / "a",
             "--gold_data_mode", "ans", "--n_docs", 2, "--num_beams", 1, "--max_length", 25, "--print_docs",
             "--predictions_path", tmp_path / "answers.txt"]  # fmt: skip
    scores = eval_rag.main(eval_rag.parse_args([str(word) for word in words]))
    assert " (fid), index HNSWFlat" in capsys.readouterr().out
    assert "attribution" not in scores and 0 <= scores["em"] <= 1
    records = [json.loads(line) for line in read_lines(tmp_path / "answers.txt.jsonl")]
    for record in records:
        assert "posteriors" not in record and record["answer_log_prob"] <= 0 and len(record["titles"]) == 2
    assert load_json(tmp_path / "answers.txt.scores.json")["settings"]["model_type"] == "fid"
    assert read_lines(tmp_path / "answers.txt") == read_lines(out / "test_generations.txt")

    words = ["--output_path", tmp_path / "report.html", "--predictions_path", tmp_path / "answers.txt",
             "--gold_data_path", tmp_path / "a", "--gold_data_mode", "ans", "--run_dir", out]  # fmt: skip
    report_rag.main(report_rag.parse_args([str(word) for word in words]))
    assert "attribution" not in (tmp_path / "report.html").read_text().lower()


@pytest.mark.parametrize("flags", [[], ["--retriever_loss", "adist", "--teacher_temperature", 0.1]])
def test_the_same_command_goes_on_where_it_was_killed(flags, model_folder, data_dir, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--num_train_epochs", 2, "--save_interval", 1e-6, *flags]
    run(model_folder["t5"], data_dir, whole, *flags)
    run_killed_at(monkeypatch, 1, model_folder["t5"], data_dir, killed, *flags)
    run(model_folder["t5"], data_dir, killed, *flags)
    weights = [torch.load(out / "last.ckpt", weights_only=True)["state_dict"] for out in (whole, killed)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.parametrize(
    ("generator", "flags"),
    [
        ("bart", ["--retriever_loss", "adist", "--freeze_generator"]),
        ("t5", ["--retriever_loss", "loop", "--bf16", "--gradient_checkpointing"]),
        ("bart", ["--retriever_loss", "lsr", "--lora_r", 4]),
        ("t5", ["--retriever_loss", "emdr2", "--attn_implementation", "eager"]),
    ],
)
def test_a_run_logs_both_losses(generator, flags, model_folder, data_dir, tmp_path):
    run(model_folder[generator], data_dir, tmp_path / "out", *flags, "--max_steps", 2)
    logged = load_json(tmp_path / "out" / "metrics.json")["train"][-1]
    assert logged["loss"] == pytest.approx(logged["answer_loss"] + logged["retriever_loss"], rel=1e-4)
    assert logged["retriever_loss"] > 0 and logged["grad_norm_question_encoder"] > 0


@pytest.mark.parametrize(("temperature", "is_told"), [(100, True), (1e-3, False)])
def test_a_teacher_that_holds_all_passages_for_alike_is_told_once(
    temperature, is_told, model_folder, data_dir, tmp_path, capsys
):
    flags = ["--retriever_loss", "adist", "--teacher_temperature", temperature, "--max_steps", 3]
    flags += ["--log_every_n_steps", 2]
    run(model_folder["bart"], data_dir, tmp_path / "out", *flags)
    said = capsys.readouterr().out
    assert said.count("step 2: what teaches the retriever holds all passages for nearly alike") == is_told
    assert said.count("smaller --teacher_temperature") == is_told


def test_a_question_without_passages_is_trained_on(model_folder, data_dir, knowledge, tmp_path):
    """BM25 finds none with any of its words."""
    for file in data_dir.glob("*.source"):
        write_lines(["xylophone?", *read_lines(file)[1:]], file)
    index = ["--index_name", "bm25", "--passages_path", knowledge["passages_path"]]
    metrics = run(
        model_folder["bart"], data_dir, tmp_path / "out", *index, "--max_steps", 2, "--do_train", "--do_predict"
    )
    assert math.isfinite(metrics["val_avg_loss"]) and math.isfinite(metrics["test_avg_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("flags", [[], ["--retriever_loss", "loop"]])
def test_two_ranks_of_half_the_batch_are_one_process(flags, strategy, words, alone, checkpoint, tmp_path):
    words, out = ["--model_name_or_path", str(checkpoint("fid", "bart")), *words[2:]], tmp_path / "out"
    argv = two_ranks(words, out, "--strategy", strategy, *flags, "--do_train", "--do_predict")
    (metrics, _), _ = run_ranks(train, 2, tmp_path, argv, out, seconds=120)
    assert 0 <= metrics["val_em"] <= 1
    expected = alone(1, *words[:2], *flags)
    assert_same(outcome(out), expected if flags else frozen_of(expected), **TOLERANCE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--retriever_loss adist --model_type rag_token",
            "attention of a Fusion-in-Decoder, and --model_type rag",
        ),
        (
            "--retriever_loss adist --model_type fid --strategy fsdp",
            "adist and --strategy fsdp contradict each other",
        ),
        (
            "--retriever_loss adist --model_type fid --attn_implementation sdpa",
            "is read in packed rows alone",
        ),
        ("--freeze_generator --model_type fid", "--freeze_generator: the answers of a Fusion-in-Decoder"),
        (
            "--question_encoder_lora_r 4 --model_type fid",
            "_lora_r: the answers of a Fusion-in-Decoder",
        ),
        ("--retriever_loss adist --model_type t5", "it would teach nothing"),
    ],
)
def test_contradictions_are_told_at_once(flags, message):
    with pytest.raises(UserError, match=message):
        parse_args([*["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o"], *flags.split()])


def test_contradictions_are_told_of_what_the_checkpoint_says(model_folder, checkpoint, data_dir, tmp_path):
    with pytest.raises(UserError, match=r"attention of a Fusion-in-Decoder, and --model_name_or_path .* is none"):
        run(checkpoint("rag_sequence", "bart"), data_dir, tmp_path / "out", "--retriever_loss", "adist")
    with pytest.raises(UserError, match=r"the answers of a Fusion-in-Decoder \(--model_name_or_path .*teach the"):
        run(model_folder["t5"], data_dir, tmp_path / "out", "--freeze_generator")
    with pytest.raises(UserError, match="--model_type fid takes a generator of bart, t5, mt5, not of llama"):
        run(checkpoint("rag_sequence", "llama"), data_dir, tmp_path / "out", "--model_type", "fid")

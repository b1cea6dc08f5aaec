"""Prompts in three parts: what stands where, what is cut, what a text may not do, and what a checkpoint keeps."""

import copy

import pytest

from rag.errors import UserError
from rag.models.fit import settle_prompt
from rag.models.prompts import (
    PLAIN,
    decode_answers,
    encode_answers,
    encode_prompts,
    read_template,
    settle_language_model,
    template_problem,
)
from rag.models.questions import encode_questions

SOURCE = "--generator_name_or_path x"
TURNS = (
    "{% for message in messages %}<begin>{{ message['role'] + ' ' + message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<begin>the :{% endif %}"
)


@pytest.fixture
def parts(llama, llama_tokenizer):
    """Model and tokenizer that a test may change."""
    return copy.deepcopy(llama), copy.deepcopy(llama_tokenizer)


@pytest.fixture
def settled(parts):
    settle_language_model(*parts, PLAIN, SOURCE)
    return parts


def test_a_prompt_is_the_template_without_its_last_token(settled):
    model, tokenizer = settled
    rows, heads, cut = encode_prompts(
        tokenizer, [("oslo", "the city in norway"), ("rome", "")], ["where is oslo"] * 2, 64
    )
    texts = [tokenizer.decode(row) for row in rows]
    assert texts[0] == "<unk> : oslo <unk> : the city in norway <unk> : where is oslo <unk>", texts
    assert tokenizer.decode(rows[0][: heads[0]]) == "<unk> : oslo <unk> : the city in norway"
    assert tokenizer.decode(rows[1][: heads[1]]) == "<unk> : rome <unk> :"
    assert tokenizer.decode([model.config.decoder_start_token_id]) == ":"
    assert cut == 0


def test_the_same_passage_is_the_same_head_whatever_the_question(settled):
    passage = ("oslo", "the city in norway")
    rows, heads, _ = encode_prompts(settled[1], [passage, passage], ["where is oslo", "what"], 64)
    assert rows[0][: heads[0]] == rows[1][: heads[1]] and rows[0] != rows[1]


def test_a_long_passage_is_cut_and_never_the_question(settled):
    tokenizer = settled[1]
    passage, question = ("oslo", "the city " * 40), "where is oslo"
    (row,), (head,), cut = encode_prompts(tokenizer, [passage], [question], 20)
    assert len(row) == 20 and cut == 1
    assert tokenizer.decode(row[head:]).endswith("where is oslo <unk>")
    (row,), (head,), cut = encode_prompts(tokenizer, [passage], [question], 4)
    assert len(row) == 4 and head == 0 and cut == 1


def test_a_text_holds_no_control_token(settled):
    tokenizer = settled[1]
    control = {1, 2}
    rows, _, _ = encode_prompts(tokenizer, [("a<end>", "the <begin> city")], ["where <end> is"], 64)
    assert not control & set(rows[0])
    assert not control & set(encode_answers(tokenizer, ["oslo <begin>"])["input_ids"][0][:-1])


def test_answers_end_with_the_end_token_unless_they_are_cut(settled):
    tokenizer = settled[1]
    ids = encode_answers(tokenizer, ["the city in norway", "oslo"], 3, padding="longest", return_tensors="pt")[
        "input_ids"
    ]
    oslo = tokenizer.convert_tokens_to_ids("oslo")
    assert ids[1].tolist() == [oslo, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert ids.shape == (2, 3) and tokenizer.eos_token_id not in ids[0]
    start = settled[0].config.decoder_start_token_id
    assert decode_answers(tokenizer, ids.new_tensor([[start, oslo, tokenizer.eos_token_id]])) == ["oslo"]


def test_padding_is_no_end_token_and_no_answer_holds_it(settled):
    model, tokenizer = settled
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id == 0
    assert model.generation_config.eos_token_id == [2] and model.generation_config.suppress_tokens == [0]


def test_a_chat_templates_end_of_turn_ends_an_answer(parts):
    model, tokenizer = parts
    tokenizer.chat_template, tokenizer.eos_token = TURNS, "<begin>"
    template = read_template("chat", tokenizer, SOURCE)
    assert template.startswith("<begin>user {title}") and template.endswith("{question}<end><begin>the :")
    settle_language_model(model, tokenizer, template, SOURCE)
    assert tokenizer.eos_token == "<end>" and tokenizer.pad_token == "<unk>"
    rows, _, _ = encode_prompts(tokenizer, [("oslo", "the city")], ["where"], 64)
    assert rows[0][0] == 1 and rows[0][-3:] == [2, 1, tokenizer.convert_tokens_to_ids("the")]


def test_a_bare_language_model_reads_the_question_alone(parts):
    model, tokenizer = parts
    settle_prompt(model, tokenizer, SOURCE)
    tokens = encode_questions(tokenizer, ["where is oslo", "what"], 2, padding="longest", return_tensors="pt")
    texts = tokenizer.batch_decode(tokens["input_ids"])
    assert texts[1].startswith("<unk> : what <unk>")
    assert tokens["attention_mask"].sum(1).tolist() == [5, 4]  # two words, of which the third was cut
    again = copy.deepcopy(tokenizer)
    settle_prompt(model, again, SOURCE)
    assert again.prompt_template == model.config.prompt_template


@pytest.mark.parametrize(
    ("text", "closed_book", "problem"),
    [
        ("{text} {question}:", False, None),
        ("{title} {text} {question}:", False, None),
        ("{question}:", True, None),
        ("{text}:", False, "must have {question} once"),
        ("{title} {question}:", False, "must have {text} once"),
        ("nothing", False, "must have {text} and {question} once"),
        ("{text} {text} {question}:", False, "must have {text} once"),
        ("{question} {text}:", False, "must come behind"),
        ("{text} {question}", False, "must follow {question}"),
        ("{text} {question}:", True, "reads no passage"),
    ],
)
def test_what_is_wrong_with_a_template_is_said(text, closed_book, problem):
    found = template_problem(text, closed_book)
    assert found is None if problem is None else problem in found


def test_templates_and_tokenizers_that_cannot_be_used(parts, tmp_path):
    model, tokenizer = parts
    with pytest.raises(UserError, match=r"--prompt_template chat: --generator_name_or_path x: .* no chat template"):
        read_template("chat", tokenizer, SOURCE)
    with pytest.raises(UserError, match=r"--prompt_template missing.txt is not a file; give plain, chat"):
        read_template("missing.txt", tokenizer, SOURCE)
    (tmp_path / "template.txt").write_text("{text}\n")
    with pytest.raises(UserError, match=r"template.txt: it must have \{question\} once"):
        read_template(str(tmp_path / "template.txt"), tokenizer, SOURCE)
    tokenizer.chat_template = "{{ messages[0]['role'] }}"
    with pytest.raises(UserError, match="leaves out the request"):
        read_template("chat", tokenizer, SOURCE)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="its chat template cannot be used"):
        read_template("chat", tokenizer, SOURCE)
    tokenizer.chat_template = None
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(UserError, match="names an end token"):
        settle_language_model(model, tokenizer, PLAIN, SOURCE)


def test_a_tokenizer_with_an_end_token_alone_has_no_padding(parts):
    model, tokenizer = parts
    tokenizer.unk_token = tokenizer.bos_token = None
    with pytest.raises(UserError, match="none to pad with; give it a pad_token"):
        settle_language_model(model, tokenizer, PLAIN, SOURCE)

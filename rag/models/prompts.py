"""What a causal language model reads and says: prompts and answers as token ids, joined and never tokenized across.

    template = read_template("plain", tokenizer, "--generator_name_or_path path/to/model")
    settle_language_model(generator, tokenizer, template, source)        # once, when a checkpoint is made
    with_template(tokenizer, generator.config)                           # the tokenizer remembers the template
    rows, heads = encode_prompts(tokenizer, [("Oslo", "Oslo lies ...")], ["where is oslo?"], max_length=300)
    labels = encode_answers(tokenizer, ["norway"], max_length=25)        # with the end token

A prompt has three parts, each tokenized apart: the head, which depends on the passage alone; the question's; and the
end, which is always the same. Its very last token is the one that an answer begins behind: the decoder's start token,
as an encoder-decoder has one. So it is no part of the rows that are returned here. Nothing heavy is imported.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rag.errors import UserError
from rag.files import read_lines
from rag.models.tokens import reading, token_rows

PLAIN = "Title: {title}\nPassage: {text}\nQuestion: {question}\nAnswer:"
PLAIN_CLOSED_BOOK = "Question: {question}\nAnswer:"
CHAT = "{title}\n{text}\n\nAnswer the question with a few words of this passage.\nQuestion: {question}"
# Sachan et al. 2022 (arXiv 2204.07496), section 2.2; in two parts, so that a long passage is cut before the second.
PASSAGE, ASK_FOR_QUESTION = "Passage: {title} {text}.", " Please write a question based on this passage."
TEMPLATE, CONTROL_TOKENS = "prompt_template", "control_tokens"  # attributes that `with_template` gives a tokenizer
PLACEHOLDER = re.compile(r"\{(title|text|question)\}")


@dataclass(frozen=True)
class Template:
    """The three parts of a prompt."""

    head: str  # with {text} and perhaps {title}; empty closed-book
    question: str  # with {question}
    end: str  # what an answer stands behind; never empty


def read_template(name: str, tokenizer: Any, source: str) -> str:
    """The text of a RAG model's template, with its placeholders.

    Args:
        name: "plain", "chat" for the tokenizer's own chat template, or the path of a file.
        source: the flag that named the tokenizer, and its value.

    Raises:
        UserError: the tokenizer has no chat template, there is no such file, or a placeholder is missing.
    """
    if name == "plain":
        return PLAIN
    if name == "chat":
        return _chat_template(tokenizer, source)
    flag = f"--prompt_template {name}"
    if not Path(name).is_file():
        raise UserError(f"{flag} is not a file; give plain, chat or the path of a file with {{text}} and {{question}}")
    text = "\n".join(read_lines(name))
    if problem := template_problem(text):
        raise UserError(f"{flag}: {problem}")
    return text


def _chat_template(tokenizer: Any, source: str) -> str:
    """The request as the chat template puts it, up to where the assistant's answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"--prompt_template chat: {source}: its tokenizer has no chat template; give plain, or a file of your own"
        )
    text = _render(tokenizer, [{"role": "user", "content": CHAT}], source, add_generation_prompt=True)
    if problem := template_problem(text):
        raise UserError(f"--prompt_template chat: {source}: its chat template leaves out the request ({problem})")
    return text


def _render(tokenizer: Any, messages: list[dict[str, str]], source: str, **kwargs: Any) -> str:
    try:  # a model that thinks first would not answer
        return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **kwargs)
    except Exception as error:  # a template is a program
        raise UserError(f"--prompt_template chat: {source}: its chat template cannot be used ({error})") from error


def template_problem(text: str, closed_book: bool = False) -> str | None:
    """What keeps a text from being a template, if anything."""
    names = [match[1] for match in PLACEHOLDER.finditer(text)]
    wanted = {"question"} if closed_book else {"text", "question"}
    if missing := [name for name in ("text", "question") if name in wanted and names.count(name) != 1]:
        return f"it must have {' and '.join(f'{{{name}}}' for name in missing)} once; write it so"
    if closed_book and len(names) > 1:
        return "a model without retrieval reads no passage; leave {title} and {text} out"
    if names[-1] != "question" or names.count("title") > 1:
        return "{question} must come behind {title} and {text}, so that questions share what is computed of a passage"
    if not text[text.index("{question}") + len("{question}") :]:
        return "a text that the answer stands behind must follow {question}, as 'Answer:'"
    return None


@cache
def parse_template(text: str) -> Template:
    """A template that has no problem, in its parts."""
    end = text.index("{question}") + len("{question}")
    behind_passage = max((text.rfind(name) + len(name) for name in ("{title}", "{text}") if name in text), default=0)
    return Template(text[:behind_passage], text[behind_passage:end], text[end:])


# --- What a checkpoint keeps ------------------------------------------------------------------------------------------


def settle_language_model(generator: Any, tokenizer: Any, template: str, source: str) -> None:
    """Give a causal language model what an encoder-decoder has: a start token, a padding that is no end, a template.

    All of it is kept in its configs and its tokenizer.

    Raises:
        UserError: the tokenizer has no end token, or nothing that can be padding.
    """
    end_tokens = _end_tokens(generator, tokenizer, template, source)
    config, generation_config = generator.config, generator.generation_config
    tokenizer.pad_token = _padding(tokenizer, end_tokens, source)
    config.prompt_template, config.eos_token_id = template, tokenizer.eos_token_id
    config.pad_token_id = generation_config.pad_token_id = tokenizer.pad_token_id
    generation_config.eos_token_id = sorted(end_tokens)
    generation_config.suppress_tokens = [tokenizer.pad_token_id]  # an answer has none inside
    with_template(tokenizer, config)
    start = _end_ids(tokenizer)[-1]
    config.decoder_start_token_id = generation_config.decoder_start_token_id = start


def _end_tokens(generator: Any, tokenizer: Any, template: str, source: str) -> set[int]:
    """All tokens that end an answer; the tokenizer's becomes the one that a chat template ends a turn with."""
    known: set[int | None] = set()
    for value in (generator.generation_config.eos_token_id, generator.config.eos_token_id):
        known |= set(value if isinstance(value, list) else [value])
    ends = {token for token in known if token is not None}
    if tokenizer.eos_token_id is None and ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(min(ends))
    if getattr(tokenizer, "chat_template", None) and template.startswith(
        _render(tokenizer, [{"role": "user", "content": "\0"}], source).split("\0")[0]
    ):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\0"}]
        behind = _render(tokenizer, turns, source).split("\0")[-1]
        ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in tokenizer.all_special_ids:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0])
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{source}: neither tokenizer nor model names an end token (eos), without which no answer ends; give it in "
            "tokenizer_config.json"
        )
    return ends | {tokenizer.eos_token_id}


def _padding(tokenizer: Any, end_tokens: set[int], source: str) -> str:
    """A special token that no answer holds; many tokenizers pad with their end token, which an answer must learn."""
    usual = [getattr(tokenizer, name, None) for name in ("pad_token", "unk_token", "bos_token")]
    for token in [*usual, *tokenizer.all_special_tokens]:
        if token is not None and tokenizer.convert_tokens_to_ids(token) not in end_tokens:
            return token
    raise UserError(
        f"{source}: its tokenizer has no special token beside its end token, and so none to pad with; give it a "
        "pad_token"
    )


def with_template(tokenizer: Any, generator_config: Any) -> Any:
    """The tokenizer, which from now on knows what the generator with this config reads, if that is a prompt."""
    if (template := getattr(generator_config, "prompt_template", None)) is not None:
        setattr(tokenizer, TEMPLATE, template)
        control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(control | set(tokenizer.all_special_tokens), key=len, reverse=True)
        setattr(tokenizer, CONTROL_TOKENS, re.compile("|".join(map(re.escape, longest_first))))
    return tokenizer


def template_of(tokenizer: Any) -> Template | None:
    """Its template, where it is a causal language model's."""
    text = getattr(tokenizer, TEMPLATE, None)
    return None if text is None else parse_template(text)


# --- Texts to ids -----------------------------------------------------------------------------------------------------


def encode_prompts(
    tokenizer: Any, passages: list[tuple[str, str]], questions: list[str], max_length: int
) -> tuple[list[list[int]], list[int], int]:
    """The prompts of N passages and questions, without their last token.

    Args:
        passages: titles and texts.
        max_length: tokens of a prompt; where there are more, the passage is cut at its end, and only if the rest alone
            is too long the question.

    Returns:
        The rows, the tokens of each that depend on the passage alone, and how many were cut.
    """
    template = template_of(tokenizer)
    assert template is not None, "with_template comes first"
    begin, end = _begin_ids(tokenizer), _end_ids(tokenizer)[:-1]
    heads = _ids_of_each(tokenizer, [_filled(tokenizer, template.head, title=a, text=b) for a, b in passages])
    tails = _ids_of_each(tokenizer, [_filled(tokenizer, template.question, question=text) for text in questions])
    rows, lengths, cut = [], [], 0
    for head, tail in zip(heads, tails, strict=True):
        room = max(0, max_length - len(begin) - len(end))
        whole = len(head) + len(tail)
        tail = tail[:room]
        head = [*begin, *head[: room - len(tail)]]
        cut += whole > room
        lengths.append(len(head))
        rows.append([*head, *tail, *end])
    return rows, lengths, cut


def passage_prompts(
    tokenizer: Any, generator_config: Any, passages: list[tuple[str, str]], question: str, max_length: int, most: int
) -> tuple[list[list[int]], list[int]]:
    """What a generator reads of N passages before it says a question, and what it says.

    An encoder-decoder is asked for a question. A language model reads its template up to where the question stands.

    Args:
        passages: titles and texts.
        max_length: tokens of what is read; where there are more, the passage is cut at its end.
        most: tokens of the question that are kept, its end token included.

    Returns:
        N rows, and the tokens of the question behind the one that the decoder starts with.
    """
    template = template_of(tokenizer)
    if template is None:
        before, after = _around(tokenizer)
        heads = [PASSAGE.format(title=title, text=text) for title, text in passages]
        after = token_rows(tokenizer, [ASK_FOR_QUESTION], special=False)[0] + after
        says = list(encode_answers(tokenizer, [question], most)["input_ids"][0])
        if says[0] != generator_config.decoder_start_token_id:
            says.insert(0, generator_config.decoder_start_token_id)
        heads_ids = token_rows(tokenizer, heads, special=False)
    else:
        before = _begin_ids(tokenizer)
        heads_ids = _ids_of_each(
            tokenizer, [_filled(tokenizer, template.head, title=title, text=text) for title, text in passages]
        )
        up_to = template.question[: template.question.index("{question}")].rstrip(" ") or "\n"
        *after, start = token_rows(tokenizer, [up_to], special=False)[0]
        ids = token_rows(tokenizer, [f" {_plain(tokenizer, question)}"], special=False)[0]
        says = [start, *ids[: most - 1], tokenizer.eos_token_id]
    room = max(0, max_length - len(before) - len(after))
    return [[*before, *head[:room], *after] for head in heads_ids], says


def encode_closed_book(tokenizer: Any, questions: list[str], max_length: int | None = None, **kwargs: Any) -> Any:
    """The prompts of a language model without retrieval, without their last token, padded as `kwargs` say.

    Args:
        max_length: tokens of a question that are kept, the template's not counted.
    """
    template = template_of(tokenizer)
    assert template is not None, "with_template comes first"
    before, behind = template.question.split("{question}")
    begin = _begin_ids(tokenizer)
    rows = _ids_of_each(tokenizer, [_filled(tokenizer, template.question, question=text) for text in questions])
    if max_length is not None:
        max_length += len(token_rows(tokenizer, [before + behind], special=False)[0])
    end = _end_ids(tokenizer)[:-1]
    return tokenizer.pad({"input_ids": [[*begin, *row[:max_length], *end] for row in rows]}, **_padding_only(kwargs))


def encode_answers(tokenizer: Any, answers: list[str], max_length: int | None = None, **kwargs: Any) -> Any:
    """The token ids of answers with their end token, cut to `max_length`, padded as `kwargs` say."""
    template = template_of(tokenizer)
    if template is None:
        return tokenizer(text_target=answers, max_length=max_length, truncation=max_length is not None, **kwargs)
    is_open = not template.end.endswith((" ", "\n", *tokenizer.all_special_tokens))
    texts = [(" " if is_open else "") + _plain(tokenizer, answer) for answer in answers]
    rows = [[*ids, tokenizer.eos_token_id][:max_length] for ids in token_rows(tokenizer, texts, special=False)]
    kwargs = _padding_only(kwargs)
    return tokenizer.pad({"input_ids": rows}, **kwargs) if kwargs else {"input_ids": rows}


def decode_answers(tokenizer: Any, token_ids: Any) -> list[str]:
    """The texts of answers (N, T), whose first token is the one that they stand behind."""
    if template_of(tokenizer) is not None:
        token_ids = token_ids[:, 1:]
    return tokenizer.batch_decode(token_ids, skip_special_tokens=True)


def _padding_only(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in ("padding", "padding_side", "return_tensors")}


def _filled(tokenizer: Any, part: str, **texts: str) -> str:
    return PLACEHOLDER.sub(lambda match: _plain(tokenizer, texts[match[1]]), part)


def _plain(tokenizer: Any, text: str) -> str:
    """A text that cannot end the turn or begin another: what looks like a control token is broken up."""
    return _control(tokenizer).sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def _control(tokenizer: Any) -> re.Pattern:
    return getattr(tokenizer, CONTROL_TOKENS)


def _ids_of_each(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Their token ids, of equal ones made once."""
    different = list(dict.fromkeys(texts))
    ids = dict(zip(different, token_rows(tokenizer, different, special=False), strict=True))
    return [ids[text] for text in texts]


def _begin_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, unless the template has it already."""
    template = getattr(tokenizer, TEMPLATE)
    before, _ = _around(tokenizer)
    has_it = before and template.startswith(tokenizer.convert_ids_to_tokens(before[0]))
    return [] if has_it else before


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before a text, and behind it."""
    with reading(tokenizer):
        whole = tokenizer("a")["input_ids"]
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    return whole[:start], whole[start + len(bare) :]


def _end_ids(tokenizer: Any) -> list[int]:
    template = template_of(tokenizer)
    assert template is not None, "with_template comes first"
    return token_rows(tokenizer, [template.end], special=False)[0]

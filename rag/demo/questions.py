"""What a browser asks: the body of a request to a question with its settings, or one line that says what is wrong.

model, question = read_question(b'{"question": "where is oslo?", "n_docs": 3}', models)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rag.errors import UserError

MOST_CHARACTERS = 2000  # of a question


@dataclass(frozen=True)
class Setting:
    """A whole number, 1 or more, that each question may bring."""

    default: int
    most: int


@dataclass(frozen=True)
class Question:
    """A question, and the value of each setting of the model that is asked: n_docs, num_beams, ..."""

    text: str
    settings: dict[str, int]


class HasSettings(Protocol):
    """What is to be known of a model."""

    settings: dict[str, Setting]


Asked = TypeVar("Asked", bound=HasSettings)


def read_question(body: bytes, models: Sequence[Asked]) -> tuple[Asked, Question]:
    """Which of the models is asked (`model`, its place, 0 if left out), and what.

    Raises:
        UserError: the body is no JSON object, or a value in it is missing, unknown, or out of range; on one line.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError("the request is no JSON") from error
    if not isinstance(content, dict):
        raise UserError("the request is no JSON object")
    model = models[_whole("model", content.pop("model", 0), 0, len(models) - 1)]
    text = _text(content.pop("question", None))
    settings = {
        name: _whole(name, content.pop(name, setting.default), 1, setting.most)
        for name, setting in model.settings.items()
    }
    if content:
        raise UserError(f"{str(next(iter(content)))[:80]!r} is no setting of this model; leave it out")
    return model, Question(text, settings)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{name} {json.dumps(value)[:80]} must be a whole number from {least} to {most:,}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError("question is missing; write one")
    if len(value) > MOST_CHARACTERS:
        raise UserError(f"question has {len(value):,} characters, more than {MOST_CHARACTERS:,}; shorten it")
    if value != value.encode(errors="ignore").decode():
        raise UserError("question is no Unicode text: it holds half a surrogate pair")
    return value.strip()

r"""Lists of texts as other programs print them, back to their texts.

    read_list('''['Oslo', "Don't"]''')                # Python
    read_list(r'["\ud83d\ude00", "AC\/DC"]')          # JSON
    read_list('''['Oslo' "Don't"]''')                 # NumPy, also array(['Oslo'], dtype=object)
    unquoted('''"['Oslo', ""Don't""]"''')             # any of them as a csv writer quotes it

What is JSON is read as JSON. Where Python would read the same text otherwise, in `\ud83d\ude00` and `\/`, it never
writes it so. Texts side by side without commas are NumPy's, each a text of its own; Python would read them as one.
"""

import ast
import json
import re
import warnings

CSV_FIELD = re.compile(r'"((?:[^"]|"")*)"')
_JSON_LIST = re.compile(r'\[\s*(?:"|\]|null\b)')
_ARRAY = re.compile(r"array\(\s*(\[.*\])\s*(?:,\s*dtype=\S+?\s*)?\)", re.DOTALL)
_LIST, _TUPLE = re.compile(r"\[(.*)\]", re.DOTALL), re.compile(r"\((.*)\)", re.DOTALL)
_TEXT = r"""[uU]?(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""
_ITEM = re.compile(rf"np\.str_\(({_TEXT})\)|({_TEXT})|(?:None|nan)\b")
_GAP = re.compile(r"\s*,\s*|\s+")


def unquoted(field: str) -> str:
    """A field without the quotes of a csv writer, or as it is."""
    match = CSV_FIELD.fullmatch(field)
    return match[1].replace('""', '"') if match else field


def read_list(text: str) -> list[str]:
    """The texts of a list; what is null, None or nan in it is left out.

    Raises:
        ValueError: it is no list, or holds something else, such as numbers.
    """
    text = text.strip()
    values = _json_list(text) if _JSON_LIST.match(text) else None
    texts = [value for value in (_python_list(text) if values is None else values) if value is not None]
    if not all(isinstance(value, str) for value in texts):
        raise ValueError("not all of it is text")
    "".join(texts).encode()  # UnicodeEncodeError, a ValueError: half of a surrogate pair
    return texts


def _json_list(text: str) -> list | None:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _python_list(text: str) -> list[str | None]:
    array = _ARRAY.fullmatch(text)
    match = _LIST.fullmatch(array[1] if array else text) or _TUPLE.fullmatch(text)
    if match is None:
        raise ValueError("no list")
    inner = match[1].strip()
    values: list[str | None] = []
    gaps, at = set(), 0
    while at < len(inner):
        item = _ITEM.match(inner, at)
        gap = item and _GAP.match(inner, item.end())
        if item is None or not (gap or item.end() == len(inner)):
            raise ValueError("something else than texts, or no gap between two")
        values.append(_text(item[1] or item[2]))
        if gap:
            gaps.add(gap[0].strip())
        at = gap.end() if gap else item.end()
    # Of commas here and none there nobody knows what was meant; ('a') is no tuple.
    if len(gaps) > 1 or (match.re is _TUPLE and gaps != {","}):
        raise ValueError("neither all have commas between them nor none")
    return values


def _text(literal: str | None) -> str | None:
    """The text of a Python literal; None for None."""
    if literal is None:
        return None
    if "\\" not in literal:
        return literal[literal.index(literal[-1]) + 1 : -1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # \d, which Python keeps as it is, and will not for ever
        try:
            return ast.literal_eval(literal)
        except SyntaxError as error:  # \N{no such name}, \x1
            raise ValueError(str(error)) from error

"""rag/metrics.py: SQuAD v1.1's metrics of answers, and those of retrieved passages."""

import random
import re
import string
import unicodedata

import pytest
import regex

from rag.metrics import (
    _dpr_words,
    answer_recall_at_k,
    calculate_exact_match,
    exact_match_score,
    f1_score,
    metric_max_over_ground_truths,
    normalize_answer,
    pattern_match_score,
    pattern_recall_at_k,
    precision_at_k,
    reciprocal_rank,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("an apple a day", "apple day"),
        ("Theatre of the Anthill", "theatre of anthill"),
        ("\tA\u00a0B ", "b"),
        ("“quoted”", "“quoted”"),  # only ASCII punctuation goes
        ("the", ""),
    ],
)
def test_normalization_of_the_squad_script(text, normal):
    assert normalize_answer(text) == normal


def squad_words(text: str) -> str:
    """SQuAD v1.1's normalization in the order and with the tools of its script: `re`, whose words are its own."""
    lowered = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", lowered).split())


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Cafe\u0301 a\u0300 Paris", "cafe\u0301 \u0300 paris"),  # re ends a word before a combining mark
        ("a\u00b2", "a\u00b2"),  # a superscript belongs to the word
        ("the\u00bd", "the\u00bd"),  # so does a fraction
        ("an\u2460", "an\u2460"),  # and a circled digit
        ("a\u200dthe", "\u200d"),  # a zero-width joiner does not
        ("\u00e0 the \u0391 \uff41", "\u00e0 \u03b1 \uff41"),  # letters that look like an article
    ],
)
def test_articles_end_where_they_do_in_the_squad_script(text, normal):
    assert normalize_answer(text) == squad_words(text) == normal


def test_normalization_equals_the_squad_script_beside_every_kind_of_character():
    """One character of each Unicode category of each block of 16, behind, before and between articles."""
    seen, characters = set(), []
    for point in range(0x110000):
        kind = (point >> 4, unicodedata.category(chr(point)))
        if kind[1] != "Cs" and kind not in seen and (point < 0x3000 or kind[1] not in ("Lo", "Cn", "Co")):
            seen.add(kind)
            characters.append(chr(point))
    assert len(characters) > 1000
    for character in characters:
        text = f"The{character} a{character}b {character}an {character} x{character}the A{character}"
        assert normalize_answer(text) == squad_words(text), ascii(character)


def test_exact_match_and_f1_by_hand():
    assert exact_match_score("The U.S.A.", "usa")
    assert not exact_match_score("usa today", "usa")
    assert f1_score("The cat sat", "cat sat down") == pytest.approx(0.8)  # precision 2/2, recall 2/3
    assert f1_score("a b b c", "b b d") == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    assert f1_score("", "") == 0.0 and f1_score("x", "y") == 0.0
    assert metric_max_over_ground_truths(f1_score, "one two", ["three", "two", "one two"]) == 1.0
    assert calculate_exact_match(["a dog", "cat"], ["dog", "dogs"]) == {"em": 0.5}
    assert calculate_exact_match([], []) == {"em": 0}
    with pytest.raises(ValueError, match="shorter"):
        calculate_exact_match(["a", "b"], ["a"])


def test_metric_properties_on_random_answers():
    rng = random.Random(0)
    words = ["the", "a", "river", "Rhine", "x.", "42", "é", ""]
    for _ in range(300):
        first, second = (" ".join(rng.choices(words, k=rng.randint(0, 5))) for _ in range(2))
        assert f1_score(first, second) == pytest.approx(f1_score(second, first))
        assert 0.0 <= f1_score(first, second) <= 1.0
        assert normalize_answer(normalize_answer(first)) == normalize_answer(first)
        if exact_match_score(first, second):
            assert f1_score(first, second) == (1.0 if normalize_answer(first) else 0.0)


def test_precision_counts_distinct_gold_titles_over_k():
    retrieved, gold = ["B", "A", "A", "C"], ["A", "C"]
    assert [precision_at_k(retrieved, gold, k) for k in (1, 2, 3, 4, 5)] == [0, 1 / 2, 1 / 3, 2 / 4, 2 / 5]
    assert reciprocal_rank(retrieved, gold) == 1 / 2
    assert reciprocal_rank(retrieved, ["Z"]) == 0.0 and reciprocal_rank([], ["A"]) == 0.0


def test_recall_is_monotone_in_k_and_bounded_by_rank():
    rng = random.Random(1)
    for _ in range(200):
        titles = [rng.choice("abcdefgh") for _ in range(6)]
        gold = rng.sample("abcdefgh", 2)
        rank = reciprocal_rank(titles, gold)
        assert (precision_at_k(titles, gold, 6) > 0) == (rank > 0)
        texts = [f"{title} passage" for title in titles]
        found = [answer_recall_at_k(texts, gold, k) for k in range(1, 7)]
        assert found == sorted(found)
        assert rank == (1 / (found.index(True) + 1) if any(found) else 0.0)


def test_answers_are_found_as_whole_words():
    passages = ["Romeo and Juliet", "It flows through Sa\u0303o Paulo (Brazil).", "In 1,024 steps; U.S. soil"]
    assert not answer_recall_at_k(passages, ["Rome"], 3)
    assert answer_recall_at_k(passages, ["rome", "JULIET"], 1)
    assert answer_recall_at_k(passages, ["s\u00e3o  paulo"], 2)  # composed and decomposed letters are one
    assert not answer_recall_at_k(passages, ["sao paulo"], 3)
    assert not answer_recall_at_k(passages, ["são paulo"], 1)
    assert answer_recall_at_k(passages, ["1,024"], 3) and answer_recall_at_k(passages, ["U.S."], 3)
    assert not answer_recall_at_k(passages, ["", "  "], 3)


@pytest.mark.parametrize(
    ("passage", "found", "missed"),
    [
        (
            "奥斯陆是挪威的首都，1990年人口约70万。",
            ["奥斯陆", "挪威", "首都", "1990", "1990年", "70万"],
            ["伦敦", "199"],
        ),
        ("東京はｶﾞラスの都市、ローマでもがくえん。", ["東京", "ローマ", "がくえん"], ["かくえん", "大阪"]),
        ("กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย", ["กรุงเทพ", "ประเทศไทย", "เมืองหลวง"], ["ลอนดอน"]),
        ("ໂຕກຽວ ຢູ່ຍີ່ປຸ່ນ; ភ្នំពេញជារដ្ឋធានី", ["ຍີ່ປຸ່ນ", "ភ្នំពេញ"], ["ລອນດອນ"]),
        ("The iPhone手机 of 東京 Tower", ["iPhone", "手机", "東京 tower", "iphone手"], ["Phone"]),
        ("서울에서 만나요", ["서울에서"], ["서울"]),  # Korean has blanks
    ],
)
def test_answers_are_found_in_scripts_without_blanks(passage, found, missed):
    for answer in found:
        assert answer_recall_at_k([passage], [answer], 1), answer
    for answer in missed:
        assert not answer_recall_at_k([passage], [answer], 1), answer


def test_a_letter_without_its_marks_is_another():
    assert not answer_recall_at_k(["กิน"], ["ก"], 1) and not answer_recall_at_k(["が"], ["か"], 1)


def test_words_of_scripts_with_blanks_are_dprs():
    """DPR's own tokens, by its pattern, of every letter that is not of a script without blanks."""
    pattern = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
    rng = random.Random(2)
    letters = "aé\u0301ß1²½ اب\u064eΩжקששֿ한국ञि.,-_'’😀\u200d\u00a0\t"
    for _ in range(300):
        text = "".join(rng.choices(letters, k=20))
        words = pattern.findall(unicodedata.normalize("NFD", text.lower()))
        assert _dpr_words(text) == f" {' '.join(words)} "


def test_patterns_match_answers_from_their_beginning_and_passages_anywhere():
    assert pattern_match_score("January 1st, 2000", "jan(uary)? 1(st)?") and not pattern_match_score("On Jan 1", "jan")
    assert not pattern_match_score("", "a+") and pattern_match_score("", "a*")
    assert pattern_recall_at_k(["no", "It was in JAN 1."], [r"\bjan\b", "x"], 2)
    assert not pattern_recall_at_k(["no", "It was in JAN 1."], [r"\bjan\b", "x"], 1)
    assert pattern_match_score("a{e<=1}b", "a{e<=1}") and not pattern_match_score("b", "a{e<=1}")  # as Python reads it
    for pattern in ("(", "a{99999999999}", "(a{9999}){9999}", "x" * 10_001, r"\p{L}", "(?R)"):
        with pytest.raises(ValueError, match="is no regular expression"):
            pattern_match_score("x", pattern)

"""Questions and passages of a data folder, or of the suite, come out whole; a folder that lacks some says so."""

import pytest

from quickstart import language_model, questions
from quickstart.questions import find_source, write_data
from rag.errors import UserError
from rag.files import read_lines, write_lines
from rag.knowledge.passages import read_passages
from rag.knowledge.records import ReadingOptions


@pytest.fixture
def real(tmp_path):
    """A data folder as `quickstart.questions` describes it, small; its passages have quotation marks and many words."""
    folder = tmp_path / "real" / "nq_gold"
    for split in ("train", "val", "test"):
        asked = [f"where is {split} {n}" for n in range(12)]
        write_lines(asked, folder / f"{split}.source")
        write_lines([f"place {n}" for n in range(12)], folder / f"{split}.target")
        write_lines([f"{question}\t['place']" for question in asked], folder / f"{split}.qa")
        write_lines([f"title {n}" for n in range(12)], folder / f"{split}.pages")
    write_lines([f"n{n}\ttitle {n}\t" + '"a word' + " more" * 130 for n in range(60)], folder / "passages.tsv")
    write_lines(["d0\tother\ta text"], tmp_path / "real" / "distractors_2wiki" / "passages.tsv")
    return tmp_path / "real"


def test_a_data_folder_is_taken_whole(real, tmp_path):
    data = write_data(find_source(str(real)), tmp_path / "data")
    for name in (*questions.NEEDED, *questions.OPTIONAL):
        assert read_lines(data.folder / name) == read_lines(real / "nq_gold" / name)
    passages = list(read_passages(data.passages, ReadingOptions("none")))
    assert len(passages) == 61, "none is cut"
    assert passages[7] == ("title 7", '"a word' + " more" * 130)
    assert passages[-1] == ("other", "a text")


def test_of_many_test_questions_the_first_are_taken(real, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "TEST_QUESTIONS", 7)
    data = write_data(find_source(str(real)), tmp_path / "data")
    lengths = {name: len(read_lines(data.folder / name)) for name in (*questions.NEEDED, *questions.OPTIONAL)}
    assert {name: n for name, n in lengths.items() if n != 12} == {name: 7 for name in lengths if "test" in name}


def test_a_sample_has_the_passages_that_answer(real, tmp_path):
    data = write_data(find_source(str(real)), tmp_path / "data", sample=True)
    assert [len(read_lines(data.folder / f"{split}.source")) for split in ("train", "val", "test")] == [4, 2, 5]
    titles = [title for title, _ in read_passages(data.passages, ReadingOptions("none"))]
    assert len(titles) == 25 and titles[:5] == read_lines(data.folder / "test.pages")


def test_the_suites_own_questions_take_the_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(questions, "BESIDE_THE_CHECKOUT", tmp_path / "none")
    source = find_source(None)
    assert source == questions.OWN
    [line] = capsys.readouterr().out.splitlines()
    assert "nelson-liu/lost-in-the-middle" in line and "--help" in line
    assert "CC BY-SA 3.0" in language_model.__doc__
    data = write_data(source, tmp_path / "data")
    passages = list(read_passages(data.passages, ReadingOptions("none")))
    assert passages == list(read_passages(questions.OWN / "my_knowledge_dataset.csv"))
    assert len(read_lines(data.folder / "test.qa")) == questions.TEST_QUESTIONS


def test_the_folder_beside_the_checkout_is_taken(real, monkeypatch, capsys):
    monkeypatch.setattr(questions, "BESIDE_THE_CHECKOUT", real)
    assert find_source(None) == real
    assert capsys.readouterr().out == ""


def test_what_a_folder_lacks_is_one_line(real, tmp_path):
    (real / "nq_gold" / "test.qa").unlink()
    (real / "nq_gold" / "val.source").unlink()
    with pytest.raises(
        UserError, match=r"lacks nq_gold/val\.source, nq_gold/test\.qa; nelson-liu/.*laid out$"
    ) as error:
        find_source(str(real))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^--data_dir .*none lacks nq_gold/passages\.tsv"):
        find_source(str(tmp_path / "none"))


def test_a_line_of_other_columns_is_named(real, tmp_path):
    write_lines(["n0\ttitle\ttext", "title\ttext"], real / "nq_gold" / "passages.tsv")
    with pytest.raises(UserError, match=r"nq_gold/passages\.tsv line 2 has 2 columns; `id TAB title TAB text`"):
        write_data(find_source(str(real)), tmp_path / "data")
    assert not (tmp_path / "data").exists()

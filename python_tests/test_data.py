"""Texts come from every kind of source, again and again, and a bad source is one sentence that names it."""

import gzip
import json
import sys

import pytest

from prunepath import data
from prunepath.data import load_texts
from prunepath.errors import PrunePathError


def test_files_and_folders_are_read_in_order_and_more_than_once(tmp_path):
    (tmp_path / "one.txt").write_text("first\n", encoding="utf-8")
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (folder / "z.py").write_text("third ü\n", encoding="utf-8")
    (folder / "a" / "b.md").write_text("second", encoding="utf-8")
    (folder / ".hidden").write_text("no", encoding="utf-8")
    (folder / ".git").mkdir()
    (folder / ".git" / "x").write_text("no", encoding="utf-8")
    texts = load_texts([tmp_path / "one.txt", str(folder)])
    assert list(texts) == ["first\n", "third ü\n", "second"]
    assert list(texts) == ["first\n", "third ü\n", "second"]


def test_a_long_file_comes_in_pieces_that_end_with_lines_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE_CHARACTERS", 16)
    text = "".join(f"line {i}\r\n" for i in range(50)) + "x" * 100 + "\nlast"
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    pieces = list(load_texts([path]))
    assert "".join(pieces) == text
    assert len(pieces) > 20
    assert all(piece.endswith("\n") for piece in pieces if "line" in piece)
    assert all(len(piece) < 32 for piece in pieces)


def test_files_that_are_not_text_are_skipped_in_a_folder_with_one_warning(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "c.bin").write_bytes(b"a\0b")
    with pytest.warns(UserWarning, match="2 of 3 files") as warned:
        texts = load_texts([tmp_path])
        assert list(texts) == ["text"]
        assert list(texts) == ["text"]
    assert len(warned) == 1


def test_a_folder_without_text_is_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(PrunePathError, match="no files"):
        load_texts([folder])
    (folder / "b.bin").write_bytes(b"\xff\xfe")
    with pytest.raises(PrunePathError, match="none of its 1 files"):
        load_texts([folder])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz"])
def test_json_lines_give_their_text_field(tmp_path, suffix):
    content = "".join(json.dumps({"text": text, "body": text * 2}) + "\n" for text in ("a", "ü")) + "\n"
    path = tmp_path / f"rows{suffix}"
    (gzip.open if suffix.endswith(".gz") else open)(path, "wb").write(content.encode())
    assert list(load_texts([path])) == ["a", "ü"]
    assert list(load_texts([path], text_column="body")) == ["aa", "üü"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "line 2 of .* is not JSON"),
        ('["a"]', "line 2 of .* is a JSON array"),
        ("null", "line 2 of .* is a JSON null"),
        ('{"body": "a"}', "line 2 of .* has no such field; its fields: body"),
        ('{"text": 3}', "line 2 of .* has no such field"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(PrunePathError, match=message):
        list(load_texts([path]))


def test_gzipped_text_is_read_and_a_truncated_one_is_refused(tmp_path):
    path = tmp_path / "text.txt.gz"
    whole = gzip.compress("".join(f"line {i * i}\n" for i in range(5000)).encode())
    path.write_bytes(whole)
    assert "".join(load_texts([path])).endswith("line 24990001\n")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PrunePathError, match="cannot be read as text"):
        list(load_texts([path]))
    path.write_bytes(b"not gzip")
    with pytest.raises(PrunePathError, match="cannot be read as text"):
        load_texts([path])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file holds none"), (b" \n\t\n", "the file holds none"), (b"abc \xff def", "byte 0xff")],
)
def test_a_file_without_text_is_refused_before_any_work(tmp_path, content, message):
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    with pytest.raises(PrunePathError, match=message) as error:
        load_texts([path])
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["corpus.txt", "./corpus", "/no/such/corpus", "rows.jsonl"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_a_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PrunePathError, match="does not exist"):
        load_texts([name])


def test_a_dataset_name_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PrunePathError, match="pip install datasets"):
        load_texts(["some/name:test"])


class FakeDatasets:
    """Stands in for the `datasets` package: "owner/name" with the one configuration "small"."""

    def load_dataset(self, name, config, *, split, streaming):
        assert streaming
        if (name, config) != ("owner/name", "small"):
            raise ValueError(f"Unknown dataset {name}.\nA long story.")
        return [{"text": f"{split} 1", "n": 1}, {"text": f"{split} 2", "n": 2}]


def test_dataset_names_with_configuration_and_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets())
    assert list(load_texts(["owner/name/small"])) == ["train 1", "train 2"]
    assert list(load_texts(["owner/name/small:test"])) == ["test 1", "test 2"]
    with pytest.raises(PrunePathError, match=r"neither a file nor a folder.*Unknown dataset owner/other"):
        load_texts(["owner/other"])
    with pytest.raises(PrunePathError, match=r"string column 'n'.*columns: text, n"):
        load_texts(["owner/name/small"], text_column="n")


def test_no_source_at_all_is_refused():
    with pytest.raises(PrunePathError, match="at least one"):
        load_texts([])

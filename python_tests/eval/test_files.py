"""Files appear whole or not at all."""

import json

import pytest

from prunepath.errors import PrunePathError
from prunepath.eval.files import replacing, write_json


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error), replacing(tmp_path / "out.json") as path:
        path.write_text("x")
        raise error
    assert names(tmp_path) == []


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["out.json"]


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(PrunePathError, match="cannot be written: No such file or directory"):
        write_json(tmp_path / "missing" / "out.json", 1)

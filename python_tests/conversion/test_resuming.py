"""A conversion that is interrupted while it trains routers, and goes on."""

import copy
import dataclasses

import pytest
import torch

import prunepath
from prunepath.conversion import convert as convert_module
from prunepath.errors import PrunePathError
from prunepath.train import router_state
from prunepath.train.router import RouterTraining


@pytest.fixture(params=[(1, 8), (1, 0), (8, 0)], ids=["low rank", "full rank", "grouped"])
def config(small_config, request):
    width, rank = request.param
    return dataclasses.replace(small_config, expert_width=width, router_rank=rank)


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, dense, texts, config, state, after=3):
    """A conversion that keeps its state at every batch, until `after` of them."""
    observe, calls = RouterTraining.observe, []

    def failing(self, x, hidden):
        calls.append(self)
        if calls.count(self) > after:
            raise Interrupted
        observe(self, x, hidden)

    monkeypatch.setattr(router_state, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RouterTraining, "observe", failing)
        prunepath.convert(copy.deepcopy(dense), None, texts, config, state=state)


def equal(actual, expected):
    before = expected.state_dict()
    for name, tensor in actual.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert actual.config.quantization_config == expected.config.quantization_config


def test_it_ends_where_it_would_have_ended(monkeypatch, make_model, token_texts, config, tmp_path):
    dense = make_model("opt")
    state = tmp_path / "new" / "state"
    whole = prunepath.convert(copy.deepcopy(dense), None, token_texts, config)
    interrupt(monkeypatch, dense, token_texts, config, state)
    assert [path.name for path in state.parent.iterdir()] == ["state"]
    grouped, trained = [], []
    observe = RouterTraining.observe
    monkeypatch.setattr(convert_module.ExpertGrouping, "__call__", lambda self, ffn, x: grouped.append(ffn))
    monkeypatch.setattr(RouterTraining, "observe", lambda self, *args: (trained.append(self), observe(self, *args)))
    resumed = prunepath.convert(copy.deepcopy(dense), None, token_texts, config, state=state)
    assert not grouped
    equal(resumed, whole)
    # Until somebody removes it, because the checkpoint has been saved, only calibration is done again.
    assert state.exists() and trained
    trained.clear()
    again = prunepath.convert(copy.deepcopy(dense), None, token_texts, config, state=state)
    assert not trained and not grouped
    equal(again, whole)


def test_another_conversions_state_is_refused_and_leaves_the_model_dense(
    monkeypatch, make_model, token_texts, small_config, tmp_path
):
    state, dense = tmp_path / "state", make_model("llama")
    interrupt(monkeypatch, dense, token_texts, small_config, state)
    model = make_model("llama", seed=7)
    for other, texts, config in (
        (dense, token_texts, dataclasses.replace(small_config, seed=9)),
        (dense, token_texts[1:], small_config),
        (model, token_texts, small_config),
    ):
        with pytest.raises(PrunePathError, match="the same model, data and configuration"):
            prunepath.convert(other, None, texts, config, state=state)
        assert not prunepath.is_sparse(other)


@pytest.mark.parametrize("content", [b"", b"no torch file", b"PK\x03\x04 cut off"])
def test_a_damaged_state_is_one_sentence(llama, token_texts, small_config, tmp_path, content):
    state = tmp_path / "state"
    state.write_bytes(content)
    with pytest.raises(PrunePathError, match="to be an interrupted conversion"):
        prunepath.convert(llama, None, token_texts, small_config, state=state)
    assert not prunepath.is_sparse(llama)


def test_a_state_that_cannot_be_written_is_one_sentence(monkeypatch, llama, token_texts, small_config, tmp_path):
    monkeypatch.setattr(router_state, "SAVE_SECONDS", 0.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(PrunePathError, match="to write the conversion's state"):
        prunepath.convert(llama, None, token_texts, small_config, state=tmp_path / "file" / "state")
    assert not prunepath.is_sparse(llama)


def test_an_interrupt_while_the_state_is_written_leaves_the_last_one(
    monkeypatch, llama, token_texts, small_config, tmp_path
):
    state = tmp_path / "state"
    interrupt(monkeypatch, llama, token_texts, small_config, state)
    before = state.read_bytes()

    def interrupted(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(router_state.Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prunepath.convert(llama, None, token_texts, small_config, state=state)
    assert [path.name for path in tmp_path.iterdir()] == ["state"] and state.read_bytes() == before

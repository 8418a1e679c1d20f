"""A conversion that is interrupted while it trains routers, and goes on."""

import copy
import dataclasses

import pytest
import torch

import prunepath
from prunepath import modeling
from prunepath.errors import PrunePathError
from prunepath.train import router_state
from prunepath.train.router import RouterTraining


@pytest.fixture(params=["output", "loss"])
def config(small_config, request):
    return dataclasses.replace(small_config, contribution=request.param)


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, dense, texts, config, state, after=3):
    """A conversion that keeps its state at every batch, until `after` of them."""
    observe, calls = RouterTraining.observe, []

    def failing(self, ffn, x):
        calls.append(ffn)
        if calls.count(ffn) > after:
            raise Interrupted
        observe(self, ffn, x)

    monkeypatch.setattr(router_state, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RouterTraining, "observe", failing)
        prunepath.convert(copy.deepcopy(dense), None, texts, config, state=state)


def test_it_ends_where_it_would_have_ended(monkeypatch, dense, token_texts, config, tmp_path):
    state = tmp_path / "new" / "state"
    whole = prunepath.convert(copy.deepcopy(dense), None, token_texts, config)
    interrupt(monkeypatch, dense, token_texts, config, state)
    assert [path.name for path in state.parent.iterdir()] == ["state"]
    grouped = []
    monkeypatch.setattr(modeling.ExpertGrouping, "observe", lambda self, ffn, x: grouped.append(ffn))
    resumed = prunepath.convert(copy.deepcopy(dense), None, token_texts, config, state=state)
    assert not grouped
    assert not state.exists()
    expected = whole.state_dict()
    for name, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert resumed.config.quantization_config == whole.config.quantization_config


def test_another_conversions_state_is_refused_and_leaves_the_model_dense(
    monkeypatch, dense, make_model, token_texts, small_config, tmp_path
):
    state = tmp_path / "state"
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
def test_a_damaged_state_is_one_sentence(dense, token_texts, small_config, tmp_path, content):
    state = tmp_path / "state"
    state.write_bytes(content)
    with pytest.raises(PrunePathError, match="to be an interrupted conversion"):
        prunepath.convert(dense, None, token_texts, small_config, state=state)


def test_a_state_that_cannot_be_written_is_one_sentence(monkeypatch, dense, token_texts, small_config, tmp_path):
    monkeypatch.setattr(router_state, "SAVE_SECONDS", 0.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(PrunePathError, match="to write the conversion's state"):
        prunepath.convert(dense, None, token_texts, small_config, state=tmp_path / "file" / "state")

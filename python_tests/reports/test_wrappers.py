"""Knobs of a model inside torch's wrappers."""

import pytest
import torch

import prunepath


class Wrapper(torch.nn.Module):
    """As DataParallel and DistributedDataParallel hold a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_knobs_turn_through_wrappers(make_sparse, wrap):
    model = make_sparse("llama")
    wrapped = wrap(model)
    prunepath.set_threshold(wrapped, 0.5)
    assert prunepath.get_thresholds(model) == [0.5, 0.5]
    assert model.config.quantization_config["thresholds"] == [0.5, 0.5]
    with pytest.raises(prunepath.PrunePathError, match="no calibrated budgets"):
        prunepath.set_budget(wrapped, 0.5)
    with pytest.raises(prunepath.PrunePathError, match="no calibrated budgets"):
        prunepath.set_request_budgets(wrapped, [0.5])
    with prunepath.record_counts(wrapped) as record, torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert 0 < record.active_fraction < 1


def test_a_module_that_is_no_transformers_model_is_named():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(prunepath.PrunePathError, match="converted by prunepath, got a dense Linear"):
        prunepath.set_threshold(model, 0.5)

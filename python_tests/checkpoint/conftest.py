import pytest

import prunepath
from prunepath.checkpoint.description import describe, description_of


@pytest.fixture(scope="session")
def make_calibrated(make_sparse):
    """Makes a tiny sparse model with a table of budgets, at a budget of 0.4: as `make_sparse`."""

    def make(*args, **config):
        model = make_sparse(*args, **config)
        description = description_of(model)
        ffns = len(description.ffns)
        description.budgets = {0.2: [0.3] * ffns, 0.8: [0.9] * ffns}
        describe(model, description)
        prunepath.set_budget(model, 0.4)
        return model

    return make


@pytest.fixture
def folder(make_calibrated, tmp_path):
    """A sparse Llama's checkpoint."""
    make_calibrated("llama", router_rank=8).save_pretrained(tmp_path / "model")
    return tmp_path / "model"

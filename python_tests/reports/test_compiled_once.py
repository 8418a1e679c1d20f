"""torch.compile of a sparse model, which is compiled once however its knobs turn."""

import pytest
import torch

import prunepath
from prunepath.checkpoint.description import describe, description_of
from prunepath.ops import backend


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_knobs_and_the_first_use_of_a_backend_compile_nothing_anew(make_sparse, family, ids, monkeypatch):
    monkeypatch.setattr(backend, "_resolved", {})
    model = make_sparse(family)
    description = description_of(model)
    description.budgets = {0.2: [0.3, 0.3], 0.8: [0.9, 0.9]}
    describe(model, description)
    graphs = []
    compiled = torch.compile(
        model, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True, dynamic=False
    )
    turns = [
        lambda: None,
        lambda: prunepath.set_threshold(model, 0.5),
        lambda: prunepath.set_budget(model, 0.3),
        lambda: prunepath.set_budget(model, 1.0),
    ]
    requests = [
        lambda: prunepath.set_request_budgets(model, [0.3, 1]),
        lambda: prunepath.set_request_budgets(model, [1, 0.4]),
    ]
    for wanted, turns_of_one in ((1, [lambda: None, *turns]), (2, requests)):
        for turn in turns_of_one:
            turn()
            logits = compiled(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(logits, model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
            assert len(graphs) == wanted

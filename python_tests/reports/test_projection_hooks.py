"""Tools that watch or change projections by hooks: where there are hooks, the projections are called."""

import pytest
import torch

import prunepath


@pytest.mark.parametrize(
    ("family", "names"), [("llama", ["gate_proj", "up_proj", "down_proj"]), ("opt", ["fc1", "fc2"])]
)
@torch.no_grad()
def test_hooks_on_projections_are_called_and_can_change_what_they_see(make_sparse, ids, family, names):
    model = make_sparse(family)
    prunepath.set_threshold(model, 0.6)
    expected = model(ids).logits
    for name in names:
        seen = []
        modules = [module for path, module in model.named_modules() if path.endswith(f".{name}")]
        handles = [m.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y.shape)) for m in modules]
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert len(seen) == len(modules) == 2 and all(shape[-1] == modules[0].out_features for shape in seen), name
        for handle in handles:
            handle.remove()
        changing = modules[0].register_forward_hook(lambda m, args, y: 2.0 * y)
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3), name
        changing.remove()
        assert torch.equal(model(ids).logits, expected)

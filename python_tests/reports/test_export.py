"""Exported graphs have the masked form, for any length."""

import pytest
import torch

import prunepath


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def tokens(length):
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_torch_export_takes_dynamic_lengths(make_sparse, family):
    model = make_sparse(family)
    prunepath.set_threshold(model, 0.6)
    length = torch.export.Dim("length", min=2, max=120)
    exported = torch.export.export(Logits(model), (tokens(70),), dynamic_shapes=({1: length},), strict=False).module()
    for size in (5, 64, 65, 100):
        torch.testing.assert_close(exported(tokens(size)), model(tokens(size)).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_onnx_has_the_masked_form(make_sparse, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make_sparse("llama")
    prunepath.set_threshold(model, 0.6)
    path = tmp_path / "model.onnx"
    length = torch.export.Dim("length", min=2, max=120)
    program = torch.onnx.export(Logits(model), (tokens(70),), dynamic_shapes=({1: length},), dynamo=True, verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    for size in (5, 100):
        (logits,) = session.run(None, {session.get_inputs()[0].name: tokens(size).numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(tokens(size)).logits, rtol=1e-3, atol=1e-3)

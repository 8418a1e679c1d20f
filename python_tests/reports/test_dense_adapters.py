"""A LoRA that was trained on the dense model, loaded on the sparse one."""

import copy

import pytest
import torch

import prunepath

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_neurons_keep_their_order_so_that_an_adapter_of_the_dense_model_fits(
    make_model, make_sparse, family, ids, tmp_path
):
    dense = make_model(family)
    targets = ["fc1", "fc2"] if family == "opt" else ["gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(dense), config).eval()
    tuned.save_pretrained(tmp_path)
    sparse = peft.PeftModel.from_pretrained(make_sparse(copy.deepcopy(dense)), tmp_path).eval()
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        assert (expected - dense(input_ids=ids).logits).abs().max() > 0.1
        torch.testing.assert_close(sparse(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        prunepath.set_threshold(sparse, 0.5)
        masked = sparse(input_ids=ids).logits
        torch.testing.assert_close(sparse.merge_and_unload()(input_ids=ids).logits, masked, rtol=1e-3, atol=1e-3)

"""Models made, moved and turned inside torch.inference_mode() and used outside of it, and the reverse."""

import contextlib
import copy

import pytest
import torch

import prunepath

CHANGES = {
    "deepcopy": copy.deepcopy,
    "cast": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "set_threshold": lambda model: prunepath.set_threshold(model, 0.4) or model,
    "requests": lambda model: (
        [f.set_request_thresholds([0.4, 0.8]) for f in prunepath.sparse_ffns(model).values()] and model
    ),
    "for_training": prunepath.for_training,
    "for_inference": lambda model: prunepath.for_inference(prunepath.for_training(model)),
}


@contextlib.contextmanager
def outside():
    with torch.inference_mode(False), torch.no_grad():
        yield


def close(logits, expected):
    assert (logits - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("modes", [(torch.inference_mode, outside), (outside, torch.inference_mode)])
@pytest.mark.parametrize("change", CHANGES)
def test_knobs_turn_in_the_other_mode(make_sparse, family, change, modes, ids):
    model = make_sparse(family)
    prunepath.set_threshold(model, 0.6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    first, second = modes
    with first():
        model = CHANGES[change](model)
        model(input_ids=ids)
    with second():
        for ffn in prunepath.sparse_ffns(model).values():
            ffn.set_request_thresholds([0.3, 0.7])
        model(input_ids=ids)
        prunepath.set_threshold(model, 0.6)
        close(model(input_ids=ids).logits, expected)
    with first():
        prunepath.set_threshold(model, 0.6)
        close(model(input_ids=ids).logits, expected)
    with second():
        model.to(torch.bfloat16)
        for lay_out in (prunepath.for_training, prunepath.for_inference):
            lay_out(model)
        copy.deepcopy(model)(input_ids=ids)


def test_a_checkpoint_loaded_inside_is_used_outside(make_sparse, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    make_sparse("llama").save_pretrained(tmp_path)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        prunepath.set_threshold(model, 0.4)
        expected = model(input_ids=ids).logits
    prunepath.set_threshold(model, 0.7)
    prunepath.set_threshold(model, 0.4)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    prunepath.for_inference(prunepath.for_training(model))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_model_converted_and_calibrated_inside_trains_outside(llama, token_texts, small_config, ids):
    with torch.inference_mode():
        prunepath.convert(llama, None, token_texts, small_config)
        prunepath.set_budget(llama, 0.5)
        prunepath.set_request_budgets(llama, [0.5, 0.6])
        prunepath.calibrate(llama, None, token_texts)
        prunepath.set_budget(llama, 0.5)
    assert not any(tensor.is_inference() for tensor in (*llama.parameters(), *llama.buffers()))
    prunepath.set_budget(llama, 0.4)
    llama.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in llama.named_parameters() if ".router." not in name)


def test_a_copy_made_inside_is_turned_in_place_outside(token_texts, small_config, llama):
    prunepath.convert(llama, None, token_texts, small_config)
    with torch.inference_mode():
        model = copy.deepcopy(llama)
    before = [ffn._threshold.data_ptr() for ffn in prunepath.sparse_ffns(model).values()]
    for ffn in prunepath.sparse_ffns(model).values():
        ffn.try_threshold(torch.tensor(0.5))
    prunepath.set_budget(model, 0.5)
    written = [ffn._threshold.item() for ffn in prunepath.sparse_ffns(model).values()]
    assert written == pytest.approx(prunepath.get_thresholds(model))
    assert [ffn._threshold.data_ptr() for ffn in prunepath.sparse_ffns(model).values()] == before, "graphs read these"

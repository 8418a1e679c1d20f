"""Several threads call a model right after it was saved, copied or asked for its state dict."""

import copy
import threading

import pytest
import torch

import prunepath

PROMPTS = [
    torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(length)) for length in (3, 7, 11, 16)
]


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("what", ["save_pretrained", "state_dict", "deepcopy", "train and eval"])
def test_outputs_and_weights_are_those_of_one_thread(make_sparse, family, what, tmp_path):
    model = make_sparse(family)
    prunepath.set_threshold(model, 0.6)
    with torch.no_grad():
        expected = [model(ids).logits for ids in PROMPTS]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wrong = []
    for _ in range(5):
        if what == "save_pretrained":
            model.save_pretrained(tmp_path)
        elif what == "state_dict":
            model.state_dict()
        elif what == "deepcopy":
            model = copy.deepcopy(model)
        else:
            model.train()
            model.eval()
        barrier = threading.Barrier(len(PROMPTS))

        def run(i, model=model, barrier=barrier):
            barrier.wait()
            with torch.no_grad():
                if not torch.equal(model(PROMPTS[i]).logits, expected[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name

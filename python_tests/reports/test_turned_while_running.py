"""Knobs turned by some threads while others run the model."""

import itertools
import threading

import pytest
import torch

import prunepath

THRESHOLDS = (0.2, 0.6, 1.0)


def run_threads(*functions):
    """Runs functions at once, the first once, the others until it has ended; gives what they raised."""
    errors, done = [], threading.Event()

    def repeat(function):
        try:
            while not done.wait(0.001):  # or they would leave the first no time
                function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(function,)) for function in functions[1:]]
    for thread in threads:
        thread.start()
    try:
        functions[0]()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    return errors


def turning(*turns):
    cycle = itertools.cycle(turns)
    return lambda: next(cycle)()


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_every_output_is_one_that_some_knob_gives(make_sparse, family, context):
    model = make_sparse(family)
    ids = torch.tensor([[5], [7]])
    # While a thread turns the FFNs' knobs one after another, a call sees some of the old and some of the new.
    expected = []
    with context():
        for thresholds in itertools.product(THRESHOLDS, repeat=2):
            prunepath.set_threshold(model, thresholds)
            expected.append(model(input_ids=ids, use_cache=False).logits.detach())
    ffns = list(prunepath.sparse_ffns(model).values())
    wrong, outputs = [], []

    def call():
        for _ in range(60):
            with context():
                logits = model(input_ids=ids, use_cache=False).logits.detach()
            for row, output in enumerate(logits):
                if not any(torch.allclose(output, known[row], rtol=1e-4, atol=1e-5) for known in expected):
                    wrong.append(output)
            outputs.append(logits)

    def requests(values):
        for ffn in ffns:
            ffn.set_request_thresholds(values)

    errors = run_threads(
        call,
        turning(*(lambda t=t: prunepath.set_threshold(model, t) for t in THRESHOLDS)),
        turning(lambda: requests([0.2, 1.0]), lambda: requests([0.6, 0.2]), lambda: requests([0.6])),
    )
    assert not errors and not wrong
    assert not all(torch.equal(output, outputs[0]) for output in outputs)


def test_generating_goes_on_while_knobs_turn_and_copies_are_made(make_sparse, ids, tmp_path):
    model = make_sparse("llama")
    lengths = []

    def generate():
        for _ in range(10):
            lengths.append(model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False).shape[1])

    errors = run_threads(
        generate,
        turning(*(lambda t=t: prunepath.set_threshold(model, t) for t in THRESHOLDS)),
        lambda: model.save_pretrained(tmp_path),
    )
    assert not errors
    assert lengths == [ids.shape[1] + 8] * 10


def test_threads_that_turn_one_model_leave_it_at_one_knob(make_sparse):
    model = make_sparse("llama")
    knobs = [[0.1 + 0.1 * i, 0.15 + 0.1 * i] for i in range(8)]

    for _ in range(20):
        threads = [threading.Thread(target=prunepath.set_threshold, args=(model, knob)) for knob in knobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = prunepath.get_thresholds(model)
        assert found in knobs
        assert model.config.quantization_config["thresholds"] == found
        written = [ffn._threshold.item() for ffn in prunepath.sparse_ffns(model).values()]
        assert written == pytest.approx(found)

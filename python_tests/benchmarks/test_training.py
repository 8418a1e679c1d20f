"""The harness of the quality benchmark: packed rows, the chunked loss, and its gradient."""

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not (BENCHMARKS / "training.py").is_file():
    pytest.skip("needs the source tree's benchmarks", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import mixture  # noqa: E402
import training  # noqa: E402
from baselines import METHODS, Settings  # noqa: E402
from tasks import Example  # noqa: E402


def tiny_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def examples(count: int, seed: int, **fields) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 60, (count,), generator=generator).tolist()
    return [Example(torch.randint(3, 97, (n,), generator=generator).tolist(), 2, **fields) for n in lengths]


def test_chunked_loss_and_its_gradients_are_those_of_whole_logits(monkeypatch):
    monkeypatch.setattr(training, "_POSITIONS", 7)
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(23, 16, generator=generator) for _ in range(2))
    weight, teacher_weight = (torch.randn(31, 16, generator=generator) for _ in range(2))
    labels = torch.randint(0, 31, (23,), generator=generator)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = training.LanguageLoss.apply(*ours, teacher_hidden, teacher_weight, labels)
    (3.0 * loss).backward()
    plain = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    log_p = (plain[0] @ plain[1].t()).log_softmax(-1)
    log_t = (teacher_hidden @ teacher_weight.t()).log_softmax(-1)
    expected = F.nll_loss(log_p, labels) + F.kl_div(log_p, log_t, log_target=True, reduction="batchmean")
    (3.0 * expected).backward()
    torch.testing.assert_close(loss, expected)
    for mine, right in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, right.grad)


def test_packed_examples_do_not_see_each_other():
    model = tiny_model()
    some = examples(5, 1)
    packed = mixture.pack(some, fill=0)
    hidden = training.final_hidden(model, packed)
    start = 0
    for example in some:
        alone = model.model(input_ids=torch.tensor([example.ids])).last_hidden_state[0]
        torch.testing.assert_close(hidden[start : start + len(example.ids)], alone, atol=1e-5, rtol=1e-5)
        labels = packed.labels[0, start : start + len(example.ids)].tolist()
        assert labels == [mixture.IGNORED, *example.ids[2:], mixture.IGNORED]
        start += len(example.ids)
    assert (packed.labels[0, start:] == mixture.IGNORED).all()


def test_tasks_have_their_shares_of_tokens():
    source = mixture.Mixture(
        {"wikitext": examples(40, 2), "mr": examples(40, 3, head="mr", label=1), "unknown": examples(3, 4)}, fill=0
    )
    batch = mixture.stack(list(islice(source.rows(seed=0), 40)))
    assert batch.input_ids.shape == (40, mixture.LENGTH)
    scored = (batch.labels != mixture.IGNORED).sum().item()
    where, classes = batch.heads["mr"]
    assert classes.unique().tolist() == [1]
    share = mixture.SHARES["wikitext"] / (mixture.SHARES["wikitext"] + mixture.SHARES["mr"])
    assert scored / batch.input_ids.numel() == pytest.approx(share, abs=0.1)
    ends = batch.documents.flatten()
    assert (ends[where] != ends[(where + 1) % len(ends)]).all()


def test_little_of_a_row_is_left_over():
    """Short examples wait for their row while whole ones pass."""
    whole = [Example([5] * mixture.LENGTH, 1)] * 3
    source = mixture.Mixture({"wikitext": whole, "e2e": examples(90, 7)}, fill=0)
    batch = mixture.stack(list(islice(source.rows(seed=0), 50)))
    assert (batch.input_ids == 0).float().mean() < 0.05


@pytest.mark.parametrize("name", ["dense", "prunepath"])
def test_training_lowers_the_loss(name):
    model = tiny_model()
    source = mixture.Mixture({"wikitext": examples(4, 5), "mr": examples(4, 6, head="mr", label=1)}, fill=0)
    method = METHODS[name](model, Settings(1, 8, (0.5,), 0, None))
    method.install(source.plain_batches(2, 4, 0))
    heads = training.make_heads(tiny_model(), {"mr": 2}, {"mr": examples(4, 6, head="mr", label=1)}, seed=0, steps=5)
    losses = training.finetune(method, heads, tiny_model(), source.batches(1, 0), steps=30, rate=3e-3, seed=0)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])

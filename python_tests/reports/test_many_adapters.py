"""Many LoRA adapters on one sparse model: switched, and mixed within a batch."""

import pytest
import torch

import prunepath

peft = pytest.importorskip("peft")

TARGETS = {
    "ffn": ["gate_proj", "up_proj", "down_proj"],
    "up": ["up_proj"],
    "both": ["q_proj", "down_proj"],
    "attention": ["q_proj", "v_proj"],
}


def adapted(make_sparse, family, where, threshold):
    """A sparse model with the adapters a and b."""
    targets = TARGETS[where]
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(make_sparse(family), config, adapter_name="a")
    model.add_adapter("b", config)
    prunepath.set_threshold(model, threshold)
    return model.eval()


def generate(model, ids, **options):
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    output = model.generate(input_ids=ids, output_logits=True, return_dict_in_generate=True, **fixed, **options)
    return output.sequences, torch.stack(output.logits, 1)


@pytest.mark.parametrize("threshold", [1.0, 0.6])
@pytest.mark.parametrize(
    ("family", "where"),
    [*(("llama", where) for where in TARGETS), ("opt", "attention")],  # peft mixes none in OPT's FFNs, dense or sparse
)
def test_a_mixed_batch_is_each_adapter_alone(make_sparse, family, where, threshold):
    model = adapted(make_sparse, family, where, threshold)
    ids = torch.randint(2, 97, (4, 6), generator=torch.Generator().manual_seed(1))
    names = ["a", "b", "__base__", "a"]
    alone = []
    for row, name in zip(ids.split(1), names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                alone.append(generate(model, row))
        else:
            model.set_adapter(name)
            alone.append(generate(model, row))
    tokens, logits = (torch.cat(part) for part in zip(*alone, strict=True))
    model.set_adapter("a")
    mixed = generate(model, ids, adapter_names=names)
    assert torch.equal(mixed[0], tokens)
    torch.testing.assert_close(mixed[1], logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(generate(model, ids[:1])[1], logits[:1], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_switching_back_and_forth_and_deleting_leaves_each_as_it_was(make_sparse, ids):
    model = adapted(make_sparse, "llama", "ffn", 0.6)
    first = {}
    for _ in range(3):
        for name in ("a", "b"):
            model.set_adapter(name)
            logits = model(input_ids=ids).logits
            assert torch.equal(first.setdefault(name, logits), logits)
    assert not torch.allclose(first["a"], first["b"], atol=0.1)
    model.delete_adapter("b")
    model.set_adapter("a")
    assert torch.equal(model(input_ids=ids).logits, first["a"])
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert torch.allclose(model.unload()(input_ids=ids).logits, base, rtol=1e-4, atol=1e-4)

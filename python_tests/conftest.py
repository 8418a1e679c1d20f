"""Settings of every test: poisoned allocations, few threads, and the `gpu` marker."""

import importlib.util
import os
import signal

# OpenMP's threads spin while they wait, which starves the other workers' threads. Read when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# A shell starts jobs in the background with interrupts ignored, and their processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# xdist runs one worker a core. Two threads each still exercise the parallel code.
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _poisoned_allocations():
    """Fills every uninitialised tensor that Python makes with NaN (integers: their maximum), so that reading it shows.

    The C++ operators allocate their results below the layer where this happens; their tests hand poisoned tensors to
    the `.out` overloads instead.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


def pytest_report_header():
    spec = importlib.util.find_spec("prunepath")
    return f"prunepath under test: {spec and spec.origin}; torch {torch.__version__}; CPU kernel: {_cpu_kernel()}"


def _cpu_kernel() -> str:
    from prunepath import errors, ops

    try:
        return ops.cpu_kernel()
    except errors.PrunePathError as error:
        return str(error)


VOCABULARY = 97
LLAMA_LIKE = {"llama": "Llama", "llama_mlp_bias": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def _make_model(family: str, seed: int = 0):
    """A causal language model with two layers, H = 32 and D = 64, weights large enough that its choices are clear."""
    import transformers

    torch.manual_seed(seed)
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if family == "opt":
        config = transformers.OPTConfig(**shared, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, init_std=0.2)
        return transformers.OPTForCausalLM(config).eval()
    name = LLAMA_LIKE[family]
    extra = {"mlp_bias": True} if family == "llama_mlp_bias" else {}
    config = getattr(transformers, f"{name}Config")(
        **shared, intermediate_size=64, num_key_value_heads=2, head_dim=8, initializer_range=0.2, **extra
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="session")
def make_model():
    """Makes a tiny model: (family, seed=0) -> model."""
    return _make_model


@pytest.fixture(params=[*LLAMA_LIKE, "opt"])
def dense(request):
    return _make_model(request.param)


@pytest.fixture
def llama():
    return _make_model("llama")


@pytest.fixture(scope="session")
def make_sparse():
    """Makes a tiny sparse model with random routers, without calibration: (family, **config) -> model."""
    from prunepath.checkpoint.description import SparseDescription, describe, install, path_in_backbone
    from prunepath.config import PrunePathConfig
    from prunepath.nn import for_inference

    def make(family_or_dense="llama", **config):
        model = _make_model(family_or_dense) if isinstance(family_or_dense, str) else family_or_dense
        config = PrunePathConfig(**config)
        ffns = install(model, config)
        for ffn in ffns.values():
            ffn.router.unpack()
            for parameter in ffn.router.parameters():
                torch.nn.init.normal_(parameter)
            ffn.router.fit_scales()
        describe(model, SparseDescription(config, [path_in_backbone(model, p) for p in ffns], [1.0] * len(ffns)))
        return for_inference(model)

    return make


@pytest.fixture(scope="session")
def token_texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCABULARY, (150,), generator=generator) for _ in range(24)]


@pytest.fixture(scope="session")
def small_config():
    from prunepath.config import PrunePathConfig

    return PrunePathConfig(sequence_length=32, partition_tokens=256, router_tokens=1024, calibration_tokens=512)


@pytest.fixture
def ids():
    return torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))

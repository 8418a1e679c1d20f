"""A tiny model, dense and sparse, as checkpoint folders, and the command line to run on them."""

import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from prunepath.cli.app import app

CONVERT_OPTIONS = (
    "--num-experts 8 --sequence-length 32 --partition-tokens 256 --router-tokens 512 --calibration-tokens 256"
).split()


@pytest.fixture
def prunepath_command():
    """Runs the command line in this process: (*arguments) -> result with exit_code, stdout and stderr."""

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def refused(prunepath_command):
    """Runs a command that must end with exit code 2 and one sentence; gives the sentence."""

    def run(*arguments):
        result = prunepath_command(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, result.stderr
        assert lines[0] == result.stderr.splitlines()[-1], "the error is the last thing said"
        assert lines[0].endswith(".")
        return lines[0]

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("".join(f"Bird {i} sings song {i * i % 97}.\n" for i in range(400)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, and <end> at the beginning of a text."""
    vocabulary = {token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")


@pytest.fixture(scope="session")
def _dense_folder(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    path = tmp_path_factory.mktemp("models") / "dense"
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def _sparse_folder(_dense_folder, corpus):
    path = _dense_folder.parent / "sparse"
    arguments = ["convert", str(_dense_folder), str(path), "--data", str(corpus), *CONVERT_OPTIONS]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def dense_folder(_dense_folder, tmp_path):
    """A dense checkpoint of this test's own."""
    return shutil.copytree(_dense_folder, tmp_path / "dense")


@pytest.fixture
def sparse_folder(_sparse_folder, tmp_path):
    """A sparse checkpoint of this test's own."""
    return shutil.copytree(_sparse_folder, tmp_path / "sparse")

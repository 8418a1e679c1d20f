"""Trains PrunePath's embedded demo model from scratch on the Python standard library's sources.

    python examples/train_demo_model.py --out demo-model --steps 4500      # a few minutes on one large GPU
    python examples/train_demo_model.py --evaluate prunepath/demo/model    # bits per byte, beside xz

A byte-level BPE tokenizer is trained on the train split, then a Llama-architecture model (SwiGLU, tied
embeddings) as a plain dense language model. The checkpoint with the lowest validation loss is kept, and each
save replaces the previous one only when it is complete, so that a run may be interrupted at any time.
Held-out modules are read by `--evaluate` alone.
"""

import argparse
import copy
import json
import lzma
import math
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from prunepath.demo.corpus import stdlib_texts

END = "<|endoftext|>"

# A newline takes the indentation after it along; a word takes one character before it (a space, a dot, an
# underscore); digits stand alone.
PRE_TOKENS = (
    r"[\r\n]+[ \t]*"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[^\S\r\n]+(?=[^\S\r\n])"
    r"|\s+"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer that decodes every string to itself.

    It puts END before a text, as training has before every document.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[torch.Tensor]:
    """One int64 tensor a document: END, the document's tokens, END."""
    end = tokenizer.token_to_id(END)
    ids = (encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    return [torch.tensor([end, *document, end]) for document in ids]


def prepare(args: argparse.Namespace) -> tuple[Tokenizer, list[torch.Tensor], list[torch.Tensor], int]:
    """(tokenizer, train documents, validation documents, bytes of the validation split).

    They are read from `--cache` if it has them, and written there otherwise.
    """
    if args.cache and (args.cache / "tokens.npz").exists():
        tokens = np.load(args.cache / "tokens.npz")
        train, validation = (
            list(torch.from_numpy(tokens[split].astype(np.int64)).split(tokens[f"{split}_lengths"].tolist()))
            for split in ("train", "validation")
        )
        tokenizer = Tokenizer.from_file(str(args.cache / "tokenizer.json"))
        return tokenizer, train, validation, int(tokens["validation_bytes"])

    texts = stdlib_texts("train", args.stdlib)
    validation_texts = stdlib_texts("validation", args.stdlib)
    validation_bytes = sum(len(text.encode()) for text in validation_texts)
    print(f"tokenizer: training on {sum(map(len, texts)) / 1e6:.1f} M characters")
    tokenizer = train_tokenizer(texts, args.vocab_size)
    train, validation = encode(tokenizer, texts), encode(tokenizer, validation_texts)
    if args.cache:
        args.cache.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(args.cache / "tokenizer.json"))
        arrays = {"validation_bytes": np.array(validation_bytes)}
        for split, documents in (("train", train), ("validation", validation)):
            arrays[split] = torch.cat(documents).numpy().astype(np.uint16)
            arrays[f"{split}_lengths"] = np.array([len(document) for document in documents])
        np.savez(args.cache / "tokens.npz", **arrays)
    return tokenizer, train, validation, validation_bytes


def epochs(documents: list[torch.Tensor], context: int, batch_size: int, device: torch.device, seed: int):
    """Yields batches [batch_size, context + 1] for ever.

    Each epoch joins the documents in a new order, cuts them into windows at a new offset, and shuffles the
    windows.
    """
    generator = torch.Generator().manual_seed(seed)
    documents = [document.to(device) for document in documents]
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([documents[i] for i in order])
        offset = int(torch.randint(context, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - context, context)
        starts = starts[torch.randperm(len(starts), generator=generator)].to(device)
        if len(starts) < batch_size:
            raise SystemExit(f"expected at least {batch_size} windows of {context} tokens, got {len(starts)}.")
        for batch in starts[: len(starts) // batch_size * batch_size].view(-1, batch_size):
            yield stream[batch[:, None] + torch.arange(context + 1, device=device)]


@torch.inference_mode()
def negative_log_likelihood(
    model: LlamaForCausalLM,
    documents: list[torch.Tensor],
    *,
    context: int,
    stride: int,
    batch_size: int,
    progress: bool = False,
) -> float:
    """Total nats of every document's tokens, its final END included, each document starting from END alone.

    Windows of `context` tokens move on by `stride`: every token but a document's first ones is predicted from
    at least `context - stride` tokens before it, and each is counted once.
    """
    windows = []
    for document in documents:
        done = 1
        for start in range(0, len(document) - 1, stride):
            ids = document[start : start + context + 1]
            targets = ids[1:].clone()
            targets[: done - start - 1] = -100
            windows.append((ids[:-1], targets))
            done = start + len(ids)
            if done >= len(document):
                break
    windows.sort(key=lambda window: len(window[0]))
    total = 0.0
    for first in tqdm(range(0, len(windows), batch_size), desc="evaluating", disable=not progress, leave=False):
        inputs, targets = zip(*windows[first : first + batch_size], strict=True)
        # Padding is on the right, where a causal model's scored positions do not see it.
        inputs = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(model.device)
        targets = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100).to(model.device)
        logits = model(input_ids=inputs, use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total


def add_dropout(model: LlamaForCausalLM, p: float) -> None:
    """In training mode, drops out the embeddings and what each block adds to the residual stream."""

    def hook(module, args, output):
        if isinstance(output, tuple):
            return (F.dropout(output[0], p, module.training), *output[1:])
        return F.dropout(output, p, module.training)

    if p > 0:
        model.model.embed_tokens.register_forward_hook(hook)
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(hook)
            layer.mlp.register_forward_hook(hook)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes a bfloat16 checkpoint to a temporary folder beside `out`, then puts it in the place of `out`."""
    temporary, previous = out.with_name(out.name + ".writing"), out.with_name(out.name + ".previous")
    for leftover in (temporary, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    copy.deepcopy(model).to(device="cpu", dtype=torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if out.exists():
        out.rename(previous)
    temporary.rename(out)
    shutil.rmtree(previous, ignore_errors=True)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def train(args: argparse.Namespace) -> None:
    transformers_logging.disable_progress_bar()
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    started = time.monotonic()
    backend, train_documents, validation_documents, validation_bytes = prepare(args)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END, pad_token=END, model_max_length=args.context
    )
    end = tokenizer.eos_token_id
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            max_position_embeddings=args.context,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    ).to(device)
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    add_dropout(model, args.dropout)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens_an_epoch = sum(map(len, train_documents))
    print(f"{parameters:,} parameters; {tokens_an_epoch:,} train tokens an epoch; {device}")

    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    compiled_loss = torch.compile(loss_of) if args.compile else loss_of

    def bits_per_byte() -> float:
        model.eval()
        with autocast:
            nats = negative_log_likelihood(
                model,
                validation_documents,
                context=args.context,
                stride=args.context,
                batch_size=args.batch_size,
            )
        model.train()
        return nats / math.log(2) / validation_bytes

    batches = epochs(train_documents, args.context, args.batch_size, device, args.seed)
    best, step, running, finished = float("inf"), 0, torch.zeros((), device=device), False
    model.train()
    training_started = time.monotonic()
    # The learning rate follows whichever of the two limits is nearer, so that it always ends at zero.
    limit = args.steps or float("inf")
    bar = tqdm(total=args.steps, unit="step", mininterval=5)
    try:
        while not finished:
            elapsed = time.monotonic() - started
            progress = min(1.0, max(step / limit, elapsed / args.time_budget if args.time_budget else 0.0))
            rate = min((step + 1) / args.warmup, 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * rate
            with autocast:
                loss = compiled_loss(next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            running += loss.detach()
            step += 1
            bar.update()
            finished = progress >= 1.0 or step >= limit
            if step % args.validate_every == 0 or finished:
                count = (step - 1) % args.validate_every + 1
                value = bits_per_byte()
                seconds = time.monotonic() - training_started
                seen = step * args.batch_size * args.context
                bar.write(
                    f"step {step}: {seconds:.0f} s; {seen / 1e6:.1f} M tokens, "
                    f"{seen / tokens_an_epoch:.1f} epochs; "
                    f"train loss {running.item() / count:.4f}; validation {value:.4f} bits per byte"
                    f"{' (best)' if value < best else ''}"
                )
                running.zero_()
                if value < best:
                    best = value
                    save(model, tokenizer, args.out)
    except KeyboardInterrupt:
        bar.write("interrupted")
    bar.close()
    print(f"best validation: {best:.4f} bits per byte after up to {step} steps; saved in {args.out}")


def evaluate(args: argparse.Namespace) -> None:
    """Prints bits per byte of a checkpoint on the held-out text, and what xz makes of the same text as one stream."""
    device = choose_device(args.device)
    model = AutoModelForCausalLM.from_pretrained(args.evaluate, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.evaluate)
    texts = stdlib_texts("held_out", args.stdlib)
    documents = encode(tokenizer.backend_tokenizer, texts)
    stream = "".join(texts).encode()
    context = model.config.max_position_embeddings
    nats = negative_log_likelihood(model, documents, context=context, stride=context // 2, batch_size=8, progress=True)
    tokens = sum(len(document) - 1 for document in documents)
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": len(stream),
        "tokens": tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / len(stream),
    }
    for name, preset in (("xz_9", 9), ("xz_9e", 9 | lzma.PRESET_EXTREME)):
        result[f"{name}_bits_per_byte"] = 8 * len(lzma.compress(stream, preset=preset)) / len(stream)
    print(json.dumps(result, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="evaluate this checkpoint and train nothing")
    parser.add_argument("--out", type=Path, default=Path("demo-model"), help="the checkpoint's folder (replaced)")
    parser.add_argument("--stdlib", type=Path, help="a standard library's folder; default: this interpreter's")
    parser.add_argument("--cache", type=Path, help="keep the tokenizer and the tokens here, and use what is there")
    parser.add_argument("--prepare-only", action="store_true", help="fill --cache and stop")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--time-budget", type=float, help="seconds for the whole run")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--batch-size", type=int, default=64, help="windows in a step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=500, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.4)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--validate-every", type=int, default=500, help="steps")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    args = parser.parse_args()
    if args.evaluate:
        evaluate(args)
    elif args.prepare_only:
        if not args.cache:
            parser.error("--prepare-only needs --cache FOLDER.")
        prepare(args)
    elif not (args.steps or args.time_budget):
        parser.error("expected --steps or --time-budget, got neither.")
    else:
        train(args)


if __name__ == "__main__":
    main()

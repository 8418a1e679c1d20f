"""Times torch.ops.prunepath.route and select beside the same selection in plain torch: softmax, sort, cumsum.

    python benchmarks/route.py                       # the default shapes, as a table
    python benchmarks/route.py --experts 128 --tokens 1,64 --json route.json
    python benchmarks/route.py --device cuda --experts 128 --tokens 1,64     # the Triton kernels too

Every timed call is checked first, on the very inputs that are timed: `route` and `select` must equal the pure-torch
reference bit for bit. The plain-torch version is what one would write without the operator; it sums floats, so it may
differ where a mass lies within rounding of the threshold, and the share of tokens for which it selects the same
experts is reported. Medians of interleaved repetitions, on fresh random logits; on a GPU of replays of CUDA graphs of
many calls, timed on the device.
"""

import argparse
import json
import statistics
import sys
from functools import partial

import torch
from common import graph_seconds, machine, seconds, today, whole_numbers

from prunepath import native, ops
from prunepath.eval.files import write_json
from prunepath.ops import reference


def plain_torch(logits: torch.Tensor, threshold: float):
    """(expert_ids, probs, counts) as `route` has them, from float sums."""
    probs, ids = torch.softmax(logits.float(), dim=-1).sort(dim=-1, descending=True, stable=True)
    active = probs.cumsum(-1) - probs < threshold
    return (
        ids.int().masked_fill(~active, -1),
        probs.masked_fill(~active, 0),
        active.sum(-1, dtype=torch.int32),
    )


def plain_torch_mask(logits: torch.Tensor, threshold: float):
    """(mask, counts) as `select` has them, from float sums."""
    probs, ids = torch.softmax(logits.float(), dim=-1).sort(dim=-1, descending=True, stable=True)
    active = probs.cumsum(-1) - probs < threshold
    return torch.zeros_like(active).scatter_(1, ids, active), active.sum(-1, dtype=torch.int32)


def measure(experts: int, tokens: int, args: argparse.Namespace) -> dict:
    threshold = args.threshold
    logits = (3 * torch.randn(tokens, experts, device=args.device)).to(getattr(torch, args.dtype))
    expected = {"route": reference.route(logits, threshold), "select": reference.select(logits, threshold)}
    names = ("route", "select")
    candidates = {name: partial(getattr(torch.ops.prunepath, name).default, logits, threshold) for name in names}
    if args.device == "cuda":
        triton = ops.resolve_backend(logits.device, "triton")
        candidates |= {f"triton_{name}": partial(getattr(triton, name), logits, threshold) for name in names}
    for name, call in candidates.items():
        for index, (left, right) in enumerate(zip(call(), expected[name.removeprefix("triton_")], strict=True)):
            if not torch.equal(left, right):
                raise SystemExit(
                    f"{name}: output {index} differs from the reference at E={experts}, T={tokens}: nothing is timed."
                )
    candidates["plain_torch"] = partial(plain_torch, logits, threshold)
    candidates["plain_torch_mask"] = partial(plain_torch_mask, logits, threshold)
    agreement = (candidates["plain_torch"]()[2] == expected["route"][2]).float().mean().item()

    if args.device == "cuda":
        samples = {name: graph_seconds([call]) for name, call in candidates.items()}
    else:
        # As many calls a sample as take about 5 ms, so that the clock's resolution does not matter.
        samples = {
            name: partial(seconds, call, max(1, int(5e-3 / max(seconds(call, 3), 1e-7))))
            for name, call in candidates.items()
        }
    times = {name: [] for name in candidates}
    for _ in range(args.repeats):
        for name, sample in samples.items():
            times[name].append(sample())
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "device": args.device,
        "experts": experts,
        "tokens": tokens,
        "threshold": threshold,
        "dtype": args.dtype,
        "mean_count": expected["route"][2].float().mean().item(),
        **{f"{name}_us": 1e6 * median for name, median in medians.items()},
        "speedup": medians["plain_torch"] / medians["route"],
        "select_speedup": medians["plain_torch_mask"] / medians["select"],
        "plain_torch_same_counts": agreement,
    }


def _micros(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--experts", type=whole_numbers, default=[128, 1536, 4096, 14336], help="comma-separated")
    parser.add_argument("--tokens", type=whole_numbers, default=[1, 64], help="comma-separated")
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the rows here; - is standard output")
    args = parser.parse_args()
    native.require()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no GPU")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    command = (
        f"python benchmarks/route.py --device {args.device} --experts {','.join(map(str, args.experts))} "
        f"--tokens {','.join(map(str, args.tokens))} --threshold {args.threshold} --dtype {args.dtype} "
        f"--threads {args.threads} --repeats {args.repeats} --seed {args.seed}"
    )
    table = sys.stderr if args.json == "-" else sys.stdout
    print(f"{command}\n{machine(args.device)}", file=table)
    print(
        "    E     T  mean count    route µs   triton µs  plain torch µs  speed-up   select µs   triton µs  speed-up",
        file=table,
    )
    rows = []
    for experts in args.experts:
        for tokens in args.tokens:
            row = measure(experts, tokens, args)
            rows.append(row)
            print(
                f"{experts:5d} {tokens:5d} {row['mean_count']:11.1f} {row['route_us']:11.2f} "
                f"{_micros(row.get('triton_route_us')):>11} "
                f"{row['plain_torch_us']:15.2f} {row['speedup']:8.1f}x {row['select_us']:11.2f} "
                f"{_micros(row.get('triton_select_us')):>11} {row['select_speedup']:8.1f}x",
                file=table,
            )
    result = {"command": command, "machine": machine(args.device), "date": today(), "rows": rows}
    if args.json == "-":
        print(json.dumps(result, indent=2))
    elif args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()

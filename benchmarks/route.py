"""Times torch.ops.prunepath.route on CPU beside the same selection in plain torch: softmax, sort, cumsum.

    python benchmarks/route.py                       # the default shapes, as a table
    python benchmarks/route.py --experts 128 --tokens 1,64 --json route.json

Every timed call is checked first, on the very inputs that are timed: `route` must equal the pure-torch
reference bit for bit. The plain-torch version is what one would write without the operator; it sums floats,
so it may differ where a mass lies within rounding of the threshold, and the share of tokens for which it
selects the same experts is reported. Medians of interleaved repetitions, on fresh random logits.
"""

import argparse
import json
import statistics
import sys

import torch
from common import machine, seconds, whole_numbers

from prunepath import native
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


def measure(experts: int, tokens: int, threshold: float, dtype: torch.dtype, repeats: int) -> dict:
    logits = (3 * torch.randn(tokens, experts)).to(dtype)
    op = torch.ops.prunepath.route
    got, expected = op(logits, threshold), reference.route(logits, threshold)
    for name, left, right in zip(("expert_ids", "probs", "counts"), got, expected, strict=True):
        if not torch.equal(left, right):
            raise SystemExit(f"route's {name} differ from the reference at E={experts}, T={tokens}: nothing is timed.")
    agreement = (plain_torch(logits, threshold)[2] == got[2]).float().mean().item()

    candidates = {
        "route": lambda: op(logits, threshold),
        "plain torch": lambda: plain_torch(logits, threshold),
    }
    # As many calls a sample as take about 5 ms, so that the clock's resolution does not matter.
    calls = {name: max(1, int(5e-3 / max(seconds(call, 3), 1e-7))) for name, call in candidates.items()}
    times = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            times[name].append(seconds(call, calls[name]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "experts": experts,
        "tokens": tokens,
        "threshold": threshold,
        "dtype": str(dtype).removeprefix("torch."),
        "mean_count": got[2].float().mean().item(),
        "route_us": 1e6 * medians["route"],
        "plain_torch_us": 1e6 * medians["plain torch"],
        "speedup": medians["plain torch"] / medians["route"],
        "plain_torch_same_counts": agreement,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=whole_numbers, default=[64, 128, 256], help="comma-separated")
    parser.add_argument("--tokens", type=whole_numbers, default=[1, 8, 64, 512], help="comma-separated")
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the rows here; - is standard output")
    args = parser.parse_args()
    native.require()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    command = (
        f"python benchmarks/route.py --experts {','.join(map(str, args.experts))} "
        f"--tokens {','.join(map(str, args.tokens))} --threshold {args.threshold} --dtype {args.dtype} "
        f"--threads {args.threads} --repeats {args.repeats} --seed {args.seed}"
    )
    table = sys.stderr if args.json == "-" else sys.stdout
    print(f"{command}\n{machine()}", file=table)
    print("    E     T  mean count    route µs  plain torch µs  speed-up", file=table)
    rows = []
    for experts in args.experts:
        for tokens in args.tokens:
            row = measure(experts, tokens, args.threshold, getattr(torch, args.dtype), args.repeats)
            rows.append(row)
            print(
                f"{experts:5d} {tokens:5d} {row['mean_count']:11.1f} {row['route_us']:11.2f} "
                f"{row['plain_torch_us']:15.2f} {row['speedup']:8.1f}x",
                file=table,
            )
    result = {"command": command, "machine": machine(), "torch": torch.__version__, "rows": rows}
    if args.json == "-":
        print(json.dumps(result, indent=2))
    elif args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()

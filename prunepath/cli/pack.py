from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunepath.cli.common import JsonOption, OutArgument, import_prunepath
from prunepath.cli.results import printing


def pack(
    model: Annotated[Path, typer.Argument(metavar="SPARSE", help="Sparse checkpoint folder.")],
    out: OutArgument,
    as_json: JsonOption = False,
) -> None:
    """Write SPARSE anew for use straight from the file.

    Weights come into memory when they are used.
    """
    from prunepath.checkpoint.folders import check_output_folder

    out = check_output_folder(out)
    with printing(as_json) as results:
        import_prunepath()
        from prunepath.checkpoint.packing import pack as pack_checkpoint

        sizes = pack_checkpoint(model, out)
        results.json({"model": str(model), "out": str(out), **sizes})
        results.text(f"Wrote {out}: {sizes['ffn_bytes'] / 1e6:.1f} MB of FFN weights.")
        results.text(f'Try: prunepath generate {out} "Once upon a time" --budget 0.25 --report-memory')

"""Where an FFN's weights are, and how they lie in memory."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from prunepath.errors import PrunePathError


@dataclasses.dataclass(frozen=True)
class FFNLayout:
    """The names of an FFN's parts on the module that owns them, and its activation.

    A name may be dotted, for a part that lives in a child of that module.

    Args:
        up: the projection from H to D.
        down: the projection from D to H.
        gate: the projection from H to D whose activation gates `up`; None for an ungated FFN, act(up(x)). The same name
            as `up` means one matrix of both, the gate's D rows first.
        activation: `relu`, `gelu`, `gelu_tanh`, `silu` or `relu2`.
        transposed: the weights are stored [in, out], as those of transformers' `Conv1D` are, and not [out, in].
        dropout: the dropout between activation and `down`, if there is one.
        output_dropout: the dropout after `down`, if the owner has one.
    """

    up: str
    down: str
    activation: str
    gate: str | None = None
    transposed: bool = False
    dropout: str | None = None
    output_dropout: str | None = None

    @property
    def is_fused(self) -> bool:
        """Whether gate and up are one matrix."""
        return self.gate == self.up

    @property
    def inputs(self) -> tuple[str, ...]:
        """The projections that read x."""
        return (self.up,) if self.gate is None or self.is_fused else (self.gate, self.up)

    @property
    def projections(self) -> tuple[str, ...]:
        return (*self.inputs, self.down)

    def sizes(self, owner: nn.Module) -> tuple[int, int]:
        """(H, D) of the FFN whose parts are on `owner`.

        Raises:
            PrunePathError: if a projection is missing, or their shapes do not fit together.
        """
        try:
            shapes = [tuple(owner.get_submodule(name).weight.shape) for name in self.projections]
        except AttributeError as error:
            raise PrunePathError(
                f"Expected a {type(owner).__name__} with the projections {', '.join(self.projections)}, but: {error}."
            ) from error
        *inputs, down = [shape[::-1] for shape in shapes] if self.transposed else shapes
        hidden_size, intermediate_size = down if len(down) == 2 else (0, 0)
        rows = 2 * intermediate_size if self.is_fused else intermediate_size
        if hidden_size * intermediate_size == 0 or any(shape != (rows, hidden_size) for shape in inputs):
            raise PrunePathError(
                f"Expected the projections {', '.join(self.projections)} of a {type(owner).__name__} to lead from H to "
                f"D and back, got weights of the shapes {', '.join(str(list(shape)) for shape in shapes)}."
            )
        return hidden_size, intermediate_size


class PlainLinear(nn.Linear):
    """Marks subclasses of `nn.Linear` whose weight and bias are all there is to the projection."""


def is_plain(projection: nn.Module) -> bool:
    """Whether a projection is x·Wᵀ + b of its own dense weight, with no adapter, hook or quantisation around it."""
    kind = type(projection)
    return (
        (kind is nn.Linear or issubclass(kind, PlainLinear) or kind.__name__ == "Conv1D")  # transformers' class
        and type(projection.weight) is nn.Parameter
        and not (
            projection._forward_hooks
            or projection._forward_pre_hooks
            or projection._backward_hooks
            or projection._backward_pre_hooks
            or "forward" in projection.__dict__  # how accelerate adds hooks
        )
    )


@torch.inference_mode(False)
@torch.no_grad()
def lay_out(projection: nn.Module, *, column_major: bool) -> None:
    """Copies a projection's weight into new storage, column-major or row-major, unless it lies so already.

    An adapter's base weight counts as one. Weights that are no plain matrices, quantised or sharded, stay as they are.
    """
    weight = getattr(projection, "weight", None)
    if type(weight) is not nn.Parameter or weight.dim() != 2 or weight.is_meta or weight.element_size() == 1:
        return
    matrix = weight.data.t() if column_major else weight.data
    if not matrix.is_contiguous():
        laid_out = matrix.contiguous()
        weight.data = laid_out.t() if column_major else laid_out

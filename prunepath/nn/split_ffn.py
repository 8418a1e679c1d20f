"""Sparse FFNs for models whose FFN is no module of its own: up, activation and down called one after another."""

from __future__ import annotations

import torch
from torch import nn

from prunepath.nn.sparse_ffn import FFNLayout, PlainLinear, SparseFFN


class SplitFFN(SparseFFN):
    """A SparseFFN that works through the three calls `down(act(up(x)))` of the module that owns the projections.

    `up` either computes the whole FFN from its active experts, and then `act` and `down` hand its result through, or
    computes all neurons, of which `act` masks the skipped ones. Both `up` and `down` stay linears under their names.

    Args:
        owner: the module, say a decoder layer, that calls the projections, or whose children do.
        layout: their names; ungated.
        activation: the name of the activation module on `owner`, dotted if a child has it.
        num_experts, options: as for `SparseFFN`.
    """

    def __init__(self, owner: nn.Module, layout: FFNLayout, activation: str, num_experts: int, **options) -> None:
        super().__init__(owner, layout, num_experts, adopt=False, **options)
        self._input: torch.Tensor | None = None
        self._done = False
        self._alone = False
        for name, kind in ((layout.up, _Up), (layout.down, _Down)):
            linear = owner.get_submodule(name)
            linear.__class__ = kind
            linear._ffn = (self,)  # a tuple, so that the FFN does not become a submodule of its projection
        parent, _, leaf = activation.rpartition(".")
        setattr(owner.get_submodule(parent), leaf, _Activation(self, owner.get_submodule(activation)))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        self._alone = True
        try:
            return super().hidden(x)
        finally:
            self._alone = False

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The FFN's output if the kernels serve it; else None, with the input kept for the activation."""
        x = hidden_states.reshape(-1, self.hidden_size)
        if self.observe_input is not None:
            self.observe_input(self, x)
        self._done = self.reads_active_experts(x)
        if self._done:
            return self.run_active_experts(x).view_as(hidden_states)
        self._input = x
        return None


class _Up(PlainLinear):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        (ffn,) = self._ffn
        output = None if ffn._alone else ffn.enter(hidden_states)
        return super().forward(hidden_states) if output is None else output


class _Activation(nn.Module):
    def __init__(self, ffn: SplitFFN, dense: nn.Module) -> None:
        super().__init__()
        self._ffn = (ffn,)
        self.dense = dense

    def forward(self, up: torch.Tensor) -> torch.Tensor:
        (ffn,) = self._ffn
        if ffn._done:
            return up
        x, ffn._input = ffn._input, None
        hidden = self.dense(up).reshape(len(x), -1)
        return ffn.skip(hidden, ffn.mask(x, hidden)).view(up.shape)


class _Down(PlainLinear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        (ffn,) = self._ffn
        if ffn._done:
            ffn._done = False
            return hidden
        return ffn.add_removed(super().forward(hidden))

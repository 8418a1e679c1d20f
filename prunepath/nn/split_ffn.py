"""Sparse FFNs for models whose FFN is no module of its own: up, activation and down called one after another."""

from __future__ import annotations

import threading

import torch
from torch import nn

from prunepath.nn.layout import FFNLayout, PlainLinear
from prunepath.nn.sparse_ffn import SparseFFN


class SplitFFN(SparseFFN):
    """A SparseFFN that works through the three calls `down(act(up(x)))` of the module that owns the projections.

    `up` computes the whole FFN, and the activation and `down` hand its result through. Where a projection is more than
    a plain linear, each of the three does its own part, and the activation masks the skipped neurons. `up` and `down`
    stay linears under their names.

    Args:
        owner: the module, say a decoder layer, that calls the projections, or whose children do.
        layout: their names; ungated.
        activation: the name of the activation module on `owner`, dotted if a child has it.
        num_experts, options: as for `SparseFFN`.
    """

    def __init__(self, owner: nn.Module, layout: FFNLayout, activation: str, num_experts: int, **options) -> None:
        super().__init__(owner, layout, num_experts, adopt=False, **options)
        # What `up` leaves for the activation where each projection is called: one input for each thread.
        self._inputs: dict[int, torch.Tensor] = {}
        for name, kind in ((layout.up, _Up), (layout.down, _Down)):
            linear = owner.get_submodule(name)
            linear.__class__ = kind
            linear._ffn = (self,)  # a tuple, so that the FFN does not become a submodule of its projection
        parent, _, leaf = activation.rpartition(".")
        setattr(owner.get_submodule(parent), leaf, _Activation(self, owner.get_submodule(activation)))

    def _call(self, name: str, x: torch.Tensor) -> torch.Tensor:
        projection = self.projection(name)
        return projection.compute(x) if isinstance(projection, _Part) else projection(x)

    def leave_input(self, x: torch.Tensor) -> None:
        self._inputs[threading.get_ident()] = x

    def take_input(self) -> torch.Tensor:
        return self._inputs.pop(threading.get_ident())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_inputs": {}}


class _Part(PlainLinear):
    """A projection of a SplitFFN."""

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class _Up(_Part):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        (ffn,) = self._ffn
        if ffn.is_plain():
            return ffn(hidden_states)
        x = hidden_states.reshape(-1, ffn.hidden_size)
        for hook in tuple(ffn._input_hooks.values()):
            hook(ffn, x)
        ffn.leave_input(x)
        return self.compute(hidden_states)


class _Activation(nn.Module):
    def __init__(self, ffn: SplitFFN, dense: nn.Module) -> None:
        super().__init__()
        self._ffn = (ffn,)
        self.dense = dense

    def forward(self, up: torch.Tensor) -> torch.Tensor:
        (ffn,) = self._ffn
        if ffn.is_plain():
            return up
        x = ffn.take_input()
        hidden = self.dense(up).reshape(x.shape[0], -1)
        return ffn.skip(hidden, ffn.active(x, hidden)).view(up.shape)


class _Down(_Part):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        (ffn,) = self._ffn
        return hidden if ffn.is_plain() else self.compute(hidden)

"""How an FFN is found in a model, described, and replaced by a sparse one."""

from __future__ import annotations

import abc
import dataclasses

from torch import nn

from prunepath.errors import PrunePathError
from prunepath.nn import FFNLayout, SparseFFN

# transformers' activation modules by class name, since configurations spell the same function in several ways.
_ACTIVATION_CLASSES = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}


def activation_name(module: nn.Module) -> str:
    """PrunePath's name of an activation module.

    Raises:
        PrunePathError: for an activation that the kernels do not compute.
    """
    name = _ACTIVATION_CLASSES.get(type(module).__name__)
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        name = "gelu_tanh"
    if name is None:
        expected = ", ".join(sorted(set(_ACTIVATION_CLASSES.values())))
        raise PrunePathError(f"Expected an FFN whose activation is one of {expected}, got {type(module).__name__}.")
    return name


class FFNAdapter(abc.ABC):
    """One family's FFN.

    Subclasses name the classes they know and describe one instance; `register_adapter` makes them known:

        class MyFFN(FFNAdapter):
            classes = ("MyFeedForward",)

            def layout(self, module):
                return FFNLayout(up="fc_in", down="fc_out", activation="gelu")
    """

    classes: tuple[str, ...]
    """Names of the module classes, or of bases of theirs, that own an FFN's projections."""

    @abc.abstractmethod
    def layout(self, module: nn.Module) -> FFNLayout:
        """The projections of `module` and its activation."""

    def path(self, owner: str) -> str:
        """Where the SparseFFN of the module at the dotted path `owner` lives: there, unless the owner does more."""
        return owner

    def install(self, parent: nn.Module, name: str, num_experts: int, **options) -> SparseFFN:
        """Replaces the child `name` of `parent` by a SparseFFN with the same projections, and returns it."""
        module = parent._modules[name]
        ffn = SparseFFN(module, self.layout(module), num_experts, **options)
        ffn.train(module.training)
        setattr(parent, name, ffn)
        return ffn


_adapters: dict[str, FFNAdapter] = {}


def register_adapter(adapter: FFNAdapter) -> None:
    """Makes `convert` and loading know the classes of `adapter`; a later adapter of the same class name wins."""
    for name in adapter.classes:
        _adapters[name] = adapter


def supported_classes() -> list[str]:
    """Names of the module classes that `convert` knows."""
    return sorted(_adapters)


@dataclasses.dataclass(frozen=True)
class FFNSite:
    """A dense FFN in a model: where it is, and who knows it."""

    parent: nn.Module
    name: str
    path: str
    layout: FFNLayout
    adapter: FFNAdapter

    @property
    def intermediate_size(self) -> int:
        return getattr(self.parent._modules[self.name], self.layout.up).out_features

    def install(self, num_experts: int, **options) -> SparseFFN:
        return self.adapter.install(self.parent, self.name, num_experts, **options)


def find_ffns(model: nn.Module) -> list[FFNSite]:
    """The model's dense FFNs, in the order of its modules.

    Raises:
        PrunePathError: if there is none, naming the model's class and the supported ones.
    """
    sites = []
    for path, module in model.named_modules():
        adapter = next((_adapters[c.__name__] for c in type(module).__mro__ if c.__name__ in _adapters), None)
        if adapter is not None and path:
            parent_path, _, name = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            sites.append(FFNSite(parent, name, adapter.path(path), adapter.layout(module), adapter))
    if not sites:
        raise PrunePathError(
            f"Expected a model with FFNs of one of the classes {', '.join(supported_classes())}, got "
            f"{type(model).__name__}, which has none."
        )
    return sites

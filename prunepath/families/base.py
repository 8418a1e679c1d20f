"""How an FFN is found in a model, described, and replaced by a sparse one."""

from __future__ import annotations

import abc
import dataclasses
import re

from torch import nn

from prunepath.errors import PrunePathError
from prunepath.nn import FFNLayout, SparseFFN, SplitFFN

# transformers' activation modules by class name, since configurations spell the same function in several ways.
_ACTIVATION_CLASSES = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}

# What transformers calls the modules of mixture-of-experts models.
_MIXTURE = re.compile(r"Moe|MoE|Experts|SparseMLP")


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

    split_by: str | None = None
    """Where the FFN is no module of its own, so that the owner stays: the dotted name on it of the activation module,
    which is called between `up` and `down`. Such an FFN has no gate."""

    @abc.abstractmethod
    def layout(self, module: nn.Module) -> FFNLayout:
        """The projections of `module` and its activation."""

    def path(self, owner: str) -> str:
        """Where the SparseFFN of the module at the dotted path `owner` lives: in its place, or as its child `mlp`."""
        return owner if self.split_by is None else f"{owner}.mlp"

    def install(self, parent: nn.Module, name: str, num_experts: int, **options) -> SparseFFN:
        """Makes the FFN of the child `name` of `parent` a SparseFFN with the same projections, and returns it."""
        module = parent._modules[name]
        if self.split_by is None:
            ffn = SparseFFN(module, self.layout(module), num_experts, **options)
            setattr(parent, name, ffn)
        else:
            ffn = SplitFFN(module, self.layout(module), self.split_by, num_experts, **options)
            module.mlp = ffn
        return ffn.train(module.training)


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
    hidden_size: int
    intermediate_size: int
    adapter: FFNAdapter

    def install(self, num_experts: int, **options) -> SparseFFN:
        return self.adapter.install(self.parent, self.name, num_experts, **options)


def find_ffns(model: nn.Module) -> list[FFNSite]:
    """The model's dense FFNs, in the order of its modules.

    Raises:
        PrunePathError: if there is none, naming the model's class and the supported ones, or if one is not what its
            adapter says.
    """
    sites = []
    for path, module in model.named_modules():
        adapter = next((_adapters[c.__name__] for c in type(module).__mro__ if c.__name__ in _adapters), None)
        if adapter is not None and path:
            parent_path, _, name = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            layout = adapter.layout(module)
            sites.append(FFNSite(parent, name, adapter.path(path), layout, *layout.sizes(module), adapter))
    if not sites:
        mixture = next((type(m).__name__ for m in model.modules() if _MIXTURE.search(type(m).__name__)), None)
        if mixture is not None:
            raise PrunePathError(
                f"Expected a model with dense FFNs, got {type(model).__name__}, whose FFNs are mixtures of experts "
                f"already ({mixture})."
            )
        raise PrunePathError(
            f"Expected a model with FFNs of one of the classes {', '.join(supported_classes())}, got "
            f"{type(model).__name__}, which has none."
        )
    return sites

"""What cannot be converted, said before anything is touched."""

from __future__ import annotations

import torch
from torch import nn

from prunepath.config import PrunePathConfig
from prunepath.errors import PrunePathError
from prunepath.families import FFNSite, find_ffns
from prunepath.nn import is_sparse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Packages whose modules or tensors hold quantised weights, and the method's usual name.
_QUANTIZERS = {
    "bitsandbytes": "bitsandbytes",
    "optimum.quanto": "quanto",
    "quanto": "quanto",
    "torchao": "torchao",
    "torch.ao": "torch.ao",
    "auto_gptq": "GPTQ",
    "gptqmodel": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "compressed_tensors": "compressed-tensors",
}


def check_convertible(model: nn.Module, config: PrunePathConfig) -> list[FFNSite]:
    """The FFNs of a dense model that `config` can make sparse.

    Raises:
        PrunePathError: for a model that is sparse or quantised, whose weights are not in memory, not finite or of a
            dtype that no kernel reads, that has adapters on its FFNs or no FFN that is known, or whose FFNs the experts
            do not divide or, having several neurons, cannot reorder.
    """
    if is_sparse(model):
        raise PrunePathError("Expected a dense model, got one that prunepath has converted already.")
    if method := quantization_of(model):
        raise PrunePathError(
            f"Expected a model with plain weights, got one quantised by {method}: load it unquantised."
        )
    sites = find_ffns(model)
    for site in sites:
        is_grouped = config.experts_of(site.intermediate_size) < site.intermediate_size
        for name in site.layout.projections:
            projection = site.parent._modules[site.name].get_submodule(name)
            where = _path(site, name)
            if hasattr(projection, "base_layer"):
                raise PrunePathError(
                    f"Expected FFNs without adapters, got a {type(projection).__name__} at {where}: call "
                    "merge_and_unload() on the model first."
                )
            for part in ("weight", "bias"):
                if is_grouped and getattr(projection, part, None) is not None and part not in projection._parameters:
                    raise PrunePathError(
                        f"Expected FFN weights whose neurons can be reordered, but {where}.{part} is computed by a "
                        "parametrization: remove it first (torch.nn.utils.parametrize.remove_parametrizations), or use "
                        "experts of one neuron."
                    )
            if projection.weight.dtype not in DTYPES:
                raise PrunePathError(
                    f"Expected FFN weights of float32, bfloat16 or float16, got {projection.weight.dtype} at {where}: "
                    "load the model in another dtype."
                )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise PrunePathError(
                f"Expected a model whose weights are all in memory, but {name} is not: it is offloaded or was never "
                "loaded; load it without offloading, or convert its checkpoint layer by layer (convert_streaming)."
            )
        if parameter.is_inference():
            raise PrunePathError(
                f"Expected weights made outside torch.inference_mode(), but {name} was made inside: load the model "
                "outside of it."
            )
    for site in sites:
        for name in site.layout.projections:
            projection = site.parent._modules[site.name].get_submodule(name)
            for part in ("weight", "bias"):
                check_finite(f"{_path(site, name)}.{part}", getattr(projection, part, None))
    return sites


def _path(site: FFNSite, projection: str) -> str:
    """Where a projection is in the dense model."""
    owner = site.path if site.adapter.split_by is None else site.path.removesuffix(".mlp")
    return f"{owner}.{projection}"


def check_finite(name: str, weight: torch.Tensor | None) -> None:
    """Raises PrunePathError if a weight of an FFN holds a NaN or an infinity, which would spread through training."""
    if weight is not None and not torch.stack(weight.detach().aminmax()).isfinite().all():
        raise PrunePathError(f"Expected FFN weights that are finite numbers, but {name} has NaN or infinite ones.")


def quantization_of(model: nn.Module) -> str | None:
    """The name of the method that quantised some of the model's weights; None if nothing is quantised."""
    declared = getattr(getattr(model, "config", None), "quantization_config", None)
    if declared is not None:
        entries = declared if isinstance(declared, dict) else declared.to_dict()
        method = str(getattr(entries.get("quant_method"), "value", entries.get("quant_method")))
        if method != "prunepath":  # a sparse checkpoint's configuration, with which a dense model was made
            return method
    for module in model.modules():
        for part in (module, *module._parameters.values(), *module._buffers.values()):
            for kind in (type(part), type(getattr(part, "data", None))):
                package = kind.__module__
                for prefix, method in _QUANTIZERS.items():
                    if package == prefix or package.startswith(f"{prefix}."):
                        return method
    return None

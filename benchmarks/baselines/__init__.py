"""Methods that the quality benchmark compares PrunePath with, and PrunePath itself."""

from baselines.base import Batch, Method, Settings
from baselines.d2dmoe import D2DMoEAbsolute, D2DMoERelative
from baselines.dense import Dense
from baselines.lte import LTE
from baselines.moefication import MoEfication
from baselines.oracle import OracleTopK, OracleTopMass, RandomExperts
from baselines.ours import PrunePath, TopKRouted
from baselines.static import StaticFLAP, StaticMean, StaticWanda

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Dense,
        StaticMean,
        StaticWanda,
        StaticFLAP,
        MoEfication,
        D2DMoERelative,
        D2DMoEAbsolute,
        LTE,
        TopKRouted,
        PrunePath,
        RandomExperts,
        OracleTopK,
        OracleTopMass,
    )
}
"""Every method by the name that tables call it."""

__all__ = ["METHODS", "Batch", "Method", "Settings"]

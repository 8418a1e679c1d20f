"""Methods that the quality benchmark compares PrunePath with, and PrunePath itself."""

from baselines.base import Batch, Method, Settings
from baselines.cats import CATS
from baselines.cmoe import CMoE
from baselines.copied import Copy2Bit, Copy3Bit, Copy4Bit
from baselines.d2dmoe import D2DMoEAbsolute, D2DMoERelative
from baselines.dense import Dense
from baselines.lte import LTE
from baselines.moefication import MoEfication
from baselines.oracle import OracleExperts, OracleTopK, OracleTopMass
from baselines.ours import PrunePath, PrunePathLinear, TopKRouted
from baselines.static import StaticFLAP, StaticMean, StaticWanda
from baselines.teal import TEAL

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
        CMoE,
        CATS,
        TEAL,
        TopKRouted,
        PrunePath,
        PrunePathLinear,
        Copy2Bit,
        Copy3Bit,
        Copy4Bit,
        OracleTopK,
        OracleTopMass,
        OracleExperts,
    )
}
"""Every method by the name that tables call it."""

__all__ = ["METHODS", "Batch", "Method", "Settings"]

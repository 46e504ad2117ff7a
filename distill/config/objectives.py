"""The objectives by name, a file to a family. A new one is its class and its line here."""

from distill.objectives.base import Objective
from distill.objectives.consistency.consistency import Consistency, ConsistencyTuning
from distill.objectives.consistency.consistency_training import ConsistencyTraining
from distill.objectives.consistency.scm import ContinuousConsistency
from distill.objectives.consistency.tcm import TruncatedConsistency
from distill.objectives.diffusion import Diffusion
from distill.objectives.distribution.anchored import AnchoredDMD2
from distill.objectives.distribution.dmd2 import DMD2
from distill.objectives.distribution.fdistill import FDistill
from distill.objectives.distribution.sid import SiD
from distill.objectives.finetune import FineTuning
from distill.objectives.trajectory.progressive import Progressive

OBJECTIVES: dict[str, type[Objective]] = {
    "consistency": Consistency,
    "ct": ConsistencyTraining,
    "diffusion": Diffusion,
    "dmd2": DMD2,
    "dmd2-anchored": AnchoredDMD2,
    "ect": ConsistencyTuning,
    "fdistill": FDistill,
    "finetune": FineTuning,
    "progressive": Progressive,
    "scm": ContinuousConsistency,
    "sid": SiD,
    "tcm": TruncatedConsistency,
}

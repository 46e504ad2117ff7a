"""The objectives, a file to a family. A new one is its class and its line here."""

from distill.objectives.anchored import AnchoredDMD2
from distill.objectives.base import Objective
from distill.objectives.consistency import Consistency, ConsistencyTuning
from distill.objectives.consistency_training import ConsistencyTraining
from distill.objectives.diffusion import Diffusion
from distill.objectives.dmd2 import DMD2
from distill.objectives.fdistill import FDistill
from distill.objectives.finetune import FineTuning
from distill.objectives.progressive import Progressive
from distill.objectives.sid import SiD

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
    "sid": SiD,
}

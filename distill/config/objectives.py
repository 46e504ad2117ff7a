"""The objectives by name, a file to a family. A new one is its class and its line here."""

from distill.objectives.adversarial.ddo import DDO
from distill.objectives.adversarial.discriminator import Discriminator
from distill.objectives.adversarial.flash import Flash
from distill.objectives.adversarial.ladd import ADD, GDD, LADD
from distill.objectives.adversarial.unifl import UniFL
from distill.objectives.adversarial.wavediff import WaveDiff
from distill.objectives.base import Objective
from distill.objectives.consistency.consistency import Consistency, ConsistencyTuning
from distill.objectives.consistency.consistency_training import ConsistencyTraining
from distill.objectives.consistency.scm import ContinuousConsistency
from distill.objectives.consistency.tcm import TruncatedConsistency
from distill.objectives.diffusion import Diffusion
from distill.objectives.distribution.anchored import AnchoredDMD2
from distill.objectives.distribution.diff_instruct import DiffInstruct
from distill.objectives.distribution.dmd import DMD
from distill.objectives.distribution.dmd2 import DMD2
from distill.objectives.distribution.emd import EMD
from distill.objectives.distribution.fdistill import FDistill
from distill.objectives.distribution.sid import SiD
from distill.objectives.distribution.sida import SiDA
from distill.objectives.distribution.sim import SIM
from distill.objectives.distribution.tdm import TDM
from distill.objectives.distribution.uni_instruct import UniInstruct
from distill.objectives.features.drift import Drift
from distill.objectives.features.fd_loss import FDLoss
from distill.objectives.features.mmd import MMD
from distill.objectives.finetune import FineTuning
from distill.objectives.flow_maps.anyflow import AnyFlow
from distill.objectives.flow_maps.cmt import CMT
from distill.objectives.flow_maps.ctm import CTM
from distill.objectives.flow_maps.imm import IMM
from distill.objectives.flow_maps.lagrangian import Lagrangian
from distill.objectives.flow_maps.meanflow import AYF, MeanFlow
from distill.objectives.flow_maps.shortcut import Shortcut
from distill.objectives.pairs.dsno import DSNO
from distill.objectives.pairs.kd import KD
from distill.objectives.pairs.reflow import Reflow
from distill.objectives.smaller.compress import Compression
from distill.objectives.smaller.decoder import LightDecoder
from distill.objectives.smaller.ecodiff import EcoDiff
from distill.objectives.smaller.gft import GuidanceFree
from distill.objectives.smaller.guide import Guide
from distill.objectives.smaller.ilf import InnerLoopFeedback
from distill.objectives.smaller.tinyfusion import TinyFusion
from distill.objectives.trajectory.draft import DRaFT
from distill.objectives.trajectory.guided import GuidedDistillation
from distill.objectives.trajectory.lcm import LCM
from distill.objectives.trajectory.pcm import PCM
from distill.objectives.trajectory.progressive import Progressive
from distill.objectives.trajectory.rg_lcd import RewardGuidedLCM
from distill.objectives.trajectory.snapfusion import SnapFusion
from distill.objectives.trajectory.tcd import TCD

OBJECTIVES: dict[str, type[Objective]] = {
    "add": ADD,
    "anyflow": AnyFlow,
    "ayf": AYF,
    "cmt": CMT,
    "consistency": Consistency,
    "ct": ConsistencyTraining,
    "ctm": CTM,
    "ddo": DDO,
    "diff-instruct": DiffInstruct,
    "diffusion": Diffusion,
    "compress": Compression,
    "decoder": LightDecoder,
    "discriminator": Discriminator,
    "dmd": DMD,
    "dmd2": DMD2,
    "dmd2-anchored": AnchoredDMD2,
    "draft": DRaFT,
    "drift": Drift,
    "dsno": DSNO,
    "ecodiff": EcoDiff,
    "ect": ConsistencyTuning,
    "emd": EMD,
    "fd-loss": FDLoss,
    "fdistill": FDistill,
    "finetune": FineTuning,
    "flash": Flash,
    "gdd": GDD,
    "gft": GuidanceFree,
    "guide": Guide,
    "guided": GuidedDistillation,
    "ilf": InnerLoopFeedback,
    "imm": IMM,
    "kd": KD,
    "ladd": LADD,
    "lagrangian": Lagrangian,
    "lcm": LCM,
    "meanflow": MeanFlow,
    "mmd": MMD,
    "pcm": PCM,
    "progressive": Progressive,
    "reflow": Reflow,
    "rg-lcd": RewardGuidedLCM,
    "scm": ContinuousConsistency,
    "shortcut": Shortcut,
    "sid": SiD,
    "sida": SiDA,
    "sim": SIM,
    "snapfusion": SnapFusion,
    "tcd": TCD,
    "tcm": TruncatedConsistency,
    "tdm": TDM,
    "tinyfusion": TinyFusion,
    "uni-instruct": UniInstruct,
    "unifl": UniFL,
    "wavediff": WaveDiff,
}

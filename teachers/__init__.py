"""Pretrained models, read as denoisers: processes, networks, solvers, and where they load from."""

from teachers.catalogue.loading import load
from teachers.denoiser import Cond, Denoiser, Guided, Network, Reparametrised
from teachers.errors import UserError
from teachers.process import Cosine, Karras, Linear, Process, Tabulated, Trig
from teachers.teacher import Codec, Pixels, Teacher

__all__ = [
    "Codec",
    "Cond",
    "Cosine",
    "Denoiser",
    "Guided",
    "Karras",
    "Linear",
    "Network",
    "Pixels",
    "Process",
    "Reparametrised",
    "Tabulated",
    "Teacher",
    "Trig",
    "UserError",
    "load",
]

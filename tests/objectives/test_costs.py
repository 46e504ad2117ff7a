"""What a step of each objective costs: forward and backward passes of each network, for a sample.

A pass that also carries a derivative counts as two. A backward pass is counted where a gradient
reaches the output of a forward pass; it costs about as much as two forward passes.
"""

import random

import pytest
import torch
from torch import nn

from distill.config.objective_schema import network_types
from distill.config.objectives import OBJECTIVES
from distill.objectives.base import Auxiliary, Batch
from distill.objectives.dmd2_options.alignment import Alignment
from distill.objectives.dmd2_options.random_chains import RandomChains
from distill.profiling import has_tangent
from students.critic import Critic
from students.generator import Generator
from teachers.denoiser import Denoiser, Guided
from teachers.process import Karras, Tabulated
from teachers.teacher import Pixels, Teacher

SIZE = 16


class Counted(Denoiser):
    """x̂ = w x_t, and it counts the samples of its passes; copies of it count with it."""

    def __init__(self, process, counts, name):
        super().__init__()
        self.process, self.counts, self.name = process, counts, name
        self.w = nn.Parameter(torch.tensor(0.5))
        self.last = nn.Linear(1, 1)  # where some objectives balance their gradients

    def __deepcopy__(self, memo):
        copy = Counted(self.process, self.counts, self.name)
        copy.load_state_dict(self.state_dict())
        return copy

    def forward(self, x_t, t, cond=None, s=None):
        self.count("forward", len(x_t) * (2 if has_tangent(x_t) else 1))
        x = self.w * self.last(x_t[..., None])[..., 0]
        if x.requires_grad:
            x.register_hook(lambda grad: self.count("backward", len(grad)))
        return x

    def count(self, kind, samples):
        key = f"{self.name} {kind}"
        self.counts[key] = self.counts.get(key, 0) + samples / SIZE

    def weight(self, t):
        return torch.ones_like(t)


class Judging(nn.Module):
    """A critic's place: a pass of the network whose features it reads."""

    def __init__(self, denoiser):
        super().__init__()
        self._denoiser = (denoiser,)
        self.head = nn.Parameter(torch.ones(()))

    def forward(self, x_t, t, cond=None):
        return self.head * self._denoiser[0](x_t, t, cond).flatten(1).mean(1)

    def denoise(self, x_t, t, cond=None):
        x = self._denoiser[0](x_t, t, cond)
        return x, x.mean(1).flatten(1)


def costs(name, step=0, guided=False, critic=False, student=None, **fields):
    """The passes of each network in one step, for each sample of its batches."""
    torch.manual_seed(0)
    random.seed(0)
    kind, counts = OBJECTIVES[name], {}
    tabulated = name in ("lcm", "pcm", "tcd", "rg-lcd")
    process = Tabulated.scaled_linear() if tabulated else Karras()
    teacher = Counted(process, counts, "teacher").requires_grad_(False)
    described = Teacher(teacher, Pixels(), (3, 8, 8))
    if guided:
        teacher = Guided(teacher, 2.0, {"class_labels": torch.tensor(0)})
    networks = {"teacher": teacher}
    networks["student"] = Generator(Counted(process, counts, "student"), **(student or {}))
    if name == "snapfusion":  # a run guides such a student as its teacher
        networks["student"].denoiser = Guided(
            networks["student"].denoiser, 2.0, {"class_labels": torch.tensor(0)}
        )
    for field in network_types(kind, Denoiser):
        if field not in networks:
            networks[field] = Counted(process, counts, field)
    for field, auxiliary in network_types(kind, Auxiliary).items():
        networks[field] = auxiliary.for_objective(described)
    if critic and "critic" in network_types(kind, Critic):
        networks["critic"] = Judging(networks.get("fake", teacher))
    objective = kind(**networks, **fields)
    if hasattr(objective, "reward"):
        objective.reward = lambda x, batch: x.flatten(1).mean(1)
    labels = {"class_labels": torch.zeros(SIZE, dtype=torch.long)} if guided else None
    if name == "gft":
        labels["guidance_scale"] = torch.full((SIZE,), 2.0)
    for turn in objective.turns(step):
        for key, network in networks.items():
            network.requires_grad_(key in turn.players)
        batch = Batch(torch.randn(SIZE, 3, 8, 8), torch.randn(SIZE, 3, 8, 8), labels)
        turn.loss(batch).value.backward()
    return {k: round(v, 3) for k, v in sorted(counts.items())}


TWO = {"times": (1.0, 0.5)}
FOUR = {"times": (1.0, 0.75, 0.5, 0.25), "grids": {4: (1.0, 0.75, 0.5, 0.25)}}
PAIR = {**TWO, "grids": {2: TWO["times"]}}
ODE = {**TWO, "renoise": False}
REST = 1  # steps of Flash Diffusion's solver: the place of its grid is drawn
HALVING = {"initial_steps": 2, "stage_steps": 5}
# By objective and case: what the step is made of, and the passes.
COSTS = {
    ("add", "the distillation's pass of the teacher"): ({"critic": True, "r1": 0}, {
        "student forward": 2, "student backward": 1,
        "teacher forward": 1 + 1 + 2, "teacher backward": 1}),
    ("anyflow", "three for half of the batch"): (
        {}, {"student forward": 2, "student backward": 1}),
    ("ayf", "the value with its derivative"): (
        {}, {"student forward": 2, "student backward": 1, "teacher forward": 1}),
    ("compress", "the student and the teacher once"): (
        {"features": 0}, {"student forward": 1, "student backward": 1, "teacher forward": 1}),
    ("compress", "and the guided teacher"): (
        {"features": 0, "guided": True},
        {"student forward": 1, "student backward": 1, "teacher forward": 2}),
    ("consistency", "Heun's two calls"): (
        {}, {"student forward": 2, "student backward": 1, "teacher forward": 2}),
    ("consistency", "one call of DDIM"): (
        {"solver": "ddim"}, {"student forward": 2, "student backward": 1, "teacher forward": 1}),
    ("ct", "both ends of an interval"): ({}, {"student forward": 2, "student backward": 1}),
    ("ct", "an averaged target"): (
        {"target_ema": 0.9}, {"student forward": 2, "student backward": 1}),
    ("cmt", "a solver's step, and its state"): (
        {}, {"student forward": 1, "student backward": 1, "teacher forward": 1}),
    ("ctm", "three steps of Heun"): (
        {"solver_steps": 1, "denoising_weight": 0},
        {"student forward": 4, "student backward": 2, "teacher forward": 2}),
    ("ddo", "two noise levels, and three steps of Heun"): (
        {"levels": 2, "solver_steps": 3},
        {"student forward": 4, "student backward": 4, "teacher forward": 5 + 4}),
    ("diff-instruct", "each network once in its turn"): ({}, {
        "student forward": 2, "student backward": 1, "teacher forward": 1,
        "fake forward": 2, "fake backward": 1}),
    ("diff-instruct", "guided on both sides"): ({"guided": True, "guide_fake": True}, {
        "student forward": 2, "student backward": 1, "teacher forward": 2,
        "fake forward": 3, "fake backward": 1}),
    ("diffusion", "one"): ({}, {"student forward": 1, "student backward": 1}),
    ("discriminator", "two noise levels of both, and three steps of Heun"): (
        {"critic": True, "levels": 2, "solver_steps": 3}, {"teacher forward": 5 + 2 * 2}),
    ("dmd", "DMD2 and the pairs"): ({}, {
        "student forward": 3, "student backward": 2, "teacher forward": 1,
        "fake forward": 2, "fake backward": 1}),
    ("dmd2", "guidance apart"): ({"guided": True, "guidance_times": "below"}, {
        "student forward": 2, "student backward": 1, "teacher forward": 3,
        "fake forward": 2, "fake backward": 1}),
    ("dmd2", "a first step of its own"): (
        {"first_step": 0.05, "first_step_path": (2, 4), "student": FOUR}, {
        "student forward": 6.5, "student backward": 1, "teacher forward": 0.75 + 0.25 * 2,
        "fake forward": 1 + 0.75, "fake backward": 1}),
    ("dmd2", "gradients through two of four steps"): ({"gradient_steps": 2, "student": FOUR}, {
        "student forward": 6.5, "student backward": 1.75, "teacher forward": 1,
        "fake forward": 2, "fake backward": 1}),
    ("dmd2", "each network once in its turn"): ({}, {
        "student forward": 2, "student backward": 1, "teacher forward": 1,
        "fake forward": 2, "fake backward": 1}),
    ("dmd2", "the critic reads fakes and data"): ({"critic": True}, {
        "student forward": 2, "student backward": 1, "teacher forward": 1,
        "fake forward": 5, "fake backward": 4}),
    ("dmd2", "a state beside the chain"): ({"guided": True, "alignment": Alignment()}, {
        "student forward": 3, "student backward": 2, "teacher forward": 3,
        "fake forward": 3, "fake backward": 1}),
    ("dmd2", "a chain of eight random steps"): (
        {"student": FOUR, "schedule": RandomChains(8, 8), "fake_sees": "places"}, {
        "student forward": 9, "student backward": 1, "teacher forward": 1,
        "fake forward": 2, "fake backward": 1}),
    ("dmd2-anchored", "as DMD2"): ({}, {
        "student forward": 2, "student backward": 1, "teacher forward": 1,
        "fake forward": 2, "fake backward": 1}),
    # Passes of the teacher that end at a block are counted; no gradient reaches an output of them.
    ("draft", "the whole chain"): (
        {"student": PAIR}, {"student forward": 2, "student backward": 2}),
    ("draft", "the last step"): (
        {"student": PAIR, "last_steps": 1}, {"student forward": 2, "student backward": 1}),
    ("draft", "the last step three times"): (
        {"student": PAIR, "last_steps": 1, "noises": 2},
        {"student forward": 4, "student backward": 3}),
    ("draft", "the guided teacher's chain"): ({"student": PAIR, "guided": True, "anchor": 1.0}, {
        "student forward": 2, "student backward": 2, "teacher forward": 4}),
    ("drift", "features of samples and data"): (
        {"blocks": ("last",)}, {"student forward": 1, "student backward": 1, "teacher forward": 2}),
    ("ect", "both ends of a pair"): ({}, {"student forward": 2, "student backward": 1}),
    ("ect", "references are no passes"): (
        {"references": True}, {"student forward": 2, "student backward": 1}),
    ("emd", "four steps of z and ε, and the pair that cancels their noise"): ({}, {
        "student forward": 4 + 2 + 1, "student backward": 4 + 2, "teacher forward": 4,
        "fake forward": 4 + 1, "fake backward": 1}),
    ("emd", "the latent stays"): ({"inner_steps": 3, "latent_step": 0.0}, {
        "student forward": 2, "student backward": 1, "teacher forward": 3,
        "fake forward": 3 + 1, "fake backward": 1}),
    ("fd-loss", "features of samples and data"): (
        {"blocks": ("last",)}, {"student forward": 1, "student backward": 1, "teacher forward": 2}),
    ("fdistill", "DMD2 and the ratio"): ({"critic": True}, {
        "student forward": 2, "student backward": 1, "teacher forward": 1,
        "fake forward": 6, "fake backward": 4}),
    ("finetune", "one"): ({}, {"student forward": 1, "student backward": 1}),
    ("finetune", "the anchor"): ({"anchor": 0.5}, {
        "student forward": 2, "student backward": 2, "teacher forward": 1}),
    ("flash", "the teacher's rest of the grid, and the critic's head start"): (
        {"critic": True, "levels": 4, "mode_std": 1e-3}, {
        "student forward": 2, "student backward": 1, "teacher forward": REST + 2}),
    ("flash", "no game in any stage"): ({
        "critic": True, "levels": 4, "mode_std": 1e-3, "gan_weights": (0.0,) * 4}, {
        "student forward": 1, "student backward": 1, "teacher forward": REST}),
    ("flash", "with matching"): (
        {"critic": True, "levels": 4, "mode_std": 1e-3, "stage_steps": 1, "step": 1}, {
        "student forward": 3, "student backward": 1,
        "teacher forward": REST + 1 + 1 + 2, "teacher backward": 1}),
    ("gdd", "an exact penalty on data"): ({"critic": True}, {
        "student forward": 2, "student backward": 1,
        "teacher forward": 3, "teacher backward": 1 + 2}),
    ("guided", "the first stage"): (
        {"guided": True, "student": ODE, **HALVING},
        {"student forward": 1, "student backward": 1, "teacher forward": 2}),
    ("guided", "later stages have an unguided teacher"): (
        {"guided": True, "student": ODE, "first_steps": 1, "step": 1, **HALVING},
        {"student forward": 3, "student backward": 1}),  # its teacher is a copy of the student
    ("gft", "with the condition, and without"): (
        {"guided": True}, {"student forward": 2, "student backward": 1}),
    ("imm", "from t and from r"): ({}, {"student forward": 2, "student backward": 1}),
    ("kd", "one"): ({}, {"student forward": 1, "student backward": 1}),
    ("ladd", "the critic reads fakes and data"): ({"critic": True}, {
        "student forward": 2, "student backward": 1,
        "teacher forward": 3, "teacher backward": 1}),
    ("wavediff", "the critic reads pairs of fakes and of data"): (
        {"critic": True, "student": {"times": (1.0,)}, "step": 1}, {
        "student forward": 2, "student backward": 1,
        "teacher forward": 3, "teacher backward": 1}),
    ("ladd", "the relativistic student also reads data"): (
        {"critic": True, "game": "relativistic"}, {
        "student forward": 2, "student backward": 1,
        "teacher forward": 4, "teacher backward": 1}),
    ("ladd", "an approximate penalty is a pass more"): (
        {"critic": True, "r1": 1.0, "penalty": "approximate"}, {
        "student forward": 2, "student backward": 1,
        "teacher forward": 4, "teacher backward": 1}),
    ("lagrangian", "the value with its derivative, and the teacher at the landing"): (
        {"student": ODE}, {"student forward": 2.5, "student backward": 1, "teacher forward": 1}),
    ("lcm", "one call of an unguided teacher"): (
        {}, {"student forward": 2, "student backward": 1, "teacher forward": 1}),
    ("lcm", "a guided teacher"): (
        {"guided": True}, {"student forward": 2, "student backward": 1, "teacher forward": 2}),
    ("lcm", "one's own images"): (
        {"path": "data"}, {"student forward": 2, "student backward": 1}),
    ("meanflow", "the derivative of a quarter of the batch"): (
        {}, {"student forward": 1.25, "student backward": 1, "teacher forward": 1}),
    ("meanflow", "of all of it, along the student's own velocity"): (
        {"equal": 0.0, "direction": "own", "velocity": "data"},
        {"student forward": 3, "student backward": 1}),
    ("mmd", "features of samples and data"): (
        {"blocks": ("last",)}, {"student forward": 1, "student backward": 1, "teacher forward": 2}),
    ("mmd", "the whole chain"): (
        {"blocks": ("last",), "student": {**TWO, "grids": {2: TWO["times"]}}, "gradient": "chain"},
        {"student forward": 2, "student backward": 2, "teacher forward": 2}),
    ("pcm", "as LCM"): ({}, {"student forward": 2, "student backward": 1, "teacher forward": 1}),
    ("pcm", "the critic reads landings and targets"): ({"critic": True}, {
        "student forward": 4, "student backward": 1,
        "teacher forward": 2 + 3, "teacher backward": 1}),
    ("progressive", "two steps of the teacher"): (
        {}, {"student forward": 1, "student backward": 1, "teacher forward": 2}),
    ("reflow", "one"): ({}, {"student forward": 1, "student backward": 1}),
    ("rg-lcd", "LCM's, and two that the proxy compares"): (
        {}, {"student forward": 4, "student backward": 1, "teacher forward": 1}),
    ("shortcut", "two halves for an eighth of the batch"): (
        {}, {"student forward": 1.25, "student backward": 1, "teacher forward": 0.875}),
    ("scm", "distillation: 1 + 2 forward and 1 backward, five units"): (
        {}, {"student forward": 2, "student backward": 1, "teacher forward": 1}),
    ("scm", "training: four units"): (
        {"path": "data"}, {"student forward": 2, "student backward": 1}),
    ("scm", "a difference in place of the derivative"): (
        {"derivative": "difference"},
        {"student forward": 2, "student backward": 1, "teacher forward": 1}),
    ("sid", "through teacher and fake"): ({}, {
        "student forward": 2, "student backward": 1, "teacher forward": 1, "teacher backward": 1,
        "fake forward": 2, "fake backward": 2}),
    ("sid", "guided on both sides"): ({"guided": True, "guide_fake": True}, {
        "student forward": 2, "student backward": 1, "teacher forward": 2, "teacher backward": 2,
        "fake forward": 4, "fake backward": 4}),
    ("sida", "the fake also reads data"): ({"critic": True}, {
        "student forward": 2, "student backward": 1, "teacher forward": 1, "teacher backward": 1,
        "fake forward": 3, "fake backward": 3}),
    ("sida", "as SiD without the critic"): ({"critic": True, "gan_weight": 0}, {
        "student forward": 2, "student backward": 1, "teacher forward": 1, "teacher backward": 1,
        "fake forward": 2, "fake backward": 2}),
    ("sim", "as SiD"): ({}, {
        "student forward": 2, "student backward": 1, "teacher forward": 1, "teacher backward": 1,
        "fake forward": 2, "fake backward": 2}),
    ("tdm", "each network once in its turn"): ({}, {
        "student forward": 2, "student backward": 1, "teacher forward": 1,
        "fake forward": 2, "fake backward": 1}),
    ("tdm", "four steps, two and a half of them walked"): (
        {"student": {**FOUR, "renoise": False}}, {
        "student forward": 5, "student backward": 1, "teacher forward": 1,
        "fake forward": 2, "fake backward": 1}),
    ("unifl", "one step, of noised data"): (
        {"student": PAIR, "first_stage": 1}, {"student forward": 1, "student backward": 1}),
    ("unifl", "the first step, once more for the critic"): (
        {"student": PAIR}, {"student forward": 2, "student backward": 1}),
    ("uni-instruct", "as SiDA"): ({"critic": True}, {
        "student forward": 2, "student backward": 1, "teacher forward": 1, "teacher backward": 1,
        "fake forward": 3, "fake backward": 3}),
    ("snapfusion", "both are guided"): (
        {"guided": True, "student": ODE, **HALVING},
        {"student forward": 2, "student backward": 2, "teacher forward": 4}),
    ("tcd", "as LCM"): ({}, {"student forward": 2, "student backward": 1, "teacher forward": 1}),
    ("tcm", "the first stage is ECT"): (
        {"first_steps": 5}, {"student forward": 2, "student backward": 1}),
    ("tcm", "above the boundary, targets of both stages"): (
        {"first_steps": 1, "step": 1}, {"student forward": 2.75, "student backward": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), COSTS)
def test_a_step_costs_no_more_than_it_must(name, case):
    settings, expected = COSTS[name, case]
    assert costs(name, **settings) == expected


def test_every_objective_has_its_cost():
    # no network of the teacher's kind learns: objectives/test_{decoder,tinyfusion,ecodiff,ilf}.py,
    # test_guide.py; or it has several outputs: students/test_dsno.py
    others = {"decoder", "tinyfusion", "ecodiff", "ilf", "guide", "dsno"}
    assert {name for name, _ in COSTS} == set(OBJECTIVES) - others

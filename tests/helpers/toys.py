"""Problems small enough for a CPU and exact enough to check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teachers.denoiser import Cond, Denoiser
from teachers.process import Karras, Process, expand

KINDS = ("edm", "cm", "eps", "v", "sample", "unconditional")

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


REWARD = Path(__file__).parent / "rewards" / "bright.py"


def save_pipeline(kind: str, path: Path) -> Path:
    """A random pipeline of one kind: EDM, consistency, or DDPM with one of its predictions."""
    import diffusers as d

    torch.manual_seed(KINDS.index(kind))
    classes = None if kind == "unconditional" else 11 if kind == "edm" else 10
    unet = d.UNet2DModel(**SMALL, num_class_embeds=classes)
    predicts: dict[str, Any] = {"eps": "epsilon", "v": "v_prediction", "sample": "sample"}
    if kind == "edm":
        scheduler: Any = d.EDMEulerScheduler()
    elif kind == "cm":
        scheduler = d.CMStochasticIterativeScheduler()
    else:
        scheduler = d.DDIMScheduler(prediction_type=predicts.get(kind, "epsilon"))
    if kind == "unconditional":
        d.DDIMPipeline(unet=unet, scheduler=scheduler).save_pretrained(path)
    else:
        d.ConsistencyModelPipeline(unet=unet, scheduler=scheduler).save_pretrained(path)
    return path


class Affine(Denoiser):
    """A student whose one step from σ_max maps unit noise z to m + R z; x is (B, D)."""

    def __init__(self, m: Tensor, r: Tensor, process: Process | None = None) -> None:
        super().__init__()
        self.process = process or Karras()
        self.m, self.r = nn.Parameter(m.clone()), nn.Parameter(r.clone())

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        z = x_t / self.process.at(t, x_t)[1]
        return self.m + z @ self.r.T


class Fitted(Denoiser):
    """A fake score at its optimum: the exact denoiser of N(m, R Rᵀ) for a student's m and R."""

    def __init__(self, student: Affine) -> None:
        super().__init__()
        self.process, self._student = student.process, (student,)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        student = self._student[0]
        m, cov = student.m.detach(), (student.r @ student.r.T).detach()
        sigma = self.process.at(t[:1], x_t[:1])[1]  # one level for all: what these tests use
        gain = torch.linalg.solve(cov + sigma**2 * torch.eye(len(m), dtype=m.dtype), cov)
        return m + (x_t - m) @ gain


class Slopes(Denoiser):
    """x̂ = k(t) x_t, with k known at a few times only: a student that can be exact there."""

    def __init__(self, times: Tensor, slopes: Tensor, process: Process) -> None:
        super().__init__()
        self.process, self.times = process, times
        self.slopes = nn.Parameter(slopes)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        index = (self.times[None] - t[:, None].double()).abs().argmin(1)
        return expand(self.slopes[index], x_t) * x_t


def recipe_tree(name: str, teacher: Path | str, **train: Any) -> dict[str, Any]:
    """A small recipe for one of the five families on a small teacher."""
    objective: dict[str, Any] = {"name": name}
    tree: dict[str, Any] = {
        "teacher": {"source": str(teacher), "null_label": 10},
        "objective": objective,
        "data": {"source": "digits"},
        "train": {"steps": 4, "batch": 8, "accumulate": 2, "log_every": 2, "save_every": 2,
                  "sample_every": 0, **train},
    }  # fmt: skip
    if name in ("dmd2", "fdistill"):
        objective["student_every"] = 2
        tree["critic"] = {}
        tree["student"] = {"steps": 2, "counts": [1, 2]}
    if name in ("sida", "uni-instruct", "add", "discriminator", "flash", "gdd", "ladd"):
        tree["critic"] = {}
    if name in ("kd", "reflow", "dmd"):
        tree["student"] = {"renoise": False}
        tree["data"] = {"source": "pairs", "path": f"{teacher}-pairs", "count": 16, "steps": 2}
    if name == "wavediff":
        tree["critic"], tree["student"] = {}, {"steps": 2, "renoise": "posterior"}
    if name == "dsno":
        tree["student"] = {"renoise": False, "architecture": {"network": "dsno"}}
        tree["data"] = {"source": "pairs", "path": f"{teacher}-states", "count": 16, "steps": 2,
                        "states": 4}  # fmt: skip
    if name == "discriminator":
        objective["solver_steps"] = 2
    if name == "ddo":
        objective["solver_steps"] = 2
        tree["student"] = {"steps": 2, "renoise": False}
    if name == "cmt":
        objective["points"] = 2
    if name == "ctm":
        objective["solver_steps"] = 3
    if name == "progressive":
        objective |= {"initial_steps": 4, "stage_steps": 2}
    if name == "flash":
        objective |= {"levels": 4, "stage_steps": 1}
    if name == "gft":
        tree["teacher"]["guidance"] = {"scale": [1.0, 3.0]}
    if name in ("draft", "unifl"):
        tree["student"] = {"steps": 2}
    if name in ("draft", "rg-lcd"):
        tree["rewards"] = {"bright": {"function": f"{REWARD}:brightness"}}
    if name == "guided":
        objective |= {"first_steps": 1, "initial_steps": 4, "stage_steps": 2}
    if name == "fdistill":
        objective["divergence"] = "forward-kl"
    return tree


FIVE = ("dmd2", "sid", "fdistill", "consistency", "progressive")

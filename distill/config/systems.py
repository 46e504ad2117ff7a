"""The published systems of students that are not their teacher's copy, by the name of each."""

from __future__ import annotations

from typing import NamedTuple


class System(NamedTuple):
    """A system: what it does in one sentence, its paper, a recipe, and the file that says how.

    arxiv: The paper's number at arXiv.
    recipe: The name of a recipe that runs as it is; of `command`.
    file: Its path, beginning at the repository's root.
    command: The command of the recipe.
    """

    does: str
    arxiv: str
    recipe: str
    file: str
    command: str = "run"


SMALLER = "distill/objectives/smaller/"
SYSTEMS: dict[str, System] = {
    "a-sdm": System(
        "Convolutions of several experts, mixed for each sample.",
        "2406.00210", "shapes/a-sdm", "teachers/reduced/experts.py",
    ),
    "bk-sdm": System(
        "A UNet of fewer layers learns its teacher's output and features.",
        "2305.15798", "sd15/bk-sdm", f"{SMALLER}compress.py",
    ),
    "decoder": System(
        "A light decoder of a student's latents.",
        "2306.00980", "shapes/decoder", f"{SMALLER}decoder.py", "teach",
    ),
    "delta-conv": System(
        "Convolutions at several resolutions in place of self-attentions.",
        "2504.21292", "shapes/delta-conv", "teachers/reduced/pyramid.py",
    ),
    "dsno": System(
        "A whole trajectory in one pass, by Fourier layers over time.",
        "2211.13449", "digits/dsno", "students/architecture/dsno.py",
    ),
    "ecodiff": System(
        "Gates learn which heads and neurons a few-step student can do without.",
        "2412.02852", "shapes/ecodiff", f"{SMALLER}ecodiff.py", "teach",
    ),
    "get": System(
        "A transformer that is iterated to an equilibrium learns from pairs.",
        "2401.08639", "digits/get", "students/architecture/get.py",
    ),
    "gft": System(
        "One network becomes its own guided model, in one evaluation a step.",
        "2501.15420", "shapes/gft", f"{SMALLER}gft.py",
    ),
    "guide": System(
        "A ControlNet beside a frozen model takes the place of guidance.",
        "2406.01954", "shapes/guide", f"{SMALLER}guide.py", "teach",
    ),
    "ilf": System(
        "A small block carries a UNet's inner levels on to the next steps.",
        "2501.13107", "shapes/ilf", f"{SMALLER}ilf.py", "teach",
    ),
    "koala": System(
        "A smaller UNet is taught by its teacher's self-attentions.",
        "2312.04005", "shapes/koala", f"{SMALLER}compress.py",
    ),
    "laptop": System(
        "The cheapest layers go, by a knapsack; features count over their size.",
        "2404.11098", "shapes/laptop", "students/architecture/score.py",
    ),
    "mixdq": System(
        "Weights of few bits, chosen by layer; also trained through them.",
        "2405.17873", "shapes/mixdq", "students/quantisation/choice.py",
    ),
    "msd": System(
        "Several small students, each of a part of the conditions, behind a router.",
        "2410.23274", "digits/msd", "students/routing/folder.py",
    ),
    "rgm": System(
        "WaveDiff's game with a fidelity to what was measured.",
        "2303.05456", "digits/rgm", "distill/objectives/adversarial/wavediff.py",
    ),
    "slimflow": System(
        "Annealed reflow to a small network that shares no weights.",
        "2407.12718", "digits/slimflow", "distill/objectives/pairs/reflow.py",
    ),
    "snapfusion-unet": System(
        "Layers go or run twice by what they are worth for their time.",
        "2306.00980", "shapes/snapfusion-unet", "students/architecture/score.py",
    ),
    "tinyfusion": System(
        "Which layers go is learned, by gates with an adapter beside them.",
        "2412.01199", "shapes/tinyfusion", f"{SMALLER}tinyfusion.py", "teach",
    ),
    "tiue": System(
        "A UNet's encoder runs once, and its decoder at all steps at once.",
        "2505.21960", "shapes/tiue", "students/architecture/one_pass.py",
    ),
    "unifl": System(
        "Perceptual, decoupled and adversarial feedback on pictures.",
        "2404.05595", "shapes/unifl", "distill/objectives/adversarial/unifl.py",
    ),
    "wavediff": System(
        "A critic of pairs of states judges large steps, on Haar coefficients.",
        "2211.16152", "digits/wavediff", "distill/objectives/adversarial/wavediff.py",
    ),
}  # fmt: skip

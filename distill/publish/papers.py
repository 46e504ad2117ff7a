"""The papers of the objectives, as cards cite them."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """A method's paper: `arxiv` is its identifier."""

    title: str
    authors: str  # BibTeX's form
    year: int
    arxiv: str

    def bibtex(self, key: str) -> str:
        return (
            f"@misc{{{key},\n  title = {{{self.title}}},\n  author = {{{self.authors}}},\n"
            f"  year = {{{self.year}}},\n  eprint = {{{self.arxiv}}},\n"
            "  archivePrefix = {arXiv}\n}"
        )


# By the objective's name in a recipe.
PAPERS = {
    "consistency": Paper(
        "Consistency Models",
        "Song, Yang and Dhariwal, Prafulla and Chen, Mark and Sutskever, Ilya",
        2023,
        "2303.01469",
    ),
    "ct": Paper(
        "Improved Techniques for Training Consistency Models",
        "Song, Yang and Dhariwal, Prafulla",
        2023,
        "2310.14189",
    ),
    "diffusion": Paper(
        "Elucidating the Design Space of Diffusion-Based Generative Models",
        "Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli",
        2022,
        "2206.00364",
    ),
    "dmd2": Paper(
        "Improved Distribution Matching Distillation for Fast Image Synthesis",
        'Yin, Tianwei and Gharbi, Micha{\\"e}l and Park, Taesung and Zhang, Richard and '
        "Shechtman, Eli and Durand, Fr{\\'e}do and Freeman, William T.",
        2024,
        "2405.14867",
    ),
    "dmd2-anchored": Paper(
        "Improved Distribution Matching Distillation for Fast Image Synthesis",
        'Yin, Tianwei and Gharbi, Micha{\\"e}l and Park, Taesung and Zhang, Richard and '
        "Shechtman, Eli and Durand, Fr{\\'e}do and Freeman, William T.",
        2024,
        "2405.14867",
    ),
    "ect": Paper(
        "Consistency Models Made Easy",
        "Geng, Zhengyang and Pokle, Ashwini and Luo, William and Lin, Justin and Kolter, J. Zico",
        2024,
        "2406.14548",
    ),
    "fdistill": Paper(
        "One-step Diffusion Models with f-Divergence Distribution Matching",
        "Xu, Yilun and Nie, Weili and Vahdat, Arash",
        2025,
        "2502.15681",
    ),
    "finetune": Paper(
        "Denoising Diffusion Probabilistic Models",
        "Ho, Jonathan and Jain, Ajay and Abbeel, Pieter",
        2020,
        "2006.11239",
    ),
    "progressive": Paper(
        "Progressive Distillation for Fast Sampling of Diffusion Models",
        "Salimans, Tim and Ho, Jonathan",
        2022,
        "2202.00512",
    ),
    "scm": Paper(
        "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
        "Lu, Cheng and Song, Yang",
        2024,
        "2410.11081",
    ),
    "sid": Paper(
        "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion "
        "Models for One-Step Generation",
        "Zhou, Mingyuan and Zheng, Huangjie and Wang, Zhendong and Yin, Mingzhang and Huang, Hai",
        2024,
        "2404.04057",
    ),
    "tcm": Paper(
        "Truncated Consistency Models",
        "Lee, Sangyun and Xu, Yilun and Geffner, Tomas and Fanti, Giulia and Kreis, Karsten and "
        "Vahdat, Arash and Nie, Weili",
        2024,
        "2410.14895",
    ),
}

"""The catalogue of figures: it has each that is given, and every table takes its names from it."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from distill import console
from distill.benchmark import leaderboard, state
from distill.cli import catalogue as listed
from distill.publish import card, results_table
from distill.report import page
from distill.sampling.teacher_sampler import Sampler
from eval import catalogue, shapes
from eval.catalogue import CATALOGUE
from eval.metrics.perceptual import Agreement, Diversity
from eval.protocols import spec
from eval.samples import Samples

ROOT = Path(__file__).parents[2]
CLIP = "clip_score[some-model, 'A photo depicts', 256]"
MAIN = [CLIP if k == "clip_score" else k for k, v in CATALOGUE.items() if v.role == "main"]
N = 40


def features(images):
    return images[:, :, :2, :2].flatten(1).float()


def pictures(seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (N, 3, 8, 8), generator=rng, dtype=torch.uint8)


@pytest.fixture
def stubs():
    """The networks that score images, without weights."""
    return SimpleNamespace(
        name="m", scale=1.0, mean=lambda *_: 0.5, values=lambda *_: torch.ones(1)
    )


def distance(a, b):
    return torch.ones(len(a))


def distances():
    """Names that the shipped protocols give to Fréchet distances."""
    written = [spec.spec(spec.FOLDER / f"{name}.yaml").metrics for name in spec.names()]
    return {k for v in written for k, options in v.items() if options.get("kind") == "frechet"}


def given(stubs):
    """The keys that each kind of metric gives, by kind."""
    real, few = pictures(0), {"start": 20, "points": 3}
    kinds, captions = spec.KINDS, shapes.all_captions()[:4]
    samples = Samples(pictures(1), ["a", "b"] * (N // 2))
    scenes = Samples(shapes.draw(captions, 0), captions)
    digits = Samples(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ["0", "1"])
    clip = kinds["clip_score"]("m", "r")
    clip.encoders = stubs
    made = {
        "caption_accuracy": [(kinds["caption_accuracy"](), scenes)],
        "caption_variety": [(kinds["caption_variety"](2), samples)],
        "clip_score": [(clip, samples)],
        "cmmd": [(kinds["cmmd"](features, real), samples)],
        "frechet": [(kinds["frechet"](features, real, name=k), samples) for k in distances()],
        "frechet_infinity": [
            (kinds["frechet_infinity"](features, real, **few, **name), samples)
            for name in ({}, {"name": "fid_infinity"})
        ],
        "hps": [(kinds["hps"](stubs), samples)],
        "image_reward": [(kinds["image_reward"](stubs), samples)],
        "inception_score": [(kinds["inception_score"](features, splits=2), samples)],
        "inception_score_infinity": [(kinds["inception_score_infinity"](features, **few), samples)],
        "kid": [(kinds["kid"](features, real, subsets=2, subset_size=9), samples)],
        "label_accuracy": [(kinds["label_accuracy"](), digits)],
        "label_variety": [(kinds["label_variety"](), samples)],
        "lpips_diversity": [(Diversity(distance, 8), samples)],
        "pick_score": [(kinds["pick_score"](stubs), samples)],
        "prdc": [(kinds["prdc"](features, real), samples)],
        "vendi": [(kinds["vendi"](features), samples)],
    }
    assert made.keys() == kinds.keys()
    made["agreement"] = [(Agreement(lambda _: real, distance), samples)]
    return {k: {name for m, s in v for name in m(s)} for k, v in made.items()}


def test_the_catalogue_has_the_figures_of_all_metrics_and_samplers_and_no_others(stubs):
    found = {key for keys in given(stubs).values() for key in keys}
    cached = SimpleNamespace(deep_cache=object(), shallow_share=0.5, search_evaluations=3)
    found |= Sampler.costs(cached, 10, 4, 2).keys()  # pyright: ignore[reportArgumentType]
    found |= spec_row().keys() & {"images_per_s"}
    assert {catalogue.name_of(k) for k in found} == CATALOGUE.keys()


def spec_row():
    from eval.protocols.measure import protocol

    return protocol("digits").average([{"fd": 1.0, "images_per_s": 2.0}])


def test_names_are_different_and_papers_are_arxivs():
    for name in (catalogue.label, catalogue.short, catalogue.narrow):
        named = [name(k) for k in MAIN]
        assert len(set(named)) == len(named)
    for info in CATALOGUE.values():
        assert not info.paper or info.paper.replace(".", "").isdecimal()
        assert len(info.summary) < 82


def test_a_key_with_settings_has_the_facts_of_its_name():
    assert catalogue.label(CLIP) == "CLIP score [some-model, 'A photo depicts', 256]"
    assert catalogue.short(CLIP) == "CLIP"
    assert catalogue.columns(["recall", CLIP, "fd_bias", "steps", "fid"]) == ["fid", "recall", CLIP]


def test_the_headline_is_the_first_distance():
    assert catalogue.headline({"recall": 1, "cmmd": 1, "fid": 2}) == "fid"
    assert catalogue.headline({"recall": 1, "fd_dinov2": 1, "cmmd": 2}) == "fd_dinov2"
    assert catalogue.headline({"recall": 1}) is None


# those who show figures


def row(key, value=0.5, **others):
    figures = {key: value, **others, "images_per_s": 9.0}
    return {**figures, "spread": {key: 0.25}, "protocol": "p", "n": 2, "seeds": 2}


def facts(metrics):
    sidecar = {"steps": [1], "teacher": "shapes", "recipe": {}}
    summary = {"metrics": metrics, "steps": 1, "wall_s": 1.0}
    return card.Facts(index={}, sidecar=sidecar, summary=summary)


@pytest.mark.parametrize("key", MAIN)
def test_the_card_and_the_report_show_a_main_figure_under_its_label(key):
    found, name = facts({"student": {"1": row(key)}}), catalogue.label(key)
    heads, values = card.quality(found).splitlines()[-3::2]
    assert heads == f"|  | evaluations | {name} |"
    assert values == "| student, 1 step | 1 | 0.500 ± 0.250 |"
    table = page.table(found.summary)
    assert table["heads"] == ["evaluations", name, "images/s"]
    assert table["rows"][0][2][1] == ("0.500", "0.250")
    front = " ".join(card.metadata(found, card.Licence()).split())
    assert catalogue.CATALOGUE[catalogue.name_of(key)].label in front
    assert page.verdict(found.summary).startswith(f"In 1 step the student's {name} is 0.500 ± 0.25")


@pytest.mark.parametrize("key", MAIN)
def test_leaderboards_and_the_terminal_show_a_main_figure_under_its_short_names(key):
    metrics = {key: {"mean": 0.5, "spread": 0.25}}
    line = leaderboard.LeaderboardRow("r", "student", "o", 1, [0, 1], metrics)
    head, _, cells = leaderboard.table([line]).splitlines()
    assert head == f"|  | steps | {catalogue.short(key)} |"
    assert cells == "| r | 1 | 0.500 ± 0.250 |"
    columns = console.columns_of({"r": row(key)}, None)
    assert columns == {catalogue.narrow(key): ["0.500 ±0.250"], "img/s": ["9"]}


@pytest.mark.parametrize("key", MAIN)
def test_the_best_step_count_is_by_the_direction_of_the_figure(key):
    metrics = {"student": {"1": row(key, 0.25), "4": row(key, 0.75)}}
    lower = CATALOGUE[catalogue.name_of(key)].better == "lower"
    assert results_table.best(metrics) == ("1" if lower else "4")
    assert state.measured(row(key)) == lower  # a benchmark is ordered by a distance


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_terminal_shows_every_figure_at_every_width(width, monkeypatch):
    monkeypatch.setattr(console, "out", Console(file=(page := io.StringIO()), width=width))
    rows = {"teacher, 18 heun steps": dict.fromkeys(MAIN, 0.5) | {"images_per_s": 8.0}}
    console.out.print(console.results_table("title", rows, "teacher, 18 heun steps"))
    said = page.getvalue()
    assert said.count("0.500") == len(MAIN)
    assert all(said.count(catalogue.narrow(k)) for k in MAIN) and said.count("1.0×") == 1
    assert max(map(len, said.splitlines())) <= width


def test_the_list_and_the_page_of_figures_have_every_figure():
    assert listed.metrics().keys() == CATALOGUE.keys()
    text = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    assert all(f"| `{k}` |" in text and f" {v.summary} |" in text for k, v in CATALOGUE.items())

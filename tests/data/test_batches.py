"""Batches: epochs, shards, conditions beside their data, class folders."""

import itertools

import pytest
import torch

from distill.config.recipe import Recipe
from distill.config.schema import CouplingSection
from distill.data import from_recipe
from distill.data.stream import Source, Stream
from distill.sampling import guided_teacher
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree


def source(n=10):
    x = torch.arange(n).float()[:, None]
    return Source((1,), x, {"class_labels": torch.arange(n)}, seed=0, size=n)


def test_every_epoch_visits_every_item_once():
    batches = [source().batch(d, 0, 1, 5) for d in range(4)]
    for epoch in (batches[:2], batches[2:]):
        assert sorted(torch.cat([b.x for b in epoch]).flatten().tolist()) == list(range(10))


def test_conditions_stay_with_their_data():
    batch = source().batch(3, 1, 2, 4)
    assert batch.x.flatten().tolist() == batch.cond["class_labels"].tolist()


def test_any_batch_can_be_made_without_those_before_it():
    s = source()
    assert torch.equal(s.batch(7, 1, 2, 3).noise, source().batch(7, 1, 2, 3).noise)
    assert not torch.equal(s.batch(7, 1, 2, 3).noise, s.batch(7, 0, 2, 3).noise)


def test_a_stream_gives_this_process_its_own_shards_in_order():
    s = source()
    mine = Stream(s, torch.device("cpu"), 5, range(1, 2), 2, 3)
    for draw in (5, 6, 7):
        assert torch.equal(next(mine).noise, s.batch(draw, 1, 2, 3).noise)
    mine.close()


def image(path, level):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path)


def folder_source(pipelines, kind, folder):
    tree = recipe_tree("consistency", pipelines[kind])
    tree["data"]["source"] = str(folder)
    if kind == "unconditional":
        del tree["teacher"]["null_label"]
    recipe = Recipe.check(tree)
    return from_recipe.source_of(recipe, guided_teacher.load_teacher(recipe.teacher))


@pytest.mark.parametrize(
    ("names", "ordered", "labels"),
    [
        (["3", "9", "07"], ["3", "07", "9"], [3, 7, 9]),
        (["10", "2", "cat"], ["10", "2", "cat"], [0, 1, 2]),
        (["cat", "Dog", "ant"], ["Dog", "ant", "cat"], [0, 1, 2]),
    ],
)
def test_class_folders_are_labels_by_their_numbers_or_else_by_the_order_of_their_names(
    pipelines, tmp_path, capsys, names, ordered, labels
):
    for i, name in enumerate(names):
        image(tmp_path / name / "a.png", 10 * i)
    found = folder_source(pipelines, "edm", tmp_path)
    levels = ((found.x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert levels == [10 * names.index(n) for n in ordered]
    assert found.cond["class_labels"].tolist() == labels
    assert found.report["labels"] == dict(zip(ordered, labels))
    said = capsys.readouterr().err.splitlines()
    have = ", ".join(map(str, labels))
    assert said[-1].endswith(f"of the teacher's 10 classes, 3 have data: {have}")
    by_name = ", ".join(f"{k} is {n!r}" for k, n in zip(labels, ordered))
    assert len(said) == (1 if labels[0] else 2)
    assert labels[0] or said[0].endswith(f"labels are its names in sorted order: {by_name}")


def test_class_folders_for_a_teacher_without_classes_are_read_with_a_word(
    pipelines, tmp_path, capsys
):
    image(tmp_path / "a.png", 0)
    assert folder_source(pipelines, "unconditional", tmp_path).cond is None
    assert capsys.readouterr().err == ""
    image(tmp_path / "cats" / "b.png", 0)
    assert folder_source(pipelines, "unconditional", tmp_path).size == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "has no classes, so subfolders are not read as labels" in err


def test_every_epoch_has_an_order_of_its_own_and_every_run_its_own_orders_and_noise():
    s = source(50)
    first, second = (s.batch(d, 0, 1, 50) for d in range(2))
    other = Source((1,), s.x, s.cond, seed=1, size=50).batch(0, 0, 1, 50)
    assert not torch.equal(first.x, second.x)
    assert not torch.equal(first.x, other.x)
    assert not torch.equal(first.noise, other.noise)
    assert torch.equal(first.x, source(50).batch(0, 0, 1, 50).x)


def test_an_epoch_may_end_within_a_batch():
    found = torch.cat([source(10).batch(d, 0, 1, 4).x for d in range(5)]).flatten().tolist()
    assert sorted(found[:10]) == sorted(found[10:]) == list(range(10))


def test_a_batch_says_which_items_it_holds():
    batch = source().batch(3, 1, 2, 4)
    assert batch.items.tolist() == batch.x.flatten().tolist()
    mine = Stream(source(), torch.device("cpu"), 3, range(1, 2), 2, 4)
    assert torch.equal(next(mine).items, batch.items)
    mine.close()


def test_noise_that_is_stored_with_the_data_is_used():
    x = torch.arange(10).float()[:, None]
    pairs = Source((1,), x, None, seed=0, size=10, noise=-x)
    batch = pairs.batch(2, 0, 1, 5)
    assert torch.equal(batch.noise, -batch.x)
    assert not torch.equal(source().batch(2, 0, 1, 5).noise, -batch.x)


# ---- couplings of data and noise


def coupled_source(n=64, d=6, **keys):
    torch.manual_seed(0)
    labels = {"class_labels": torch.arange(n) % 4}
    made = Source((d,), torch.randn(n, d), labels, seed=0, size=n)
    made.couple(CouplingSection(**{"by_label": False, **keys}) if keys else None)
    return made


def squares(batch):
    return (batch.x - batch.noise).square().sum(1)


@pytest.mark.parametrize("kind", ["transport", "immiscible"])
def test_an_assignment_permutes_the_noise_and_nothing_else(kind):
    plain, batch = coupled_source().batch(0, 0, 1, 16), coupled_source(kind=kind).batch(0, 0, 1, 16)
    assert torch.equal(plain.x, batch.x) and torch.equal(plain.items, batch.items)
    assert torch.equal(plain.cond["class_labels"], batch.cond["class_labels"])
    assert sorted(plain.noise.tolist()) == sorted(batch.noise.tolist())
    assert squares(batch).sum() < squares(plain).sum()


def test_transport_is_the_best_of_all_assignments():
    plain = coupled_source().batch(0, 0, 1, 5)
    batch = coupled_source(kind="transport").batch(0, 0, 1, 5)
    totals = [
        (plain.x - plain.noise[list(order)]).square().sum().item()
        for order in itertools.permutations(range(5))
    ]
    assert squares(batch).sum().item() == pytest.approx(min(totals))


def test_an_immiscible_assignment_is_the_best_by_distance():
    plain = coupled_source().batch(0, 0, 1, 5)
    batch = coupled_source(kind="immiscible").batch(0, 0, 1, 5)
    totals = [
        (plain.x - plain.noise[list(order)]).norm(dim=1).sum().item()
        for order in itertools.permutations(range(5))
    ]
    assert squares(batch).sqrt().sum().item() == pytest.approx(min(totals), rel=1e-3)  # of 16 bits


def test_in_one_dimension_transport_is_monotone():
    made = Source((1,), torch.linspace(-1, 1, 9)[:, None], None, seed=0, size=9)
    made.couple(CouplingSection())
    batch = made.batch(0, 0, 1, 9)
    assert torch.equal(batch.x.argsort(0), batch.noise.argsort(0))


def test_an_assignment_by_label_stays_within_classes():
    plain = coupled_source().batch(0, 0, 1, 32)
    batch = coupled_source(by_label=True).batch(0, 0, 1, 32)
    for label in range(4):
        here = plain.cond["class_labels"] == label
        assert sorted(plain.noise[here].tolist()) == sorted(batch.noise[here].tolist())
    assert squares(batch).sum() < squares(plain).sum()


def test_the_nearest_draw_is_nearer_and_the_first_is_the_uncoupled_one():
    plain = coupled_source().batch(0, 0, 1, 32)
    batch = coupled_source(kind="nearest", candidates=8).batch(0, 0, 1, 32)
    same = (plain.noise == batch.noise).all(1)
    assert 0 < same.sum() < 16  # about one in eight keeps its own
    assert (squares(batch) <= squares(plain)).all()


def test_couplings_depend_on_the_shard_alone():
    for kind in ("transport", "nearest"):
        one, other = (coupled_source(kind=kind).batch(3, 1, 2, 8) for _ in range(2))
        assert torch.equal(one.noise, other.noise)


def test_stored_noise_is_not_coupled_anew():
    x = torch.zeros(4, 2)
    stored = Source((2,), x, None, seed=0, size=4, noise=torch.ones(4, 2))
    with refused("data.coupling", "remove"):
        stored.couple(CouplingSection())


def test_an_objective_without_data_has_none_to_couple():
    tree = {
        "teacher": "digits", "objective": {"name": "sid"}, "train": {"steps": 1},
        "data": {"coupling": {"kind": "nearest"}},
    }  # fmt: skip
    with refused("data.coupling", "sid"):
        Recipe.check(tree)


@pytest.mark.parametrize(
    ("coupling", "train", "line"),
    [
        ({"kind": "transport", "candidates": 8}, {}, ("data.coupling.candidates", "transport")),
        ({"kind": "nearest", "by_label": False}, {}, ("data.coupling.by_label", "nearest")),
        ({"kind": "nearest", "candidates": 10**8}, {}, ("data.coupling.candidates", "1024")),
        ({"kind": "immiscible"}, {"batch": 4, "accumulate": 4}, ("data.coupling", "train.batch")),
    ],
)
def test_couplings_that_could_do_nothing_or_fill_the_memory_are_refused(coupling, train, line):
    tree = {
        "teacher": "digits", "objective": {"name": "ect"}, "train": {"steps": 1, **train},
        "data": {"source": "digits", "coupling": coupling},
    }  # fmt: skip
    with refused(*line):
        Recipe.check(tree)

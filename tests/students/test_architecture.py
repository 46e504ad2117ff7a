"""Smaller networks: units that can go, the cheapest choice, weights carried over, and exports."""

import itertools
import json
import random
from copy import deepcopy

import pytest
import torch

from distill.config.recipe import Recipe
from distill.training.networks import build_networks
from eval import shapes
from students.architecture.change import changed, places, stock_form
from students.architecture.knapsack import cheapest
from students.architecture.score import calibration, chosen, cost_without, save, scored
from students.architecture.units import size_of, skipping, units
from students.export import folder as folders
from students.export.earlier import outline
from students.lora import network_of, unwrap
from students.schedulers import source_of
from students.schedulers import student as student_of
from teachers import load
from teachers.catalogue.outlines import outline as outline_of
from teachers.errors import UserError
from teachers.reduced.network import CHANGED, REMOVED, Reduced
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree

MIDDLE = ["mid_block.resnets.0", "mid_block.resnets.1"]


@pytest.fixture(scope="module")
def text():
    """The embedded text teacher, its states for 32 captions, and its scores."""
    teacher = load("shapes")
    states = calibration(teacher, shapes.all_captions()[::24][:32])
    return teacher, states, scored(teacher, states)


def inputs(teacher, n=2):
    torch.manual_seed(0)
    prompts = folders.prompts_of(teacher)
    cond = teacher.codec.condition([prompts[i % len(prompts)] for i in range(n)])
    return torch.randn(n, *teacher.shape), torch.linspace(0.3, 0.9, n), cond


# the cheapest choice


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_cheapest_of_all_sets_that_are_large_enough(seed):
    rng = random.Random(seed)
    names = [f"u{i}" for i in range(8)]
    cost = {n: rng.random() for n in names}
    size = {n: rng.randint(1, 400) for n in names}
    least = int(rng.uniform(0.1, 0.9) * sum(size.values()))
    sets = [c for k in range(9) for c in itertools.combinations(names, k)]
    enough = [c for c in sets if sum(size[n] for n in c) >= least]
    best = min(sum(cost[n] for n in c) for c in enough)
    found = cheapest(cost, size, least)
    assert sum(size[n] for n in found) >= least
    assert sum(cost[n] for n in found) == pytest.approx(best)


def test_large_sizes_are_rounded_to_the_safe_side():
    for seed in range(60):
        rng = random.Random(seed)
        size = {f"u{i}": rng.randint(10**6, 10**8) for i in range(12)}
        cost = {n: v * (1 + 1e-3 * rng.random()) for n, v in size.items()}  # so the least is tight
        least = sum(size.values()) // 3
        assert least <= sum(size[n] for n in cheapest(cost, size, least)) < 1.2 * least


def test_units_that_make_things_better_go_and_too_much_is_refused():
    assert cheapest({"a": -1.0, "b": 2.0}, {"a": 1, "b": 1}, 0) == ["a"]
    assert cheapest({"a": -1.0, "b": 2.0}, {"a": 1, "b": 5}, 4) == ["a", "b"]
    with pytest.raises(ValueError, match="smaller"):
        cheapest({"a": 1.0}, {"a": 1}, 2)


# units and their costs


def test_the_units_of_the_text_teacher_are_its_seven_layers_that_keep_their_shape(text):
    _, _, scores = text
    assert {u.name: u.weights for u in scores} == {
        "down_blocks.0.attentions.0": 53_232,
        "down_blocks.0.resnets.0": 51_024,
        "up_blocks.1.attentions.0": 53_232,
        "up_blocks.1.attentions.1": 53_232,
        "mid_block.attentions.0": 198_624,
        "mid_block.resnets.0": 184_992,
        "mid_block.resnets.1": 184_992,
    }


def test_the_two_nearly_free_layers_of_the_text_teacher_are_found(text):
    teacher, states, scores = text
    cost = {u.name: u.cost for u in scores}
    others = [v for k, v in cost.items() if k not in MIDDLE]
    assert max(cost[n] for n in MIDDLE) < min(others) / 5
    total = size_of(source_of(teacher).backbone)
    assert sorted(chosen(scores, total, 0.8)) == MIDDLE
    # they stand in for each other: together they cost more than their sum
    assert cost_without(source_of(teacher), MIDDLE, states) > sum(cost[n] for n in MIDDLE)
    with refused("--keep", "0.4", "0.56"):
        chosen(scores, total, 0.4)


def test_a_cost_is_the_error_of_the_networks_own_output(text):
    teacher, states, _ = text
    network = source_of(teacher)
    name = "down_blocks.0.attentions.0"
    x_t, t = states.x_t[:4], states.t[:4]
    cond = {k: v[:4] for k, v in states.cond.items()}
    with torch.no_grad():
        whole = network.call(x_t, t, cond, None)
        with skipping(network.backbone, [name]):
            without = network.call(x_t, t, cond, None)
        few = type(states)(x_t, t, cond)
        assert cost_without(network, [name], few) == pytest.approx(
            (whole - without).square().mean().item(), rel=1e-3
        )
        assert torch.equal(network.call(x_t, t, cond, None), whole)  # nothing stays skipped


def test_blocks_of_a_transformer_are_units(folders):
    backbone = load(folders("dit")).denoiser.backbone
    count = len(backbone.transformer_blocks)
    names = [f"transformer_blocks.{i}" for i in range(count)]
    assert [*units(backbone)] == names[1:]  # the output layer reads the first one's embedding,
    alike = published_dit(backbone)
    assert [*units(alike)] == names  # which in published networks is that of all


def published_dit(backbone):
    """A copy of a DiT whose blocks have one embedding, as published ones."""
    copy = deepcopy(backbone)
    first = copy.transformer_blocks[0].norm1.emb.state_dict()
    for block in copy.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return copy


SD15, SDXL = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0",
)
THREE_STAGES = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
}
SHIFTED = {f"up_blocks.{j}": f"up_blocks.{j + 1}" for j in range(3)}
SHIFTED |= {
    f"up_blocks.{j}.{kind}.1": f"up_blocks.{j + 1}.{kind}.2"
    for j in range(3)
    for kind in ("resnets", "attentions")
}


@pytest.mark.parametrize(
    ("source", "config", "rename", "millions"),
    [
        (SD15, {}, {}, 579.38),  # BK-SDM-Base, arXiv:2305.15798, table 1
        (SD15, {"mid_block_type": None}, {}, 482.35),  # BK-SDM-Small
        (SD15, {"mid_block_type": None, **THREE_STAGES}, SHIFTED, 323.38),  # BK-SDM-Tiny
        (SDXL, {"transformer_layers_per_block": [1, 2, 6]}, {}, 1161),  # KOALA-1B, arXiv:2312.04005
        (SDXL, {"transformer_layers_per_block": [1, 2, 5], "mid_block_type": None}, {}, 782.82),
    ],
)
def test_published_students_have_their_published_sizes(source, config, rename, millions):
    large = unwrap(outline_of(source, torch.device("meta")).denoiser).backbone
    made = changed(large, {"layers_per_block": 1, **config}, rename, [])
    assert size_of(made) / 1e6 == pytest.approx(millions, rel=2e-4)


def test_of_an_attention_of_several_blocks_each_can_go():
    """SDXL's: 70 blocks of attention and six residual blocks keep their shape."""
    large = unwrap(outline_of(SDXL, torch.device("meta")).denoiser).backbone
    found = units(large)
    blocks = [n for n in found if ".transformer_blocks." in n]
    assert (len(found), len(blocks)) == (76, 70)
    stacks = [n.removesuffix("9") for n in blocks if n.endswith(".9")]
    gone = [f"{stack}{i}" for stack in stacks for i in (1, 2, 4, 5, 7, 8)]
    made = changed(large, {}, {}, gone)
    assert size_of(made) / 1e9 == pytest.approx(1.3, abs=0.05)  # LAPTOP-Diff's, arXiv:2404.11098
    recipe = Recipe.load("sdxl/laptop").student.architecture
    assert size_of(changed(large, recipe.config, {}, [])) == size_of(made)
    whole = changed(large, {}, {}, ["mid_block.attentions.0"])  # also all ten of them
    assert size_of(whole) < size_of(large) - 345e6


# weights carried over


def test_a_stock_setting_makes_a_stock_network_with_the_teachers_weights():
    backbone = load("shapes").denoiser.backbone
    made = changed(backbone, {"mid_block_type": None}, {}, [])
    assert size_of(made) == 1_216_036 and type(made).__name__ == "UNet2DConditionModel"
    before = backbone.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert all(a.data_ptr() != b.data_ptr() for a, b in
               zip(made.parameters(), backbone.parameters(), strict=False))  # fmt: skip


@pytest.mark.parametrize("teacher", ["shapes", "digits"])
def test_a_removed_layer_is_a_skipped_one(teacher):
    loaded = load(teacher)
    network = source_of(loaded)
    made = changed(network.backbone, {}, {}, MIDDLE[:1])
    assert isinstance(made, Reduced) and made.config[REMOVED] == MIDDLE[:1]
    twin = network.twin(made.eval(), network.schedule)
    x_t, t, cond = inputs(loaded)
    with torch.no_grad():
        small = twin(x_t, t, cond)
        with skipping(network.backbone, MIDDLE[:1]):
            assert torch.equal(small, network(x_t, t, cond))
    assert not torch.equal(small, network(x_t, t, cond))


def test_a_second_removal_keeps_the_first():
    backbone = load("shapes").denoiser.backbone
    once = changed(backbone, {}, {}, MIDDLE[:1])
    twice = changed(once, {}, {}, MIDDLE[1:])
    assert twice.config[REMOVED] == MIDDLE
    assert size_of(twice) == size_of(backbone) - 2 * 184_992


def test_a_middle_that_goes_takes_what_was_removed_of_it_along():
    backbone = load("shapes").denoiser.backbone
    once = changed(backbone, {}, {}, [MIDDLE[0], "down_blocks.0.attentions.0"])
    twice = changed(once, {"mid_block_type": None}, {}, [])
    assert twice.config[REMOVED] == ["down_blocks.0.attentions.0"]
    assert size_of(twice) == 1_216_036 - 53_232


def test_what_a_stock_config_can_say_stays_stock(folders):
    backbone = load("shapes").denoiser.backbone
    whole_middle = [*MIDDLE, "mid_block.attentions.0"]
    assert stock_form(backbone, whole_middle) == ({"mid_block_type": None}, [], {})
    assert stock_form(backbone, MIDDLE) == ({}, MIDDLE, {})
    dit = published_dit(load(folders("dit")).denoiser.backbone)
    made = changed(dit, {}, {}, ["transformer_blocks.0"])
    assert type(made) is type(dit) and made.config.num_layers == dit.config.num_layers - 1
    old, new = dit.state_dict(), made.state_dict()
    name = "attn1.to_q.weight"
    assert torch.equal(new[f"transformer_blocks.0.{name}"], old[f"transformer_blocks.1.{name}"])


def test_fewer_layers_of_an_up_stage_keep_the_first_and_the_last(folders):
    """BK-SDM's: the last one reads the outermost skip."""
    from diffusers import UNet2DConditionModel

    config = {**load(folders("sd")).denoiser.backbone.config, "layers_per_block": 2}
    large = UNet2DConditionModel.from_config({k: v for k, v in config.items() if k[0] != "_"})
    made = changed(large, {"layers_per_block": 1}, {}, [])
    assert places(made, large)["up_blocks.0.resnets.1"] == "up_blocks.0.resnets.2"
    old, new = large.state_dict(), made.state_dict()
    for i, j in ((0, 0), (1, 2)):
        name = "conv2.weight"
        assert torch.equal(new[f"up_blocks.1.resnets.{i}.{name}"],
                           old[f"up_blocks.1.resnets.{j}.{name}"])  # fmt: skip


def test_other_widths_are_drawn_anew_where_that_is_asked_for():
    backbone = load("digits").denoiser.backbone
    torch.manual_seed(0)
    made = changed(backbone, {"block_out_channels": [16, 32]}, {}, [], fresh=True)
    assert size_of(made) == 164_689
    torch.manual_seed(0)
    again = changed(backbone, {"block_out_channels": [16, 32]}, {}, [], fresh=True)
    pairs = zip(made.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert made.conv_in.weight.std() > 0.01


def test_of_fewer_blocks_the_last_of_each_group_stays():
    made, before = (torch.nn.Module() for _ in range(2))
    for module, n in ((made, 3), (before, 6)):
        module.blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(n))
    assert places(made, before) == {f"blocks.{i}": f"blocks.{2 * i + 1}" for i in range(3)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (({"mid_block": None}, {}, []), ["config", "'mid_block'", "mid_block_type"]),
        (({"block_out_channels": [8, 16]}, {}, []), ["keep the widths"]),
        (({"layers_per_block": 2}, {}, []), ["no source"]),
        (({"mid_block_type": "Nothing"}, {}, []), ["config", "no UNet2DConditionModel"]),
        (({}, {}, ["mid_block"]), ["remove", "no layer that can go", "mid_block.resnets"]),
        (({}, {"mid_block": "nowhere"}, []), ["nowhere"]),
    ],
)
def test_what_cannot_be_made_is_refused(change, words):
    with pytest.raises(UserError) as error:
        changed(load("shapes").denoiser.backbone, *change)
    assert error.value.key.startswith("student.architecture")
    for word in words:
        assert word in str(error.value)


# layers of another form

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FEED_FORWARD = "up_blocks.1.attentions.0.transformer_blocks.0.ff"


def silenced(backbone, name, keep, inner):
    """A copy in which the inner numbers that do not stay reach nothing."""
    copy = deepcopy(backbone)
    layer = copy.get_submodule(name)
    out = layer.to_out[0] if hasattr(layer, "to_out") else layer.net[2]
    width = out.in_features // inner
    gone = [i for i in range(inner) if i not in keep]
    for i in gone:
        out.weight.data[:, i * width : (i + 1) * width] = 0
    return copy


@pytest.mark.parametrize(
    ("name", "kind", "keep", "inner"),
    [(ATTENTION, "heads", [0, 2], None), (FEED_FORWARD, "neurons", [1, 5, 17], None)],
)
def test_a_cut_layer_is_one_whose_other_parts_reach_nothing(name, kind, keep, inner):
    loaded = load("shapes")
    network = source_of(loaded)
    layer = network.backbone.get_submodule(name)
    inner = layer.heads if kind == "heads" else layer.net[2].in_features
    keep = [i for i in keep if i < inner]
    form = {name: {"kind": kind, "keep": keep}}
    made = changed(network.backbone, {}, {}, [], change=form)
    assert made.config[CHANGED] == form and size_of(made) < size_of(network.backbone)
    assert network.backbone.get_submodule(name) is layer  # of the teacher nothing changed
    x_t, t, cond = inputs(loaded)
    with torch.no_grad():
        cut = network.twin(made.eval(), network.schedule)(x_t, t, cond)
        same = silenced(network.backbone, name, keep, inner)
        want = network.twin(same, network.schedule)(x_t, t, cond)
        assert not torch.allclose(cut, network(x_t, t, cond), atol=1e-3)
    torch.testing.assert_close(cut, want, atol=1e-5, rtol=1e-5)


def test_a_cut_network_leaves_as_a_folder_and_is_cut_again(tmp_path):
    recipe = smaller("shapes", architecture={"change": {ATTENTION: {"kind": "heads", "keep": [0]}}})
    teacher = load("shapes")
    student = build_networks(recipe, teacher)["student"]
    folders.export(student, teacher, tmp_path / "student", recipe.tree())
    generator, _ = folders.load_student(tmp_path / "student")
    again = network_of(generator.denoiser).backbone
    form = {FEED_FORWARD: {"kind": "neurons", "keep": [*range(7)]}}
    twice = changed(again, {}, {}, [], change=form)
    assert [*twice.config[CHANGED]] == [ATTENTION, FEED_FORWARD]
    gone = changed(twice, {}, {}, ["down_blocks.0.attentions.0"])
    assert [*gone.config[CHANGED]] == [FEED_FORWARD]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (ATTENTION, {"kind": "heads", "keep": []}, "give some of its"),
        (ATTENTION, {"kind": "heads", "keep": [1, 0]}, "in order"),
        (ATTENTION, {"kind": "heads", "keep": [0, 99]}, "from 0 to"),
        (ATTENTION, {"kind": "heads", "keep": [True]}, "give some of its"),
        (ATTENTION, {"kind": "heads", "lose": [1]}, "has keep"),
        (ATTENTION, {"kind": "neurons", "keep": [0]}, "no feed-forward"),
        (FEED_FORWARD, {"kind": "heads", "keep": [0]}, "no attention"),
        (ATTENTION, {"kind": "arms"}, "heads, neurons"),
        (ATTENTION, {}, "heads, neurons"),
        ("nowhere", {"kind": "heads", "keep": [0]}, "no such layer"),
    ],
)
def test_a_form_that_cannot_be_is_refused(name, settings, words):
    with pytest.raises(UserError, match=words) as error:
        changed(load("shapes").denoiser.backbone, {}, {}, [], change={name: settings})
    assert error.value.key == f"student.architecture.change.{name}"


# recipes and exports


def smaller(source, **student):
    tree = recipe_tree("sid", source)
    if source == "shapes":
        tree["teacher"], tree["data"] = {"source": "shapes"}, {"source": "shapes"}
    return Recipe.check({**tree, "student": student})


@pytest.mark.parametrize("source", ["shapes", "digits"])
def test_the_student_alone_is_smaller_and_leaves_as_a_folder_of_its_own(source, tmp_path):
    recipe = smaller(source, architecture={"remove": MIDDLE[:1]})
    teacher = load(source, **({"null_label": 10} if source == "digits" else {}))
    networks = build_networks(recipe, teacher)
    small = network_of(networks["student"].denoiser).backbone
    fake = network_of(networks["fake"]).backbone
    assert isinstance(small, Reduced) and not isinstance(fake, Reduced)
    folders.export(networks["student"], teacher, tmp_path / "student", recipe.tree())
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["unet"] == [type(small).__name__.lower(), type(small).__name__]
    generator, _ = folders.load_student(tmp_path / "student")
    assert network_of(generator.denoiser).backbone.config[REMOVED] == MIDDLE[:1]


def test_a_smaller_pipeline_is_a_teacher_and_what_a_student_starts_as(tmp_path, text):
    teacher, _, _ = text
    made = save(teacher, tmp_path / "small", {}, MIDDLE, {"why": "test"})
    loaded = load(str(tmp_path / "small"))
    assert size_of(loaded.denoiser.backbone) == size_of(made)
    recipe = smaller("shapes", init=str(tmp_path / "small"))
    student = build_networks(recipe, load("shapes"))["student"]
    assert network_of(student.denoiser).backbone.config[REMOVED] == MIDDLE
    drawn = outline(str(tmp_path / "small"), teacher)
    assert size_of(drawn) == size_of(made)


def test_the_source_that_lies_beside_the_weights_is_never_run(tmp_path, text):
    teacher, _, _ = text
    save(teacher, tmp_path / "small", {}, MIDDLE, {})
    module = tmp_path / "small" / "unet" / "reducedunet2dconditionmodel.py"
    assert "class ReducedUNet2DConditionModel" in module.read_text()
    module.write_text("raise SystemExit('run')")
    assert isinstance(load(str(tmp_path / "small")).denoiser.backbone, Reduced)


def test_a_smaller_student_of_a_run_starts_the_next_one(tmp_path):
    recipe = smaller("shapes", architecture={"config": {"mid_block_type": None}})
    teacher = load("shapes")
    student = build_networks(recipe, teacher)["student"]
    folders.export(student, teacher, tmp_path / "student", recipe.tree())
    after = smaller("shapes", init=str(tmp_path))
    again = build_networks(after, load("shapes"))["student"]
    assert size_of(network_of(again.denoiser).backbone) < 1_784_644 * 0.69
    whole = student_of(load("shapes"))
    assert size_of(network_of(whole.denoiser).backbone) >= 1_784_644


@pytest.mark.parametrize(
    ("student", "more", "key"),
    [
        ({"init": "x", "architecture": {"remove": MIDDLE}}, {}, "student.architecture"),
        ({"architecture": {"remove": MIDDLE}}, {"adapters": {}}, "student.architecture"),
        ({"architecture": {}}, {}, "student.architecture"),
        ({"architecture": {"remove": MIDDLE * 2}}, {}, "student.architecture.remove"),
        ({"architecture": {"haar": True}}, {}, "student.architecture.haar"),
        (
            {"architecture": {"fresh": True, "remove": MIDDLE, "noise": 2}},
            {},
            "student.architecture.noise",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(student, more, key):
    with refused(f"*{key}"):
        Recipe.check({**recipe_tree("sid", "digits"), "student": student, **more})


def test_what_has_the_teachers_architecture_needs_no_other_outline(tmp_path):
    teacher = load("shapes")
    folders.export(student_of(teacher), teacher, tmp_path / "student", {})
    assert outline(str(tmp_path), load("shapes")) is None


@pytest.mark.parametrize("name", ["Reduced", "Removed", "nn", "UNet2DModel"])
def test_an_index_that_names_something_else_of_that_module_is_refused(name, tmp_path, text):
    teacher, _, _ = text
    save(teacher, tmp_path / "small", {}, MIDDLE, {})
    file = tmp_path / "small" / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "unet": [name.lower(), name]}))
    with pytest.raises(UserError):
        load(str(tmp_path / "small"))

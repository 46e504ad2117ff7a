"""Students whose network is not the teacher's: GET, networks of one's own, and what is refused."""

import json

import pytest
import torch
from torch import nn

from distill.config.recipe import Recipe
from distill.objectives.base import Batch
from distill.planning import forecast
from distill.planning.plan import GPUS
from distill.training.networks import build_networks, check_form, form_for
from students.architecture.get import GET, Block, get, mixed, normal_of
from students.export import sampler_file
from students.export.folder import sample_student
from students.export.forms import ForeignForm
from students.lora import network_of
from teachers import Pixels, Teacher, load
from teachers.process import Karras, Trig
from tests.helpers.refusals import refused

NETWORK = "student.architecture.network"
OWN = """
import torch
from torch import nn

from teachers import Network


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.width = width
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 1)
        self.label = nn.Embedding(11, width)

    def forward(self, x, t, cond):
        h = self.first(x / 80) + self.label(cond["class_labels"])[..., None, None]
        return self.last(torch.tanh(h + t[:, None, None, None]))


def network(teacher):
    return Network(Net(), teacher.denoiser.process, "eps")


def timeless(teacher):
    net = network(teacher)
    net.backbone.forward = lambda x, t, cond: net.backbone.last(net.backbone.first(x))
    return net


def other_process(teacher):
    return Network(Net(), type(teacher.denoiser.process)(sigma_max=3.0), "x")


def nothing(teacher):
    return Net()


def noisy(teacher):
    class Noisy(Net):
        def forward(self, x, t, cond):
            return x + torch.randn_like(x) * self.last.weight.mean()

    return Network(Noisy(), teacher.denoiser.process, "x")
"""


def tree_of(network="get", steps=1, objective=None, **architecture):
    return {
        "teacher": "digits",
        "student": {
            "steps": steps, "renoise": False,
            "architecture": {"network": str(network), **architecture},
        },
        "objective": {"name": "kd", **(objective or {})},
        "data": {"source": "pairs", "count": 16, "steps": 2},
        "train": {"steps": 2, "batch": 8, "sample_every": 0},
    }  # fmt: skip


def recipe_of(*args, **keys):
    return Recipe.check(tree_of(*args, **keys))


@pytest.fixture(scope="module")
def digits():
    return load("digits", null_label=10)


@pytest.fixture
def small():
    """A GET of few weights, all of which do something."""
    torch.manual_seed(0)
    net = GET([1, 4, 4], 3, width=16, heads=2, injection=1, equilibrium=2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.double()


def noise_of(n=3, shape=(1, 4, 4)):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=draw, dtype=torch.float64)


LABELS = {"class_labels": torch.tensor([0, 2, 1])}


# ---- GET


class Linear(nn.Module):
    """A block that is linear: z A + u."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, z, c=None, u=None):
        return z @ self.a + u[..., : z.shape[-1]]


def test_of_a_linear_block_the_iterates_go_to_its_fixed_point(small):
    """With u fixed, z* = (I - A)^-1 u; the residual falls by |A| with every iteration."""
    draw = torch.Generator().manual_seed(2)
    a = torch.randn(16, 16, generator=draw, dtype=torch.float64)
    a = 0.5 * a / torch.linalg.matrix_norm(a, 2)
    small.steps, small.equilibrium = nn.ModuleList([Linear(a)]), 1
    small.inject = nn.Linear(16, 48, bias=False, dtype=torch.float64)
    small.norm = nn.Identity()
    small.iterations = 60
    outputs = small.outputs(noise_of(), torch.ones(3), LABELS)
    h = small.embed(noise_of()).flatten(2).transpose(1, 2) + small.places
    c = small.label(LABELS["class_labels"])[:, None]
    for block in small.blocks:
        h = block(h, c)
    u = small.inject(h)[..., :16]
    fixed = torch.linalg.solve((torch.eye(16, dtype=torch.float64) - a).T, u.flatten(0, 1).T).T
    torch.testing.assert_close(outputs[:, -1], small.decoded(fixed.view_as(u)))
    z = normal_of(noise_of(), 4 * 16).double().view(3, 4, 16)
    torch.testing.assert_close(outputs[:, 0], small.decoded(z @ a + u))  # it begins at the random z
    gaps = (outputs[:, 1:] - outputs[:, :-1]).flatten(2).norm(dim=2).sum(0)
    assert (gaps[1:20] < 0.6 * gaps[:19]).all()


def test_injection_is_added_to_queries_keys_and_values():
    """With q and k of 0 all tokens attend alike: what u adds to v is averaged over the tokens."""
    block = Block(8, 2, 2).double()
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
        block.out.weight.copy_(torch.eye(8))
    x, u = noise_of(2, (5, 8)), noise_of(2, (5, 24))
    out = block(x, None, torch.cat([torch.zeros_like(u[..., :16]), u[..., 16:]], -1))
    torch.testing.assert_close(out, x + u[..., 16:].mean(1, keepdim=True))
    torch.testing.assert_close(block(x, u[:, :1] * 0, None), x)
    sharp = torch.cat([100 * torch.ones_like(u[..., :8]), 0 * u[..., :8], u[..., 16:]], -1)
    sharp[:, 3, 8:16] = 100  # every query finds the key of token 3
    torch.testing.assert_close(block(x, None, sharp), x + u[:, 3:4, 16:].expand_as(x))


def test_images_and_tokens_are_two_forms_of_the_same_pixels():
    net = GET([2, 4, 6], width=8, heads=1)
    with torch.no_grad():
        net.embed.weight.copy_(torch.eye(8).view(8, 2, 2, 2))
        net.head.weight.copy_(torch.eye(8).view(2, 2, 2, 8).permute(1, 2, 0, 3).reshape(8, 8))
    net.norm = nn.Identity()
    x = noise_of(3, (2, 4, 6)).float()
    torch.testing.assert_close(net.decoded(net.embed(x).flatten(2).transpose(1, 2)), x)


def test_every_iterate_is_an_output_and_the_last_is_the_sample(small):
    outputs = small.outputs(noise_of(), torch.ones(3), LABELS)
    assert outputs.shape == (3, 6, 1, 4, 4)
    assert torch.equal(small(noise_of(), torch.ones(3), LABELS), outputs[:, -1])
    small.iterations = 2
    torch.testing.assert_close(small.outputs(noise_of(), torch.ones(3), LABELS), outputs[:, :2])
    outputs[:, 3].sum().backward()
    assert small.blocks[0].qkv.weight.grad.abs().sum() > 0


def test_z_is_a_unit_normal_that_the_noise_alone_decides():
    x = torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    z = normal_of(x, 1024)
    assert torch.equal(normal_of(x[5:6], 1024), z[5:6])
    again = normal_of(x * (1 + 6e-8), 1024)  # rounding seldom reaches the next thousandth
    assert (again == z).all(1).float().mean() > 0.95
    assert z.mean().abs() < 0.01 and (z.var() - 1).abs() < 0.01
    assert (z.quantile(0.975, dim=1).mean() - 1.96).abs() < 0.02
    products = z.T @ z / 400 - torch.eye(1024)
    assert products.abs().max() < 6 / 20
    assert (torch.cat([z, x.flatten(1)], 1).T.corrcoef()[:1024, 1024:]).abs().max() < 0.3
    flipped = x.clone()
    flipped[:, 0, 0, :2] = x[:, 0, 0, :2].flip(1)  # a swap of two pixels changes it
    assert not (normal_of(flipped, 8) == z[:, :8]).all(1).any()


def test_mixed_integers_are_those_of_splitmix64():
    """The published sequence of the seed 0: its n-th number is of n times the golden ratio."""
    numbers = mixed(torch.tensor([1, 2, 3])).tolist()
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [n % 2**64 for n in numbers] == wanted


@pytest.mark.parametrize("process", [Karras(), Trig(0.7)])
def test_it_reads_unit_noise_in_any_process(process):
    teacher = Teacher(load("digits").denoiser, Pixels(), (1, 4, 4))
    teacher.denoiser.process = process
    torch.manual_seed(0)
    network = get(teacher)
    z = noise_of().float()
    start = process.at(torch.ones(3), z)[1] * z
    torch.testing.assert_close(network.backbone.scale * start, z)
    nn.init.normal_(network.backbone.head.weight)
    torch.testing.assert_close(
        network(start, torch.ones(3)), network.backbone(start, torch.ones(3), None)
    )  # it predicts x


def test_data_and_conditions_that_get_cannot_read_are_refused():
    teacher = load("digits")
    for shape in ((64,), (1, 7, 8), (1, 8, 7)):
        with refused(NETWORK):
            get(Teacher(teacher.denoiser, Pixels(), shape))
    with refused(NETWORK):
        get(load("shapes"))


# ---- the loss of all outputs


def test_each_iterate_counts_less_than_the_one_after_it(digits):
    batch = Batch(
        torch.zeros(3, 1, 8, 8), noise_of(3, (1, 8, 8)).float(), {"class_labels": torch.arange(3)}
    )
    values = {}
    for decay in (0.0, 0.5, 1.0):
        recipe = recipe_of(objective={"distance": "absolute", "output_decay": decay})
        torch.manual_seed(0)
        student = build_networks(recipe, digits)["student"]
        nn.init.normal_(network_of(student.denoiser).backbone.head.weight)
        made = recipe.kind(
            teacher=digits.denoiser, student=student, distance="absolute", output_decay=decay
        )
        values[decay] = made.loss(batch, 0)
    x_t = student.scale(batch.noise) * batch.noise
    outputs = network_of(student.denoiser).backbone.outputs(x_t, torch.ones(3), batch.cond)
    error = outputs.abs().mean((0, 2, 3, 4))
    torch.testing.assert_close(values[0.0].value, error[-1])
    torch.testing.assert_close(values[1.0].value, error.sum())
    powers = 0.5 ** torch.arange(5, -1, -1)
    torch.testing.assert_close(values[0.5].value, (powers * error).sum())
    assert torch.equal(values[0.5].samples, outputs[:, -1])
    assert "outputs" not in vars(network_of(student.denoiser).backbone)


def test_a_network_of_one_output_has_no_decay(digits):
    recipe = recipe_of(objective={"output_decay": 0.8})
    tree = {**tree_of(objective={"output_decay": 0.8}), "student": {"renoise": False}}
    student = build_networks(Recipe.check(tree), digits)["student"]
    with refused("objective.output_decay"):
        recipe.kind(teacher=digits.denoiser, student=student, output_decay=0.8)


# ---- students


def started(network, digits, steps=1):
    recipe = recipe_of(network, steps)
    form = form_for(recipe, digits)
    assert isinstance(form, ForeignForm) and not form.leaves_pipeline
    check_form(recipe, form)
    torch.manual_seed(1)
    student = build_networks(recipe, digits)["student"]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return form, student.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["get", "own"])
def test_it_leaves_as_a_folder_that_samples_alike_in_another_process(name, tmp_path, digits):
    network = "get"
    if name == "own":
        (tmp_path / "mine.py").write_text(OWN)
        network = f"{tmp_path / 'mine.py'}:network"
    form, student = started(network, digits, 1 if name == "get" else 2)
    form.rehearsal(torch.device("cpu"))(student)
    form.export(student, tmp_path / "student", {})  # it compares in another process
    text = (tmp_path / "student" / ("get.py" if name == "get" else "mine.py")).read_text()
    assert "class" in text and "teachers" not in text
    cond = {"class_labels": torch.tensor([3, 1, 0])}
    steps = max(student.counts)
    ours = sample_student(student, digits, [0] * 3, 5, cond=cond)
    theirs = sampler_file.sample(tmp_path / "student", 3, steps, 5, cond)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "student" / "config.json").read_text())["teacher"] == "digits"


def test_the_teacher_and_the_fake_score_stay_what_they_are(digits):
    tree = tree_of() | {"objective": {"name": "dmd"}}
    networks = build_networks(Recipe.check(tree), digits)
    assert isinstance(network_of(networks["student"].denoiser).backbone, GET)
    for name in ("teacher", "fake"):
        assert type(network_of(networks[name]).backbone).__name__ == "UNet2DModel"


def test_one_seed_gives_one_student(digits):
    weights = []
    for _ in range(2):
        torch.manual_seed(4)
        weights.append([*build_networks(recipe_of(), digits)["student"].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_plan_shows_its_size_beside_the_teachers(digits):
    plan = forecast.plan(recipe_of())
    count = sum(p.numel() for p in get(digits).backbone.parameters())
    assert plan.smaller[0] == count and plan.tree("rtx-4090", GPUS["rtx-4090"])["student_params"]
    assert 0.8 < plan.smaller[1] < 1.2


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"config": {"mid_block_type": None}}, "student.architecture.config"),
        ({"remove": ["mid_block.resnets.0"]}, "student.architecture.remove"),
        ({"rename": {"a": "b"}}, "student.architecture.rename"),
        ({"fresh": True}, "student.architecture.fresh"),
    ],
)
def test_changes_of_the_teachers_network_do_not_go_with_another_network(change, key):
    with refused(f"*{key}"):
        recipe_of(**change)


def test_adapters_and_teachers_do_not_go_with_another_network():
    with refused("*student.architecture"):
        Recipe.check(tree_of() | {"adapters": {}})
    tree = tree_of() | {"objective": {"name": "diffusion"}, "data": {"source": "digits"}}
    with refused(f"*{NETWORK}"):
        Recipe.check(tree)


@pytest.mark.parametrize(
    ("function", "key"),
    [("nothing", NETWORK), ("other_process", NETWORK), ("noisy", NETWORK), ("absent", NETWORK)],
)
def test_a_function_that_returns_no_such_network_is_refused(function, key, tmp_path, digits):
    (tmp_path / "mine.py").write_text(OWN)
    recipe = recipe_of(f"{tmp_path / 'mine.py'}:{function}")
    with refused(key):
        check_form(recipe, form_for(recipe, digits))


def test_names_that_no_network_has_are_refused(digits):
    for name in ("gte", "no/such/file.py:network"):
        recipe = recipe_of(name)
        with refused(NETWORK):
            check_form(recipe, form_for(recipe, digits))


def test_a_network_that_reads_no_time_has_one_step(digits):
    recipe = recipe_of("get", 2)
    with refused("student.steps"):
        check_form(recipe, form_for(recipe, digits))

"""Students of EDM's networks: ADM as a UNet2DModel, the others with their source beside them."""

import json
import shutil
from inspect import isclass, signature

import pytest
import torch
from safetensors.torch import save_file

from distill.config.recipe import Recipe
from distill.planning import forecast
from distill.publish.card import draft
from distill.training import build
from distill.training.networks import objective_of
from students import schedulers
from students.export.folder import export, load_student, rehearse
from students.export.sources import edm as edm_source
from students.lora import Adapter
from teachers import load
from teachers.denoiser import Guided
from teachers.edm import adm, checkpoints, networks
from teachers.edm.latents import PIPELINE, Latents
from teachers.edm.model import EDM
from teachers.families.unet import UNet
from tests.helpers import edm_pickles
from tests.helpers.engines import stream
from tests.helpers.refusals import refused

KNOWN, _ = edm_pickles.golden()
IN64 = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000}
WIDE = {"img_resolution": 8, "img_channels": 3, "label_dim": 5, "model_channels": 128,
        "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}  # fmt: skip
DEEP = {"img_resolution": 8, "img_channels": 1, "model_channels": 128, "channel_mult": [1, 1, 2],
        "num_blocks": 2, "attn_resolutions": [4, 2], "channel_mult_emb": 2}  # fmt: skip


def random_adm(arguments, scale=1.0):
    net = networks.DhariwalUNet(**arguments).eval()
    for name, p in net.named_parameters():
        p.data = scale * edm_pickles.weight(name, tuple(p.shape))
    return net


def folder(path, arguments, label_dropout=0.1):
    """An ADM as `distill convert` leaves it."""
    path.mkdir()
    about = {"_class_name": "EDMPrecond", "network": "DhariwalUNet", "sigma_data": 0.5}
    about |= {"label_dropout": label_dropout, "arguments": arguments}
    (path / "config.json").write_text(json.dumps(about))
    save_file(random_adm(arguments, 0.5).state_dict(), path / "model.safetensors")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Golden cases of each family, as the folders that they convert to, and a wide ADM."""
    root = tmp_path_factory.mktemp("edm")
    for name in ("ddpmpp-labels", "adm", "edm2", "edm2-pixels"):
        checkpoints.convert(edm_pickles.save(KNOWN[name], root / f"{name}.pkl"), root / name)
    folder(root / "wide", WIDE)
    shutil.copytree(root / "edm2", root / "edm2-latents")
    edm_pickles.save_vae(root / "edm2-latents" / "vae")
    return root


def recipe(source, name="sid", **more):
    tree = {"teacher": str(source), "objective": {"name": name},
            "train": {"steps": 2, "batch": 4, "log_every": 1, "sample_every": 0}}  # fmt: skip
    return Recipe.check({**tree, **more})


def trained(files, tmp_path, name):
    """Two steps of SiD, which needs no data."""
    engine = build.build(recipe(files / name), tmp_path / "run").engine
    data = stream(engine)
    engine.advance(data)
    engine.advance(data)
    data.close()
    return engine.objective.student


# ---- ADM


@pytest.mark.parametrize("arguments", [WIDE, DEEP], ids=["wide", "deep"])
def test_adm_and_its_unet2dmodel_are_one_function(arguments):
    net, classes = random_adm(arguments).double(), arguments.get("label_dim", 0)
    config = adm.config(arguments, null=True)
    twin = adm.stock(net, config)
    x = torch.randn(3, arguments["img_channels"], *[arguments["img_resolution"]] * 2).double()
    time = torch.tensor([0.002, 1.0, 80.0]).double().log() / 4
    labels = torch.tensor([classes - 1, 0, classes]) if classes else None  # the last is none
    with torch.no_grad():
        expected, found = net(x, time, labels), twin(x, time, class_labels=labels).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def test_the_published_adms_config_is_that_of_the_consistency_models_of_imagenet_64():
    found = adm.config(IN64)
    published = {  # of openai/diffusers-cd_imagenet64_l2, but for dropout
        "sample_size": 64, "in_channels": 3, "out_channels": 3, "layers_per_block": 3,
        "block_out_channels": [192, 384, 576, 768], "attention_head_dim": 64,
        "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
        "up_block_types": [*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
        "downsample_type": "resnet", "upsample_type": "resnet", "num_class_embeds": 1000,
        "norm_num_groups": 32, "attn_norm_num_groups": 32, "time_embedding_dim": 768,
        "resnet_time_scale_shift": "scale_shift", "dropout": 0.1,
    }  # fmt: skip
    assert found == published
    with torch.device("meta"):
        net = networks.DhariwalUNet(**IN64)
        count = sum(p.numel() for p in adm.stock(net, found).parameters())
    assert count == sum(p.numel() for p in net.parameters()) == 295_899_267


@pytest.mark.parametrize(
    "change",
    [
        {"model_channels": 64},  # groups of fewer than four channels
        {"model_channels": 160, "attn_resolutions": [8]},  # heads of 80
        {"channel_mult": [2, 2]},  # fewer sinusoids than channels
    ],
)
def test_an_adm_that_no_unet2dmodel_is_has_no_config(change):
    assert adm.config({**WIDE, **change}) is None


def test_a_wide_adm_is_a_stock_teacher_with_the_same_outputs_and_a_null_label(files):
    teacher, net = load(str(files / "wide")), random_adm(WIDE, 0.5)
    assert type(teacher.denoiser) is UNet
    assert teacher.codec.null == {"class_labels": torch.tensor([5])}
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9])
    sigma = teacher.denoiser.process.scales(t.double())[1].float().view(-1, 1, 1, 1)
    total = sigma**2 + 0.25
    cond = teacher.codec.condition([1, 4])
    with torch.no_grad():
        raw = [net(x / total.sqrt(), sigma.flatten().log() / 4, c) for c in (*cond.values(), None)]
        labelled, free = (0.25 / total * x + sigma * 0.5 / total.sqrt() * f for f in raw)
        torch.testing.assert_close(teacher.denoiser(x, t, cond), labelled, atol=1e-5, rtol=1e-5)
        guided = Guided(teacher.denoiser, 2.0, teacher.codec.null)(x, t, cond)
        torch.testing.assert_close(guided, 2 * labelled - free, atol=3e-5, rtol=1e-5)


def test_an_adms_student_starts_as_its_teacher_and_has_no_null_label(files):
    teacher = load(str(files / "wide"))
    student = schedulers.student(teacher, 2).denoiser
    assert student.backbone.config["num_class_embeds"] == 5
    x, cond = torch.randn(3, 3, 8, 8), teacher.codec.condition([1, 2, 3])
    for level in (0.5, 0.75, 1.0):  # lower, the consistency boundary makes them differ
        t = torch.full((3,), level)
        x_t = x * teacher.denoiser.process.at(t, x)[1]
        with torch.no_grad():
            found, expected = student(x_t, t, cond), teacher.denoiser(x_t, t, cond)
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


# ---- networks that diffusers has not


@pytest.mark.parametrize("name", ["ddpmpp-labels", "adm", "edm2-pixels"])
def test_the_written_source_alone_is_the_network(files, name):
    model = load(str(files / name)).denoiser.backbone
    text = edm_source.source(model)
    assert "teachers" not in text and "students" not in text
    space: dict = {"__name__": "edm_model"}
    exec(compile(text, "edm_model.py", "exec"), space)
    twin = space["EDMModel"].from_config(dict(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 0])
    labels = labels if model.config["num_class_embeds"] else None
    t = torch.tensor(250 * 0.7)  # one for all, as pipelines give it
    assert torch.equal(twin(x, t, labels).sample, model(x, t, labels, return_dict=False)[0])


@pytest.mark.parametrize("name", ["ddpmpp-labels", "edm2-pixels", "edm2-latents"])
def test_the_consistency_pipeline_samples_a_trained_student_of_any_network(files, tmp_path, name):
    student = trained(files, tmp_path, name)
    assert isinstance(student.denoiser, EDM)
    rehearse(student, load(str(files / name)))  # compares pixels


def test_a_critic_and_adapters_find_their_places_in_edms_networks(files, tmp_path):
    objective = {"name": "dmd2", "student_every": 1}
    more = {"objective": objective, "critic": {}, "adapters": {"rank": 2}}
    made = recipe(files / "ddpmpp-labels", **more, data={"source": "digits"})
    teacher = load(str(files / "ddpmpp-labels"))
    student = schedulers.student(teacher, 1, adapter=Adapter(rank=2))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 0.9])
    cond = teacher.codec.condition([1, 2])
    starts = student.denoiser(x, t, cond)
    assert starts.shape == x.shape and len(list(student.parameters())) > 20
    found = objective_of(made, load(str(files / "ddpmpp-labels")), torch.device("cpu"))
    assert found.critic(x, t, cond).shape == (2,)


def test_without_a_vae_students_of_latents_are_refused_in_one_line(files):
    with refused("teacher.vae", "sd-vae-ft-mse"):
        schedulers.student(load(str(files / "edm2")))
    vae = str(files / "edm2-latents" / "vae")
    assert schedulers.student(load(str(files / "edm2"), vae=vae)).counts == (1,)


def test_the_pipeline_of_latents_decodes_with_their_shift_and_scale(files):
    codec = load(str(files / "edm2-latents")).codec
    assert isinstance(codec, Latents)
    pipe = codec.pipeline(None, None)
    latents = torch.randn(2, 4, 3, 3) * 0.5
    std = torch.tensor([4.17, 4.62, 3.71, 3.28])[:, None, None]
    mean = torch.tensor([5.81, 3.25, 0.12, -2.15])[:, None, None]
    with torch.no_grad():
        expected = codec.vae.decode(2 * std * latents + mean).sample.clamp(0, 1)
        drawn = pipe.postprocess_image(latents, "pt")
        assert 0 < expected.min() < expected.max() < 1
        torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(codec.decode(latents) / 2 + 0.5, expected, atol=1e-5, rtol=0)
    assert codec.factor == 2


def test_a_student_of_latents_has_its_pipelines_source_alone(files):
    space: dict = {"__name__": "edm2_latents"}
    text = edm_source.pipeline_source()
    assert "teachers" not in text and "students" not in text
    exec(compile(text, "edm2_latents.py", "exec"), space)
    codec = load(str(files / "edm2-latents")).codec
    ours = codec.pipeline(None, None)
    kind = space[PIPELINE[1]]
    known = list(signature(kind.__init__).parameters.values())[1:]
    assert all(isclass(v.annotation) for v in known)  # diffusers 0.36 stops at others
    theirs = kind(None, None, codec.vae, dict(ours.config["latents"]))
    latents = torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        drawn = [pipe.postprocess_image(latents, "np") for pipe in (ours, theirs)]
    assert (drawn[0] == drawn[1]).all() and drawn[0].shape == (1, 6, 6, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wide", "ddpmpp-labels", "adm", "edm2-pixels", "edm2-latents"])
def test_diffusers_in_another_process_draws_a_trained_students_pictures(files, tmp_path, name):
    """Exports of ADM, DDPM++ and EDM2, drawn without our packages: every pixel within 10⁻³."""
    student, teacher = trained(files, tmp_path, name), load(str(files / name))
    export(student, teacher, tmp_path / "student", {"objective": {"name": "sid"}})  # compares
    card = draft(tmp_path / "student")
    own = list((tmp_path / "student").rglob("*.py"))
    assert bool(own) == ("trust_remote_code=True" in card) == (name != "wide")
    assert len(own) == (0 if name == "wide" else 2 if name == "edm2-latents" else 1)
    for file in own:  # which we never run
        file.write_text("raise SystemExit('executed')")
    again, itself = load_student(tmp_path / "student")
    x, t = torch.randn(2, *teacher.shape), torch.tensor([0.5, 0.9])
    cond = itself.codec.condition([0, 1])
    torch.testing.assert_close(again.denoiser(x, t, cond), student.denoiser(x, t, cond))
    torch.testing.assert_close(itself.codec.decode(x), teacher.codec.decode(x))


@pytest.mark.slow
def test_a_plan_counts_the_vae_of_latents(files):
    """Its weights, and its decoding, of a student of EDM2's latents."""
    plan = forecast.plan(recipe(files / "edm2-latents"))
    vae = load(str(files / "edm2-latents")).codec.vae
    assert plan.beside == sum(p.nbytes for p in vae.parameters()) > 0
    assert plan.build > plan.weights + plan.beside  # while it decodes

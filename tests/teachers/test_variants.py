"""Variants of weights, such as fp16, and weights in several files, in every loader of folders."""

import shutil

import pytest
import torch

from distill.config.recipe import Recipe
from students import schedulers
from students.export.unquantised import base_folder, unquantised
from students.lora import Adapter, unwrap
from teachers import load
from teachers.storage.download import wanted
from teachers.storage.variants import reading
from tests.helpers import families, imagenet
from tests.helpers.refusals import refused

SHARD = "20KB"  # small enough that every part is in several files
LOADERS = ["sd", "flux-schnell", "edm", "sit student"]


@pytest.fixture(scope="module")
def both(pipelines, tmp_path_factory):
    """By loader, a folder with plain weights and with fp16 ones of other values, all in shards."""
    import diffusers

    root, found = tmp_path_factory.mktemp("variants"), {}
    for name in LOADERS:
        to = root / name
        if name == "edm":
            shutil.copytree(pipelines["edm"], to)
            networks = {"unet": diffusers.UNet2DModel.from_pretrained(to / "unet")}
        elif name == "sit student":
            student_of_sit(root, to)
            networks = {"transformer": load(str(to)).denoiser.backbone}
        else:
            families.build(name, to)
            pipe = load(str(to), **families.OPTIONS.get(name, {})).codec.pipe
            parts = ["unet" if name == "sd" else "transformer", "text_encoder", "vae"]
            networks = {k: getattr(pipe, k) for k in parts}
        for part, network in networks.items():
            for old in (to / part).glob("*.safetensors"):
                old.unlink()
            network.save_pretrained(to / part, max_shard_size=SHARD)
            other = other_weights(network)
            other.save_pretrained(to / part, max_shard_size=SHARD, variant="fp16")
            names = [p.name for p in (to / part).glob("*.safetensors")]
            assert sum("fp16" in k for k in names) > 1 < sum("fp16" not in k for k in names)
        found[name] = to
    return found


def student_of_sit(root, to):
    """The folder that a student of SiT leaves, without the source that it brings."""
    imagenet.save("sit", root / "sit")
    teacher = load(str(root / "sit" / "sit.pt"), vae=str(root / "sit" / "vae"))
    teacher.codec.pipe.save_pretrained(to)


def other_weights(network):
    from copy import deepcopy

    other = deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    return other.half()


def weights(teacher):
    return unwrap(teacher.denoiser).backbone.state_dict()


def options(name):
    return families.OPTIONS.get(name, {})


@pytest.mark.parametrize("name", LOADERS)
def test_a_variant_is_read_where_it_is_asked_for(both, name):
    """Plain files otherwise; both in several files each."""
    plain = load(str(both[name]), **options(name))
    half = load(str(both[name]), variant="fp16", **options(name))
    assert half.options["variant"] == "fp16" and "variant" not in plain.options
    theirs = dict(unwrap(half.denoiser).backbone.named_parameters())
    for k, v in unwrap(plain.denoiser).backbone.named_parameters():
        torch.testing.assert_close(theirs[k], (2 * v).half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sd", "flux-schnell"])
def test_encoders_and_autoencoder_are_of_the_variant_too(both, name):
    """CLIP and the VAE, which transformers and diffusers read, and not the T5 that has none."""
    plain = load(str(both[name]), **options(name)).codec.pipe
    half = load(str(both[name]), variant="fp16", **options(name)).codec.pipe
    for part in ("text_encoder", "vae"):
        theirs = dict(getattr(half, part).named_parameters())
        for k, v in getattr(plain, part).named_parameters():
            torch.testing.assert_close(theirs[k], (2 * v).half().float(), rtol=0, atol=0)
    if name == "flux-schnell":
        ours, theirs = plain.text_encoder_2.state_dict(), half.text_encoder_2.state_dict()
        assert all(torch.equal(theirs[k], v) for k, v in ours.items())


def test_what_has_no_such_variant_is_read_plain_and_said(both, capfd):
    load(str(both["flux-schnell"]), variant="fp16", **options("flux-schnell"))
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "no fp16 weights of text_encoder_2" in err


def test_where_only_variants_are_one_is_read_and_said(both, tmp_path, capfd):
    """fp16 before bf16, without a variant; each of them with it."""
    copy = shutil.copytree(both["edm"], tmp_path / "t")
    for file in (copy / "unet").iterdir():
        if ".fp16" in file.name:
            twin = file.with_name(file.name.replace(".fp16", ".bf16"))
            text = file.read_bytes()
            twin.write_bytes(text.replace(b".fp16", b".bf16") if twin.suffix == ".json" else text)
        elif file.name != "config.json":
            file.unlink()
    capfd.readouterr()
    found = weights(load(str(copy)))
    assert capfd.readouterr().err.count("*.fp16.safetensors, and those are read") == 1
    named = weights(load(str(copy), variant="bf16"))
    assert capfd.readouterr().err == ""
    assert all(torch.equal(found[k], v) for k, v in named.items())
    with refused("teacher.variant", "fp32", "bf16, fp16"):
        load(str(copy), variant="fp32")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("name", LOADERS)
def test_a_missing_shard_is_refused(both, name, variant, tmp_path):
    copy = shutil.copytree(both[name], tmp_path / "t")
    part = "unet" if (copy / "unet").is_dir() else "transformer"
    shards = sorted(
        p for p in (copy / part).glob("*-of-*.safetensors") if (".fp16" in p.name) == bool(variant)
    )
    shards[1].unlink()
    with refused("teacher '*/t'", part):
        load(str(copy), **({"variant": variant} if variant else {}), **options(name))


@pytest.mark.parametrize(
    "source", ["digits", "shapes", "analytic:dial", "mine.py:teacher", "a.safetensors", "b.pkl"]
)
def test_sources_without_variants_refuse_one(source):
    with refused("teacher.variant", source):
        load(source, variant="fp16")


def test_a_recipe_names_a_variant(both):
    teacher = {"source": str(both["sd"]), "variant": "fp16"}
    tree = {"teacher": teacher, "objective": {"name": "dmd2"}, "train": {"steps": 2}}
    assert Recipe.check(tree).teacher.options() == {"variant": "fp16"}


def test_only_the_variants_files_are_downloaded():
    names = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors",
             "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json",
             "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip
    index = {k: ["diffusers", "AutoencoderKL"] for k in ("unet", "vae")}
    with reading("fp16"):
        taken = wanted(index, names, "teacher")
    assert taken == sorted(set(names) - {names[1]})
    assert names[2] not in wanted(index, names, "teacher")


# ---- at the end of a run


def test_students_end_on_the_variant_that_they_began_on(both, tmp_path):
    """A quantised base's student is merged into the variant; so is the base of its LoRA files."""
    teacher = load(str(both["sd"]), variant="fp16", precision="nf4")
    exact = weights(load(str(both["sd"]), variant="fp16", precision="bf16"))
    student = schedulers.student(teacher, 1, None, True, Adapter(rank=2)).eval()
    merged = unwrap(unquantised(student, teacher).denoiser).backbone.state_dict()
    assert all(torch.equal(merged[k], v) for k, v in exact.items())
    folder = base_folder(teacher, {"unet"}, tmp_path)
    assert folder == tmp_path
    half = weights(load(str(both["sd"]), variant="fp16"))
    from diffusers import UNet2DConditionModel

    made = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    assert all(torch.equal(made[k], v) for k, v in half.items())
    plain = load(str(both["sd"]))
    assert base_folder(plain, {"unet"}, tmp_path) == both["sd"]

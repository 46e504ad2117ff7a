"""Whole paths of the README, by its own commands, on small pipelines in the real formats.

A model that the README names by a Hub id lies here as a folder of that name, so the commands are
the README's to the letter. What makes them small stands behind them: two steps, few pictures.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torchvision.utils import save_image

from distill.benchmark.spec import laid_over
from distill.config.recipe import SHIPPED
from distill.tuning import pictures as lesson
from distill.tuning.student import tunable
from students.export.lora_files import COMFYUI, DIFFUSERS, TURBO
from teachers import load
from teachers.families import flux
from teachers.storage.packed import say
from teachers.teacher import EMBEDDED
from tests.helpers import exports, families, gguf_files, lora_formats, packed, single_files
from tests.helpers.command_line import called
from tests.helpers.readme import INLINE, SHELL, blocks_of, commands_of, of_kind, section

OWN = section("Your own model")
LINES = commands_of(blocks_of(OWN))
SDXL, FLUX = "stabilityai/stable-diffusion-xl-base-1.0", "black-forest-labs/FLUX.1-dev"
# The recipes that the README names, and the small pipelines that stand for their models.
NAMED = {"sdxl/dmd2-lora": "sdxl", "sd15/dmd2": "sd", "sd3/dmd2-lora": "sd3.5",
         "flux/dmd2-lora": "flux-dev", "sana/dmd2-lora": "sana",
         "pixart/dmd2-lora": "pixart-sigma"}  # fmt: skip
STEPS = ("train.steps=2", "train.batch=2", "train.accumulate=1", "train.sample_every=0",
         "eval.teacher_steps=2", "eval.protocol=null")  # fmt: skip
SMALL: dict[str, tuple[str, ...]] = {
    "run": STEPS,
    "doctor": ("--structure-only",),
    "compat": ("--samples", "4", "--strengths", "1"),
    "tune": ("--steps", "2", "--teacher-steps", "2", "--samples", "4"),
}


@pytest.fixture
def stand(tmp_path, monkeypatch):
    """The reader's folder, with a file of prompts."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog on a hill\nan owl\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def place(folder: str | Path, name: str) -> None:
    """Let a model's folder stand under the name that the README has for it."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).symlink_to(folder, target_is_directory=True)


def typed(capsys, line, *more) -> tuple[str, str]:
    """What a command line of the README prints, on one line, and what it writes to stderr."""
    program, name, *words = shlex.split(line)
    assert program == "distill"
    code, out, err = called(capsys, name, *words, *SMALL.get(name, ()), *more)
    assert code == 0, err
    return " ".join(out.split()), err


def one(lines, start):
    """The only line that begins so."""
    (line,) = [line for line in lines if line.startswith(start)]
    return line


# ---- any network

NETWORK = """
import torch
from torch import nn


class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 1, 3, padding=1)
        self.time = nn.Linear(1, 4)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x) + self.time(t[:, None])[:, :, None]))
"""
SAMPLE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from sampler import sample
x = sample(Path(sys.argv[1]), 3, seed=1)
assert x.shape == (3, 1, 64) and x.equal(sample(Path(sys.argv[1]), 3, seed=1))
assert not {"teachers", "students", "distill"} & {m.partition(".")[0] for m in sys.modules}
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_network_of_ones_own_with_the_readmes_own_objective(stand, capsys):
    """wrap with the doctor, plan, run, show; then the folder's sampler alone."""
    Path("network.py").write_text(NETWORK)
    out, _ = typed(capsys, one(INLINE, "distill wrap"))
    assert "wrote network_teacher.py" in out and re.search(r"passed: \d+ checks", out)
    for block in of_kind("python") + of_kind("yaml"):
        if block.file:
            Path(block.file).write_text(block.text)
    tree = yaml.safe_load(Path("mine.yaml").read_text())
    assert "teacher: mine.py:function" in OWN
    Path("mine.yaml").write_text(yaml.safe_dump({**tree, "teacher": "network_teacher.py:teacher"}))
    out, _ = typed(capsys, one(INLINE, "distill plan").replace("RECIPE", "mine.yaml"))
    assert "rtx-4090" in out and "GB" in out
    out, _ = typed(capsys, one(SHELL, "distill run mine.yaml"))
    assert out.endswith("student in runs/mine/student"), out[-200:]
    student = Path("runs/mine/student")
    names = {"model.safetensors", "config.json", "sampler.py", "README.md"}
    assert names <= {p.name for p in student.iterdir()}
    out, _ = typed(capsys, f"distill show {student / 'model.safetensors'}")
    assert "steps 1 config.json" in out and "sample() of sampler.py" in out
    words = [sys.executable, "-IB", "-c", SAMPLE, str(student.resolve())]
    assert subprocess.run(words, cwd=stand, capture_output=True, text=True).stderr == ""


# ---- the files that people have


@pytest.fixture
def files(stand, folders, monkeypatch):
    """FLUX.1 as a folder, a file, a GGUF file and bitsandbytes' folder; SDXL as fp16 shards."""
    import diffusers

    shape = flux.Flux.shape.__func__  # whose pictures are of 1024 pixels where nothing says a size
    small = classmethod(lambda cls, pipe, size: shape(cls, pipe, size or 24))
    monkeypatch.setattr(flux.Flux, "shape", small)
    place(folders("flux-dev"), FLUX)
    pipe = load(FLUX, **families.OPTIONS["flux-dev"]).codec.pipe
    state = single_files.network(pipe)
    named = {f"{single_files.NETWORK}{k}": v for k, v in state.items()}
    single_files.save(named, stand / "flux1-dev.safetensors")
    gguf_files.write(state, stand / "flux1-dev-Q8_0.gguf")
    monkeypatch.setitem(sys.modules, "gguf", gguf_files.stand_in())
    shutil.copytree(folders("flux-dev"), "flux1-dev-bnb")
    packed.pack(Path("flux1-dev-bnb/transformer"), "nf4")
    half = diffusers.DiffusionPipeline.from_pretrained(folders("sdxl"), dtype=torch.float16)
    half.save_pretrained("my-sdxl", variant="fp16", max_shard_size="40KB")
    names = [p.name for p in Path("my-sdxl/unet").glob("*.safetensors")]
    assert len(names) > 1 and all(".fp16" in name for name in names)
    return stand


@pytest.mark.slow
def test_the_doctor_reads_the_files_that_people_have(files, capsys):
    """A file with a folder of settings, a GGUF file, bitsandbytes' folder, shards of a variant."""
    line = one(LINES, "distill doctor flux1")
    commands = {
        "flux1-dev.safetensors": line,
        "flux1-dev-Q8_0.gguf": line.replace("flux1-dev.safetensors", "flux1-dev-Q8_0.gguf"),
        "flux1-dev-bnb": "distill doctor flux1-dev-bnb",
    }
    assert "# or flux1-dev-Q8_0.gguf" in OWN
    say.cache_clear()
    for name, command in commands.items():
        out, err = typed(capsys, command)
        assert out.startswith(name) and re.search(r"passed: \d+ checks", out), out
        assert ("nf4" in err) == name.endswith("-bnb")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["distill run flux/dmd2-lora", "distill run sdxl/dmd2-lora t"])
def test_a_file_becomes_a_student(start, files, capsys):
    """The README's lines for a single file and for a variant, to the student and its LoRA files."""
    line = one(LINES, start)
    out, _ = typed(capsys, line, "data.prompts=prompts.txt", "--out", "runs/mine")
    assert "student in runs/mine/student" in out, out
    assert json.loads(Path("runs/mine/summary.json").read_text())["failed"] == {}
    about = json.loads(Path("runs/mine/student/fewstep.json").read_text())
    assert f"teacher.source={about['teacher']} " in line
    out, _ = typed(capsys, f"distill show runs/mine/lora/{DIFFUSERS}")
    assert "steps 4 the header" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_the_recipes_that_the_readme_names_run(name, stand, folders, capsys):
    """Each big model's row of the README, on a small pipeline under the model's own name."""
    if name in ("sdxl/dmd2-lora", "sd15/dmd2"):
        line = one(INLINE, f"distill run {name} data")
    else:
        assert f"`{name}`" in OWN
        line = one(INLINE, "distill run sdxl/dmd2-lora data").replace("sdxl/dmd2-lora", name)
    source = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())["teacher"]["source"]
    place(folders(NAMED[name]), source)
    options = families.OPTIONS.get(NAMED[name], {})
    more = [f"teacher.{k}={v}" for k, v in options.items()]
    with exports.in_this_process():
        out, _ = typed(capsys, line, *more)
    (summary,) = Path("runs").rglob("summary.json")
    assert json.loads(summary.read_text())["failed"] == {}
    assert f"student in {summary.parent}/student" in out
    loads_lora = "lora" in name and "pixart" not in name  # whose stock pipeline loads none
    assert (summary.parent / "lora" / DIFFUSERS).exists() == loads_lora


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_auto_chooses_a_recipe_for_a_model_on_disk(stand, folders, capsys):
    """`distill auto MODEL` of a folder under its Hub id: the plan, its reasons, the file."""
    place(folders("sdxl"), SDXL)
    line = one(INLINE, "distill auto MODEL").replace("MODEL", SDXL)
    out, _ = typed(capsys, line)
    assert "start from" in out and "doctor: " in out and "not asked" not in out
    assert "wrote runs/auto-stable-diffusion-xl-base-1.0/recipe.yaml" in out


# ---- your LoRA, and life after distillation


def recipe_of(model: str, *changes: str) -> None:
    """Write the README's LoRA recipe for a model, laid over by changes that the README has."""
    (block,) = [b for b in blocks_of(OWN) if b.kind == "yaml"]
    tree = yaml.safe_load(block.text)
    for change in changes:
        assert f"`{change}`" in OWN
        tree = laid_over(tree, yaml.safe_load(change))
    tree["teacher"]["source"] = model
    if "captions" in tree["data"]:
        del tree["data"]["prompts"]
    Path("my-recipe.yaml").write_text(yaml.safe_dump(tree))


def style_of(source: str, part: str) -> None:
    """A LoRA file of random factors for a model's network."""
    network = load(source).codec.pipe.unet
    pairs = lora_formats.factors(network, lora_formats.layers_of(network, r".*attn2\.to_v"))
    lora_formats.save(lora_formats.peft(pairs, part), Path("style.safetensors"))


def my_images(caption: str) -> None:
    Path("my_images").mkdir()
    for i in range(20):
        image = torch.zeros(3, 20, 16)
        image[0] = 0.5 + i / 40
        save_image(image, f"my_images/{i}.png")
        Path(f"my_images/{i}.txt").write_text(f"{caption} {'on a hill' if i % 2 else 'at a lake'}")


@pytest.fixture
def few(monkeypatch):
    """Fewer of the pictures that a tuning draws and the prompts that it reads."""
    monkeypatch.setattr(lesson, "PRIOR", 4)
    monkeypatch.setattr(lesson, "OWN_PROMPTS", 30)
    monkeypatch.setattr(lesson, "NEUTRAL_PROMPTS", 10)


ADAPTERS = "teacher: {adapters: [{file: style.safetensors, strength: 0.8}]}"
CAPTIONS = "data: {captions: folder}"
MODELS = {"sdxl": (SDXL, ()), "shapes": ("shapes", (ADAPTERS, CAPTIONS))}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("model", MODELS)
def test_a_student_from_the_doctor_to_its_tuning(model, stand, folders, few, capsys, monkeypatch):
    """The README's lines in their order: SDXL's format plain, and the shapes with a user's LoRA."""
    source, changes = MODELS[model]
    if model == "sdxl":
        place(folders("sdxl"), SDXL)
        place(folders("sdxl"), "path/to/model")
        style_of(SDXL, "unet")
    else:
        place(EMBEDDED["shapes"], "path/to/model")
        shutil.copy(SHIPPED / "shapes/orange/style.safetensors", "style.safetensors")
        Path("folder").mkdir()
        captions = (SHIPPED / "shapes/orange/captions.txt").read_text().splitlines()
        for i, caption in enumerate(captions):
            Path(f"folder/{i}.txt").write_text(caption)
    recipe_of(source, *changes)
    my_images("one z circle")
    seen = {}
    for line in LINES[LINES.index(one(LINES, "distill doctor path")) :]:
        small = ("adapters.rank=4",) if line.startswith("distill run") else ()
        tuning = line.startswith("distill tune")  # whose files are checked in this process
        with exports.in_this_process() if tuning else nullcontext():
            seen[line] = typed(capsys, line, *small)
    for start, words in {
        "distill doctor": ("passed: ",),
        "distill plan": ("rtx-4090", "GB"),
        "distill run": ("student in runs/mine/student", "report in runs/mine/report.html"),
        "distill show": ("steps 4 the header", "sampler LCM", Path(source).name),
        "distill compat": ("shift", "cosine", "style 1", "figures and pictures in"),
        "distill tune": ("steps kept", "concept gained", "student in runs/tuned/student"),
    }.items():
        for line, (out, err) in seen.items():
            if line.startswith(start):
                assert all(word in out for word in words), (line, out, err)
    assert len(seen) == 8 and Path("grid.png").stat().st_size > 500
    shown = seen[one(LINES, "distill show")][0]
    files = {p.name for p in Path("runs/mine/lora").glob("*.safetensors")}
    assert files == {DIFFUSERS, COMFYUI, *(TURBO.values() if changes else ())}
    assert ("style.safetensors" in shown) == bool(changes)
    card = Path("runs/tuned/student/README.md").read_text()
    assert "## Tuning" in card and "steps kept" in Path("runs/tuned/report.html").read_text()
    if changes:
        draws_alike_with_the_joined_file()
        Path("elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        (own,) = tunable("../runs/mine").recipe.teacher.adapters or ()
        assert Path(own.file).samefile(stand / "style.safetensors")


def draws_alike_with_the_joined_file() -> None:
    """The file of both on the plain base, at guidance 1, draws the student's pictures."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(EMBEDDED["shapes"])
    student = diffusers.DiffusionPipeline.from_pretrained("runs/mine/student")
    pipe.load_lora_weights("runs/mine/lora", weight_name=DIFFUSERS)
    pipe.scheduler = type(student.scheduler).from_config(student.scheduler.config)

    def drawn(model):
        model.set_progress_bar_config(disable=True)
        torch.manual_seed(1)
        rng = torch.Generator().manual_seed(0)
        return model("one z circle at the bottom", num_inference_steps=4, guidance_scale=1.0,
                     generator=rng, output_type="pt").images  # fmt: skip

    images = drawn(student)  # of weights in bf16, as the README's recipe rounds them
    torch.testing.assert_close(drawn(pipe), images, atol=0.02, rtol=0)
    pipe.unload_lora_weights()
    assert (drawn(pipe) - images).abs().max() > 0.1
    alone = load_file(f"runs/mine/lora/{TURBO[DIFFUSERS]}")
    both = load_file(f"runs/mine/lora/{DIFFUSERS}")
    assert max(map(len, both.values())) >= max(map(len, alone.values()))

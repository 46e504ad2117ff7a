"""What LoRA files and single files say of themselves: keys, values, graphs, and samples by them."""

import hashlib
import json
import struct
from dataclasses import replace

import diffusers
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open

from students import schedulers
from students.export import folder as exporting
from students.export import lora_files
from students.export.folder import ExportError, load_student, request
from students.export.lora_files import COMFYUI, DIFFUSERS, export_lora
from students.export.single_file import export_single
from students.lora import Adapter, unwrap
from students.metadata import comfyui, keys
from students.metadata.check import check_header, times_used
from students.metadata.header import read_header, replace_metadata
from students.metadata.turbo import describe
from teachers import load
from teachers.process import Tabulated
from tests.helpers import exports, families
from tests.helpers.disturbed import disturbed
from tests.helpers.formats import sd15

# name: (renoise, architecture, steps, σ at the largest count, loaders of its graph)
STUDENTS = {
    "sd": (True, "stable-diffusion-v1/lora", [4, 2, 1],
           [14.614647, 4.260558, 1.612887, 0.719380, 0], {"CheckpointLoaderSimple"}),
    "sd2": (False, "stable-diffusion-v1/lora", [4, 2, 1],
            [14.614647, 4.081731, 1.612887, 0.693205, 0], {"CheckpointLoaderSimple"}),
    "sdxl": (True, "stable-diffusion-xl-v1-base/lora", [4, 2, 1],
             [14.614647, 4.260558, 1.612887, 0.719380, 0], {"CheckpointLoaderSimple"}),
    "sd3": (True, "stable-diffusion-3/lora", [4, 2],
            [1, 0.928205, 0.799283, 0.5, 0], {"CheckpointLoaderSimple", "DualCLIPLoader"}),
    "flux-dev": (False, "flux-1-dev/lora", [4, 2, 1], [1.0, 0.82655, 0.613669, 0.346185, 0],
                 {"UNETLoader", "DualCLIPLoader", "VAELoader"}),
    "sana": (True, "sana/lora", [4, 2], [1, 0.928205, 0.799283, 0.5, 0], None),
    "wan": (True, "wan-2.1/lora", [4, 2], [1, 0.928205, 0.799283, 0.5, 0],
            {"UNETLoader", "CLIPLoader", "VAELoader"}),
}  # fmt: skip


SHIFTS = {"flux-dev": 1.588453}  # e^μ, with μ of 36 tokens; the others have 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of each family's exported student, made once."""
    folders = {}

    def of(name):
        if name not in folders:
            folders[name] = exports.exported(name, tmp_path_factory.mktemp(name), STUDENTS[name][0])
        return folders[name]

    return of


def raw_header(path):
    """The header by its definition: 8 bytes of length, then JSON; and the data section."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.parametrize("name", STUDENTS)
def test_a_lora_file_says_how_it_is_sampled(name, made):
    renoise, architecture, steps, sigmas, loaders = STUDENTS[name]
    folder = made(name)
    tree, data = raw_header(folder / "lora" / DIFFUSERS)
    head = tree["__metadata__"]
    assert all(isinstance(v, str) for v in head.values()) and "alpha" not in head
    assert list(head) == sorted(head)  # safetensors' own order is of chance
    assert json.loads(head["turbo.steps"]) == steps
    assert head["turbo.sampler"] == ("renoise" if renoise else "ode")
    assert (head["turbo.cfg"], head["turbo.strength"]) == ("1.0", "1.0")
    levels = json.loads(head["turbo.sigmas"])
    assert [len(levels[str(k)]) for k in steps] == [k + 1 for k in steps]
    assert levels["4"] == pytest.approx(sigmas, abs=1e-6)
    indices = json.loads(head.get("turbo.timesteps", "null"))
    second = 759 if renoise else 749
    assert (indices or {}).get("4") == ([999, second, 499, second - 500] if "sd" in name[:2] and
                                        name != "sd3" else None)  # fmt: skip
    shift = json.loads(head.get("turbo.shift", "0"))
    assert shift == (0 if indices else pytest.approx(SHIFTS.get(name, 3.0)))
    assert head.get("turbo.embedded_guidance") == ("2.5" if name == "flux-dev" else None)
    assert head["modelspec.architecture"] == architecture
    assert head["modelspec.license"] == "mit"
    assert head["modelspec.usage_hint"].endswith("strength 1")
    assert head["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()
    assert head["modelspec.resolution"] == "x".join([str(teacher_side(folder, name))] * 2)
    assert (
        head["turbo.recipe"]
        == hashlib.sha256(json.dumps(exports.RECIPE, sort_keys=True).encode()).hexdigest()
    )
    assert json.loads(head["turbo.verified"])["max_abs"] < 1e-3
    assert (
        json.loads(head["turbo.scheduler"])["_class_name"]
        == json.loads((folder / "lora/scheduler/scheduler_config.json").read_text())["_class_name"]
    )
    assert ("prompt" in head) == (loaders is not None)


def teacher_side(folder, name):
    """The side in pixels of the teacher's images."""
    return load(str(folder / "teacher"), **families.OPTIONS.get(name, {})).codec.size[-1]


def test_the_base_is_named_without_its_path_and_hashed_without_its_header(made):
    folder = made("sd")
    base = json.loads(read_header(folder / "lora" / DIFFUSERS).metadata["turbo.base"])
    _, data = raw_header(folder / "teacher/unet/diffusion_pytorch_model.safetensors")
    assert base == {"repo": "teacher", "revision": None, "dtype": "float32",
                    "sha256": hashlib.sha256(data).hexdigest()}  # fmt: skip
    assert str(folder) not in json.dumps(raw_header(folder / "lora" / COMFYUI)[0])


def test_peft_reads_the_rank_and_the_layers_of_a_diffusers_file(made):
    path = made("sd") / "lora" / DIFFUSERS
    fields = json.loads(read_header(path).metadata["lora_adapter_metadata"])
    layers = {name.split(".lora_")[0] for name in read_header(path).tensors}
    assert (fields["unet.r"], fields["unet.lora_alpha"]) == (4, 4)
    assert {f"unet.{name}" for name in fields["unet.target_modules"]} == layers
    LoraConfig(**{k.removeprefix("unet."): v for k, v in fields.items()})  # it knows every field
    kohya = read_header(path.with_name(COMFYUI)).metadata  # diffusers refuses alphas beside it
    assert "lora_adapter_metadata" not in kohya and kohya["ss_network_dim"] == "4"


def test_ranks_that_differ_are_named_one_by_one():
    fields = keys.adapter_metadata({"unet.a": 4, "unet.b": 4, "unet.c": 8})
    assert fields["unet.r"] == 4
    assert fields["unet.rank_pattern"] == fields["unet.alpha_pattern"] == {"c": 8}


def test_new_metadata_leave_the_tensors_and_their_places(made, tmp_path):
    path = tmp_path / "copy.safetensors"
    path.write_bytes((made("sd") / "lora" / COMFYUI).read_bytes())
    before, data = raw_header(path)
    replace_metadata(path, {"z": "ü", "a": "1"})
    after, same = raw_header(path)
    assert after.pop("__metadata__") == {"a": "1", "z": "ü"} and before.pop("__metadata__")
    assert (before, data) == (after, same)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "1", "z": "ü"} and set(file.keys()) == before.keys()
    with pytest.raises(ValueError, match="does not fit"):
        replace_metadata(path, {"a": "x" * 100_000})


# ---- graphs


ENCODERS = {  # CLIPLoader's type, by its source; the others have a checkpoint or several files
    "qwen": "qwen_image", "zimage": "lumina2", "lumina": "lumina2", "wan": "wan",
    "chroma": "chroma", "longcat": "longcat_image", "krea2": "krea2", "ernie": "flux2",
    "flux2-dev": "flux2", "flux2-klein": "flux2", "pixart-alpha": "pixart",
    "pixart-sigma": "pixart",
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in families.FAMILIES | families.RECENT if n != "dit"])
def test_the_graph_of_every_family_is_one_that_comfyui_takes(name, tmp_path):
    teacher = load(str(families.build(name, tmp_path)), **families.OPTIONS.get(name, {}))
    for renoise in (True, False):
        student = schedulers.student(teacher, 2, None, renoise, Adapter(rank=2))
        facts = describe(student, teacher, {})
        graph = facts.graph("mine.safetensors", lora=True)
        assert (graph is None) == (name == "sana")
        if graph is not None:
            check_graph(name, renoise, facts, graph)


def check_graph(name, renoise, facts, graph):
    assert comfyui.faults(graph) == []
    assert comfyui.graph_sigmas(graph) == pytest.approx(facts.sigmas[2], abs=1e-6)
    kinds = [node["class_type"] for node in graph.values()]
    (sampler,) = (n["inputs"] for n in graph.values() if n["class_type"] == "KSamplerSelect")
    assert sampler == {"sampler_name": "lcm" if renoise else "euler"}
    assert ("FluxGuidance" in kinds) == (name in ("flux-dev", "flux2-dev"))
    assert ("ModelSamplingDiscrete" in kinds) == (name == "sd2")
    assert ("EmptyFlux2LatentImage" in kinds) == (name in ("ernie", "flux2-dev", "flux2-klein"))
    assert ("QuadrupleCLIPLoader" in kinds) == (name == "hidream")
    assert ("T5TokenizerOptions" in kinds) == (name == "chroma")
    assert ("CLIPTextEncodeLumina2" in kinds) == (name == "lumina")
    types = [n["inputs"]["type"] for n in graph.values() if n["class_type"] == "CLIPLoader"]
    assert types == ([ENCODERS[name]] if name in ENCODERS else [])
    assert not {"ModelSamplingSD3", "ModelSamplingFlux", "ModelSamplingAuraFlow"} & {*kinds}
    (lora,) = (n["inputs"] for n in graph.values() if n["class_type"] == "LoraLoaderModelOnly")
    assert (lora["lora_name"], lora["strength_model"]) == ("mine.safetensors", 1.0)


@pytest.mark.parametrize(("name", "loaders"), [(k, v[-1]) for k, v in STUDENTS.items()])
def test_the_graph_lies_beside_the_file_and_in_its_header(name, loaders, made):
    folder = made(name) / "lora"
    beside = folder / "pytorch_lora_weights.comfyui.json"
    assert beside.exists() == (loaders is not None)
    if loaders is None:
        return
    graph = json.loads(beside.read_text())
    assert json.loads(read_header(folder / DIFFUSERS).metadata["prompt"]) == graph
    assert {n["class_type"] for n in graph.values() if "Loader" in n["class_type"]} == (
        loaders | {"LoraLoaderModelOnly"}
    )
    notes = json.loads((folder / "pytorch_lora_weights.json").read_text())
    assert notes["preferred weight"] == 1.0 and notes["sd version"] in ("SD1", "SDXL", "Unknown")
    # of two files of one content, ComfyUI maps its own whole
    (lora,) = (n["inputs"] for n in graph.values() if n["class_type"] == "LoraLoaderModelOnly")
    assert lora["lora_name"] == (COMFYUI if (folder / COMFYUI).exists() else DIFFUSERS)


def test_a_prediction_that_comfyui_does_not_expect_is_said_in_the_graph():
    for family, usual in (("StableDiffusion", "eps"), ("HunyuanDiT", "v")):
        for predicts in ("eps", "v"):
            request = comfyui.Request(family, "a", "b", [1.0, 0.0], False, (64, 64), predicts)
            nodes = comfyui.graph(request).values()
            said = [n["inputs"]["sampling"] for n in nodes if "sampling" in n["inputs"]]
            assert said == ([] if predicts == usual else [comfyui.PREDICTIONS[predicts]])


def test_a_graph_with_a_fault_is_named():
    build = comfyui.Builder()
    model = build.add("CheckpointLoaderSimple", ckpt_name="a.safetensors")
    assert comfyui.faults(build.nodes) == []
    for inputs in (
        {"text": "a", "clip": model},  # a model is no CLIP
        {"text": "a", "clip": ["9", 1]},  # no such node
        {"text": "a", "clip": ["1", 7]},  # no such output
        {"text": "a"},
        {"text": 3, "clip": ["1", 1]},
    ):
        bad = {**build.nodes, "2": {"class_type": "CLIPTextEncode", "inputs": inputs}}
        assert len(comfyui.faults(bad)) == 1, inputs
    assert comfyui.faults({"1": {"class_type": "Nothing", "inputs": {}}})


def test_sigmas_are_written_without_exponents():
    text = comfyui.sigma_text([14.61464662, 1e-3, 0.0])
    assert text == "14.6146466, 0.0010000, 0.0000000"
    assert [float(v) for v in comfyui.NUMBER.findall(text)] == [14.6146466, 0.001, 0.0]
    assert comfyui.NUMBER.findall("1e-3") == ["1", "-3"]  # what ComfyUI would read


def test_other_betas_than_stable_diffusions_have_no_graph():
    stock = Tabulated.scaled_linear()
    sigmas = [float(stock.log_ratio[i].exp()) for i in (999, 499)]
    assert comfyui.reads_indices([*sigmas, 0.0], [999, 499], False)
    other = [float(Tabulated.linear().log_ratio[i].exp()) for i in (999, 499)]
    assert not comfyui.reads_indices([*other, 0.0], [999, 499], False)


def test_zero_terminal_snr_starts_at_the_end_of_comfyuis_table():
    rescaled = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    process = Tabulated(rescaled.alphas_cumprod)
    sigmas = [float(process.log_ratio[i].exp()) for i in (999, 749, 499, 249)]
    assert sigmas[0] > 1e4
    assert comfyui.comfyui_sigmas(sigmas)[0] == comfyui.ZSNR_SIGMA
    assert comfyui.reads_indices(sigmas, [999, 749, 499, 249], True)


# ---- samples by what the files say


def simulated(net, sigmas, noises, predicts, lcm):
    """ComfyUI's `lcm` and `euler` samplers on its ε, v and flow models, from source.

    Args:
        net: The network's output of x in its own scale and of σ.
    """
    flow = predicts == "flow"
    x = noises[0] * (sigmas[0] if flow else (1 + sigmas[0] ** 2) ** 0.5)
    for s, r, noise in zip(sigmas, sigmas[1:], [*noises[1:], None], strict=False):
        scale = 1.0 if flow else (1 + s**2) ** 0.5
        out = net(x / scale, s)
        clean = x / scale**2 - s / scale * out if predicts == "v" else x - s * out
        if not lcm:
            x = x + (x - clean) / s * (r - s)
        else:
            x = clean if r == 0 else r * noise + (1 - r if flow else 1) * clean
    return x


def comfyui_index(sigma):
    """The index that is nearest to σ in ComfyUI's table, as float64."""
    table = Tabulated.scaled_linear().log_ratio
    return (torch.tensor(sigma, dtype=torch.float64).log() - table).abs().argmin()


class Sampled:
    """An exported student, its network as ComfyUI calls it, and stock diffusers' latents."""

    def __init__(self, folder, steps=4):
        self.generator, self.teacher = load_student(folder / "student")
        self.steps, self.network = steps, unwrap(self.generator.denoiser)
        self.prompts, self.arguments = request(self.generator, self.teacher)
        self.cond = self.teacher.codec.condition(self.prompts)
        self.header = read_header(folder / "lora" / DIFFUSERS).metadata

    def net(self, x, sigma):
        process = self.network.process
        if isinstance(process, Tabulated):
            t = comfyui_index(sigma) / process.last
        else:
            t = process.time(torch.tensor(sigma / (1 - sigma) if sigma < 1 else torch.inf))
        return self.network.call(x, t.float().expand(len(x)), self.cond, None)

    def noises(self):
        """Those that a stock pipeline draws with seed 0, the later ones with seed 1."""
        kind, shape = type(self.network), self.teacher.shape
        rng = torch.Generator().manual_seed(0)
        again = rng if kind.SEEDED else torch.Generator().manual_seed(1)
        first = torch.randn(len(self.prompts), *shape, generator=rng)
        layout = kind.pack(first).shape
        rest = [torch.randn(layout, generator=again) for _ in range(self.steps - 1)]
        return [first, *(kind.unpack(noise, shape) for noise in rest)]

    def stock(self, folder):
        index = json.loads((folder / "student/model_index.json").read_text())
        absent = [k for k, v in index.items() if isinstance(v, list) and v[0] is None]
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder / "student", **dict.fromkeys(absent)
        )
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(1)
        out = pipe(
            num_inference_steps=self.steps, generator=torch.Generator().manual_seed(0),
            **{**self.arguments, "output_type": "latent"},
        )  # fmt: skip
        return type(self.network).unpack(next(iter(out.values())), self.teacher.shape)


@torch.no_grad()
@pytest.mark.parametrize("name", STUDENTS)
def test_comfyuis_samplers_at_these_sigmas_draw_the_stock_pipelines_latents(name, made):
    folder = made(name)
    sampled = Sampled(folder)
    graph = json.loads(sampled.header.get("prompt", "{}"))
    sigmas = comfyui.graph_sigmas(graph) or json.loads(sampled.header["turbo.sigmas"])["4"]
    predicts = {"sd": "eps", "sd2": "v", "sdxl": "eps"}.get(name, "flow")
    lcm = STUDENTS[name][0]
    theirs = sampled.stock(folder)
    ours = simulated(sampled.net, sigmas, sampled.noises(), predicts, lcm)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    wrong = [sigmas[0], sigmas[1] * 0.8, *sigmas[2:]]
    off = simulated(sampled.net, wrong, sampled.noises(), predicts, lcm)
    assert (off - theirs).abs().max() > 5e-3  # or the comparison would show nothing


@torch.no_grad()
def test_comfyuis_simple_schedule_is_diffusers_lcm_and_sgm_uniform_is_not(made):
    """`ModelSamplingDiscrete(lcm)` has the 50 indices 19, 39, …, 999."""
    folder = made("sdxl")
    sampled = Sampled(folder)
    table = Tabulated.scaled_linear().log_ratio[19::20].exp()
    simple = [float(table[-(1 + int(k * 50 / 4))]) for k in range(4)]
    even = torch.linspace(49, 0, 5, dtype=torch.float64)[:-1]  # of the 50, as sgm_uniform takes it
    below = even.floor().long()
    logs = torch.lerp(table.log()[below], table.log()[(below + 1).clamp(max=49)], even - below)
    stated = json.loads(sampled.header["turbo.sigmas"])["4"]
    assert simple == pytest.approx(stated[:-1], rel=1e-6)
    theirs = sampled.stock(folder)
    for sigmas, same in ((simple, True), (logs.exp().tolist(), False)):
        ours = simulated(sampled.net, [*sigmas, 0.0], sampled.noises(), "eps", True)
        assert ((ours - theirs).abs().max() < 1e-3) == same


def test_one_step_of_a_stretched_schedule_is_an_index_error_of_the_stock_scheduler(made):
    """As the card of such a student says; no scheduler of diffusers refuses a step count."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        made("sd3") / "lora/scheduler"
    )
    stock.set_timesteps(4)
    assert len(stock.timesteps) == 4
    stock.set_timesteps(1)
    with pytest.raises(IndexError):
        stock.step(torch.zeros(1), stock.timesteps[0], torch.zeros(1))


# ---- a wrong header is no file


@pytest.fixture
def adapted(made):
    folder = made("sd")
    teacher = load(str(folder / "teacher"))
    student = disturbed(schedulers.student(teacher, 4, None, True, Adapter(rank=4, alpha=8.0)))
    return folder, student.eval(), teacher


@pytest.mark.parametrize("what", ["sigmas", "timesteps"])
def test_a_header_with_a_wrong_time_stops_the_export(what, adapted, monkeypatch, tmp_path):
    folder, student, teacher = adapted

    def planted(*args):
        facts = describe(*args)
        values = getattr(facts, what)
        first, second, *rest = values[4]
        changed = (first, second + (2e-5 if what == "sigmas" else 1), *rest)
        return replace(facts, **{what: {**values, 4: changed}})

    monkeypatch.setattr(lora_files, "describe", planted)
    with exports.in_this_process(), pytest.raises(ExportError, match=f"turbo.{what} at 4 steps"):
        export_lora(student, teacher, folder / "student", tmp_path / "lora")
    assert not list((tmp_path / "lora").glob("*.safetensors"))


def test_a_graph_with_a_wrong_sigma_or_link_is_refused(made, tmp_path):
    folder = made("sd")
    path = tmp_path / "copy.safetensors"
    path.write_bytes((folder / "lora" / COMFYUI).read_bytes())
    stock = diffusers.LCMScheduler.from_pretrained(folder / "lora/scheduler")
    stock.set_timesteps(4)
    used = {4: times_used(stock)}
    check_header(path, used)
    head = read_header(path).metadata
    planted = {
        "its ComfyUI graph at 4 steps": head["prompt"].replace("4.2605", "4.2606"),
        "its ComfyUI graph: node": head["prompt"].replace('["3", 0]', '["99", 0]'),
    }
    for why, prompt in planted.items():
        assert prompt != head["prompt"]
        replace_metadata(path, {**head, "prompt": prompt.replace(" ", "")})
        with pytest.raises(ValueError, match=why):
            check_header(path, used)


# ---- single files


def test_a_single_file_says_the_same_and_its_graph_loads_it_whole(tmp_path):
    torch.manual_seed(0)
    sd15(tmp_path / "scratch").save_pretrained(tmp_path / "teacher")
    teacher = load(str(tmp_path / "teacher"))
    student = disturbed(schedulers.student(teacher, 2)).eval()
    with exports.in_this_process():
        exporting.export(student, teacher, tmp_path / "student", exports.RECIPE)
        export_single(tmp_path / "student", tmp_path / "one.safetensors", lambda _: "mit")
    tree, data = raw_header(tmp_path / "one.safetensors")
    head = tree["__metadata__"]
    assert json.loads(head["turbo.steps"]) == [2, 1] and "turbo.strength" not in head
    assert head["modelspec.architecture"] == "stable-diffusion-v1"
    assert head["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()
    assert json.loads(head["turbo.base"])["repo"] == "teacher"
    assert json.loads(head["turbo.base"])["sha256"]
    assert not any(k.startswith(("ss_network", "lora_")) for k in head)
    # a table of its own betas is not ComfyUI's, so there is no graph (DDIMScheduler's are linear)
    assert "prompt" not in head and not (tmp_path / "one.comfyui.json").exists()

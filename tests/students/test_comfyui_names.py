"""LoRA files by the layers of a transformer's original code, as ComfyUI has and maps them.

What its networks are called and how they fuse layers is restated here from its published source
(`comfy/lora.py`, `comfy/utils.py` and the networks under `comfy/ldm`).
"""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from students import schedulers
from students.export import lora_files
from students.export.combined import to_original
from students.export.folder import ExportError, export
from students.export.lora_files import COMFYUI, DIFFUSERS, export_lora, for_comfyui, forms, possible
from students.lora import Adapter, unwrap
from students.metadata.header import read_header
from teachers import load
from teachers.adapters.files import read
from teachers.adapters.fuse import Fusion
from teachers.families.stable_diffusion import Kolors
from tests.helpers import exports, families
from tests.helpers.disturbed import disturbed
from tests.helpers.refusals import refused


def braces(text):
    """The words that braces stand for, as in a shell: the innermost ones first."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    before, after = text[: match.start()], text[match.end() :]
    return [w for part in match[1].split(",") for w in braces(f"{before}{part}{after}")]


# The linear layers and convolutions of ComfyUI's networks, at the sizes of the small pipelines.
JOINT = "{x_block.{attn.{qkv,proj},mlp.fc{1,2}},context_block.attn.qkv}"
SD3 = (
    f"joint_blocks.{{0,1}}.{JOINT} joint_blocks.{{0,1}}.{{x,context}}_block.adaLN_modulation.1 "
    "joint_blocks.0.context_block.{attn.proj,mlp.fc{1,2}} {t,y}_embedder.mlp.{0,2} "
    "x_embedder.proj context_embedder final_layer.{linear,adaLN_modulation.1}"
)
STREAMS = "double_blocks.0.{img,txt}_{attn.{qkv,proj},mlp.{0,2}} single_blocks.{0,1}.linear{1,2}"
MODULATED = "double_blocks.0.{img,txt}_mod.lin single_blocks.{0,1}.modulation.lin"
ENDS = "img_in txt_in final_layer.linear"
LAST = "final_layer.adaLN_modulation.1"
NEXT = "attention.{qkv,out},feed_forward.w{1,2,3}"
NEXT_ENDS = f"{LAST} final_layer.linear x_embedder t_embedder.mlp.{{0,2}} cap_embedder.1"
REFINERS = f"{{layers.{{0,1}},noise_refiner.0,context_refiner.0}}.{{{NEXT}}}"
AURA = "{c_fc1,c_fc2,c_proj}"
FUSION = "attn.{wq,wk,wv,wo,gate},mlp.{gate,up,down}"
HIDREAM = "{shared_experts,experts.0,experts.1}.w{1,2,3}"
NETWORKS = {
    "sd3": SD3,
    "sd3.5": f"{SD3} joint_blocks.0.x_block.attn2.{{qkv,proj}}",
    "flux-dev": f"{STREAMS} {MODULATED} {ENDS} {LAST} "
                "{time,vector,guidance}_in.{in,out}_layer",
    "flux-schnell": f"{STREAMS} {MODULATED} {ENDS} {LAST} {{time,vector}}_in.{{in,out}}_layer",
    "flux2-dev": f"{STREAMS} {ENDS} {LAST} {{time,guidance}}_in.{{in,out}}_layer "
                 "double_stream_modulation_{img,txt}.lin single_stream_modulation.lin",
    "flux2-klein": f"{STREAMS} {ENDS} {LAST} time_in.{{in,out}}_layer "
                   "double_stream_modulation_{img,txt}.lin single_stream_modulation.lin",
    "longcat": f"{STREAMS} {MODULATED} {ENDS} {LAST} time_in.{{in,out}}_layer",
    "chroma": f"{STREAMS} {ENDS} "
              "distilled_guidance_layer.{in_proj,out_proj,layers.0.{in,out}_layer}",
    "lumina": f"{REFINERS} {{layers.{{0,1}},noise_refiner.0}}.adaLN_modulation.1 {NEXT_ENDS}",
    "zimage": f"{REFINERS} {{layers.{{0,1}},noise_refiner.0}}.adaLN_modulation.0 {NEXT_ENDS}",
    "auraflow": f"double_layers.0.{{attn.w{{1,2}}{{q,k,v,o}},mlp{{X,C}}.{AURA},mod{{X,C}}.1}} "
                f"single_layers.0.{{attn.w1{{q,k,v,o}},mlp.{AURA},modCX.1}} t_embedder.mlp.{{0,2}} "
                "cond_seq_linear init_x_linear final_linear modF.1",
    "ernie": "layers.{0,1}.{self_attention.{to_q,to_k,to_v,to_out.0},"
             "mlp.{gate_proj,up_proj,linear_fc2}} x_embedder.proj text_proj "
             "time_embedding.linear_{1,2} adaLN_modulation.1 final_norm.linear final_linear",
    "hidream": "double_stream_blocks.0.block.{adaLN_modulation.1,attn1.to_{q,k,v,out}{,_t},"
               f"ff_i.{HIDREAM},ff_t.w{{1,2,3}}}} single_stream_blocks.0.block."
               f"{{adaLN_modulation.1,attn1.to_{{q,k,v,out}},ff_i.{HIDREAM}}} {LAST} "
               "final_layer.linear x_embedder.proj caption_projection.{0,1,2}.linear "
               "t_embedder.timestep_embedder.linear_{1,2} p_embedder.pooled_embedder.linear_{1,2}",
    "hunyuan": "blocks.{0,1,2,3}.{attn1.{Wqkv,out_proj},attn2.{q_proj,kv_proj,out_proj},"
               "mlp.fc{1,2},default_modulation.1} blocks.3.skip_linear mlp_t5.{0,2} "
               "{t_embedder.mlp,extra_embedder}.{0,2} pooler.{q,k,v,c}_proj x_embedder.proj "
               f"final_layer.linear {LAST}",
    "krea2": f"blocks.{{0,1}}.{{{FUSION}}} txtfusion.{{layerwise,refiner}}_blocks.0.{{{FUSION}}} "
             "txtfusion.projector first tmlp.{0,2} tproj.1 txtmlp.{1,3} last.linear",
    "pixart-alpha": "blocks.{0,1}.{attn.{qkv,proj},cross_attn.{q_linear,kv_linear,proj},"
                    "mlp.fc{1,2}} {t,csize,ar}_embedder.mlp.{0,2} y_embedder.y_proj.fc{1,2} "
                    "x_embedder.proj t_block.1 final_layer.linear",
    "pixart-sigma": "blocks.{0,1}.{attn.{qkv,proj},cross_attn.{q_linear,kv_linear,proj},"
                    "mlp.fc{1,2}} t_embedder.mlp.{0,2} y_embedder.y_proj.fc{1,2} "
                    "x_embedder.proj t_block.1 final_layer.linear",
    "qwen": "transformer_blocks.{0,1}.{img_mod.1,txt_mod.1,{img,txt}_mlp.net.{0.proj,2},"
            "attn.{to_{q,k,v,out.0,add_out},add_{q,k,v}_proj}} img_in txt_in norm_out.linear "
            "proj_out time_text_embed.timestep_embedder.linear_{1,2}",
    "wan": "blocks.{0,1}.{{self,cross}_attn.{q,k,v,o},ffn.{0,2}} patch_embedding "
           "{time,text}_embedding.{0,2} time_projection.1 head.head",
}  # fmt: skip

# How the rows of a layer are those of ours; ~ has the halves in the other order.
TO = "attn.to_{q,k,v}"
ADD = "attn.add_{q,k,v}_proj"
LINEAR1 = "{attn.to_q,attn.to_k,attn.to_v,proj_mlp}"
ROWS = {
    "sd3": {"joint_blocks.1.x_block.attn.qkv": f"transformer_blocks.1.{TO}",
            "joint_blocks.1.context_block.attn.qkv": f"transformer_blocks.1.{ADD}",
            "joint_blocks.1.context_block.adaLN_modulation.1":
                "~transformer_blocks.1.norm1_context.linear",
            "joint_blocks.0.context_block.adaLN_modulation.1":
                "transformer_blocks.0.norm1_context.linear", LAST: "~norm_out.linear"},
    "sd3.5": {"joint_blocks.0.x_block.attn2.qkv": "transformer_blocks.0.attn2.to_{q,k,v}",
              "joint_blocks.0.x_block.attn.proj": "transformer_blocks.0.attn.to_out.0"},
    "flux-dev": {"double_blocks.0.img_attn.qkv": f"transformer_blocks.0.{TO}",
                 "double_blocks.0.txt_attn.qkv": f"transformer_blocks.0.{ADD}",
                 "single_blocks.1.linear1": f"single_transformer_blocks.1.{LINEAR1}",
                 "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.net.2",
                 "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
                 LAST: "~norm_out.linear"},
    "flux2-dev": {"double_blocks.0.txt_attn.qkv": f"transformer_blocks.0.{ADD}",
                  "single_blocks.1.linear1": "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
                  LAST: "~norm_out.linear"},
    "longcat": {"single_blocks.0.linear1": f"single_transformer_blocks.0.{LINEAR1}",
                LAST: "~norm_out.linear"},
    "chroma": {"double_blocks.0.img_attn.qkv": f"transformer_blocks.0.{TO}",
               "single_blocks.1.linear1": f"single_transformer_blocks.1.{LINEAR1}"},
    "lumina": {"layers.1.attention.qkv": f"layers.1.{TO}",  # with fewer keys than queries
               "layers.0.feed_forward.w3": "layers.0.feed_forward.linear_3",
               LAST: "norm_out.linear_1"},
    "zimage": {"context_refiner.0.attention.qkv": "context_refiner.0.attention.to_{q,k,v}",
               LAST: "all_final_layer.2-1.adaLN_modulation.1"},
    "auraflow": {"double_layers.0.attn.w1q": "joint_transformer_blocks.0.attn.add_q_proj",
                 "double_layers.0.attn.w2k": "joint_transformer_blocks.0.attn.to_k",
                 "modF.1": "~norm_out.linear"},
    "hunyuan": {"blocks.2.attn1.Wqkv": "blocks.2.attn1.to_{q,k,v}",
                "blocks.2.attn2.kv_proj": "blocks.2.attn2.to_{k,v}",
                "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
                LAST: "~norm_out.linear"},
    "krea2": {"txtfusion.refiner_blocks.0.mlp.gate": "text_fusion.refiner_blocks.0.ff.gate"},
    "pixart-sigma": {"blocks.1.attn.qkv": "transformer_blocks.1.attn1.to_{q,k,v}",
                     "blocks.1.cross_attn.kv_linear": "transformer_blocks.1.attn2.to_{k,v}"},
    "wan": {"blocks.1.cross_attn.k": "blocks.1.attn2.to_k", "blocks.0.ffn.0":
            "blocks.0.ffn.net.0.proj"},
}  # fmt: skip


class Made:
    """A pipeline's student with LoRA on all layers, its files, and the changes by our own names."""

    def __init__(self, name, root, targets=None):
        self.folder = families.build(name, root / "teacher")
        self.options = families.OPTIONS.get(name, {})
        teacher = self.teacher = load(str(self.folder), **self.options)
        kinds = nn.Linear | nn.Conv2d | nn.Conv3d
        layers = unwrap(teacher.denoiser).backbone.named_modules()
        all_layers = tuple(sorted(k for k, m in layers if isinstance(m, kinds)))
        adapter = Adapter(rank=2, alpha=6.0, targets=all_layers if targets is None else targets)
        self.student = disturbed(schedulers.student(teacher, 2, None, True, adapter)).eval()
        self.states, self.without = forms(self.student, teacher)
        state = self.student.denoiser.trainable()
        plain = {k.removeprefix("backbone."): v for k, v in state.items()}
        names = {k.split(".lora_")[0] for k in plain}
        pairs = {
            m: [next(v for k, v in plain.items() if k.startswith(f"{m}.lora_{side}"))
                for side in "AB"] for m in names
        }  # fmt: skip
        self.changes = {m: 3 * b.flatten(1) @ a.flatten(1) for m, (a, b) in pairs.items()}

    @property
    def file(self):
        return self.states[COMFYUI]

    def rows(self, layer):
        """The change of a layer of the file."""
        a, b = (self.file[f"diffusion_model.{layer}.lora_{side}.weight"] for side in "AB")
        return b.flatten(1) @ a.flatten(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    students = {}

    def of(name):
        if name not in students:
            students[name] = Made(name, tmp_path_factory.mktemp(name))
        return students[name]

    return of


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_every_key_is_a_layer_of_comfyuis_network_and_reads_back(name, made, tmp_path):
    student = made(name)
    assert possible(student.student, student.teacher)
    expected = {layer for part in NETWORKS[name].split() for layer in braces(part)}
    layers = {key.split(".lora_")[0] for key in student.file}
    assert layers == {f"diffusion_model.{layer}" for layer in expected}

    save_file({k: v.contiguous() for k, v in student.file.items()}, tmp_path / "a.safetensors")
    network = unwrap(load(str(student.folder), **student.options).denoiser).backbone
    file = read(tmp_path / "a.safetensors", "file", 1.0, "transformer", {"transformer": network})
    found = Fusion((file,)).changes("transformer")
    assert found.keys() == student.changes.keys()
    for module, change in student.changes.items():
        (pair,) = found[module]
        torch.testing.assert_close(pair.delta().flatten(1), change, atol=1e-6, rtol=0)
        assert change.abs().max() > 1e-3

    for layer, ours in ROWS.get(name, {}).items():
        parts = [student.changes[m] for m in braces(ours.removeprefix("~"))]
        rows = torch.cat(parts)
        if ours.startswith("~"):
            assert not torch.allclose(student.rows(layer), rows, atol=1e-3)
            rows = torch.cat([*reversed(rows.chunk(2))])
        torch.testing.assert_close(student.rows(layer), rows, atol=1e-6, rtol=0)


def by_kohya(state):
    """The same in kohya's form, which diffusers' converter of Z-Image knows alone."""
    return {
        "lora_unet_" + k.removeprefix("diffusion_model.").partition(".lora_")[0].replace(".", "_")
        + (".lora_down.weight" if "lora_A" in k else ".lora_up.weight"): v
        for k, v in state.items()
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["qwen", "wan", "ernie", "flux2-dev", "hidream", "krea2", "zimage"]
)
def test_diffusers_own_converters_know_these_names(name, made):
    """Of attention layers; it knows few others, and has FLUX.2's last norm the wrong way round."""
    student = made(name)
    inner = [m for m in student.changes if re.search(r"(layers|blocks)\.\d+\..*att", m)]
    kept = {k: v for k, v in student.file.items() if "blocks." in k or ".layers." in k}
    kept = by_kohya(kept) if name == "zimage" else kept
    found = type(student.teacher.codec.pipe).lora_state_dict(kept)
    state = found[0] if isinstance(found, tuple) else found
    for module in inner:
        a, b = (state[f"transformer.{module}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(b @ a, student.changes[module], atol=1e-6, rtol=0)
    assert len(inner) >= 8


@torch.no_grad()
def test_a_fused_layer_has_zeros_for_what_is_not_adapted(tmp_path):
    student = Made("flux-schnell", tmp_path, ["transformer_blocks.0.attn.to_v"])
    layer = "double_blocks.0.img_attn.qkv"
    assert [*student.file] == [f"diffusion_model.{layer}.lora_{side}.weight" for side in "AB"]
    assert len(student.file[f"diffusion_model.{layer}.lora_A.weight"]) == 2
    (change,) = student.changes.values()
    q, k, v = student.rows(layer).chunk(3)
    assert not q.any() and not k.any()
    torch.testing.assert_close(v, change)


def test_networks_that_comfyui_lacks_are_refused_in_one_line(tmp_path):
    student = schedulers.student(
        load(str(families.build("sana", tmp_path))), 2, None, True, Adapter(rank=2)
    )
    states, without = forms(student, load(str(tmp_path)))
    assert [*states] == [DIFFUSERS] and [*without] == [COMFYUI]
    assert "ComfyUI's core has no Sana" in without[COMFYUI]
    with refused("LoRA", "ComfyUI's core has no Kolors"):
        for_comfyui({}, Kolors.__new__(Kolors))


def test_a_layer_without_a_name_there_is_named(made):
    network = unwrap(made("wan").student.denoiser).backbone
    state = {f"transformer.nowhere.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    with refused("LoRA", "nowhere"):
        to_original(state, network)
    with refused("LoRA", "Linear"):  # a network that is not known
        to_original(state, nn.Linear(2, 2))


# ---- written, once the weights are the student's


def export_here(student, root):
    with exports.in_this_process():
        export(student.student, student.teacher, root / "student", exports.RECIPE)
        export_lora(student.student, student.teacher, root / "student", root / "lora")


def test_a_pipeline_that_loads_no_lora_has_the_file_for_comfyui(tmp_path):
    student = Made("hunyuan", tmp_path, ["blocks.1.attn1.to_q", "blocks.1.attn2.to_k"])
    assert "loads no LoRA" in student.without[DIFFUSERS]
    export_here(student, tmp_path)
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    assert file.name == COMFYUI and len(read_header(file).tensors) == 4
    assert '"of": "weights"' in read_header(file).metadata["turbo.verified"]


@pytest.mark.parametrize("fault", ["scale", "layer"])
def test_a_file_with_other_weights_than_the_students_is_not_written(fault, tmp_path, monkeypatch):
    student = Made("zimage", tmp_path, ["layers.0.attention.to_q", "layers.1.feed_forward.w1"])

    def wrong(lora, network):
        state = to_original(lora, network)
        layer = next(iter(state)).split(".lora_")[0]
        changed = {k: 1.01 * v if k.startswith(layer) and "_B" in k else v for k, v in
                   state.items()}  # fmt: skip
        return changed if fault == "scale" else {k: v for k, v in state.items() if layer not in k}

    monkeypatch.setattr(lora_files, "to_original", wrong)
    with pytest.raises(ExportError, match=r"comfyui_lora.*differs from the student"):
        export_here(student, tmp_path)
    assert not list((tmp_path / "lora").glob("*.safetensors"))

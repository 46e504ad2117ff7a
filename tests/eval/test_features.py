"""Extractors, resizes and weights: each rule is its source's, and what is missing is said."""

import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

from eval import fetch, resize
from eval.errors import MetricError
from eval.metrics import features
from eval.metrics.clip import CLIPEncoders, ClipScore, PickScore
from eval.metrics.features import (
    CLIP,
    EXTRACTORS,
    Extractor,
    Prepared,
    clip_image,
    dinov2,
    extractor,
    normalised,
    pool,
    pool_of_resized,
)
from eval.metrics.perceptual import Agreement, Diversity, lpips, psnr
from eval.samples import Samples
from tests.helpers.families import clip_tokenizer

# CLIP's own, by Pillow: version 5 of transformers gives it this name, version 4 the plain one.
PROCESSOR = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def pictures(n=2, h=40, w=40, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, h, w), generator=rng, dtype=torch.uint8)


def photos(images):
    return [Image.fromarray(v.permute(1, 2, 0).numpy()) for v in images]


# resizes


@pytest.mark.parametrize("side", [32, 400])
def test_the_clean_resize_is_clean_fids(side):
    from cleanfid.resize import build_resizer

    images = pictures(h=side, w=side + 7)
    theirs = np.stack([build_resizer("clean")(np.asarray(p)) for p in photos(images)])
    ours = resize.pil_float(images, 299).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_dinov2_resize_and_normalisation_are_those_of_dgm_eval():
    stock = Compose([
        Resize((224, 224), InterpolationMode.BICUBIC), ToTensor(),
        Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    images = pictures(h=300, w=260)
    ours = normalised(resize.pil_bytes(images, 224), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(ours, torch.stack([stock(p) for p in photos(images)]))


def test_a_centre_crop_of_odd_rests_is_torchvisions():
    from torchvision.transforms.functional import center_crop

    for h, w in ((41, 30), (30, 43), (33, 32)):
        images = pictures(h=h, w=w)
        assert torch.equal(resize.centre_square(images), center_crop(images, min(h, w)))
        assert torch.equal(resize.centre_patch(images, 21), center_crop(images, 21))
    assert resize.centre_patch(images, 300) is images


def test_the_coco_preparation_is_pillows_lanczos_of_the_central_square():
    images = pictures(n=1, h=50, w=60)
    square = photos(images)[0].crop((5, 0, 55, 50)).resize((24, 24), Image.Resampling.LANCZOS)
    found = resize.centre_lanczos(images, 24)[0].permute(1, 2, 0)
    assert np.array_equal(found, np.asarray(square))


@pytest.mark.parametrize(
    ("h", "w", "corner"),  # of the square, left and top: half a pixel is left out
    [(50, 61, (5, 0)), (61, 50, (0, 5)), (400, 337, (0, 31)), (20, 33, (6, 0)), (336, 336, (0, 0))],
)
def test_cmmds_pictures_are_cut_to_the_central_square_and_then_resized_by_pillow(h, w, corner):
    images, side = pictures(h=h, w=w), min(h, w)
    left, top = corner
    squares = [p.crop((left, top, left + side, top + side)) for p in photos(images)]
    expected = [np.asarray(p.resize((336, 336), Image.Resampling.BICUBIC)) for p in squares]
    found = resize.centre_then_resize(images, 336)
    assert found.dtype == torch.float32
    assert np.array_equal(found.permute(0, 2, 3, 1), np.stack(expected))
    assert EXTRACTORS["clip-vitl14-336"].resize is resize.centre_then_resize
    assert EXTRACTORS["clip-vitl14-336"].size == 336


def test_cmmds_embeddings_are_of_the_square_at_the_centre_alone():
    """What lies beside the square changes nothing, and CLIP's mean and deviation are taken off."""
    seen = []
    whole = EXTRACTORS["clip-vitl14-336"]
    of = Extractor("a", "1", 3, 8, whole.resize, lambda: lambda x: seen.append(x) or x.mean((2, 3)))
    images = pictures(n=1, h=20, w=33)
    beside = images.clone()
    beside[..., :6], beside[..., 26:] = 0, 255
    assert torch.equal(of(images), of(beside))
    assert seen[0].shape == (1, 3, 8, 8)
    flat = normalised(torch.full((1, 3, 1, 1), 255.0), CLIP).flatten()
    means, stds = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert flat.tolist() == pytest.approx([(1 - m) / s for m, s in zip(means, stds)], rel=1e-6)


@pytest.mark.parametrize(("h", "w"), [(50, 61), (61, 50), (47, 30), (28, 90), (33, 28), (40, 40)])
def test_clips_own_preparation_is_its_processors_whatever_the_shape(h, w):
    images = pictures(h=h, w=w)
    processor = PROCESSOR(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    theirs = processor(photos(images), return_tensors="pt")["pixel_values"]
    found = normalised(resize.resize_then_centre(images, 28), CLIP)
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


# extractors


class Graph(torch.nn.Module):
    """Stands in for the Inception graph: same calls, features that show what reached them."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.AdaptiveAvgPool2d(2)

    def forward(self, images, return_features: bool = False, no_output_bias: bool = False):
        if return_features:
            return self.layers(images)
        return self.layers(images).flatten(1).softmax(1)


@pytest.fixture
def graph(monkeypatch, tmp_path):
    path = tmp_path / "graph.pt"
    torch.jit.script(Graph()).save(str(path))
    monkeypatch.setattr(fetch, "download", lambda url, digest: path)


def test_clean_inception_is_fed_normalised_pixels_at_299_and_the_others_bytes(graph):
    from eval.metrics.features import inception, logits

    flat = torch.full((3, 3, 32, 32), 192, dtype=torch.uint8)
    clean = Extractor("a", "1", 12, 299, resize.pil_float, lambda: inception(pool_of_resized))
    edm = Extractor("b", "1", 12, 299, resize.untouched, lambda: inception(pool))
    assert torch.allclose(clean(flat), torch.full((3, 12), (192 - 128) / 128))
    assert torch.allclose(edm(flat), torch.full((3, 12), 192.0))
    sure = Extractor("c", "1", 12, 299, resize.untouched, lambda: inception(logits))
    assert torch.allclose(sure(flat).exp(), torch.full((3, 12), 1 / 12))


@pytest.mark.parametrize(("name", "mode"), [("clean", "clean"), ("edm", "legacy_tensorflow")])
def test_inception_features_are_clean_fids_of_the_same_graph(name, mode, monkeypatch, tmp_path):
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    path = tmp_path / "inception-2015-12-05.pt"
    graph = Graph()
    graph.layers = torch.nn.Sequential(torch.nn.AdaptiveMaxPool2d(3), torch.nn.Conv2d(3, 2048, 3))
    torch.jit.script(graph).save(str(path))
    monkeypatch.setattr(fetch, "download", lambda url, digest: path)
    features._loaded.cache_clear()
    images = pictures(3, 50, 67)  # stretched, not cropped
    theirs = InceptionV3W(str(tmp_path), download=False, resize_inside=mode != "clean")
    fed = np.stack([build_resizer(mode)(np.asarray(p)) for p in photos(images)])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(fed).permute(0, 3, 1, 2).float())
    found = extractor(f"inception-{name}")(images)
    features._loaded.cache_clear()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_grey_pictures_are_read_as_three_equal_channels_and_others_refused():
    seen = []

    def network(x):
        seen.append(x)
        return x.flatten(1)

    grey = Extractor("a", "1", 48, 8, resize.untouched, lambda: network, batch=2)
    assert grey(pictures(5, 4, 4)[:, :1]).shape == (5, 48)
    assert [len(x) for x in seen] == [2, 2, 1] and torch.equal(seen[0][:, 0], seen[0][:, 2])
    with pytest.raises(MetricError, match=r"torch.float32 .*give uint8"):
        grey(torch.rand(2, 3, 4, 4))


def test_dinov2_features_are_the_class_token_of_the_stock_model(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
    )
    transformers.Dinov2Model(config).eval().save_pretrained(tmp_path)
    stock = transformers.Dinov2Model.from_pretrained(tmp_path).eval()
    prepared = resize.pil_bytes(pictures(h=70, w=60), 56)
    with torch.no_grad():
        theirs = stock(
            normalised(prepared, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        ).pooler_output
    torch.testing.assert_close(dinov2(str(tmp_path), "")(prepared), theirs)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP model of random weights, in the layout of the Hub."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer(folder / "scratch")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(
        text_config={
            **small, "vocab_size": len(tokenizer), "max_position_embeddings": 40,
            "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end,
        },
        vision_config={**small, "image_size": 28, "patch_size": 14}, projection_dim=16,
    )  # fmt: skip
    transformers.CLIPModel(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor.save_pretrained(folder)
    return folder


def test_clip_cosines_are_those_of_the_stock_model_and_processor(clip):
    images, prompts = pictures(3, 50, 67), ["a cat", "two dogs", "x"]
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    tokens = tokenizer(prompts, padding="max_length", max_length=40, return_tensors="pt")
    processor = PROCESSOR.from_pretrained(clip)
    with torch.no_grad():
        out = model(
            pixel_values=processor(photos(images), return_tensors="pt")["pixel_values"],
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
    pair = CLIPEncoders(str(clip), "main")
    found = pair.cosines(images, prompts)
    theirs = torch.cosine_similarity(out.image_embeds, out.text_embeds).double()
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-4)
    scored = PickScore(pair)(Samples(images, prompts))["pick_score"]
    scale = model.logit_scale.exp().item()
    assert scored == pytest.approx(scale * theirs.mean().item(), rel=1e-3, abs=1e-3)


def test_weights_that_transformers_would_make_up_are_refused(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MetricError, match="CLIPModel lacks 1 of its weights"):
        fetch.pretrained("CLIPModel", str(tmp_path / "clip"), "")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(MetricError, match="holds no CLIPModel"):
        fetch.pretrained("CLIPModel", str(tmp_path / "clip"), "")


def test_a_state_dict_of_the_hub_is_read_without_unpickling_code(clip, tmp_path, monkeypatch):
    """As openai/clip-vit-large-patch14-336 is stored, which has no safetensors."""
    import huggingface_hub

    shutil.copytree(clip, tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    (tmp_path / "clip" / "model.safetensors").unlink()
    asked = []

    def download(repo, revision, allow_patterns):
        asked.append(allow_patterns[-1])
        if allow_patterns[-1].endswith(".bin"):
            torch.save(weights, tmp_path / "clip" / "pytorch_model.bin")
        return str(tmp_path / "clip")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = fetch.pretrained("CLIPModel", "someone/clip", "main").state_dict()
    assert asked == ["model.safetensors", "pytorch_model.bin"]
    assert torch.equal(found["visual_projection.weight"], weights["visual_projection.weight"])

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "run"),))

    torch.save({"visual_projection.weight": Evil()}, tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(MetricError, match="holds no CLIPModel"):
        fetch.pretrained("CLIPModel", str(tmp_path / "clip"), "")
    assert not (tmp_path / "run").exists()


def test_model_prefix_and_resolution_are_in_the_clip_scores_name_and_change_it(clip):
    samples = Samples(pictures(4, 50, 61), ["a", "b", "c", "d"])
    plain = ClipScore(str(clip), "", prefix="", resolution=50)
    prefixed = ClipScore(str(clip), "", prefix="A photo depicts ", resolution=50)
    (a,), (b,) = (list(m(samples).items()) for m in (plain, prefixed))
    assert a[0] == f"clip_score[{clip.name}, '', 50]"
    assert b[0] == f"clip_score[{clip.name}, 'A photo depicts', 50]"
    assert a[1] != b[1]
    square = resize.centre_lanczos(samples.images, 50)
    expected = plain.encoders.cosines(square, samples.prompts).mean().item()
    assert a[1] == pytest.approx(expected, abs=1e-6)


def test_the_prefix_stands_before_the_prompt():
    class Hears:
        def cosines(self, images, prompts):
            heard.extend(prompts)
            return torch.ones(len(prompts)).double()

        mean, name = CLIPEncoders.mean, "clip"

    heard = []
    metric = ClipScore("clip", "", resolution=8)
    metric.encoders = Hears()
    metric(Samples(pictures(2, 8, 8), ["a cat", "two dogs"]))
    assert heard == ["A photo depicts a cat", "A photo depicts two dogs"]


def test_cmmds_embeddings_have_length_one_and_are_the_stock_models(clip):
    stock = transformers.CLIPModel.from_pretrained(clip).eval()
    prepared = resize.centre_then_resize(pictures(h=50, w=61), 28)
    with torch.no_grad():
        theirs = stock(
            pixel_values=normalised(prepared, CLIP), input_ids=torch.ones(2, 3, dtype=torch.long)
        ).image_embeds
    found = clip_image(str(clip), "")(prepared)
    torch.testing.assert_close(found, theirs / theirs.norm(dim=1, keepdim=True))


def test_extractors_say_their_rule_and_wrong_names_the_nearest():
    assert (
        extractor("inception-clean").rule
        == "inception-clean inception-2015-12-05, pil_float to 299"
    )
    prepared = Prepared(resize.centre_lanczos, 256, EXTRACTORS["inception-clean"])
    assert prepared.rule.startswith("centre_lanczos to 256, then inception-clean")
    assert prepared.name == "inception-clean-centre_lanczos-256"
    with pytest.raises(MetricError, match="did you mean 'inception-clean'"):
        extractor("inception-cleen")


# what is not there


@pytest.fixture
def offline(monkeypatch, tmp_path):
    from urllib.error import URLError

    import huggingface_hub

    def refuse(*_, **__):
        raise URLError("no network")

    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return tmp_path


@pytest.mark.parametrize("name", ["inception-clean", "dinov2-vitl14", "clip-vitl14-336"])
def test_weights_that_are_not_to_be_had_are_one_line(offline, name):
    with pytest.raises(MetricError, match="cannot be downloaded") as caught:
        extractor(name)(pictures())
    assert "\n" not in str(caught.value) and "no network" in str(caught.value)


def test_weights_of_another_hash_are_refused(offline):
    path = offline / "weights" / "net.pt"
    path.parent.mkdir()
    path.write_bytes(b"something else")
    with pytest.raises(MetricError, match="not the published file"):
        fetch.download("https://example.org/net.pt", "0" * 64)


# pictures against pictures


def apart(a, b):
    return (a.float() - b.float()).abs().flatten(1).mean(1)


def test_diversity_is_the_mean_over_pairs_and_then_prompts():
    levels = torch.tensor([0, 10, 40, 100, 100], dtype=torch.uint8)
    images = levels.view(5, 1, 1, 1).expand(5, 3, 8, 8)
    samples = Samples(images, ["a", "b", "a", "a", "b"])
    found = Diversity(apart, size=8)(samples)["lpips_diversity"]
    assert found == pytest.approx(((40 + 100 + 60) / 3 + 90) / 2)
    with pytest.raises(MetricError, match="'b' has one image"):
        Diversity(apart)(Samples(images[:3], ["a", "b", "a"]))


def test_diversity_sees_all_of_a_picture_stretched_by_pillows_lanczos():
    """As DMD2's script resizes them, which cuts nothing off."""
    images, seen = pictures(2, 20, 33), []

    def keep(a, b):
        seen.extend([a, b])
        return apart(a, b)

    Diversity(keep, size=16)(Samples(images, ["a", "a"]))
    expected = [np.asarray(p.resize((16, 16), Image.Resampling.LANCZOS)) for p in photos(images)]
    assert np.array_equal(torch.cat(seen).permute(0, 2, 3, 1), np.stack(expected))


def test_agreement_with_the_teacher_is_by_sample():
    images = pictures(3)
    shifted = (images.clamp(max=245) + 10).to(torch.uint8)
    found = Agreement(lambda prompts: images.clamp(max=245), apart)(Samples(shifted, ["a"] * 3))
    assert found["teacher_lpips"] == pytest.approx(10)
    assert found["teacher_psnr"] == pytest.approx(20 * np.log10(255 / 10))
    with pytest.raises(MetricError, match="sample both for the same prompts"):
        Agreement(lambda p: images[:2], apart)(Samples(images, ["a"] * 3))


def test_the_signal_to_noise_ratio_is_torchmetrics_definition():
    a, b = pictures(2, seed=1), pictures(2, seed=2)
    error = ((a.numpy() / 255.0 - b.numpy() / 255.0) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(psnr(a, b), -10 * np.log10(error), rtol=1e-6)


def test_lpips_puts_the_trunks_weights_where_the_package_would(monkeypatch):
    package = pytest.importorskip("lpips")
    from torchvision.models import alexnet

    torch.manual_seed(3)
    trunk = alexnet().state_dict()
    monkeypatch.setattr(fetch, "state_dict", lambda url: trunk)
    theirs = package.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    own = {k.split(".", 1)[1]: v for k, v in theirs.net.named_parameters()}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(trunk[f"features.{name}"])
    a, b = pictures(2, 64, 64, 1), pictures(2, 64, 64, 2)
    lpips.cache_clear()
    found = lpips("alex")(a, b)
    lpips.cache_clear()
    with torch.no_grad():
        expected = theirs(a.float() / 127.5 - 1, b.float() / 127.5 - 1).flatten()
    torch.testing.assert_close(found, expected)
    assert (found > 0).all()
    with pytest.raises(MetricError, match="did you mean 'alex'"):
        lpips("alexx")


def test_a_state_dict_that_holds_code_is_refused_in_a_line_and_not_run(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "run"),))

    monkeypatch.setattr(fetch, "cache", lambda: tmp_path)
    (tmp_path / "weights").mkdir()
    torch.save({"x": Evil()}, tmp_path / "weights" / "net-12345678.pth")
    with pytest.raises(MetricError, match=r"weights net-12345678\.pth") as error:
        fetch.state_dict("https://example.invalid/net-12345678.pth")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()

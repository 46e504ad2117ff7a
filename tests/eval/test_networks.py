"""Which network reads each figure's images, and which figures are held out from a loss."""

import pytest
import torch

from eval import digits, shapes
from eval.metrics.features import EXTRACTORS, GRAPH
from eval.protocols import networks, spec
from eval.protocols.measure import protocol
from eval.samples import Samples, to_uint8
from eval.shapes.classifier import CLASSIFIERS, classifier, labels

CLIP = "openai/clip-vit-large-patch14-336"


@pytest.mark.parametrize("name", spec.names())
def test_every_metric_of_every_protocol_names_its_network(name):
    table = networks.networks(name)
    assert table.keys() == spec.spec(spec.FOLDER / f"{name}.yaml").metrics.keys()
    assert all(table[key] or key in ("accuracy", "variety") for key in table)


def drawn(name):
    """Real images and prompts of an embedded protocol."""
    prompts = protocol(name).prompts
    if name == "digits":
        return Samples(to_uint8(digits.data()[0]), prompts)
    return Samples(shapes.draw(prompts, seed=0), prompts)


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_every_figure_is_known_and_one_distance_stays_held_out(name):
    samples = drawn(name)
    figures = {k for metric in protocol(name).metrics for k in metric(samples)}
    held = networks.held_out(figures, name, [])
    assert held == dict.fromkeys(figures, True)
    held = networks.held_out(figures, name, [name])
    assert {"fd", "fd_bias", "precision", "recall", "density", "coverage"} <= {
        k for k in held if not held[k]
    }
    assert held["fd_second"] and held["fd_second_bias"]
    assert held["accuracy"] == (name == "shapes")  # exact code reads captions


def test_extractors_of_the_same_weights_are_one_network():
    figures = ["fid", "inception_score", "inception_score_std", "precision", "fd_dinov2"]
    held = networks.held_out(figures, "cifar10-50k", [GRAPH])
    assert held == {**dict.fromkeys(figures, False), "fd_dinov2": True}
    key = f"clip_score[{CLIP.rpartition('/')[2]}, '', 336]"
    assert networks.held_out([key, "fid"], "mjhq-30k", [CLIP]) == {key: False, "fid": True}
    assert networks.held_out(["cmmd"], "coco2017-5k", [CLIP]) == {"cmmd": False}


def test_a_figure_that_no_file_gives_is_not_spoken_of():
    assert networks.held_out(["mine", "teacher_lpips"], "digits", ["digits"]) == {}
    assert networks.held_out(["fd"], "closed form", ["digits"]) == {}


def test_the_second_networks_read_as_well_and_otherwise():
    """Of another architecture, they classify unseen images; their features are not the first's."""
    images, truth = digits.data()
    test = digits.held_out(len(images))
    right = digits.classifier("dense")(images[test]).argmax(1) == truth[test]
    assert right.double().mean() > 0.975
    texts = shapes.captions(400, 5)
    logits = classifier("patches")(shapes.draw(texts, 2_000_000).float() / 127.5 - 1)
    guess = torch.stack([v.argmax(1) for v in logits], 1)
    wanted = labels([shapes.parse(c) for c in texts])
    assert (guess == wanted).all(1).double().mean() > 0.95
    for kinds in (CLASSIFIERS, digits.CLASSIFIERS):
        first, second = (
            {type(m) for m in kind().body.modules() if [*m.parameters(recurse=False)]}
            for kind in kinds.values()
        )
        assert first != second


@pytest.mark.parametrize(
    ("name", "shape", "dim"),
    [("digits-dense", (1, 8, 8), 48), ("shapes-patches", (3, 32, 32), 48)],
)
def test_second_features_have_their_length(name, shape, dim):
    extractor = EXTRACTORS[name]
    assert extractor.dim == dim and extractor.network == name
    images = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    assert extractor(images).shape == (3, dim)

"""Engines of small runs, and what is compared of two of them."""

import json

import torch

from distill.config.recipe import Recipe
from distill.data.stream import Stream
from distill.training import build, checkpoint
from tests.helpers.toys import recipe_tree


def made(name, pipelines, out, resume=False, **train):
    tree = recipe_tree(name, pipelines["edm"], **train)
    return build.build(Recipe.check(tree), out, resume)


def stream(engine):
    per = engine.shards
    device, size = engine.accelerator.device, engine.cfg.batch // per
    return Stream(engine.source, device, engine.draws, range(per), per, size)


def weights(engine):
    state = engine.state_dict()
    state.pop("seconds")
    tensors = {}
    tree = checkpoint._pack(state, tensors)
    return json.dumps(tree), tensors


def assert_same(a, b):
    (tree, tensors), (other, others) = weights(a), weights(b)
    assert tree == other
    for key, value in tensors.items():
        assert torch.equal(value, others[key]), key

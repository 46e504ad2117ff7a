"""A student's weights after three steps."""

from pathlib import Path

from distill.config.recipe import Recipe
from distill.training import build
from tests.helpers.toys import recipe_tree


def made(teacher, precision, out):
    tree = recipe_tree("consistency", teacher, steps=3, precision=precision)
    return build.build(Recipe.check(tree), Path(out))


def weights(teacher, precision, out):
    """The student's after three steps."""
    run = made(teacher, precision, out)
    run.engine.train()
    return {k: v.clone() for k, v in run.student.state_dict().items()}

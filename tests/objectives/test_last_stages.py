"""A training that ends before the student learns says so when it begins."""

import pytest

from distill.config.recipe import Recipe
from distill.training import build
from tests.helpers.toys import recipe_tree


@pytest.mark.parametrize(
    ("name", "key"), [("ladd", "frozen_steps"), ("sida", "frozen_steps"), ("fd-loss", "fill")]
)
def test_a_training_that_ends_before_the_student_learns_says_so(
    name, key, pipelines, tmp_path, capsys
):
    tree = recipe_tree(name, pipelines["edm"], steps=2)
    for first, is_told in ((2, True), (1, False)):
        tree["objective"][key] = first
        build.networks(Recipe.check(tree), tmp_path / "run", False)
        said = "".join(capsys.readouterr())
        assert ("training ends at step 2" in said) == is_told

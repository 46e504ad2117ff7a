"""Steps kept, and the distance that it is computed from, in closed form."""

import math

import pytest
import torch

from distill.tuning import figures
from distill.tuning.figures import (
    compared,
    energy_distance,
    equivalent_steps,
    pooled,
    share_gained,
    steps_kept,
)


def normal(n, mean, seed, width=4):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + mean


@pytest.mark.parametrize(
    ("student", "kept"), [(0.25, 1.0), (2.25, 0.0), (1.25, 0.5), (0.0, 1.125), (4.25, -1.0)]
)
def test_steps_kept_is_one_at_the_floor_and_zero_where_the_undistilled_teacher_is(student, kept):
    assert steps_kept(student, undistilled=2.25, floor=0.25) == pytest.approx(kept)


def test_where_the_undistilled_teacher_is_as_good_nothing_can_be_kept():
    assert steps_kept(1.0, undistilled=0.2, floor=0.2) is None


def test_energy_distance_of_points():
    """Of all points at 0 and all at 3 it is twice their distance; of equal ones it is 0."""
    zeros, threes = torch.zeros(5, 1), torch.full((4, 1), 3.0)
    assert energy_distance(zeros, threes) == 6
    assert energy_distance(zeros, zeros) == 0
    spread = torch.tensor([[-1.0], [1.0]])  # 2·1 − 0 − 2
    assert energy_distance(zeros, spread) == 0


def test_energy_distance_has_no_bias_and_grows_with_the_distance():
    same = [energy_distance(normal(30, 0, s), normal(30, 0, 100 + s)) for s in range(30)]
    assert abs(sum(same) / 30) < 4 * torch.tensor(same).std().item() / math.sqrt(30)
    far = [energy_distance(normal(200, 0, 1), normal(200, m, 2)) for m in (0.0, 0.5, 1.0, 2.0)]
    assert far == sorted(far) and far[1] > 0.05


def test_prompts_that_draw_far_apart_leave_no_bias():
    """Two draws of the same forty prompts, each of its own mean: their pairs do not count."""
    means = 5 * normal(40, 0, 9)
    same = [energy_distance(normal(40, 0, s) + means, normal(40, 0, 99 + s) + means)
            for s in range(20)]  # fmt: skip
    assert abs(sum(same) / 20) < 4 * torch.tensor(same).std().item() / math.sqrt(20)


def test_the_teachers_steps_that_a_student_is_worth():
    asked = []

    def distance(k):
        asked.append(k)
        return 10 / k

    assert equivalent_steps(4.0, distance, 25) == 3
    assert asked == [1, 2, 3]  # more steps are not drawn
    assert equivalent_steps(0.1, distance, 5) is None and max(asked) == 5


def test_the_share_of_a_distance_that_is_gained():
    assert share_gained(4.0, 1.0) == 0.75
    assert share_gained(4.0, 4.0) == 0.0
    assert share_gained(0.0, 1.0) is None


def test_a_student_that_learned_nothing_shows_in_the_concept_and_not_in_the_steps():
    """Teacher and pictures are apart; the student is its old self, which draws like the teacher."""
    teacher = {k: normal(150, 0, 1) for k in figures.SETS}
    again = {k: normal(150, 0, 2) for k in figures.SETS}
    pictures = normal(50, 3, 3)
    drawn = {
        "before": {k: normal(150, 0, 4) for k in figures.SETS},
        "after": {k: normal(150, 0, 5) for k in figures.SETS},
        "undistilled": {k: normal(150, 2, 6) for k in figures.SETS},
    }
    row = compared(drawn, teacher, again, pictures)
    assert row["steps_kept"] > 0.95
    assert abs(row["concept_gained"]["student"]) < 0.1
    learned = {**drawn, "after": {**drawn["after"], "concept": normal(150, 3, 7)}}
    assert compared(learned, teacher, again, pictures)["concept_gained"]["student"] > 0.9
    lost = {**drawn, "after": {k: normal(150, 2, 8) for k in figures.SETS}}
    assert abs(compared(lost, teacher, again, pictures)["steps_kept"]) < 0.1


def test_pooled_pixels_are_the_mean_colours_of_parts():
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    images[0, 0, :2, :2] = 255  # the first of 8×8 parts of 2×2 pixels, in red
    values = pooled(images)
    assert values.shape == (1, 192)
    assert values[0, 0] == 1 and values.sum() == 1

"""The cheapest units to remove for a size, and the best form of each layer for one: knapsacks.

Both are solved by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Mapping

GRAIN = 4096  # parts that all the sizes together are counted in


def cheapest(cost: Mapping[str, float], size: Mapping[str, int], least: int) -> list[str]:
    """The units whose sizes sum to at least `least` and whose costs have the smallest sum.

    Costs are taken to add up, as in LAPTOP-Diff (arXiv:2404.11098, section 3). Sizes are rounded
    down to a `GRAIN`-th of their sum, so that what is returned is never too small. Of equal costs,
    the units that come first stay.

    Args:
        cost: What removing each unit costs; those of negative cost are free and always removed.
        size: Of each unit, in weights.

    Raises:
        ValueError: all of them together are smaller.
    """
    if least <= 0:
        return [name for name in cost if cost[name] < 0]
    if sum(size[name] for name in cost) < least:
        raise ValueError("the units together are smaller")
    grain = max(1, sum(size[name] for name in cost) // GRAIN)
    # reached[k]: the least cost of units of k grains and more, k being at most `want`
    want = -(-least // grain)
    if sum(size[name] // grain for name in cost) < want:
        return [*cost]
    best = [0.0] + [float("inf")] * want
    taken: list[list[str]] = [[] for _ in range(want + 1)]
    for name in cost:
        grains, price = size[name] // grain, max(0.0, cost[name])
        for k in range(want, 0, -1):
            before = max(0, k - grains)
            if before != k and best[before] + price < best[k]:
                best[k], taken[k] = best[before] + price, [*taken[before], name]
    free = [name for name in cost if cost[name] < 0 and name not in taken[want]]
    return [name for name in cost if name in taken[want] or name in free]


def choices(
    value: Mapping[str, Mapping[int, float]], size: Mapping[str, Mapping[int, int]], most: int
) -> dict[str, int]:
    """One form of each item, so that sizes sum to at most `most` and values to the largest sum.

    A multiple-choice knapsack, as MixDQ's integer programme is (arXiv:2405.17873). Sizes are
    rounded up to a `GRAIN`-th of `most`, so that what is returned is never too large.

    Args:
        value, size: Of each form of each item; an item has at least one form.

    Raises:
        ValueError: the smallest forms together are larger.
    """
    if sum(min(of.values()) for of in size.values()) > most:
        raise ValueError("the smallest forms together are larger")
    grain = max(1, most // GRAIN)
    room = most // grain
    best = [0.0] * (room + 1)  # best[k]: the largest sum of values in k grains
    taken: list[list[int]] = []  # of each item, its form in a choice of k grains
    for name, forms in value.items():
        after, forms_taken = [float("-inf")] * (room + 1), [0] * (room + 1)
        for form, worth in forms.items():
            grains = -(-size[name][form] // grain)
            for k in range(grains, room + 1):
                if best[k - grains] + worth > after[k]:
                    after[k], forms_taken[k] = best[k - grains] + worth, form
        best = after
        taken.append(forms_taken)
    if best[room] == float("-inf"):  # only rounding makes the smallest forms too large
        return {name: min(forms, key=lambda f: size[name][f]) for name, forms in value.items()}
    found, left = dict[str, int](), room
    for name, forms_taken in reversed([*zip(value, taken, strict=True)]):
        found[name] = forms_taken[left]
        left -= -(-size[name][found[name]] // grain)
    return {name: found[name] for name in value}

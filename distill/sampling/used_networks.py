"""The networks of images that training read, and what they cost the figures: which are held out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from eval import catalogue
from eval.protocols.networks import OF_REWARDS, held_out, networks

LPIPS = "lpips-vgg"  # as `eval.protocols.networks` calls it


def used_networks(recipe: Mapping[str, Any]) -> list[str]:
    """Their names, from a recipe as plain data; recipes of earlier versions may lack sections.

    A reward, or a critic's encoder, is named by `network` in its section, else by its function;
    the networks of built-in rewards are known. The teacher's own features, which no protocol reads,
    are not among them.
    """
    objective, critic = recipe.get("objective") or {}, recipe.get("critic") or {}
    names = [LPIPS] if objective.get("distance") == "lpips" else []
    for reward in (recipe.get("rewards") or {}).values():
        known = OF_REWARDS.get(reward["function"])
        names.append(known or reward.get("network") or reward["function"])
    if encoder := critic.get("encoder"):
        names.append(critic.get("network") or encoder)
    return sorted({*names})


def of_student(sidecar: Mapping[str, Any]) -> list[str]:
    """Those of an exported student, from its sidecar: also what its weights were chosen by."""
    recipe, chosen_by = sidecar.get("recipe"), sidecar.get("chosen_by")
    used = used_networks(recipe) if isinstance(recipe, Mapping) else []
    return sorted({*used, *([chosen_by] if chosen_by and isinstance(chosen_by, str) else [])})


def of_headline(protocol: str) -> str:
    """The network of a protocol's headline figure; empty for exact code and unknown protocols."""
    table = networks(protocol)
    return table[key] if (key := catalogue.headline(table)) else ""


def record(
    used: Collection[str], protocol: str, rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What summaries keep: the networks, and whether each figure of the rows is held out from them.

    Args:
        rows: Figures by step count.
    """
    figures = dict.fromkeys(k for row in rows.values() for k in catalogue.columns(row))
    if not used:
        return {}
    return {"used_networks": [*used], "held_out": held_out(figures, protocol, used)}

"""A backbone of another architecture with the weights of the one that it is made from.

What a stock config can say stays stock; single layers that are removed or have another form make a
network of `teachers/reduced`, which brings its source along when it is exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from students.architecture.one_pass import decoder_settings
from students.architecture.units import LISTS, check_units
from students.schedulers import source_of
from teachers.errors import UserError, clipped, first_line, nearest
from teachers.families.base import quiet
from teachers.reduced.haar import NOISE, HaarUNet2DModel
from teachers.reduced.layers import change as change_layer
from teachers.reduced.network import (
    CHANGED,
    REMOVED,
    ReducedUNet2DConditionModel,
    ReducedUNet2DModel,
)
from teachers.reduced.one_pass import OnePassUNet2DConditionModel
from teachers.teacher import Teacher

KEY = "student.architecture"  # the recipe key, which begins error messages
REDUCED = {
    "UNet2DModel": ReducedUNet2DModel,
    "UNet2DConditionModel": ReducedUNet2DConditionModel,
}
Change = Mapping[str, Any]


def changed_teacher(
    teacher: Teacher,
    config: Change,
    rename: Mapping[str, str],
    remove: Sequence[str],
    *,
    decoder_times: int = 1,
    **others: Any,
) -> Teacher:
    """The teacher with a network of another architecture: what its students are copies of.

    Args:
        config, rename, remove, others: As `changed` has them.
        decoder_times: At how many times its decoder runs; with 1, as any network's.

    Raises:
        UserError: as `changed`, or the teacher is no network of diffusers.
    """
    network = source_of(teacher)
    decoder = {} if decoder_times == 1 else decoder_settings(network, decoder_times)
    backbone = changed(network.backbone, config, rename, remove, decoder=decoder, **others)
    twin = network.twin(backbone.requires_grad_(False).eval(), network.schedule)
    return replace(teacher, denoiser=twin)


def changed(
    backbone: Any,
    config: Change,
    rename: Mapping[str, str],
    remove: Sequence[str],
    *,
    fresh: bool = False,
    change: Mapping[str, Change] | None = None,
    haar: bool = False,
    noise: int = 0,
    decoder: Change = MappingProxyType({}),
) -> nn.Module:
    """A new backbone with the weights of this one.

    Args:
        config: Keys of the stock config that become other values.
        rename: For the beginning of a name of the new network's weights, that of the weights that
            they are. Others have their own name; where a stage or a list is shorter, see `places`.
        remove: Names of units (`units`) that are removed. What a stock config can say, it says.
        fresh: Whether weights without a source keep the values that diffusers draws for them.
        change: By a layer's name its other form, as `teachers/reduced/layers.py` has them.
        haar: Whether it works on the Haar coefficients of its images (`teachers/reduced/haar.py`).
        noise: Of such a network, how many unit normals it draws in each call and reads.
        decoder: Of a one-pass network, its `decoder_settings`.

    Raises:
        UserError: no such key, value, unit or form; or weights of the new network have no source.
    """
    check_units(backbone, remove, f"{KEY}.remove")
    stock, left, own = stock_form(backbone, remove)
    before = dict(backbone.config)
    if unknown := [k for k in config if k not in before]:
        raise UserError(
            f"{KEY}.config: {type(backbone).__name__} has no setting {clipped(unknown[0])!r}; "
            f"{nearest(unknown[0], [k for k in before if not k.startswith('_')])}"
        )
    after = {**before, **stock, **config}
    gone = [*before.get(REMOVED, ()), *left]
    if after.get("mid_block_type", "") is None:
        gone = [name for name in gone if not name.startswith("mid_block.")]
    forms = still_there(before.get(CHANGED, {}), gone, after.get("mid_block_type", ""))
    kind = kind_of(backbone, gone, [*forms, *(change or ())])
    if kind is not type(backbone) or REMOVED in before:
        after |= {REMOVED: gone, CHANGED: forms}
    if haar:
        kind, after[NOISE] = haar_class(kind, after), noise
    if decoder:
        after |= decoder
        kind = OnePassUNet2DConditionModel
    settings = {k: v for k, v in after.items() if not k.startswith("_")}
    made = built(kind, settings, type(backbone).__name__, fresh)
    like = next(backbone.parameters())
    if fresh:
        with quiet():  # diffusers warns of every conversion
            made = made.to(device=like.device, dtype=like.dtype)
    made = with_weights(made, backbone, {**places(made, backbone), **own, **rename}, fresh)
    if any(b.is_meta for b in made.buffers()) and not like.is_meta:  # those that no file has
        whole = built(kind, settings, type(backbone).__name__, fresh=True).to(like.device)
        whole.load_state_dict(made.state_dict(), assign=True)
        made = whole
    return with_forms(made, change or {})


def built(kind: Any, settings: Change, name: str, fresh: bool) -> Any:
    """A network of this config; without values where none of them would stay, which takes no time.

    Raises:
        UserError: there is no such network.
    """
    try:
        with nullcontext() if fresh else torch.device("meta"):
            return kind.from_config(settings)
    except (Exception, SystemExit) as error:  # diffusers raises many types for such values
        reason = clipped(first_line(error), 200)
        raise UserError(f"{KEY}.config: no {name} has it ({reason})") from None


def still_there(
    forms: Mapping[str, Change], gone: Sequence[str], middle: str | None
) -> dict[str, Change]:
    """The layers' forms, but for those inside layers that go, and inside a middle that is none."""
    out = [*gone, *(["mid_block"] if middle is None else [])]
    return {n: v for n, v in forms.items() if not any(f"{n}.".startswith(f"{g}.") for g in out)}


def kind_of(backbone: Any, removed: Sequence[str], changed: Sequence[str]) -> Any:
    """The class of a network like this one without some layers, and with some of another form.

    Raises:
        UserError: there is none.
    """
    kind = type(backbone)
    if not removed and not changed:
        return kind
    made = REDUCED.get(kind.__name__.removeprefix("Reduced"))
    if made is not None:
        return made
    if not removed:
        known = " and ".join(REDUCED)
        raise UserError(f"{KEY}.change: a {kind.__name__} cannot be changed so, a {known} can")
    raise UserError(
        f"{KEY}.remove: of a {kind.__name__} whole blocks can go, and not {removed[0]!r}; name "
        "others"
    )


def with_forms(made: Any, forms: Mapping[str, Change]) -> Any:
    """The network, in place, with layers in another form, each with the weights that it had.

    Raises:
        UserError: there are no such layers or forms.
    """
    for name, settings in sorted(forms.items()):  # as a saved config has them: outer ones first
        inside = [n for n in made.config.get(CHANGED, {}) if n.startswith(f"{name}.")]
        if inside:
            raise UserError(
                f"{KEY}.change.{clipped(name)}: {clipped(inside[0])} in it has another form "
                "already; change the outer layer first"
            )
        check_square(made, name, settings)
        try:
            change_layer(made, name, settings)
        except ValueError as error:
            raise UserError(f"{KEY}.change.{clipped(name)}: {error}") from None
    if forms:
        made.register_to_config(**{CHANGED: {**made.config.get(CHANGED, {}), **plain(forms)}})
    return made


def check_square(made: Any, name: str, settings: Change) -> None:
    """Refuse a pyramid in a network of pictures that are not square: tokens do not say their shape.

    Raises:
        UserError: naming it.
    """
    size = made.config.get("sample_size")
    if settings.get("kind") == "pyramid" and isinstance(size, Sequence) and len({*size}) > 1:
        raise UserError(
            f"{KEY}.change.{clipped(name)}: a pyramid is for square pictures, and this network's "
            f"are {'×'.join(map(str, size))}; keep the attention"
        )


def plain(forms: Mapping[str, Change]) -> dict[str, Any]:
    """Layers' forms as JSON has them."""
    return json.loads(json.dumps(forms, default=list))


def haar_class(kind: Any, config: Change) -> Any:
    """The class of a network on Haar coefficients, for the class and config of images.

    Raises:
        UserError: there is none.
    """
    if kind.__name__ != "UNet2DModel":
        raise UserError(
            f"{KEY}.haar: a UNet2DModel of images can be on their coefficients, and not a "
            f"{kind.__name__}; remove it"
        )
    if (size := config["sample_size"]) % 2:
        raise UserError(f"{KEY}.haar: the images' side is {size}, which is odd; remove it")
    return HaarUNet2DModel


def stock_form(
    backbone: Any, remove: Sequence[str]
) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """A stock config without the units, those that it cannot say, and whose weights its names are.

    A UNet can be without all of its middle, or without all attentions of a stage; a network of
    equal blocks without any of them.
    """
    config, left, rename = dict[str, Any](), [*remove], dict[str, str]()
    middle = [n for n, _ in backbone.named_modules() if n.startswith("mid_block.")]
    parts = {n for n in middle if n.count(".") == 2}
    units_in_middle = {n for n in parts if n.split(".")[1] in ("resnets", "attentions")}
    if units_in_middle and units_in_middle <= set(left):
        config["mid_block_type"] = None
        left = [n for n in left if n not in units_in_middle]
    for name in LISTS:
        blocks = getattr(backbone, name, None)
        gone = [n for n in left if n.rpartition(".")[0] == name]
        key = "num_single_layers" if name.startswith("single") else "num_layers"
        if blocks is None or not gone or key not in backbone.config:
            continue
        kept = [i for i in range(len(blocks)) if f"{name}.{i}" not in gone]
        config[key] = len(kept)
        rename |= {f"{name}.{new}": f"{name}.{old}" for new, old in enumerate(kept)}
        left = [n for n in left if n not in gone]
    return config, left, rename


def places(made: nn.Module, before: nn.Module) -> dict[str, str]:
    """Whose weights the names of shorter lists are: of a shorter stage, and of fewer blocks.

    An up stage of fewer layers keeps the first ones and the last, which reads the outermost skip
    (BK-SDM, arXiv:2305.15798). Of equal blocks, every other one stays, and the last, or in the same
    way by other ratios: block i stands for those up to the teacher's block (i + 1) M / N - 1.
    """
    rename = {}
    lists = {n: m for n, m in made.named_modules() if isinstance(m, nn.ModuleList)}
    for name, modules in lists.items():
        old = dict(before.named_modules()).get(name)
        if not isinstance(old, nn.ModuleList) or not 0 < len(modules) < len(old):
            continue
        if name in LISTS:
            chosen = [-(-(i + 1) * len(old) // len(modules)) - 1 for i in range(len(modules))]
        elif name.startswith("up_blocks.") and name.count(".") == 2:
            chosen = [*range(len(modules) - 1), len(old) - 1]
        else:
            continue
        rename |= {f"{name}.{new}": f"{name}.{i}" for new, i in enumerate(chosen) if new != i}
    return rename


def with_weights(
    made: Any, before: nn.Module, rename: Mapping[str, str], fresh: bool = False
) -> Any:
    """The new network, in place, with the weights of the one before.

    Args:
        rename, fresh: As `changed` has them; of several beginnings the longest counts.

    Raises:
        UserError: a weight has no source, or one of another shape.
    """
    old, new = before.state_dict(), dict[str, Tensor]()
    begins = sorted(rename, key=len, reverse=True)
    for name, value in made.state_dict().items():
        start = next((b for b in begins if name == b or name.startswith(f"{b}.")), None)
        origin = name if start is None else rename[start] + name[len(start) :]
        if fresh and (origin not in old or old[origin].shape != value.shape):
            new[name] = value
            continue
        if origin not in old:
            raise UserError(
                f"{KEY}: the new network's {name} has no source: the teacher has no {origin}; say "
                "by rename which weights they are, or leave the settings that add them out"
            )
        if old[origin].shape != value.shape:
            was, now = ("×".join(map(str, v.shape)) for v in (old[origin], value))
            raise UserError(
                f"{KEY}: the new network's {name} is {now}, and the teacher's {origin} {was}; "
                "keep the widths"
            )
        new[name] = old[origin].detach().clone()
    made.load_state_dict({k: v.requires_grad_(False) for k, v in new.items()}, assign=True)
    return made.requires_grad_(True)

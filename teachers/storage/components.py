"""Load the components of a diffusers folder from safetensors, with exactly the weights they need.

Diffusers and transformers only log missing weights and initialise them at random. Here a file with
missing or extra weights is refused, under every supported version of both.
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from teachers.errors import UserError, clipped, first_line
from teachers.storage import packed
from teachers.storage.files import read_json
from teachers.storage.variants import WEIGHTS, variants

LOADED = ("diffusers", "transformers")  # libraries whose classes are loaded here
# Components that pipelines can sample without.
SPARE = {"safety_checker", "feature_extractor", "image_encoder", "transformer_2"}
SPARE |= {"text_encoder_3", "tokenizer_3"}  # T5: Stable Diffusion 3 uses zeros without it
SPARE |= {"pe", "pe_tokenizer"}  # ERNIE-Image's language model that rewrites prompts
TOKENIZERS = ("Tokenizer", "TokenizerFast")  # suffixes of tokenizer class names


def module(kind: Any, folder: Path, who: str, part: str = "", **options: Any) -> Any:
    """Load the network in `folder`; `kind` is a diffusers or transformers class.

    Args:
        part: Its name in the pipeline, for messages.
        options: For `from_pretrained`.

    Raises:
        UserError: the files are missing or unreadable, or their weights do not match the network.
    """
    config = read_json(folder / "config.json", who)  # without it, diffusers would ask the Hub
    check_rope(folder, who)
    form = packed.form(config, who, folder)
    if "variant" not in options:
        options["variant"] = variants(who, {part: folder})[part]
    try:
        with quiet(), silent("diffusers.models.modeling_utils"):
            if form is not None:
                dtype = options.get("torch_dtype", torch.float32)
                made, info = packed.load(kind, folder, options["variant"], dtype)
            else:
                made, info = kind.from_pretrained(
                    folder,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                    **options,
                )
    except Exception as error:  # damaged files raise many types
        raise UserError(
            f"{who}: {folder} cannot be read ({first_line(error)}); copy it again"
        ) from None
    where = f"{who}: the weights in {folder}"
    dot = f"{part}." if part else ""
    # diffusers leaves missing weights of networks made on the meta device there
    hollow = [k for k, v in made.state_dict().items() if v.is_meta]
    lacking = sorted({*info["missing_keys"], *hollow})
    wrong = [k if isinstance(k, str) else k[0] for k in info["mismatched_keys"]]
    extra = sorted(k for k in info["unexpected_keys"] if not k.endswith("position_ids"))
    if lacking and extra:
        raise UserError(
            f"{where} are not whole: {dot}{lacking[0]} is missing{more(lacking)}, but there is "
            f"{clipped(extra[0])}{more(extra)}; another version of "
            f"{kind.__module__.partition('.')[0]} may use these names: install it"
        )
    if lacking:
        name = f"{dot}{lacking[0]}"
        raise UserError(f"{where} are not whole: {name} is missing{more(lacking)}; copy it again")
    if wrong:
        raise UserError(
            f"{where} do not fit its config.json: {dot}{wrong[0]}{more(wrong)}; correct it"
        )
    if extra:
        raise UserError(
            f"{where} hold {dot}{clipped(extra[0])}{more(extra)}, which the {kind.__name__} of "
            "config.json does not have; correct config.json"
        )
    if form is None:
        check_floating(made, folder, options["variant"], where)
    elif who != "export":
        packed.say(form, part, who)
    return made


def check_floating(made: nn.Module, folder: Path, variant: str | None, where: str) -> None:
    """Refuse integer weights for a floating-point network: their quantisation scale is missing.

    Raises:
        UserError: a weight is of integers.
    """
    own, wrong = made.state_dict(), []
    for file in sorted(folder.glob("*.safetensors")):
        match = WEIGHTS.fullmatch(file.name)
        if match is None or match["variant"] != variant:
            continue
        for name in whole_numbers(file):  # libraries may add or drop a prefix
            mates = [
                v
                for k, v in own.items()
                if k == name or k.endswith(f".{name}") or name.endswith(f".{k}")
            ]
            if any(v.is_floating_point() for v in mates):
                wrong.append(name)
    if wrong:
        raise UserError(
            f"{where} are quantised: {clipped(wrong[0])}{more(wrong)} holds integers and no scale; "
            "give fp32, bf16 or fp16 weights"
        )


def whole_numbers(file: Path) -> list[str]:
    """Names of the integer and boolean tensors in a safetensors file."""
    with safe_open(file, "pt") as tensors:
        types = {k: tensors.get_slice(k).get_dtype() for k in tensors.keys()}  # noqa: SIM118
    return [k for k, v in types.items() if v.startswith(("I", "U", "BOOL"))]


def installed() -> str:
    """The installed version of transformers."""
    return version("transformers")


def check_rope(folder: Path, who: str) -> None:
    """Refuse a language model's config that transformers before version 5 would misread.

    Raises:
        UserError: the rotary embedding settings have only version 5's name.
    """
    file = folder / "config.json"
    if int(installed().partition(".")[0]) >= 5 or not file.exists():
        return
    todo: list[Any] = [read_json(file, who)]
    for tree in todo:
        if "rope_parameters" in tree and "rope_theta" not in tree:
            raise UserError(
                f"{who}: {file} holds rope_parameters, which transformers "
                f"{installed()} does not read; install version 5"
            )
        todo += [value for value in tree.values() if isinstance(value, dict)]


def more(names: list[str]) -> str:
    """and N more", after the first of several names."""
    return f", and {len(names) - 1} more" * (len(names) > 1)


def stock(folder: Path, who: str, dtypes: dict[str, torch.dtype]) -> Any:
    """Load the pipeline in a folder, from safetensors only, without a safety checker.

    Args:
        dtypes: The dtype of each component's weights; "default" for all others.

    Raises:
        UserError: it cannot be read, or a component's weights do not match its network.
    """
    index = read_json(folder / "model_index.json", who)
    check_index(folder, index, who)
    kinds, parts = dict(networks(index)), dict[str, Any]()
    classes = {
        part: next(k for k in kinds[part].__mro__ if k.__module__.startswith("diffusers.")).__name__
        for part, entry in index.items()
        if isinstance(entry, list) and reduced_class(entry) is not None
    }
    chosen = variants(who, {part: folder / part for part in kinds})
    for part, kind in kinds.items():
        # transformers' older name, which all versions accept
        dtype = dtypes.get(part, dtypes["default"])
        parts[part] = module(
            kind, folder / part, who, part, torch_dtype=dtype, variant=chosen[part]
        )
    for part, entry in index.items():
        if isinstance(entry, list) and entry[0] == "transformers" and entry[1].endswith(TOKENIZERS):
            parts[part] = tokenizer(entry[1], folder / part, who)
            classes[part] = type(parts[part]).__name__
    return assembled(folder, index, parts, classes, dtypes, who)


def assembled(
    folder: Path,
    index: dict[str, Any],
    parts: dict[str, Any],
    classes: dict[str, str],
    dtypes: dict[str, torch.dtype],
    who: str,
) -> Any:
    """The pipeline of loaded components; the others come from its folder.

    Args:
        classes: The names of classes where they are not those of the index: of tokenizers, and of
            the stock networks in whose place reduced ones are.
        dtypes: As `stock` has them.

    Raises:
        UserError: diffusers cannot read it.
    """
    import diffusers

    # a null component must be passed as None where its class does not call it optional
    absent = [k for k, v in index.items() if isinstance(v, list) and v[0] is None]
    absent += [k for k in index if k == "safety_checker"]
    try:
        with (
            quiet(),
            silent("diffusers.models.modeling_utils"),
            naming(folder, index, classes) as root,
        ):
            return diffusers.DiffusionPipeline.from_pretrained(
                root,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=dtypes,
                **{**dict.fromkeys(absent), **parts},
            )
    except Exception as error:  # as above
        raise UserError(
            f"{who}: the pipeline in {folder} cannot be read ({first_line(error)}); copy it again"
        ) from None


def tokenizer(name: str, folder: Path, who: str) -> Any:
    """Load a tokenizer as the named transformers class, or as the fast form of that class.

    Transformers 5 writes tokenizer.json and a list of special tokens. In version 4 the class of
    that name reads other files; its fast form reads tokenizer.json, and names the list differently.

    Raises:
        UserError: neither class can read the folder.
    """
    import transformers

    fault = f"there is no {name} in transformers {installed()}"
    config = folder / "tokenizer_config.json"
    special = read_json(config, who).get("extra_special_tokens") if config.exists() else None
    older = {"extra_special_tokens": {}, "additional_special_tokens": special}
    forms = dict.fromkeys((name, f"{name.removesuffix('Fast')}Fast"))
    for words in ({}, older if isinstance(special, list) else {}):
        for form in forms:
            if (kind := getattr(transformers, form, None)) is None:
                continue
            try:
                with quiet():
                    return kind.from_pretrained(folder, local_files_only=True, **words)
            except Exception as error:  # damaged files, sentencepiece missing, …
                fault = first_line(error) if form == name and not words else fault
    raise UserError(f"{who}: {folder} cannot be read as a {clipped(name)} ({fault}); copy it again")


@contextmanager
def naming(folder: Path, index: dict[str, Any], classes: dict[str, str]) -> Iterator[Path]:
    """The folder; or a temporary folder of links to it, whose index names other classes."""
    if all(index[part][1] == name for part, name in classes.items()):
        yield folder
        return
    with TemporaryDirectory() as place:
        for path in folder.iterdir():
            if path.name != "model_index.json":
                (Path(place) / path.name).symlink_to(path.resolve())
        named = {
            part: ["transformers" if name.endswith(TOKENIZERS) else "diffusers", name]
            for part, name in classes.items()
        }
        (Path(place) / "model_index.json").write_text(json.dumps(index | named), encoding="utf-8")
        yield Path(place)


def networks(index: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The networks that a model_index.json names, each with its class."""
    import diffusers
    import transformers

    for part, entry in index.items():
        if not isinstance(entry, list) or part == "safety_checker":
            continue
        if (reduced := reduced_class(entry)) is not None:
            yield part, reduced
        if entry[0] not in LOADED:
            continue
        library = diffusers if entry[0] == "diffusers" else transformers
        kind = getattr(library, entry[1], None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            yield part, kind


def reduced_class(entry: list[Any]) -> Any:
    """Our own class of a network that is changed, where an entry of an index names one.

    The source that lies beside its weights is never run: it is that of this class.
    """
    from teachers.reduced import source

    known = {(source.module_of(kind.__name__), kind.__name__): kind for kind in source.CLASSES}
    return known.get(tuple(entry)) if all(isinstance(v, str) for v in entry) else None


def check_parts(folder: Path, who: str) -> None:
    """Refuse a folder whose model_index.json lacks a component that sampling needs.

    Raises:
        UserError: a component is null or not listed.
    """
    import diffusers

    index = read_json(folder / "model_index.json", who)
    kind: Any = getattr(diffusers, str(index.get("_class_name")), None)
    if kind is None:  # unknown to this diffusers; loading reports it
        return
    known = inspect.signature(kind.__init__).parameters
    must = [k for k, v in known.items() if k != "self" and v.default is inspect.Parameter.empty]
    must += [k for k in kind._optional_components if k not in must]
    for part in must:
        entry = index.get(part)
        if part not in SPARE and (not isinstance(entry, list) or entry[:1] in ([], [None])):
            raise UserError(
                f"{who}: model_index.json: {part} is {clipped(json.dumps(entry))}, but a "
                f"{kind.__name__} needs it; give a folder with all components"
            )


def check_index(folder: Path, index: dict[str, Any], who: str) -> None:
    """Refuse a folder that lacks a component of its model_index.json, or holds it as a pickle.

    Raises:
        UserError: a component is missing, pickled, or not two names.
    """
    for part, entry in index.items():
        if not isinstance(entry, list) or part == "safety_checker":
            continue
        if entry and all(type(v) is int for v in entry):  # a setting, such as Krea 2's layers
            continue
        named = len(entry) == 2 and (entry[0] is None or all(isinstance(v, str) for v in entry))
        if not named:
            raise UserError(
                f"{who}: model_index.json: {part}: expected two names, not {clipped(entry)}"
            )
        if entry[0] is None:
            continue
        if not (folder / part).is_dir():
            raise UserError(f"{who}: {folder / part} is missing; model_index.json lists it")
        if entry[1].endswith(TOKENIZERS):
            check_vocabulary(folder / part, who)
        if entry[1].endswith("Scheduler"):
            read_json(folder / part / "scheduler_config.json", who)
        pickled = [*(folder / part).glob("*.bin"), *(folder / part).glob("*.pt")]
        if pickled and not list((folder / part).glob("*.safetensors")):
            raise UserError(
                f"{who}: {pickled[0]} is a pickle, which is never loaded; "
                "convert the folder with diffusers' save_pretrained first"
            )


def check_vocabulary(folder: Path, who: str) -> None:
    """Refuse a tokenizer folder without a vocabulary: transformers would make an empty one.

    Raises:
        UserError: no vocabulary file of any known format.
    """
    words = {p.name for p in folder.iterdir()}
    whole = {"tokenizer.json"} & words or {"vocab.json", "merges.txt"} <= words
    if not (whole or "vocab.txt" in words or any(w.endswith(".model") for w in words)):
        raise UserError(
            f"{who}: {folder} has no vocabulary; copy one there: tokenizer.json, vocab.json and "
            "merges.txt, vocab.txt, or a sentencepiece .model"
        )


@contextmanager
def silent(name: str) -> Iterator[None]:
    """Silence one logger, whose errors are also raised."""
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and notes of diffusers and transformers."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    levels = ours.get_verbosity(), theirs.get_verbosity()
    for part in (ours, theirs):
        part.set_verbosity_error()
        part.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for part, level in zip((ours, theirs), levels, strict=True):
            part.set_verbosity(level)
            part.enable_progress_bar()

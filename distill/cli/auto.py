"""`distill auto`: a recipe for a model, a card and some hours, and its run."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.cli.options import expand_home

MOST_HOURS = 100_000  # eleven years


def auto(
    model: Annotated[
        str, typer.Argument(help="As in a recipe's teacher.source: a folder, a Hub id, digits, …")
    ],
    gpu: Annotated[
        str | None, typer.Option(help="The card to train on.", show_default="this machine")
    ] = None,
    hours: Annotated[float, typer.Option(help="The most hours that the run may take.")] = 8.0,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="FILE[:STRENGTH] of a LoRA that becomes part of the model; repeatable."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Steps of sampling.", show_default="by the evidence"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Images, a file of prompts, or 20 to 200 captions for a LoRA."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=expand_home,
            help="Folder of recipe.yaml and of the run; - prints the recipe.",
            show_default="runs/auto-MODEL",
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Run the recipe without asking.")
    ] = False,
):
    """Choose a recipe for a model, with the reason for every choice, and run it on yes.

    It considers the model's shapes, the card, what this project's benches measured, and the recipe
    of the model's family.
    """
    adapters = [adapter_of(text) for text in lora or []]
    out = out or Path("runs") / f"auto-{name_of(model)}"
    section = checked(gpu, hours, data, bool(adapters), out, yes)
    choice, machine, verdict = choice_for(model, gpu, hours, adapters, steps, section)
    from distill.auto import text
    from distill.console import out as console

    recipe = text.recipe_text(choice, command_of(), machine)
    if str(out) == "-":
        sys.stdout.write(recipe)
        return
    console.print(text.shown(choice, text.title(model, machine, hours), machine))
    console.print(verdict, soft_wrap=True)
    file = saved(recipe, out)
    command = f"distill run {file} --out {out / 'run'}"
    if yes or confirmed():
        console.print(f"wrote {file}; {command}", soft_wrap=True)
        from distill.cli.train import run

        run(str(file), [], out / "run")
    else:
        console.print(f"wrote {file}; run it with\n  {command}", soft_wrap=True)


def checked(
    gpu: str | None, hours: float, data: str | None, adapters: bool, out: Path, yes: bool
) -> dict[str, Any]:
    """The recipe's section of data; what can be refused before a model is loaded is refused.

    Raises:
        UserError: naming the option.
    """
    from distill.console import spinner
    from teachers.errors import UserError

    if not 0 < hours <= MOST_HOURS:  # NaN is neither
        most = f"{MOST_HOURS:,}"
        raise UserError(f"--hours {hours:g}: expected hours above 0, at most {most}, such as 8")
    with spinner("distill: preparing"):  # the imports take seconds
        from distill.auto.machine import check_gpu
        from distill.auto.start import names_data

        check_gpu(gpu)
        section = {} if data is None else names_data(data, adapters)
        if str(out) != "-":
            check_new(out)
        elif yes:
            raise UserError("--out -: it prints the recipe alone; leave out --yes")
    return section


def name_of(model: str) -> str:
    """A model's name for a folder: the last part of its path, without the suffix of a file."""
    path = Path(model.partition(":")[0])
    return path.stem if path.suffix in (".safetensors", ".pt", ".pth", ".pkl", ".py") else path.name


def saved(recipe: str, out: Path) -> Path:
    """Write the recipe into the folder, and return its file."""
    from distill.files import write

    out.mkdir(parents=True, exist_ok=True)
    write(out / "recipe.yaml", recipe)
    return out / "recipe.yaml"


def confirmed() -> bool:
    """Whether the user answers yes; no without a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty() and typer.confirm("Run it now?")


def adapter_of(text: str) -> dict[str, Any]:
    """A LoRA file and its strength, from FILE[:STRENGTH].

    Raises:
        UserError: there is no such file.
    """
    from teachers.errors import UserError

    file, colon, strength = text.rpartition(":")
    try:
        entry = {"file": file, "strength": float(strength)} if colon else {"file": text}
    except ValueError:  # a colon of the path
        entry = {"file": text}
    if not Path(str(entry["file"])).expanduser().is_file():
        raise UserError(f"--lora {text}: no such file; give a .safetensors file, as FILE:0.8")
    return entry


def check_new(out: Path) -> None:
    """Refuse a folder that holds a recipe, or that cannot be written to.

    Raises:
        UserError: naming the option.
    """
    from distill.training.run_folder import check_can_write
    from teachers.errors import UserError

    check_can_write(out)
    for name in ("recipe.yaml", "run"):
        if (out / name).exists():
            raise UserError(f"--out {out}: {name} is there; give another folder, or remove it")


def choice_for(
    model: str,
    gpu: str | None,
    hours: float,
    adapters: list[dict[str, Any]],
    steps: int | None,
    data: dict[str, Any],
) -> tuple[Any, Any, str]:
    """The choice, the machine, and the doctor's verdict."""
    from distill.console import spinner

    with spinner("distill: examining the model"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fake tensors have no addresses, which torch warns about
        from distill.auto.choose import choose
        from distill.auto.machine import machine_of
        from distill.auto.subject import examine, pictures_in, subject_of
        from distill.planning import forecast

        subject = subject_of(model, adapters)
        verdict, doubt = "not asked, since the weights are not here", ""
        if subject.weights:
            verdict, doubt = examine(subject, pictures_in(data))
        machine = machine_of(gpu, subject.teacher, subject.weights)
    waits = "distill: planning (up to a minute for each form that may fit)"
    with spinner(waits), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choice = choose(subject, machine, hours, steps, data, forecast.plan)
    choice.unknown += [doubt] if doubt else []
    return choice, machine, f"doctor: {verdict}"


def command_of() -> str:
    """The command as it was typed."""
    import shlex

    return shlex.join(["distill", *sys.argv[1:]])

"""The README's blocks do what they say: each runs here, or is checked as far as it can be."""

import re
import runpy
import shlex
import sys

import pytest
import typer

from distill import __main__ as cli
from distill.benchmark.spec import Bench
from distill.config.recipe import Recipe
from distill.planning.plan import GPUS
from tests.helpers.command_line import called
from tests.helpers.readme import BLOCKS, INLINE, README, ROOT, SHELL, of_kind

SMALL = ("train.steps=4", "train.batch=8", "train.log_every=2", "train.save_every=4",
         "train.sample_every=0", "eval.protocol=null")  # fmt: skip

# The lines of shell blocks that run here; the others are parsed by the command itself, and their
# recipes and overrides checked.
RUN = {
    "distill run mine.yaml": "runs",
}
# Those that cannot be parsed, and why.
UNPARSED = {
    "pip install -e .": "it would change the environment of the tests",
    "pip install -e '.[data]'": "it would change the environment of the tests",
}
START = "distill run digits/dmd2 --out runs/quickstart"  # the Makefile's, and small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the README's reader stands: its files, the recipes, and a small finished run."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("recipes", "benchmarks", "Makefile"):
        (place / name).symlink_to(ROOT / name)
    objectives = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")
    (race,) = re.findall(r"```yaml\n(# race\.yaml.*?)```", objectives, re.S)
    (place / "race.yaml").write_text(race)
    for block in BLOCKS:
        if block.file:
            (place / block.file).write_text(block.text)
    (place / "my-recipe.yaml").write_text(next(b.text for b in of_kind("yaml") if not b.file))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        words = [*shlex.split(START), *SMALL]
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == 0
    return place


@pytest.fixture(autouse=True)
def _stand(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_every_block_is_of_a_kind_that_is_checked():
    assert {block.kind for block in BLOCKS} == {"python", "bash", "yaml"}
    assert README.count("```") == 2 * len(BLOCKS) >= 16
    assert set(RUN) | set(UNPARSED) <= set(SHELL)  # no entry of a line that has gone


@pytest.mark.parametrize("block", of_kind("python"), ids=lambda block: block.file or "student")
def test_a_python_block_runs(block):
    names = {"__name__": "readme"}
    sys.modules.setdefault("readme", type(sys)("readme"))  # where a dataclass looks for its module
    exec(compile(block.text, "README.md", "exec"), names)
    if "images" in names:
        assert len(names["images"]) == 10


@pytest.mark.parametrize("block", of_kind("yaml"), ids=lambda block: block.file or block.text[:30])
def test_a_yaml_block_is_a_recipe(block, folder):
    path = folder / (block.file or "block.yaml")
    path.write_text(block.text)
    assert Recipe.load(path).train.steps > 0


def parsed(words: list[str]) -> dict:
    """The values that the command takes from a command line; it raises where it takes none."""
    command = typer.main.get_command(cli.app).commands[words[0]]
    return command.make_context(words[0], words[1:]).params


def check_command(words: list[str]) -> None:
    """Parse a command line, and check the recipe, the overrides and the GPU that it names."""
    values = parsed(words)
    if "recipe" in values:
        kind = Bench if words[0] == "bench" else Recipe
        kind.load(values["recipe"], values.get("overrides") or ())
    if "gpu" in values:
        assert values["gpu"] in GPUS


@pytest.mark.parametrize("line", [line for line in SHELL if line not in UNPARSED])
def test_a_command_is_one(line):
    program, *words = shlex.split(line)
    if program.startswith("ACCELERATE_"):
        program, *words = words
    if program in ("accelerate", "torchrun"):  # what they launch is the command
        program, words = "distill", words[words.index("distill") + 1 :]
    if program == "distill":
        check_command(words)
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
    else:
        assert program == "python"
        runpy.run_path(words[0], run_name="readme")  # it is there, and so is all that it imports


@pytest.mark.parametrize("line", RUN)
def test_a_command_runs(line, capsys, folder):
    _, *words = shlex.split(line)
    code, _, err = called(capsys, *words, *(SMALL if words[0] == "run" else ()))
    assert code == 0, err
    assert (folder / RUN[line]).exists()


@pytest.mark.parametrize("line", INLINE)
def test_a_command_within_the_text_is_one(line):
    _, name, *words = shlex.split(line)
    if name == "COMMAND":
        return  # any of them
    assert name in cli.COMMANDS
    if any(word.isupper() for word in words):  # names that stand for the reader's own
        parsed([name, *words])
    elif words:
        check_command([name, *words])


def test_the_makefiles_own_command_is_one():
    (line,) = re.findall(
        r"^\t\$\(BIN\)/distill (run .*?) \\$", (ROOT / "Makefile").read_text(), re.M
    )
    check_command(shlex.split(line))

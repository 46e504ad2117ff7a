"""The lines that users read when something of theirs is wrong: each begins with its place."""

import ast
import re
from pathlib import Path

import pytest

from teachers.errors import UserError
from tests.helpers.refusals import check_message

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ("data.source: no such folder; give another", "data.source"),
        ("players.student.betas.0: expected less than 1, not 1", "players.student.betas.0"),
        ("data: not one item is good", "data"),
        ("objective.name: mine.py: it has no loss; define it", "objective.name"),
        ("--speed: it is of one process", "--speed"),
        ("--steps 3: this student was trained for 1, 2", "--steps"),
        ("--out /a b/run: 1: it already holds a run", "--out"),
        ("--resume: train.steps: 2 is fewer than 3", "--resume"),
        ("/runs/2024-05-01T10:30:00/f.json: damaged", "/runs/2024-05-01T10:30:00/f.json"),
        ("a:b.pkl: refused: the pickle uses GLOBAL", "a:b.pkl"),
        ("teacher 'digits': it takes no options", "teacher 'digits'"),
        ("teacher 'a: b': no such folder", "teacher 'a: b'"),
        ('recipe "it\'s: so": no such file', 'recipe "it\'s: so"'),
        ("single file: the UNet's 'x: y' has no place", "single file"),
        ("recipe r.yaml: not valid YAML: line 1", "recipe r.yaml"),
        ("recipe: train.steps: missing", "train.steps"),
        ("recipe a/r.yaml: objective.name: 'x' is unknown", "objective.name"),
        ("/a:b/r.yaml: train.stesp: unknown key", "train.stesp"),
        ("digits/dmd2: train.stesp: unknown key", "train.stesp"),
        ("race.yaml: row A: it is named twice", "race.yaml"),
        ("nothing that names a place", ""),
        ("", ""),
    ],
)
def test_a_messages_key_is_the_place_that_it_names(message, key):
    assert UserError(message).key == key


def test_the_key_of_a_long_path_is_the_path_as_the_message_shows_it():
    path = "/" + "x" * 400
    error = UserError(f"{path}: damaged")
    assert error.key == str(error).removesuffix(": damaged") != path


# These variables hold a place already, such as "data.source: '/pictures'" or "teacher 'digits'",
# or `refusal` a whole message with it; a sentence may follow them.
PLACES = re.compile(r"(\w+\.)*(where|who|refusal)$")
FORM = re.compile(r"(?P<place>[^;:]*\S): \S", re.DOTALL)
# What a sentence has and the name of a place has not.
VERBS = re.compile(r"\b(is|are|has|have|holds?|does|do|cannot|must|takes?|would|missing|unknown)\b")


def text_of(node: ast.expr, known: dict[str, ast.expr]) -> str:
    """A message as written, with "…" for each value, and local names replaced by what they hold."""
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(text_of(part, known) for part in node.values)
        case ast.FormattedValue():
            return text_of(node.value, known)
        case ast.BinOp(op=ast.Add()):
            return text_of(node.left, known) + text_of(node.right, known)
        case ast.Name() if node.id in known:
            return text_of(known[node.id], {k: v for k, v in known.items() if k != node.id})
    return "place:" if PLACES.match(ast.unparse(node)) else "…"


def messages(tree: ast.Module) -> list[tuple[int, str]]:
    """Line number and text of each message that a module gives to a UserError."""
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = list(ast.walk(function))
        assigned = [n for n in nodes if isinstance(n, ast.Assign) and len(n.targets) == 1]
        known = {n.targets[0].id: n.value for n in assigned if isinstance(n.targets[0], ast.Name)}
        for node in nodes:
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("UserError"):
                continue
            choice = node.args[0]
            options = [choice.body, choice.orelse] if isinstance(choice, ast.IfExp) else [choice]
            found += [(node.lineno, text_of(option, known)) for option in options]
    return found


def is_placed(text: str) -> bool:
    place = FORM.match(text.replace("::", ":") + " …")
    return place is not None and not VERBS.search(place["place"])


SOURCES = [p for r in ("distill", "teachers", "students", "eval") for p in (ROOT / r).rglob("*.py")]


def test_every_message_begins_with_its_place():
    found = [
        (f"{path.relative_to(ROOT)}:{line}", text)
        for path in SOURCES
        for line, text in messages(ast.parse(path.read_text()))
    ]
    assert len(found) > 400
    assert not [(where, text) for where, text in found if not is_placed(text)]


@pytest.mark.parametrize(
    ("code", "placed"),
    [
        ('raise UserError("data.source: no such folder")', True),
        ('raise UserError(f"{path}: damaged; delete it")', True),
        ('raise UserError(f"{self.where} holds no images")', True),
        ('key = f"{x}: y: z"; raise UserError(f"{key} do not learn")', True),
        ('raise UserError(f"{path} is damaged; delete it")', False),
        ('raise UserError(f"{name} is unknown: {nearest(name, names)}")', False),
        ('raise UserError("no folder is there")', False),
        ('raise UserError(f"{path}: a" if x else f"{path} b")', False),
    ],
)
def test_a_message_without_its_place_is_found(code, placed):
    found = messages(ast.parse(f"def f():\n    {code}"))
    assert all(is_placed(text) for _, text in found) == placed


@pytest.mark.parametrize(
    ("message", "key", "fragments"),
    [
        ("data.source: no such folder; give another", "data.sources", ()),
        ("data.source: no such folder", "data.source", ()),
        ("data.source: no such folder; give another", re.compile("data"), ()),
        ("--n 3: more than 2; give fewer", "--n", ("4",)),
        ("data.source: none; give another\nand more", "data.source", ()),
    ],
    ids=["place", "remedy", "pattern", "value", "lines"],
)
def test_the_tests_own_check_of_messages_fails(message, key, fragments):
    with pytest.raises(AssertionError):
        check_message(message, key, *fragments)


def test_the_tests_own_check_of_messages_passes():
    check_message("--n 3: more than 2; give fewer", "--n", 3, "2")
    check_message("data.source: expected a folder", re.compile(r"data\.\w+"))

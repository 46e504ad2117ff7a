"""Pushing to a Hub that is a real HTTP server: what arrives, what resumes, what is refused."""

import json
import logging
import os
import subprocess
import sys

import pytest
from huggingface_hub import constants

from distill.publish.push import portable, push
from teachers.errors import UserError
from tests.helpers import command_line
from tests.helpers.hub import TOKEN, Fault
from tests.helpers.pushes import WEIGHTS, make_run, new_sessions
from tests.helpers.refusals import refused

REPO = "me/student"


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def called(capsys, *words):
    return command_line.called(capsys, "push", *words)


def refusal(capsys, *words):
    """The one line that the command says when it exits with 2."""
    code, out, err = called(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    assert TOKEN not in err
    return err


# ---- what arrives


def test_a_pushed_run_is_the_student_folder_with_its_card_and_grid(hub, run, capsys):
    code, out, err = called(capsys, run, REPO, "--message", "first")
    assert (code, err) == (0, "")
    assert f"{hub.url}/{REPO}" in out
    repo = hub.repos[REPO]
    assert not repo.private
    assert repo.commits[repo.branches["main"][-1]]["message"] == "first"
    files = repo.files()
    assert set(files) == {
        ".gitattributes", "README.md", "grid.png", "model_index.json", "fewstep.json",
        "unet/config.json", WEIGHTS,
    }  # fmt: skip
    assert files[WEIGHTS] == (run / "student" / WEIGHTS).read_bytes()
    assert files["grid.png"] == b"a picture"
    assert f'from_pretrained("{REPO}")' in files["README.md"].decode()
    assert json.loads(files["fewstep.json"])["steps"] == [1, 2]


def test_this_machines_folders_stay_here(hub, run):
    push(run, REPO)
    for name, content in hub.repos[REPO].files().items():
        assert b"/home/" not in content and str(run).encode() not in content, name
    assert json.loads(hub.repos[REPO].files()["unet/config.json"])["_name_or_path"] == "unet"
    assert portable({"a": ["/x/y", "x/y", "~/z", 3]}) == {"a": ["y", "x/y", "z", 3]}


def test_lora_files_lie_at_the_root_where_load_lora_weights_looks(hub, run):
    (run / "lora").mkdir()
    (run / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"lora")
    push(run, REPO)
    assert hub.repos[REPO].files()["pytorch_lora_weights.safetensors"] == b"lora"


def test_a_card_of_ones_own_is_sent_as_it_is(hub, run):
    (run / "card.md").write_text("---\nlicense: mit\n---\nmine\n")
    push(run, REPO)
    assert hub.repos[REPO].files()["README.md"].endswith(b"mine\n")


def test_a_new_repository_can_be_private(hub, run):
    push(run, REPO, private=True)
    assert hub.repos[REPO].private


def test_a_public_repository_is_not_taken_for_a_private_one(hub, run, capsys):
    hub.create(REPO)
    assert "exists and is public" in refusal(capsys, run, REPO, "--private")
    assert set(hub.repos[REPO].files()) == {".gitattributes"}


def test_a_branch_is_made_and_main_is_left_alone(hub, run):
    hub.create(REPO, **{"other.txt": b"theirs"})
    push(run, REPO, revision="four-steps")
    assert "other.txt" in hub.repos[REPO].files()
    branch = hub.repos[REPO].files("four-steps")
    assert WEIGHTS in branch and "other.txt" not in branch
    assert "revision='four-steps'" in branch["README.md"].decode()


# ---- what resumes


def test_a_second_push_sends_nothing_and_commits_nothing(hub, run):
    first = push(run, REPO)
    second = push(run, REPO)
    assert (second.uploaded, second.unchanged) == (0, first.uploaded)
    assert second.commit == first.commit
    assert len(hub.repos[REPO].branches["main"]) == 2
    assert hub.count("PUT /lfs/") == 2  # the weights and the grid, once each


def test_a_changed_file_alone_is_sent_again_and_one_that_is_gone_is_deleted(hub, run):
    (run / "student" / "old.bin").write_bytes(b"old")
    push(run, REPO)
    (run / "student" / "old.bin").unlink()
    (run / "student" / WEIGHTS).write_bytes(b"new weights")
    done = push(run, REPO)
    assert (done.uploaded, done.deleted) == (1, 1)
    assert hub.repos[REPO].files()[WEIGHTS] == b"new weights"
    assert "old.bin" not in hub.repos[REPO].files()


def test_an_interrupted_push_goes_on_without_sending_what_arrived(hub, run, capsys):
    hub.faults = [Fault("/commit/", times=99)]
    assert "cannot be reached" in refusal(capsys, run, REPO)
    assert set(hub.repos[REPO].files()) == {".gitattributes"}
    sent = hub.count("PUT /lfs/")
    hub.faults = []
    assert called(capsys, run, REPO)[0] == 0
    assert WEIGHTS in hub.repos[REPO].files()
    assert hub.count("PUT /lfs/") == sent == 2


@pytest.mark.parametrize(
    "where",
    ["GET /api/models", "/api/repos/create", "/api/validate-yaml", "/preupload/",
     "/objects/batch", "PUT /lfs/", "/commit/", "/tree/"],
)  # fmt: skip
@pytest.mark.parametrize("status", [503, 429, 0])
def test_a_passing_fault_anywhere_is_waited_out(hub, run, pauses, where, status):
    fault = Fault(where, status, body="<html>busy</html>")
    hub.faults = [fault]
    push(run, REPO)
    assert fault.times == 0
    assert len(pauses) >= 1
    assert hub.repos[REPO].files()[WEIGHTS] == (run / "student" / WEIGHTS).read_bytes()


def test_pauses_grow_and_follow_what_the_server_asks_for(hub, run, pauses):
    hub.faults = [
        Fault("/commit/", 503, times=2),
        Fault("/api/repos", 429, 1, "{}", {"Retry-After": "7"}),
    ]
    push(run, REPO)
    assert pauses == [7.0, 1.0, 2.0]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, run):
    hub.faults = [Fault("/commit/", after=True)]
    done = push(run, REPO)
    assert len(hub.repos[REPO].branches["main"]) == 2
    assert done.commit == hub.repos[REPO].branches["main"][-1]
    assert push(run, REPO).uploaded == 0


# ---- what is refused


def test_another_models_repository_is_not_written_over(hub, run, capsys):
    hub.create(REPO, **{"model.bin": b"theirs"})
    assert "this run did not upload" in refusal(capsys, run, REPO)
    assert hub.repos[REPO].files()["model.bin"] == b"theirs"
    assert len(hub.repos[REPO].branches["main"]) == 1
    assert push(run, REPO, overwrite=True).deleted == 1
    assert "model.bin" not in hub.repos[REPO].files()


def test_another_runs_push_is_not_written_over(hub, run, tmp_path):
    push(make_run(tmp_path / "other", b"other weights"), REPO)
    with refused("push", REPO, "--overwrite"):
        push(run, REPO)
    assert hub.repos[REPO].files()[WEIGHTS] == b"other weights"


def test_a_run_is_known_by_its_mark_when_its_record_of_commits_is_lost(hub, run):
    push(run, REPO)
    record = json.loads((run / "hub.json").read_text())
    (run / "hub.json").write_text(json.dumps({**record, "commits": {}}))
    (run / "student" / WEIGHTS).write_bytes(b"new weights")
    assert push(run, REPO).uploaded == 1


def test_an_edit_on_the_hub_is_not_lost(hub, run, capsys):
    push(run, REPO)
    repo = hub.repos[REPO]
    repo.add("main", {**repo.files(), "README.md": b"edited by hand"}, "edit")
    assert "commits since this run's last push" in refusal(capsys, run, REPO)
    assert repo.files()["README.md"] == b"edited by hand"


def test_a_commit_that_overtakes_the_push_stops_it(hub, run, capsys):
    repo = hub.create(REPO)
    hub.before_commit = lambda: repo.add("main", {**repo.files(), "x": b"theirs"}, "theirs")
    assert "changed by somebody else during the push" in refusal(capsys, run, REPO)
    assert set(repo.files()) == {".gitattributes", "x"}


def test_a_conflict_is_not_retried(hub, run):
    hub.faults = [Fault("/commit/", 409)]
    with refused("push", REPO, "somebody"):
        push(run, REPO)
    assert hub.count("/commit/") == 1


@pytest.mark.parametrize("name", ["student", "me/a/b", "me/a--b", "me/ü", "/x", "me/" + "a" * 99])
def test_a_name_the_hub_would_not_take_is_refused_before_anything_is_sent(hub, run, capsys, name):
    assert "is not OWNER/NAME" in refusal(capsys, run, name)
    assert hub.seen == []


@pytest.mark.parametrize("gone", ["summary.json", "recipe.yaml"])
def test_an_unfinished_run_is_refused(hub, run, capsys, gone):
    (run / gone).unlink()
    assert "not finished" in (line := refusal(capsys, run, REPO)) or "no recipe.yaml" in line
    assert hub.seen == []


def test_no_token_is_said(hub, run, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "no token" in refusal(capsys, run, REPO)
    assert hub.seen == []


def test_a_wrong_token_is_said(hub, run, capsys):
    hub.token = "another"
    assert "refused the token" in refusal(capsys, run, REPO)


def test_a_token_that_may_not_write_there_is_said(hub, run, capsys):
    assert "may not write to you/student" in refusal(capsys, run, "you/student")
    hub.create("you/student")
    assert "may not write to you/student" in refusal(capsys, run, "you/student")


def test_a_damaged_record_is_named(hub, run, capsys):
    (run / "hub.json").write_text("{")
    assert "hub.json is damaged" in refusal(capsys, run, REPO)


def test_a_damaged_file_is_named_before_anything_is_sent(hub, run, capsys):
    (run / "student" / "unet" / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(capsys, run, REPO)
    assert hub.seen == []


def test_offline_mode_is_said(hub, run, capsys, monkeypatch, pauses):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_sessions()
    assert "HF_HUB_OFFLINE is set" in refusal(capsys, run, REPO)
    assert pauses == []


def test_an_unreachable_hub_is_said(hub, run, capsys, monkeypatch, pauses):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refusal(capsys, run, REPO)
    assert pauses == [1.0, 2.0, 4.0]


# ---- the token


@pytest.mark.parametrize(
    "where", ["GET /api/models", "/api/validate-yaml", "/preupload/", "/commit/"]
)
@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_a_token_that_the_server_repeats_is_not_repeated(hub, run, capfd, caplog, where, status):
    caplog.set_level(logging.DEBUG)
    body = json.dumps({"error": f"no: {TOKEN}", "errors": [{"message": f"no: {TOKEN}"}],
                       "warnings": [{"message": f"beware: {TOKEN}"}]})  # fmt: skip
    echo = {"X-Error-Message": f"no: {TOKEN}", "X-HF-Warning": f"topic; {TOKEN}"}
    hub.faults = [Fault(where, status, times=99, body=body, headers=echo)]
    with pytest.raises(UserError) as error:
        push(run, REPO)
    assert error.value.__cause__ is None and error.value.__suppress_context__
    out, err = capfd.readouterr()
    for text in (str(error.value), out, err, caplog.text):
        assert TOKEN not in text
    assert "\n" not in str(error.value) and error.value.key == "push"


def test_the_command_in_its_own_process_never_shows_the_token(hub, run):
    """With the client's debugging on, and a server that repeats the token."""
    body = json.dumps({"error": f"Invalid token {TOKEN}"})
    hub.faults = [Fault("POST /api/repos", 401, body=body, headers={"X-HF-Warning": f"a; {TOKEN}"})]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1",
    }  # fmt: skip
    words = [sys.executable, "-m", "distill", "push", str(run), REPO]
    results = [subprocess.run(words, capture_output=True, text=True, env=environment) for _ in "ab"]
    assert [r.returncode for r in results] == [2, 0], results
    assert results[0].stderr.startswith("distill: push: the Hub refused the token")
    assert all(TOKEN not in r.stdout + r.stderr for r in results)
    assert results[0].stderr.count("\n") == 1
    written = [p.read_bytes() for p in run.rglob("*") if p.is_file()]
    assert not any(TOKEN.encode() in content for content in written)

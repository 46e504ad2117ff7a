"""Checkpoints: what they give back, damage, and kills at any moment."""

from pathlib import Path

import pytest
import torch

from distill.training import checkpoint
from tests.helpers.refusals import refused

STATE = {"a": [torch.arange(3), 2, None], "b": {"c": torch.ones(2, 2), "d": "text"}}


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path):
    checkpoint.save(STATE, tmp_path / "step-1", {"step": 1})
    found = checkpoint.load(tmp_path / "step-1")
    assert torch.equal(found["a"][0], STATE["a"][0])
    assert found["a"][1:] == [2, None]
    assert torch.equal(found["b"]["c"], STATE["b"]["c"])
    assert checkpoint.about(tmp_path / "step-1")["step"] == 1


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_checkpoint_is_refused_by_name_with_its_remedy(tmp_path, name, harm):
    checkpoint.save(STATE, tmp_path / "step-1")
    path: Path = tmp_path / "step-1" / name
    path.write_bytes(path.read_bytes()[:-5]) if harm == "cut" else path.unlink()
    with refused("checkpoint */step-1", "1", name):
        checkpoint.load(tmp_path / "step-1")


@pytest.mark.parametrize("halfway", [False, True], ids=["before", "after"])
def test_a_replacement_killed_at_any_moment_loses_nothing(tmp_path, monkeypatch, halfway):
    """Stop before or after each change to the folder in turn; a removal may stop half done."""
    old, new = ({"step": torch.tensor(v)} for v in (1, 2))
    root, place = tmp_path / "root", tmp_path / "root" / "step-000001"
    real = {"replace": checkpoint.os.replace, "rmtree": checkpoint.shutil.rmtree}
    moments = 0

    def killed_at(moment):
        left = [moment]

        def stops(act):
            def do(path, *more, **options):
                nonlocal moments
                moments += 1
                left[0] -= 1
                if left[0] == 0 and not halfway:
                    raise KeyboardInterrupt
                if left[0] == 0 and act == "rmtree" and path.exists():
                    (path / "manifest.json").unlink()
                else:
                    real[act](path, *more, **options)
                if left[0] == 0:
                    raise KeyboardInterrupt

            return do

        monkeypatch.setattr(checkpoint.os, "replace", stops("replace"))
        monkeypatch.setattr(checkpoint.shutil, "rmtree", stops("rmtree"))

    def unharmed():
        monkeypatch.setattr(checkpoint.os, "replace", real["replace"])
        monkeypatch.setattr(checkpoint.shutil, "rmtree", real["rmtree"])

    for moment in range(1, 20):
        unharmed()
        checkpoint.save(old, place)
        moments = 0
        killed_at(moment)
        try:
            checkpoint.save(new, place)
            break
        except KeyboardInterrupt:
            unharmed()
        found = int(checkpoint.load(place)["step"])  # as a reader finds it
        assert found in (1, 2)
        assert checkpoint.steps(root) == [place]
        checkpoint.prune(root, 2)
        assert [p.name for p in root.iterdir()] == [place.name]
        assert int(checkpoint.load(place)["step"]) == found
    assert moments >= 4  # a draft, two renames and a removal; the last time none was cut


def test_a_save_after_a_killed_one_takes_its_place(tmp_path, monkeypatch):
    best = tmp_path / "best"
    checkpoint.save({"step": 1}, best)
    best.rename(tmp_path / ".best.old")  # all that a kill between the two renames leaves
    assert checkpoint.load(best) == {"step": 1}
    checkpoint.save({"step": 2}, best)
    assert checkpoint.load(best) == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_save_cut_short_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoint.save(STATE, tmp_path / "step-1")
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(STATE, tmp_path / "step-2")
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-1"]
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]

"""Checkpoints: what comes back, what is refused, and what a crash leaves behind."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mutune.errors import Refusal
from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig
from mutune.parametrization.plan import Plan
from mutune.training import checkpoint
from tests.training.tiny import (
    BASE,
    HYPER,
    same_parameters,
    tiny_decoder,
    tiny_optimizer,
    tiny_plan,
    tiny_train,
    with_rate,
)

SHAPE = ModelConfig(width=32, depth=2, head_size=16)
META = {"data": "abc", "tokenizer": {"vocab_size": 31}}


def fresh(seed: int = 0) -> tuple[Decoder, torch.optim.AdamW, Plan]:
    plan = tiny_plan(SHAPE)
    model = tiny_decoder(SHAPE, plan, seed)
    return model, tiny_optimizer(model, plan), plan


def saved(root: Path, step: int, keep: int = 3, meta: dict[str, Any] = META) -> Path:
    model, optimizer, plan = fresh()
    tiny_train(model, optimizer, 1)
    return checkpoint.save(root, step, model, optimizer, plan, meta, keep)


def newest(root: Path) -> checkpoint.Checkpoint:
    found = checkpoint.newest(root)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------------ what comes back
def test_a_restored_run_continues_like_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    undisturbed, undisturbed_optimizer, _ = fresh()
    expected = tiny_train(undisturbed, undisturbed_optimizer, 12)

    first, first_optimizer, plan = fresh()
    tiny_train(first, first_optimizer, 7)
    checkpoint.save(tmp_path, 7, first, first_optimizer, plan, META, keep=2)
    second, second_optimizer, _ = fresh(seed=99)
    found = newest(tmp_path)
    checkpoint.check_meta(found, plan, META)
    checkpoint.restore(found, second, second_optimizer)

    assert found.step == 7
    assert tiny_train(second, second_optimizer, 12, start_step=found.step) == expected[7:]
    assert same_parameters(second, undisturbed)
    for one, other in zip(second.parameters(), undisturbed.parameters(), strict=True):
        for key in checkpoint.STATE_KEYS:
            assert torch.equal(second_optimizer.state[one][key], undisturbed_optimizer.state[other][key])


def test_a_checkpoint_before_the_first_update_restores_the_initial_model(tmp_path: Path) -> None:
    model, optimizer, plan = fresh()
    checkpoint.save(tmp_path, 0, model, optimizer, plan, META, keep=1)
    other, other_optimizer, _ = fresh(seed=99)
    checkpoint.restore(newest(tmp_path), other, other_optimizer)
    assert same_parameters(other, model)
    assert tiny_train(other, other_optimizer, 3) == tiny_train(model, optimizer, 3)


def test_the_newest_are_kept_and_the_rest_is_dropped(tmp_path: Path) -> None:
    for step in (5, 9, 10, 100):
        saved(tmp_path, step, keep=2)
    assert sorted(checkpoint.list_steps(tmp_path)) == [10, 100]
    assert newest(tmp_path).step == 100


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    saved(tmp_path, 5, meta={"data": "old"})
    saved(tmp_path, 5, meta={"data": "new"})
    assert newest(tmp_path).meta["data"] == "new"


def test_a_step_that_is_saved_again_is_never_half_removed_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_half_way(path: Path, ignore_errors: bool = False) -> None:
        (path / "state.safetensors").unlink()
        raise KeyboardInterrupt

    saved(tmp_path, 5, meta={"data": "old"})
    with monkeypatch.context() as crash:
        crash.setattr(shutil, "rmtree", die_half_way)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 5, meta={"data": "new"})
    assert newest(tmp_path).meta["data"] == "new"
    model, optimizer, _ = fresh(seed=99)
    checkpoint.restore(newest(tmp_path), model, optimizer)
    saved(tmp_path, 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]


@pytest.mark.parametrize("name", ["²", "007", "x", "٣"])
def test_a_folder_that_is_not_named_as_a_step_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / "77").touch()  # a file is none either
    assert checkpoint.newest(tmp_path) is None
    saved(tmp_path, 5, keep=1)
    assert newest(tmp_path).step == 5
    assert (tmp_path / name).is_dir()


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "none") is None


def test_a_checkpoint_is_two_safe_files(tmp_path: Path) -> None:
    path = saved(tmp_path, 5)
    assert sorted(file.name for file in path.iterdir()) == ["meta.json", "state.safetensors"]
    assert json.loads((path / "meta.json").read_text())["plan"] == tiny_plan(SHAPE).as_dict()


# ------------------------------------------------------------------------------------------------------ what is refused
def test_a_checkpoint_of_the_same_run_is_accepted_whatever_kind_of_sequence_its_facts_hold(tmp_path: Path) -> None:
    meta = {**META, "stages": ((128, 4), (256, 2))}
    saved(tmp_path, 5, meta=meta)
    checkpoint.check_meta(newest(tmp_path), tiny_plan(SHAPE), meta)


@pytest.mark.parametrize(
    ("plan", "meta", "difference"),
    [
        pytest.param(
            tiny_plan(SHAPE, hyperparameters=with_rate(0.04)),
            META,
            r"plan\.parameters\.wte\.weight\.peak_lr is 0\.02 there and 0\.04 now",
            id="rate",
        ),
        pytest.param(tiny_plan(SHAPE, "sp"), META, r"plan\.table is mup there and sp now", id="table"),
        pytest.param(
            tiny_plan(SHAPE, hyperparameters=replace(HYPER, output_multiplier=3.0)),
            META,
            r"plan\.multipliers\.output\.value is 0\.75 there and 1\.5 now",
            id="multiplier",
        ),
        pytest.param(
            tiny_plan(BASE),
            META,
            r"plan\.parameters\.wte\.weight\.shape is 31x32 there and 31x16 now",
            id="width",
        ),
        pytest.param(
            tiny_plan(replace(SHAPE, activation="gelu")),
            META,
            r"it has plan\.parameters\.h\.0\.mlp\.c_fc2\.weight\.name, which the model now lacks",
            id="tensor-gone",
        ),
        pytest.param(
            tiny_plan(replace(SHAPE, positions="learned")),
            META,
            r"plan\.parameters\.wpe\.weight\.name is None there and wpe\.weight now",
            id="tensor-new",
        ),
        pytest.param(tiny_plan(SHAPE), {**META, "data": "xyz"}, r"data is abc there and xyz now", id="data"),
        pytest.param(
            tiny_plan(SHAPE),
            {**META, "tokenizer": {"vocab_size": 32}},
            r"tokenizer\.vocab_size is 31 there and 32 now",
            id="tokenizer",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(
    tmp_path: Path, plan: Plan, meta: dict[str, Any], difference: str
) -> None:
    saved(tmp_path, 5)
    with pytest.raises(Refusal, match=rf"checkpoint .*5 was written by another run: {difference}; use another name="):
        checkpoint.check_meta(newest(tmp_path), plan, meta)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_state_is_refused_in_one_sentence(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path, 5) / "state.safetensors"
    os.truncate(path, int(share * path.stat().st_size))
    model, optimizer, _ = fresh(seed=99)
    with pytest.raises(
        Refusal,
        match=r"^checkpoint .*5 is damaged \(.*\); there is none before it, so begin anew with .*overwrite=true\.$",
    ):
        checkpoint.restore(newest(tmp_path), model, optimizer)
    assert same_parameters(model, fresh(seed=99)[0])  # nothing was loaded


def test_a_state_without_one_of_the_tensors_is_refused_in_one_sentence(tmp_path: Path) -> None:
    model, optimizer, plan = fresh()
    path = checkpoint.save(tmp_path, 5, model, optimizer, plan, META, keep=1) / "state.safetensors"
    header = b"{}".ljust(path.stat().st_size - 8)  # a valid file, as long as it was, that holds nothing
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(
        Refusal,
        match=r"is damaged \(.*wte\.weight.*\); there is none before it, so begin anew with .*overwrite=true\.$",
    ):
        checkpoint.restore(newest(tmp_path), model, optimizer)


@pytest.mark.parametrize("text", ["", '{"step": 5, "pl', "[]", "{}"])
def test_a_truncated_description_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    (saved(tmp_path, 5) / "meta.json").write_text(text)
    with pytest.raises(
        Refusal,
        match=r"^checkpoint .*5 cannot be read \(.*\); there is none before it, so begin anew with .*overwrite=true\.$",
    ):
        checkpoint.newest(tmp_path)


# ------------------------------------------------------------------------------------------- what a crash leaves behind
def test_a_partial_folder_is_ignored_and_replaced(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    partial = tmp_path / ".9.partial"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half")
    assert newest(tmp_path).step == 5
    path = saved(tmp_path, 9)
    assert sorted(file.name for file in path.iterdir()) == ["meta.json", "state.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["5", "9"]


def test_the_next_checkpoint_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".7.partial").mkdir()
    (tmp_path / ".7.partial" / "state.safetensors").write_bytes(b"half")
    saved(tmp_path, 9)
    assert [file.name for file in tmp_path.iterdir()] == ["9"]


def test_a_file_that_a_killed_process_was_writing_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".gone_back.json.42.partial").write_text("{")
    saved(tmp_path, 9)
    assert [file.name for file in tmp_path.iterdir()] == ["9"]


def test_a_checkpoint_that_was_moved_to_another_disk_is_rotated_and_set_aside_as_a_link(tmp_path: Path) -> None:
    root, archive = tmp_path / "checkpoints", tmp_path / "archive"
    archive.mkdir()
    for step in (5, 9):
        saved(root, step)
        (root / str(step)).rename(archive / str(step))
        (root / str(step)).symlink_to(archive / str(step))
    assert newest(root).step == 9
    for _ in "ab":
        assert checkpoint.set_aside(root, 5) == [9]
        (root / "9").symlink_to(archive / "9")
    saved(root, 11, keep=1)
    assert sorted(file.name for file in root.iterdir()) == ["11", "9.aside"]
    assert sorted(file.name for file in archive.iterdir()) == ["5", "9"]
    assert checkpoint.read(archive / "9").step == 9


@pytest.mark.parametrize(
    ("name", "text", "ask"),
    [
        ("gone_back.json", "{", lambda root: checkpoint.choose(root, 5)),
        ("gone_back.json", "[1]", lambda root: checkpoint.choose(root, 5)),
        ("kept_every.json", '{"steps": null}', lambda root: checkpoint.kept_every(root, None)),
        ("kept_every.json", '{"steps": [0]}', lambda root: checkpoint.kept_every(root, 3)),
    ],
)
def test_a_damaged_note_beside_checkpoints_is_refused(
    name: str, text: str, ask: Callable[[Path], object], tmp_path: Path
) -> None:
    saved(tmp_path, 5)
    (tmp_path / name).write_text(text)
    with pytest.raises(Refusal, match=f"{name} is damaged .*; restore it, or remove it"):
        ask(tmp_path)


@pytest.mark.parametrize(
    "change", [{"guard": []}, {"files": ["a"]}, {"files": {"a": "b"}}, {"step": 1e400}, {"plan": 1}, {"versions": "x"}]
)
def test_a_description_of_the_wrong_kind_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path, 5) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(Refusal, match=r"^checkpoint .*5 cannot be read \(.*\); there is none before it"):
        checkpoint.newest(tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 5)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        saved(tmp_path, 9)
    assert [file.name for file in tmp_path.iterdir()] == ["5"]
    model, optimizer, _ = fresh(seed=99)
    checkpoint.restore(newest(tmp_path), model, optimizer)

"""Runs that are killed, that move to other ranks, whose disk fills up or goes bad: they go on, or
say what is wrong.

tests/crash.py kills at all points; here are the nastiest. Damaged files are read by runs of this
process.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import crash
import launch
import pytest
import torch.distributed as dist
import toy

from infra import checkpoint, watchdog
from infra.checkpoint import damage, read_state

KL = ["--kl_coef", 0.1, "--kl_target", 0.01]  # one more state to lose


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "model"
    toy.make_model(str(path))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """whole(ranks): what a run has left that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--model", model, *crash.FLAGS, *KL]
    return functools.cache(lambda world: crash.reference(world, folder, flags))


@pytest.mark.parametrize(
    ("world", "chain"),
    [
        (
            1,
            [
                ("config.json: half", "0"),
                ("save: half a file", "0"),
                ("save: old one half deleted", "0"),
                ("resume: metrics.jsonl half cut", "0"),
                ("metrics.jsonl: half a line", "0"),
            ],
        ),
        (
            2,
            [
                ("save: before the manifest", "1"),
                ("save: before the rename", "0"),
                ("update: policy's, then critic's step", "all"),
            ],
        ),
    ],
)
def test_killed_runs_go_on(tmp_path, model, whole, world, chain):
    """Guards checkpoints that are whole or absent, files that are cut to the checkpoint, and
    everything a step depends on: after each kill -9 the next start goes on from the newest whole
    checkpoint, and in the end all is as if nothing had happened, to the last bit. (Once nothing
    could be started after a kill in the first write of config.json.)"""
    flags = ["--model", model, *crash.FLAGS, *KL]
    lines = crash.crash(world, tmp_path / "run", flags, chain, whole(world))
    assert not (wrong := [line for line in lines if line["wrong"]]), json.dumps(wrong, indent=1)
    rows = whole(world)["metrics.jsonl"]
    assert len({row["policy/kl_coef"] for row in rows if "policy/kl_coef" in row}) > 1


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_all_points(capsys, world):
    """Guards every other place: all points of tests/crash.py."""
    failed = crash.main([], 0, [world])
    assert not failed, capsys.readouterr().out


def test_ranks_may_change(tmp_path, model, whole):
    """Guards what is in a checkpoint against depending on who wrote it: two steps each on one
    process, on two ranks, and on one again, with the KL's controller, are the steps of one
    process."""
    for steps, world in ((2, 1), (4, 2), (6, 1)):
        flags = ["--model", model, *crash.FLAGS, *KL, "--steps", steps]
        said = launch.run("tests/toy.py", tmp_path / "run", *flags, ranks=world).good().said
        assert f"steps {steps - 2} to {steps}" in said
    keys = [
        "policy/loss",
        "policy/grad_norm",
        "policy/ref_kl",
        "policy/kl_coef",
        "policy/entropy",
        "critic/loss",
        "critic/grad_norm",
        "critic/explained_var",
        "reward/mean",
        "rollout/length_mean",
    ]
    rows = launch.metrics(tmp_path / "run")
    for row, expected in zip(rows, whole(1)["metrics.jsonl"], strict=True):
        for key in keys if row["step"] else ["eval/correct"]:
            assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (row["step"], key)


def test_the_watch_ends_before_the_run(monkeypatch):
    """Guards the exit code of a run that has done all: a thread that is still inside torch's store
    when the interpreter ends, aborts it (once a whole run on a busy machine ended with 134, and
    torchrun called that a failure)."""
    store, asked = dist.TCPStore("127.0.0.1", 0, is_master=True), threading.Event()
    env = {
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "MASTER_ADDR": "127.0.0.1",
    }
    for name, value in (env | {"MASTER_PORT": store.port}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(watchdog, "place", lambda: asked.set() or time.sleep(1) or "a busy place")
    watchdog.watched(lambda args: asked.wait(60))(argparse.Namespace(stall_minutes=1.0))
    watches = [thread for thread in threading.enumerate() if isinstance(thread, watchdog.Watch)]
    assert asked.is_set() and not watches


# ------------------------------------------------------------------------------------------------------ damaged files

SMALL = [
    "--prompts_per_step",
    "16",
    "--minibatch_size",
    "16",
    "--ppo_epochs",
    "1",
    "--steps",
    "4",
    "--save_every",
    "1",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model) -> Path:
    """A run with the checkpoints of its steps 2, 3 and 4."""
    out = tmp_path_factory.mktemp("saved") / "run"
    toy.run(str(out), "--model", str(model), *SMALL)
    return out


def resume(out: Path, model: Path, *more: str) -> list[dict]:
    return toy.run(str(out), "--model", str(model), *SMALL, "--resume", "auto", *more)


def same_numbers(rows: list[dict], others: list[dict]) -> bool:
    return [launch.numbers(row) for row in rows] == [launch.numbers(row) for row in others]


def digests(folder: Path, but: tuple = ()) -> dict[str, str]:
    """Of every file below; time stamps too: nothing may be written again."""
    return {
        str(
            path.relative_to(folder)
        ): f"{path.lstat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part in path.parts for part in but)
    }


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "policy/model.safetensors": cut,
    "critic.optimizer.safetensors": lambda path: flip(path, 8 * path.stat().st_size - 9),
    "policy.optimizer.safetensors": Path.unlink,
    "state.json": Path.unlink,
    "policy/tokenizer.json": lambda path: path.write_text(""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_not_used(tmp_path, model, saved, capsys, name):
    """Guards the digests, and the good checkpoints: a truncated, flipped, missing or empty file of
    the newest one is named, the one before is used and not touched, and the step that was lost is
    done again."""
    out = tmp_path / "run"
    shutil.copytree(saved, out, symlinks=True)
    DAMAGES[name](out / "checkpoints" / "step_4" / name)
    before = {step: digests(out / "checkpoints" / f"step_{step}") for step in (2, 3, 4)}
    rows = resume(out, model)
    said = capsys.readouterr().out
    warning = next(
        line for line in said.splitlines() if line.startswith("warning") and "damaged" in line
    )
    assert (
        str(out / "checkpoints" / "step_4") in warning
        and name in warning
        and "steps 3 to 4" in said
    )
    after = {"2": before[2], "3": before[3], "4.damaged": before[4]}
    assert {step: digests(out / "checkpoints" / f"step_{step}") for step in after} == after
    assert same_numbers(rows, launch.metrics(saved))
    assert (
        not damage(out / "checkpoints" / "latest")
        and os.readlink(out / "checkpoints" / "latest") == "step_4"
    )


def test_a_step_may_go_bad_twice(tmp_path, model, monkeypatch):
    """Guards the error's name and the dump of a run that ends at the same number after a resume.
    (Once the second end was an OSError: bad_step_1 existed.)"""
    monkeypatch.setattr(
        toy,
        "toy",
        lambda text, row, rules=None: {"reward": float("nan"), "correct": 0.0, "status": "ok"},
    )
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="step 1: .*rewards"):
            resume(tmp_path / "run", model)
        bad = tmp_path / "run" / "bad_step_1"
        assert not damage(bad) and (bad / "batch.pt").exists()


def test_leftovers_of_an_end_are_removed(tmp_path, model, saved, capsys):
    """Guards the disk against halves of checkpoints that no later save has the name of, and
    `latest` against staying behind for ever when a kill came between the last rename and the link:
    also when no step is left to do."""
    out = tmp_path / "run"
    shutil.copytree(saved, out, symlinks=True)
    shutil.copytree(out / "checkpoints" / "step_2", out / "checkpoints" / "step_1.tmp")
    shutil.copytree(out / "checkpoints" / "step_2", out / "checkpoints" / "step_1.old")
    checkpoint.point(out / "checkpoints" / "latest", "step_3")
    assert resume(out, model) == [] and "nothing is left to do" in capsys.readouterr().out
    assert sorted(os.listdir(out / "checkpoints")) == ["latest", "step_2", "step_3", "step_4"]
    assert os.readlink(out / "checkpoints" / "latest") == "step_4"


def test_no_flipped_bit_gets_through(tmp_path, saved):
    """Guards the seal of state.json, which holds the digests of all other files: of random bits
    flipped in it, each is noticed, or it is one that changes nothing (a space for a tab)."""
    copy, rng = tmp_path / "step_4", random.Random(0)
    shutil.copytree(saved / "checkpoints" / "step_4", copy)
    path, state = copy / "state.json", read_state(copy)
    assert not damage(copy)
    for bit in (rng.randrange(8 * path.stat().st_size) for _ in range(400)):
        flip(path, bit)
        assert damage(copy) or read_state(copy) == state, bit
        flip(path, bit)
    for name in read_state(copy)["files"]:
        bit = rng.randrange(8 * (copy / name).stat().st_size)
        flip(copy / name, bit)
        assert damage(copy) == [f"{name} is not what was written"]
        flip(copy / name, bit)
    assert not damage(copy)


def test_every_shard_is_listed(whole):
    """Guards the list of files, by which a missing one is noticed, against holding only those of
    rank 0."""
    files = {name for name in whole(2)["files"] if "-of-00002" in name}
    assert len(files) == 8, files  # weights and moments of two models, from two ranks


def test_no_whole_checkpoint_is_no_start(tmp_path, model, saved, capsys):
    """Guards a run against beginning anew over its own metrics when all its checkpoints are
    damaged: not at the first try, nor at the second (once damaged ones had got another name by
    then, and none were left to find)."""
    out = tmp_path / "run"
    shutil.copytree(saved, out, symlinks=True)
    for step in (2, 3, 4):
        cut(out / "checkpoints" / f"step_{step}" / "critic" / "model.safetensors")
    before = digests(out)
    for _ in range(2):
        with pytest.raises(ValueError, match="none of 3 checkpoints"):
            resume(out, model)
        assert (
            capsys.readouterr().out.count("critic/model.safetensors is not what was written") == 3
        )
        assert digests(out) == before


def test_another_run_is_refused(tmp_path, model, saved):
    """Guards a run against going on with other flags, unnoticed: all that differ are named with
    both values. Flags that change no number may differ."""
    before = digests(saved)
    with pytest.raises(ValueError) as error:
        resume(saved, model, "--gamma", "0.9", "--lr", "0.5", "--save_every", "3", "--steps", "5")
    assert "gamma: 1.0 there, 0.9 now; lr: 0.001 there, 0.5 now" in str(error.value)
    assert "save_every" not in str(error.value) and "step_4" in str(error.value)
    with pytest.raises(ValueError, match="--resume auto"):
        toy.run(str(saved), "--model", str(model), *SMALL)
    assert digests(saved) == before


def test_other_folders_are_left_alone(tmp_path, model):
    """Guards folders of the user: notes, and a model, whose config.json is no run's (once it was
    written over)."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "diary.txt").write_text("dear diary")
    shutil.copytree(model, tmp_path / "model")
    before = digests(tmp_path)
    for folder in (notes, tmp_path / "model"):
        with pytest.raises(ValueError, match="no run folder"):
            resume(folder, model)
    assert digests(tmp_path) == before


# -------------------------------------------------------------------------------------------------------------- disks


def on_a_disk(what: str, folder: Path, model: Path, *rest) -> launch.Ended:
    end = launch.run("tests/disks.py", what, folder, model, *rest)
    if end.code == 77:
        pytest.skip(end.said.strip().splitlines()[-1])
    return end


def test_a_full_disk(tmp_path, model, saved):
    """Guards the checkpoint before the one that the disk has no room for; and the message: which
    folder, what to do."""
    sizes = {path: path.stat().st_size for path in saved.rglob("*") if path.is_file()}
    size = sum(size for path, size in sizes.items() if "checkpoints" not in path.parts)
    size += int(2.5 * sum(size for path, size in sizes.items() if "step_4" in path.parts))
    said = on_a_disk("full", tmp_path, model, size, *SMALL).good().said
    (error,) = [line for line in said.splitlines() if line.startswith("the first ended with: ")]
    for part in (
        "run/checkpoints/step_3 could not be",
        "No space left",
        "step_2. Make room, then --resume auto",
    ):
        assert part in error, error
    first, second = (tmp_path / name / "checkpoints" for name in ("first", "second"))
    assert sorted(os.listdir(first)) == ["latest", "step_1", "step_2"]
    assert sorted(os.listdir(second)) == ["latest", "step_1", "step_2", "step_3", "step_4"]
    for step in ("step_1", "step_2"):
        assert digests(first / step) == digests(second / step)
    assert "steps 2 to 4" in said
    assert same_numbers(launch.metrics(tmp_path / "second"), launch.metrics(saved))


def test_a_read_only_folder(tmp_path, model, saved):
    """Guards the checkpoints, and the message: which file, what to do."""
    shutil.copytree(saved, tmp_path / "run", symlinks=True)
    before = digests(tmp_path / "run")
    end = on_a_disk("read-only", tmp_path / "run", model, *SMALL, "--steps", "5")
    said = end.said.strip()[-600:]
    assert end.code == 1 and "Read-only file system" in said
    assert f"{tmp_path}/run/" in said and "make it writable" in said
    assert digests(tmp_path / "run") == before

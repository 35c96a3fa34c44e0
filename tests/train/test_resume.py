"""A fold that is stopped or killed at any point ends with the same bytes as an uninterrupted fold."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_commits import small_commits

from mbqueue.errors import CheckpointError
from mbqueue.results.tables import HISTORY_COLUMNS
from mbqueue.storage.manifest import manifest_of
from mbqueue.storage.own_commits import Staged
from mbqueue.train.chgnet import model_bytes

_TIMING = {"seconds", "structures_per_second", "session"}


def essence(folder: Path) -> dict[str, Any]:
    """The parts of a fold that must be identical in every run."""
    newest = small_commits(folder).manifests()[-1]
    rows = [{key: value for key, value in row.items() if key not in _TIMING} for row in newest.history]
    weights = hashlib.sha256((folder / f"{newest.stem}.pt").read_bytes()).hexdigest()
    return {"epoch": newest.epoch, "complete": newest.complete, "weights": weights, "history": rows}


def straight(bench: Any, helpers: Any, folder: Path, **options: Any) -> Any:
    run = bench.run(folder, **options)
    for epoch in (1, 2):
        assert helpers.train_epoch(run, epoch).finished
    return run


def killed_at_every_step(bench: Any, helpers: Any, folder: Path, **options: Any) -> tuple[Any, list[list[str]]]:
    """Train each step in a new FoldRun that resumes from the files of the previous one.

    Return the last run, and the names of the sessions of each epoch.

    With a soup of the best epochs, each epoch is validated twice. A run that stops after one validation would repeat
    that validation forever, so each run then does two steps or validations.
    """
    fence, at_once, sessions = 0, 2 if options.get("soup_of") == "best" else 1, list[list[str]]()
    for epoch in (1, 2):
        finished = False
        sessions.append([])
        while not finished:
            fence += 1
            sessions[-1].append(f"s{fence}")
            run = bench.run(folder, **options)
            finished = helpers.train_epoch(run, epoch, stop_after=at_once, fence=fence, session=f"s{fence}").finished
    # An epoch consists of `steps_per_epoch` training steps and `at_once` validations. Each run stops after
    # `at_once` steps or validations.
    assert fence == 2 * -(-(run.steps_per_epoch + at_once) // at_once)
    return run, sessions


@pytest.fixture(scope="module")
def whole(bench: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commits of an uninterrupted run with default options."""
    folder = tmp_path_factory.mktemp("whole")
    straight(bench, helpers, folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trainable": "head"},
        {"kind": "scalar"},
        {"kind": "scalar", "trainable": "head", "soup": 5},
        {"kind": "class", "soup": 2},
        {"kind": "class", "trainable": "head", "soup": 2, "soup_of": "best"},
        {
            "ema_decay": 0.9,
            "layer_lr_decay": 0.8,
            "unfreeze_epochs": 1,
            "strain": 0.01,
            "jitter": 0.02,
            "group_by_size": True,
        },
    ],
    ids=["full", "head", "scalar", "scalar head soup", "class soup", "class head best soup", "all levers"],
)
def test_stopping_after_every_step_changes_no_byte(
    bench_of: Any, helpers: Any, tmp_path: Path, options: Any, device: torch.device
) -> None:
    bench = bench_of(options.get("kind", "energy"))
    whole = straight(bench, helpers, tmp_path / "whole", device=device, **options)
    pieces, sessions = killed_at_every_step(bench, helpers, tmp_path / "pieces", device=device, **options)
    assert essence(tmp_path / "pieces") == essence(tmp_path / "whole")
    assert model_bytes(pieces.best_model()) == model_bytes(whole.best_model())
    assert np.array_equal(pieces.predict_test(pieces.best_model()), whole.predict_test(whole.best_model()))
    rows = pieces.history()
    assert [row["epoch"] for row in rows] == [1, 2], "each epoch's row is written once"
    assert all(tuple(row) == HISTORY_COLUMNS for row in rows)
    assert [row["session"] for row in rows] == ["+".join(names) for names in sessions]
    assert rows[0]["seconds"] > 0


def test_another_seed_gives_another_result(bench: Any, helpers: Any, tmp_path: Path, whole: Path) -> None:
    straight(bench, helpers, tmp_path, seed=1)
    assert essence(whole)["weights"] != essence(tmp_path)["weights"]
    assert essence(whole)["history"] != essence(tmp_path)["history"]


def test_a_commit_in_mid_epoch_is_made_in_the_background_and_continues_exactly(
    bench: Any, helpers: Any, tmp_path: Path, whole: Path
) -> None:
    published: list[str] = []
    dead = tmp_path / "dead"

    class Killed(BaseException):
        pass

    def publish(staged: Staged) -> None:
        published.append(staged.publish().stem)

    def die_when_published(_report: Any) -> None:
        if published:
            raise Killed

    # A checkpoint is due at every step, but the background thread decides how many checkpoints are published.
    for fence in range(1, 40):
        try:
            outcome = helpers.train_epoch(
                bench.run(dead), 1, fence=fence, save=publish, on_step=die_when_published, checkpoint_seconds=0.0
            )
        except Killed:
            break
        assert outcome.finished
        published.clear()
        for path in dead.iterdir():
            path.unlink()
    assert published[0].startswith("e0001-s00000"), "no commit was published in mid-epoch"
    run = bench.run(dead)
    for epoch in (1, 2):
        assert helpers.train_epoch(run, epoch, fence=50 + epoch).finished
    assert essence(dead) == essence(whole)


def test_stopping_before_the_first_step_writes_nothing(bench: Any, helpers: Any, tmp_path: Path) -> None:
    outcome = helpers.train_epoch(bench.run(tmp_path / "c"), 1, stop_after=0)
    assert not outcome.finished
    assert not (tmp_path / "c").exists()


def test_stopping_where_the_last_commit_is_writes_nothing(bench: Any, helpers: Any, tmp_path: Path) -> None:
    helpers.train_epoch(bench.run(tmp_path), 1, stop_after=2)
    before = sorted(tmp_path.iterdir())
    assert "e0001-s000002-f0001.json" in [path.name for path in before]
    assert not helpers.train_epoch(bench.run(tmp_path), 1, stop_after=0, fence=2).finished
    assert sorted(tmp_path.iterdir()) == before


def test_a_finished_epoch_is_not_trained_again(bench: Any, helpers: Any, tmp_path: Path) -> None:
    first = helpers.train_epoch(bench.run(tmp_path), 1)
    again = helpers.train_epoch(bench.run(tmp_path), 1, fence=2, stop_after=0)
    assert again == first


def test_an_epoch_cannot_start_when_the_one_before_is_missing(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path)
    helpers.train_epoch(run, 1, stop_after=1)
    assert run.finished_epochs() == 0
    with pytest.raises(CheckpointError, match=r"contains only 0 finished epochs\. Train from epoch 1 again"):
        helpers.train_epoch(run, 2)


def test_a_run_that_another_session_overtook_reads_the_newer_commit(
    bench: Any, helpers: Any, tmp_path: Path, whole: Path
) -> None:
    paused = bench.run(tmp_path / "shared")
    helpers.train_epoch(paused, 1, stop_after=1)
    helpers.train_epoch(bench.run(tmp_path / "shared"), 1, fence=2)
    assert helpers.train_epoch(paused, 2, fence=3).finished
    assert essence(tmp_path / "shared") == essence(whole)


def test_a_damaged_newest_commit_costs_only_its_steps(bench: Any, helpers: Any, tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "hurt"
    helpers.train_epoch(bench.run(folder), 1)
    helpers.train_epoch(bench.run(folder), 2, stop_after=2, fence=2)
    (folder / "e0002-s000002-f0002.pt").write_bytes(b"cut off")
    assert helpers.train_epoch(bench.run(folder), 2, fence=3).finished
    assert essence(folder) == essence(whole)


@pytest.mark.parametrize("kind", ["energy", "scalar", "class"])
def test_other_conditions_are_reported_and_recorded_and_work_continues(
    bench_of: Any, helpers: Any, tmp_path: Path, kind: str
) -> None:
    bench = bench_of(kind)
    helpers.train_epoch(bench.run(tmp_path), 1, stop_after=1)
    path = tmp_path / "e0001-s000001-f0001.json"
    written = manifest_of(path.read_bytes(), source=path.name)
    old = {**written.fingerprint, "torch": f"1.0+{written.fingerprint['torch']}"}
    path.write_text(json.dumps(replace(written, fingerprint=old).to_json()))
    told: list[str] = []
    run = bench.run(tmp_path)
    run._note = told.append
    assert helpers.train_epoch(run, 1, fence=2, session="s2").finished
    assert len(told) == 1
    assert "under different conditions (torch '1.0+" in told[0]
    [change] = json.loads((tmp_path / "e0001-done-f0002.json").read_text())["fingerprint_changes"]
    assert (change["epoch"], change["step"], change["session"], list(change["changes"])) == (1, 1, "s2", ["torch"])
    helpers.train_epoch(run, 2, fence=3)
    assert len(told) == 1, "it is said once"


def test_a_commit_of_an_earlier_version_resumes_without_a_note(
    bench: Any, helpers: Any, tmp_path: Path, whole: Path
) -> None:
    helpers.train_epoch(bench.run(tmp_path / "older"), 1, stop_after=1)
    path = tmp_path / "older" / "e0001-s000001-f0001.json"
    written = manifest_of(path.read_bytes(), source=path.name)
    younger = {"infer_batch", "validated_in", "cublas", "tf32_override"}
    assert younger < written.fingerprint.keys()
    old = {key: value for key, value in written.fingerprint.items() if key not in younger}
    path.write_text(json.dumps(replace(written, fingerprint=old).to_json()))
    told: list[str] = []
    run = bench.run(tmp_path / "older", on_note=told.append)
    for epoch in (1, 2):
        assert helpers.train_epoch(run, epoch, fence=2).finished
    assert told == []
    newest = small_commits(tmp_path / "older").manifests()[-1]
    assert newest.fingerprint_changes == []
    assert essence(tmp_path / "older") == essence(whole)


def test_commits_of_another_spec_are_set_aside(bench: Any, helpers: Any, tmp_path: Path) -> None:
    helpers.train_epoch(bench.run(tmp_path), 1)
    with pytest.raises(CheckpointError, match=r"contains no intact commit\. Train from epoch 1 again"):
        helpers.train_epoch(bench.run(tmp_path, lr=2e-3), 2)
    assert (tmp_path / "e0001-done-f0001.pt.damaged").exists()


#: Trains the same fold in one forked process after another. Each argument says where one process is killed.
_WORKER = """
    import importlib.util, multiprocessing, os, signal, sys
    from pathlib import Path
    spec = importlib.util.spec_from_file_location("bench_helpers", sys.argv[1])
    helpers = importlib.util.module_from_spec(spec)
    sys.modules["bench_helpers"] = helpers
    spec.loader.exec_module(helpers)
    import torch
    import torch._dynamo  # or each process would import it at its first step, which takes seconds
    torch.set_num_threads(1)
    data, commits = Path(sys.argv[2]), Path(sys.argv[3])

    def live(kill_at, fence):
        crystals, _ = helpers.Crystals.open(data / "crystals.bin")
        cache = helpers.GraphCache.build(crystals, data / "graphs", workers=1)
        run = helpers.Bench(crystals, cache, data).run(commits)
        steps = 0
        def on_step(report):
            nonlocal steps
            steps += 1
            if kill_at == f"step {steps}":
                os.kill(os.getpid(), signal.SIGKILL)
        def save(staged):
            if kill_at == "before publishing":
                os.kill(os.getpid(), signal.SIGKILL)
            if kill_at == "before its manifest has a name":
                os.link = lambda *_names: os.kill(os.getpid(), signal.SIGKILL)
            staged.publish()
            if kill_at == "after publishing":
                os.kill(os.getpid(), signal.SIGKILL)
        for epoch in (1, 2):
            helpers.train_epoch(run, epoch, fence=fence, on_step=on_step, save=save, checkpoint_seconds=0.0)

    for fence, kill_at in enumerate(sys.argv[4:], start=1):
        process = multiprocessing.get_context("fork").Process(target=live, args=(kill_at, fence))
        process.start()
        process.join()
        print(process.exitcode)
"""


def test_sigkill_in_mid_epoch_and_in_mid_commit_changes_no_byte(
    bench: Any, helpers: Any, tmp_path: Path, whole: Path
) -> None:
    bench.crystals.save(bench.folder / "crystals.bin")
    conftest = Path(__file__).with_name("conftest.py")
    support = str(conftest.parents[1] / "support")
    deaths = ["step 2", "before publishing", "before its manifest has a name", "after publishing", "step 3", "never"]
    arguments = [str(conftest), str(bench.folder), str(tmp_path / "killed"), *deaths]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_WORKER), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": support},
        capture_output=True,
        text=True,
        check=False,
    )
    codes = [0 if death == "never" else -signal.SIGKILL for death in deaths]
    assert done.stdout.split() == [str(code) for code in codes], done.stderr
    assert essence(tmp_path / "killed") == essence(whole)

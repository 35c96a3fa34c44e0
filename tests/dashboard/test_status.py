"""The dashboard, rendered from a real queue's overview and from made-up overviews."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from processes import holding_open
from rich.console import Console

from mbqueue.dashboard.experiments import bar, sparkline
from mbqueue.dashboard.failures import last_errors
from mbqueue.dashboard.snapshot import Status
from mbqueue.dashboard.status import Dashboard, gpu_seconds, no_session, time_left, time_text
from mbqueue.errors import ONLY_UNDER_A_NEW_NAME
from mbqueue.experiment import Spec
from mbqueue.queue.obstacles import paused_jobs
from mbqueue.queue.processes import identity_of
from mbqueue.queue.store import Queue

NOW = 1_795_000_000.0
HOUR = 3600.0


def draw(overview, *, width=80, height=None, encoding="utf-8", tty=False, **options):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    console = Console(file=stream, width=width, height=height, force_terminal=tty, legacy_windows=False)
    console.print(Dashboard(overview={**overview, "now": NOW}, session_seconds=1.5 * HOUR, **options))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def fold_entry(fold=0, *, done=0, total=20, state="waiting", val_mae=(), **more):
    known = [value for value in val_mae if value is not None]
    return {
        "fold": fold,
        "state": state,
        "epochs_done": done,
        "epochs_skipped": 0,
        "epochs_total": total,
        "best_val_mae": min(known, default=None),
        "best_epoch": None,
        "last_val_mae": None,
        "val_mae": list(val_mae),
        "test_mae": None,
        "seconds": 0.0,
        "jobs": {},
        "running": None,
        **more,
    }


def overview_of(folds, **more):
    entry = {
        "name": "full_finetune",
        "state": "running",
        "paused": False,
        "priority": 0,
        "dataset": "matbench_mp_e_form",
        "target": {"name": "formation energy", "unit": "eV/atom", "kind": "energy"},
        "results_dir": "results/daily/2026-11-20/chgnet_full_finetune",
        "prepare": "committed",
        "record": "waiting",
        "seconds": sum(fold["seconds"] for fold in folds),
        "jobs": {},
        "folds": folds,
        **more,
    }
    return {"format": 1, "experiments": [entry], "jobs": {}, "sessions": [], "errors": []}


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path / "queue.db")


def work_through(queue, *, epochs, identity=None):
    """Commit prepare and the first epochs of one fold of a two-fold experiment; lease the next epoch."""
    spec = Spec(name="small", folds=(0, 1), train={"epochs": 3})
    queue.enqueue(spec, results_dir="results/daily/2026-11-20/small", now=NOW - 100)
    session = queue.start_session(
        device="NVIDIA L4", now=NOW - 90, alive_seconds=120, deadline_at=NOW + HOUR, identity=identity
    )
    lease = queue.claim(session, now=NOW - 80, lease_seconds=60)
    queue.commit(lease, result={"dataset_hash": "ab", "seconds": 10.0}, now=NOW - 70)
    for epoch in range(1, epochs + 1):
        lease = queue.claim(session, now=NOW - 60, lease_seconds=60, loaded=(lease.job.experiment_id, 0))
        queue.commit(lease, result={"epoch": epoch, "val_mae": 0.1 / epoch, "seconds": HOUR}, now=NOW - 50)
    lease = queue.claim(session, now=NOW - 40, lease_seconds=60, loaded=(lease.job.experiment_id, 0))
    queue.save_progress(lease, progress={"what": "step", "done": 823, "total": 1660})
    queue.heartbeat(session, now=NOW - 5, alive_seconds=120, structures_per_second=311.24)
    return session


def test_a_real_queue_is_shown_fold_by_fold(queue):
    session = work_through(queue, epochs=2)
    lines = draw(queue.overview(now=NOW)).splitlines()
    fold_0, fold_1 = (next(line for line in lines if line.startswith(f"{fold} ")) for fold in (0, 1))
    assert fold_0.split() == ["0", "███████░░░", "2/3", "epoch", "3", "█▁", "0.0500", "2", "–"]
    assert "0/3" in fold_1
    assert f"  NVIDIA L4, heard 5s ago, on {queue.session(session).host}, {session}"[:80] in lines
    assert "    small fold 0 epoch 3 49 %, 311.2 crystals/s, ends in 1h00m" in lines


def test_a_session_just_killed_is_shown_as_dead_with_its_job(queue):
    with holding_open(queue.database.file) as pid:
        session = work_through(queue, epochs=2, identity=identity_of(pid))
        living = queue.overview(now=NOW)
        assert Status(overview=living, session_seconds=HOUR).is_active
    overview = queue.overview(now=NOW)
    assert not Status(overview=overview, session_seconds=HOUR).is_active
    lines = draw(overview).splitlines()
    assert f"  NVIDIA L4, died, heard 5s ago, on {queue.session(session).host}, {session}"[:80] in lines
    assert "    died in small fold 0 epoch 3 at 49 %; the next session continues it" in lines
    assert "No session is running. Start one with: mbqueue work" in lines


def test_time_left_is_shown_in_hours_and_in_sessions(queue):
    work_through(queue, epochs=2)
    overview = queue.overview(now=NOW)
    used, left = gpu_seconds(overview["experiments"][0])
    assert (used, left) == (2 * HOUR + 10.0, 4 * HOUR)
    assert "time: 2.0 h used, about 4.0 h left: 3 sessions of 1h30m" in draw(overview)


def test_preparing_counts_as_used_and_has_an_eta_of_its_own(queue):
    spec = Spec(name="pretrained", folds=(0, 1), model={"trainable": "none"}, train={"epochs": 0})
    queue.enqueue(spec, results_dir="results/pretrained", now=NOW - 3600)
    session = queue.start_session(device="cpu", now=NOW - 3600, alive_seconds=7200)
    lease = queue.claim(session, now=NOW - 50 * 60, lease_seconds=60)
    assert lease.job.kind == "prepare"
    progress = {
        "what": "pretrained energies",
        "done": 20_000,
        "total": 31_073,
        "seconds": 3000.0,
        "seconds_left": 1680.0,
    }
    queue.renew(lease, now=NOW, lease_seconds=60, progress=progress)
    overview = queue.overview(now=NOW)
    [experiment] = overview["experiments"]
    assert (experiment["seconds"], experiment["preparing"]) == (3000.0, progress)
    assert time_left(overview["experiments"], HOUR) == (3000.0, 1680.0, 0, 0, 1, False)
    drawn = " ".join(draw(overview, width=120).split())
    assert "preparing the data: leased, pretrained energies 20,000/31,073, about 28m00s left" in drawn
    assert "time: 50m00s used, about 28m00s left: 1 session" in drawn
    queue.release(lease, reason="stopped", now=NOW, preempted=True)
    assert queue.overview(now=NOW)["experiments"][0]["seconds"] == 3000.0, "what was given back stays used"
    queue.pause("pretrained", now=NOW)
    assert queue.overview(now=NOW)["experiments"][0]["seconds"] == 3000.0, "also while it is paused"


def test_a_failed_job_is_shown_with_the_command_that_tries_it_again(queue):
    session = work_through(queue, epochs=0)
    queue.end_session(session, reason="stopped", now=NOW - 39)
    overview = queue.overview(now=NOW)
    error = {"job": 3, "experiment": "small", "kind": "train", "fold": 0, "epoch": 1, "state": "failed"}
    overview["errors"] = [{**error, "failures": 3, "at": NOW, "retry_at": None, "error": "NonFiniteLoss: step 12 [x]"}]
    lines = draw(overview).splitlines()
    assert "  small fold 0 epoch 1: NonFiniteLoss: step 12 [x]" in lines
    assert "    failed 3 times; after fixing the cause: mbqueue retry small --fold 0" in lines
    assert "No session is running. Start one with: mbqueue work" in lines


def test_a_failed_job_shows_its_next_attempt(queue):
    work_through(queue, epochs=0)
    overview = queue.overview(now=NOW)
    error = {"job": 1, "experiment": "small", "kind": "prepare", "fold": None, "epoch": None, "state": "ready"}
    overview["errors"] = [{**error, "failures": 1, "at": NOW, "retry_at": NOW + 90, "error": "disk full"}]
    assert "    failed once; the next attempt is in 1m30s" in draw(overview).splitlines()


def test_an_empty_queue_says_how_to_begin(queue):
    assert "mbqueue enqueue" in draw(queue.overview(now=NOW))


def test_everything_fits_in_80_columns():
    folds = [
        fold_entry(
            f, done=f * 50, total=200, state="waiting", val_mae=[0.1 / (e + 1) for e in range(f * 50)], test_mae=0.02
        )
        for f in range(5)
    ]
    overview = overview_of(folds, name="n" * 64, dataset="d" * 100, priority=1000)
    overview["jobs"] = {"waiting": 90_000, "ready": 10_000, "leased": 3, "committed": 5000, "failed": 12, "skipped": 7}
    job = {"id": 1, "experiment": "n" * 64, "kind": "train", "fold": 3, "epoch": 100, "progress": None}
    overview["sessions"] = [
        {"id": "s" * 30, "state": "live", "host": "h" * 40, "device": "NVIDIA A100-SXM4-80GB", "heartbeat_at": NOW - 3,
         "deadline_at": NOW + 5000, "structures_per_second": 1234.5, "job": job}
    ]  # fmt: skip
    error = {"job": 1, "experiment": "x" * 64, "kind": "train", "fold": 1, "epoch": 2, "state": "failed", "failures": 3}
    overview["errors"] = [{**error, "at": NOW, "retry_at": None, "error": "y" * 300}]
    drawn = draw(overview)
    assert max(map(len, drawn.splitlines())) <= 80
    table = [line for line in drawn.splitlines() if line[:1].isdigit()]
    assert len(table) == 5
    assert all("…" not in line for line in table)


def test_a_pipe_gets_no_control_characters(queue):
    work_through(queue, epochs=1)
    assert "\x1b" not in draw(queue.overview(now=NOW))
    assert "\x1b" in draw(queue.overview(now=NOW), tty=True)


def test_an_output_without_blocks_gets_ascii():
    folds = [fold_entry(0, done=2, state="done", val_mae=[0.2, 0.1], test_mae=0.02), fold_entry(1, test_mae=0.03)]
    drawn = draw(overview_of(folds), encoding="ascii")
    assert drawn.isascii()
    assert "#........." in drawn
    assert "test MAE 0.0250 +- 0.0050 eV/atom over 2 folds" in drawn


def test_of_very_many_experiments_the_important_ones_are_drawn_and_the_others_counted():
    overview = overview_of([fold_entry(state="running")])
    (entry,) = overview["experiments"]
    many = [{**entry, "name": f"old-{i}", "state": "done"} for i in range(500)]
    overview["experiments"] = [
        *many[:250],
        {**entry, "name": "at-work"},
        {**entry, "name": "broken", "state": "failed"},
    ]
    overview["experiments"] += many[250:]
    lines = draw(overview).splitlines()
    titles = [line.split()[0] for line in lines if "matbench_mp_e_form" in line]
    assert titles == ["at-work", "broken", *(f"old-{i}" for i in range(482, 500))]
    assert "and 482 more experiments: 482 done. To show one: mbqueue status NAME" in lines


def five_folds(name, state, *, done, **more):
    folds = [fold_entry(f, done=done, state=state, val_mae=[0.1] * done, test_mae=0.03) for f in range(5)]
    return {**overview_of(folds)["experiments"][0], "name": name, "state": state, **more}


def session_entry(number=0):
    return {
        "id": f"s{number}", "state": "live", "host": "h", "device": "L4", "heartbeat_at": NOW - 3,
        "deadline_at": NOW + 5000, "structures_per_second": 300.0,
        "job": {"id": 1, "experiment": "second", "kind": "train", "fold": 3, "epoch": 9, "progress": None},
    }  # fmt: skip


def error_entry(fold=0, **more):
    return {
        "job": 3 + fold, "experiment": "third", "kind": "train", "fold": fold, "epoch": 1, "state": "failed",
        "failures": 3, "at": NOW, "retry_at": None, "error": "mbqueue.errors.DataError: 3 crystals cannot be used.",
        **more,
    }  # fmt: skip


def busy_overview():
    """An overview of three five-fold experiments, a session and an error."""
    overview = overview_of([])
    overview["experiments"] = [
        five_folds("first", "done", done=20, record="committed"),
        five_folds("second", "running", done=8),
        five_folds("third", "failed", done=0),
    ]
    return {**overview, "jobs": {"ready": 5}, "sessions": [session_entry()], "errors": [error_entry()]}


def test_in_a_terminal_of_24_lines_sessions_totals_and_errors_are_always_seen():
    drawn = draw(busy_overview(), height=24, fits_height=True)
    assert len(drawn.splitlines()) <= 23
    assert "second fold 3 epoch 9" in drawn
    assert "jobs: 5 ready" in drawn
    assert "mbqueue retry third --fold 0" in drawn


def test_finished_experiments_shrink_to_a_line_before_running_ones():
    lines = draw(busy_overview(), height=24, fits_height=True).splitlines()
    assert "first  done  100/100 epochs, test MAE 0.0300 ± 0.0000 eV/atom over 5 folds" in lines
    assert sum(line[:1].isdigit() for line in lines) == 5  # one line for each fold of the running experiment


def test_with_room_enough_nothing_becomes_one_line():
    assert draw(busy_overview(), height=60, fits_height=True) == draw(busy_overview())


@pytest.mark.parametrize("height", [16, 20, 24, 40])
def test_the_view_fits_the_screen_with_any_number_of_experiments_and_sessions(height):
    overview = busy_overview()
    overview["experiments"] += [five_folds(f"old-{i}", "done", done=20) for i in range(50)]
    overview["sessions"] = [session_entry(i) for i in range(12)]
    overview["errors"] = [error_entry(i, error=f"{i} " + "wrong " * 60) for i in range(5)]
    lines = draw(overview, height=height, fits_height=True).splitlines()
    assert len(lines) < height
    assert {"Sessions", "Last errors"} <= set(lines)


def test_the_same_error_of_several_folds_is_shown_once():
    overview = {**busy_overview(), "errors": [error_entry(fold) for fold in range(5)]}
    lines = draw(overview).splitlines()
    told = lines.index("  third folds 0, 1, 2, 3, 4 epoch 1: 3 crystals cannot be used.")
    assert lines[told + 1 :] == ["    failed 3 times each; after fixing the cause: mbqueue retry third"]


def test_a_long_error_is_shown_whole_without_the_path_of_its_class():
    said = "torch.cuda.OutOfMemoryError: " + " ".join(f"word{i}" for i in range(25))
    drawn = draw({**busy_overview(), "errors": [error_entry(error=said)]})
    assert f"third fold 0 epoch 1: {said.removeprefix('torch.cuda.')}" in " ".join(drawn.split())


def test_an_error_that_does_not_fit_ends_with_the_command_that_shows_it_in_full():
    said = " ".join(f"word{i:03d}" for i in range(200))
    overview = {**busy_overview(), "errors": [error_entry(error=said)]}
    for plain, dots in ((False, "…"), (True, "...")):
        drawn = draw(overview, encoding="ascii" if plain else "utf-8")
        assert f" {dots} (in full: mbqueue status third)\n" in drawn
        assert max(map(len, drawn.splitlines())) <= 80
    assert " (in full: mbqueue status third)\n" in draw(overview, height=24, fits_height=True)
    in_full = draw(overview, errors_in_full=True)
    assert said in " ".join(in_full.split())
    assert "in full" not in in_full


def test_the_command_for_a_long_name_is_not_cut():
    name = "n" * 64
    drawn = draw({**busy_overview(), "errors": [error_entry(experiment=name, error="wrong " * 100)]})
    assert f"(in full: mbqueue status {name})" in " ".join(drawn.split())


def test_on_one_line_a_long_name_leaves_room_for_the_error():
    name = "a-search-of-learning-rates.003"
    errors = [error_entry(experiment=name, error="no such file " * 20)]
    told = [line.plain for line in last_errors(errors, NOW, 80, False, at_most=1, lines=1)]
    assert told[2] == f"  {name} fold 0 epoch 1: no such file no such file no …"
    assert told[3].startswith("    failed 3 times")


@pytest.mark.parametrize("dots", ["…", "..."])
def test_an_error_that_ends_in_dots_is_not_said_to_be_cut(dots):
    errors = [error_entry(experiment="n" * 64, error=f"still waiting {dots}")]
    told = [line.plain for line in last_errors(errors, NOW, 80, dots == "...", at_most=5, lines=6)]
    assert not any("in full" in line for line in told)


def test_in_60_columns_the_test_error_is_still_there():
    drawn = draw(busy_overview(), width=60)
    assert max(map(len, drawn.splitlines())) <= 60
    assert all(line.endswith("0.0300") for line in drawn.splitlines() if line[:1].isdigit())


def test_a_fold_that_went_wrong_does_not_flatten_the_curves_of_the_others():
    folds = [
        fold_entry(0, done=3, val_mae=[0.4, 0.2, 0.1], best_val_mae=0.1),
        fold_entry(1, done=2, val_mae=[0.1, 9e9]),
    ]
    assert "█▅▁" in draw(overview_of(folds))


def test_noise_does_not_look_like_progress():
    assert "▁▂▁" in draw(overview_of([fold_entry(0, done=3, val_mae=[0.1, 0.101, 0.1])]))


def test_time_left_names_how_many_experiments_it_leaves_out():
    overview = busy_overview()
    overview["experiments"][1]["folds"][0]["seconds"] = 80 * HOUR
    overview["experiments"][2]["folds"][0]["state"] = "ready"
    assert "; 1 experiment has no estimate yet" in " ".join(draw(overview).split())
    overview["searches"] = [{"name": name, "seconds": 0.0, "seconds_left": None} for name in "ab"]
    told = time_text(overview["experiments"], HOUR, searches=overview["searches"])
    assert told.endswith("; 1 experiment and 2 searches have no estimate yet")


def test_an_output_in_ascii_gets_long_lines_cut_in_ascii():
    overview = busy_overview()
    overview["sessions"][0]["host"] = "h" * 100
    assert draw(overview, encoding="ascii").isascii()


def test_ages_and_rates_are_no_news_and_an_epoch_is():
    before, after = busy_overview(), busy_overview()
    after["sessions"][0] |= {"heartbeat_at": NOW, "structures_per_second": 299.0}
    earlier, later = (Status(overview=overview, session_seconds=HOUR) for overview in (before, after))
    assert not later.says_more_than(earlier)
    after["experiments"][1]["folds"][0]["epochs_done"] += 1
    assert later.says_more_than(earlier)


def test_tables_have_the_same_columns_with_rows_and_without(queue):
    empty = Status(overview=queue.overview(now=NOW), session_seconds=HOUR)
    work_through(queue, epochs=1)
    overview = queue.overview(now=NOW)
    overview["errors"] = [error_entry()]
    filled = Status(overview=overview, session_seconds=HOUR)
    for name in ("experiments", "folds", "sessions", "errors"):
        without, with_rows = getattr(empty, name), getattr(filled, name)
        assert len(without) == 0 < len(with_rows)
        assert list(without.reset_index().columns) == list(with_rows.reset_index().columns)


def test_names_with_brackets_are_shown_as_they_are():
    assert "x[bold]y" in draw(overview_of([fold_entry()], name="x[bold]y"), tty=True)


def test_a_finished_experiment_names_its_folder():
    assert "results: results/daily/2026-11-20/" in draw(overview_of([fold_entry()], record="committed"))


@pytest.mark.parametrize("prepare", ["committed", "failed", "cancelled"])
def test_an_experiment_that_cannot_run_any_more_awaits_no_estimate(prepare):
    state = "failed" if prepare == "committed" else "waiting"
    entry = overview_of([fold_entry(state=state)], prepare=prepare)["experiments"][0]
    assert gpu_seconds(entry) == (0.0, 0.0)
    assert gpu_seconds({**entry, "folds": [fold_entry(), fold_entry(1, state="failed")], "prepare": "ready"})[1] is None


@pytest.mark.parametrize(
    ("folds", "said"),
    [
        ([fold_entry(state="failed", seconds=60.0)], "time: 1m00s used, no training left except failed jobs"),
        ([fold_entry(state="failed")], "time: 0s used, no training left except failed jobs"),
        (
            [fold_entry(state="failed"), fold_entry(1, done=10, state="running", seconds=600.0, epoch_seconds=600.0)],
            "time: 10m00s used, about 10m00s left (excluding failed jobs): 1 session of 1h30m",
        ),
    ],
)
def test_the_time_left_does_not_hide_failed_jobs(folds, said):
    assert said in draw(overview_of(folds, jobs={"failed": 1, "waiting": 3})).splitlines()


def test_time_left_is_unknown_before_the_first_epoch():
    drawn = draw(overview_of([fold_entry()]))
    assert "0s used; the time left is estimated after the first epoch or fold" in drawn


def test_time_left_is_unknown_before_the_first_prediction_if_nothing_is_trained():
    folds = [fold_entry(0, total=0, state="ready"), fold_entry(1, total=0, state="ready")]
    assert "; the time left is estimated after the first epoch or fold" in draw(overview_of(folds))
    folds[0] |= {"state": "done", "seconds": 60.0, "epoch_seconds": 0.0}
    assert "about 1m00s left" in draw(overview_of(folds))


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        (
            {"failed": 1, "waiting": 3, "ready": 0},
            ", and no job can run: jobs failed.\nAfter fixing the cause: mbqueue retry small",
        ),
        ({"failed": 1, "ready": 1}, ". Start one with: mbqueue work"),
        ({"committed": 4, "skipped": 1, "failed": 0}, ", and no job is left to run."),
    ],
)
def test_without_a_session_status_suggests_only_a_command_that_does_something(jobs, said):
    overview = {**overview_of([fold_entry()], name="small", jobs=jobs), "jobs": jobs}
    overview["errors"] = [error_entry(experiment="small")]
    assert f"No session is running{said}\n" in draw(overview)
    waiting = {"name": "s", "state": "waiting"}
    assert no_session({**overview, "searches": [waiting]}).endswith("Start one with: mbqueue work")


def failed_overview(*names):
    overview = overview_of([])
    (entry,) = overview["experiments"]
    overview["experiments"] = [{**entry, "name": name, "jobs": {"failed": 1}} for name in names]
    return {**overview, "jobs": {"failed": len(names)}}


def test_several_failures_have_a_general_advice_and_one_without_a_retry_has_its_own():
    overview = failed_overview("a", "b")
    overview["errors"] = [error_entry(experiment="a"), error_entry(experiment="b")]
    assert no_session(overview).endswith("After fixing the cause: mbqueue retry EXPERIMENT")
    overview = failed_overview("a")
    overview["errors"] = [error_entry(experiment="a", error=f"Too large. {ONLY_UNDER_A_NEW_NAME}")]
    assert no_session(overview).endswith("Enqueue the experiment again under a new name (--name)")


def test_the_advice_names_failed_experiments_whose_errors_the_overview_has_cut():
    cut = failed_overview("a", "b")
    cut["errors"] = [error_entry(experiment="a") for _ in range(20)]
    assert no_session(cut).endswith("After fixing the cause: mbqueue retry EXPERIMENT")
    of_others = [error_entry(experiment="a", state="ready")]
    assert no_session({**failed_overview("b"), "errors": of_others}).endswith("mbqueue retry b")


def test_paused_jobs_are_not_counted_as_ready(queue):
    for name in ("small", "other"):
        queue.enqueue(Spec(name=name, folds=(0, 1), train={"epochs": 1}), results_dir=f"results/{name}", now=NOW)
    start = "No session is running. Start one with: mbqueue work"
    queue.pause("small", now=NOW)
    assert no_session(queue.overview(now=NOW)) == start
    queue.cancel("other", now=NOW)
    paused = (
        "No session is running, and no job can run: jobs are paused.\nTo continue paused jobs: mbqueue resume small"
    )
    assert no_session(queue.overview(now=NOW)) == paused
    queue.resume("small", now=NOW)
    assert no_session(queue.overview(now=NOW)) == start


def enqueue_prepared(queue):
    """Enqueue an experiment with two folds, and do its `prepare` job in a session that has ended."""
    queue.enqueue(Spec(name="small", folds=(0, 1), train={"epochs": 1}), results_dir="results/small", now=NOW)
    session = queue.start_session(device="cpu", now=NOW, alive_seconds=60)
    queue.commit(
        queue.claim(session, now=NOW, lease_seconds=60), result={"dataset_hash": "ab", "seconds": 1.0}, now=NOW
    )
    queue.end_session(session, reason="done", now=NOW)


def test_a_paused_fold_is_told_apart_from_the_folds_that_a_session_would_train(queue):
    enqueue_prepared(queue)
    queue.pause("small", fold=0, now=NOW)
    assert no_session(queue.overview(now=NOW)).endswith("Start one with: mbqueue work")
    queue.pause("small", now=NOW)
    queue.resume("small", fold=1, now=NOW)
    assert paused_jobs(queue.overview(now=NOW)) == {"small": 1}
    assert no_session(queue.overview(now=NOW)).endswith("Start one with: mbqueue work")
    queue.cancel("small", fold=1, now=NOW)
    assert no_session(queue.overview(now=NOW)).endswith("mbqueue resume small")


def test_a_paused_search_is_resumed_by_its_own_name():
    trial = {"search": "hunt", "number": 0, "of": 2, "gpu_hours": 0.0, "settings": {}}
    overview = overview_of([], name="hunt.000", trial=trial, jobs={"ready": 1}, paused=True)
    assert no_session({**overview, "jobs": {"ready": 1}}).endswith("mbqueue resume hunt")


def test_a_search_paused_between_two_trials_is_resumed_by_its_name():
    overview = overview_of([], name="hunt.000", jobs={"committed": 4})
    told = no_session({**overview, "jobs": {"committed": 4}, "searches": [{"name": "hunt", "state": "paused"}]})
    assert told.endswith("mbqueue resume hunt")


def test_jobs_that_depend_on_cancelled_jobs_are_no_reason_to_start_a_session(queue):
    enqueue_prepared(queue)
    for fold in (0, 1):
        queue.cancel("small", fold=fold, now=NOW)
    told = no_session(queue.overview(now=NOW))
    assert told.endswith("depend on cancelled jobs.\nTo run cancelled jobs again: mbqueue retry small")


def test_epochs_skipped_by_early_stopping_are_not_left():
    entry = overview_of([fold_entry(0, done=5, epochs_skipped=15, state="ready", seconds=500.0)])["experiments"][0]
    assert gpu_seconds(entry) == (500.0, 0.0)


@pytest.mark.parametrize(("done", "total", "expected"), [(0, 20, "░" * 10), (1, 200, "█" + "░" * 9),
                                                         (199, 200, "█" * 9 + "░"), (20, 20, "█" * 10)])  # fmt: skip
def test_a_bar_is_empty_or_full_only_when_that_is_true(done, total, expected):
    assert bar(done, total) == expected


def test_a_sparkline_runs_from_the_highest_to_the_lowest_block():
    assert sparkline([0.8, 0.4, 0.2, 0.1], 10, low=0.1, high=0.8) == "█▆▃▁"


def test_a_long_series_is_averaged_into_its_length():
    assert len(sparkline([0.1] * 1000, 14, low=0.05, high=0.2)) == 14


def test_values_that_cannot_be_drawn_show_as_question_marks():
    assert sparkline([0.2, float("nan"), 0.1], 10, low=0.1, high=0.2) == "█?▁"
    assert "?" in draw(overview_of([fold_entry(0, done=2, val_mae=[None, 0.1])]))


def test_a_hundred_folds_are_drawn_at_once():
    drawn = draw(overview_of([fold_entry(f, done=1, val_mae=[0.1]) for f in range(100)]))
    assert sum(line[:1].isdigit() for line in drawn.splitlines()) == 100


def test_the_dashboard_imports_nothing_heavy():
    heavy = ("torch", "numpy", "pandas", "pydantic")
    code = f"import sys, mbqueue.dashboard; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def publishing(**more):
    fold = {"experiment": "full_finetune", "fold": 0, "committed": "e2", "published": "e1", "seconds_at_risk": 300.0}
    return {
        "mount": "/mnt/drive/project",
        "state": "degraded",
        "why": "Transport endpoint is not connected",
        "since": NOW - 90.0,
        "folds": [fold],
        "others": [{"session": "s2", "host": "colab", "device": "T4", "folds": [["full_finetune", 1]]}],
        "aside": ["one"],
        "damaged": {"a": "cut off", "b": "cut off"},
        **more,
    }


def test_a_lost_mount_is_shown_with_its_reason_and_what_a_death_now_would_cost():
    drawn = draw({**overview_of([fold_entry()]), "publishing": publishing()})
    assert "DEGRADED for 1m30s: Transport endpoint is not connected" in drawn
    assert "not published yet: 5m00s of training, which you lose if this machine dies now" in drawn
    assert "another session on this drive: s2 on colab: full_finetune fold 1" in drawn
    assert "1 published commit kept but not used" in drawn
    assert "2 damaged or incomplete files on the drive" in drawn


def test_a_fully_published_project_is_shown_as_published():
    told = publishing(state="published", why=None, since=None, others=[], aside=[], damaged={})
    told["folds"][0]["seconds_at_risk"] = 0.0
    drawn = draw({**overview_of([fold_entry()]), "publishing": told})
    assert "all committed work is published to /mnt/drive/project" in drawn
    assert "DEGRADED" not in drawn


def test_an_opened_search_shows_its_settings_whole_and_a_closed_one_is_three_lines():
    settings = {"train.lr": 0.00042914, "train.batch_size": 32, "train.huber_delta": 0.06, "train.warmup": 0.1}
    trial = {"search": "hunt", "number": 0, "of": 40, "gpu_hours": 0.0, "settings": settings}
    overview = overview_of([fold_entry(done=20, val_mae=[0.03])], trial=trial, state="done")
    best = {"trial": 0, "experiment": "hunt.000", "val_mae": 0.03, "settings": settings}
    spent = {"epochs_done": 20, "epochs_saved": 0, "seconds": 60.0, "seconds_saved": 0.0, "seconds_left": 2340.0}
    overview["searches"] = [
        {"name": "hunt", "state": "running", "trials": {"done": 1}, "trials_wanted": 40, "best": best, **spent}
    ]
    opened, closed = (draw(overview, width=60, opened=opened) for opened in (True, False))
    shown = ("train.lr=0.0004291", "train.batch_size=32", "train.huber_delta=0.06", "train.warmup=0.1")
    assert all(opened.count(setting) == 2 for setting in shown)
    assert shown[-1] not in closed
    assert closed.count("  best validation MAE") == 1


def test_the_time_left_counts_trials_that_a_search_has_yet_to_begin():
    trial = {"search": "hunt", "number": 0, "of": 40, "gpu_hours": 0.0, "settings": {"train.lr": 0.1}}
    overview = overview_of([fold_entry(done=10, seconds=30.0, state="running")], trial=trial)
    search = {"name": "hunt", "state": "running", "trials": {"open": 1}, "trials_wanted": 40, "best": None}
    overview["searches"] = [{**search, "epochs_saved": 0, "seconds": 30.0, "seconds_left": 2340.0}]
    assert "time: 30s used, about 39m00s left: 1 session" in draw(overview)
    assert time_left(overview["experiments"], HOUR) == (30.0, 30.0, 0, 0, 1, False)

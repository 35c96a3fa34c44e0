"""Features of a queue on PostgreSQL only: its dialect, single clock, wake-ups, roles, secrets and versioned schema."""

from __future__ import annotations

import builtins
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from postgres_server import PostgresServer
from small_project import make_project

from mbqueue import Project, files
from mbqueue.errors import QueueError, SchemaTooNew, UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue import Queue, claiming, edges, leases, schema
from mbqueue.queue.commits_place import CommitsPlace
from mbqueue.queue.dialect import POSTGRESQL
from mbqueue.queue.migrating import rows_of
from mbqueue.queue.opening import RESTORING, is_queue_there, open_on_server, open_queue, queue_exists
from mbqueue.queue.postgresql import client, listening, patience
from mbqueue.queue.postgresql import server as server_module
from mbqueue.queue.postgresql.address import parse_address
from mbqueue.queue.postgresql.parameters import SERVER_NOW, for_psycopg
from mbqueue.queue.transitions import TRANSITIONS


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    return postgres_server.url()


@pytest.fixture
def queue(url: str) -> Iterator[Queue]:
    with open_on_server(url) as queue:
        yield queue


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a = :a AND b = ? AND c LIKE 'x%:a?'", "a = %(a)s AND b = %s AND c LIKE 'x%%:a?'"),
        ("'it''s ?' || :now_ and :nowhere", "'it''s ?' || %(now_)s and %(nowhere)s"),
        ("CAST(x AS text)::json", "CAST(x AS text)::json"),
        (lambda sql: f"SELECT :a {sql.lock}", "SELECT %(a)s FOR NO KEY UPDATE"),
    ],
)
def test_parameters_are_filled_in_except_within_quoted_text(written, read):
    assert for_psycopg(written, server_clock=True).decode() == read


@pytest.mark.parametrize(("server_clock", "read"), [(True, SERVER_NOW), (False, "%(now)s")])
def test_the_time_is_that_of_the_server_or_of_the_caller(server_clock, read):
    assert for_psycopg("at <= :now", server_clock=server_clock).decode() == f"at <= {read}"


def test_times_come_from_the_server_even_if_a_workers_clock_is_wrong(queue, make_spec, monkeypatch):
    wrong = time.time() + 1e6
    outcome = queue.enqueue(make_spec(), results_dir="r", now=wrong)
    session = queue.start_session(device="cpu", now=wrong, alive_seconds=60, deadline_at=wrong + 100)
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 0.0)
    lease = queue.claim(session, now=wrong - 5e6, lease_seconds=60)
    row, now = queue.session(session), time.time()
    assert abs(outcome.experiment.enqueued_at - now) < 30
    assert abs(row.deadline_at - (now + 100)) < 30  # the deadline follows the server's clock
    assert abs(lease.job.lease_expires_at - (now + 60)) < 30
    assert abs(queue.overview(now=wrong)["now"] - now) < 30
    assert queue.reap_expired(by="test", now=wrong) == 0
    delayed = queue.fail(lease, error="boom", now=wrong)
    outlook = queue.outlook(now=wrong)
    assert (outlook.delayed, outlook.next_retry) == (1, delayed)
    assert 0 < outlook.seconds_to_retry <= delayed.not_before - now


def test_a_transaction_has_one_time(queue):
    statement = "SELECT CAST(:now AS double precision) AS now"
    for begin in (queue.writing, queue.reading):
        with begin() as db:
            for _ in range(2):
                now = db.execute(statement, {"now": 1.0}).fetchone()["now"]
                assert now == queue.database.instant(db, 1.0)
    assert abs(now - time.time()) < 30


def test_a_commit_that_claims_the_next_epoch_takes_two_messages_between_which_is_published(
    queue, make_spec, monkeypatch
):
    queue.enqueue(make_spec(folds=(0,), epochs=3), results_dir="r", now=0.0)
    session = queue.start_session(device="cpu", now=0.0, alive_seconds=60)
    lease = queue.claim(session, now=0.0, lease_seconds=60)
    lease = queue.commit_and_claim(lease, result={"dataset_hash": "d"}, now=0.0, lease_seconds=60)
    waits, wait = [], client.LimitedConnection.wait

    def counted(connection, generator, *args, **options):
        waits.append("message")
        return wait(connection, generator, *args, **options)

    monkeypatch.setattr(client.LimitedConnection, "wait", counted)
    following = queue.commit_and_claim(
        lease, result={}, now=0.0, lease_seconds=60, publish=lambda: waits.append("published")
    )
    assert following.job.epoch == 2
    assert waits == ["message", "published", "message"]


def test_a_block_without_statements_opens_no_transaction(queue, url, postgres_server):
    with queue.writing():
        pass
    assert postgres_server.sql(f"SELECT count(*) FROM {parse_address(url).schema}.receipts") == [(0,)]
    queue.note("a line", by="test", now=0.0)
    assert [event.why for event in queue.events()] == ["a line"]


def test_a_waiting_worker_is_woken_when_there_is_something_to_claim(queue, url, make_spec, monkeypatch):
    monkeypatch.setattr(listening, "LONGEST_WAIT_SECONDS", 60.0)
    # On a slow machine, the check that notifications arrive may take long.
    monkeypatch.setattr(listening, "_PROOF_SECONDS", 60.0)
    over = threading.Event()
    queue.database.wait(60.0, over.wait)  # the first wait on a connection returns immediately
    changes = [
        lambda other: other.enqueue(make_spec(), results_dir="r", now=0.0),
        lambda other: other.pause("full", now=0.0),
        lambda other: other.resume("full", now=0.0),
        lambda other: other.end_session(session, reason="test", now=0.0),
    ]
    session = queue.start_session(device="cpu", now=0.0, alive_seconds=60)
    with open_on_server(url) as other:
        for change in (changes[0], changes[2], changes[3]):
            if change is changes[2]:
                changes[1](other)
            began = time.monotonic()
            timer = threading.Timer(0.2, change, [other])
            timer.start()
            queue.database.wait(60.0, over.wait)
            timer.join()
            assert 0.1 < time.monotonic() - began < 20


def test_a_waiting_worker_stops_when_asked(queue):
    over = threading.Event()
    queue.database.wait(60.0, over.wait)
    threading.Timer(0.1, over.set).start()
    began = time.monotonic()
    queue.database.wait(60.0, over.wait)
    assert time.monotonic() - began < 30


def test_without_notifications_a_worker_polls(queue, monkeypatch):
    monkeypatch.setattr(listening, "_PROOF_SECONDS", 0.1)
    monkeypatch.setattr(listening, "CHANNEL", "nowhere; SELECT 1")  # this channel never receives notifications
    waited = []
    for _ in range(2):
        queue.database.wait(2.0, lambda seconds: bool(waited.append(seconds)))
    assert waited == [2.0, 2.0]


def test_after_a_late_notification_the_worker_listens_again(queue, monkeypatch):
    with monkeypatch.context() as at_first:
        at_first.setattr(listening, "_PROOF_SECONDS", 0.1)
        at_first.setattr(listening, "CHANNEL", "nowhere; SELECT 1")
        queue.database.wait(2.0, lambda _seconds: False)
    waited = []
    queue.database.wait(2.0, lambda seconds: bool(waited.append(seconds)))
    later = time.monotonic() + listening._PROOF_AGAIN_SECONDS
    monkeypatch.setattr(listening.time, "monotonic", lambda: later)
    queue.database.wait(2.0, lambda seconds: bool(waited.append(seconds)))
    assert waited == [2.0]
    assert queue.database._listener._connection is not None


def test_a_commit_that_keeps_its_fold_wakes_no_session(queue, url, make_spec, monkeypatch):
    queue.enqueue(make_spec(folds=(0,), epochs=3), results_dir="r", now=0.0)
    session = queue.start_session(device="cpu", now=0.0, alive_seconds=60)
    queue.commit(queue.claim(session, now=0.0, lease_seconds=60), result={"dataset_hash": "d"}, now=0.0)
    with open_on_server(url) as other:
        other.database.wait(1.0, threading.Event().wait)
        queue.commit(queue.claim(session, now=0.0, lease_seconds=60), result={}, now=0.0)
        assert not other.database._listener._heard(parse_address(url).schema, 0.5)
        queue.enqueue(make_spec("another"), results_dir="s", now=0.0)
        assert other.database._listener._heard(parse_address(url).schema, 20.0), "it was listening"


def documented_rights(place: str) -> str:
    """Return the GRANT statements in docs/how-to/many-machines.md, changed to the given schema."""
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "many-machines.md").read_text(encoding="utf-8")
    grants = re.findall(r"GRANT [^;]* TO worker;", text)
    assert len(grants) >= 5
    return " ".join(re.sub(r"\bmbqueue\b", place, grant) for grant in grants)


def test_a_worker_needs_only_the_documented_rights(queue, url, postgres_server, make_spec):
    queue.enqueue(make_spec(epochs=1), results_dir="r", now=0.0)
    place = parse_address(url).schema
    postgres_server.sql(f"DROP ROLE IF EXISTS worker; CREATE ROLE worker LOGIN; {documented_rights(place)}")
    with open_on_server(url.replace("postgres@", "worker@")) as worker:
        worker.verify()
        store = CommitsPlace(id="1", kind="store", address="s3://bucket/prefix")
        worker.bind_commits(store, instead_of=None, by="test", now=0.0)
        session = worker.start_session(device="cpu", now=0.0, alive_seconds=60)
        for _ in range(3):
            lease = worker.claim(session, now=0.0, lease_seconds=60)
            worker.renew(lease, now=0.0, lease_seconds=60)
            worker.commit(lease, result={"dataset_hash": "d"}, now=0.0)
        worker.enqueue(make_spec("other"), results_dir="o", now=0.0)
        worker.cancel("other", now=0.0)
        worker.database.wait(0.1, threading.Event().wait)
        worker.end_session(session, reason="test", now=0.0)
        for forbidden in ("DELETE FROM events", "UPDATE events SET why = ''", "DROP TABLE jobs", "TRUNCATE jobs"):
            with pytest.raises(QueueError, match=r"permission denied|must be owner"), worker.writing() as db:
                db.execute(forbidden)
    postgres_server.sql("DROP OWNED BY worker; DROP ROLE worker")


def test_a_role_that_may_not_create_the_tables_gets_advice(url, postgres_server):
    postgres_server.sql("DROP ROLE IF EXISTS visitor; CREATE ROLE visitor LOGIN")
    with pytest.raises(QueueError, match=r"permission denied.*first mbqueue enqueue as that role") as caught:
        open_on_server(url.replace("postgres@", "visitor@"))
    assert "Check that the server runs" not in str(caught.value)
    postgres_server.sql("DROP ROLE visitor")


@pytest.mark.parametrize("read_only", [False, True])
def test_a_newer_schema_is_refused(queue, url, postgres_server, read_only):
    postgres_server.sql(f"UPDATE {parse_address(url).schema}.mbqueue_schema SET version = version + 1")
    with pytest.raises(
        SchemaTooNew, match=rf"schema version {schema.SCHEMA_VERSION + 1}.*pip install --upgrade mbqueue"
    ):
        open_on_server(url, read_only=read_only)


FIXTURES = Path(__file__).parent / "fixtures"

#: A query that lists all definitions in a schema, except for the columns of the table `receipts`.
DEFINITIONS = """
    SELECT 'column', table_name || '.' || column_name, data_type || is_nullable || coalesce(column_default, '')
    FROM information_schema.columns WHERE table_schema = '{schema}' AND table_name <> 'receipts'
    UNION ALL SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = '{schema}'
    UNION ALL SELECT 'view', viewname, definition FROM pg_views WHERE schemaname = '{schema}'
    UNION ALL SELECT 'trigger', tgname, pg_get_triggerdef(pg_trigger.oid) FROM pg_trigger
        JOIN pg_class ON pg_class.oid = tgrelid WHERE relnamespace = '{schema}'::regnamespace AND NOT tgisinternal
    UNION ALL SELECT 'function', proname, prosrc FROM pg_proc WHERE pronamespace = '{schema}'::regnamespace
    UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = '{schema}'::regnamespace
"""


def definitions(postgres_server, url):
    place = parse_address(url).schema
    rows = postgres_server.sql(DEFINITIONS.format(schema=place))
    return {tuple(text.replace(place, "QUEUE") for text in row) for row in rows}


def make_old(postgres_server, url, version, source):
    """Create a queue with an earlier version's schema, and copy the rows of the queue ``source`` into it."""
    place = parse_address(url).schema
    made = [(FIXTURES / f"postgresql_{number}.sql").read_text(encoding="utf-8") for number in range(1, version + 1)]
    script = "\n".join(made).replace("{schema}", place).replace("{channel}", "mbqueue")
    postgres_server.sql(f"CREATE SCHEMA {place}; SET search_path TO {place}; {script}")
    postgres_server.sql(f"CREATE TABLE {place}.mbqueue_schema (version integer NOT NULL)")
    postgres_server.sql(f"INSERT INTO {place}.mbqueue_schema VALUES ({version})")
    with psycopg.connect(url.partition("?")[0], autocommit=True) as connection, source.reading() as db:
        connection.execute(f"SET search_path TO {place}; ALTER TABLE jobs DISABLE TRIGGER USER")
        for table in ("experiments", "sessions", "jobs", "needs", "events"):
            for row in rows_of(db, table):
                names, marks = ", ".join(row), ", ".join(["%s"] * len(row))
                connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(row.values()))
        for table in ("experiments", "jobs", "events"):
            connection.execute(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), max(id)) FROM {table}")
        for row in TRANSITIONS:
            connection.execute("INSERT INTO transitions VALUES (%s, %s, 'as it was')", (row.from_state, row.to_state))
        connection.execute("ALTER TABLE jobs ENABLE TRIGGER USER")


@pytest.mark.parametrize("version", range(1, 5))
def test_a_queue_of_every_version_is_upgraded_with_its_content(url, postgres_server, make_spec, tmp_path, version):
    with Queue(tmp_path / "queue.db") as source:
        source.enqueue(make_spec(), results_dir="r", now=0.0)
        session = source.start_session(device="cpu", now=0.0, alive_seconds=60)
        lease = source.claim(session, now=0.0, lease_seconds=60)
        before = source.jobs(), source.events()
        make_old(postgres_server, url, version, source)
    with open_on_server(url) as queue:
        queue.verify()
        assert (queue.jobs(), queue.events()) == before
        with queue.reading() as db:
            rows = db.execute("SELECT from_state, to_state, reason FROM transitions").fetchall()
        assert sorted(tuple(row.values()) for row in rows) == sorted(
            (row.from_state, row.to_state, row.reason) for row in TRANSITIONS
        )
        lease = queue.commit_and_claim(lease, result={"dataset_hash": "d"}, now=0.0, lease_seconds=60)
        assert queue.commit_and_claim(lease, result={}, now=0.0, lease_seconds=60).job.epoch == 2
    new = postgres_server.url()
    open_on_server(new).close()
    assert definitions(postgres_server, url) == definitions(postgres_server, new)


def test_several_processes_may_create_the_tables_at_once(url):
    failures = []

    def create() -> None:
        try:
            open_on_server(url).close()
        except Exception as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_reading_needs_a_queue_that_exists_and_writes_nothing(url, make_spec):
    with pytest.raises(QueueError, match=r"no queue at postgresql://.*mbqueue enqueue"):
        open_on_server(url, read_only=True)
    with open_on_server(url) as queue:
        queue.enqueue(make_spec(), results_dir="r", now=0.0)
        with open_on_server(url, read_only=True) as reader:
            assert reader.jobs() == queue.jobs()
            with pytest.raises(QueueError, match="opened for reading"):
                reader.pause("full", now=0.0)


def test_disabled_triggers_are_reported(queue, url, postgres_server):
    queue.verify()
    postgres_server.sql(f"ALTER TABLE {parse_address(url).schema}.jobs DISABLE TRIGGER jobs_follow_the_table")
    with pytest.raises(QueueError, match=r"1 of the triggers .* missing or disabled"):
        queue.verify()


def test_text_that_postgresql_cannot_hold_is_stored_with_replacements(queue, make_spec):
    queue.enqueue(make_spec(), results_dir="r", now=0.0)
    session = queue.start_session(device="cpu", now=0.0, alive_seconds=60)
    lease = queue.claim(session, now=0.0, lease_seconds=60)
    job = queue.fail(lease, error="Traceback Å\nValueError: a\x00b\udc80", now=0.0)
    assert job.error == "Traceback Å\nValueError: a\ufffdb?"


class _UndoneError(Exception):
    pass


def rows_read(queue, act):
    """Run an action in a transaction, roll it back, and return how many rows the server read."""
    statement = "SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)) AS n FROM pg_stat_xact_user_tables"
    read = 0
    with suppress(_UndoneError), queue.writing() as db:
        db.execute("SELECT 1")
        before = db.execute(statement).fetchone()["n"]
        act(db)
        read = int(db.execute(statement).fetchone()["n"] - before)
        raise _UndoneError
    return read


def test_a_worker_makes_the_server_read_a_few_rows_of_3000_jobs(queue, make_spec):
    session = queue.start_session(device="cpu", now=0.0, alive_seconds=3600)

    def add(number):
        queue.enqueue(make_spec(f"x{number}", folds=(0, 1, 2, 3, 4), epochs=19), results_dir=f"r{number}", now=0.0)
        lease = queue.claim(session, now=0.0, lease_seconds=60)
        queue.commit(lease, result={"dataset_hash": "d"}, now=0.0)

    def read():
        values = {"session": session, "now": 0, "lease_seconds": 1, "absurd": 1, "experiment_id": 1, "fold": 1}
        job = queue.jobs(experiment="x0", fold=0)[0]
        done = {"id": job.id, "fold": 0, "session": session, "now": 0, "started": 1, "lease_seconds": 1}
        return {
            "claim": rows_read(queue, lambda db: db.execute(claiming._claim_statement, values)),
            "claim next": rows_read(queue, lambda db: db.execute(claiming._CLAIM_NEXT, done)),
            "unlock": rows_read(queue, lambda db: db.execute(leases._UNLOCK, done)),
        }

    for number in range(30):
        add(number)
    assert max(read().values()) < 20


def test_an_epoch_is_enqueued_with_as_many_rows_read_in_a_fold_of_200_as_in_one_of_50(queue, make_spec):
    def read(name, epochs):
        queue.enqueue(make_spec(name, folds=(0, 1), epochs=epochs), results_dir=name, now=0.0)
        experiment_id = queue.experiment(name).id

        of_it = "DELETE FROM needs WHERE job_id IN (SELECT id FROM jobs WHERE experiment_id = ?)"

        def again(db):
            db.execute(of_it, (experiment_id,))
            edges.link(db, POSTGRESQL, experiment_id, epochs=epochs)

        return rows_read(queue, again) / epochs

    assert read("long", 200) < 1.3 * read("short", 50)


SECRET = "s3cr3t%40word"


def test_a_password_is_never_shown(postgres_server, tmp_path, caplog, monkeypatch):
    plain = postgres_server.url(schema="secret")
    url = plain.replace("postgres@", f"postgres:{SECRET}@")
    project = make_project(tmp_path / "project")
    monkeypatch.setenv("MBQUEUE_QUEUE", url)
    folder = Project(project.root).folder
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.2)
    said = [repr(folder), repr(folder.settings), repr(parse_address(url))]
    with open_queue(folder) as queue, caplog.at_level(logging.DEBUG):
        said += [repr(vars(queue.database)), queue.database.name]
        for wrong in (
            lambda: queue.session("nobody"),
            lambda: open_on_server(url.replace("postgres:", "stranger:")),
            lambda: open_on_server(url.replace("/postgres?", "/nowhere?")),
            lambda: open_on_server(url.replace("postgres:", "postgres:50%zz")),
            lambda: open_on_server(url.replace("?", "?nonsense=1&")),
        ):
            with pytest.raises((QueueError, UsageError)) as caught:
                wrong()
            said.append(str(caught.value))
        postgres_server.stop()
        try:
            with pytest.raises(QueueError) as caught:
                queue.jobs()
        finally:
            postgres_server.start()
        said += [str(caught.value), caplog.text]
    for text in said:
        assert "s3cr3t" not in text


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("mysql://me:s3cr3t@host/db", "MBQUEUE_QUEUE must have the form postgresql://"),
        # These passwords contain special characters that should be percent-encoded.
        ("postgresql://me:p@s3cr3t@host:5432/db", "cannot be read.*@ as %40"),
        ("postgresql://me:p/s3cr3t@host:5432/db", "cannot be read.*/ as %2F"),
        ("postgresql://me:1/s3cr3t@host/db", "cannot be read"),
        ("postgresql://me:p/s3cr3t", "cannot be read"),
        ("postgresql://me:p?s3cr3t@host/db", "cannot be read"),
        ("postgresql://host/db?schema=s3cr3t%00", "cannot be read"),
        ("postgresql://host/db?schema=s3cr3t%ff", "cannot be read"),
        ("postgresql://me:p#/s3cr3t@host/db", "cannot be read"),
        ("postgresql://me%3As3cr3t@host/db", "cannot be read"),
        ("postgresql://me%3As3cr3t%40host/db", "cannot be read"),
        ("postgresql://host/db?host=s3cr3t%40other", "cannot be read"),
        ("postgresql://host:s3cr3t/db", "cannot be read"),
        ("postgresql://host/db?port=5432,s3cr3t", "cannot be read"),
    ],
)
def test_a_wrong_url_is_refused_without_repeating_it(tmp_path, monkeypatch, url, why):
    project = make_project(tmp_path / "project")
    monkeypatch.setenv("MBQUEUE_QUEUE", url)
    with pytest.raises(UsageError, match=why) as caught:
        queue_exists(project)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql:///db", "postgresql:///db"),
        ("postgresql://me%40azure:p%40%2F%3Aw@a.b-c.net:6543/db", "postgresql://me@azure@a.b-c.net:6543/db"),
        ("postgresql://me:a:b@host/db", "postgresql://me@host/db"),
        ("postgresql://me@one:5432,two:5433/db", "postgresql://me@one,two:5432,5433/db"),
        ("postgresql://me@[2001:db8::1]:5432/db", "postgresql://me@2001:db8::1:5432/db"),
        ("postgresql:///db?host=/var/run/postgresql", "postgresql:///var/run/postgresql/db"),
        ("postgresql://%2Fvar%2Frun/db", "postgresql:///var/run/db"),
    ],
)
def test_every_form_of_a_right_url_is_taken(url, shown):
    assert parse_address(url).shown == f"{shown}?schema=mbqueue"


def test_options_reach_libpq_as_they_were_written():
    url = "postgresql://me@host/db?options=-c%20statement_timeout%3D5min&schema=a%20b%2Bc&sslrootcert=/a%20b/c+d"
    address = parse_address(url)
    assert address.schema == "a b+c"
    assert address.options["options"] == "-c statement_timeout=5min"
    assert address.options["sslrootcert"] == "/a b/c+d"
    assert "schema" not in address.options


def test_a_schema_that_the_server_would_cut_off_is_refused():
    url = "postgresql://me@host/db?schema="
    assert parse_address(url + "a" * 63).schema == "a" * 63
    for name in ("a" * 64, "ä" * 32):
        with pytest.raises(UsageError, match="63 bytes"):
            parse_address(url + name)


def test_the_environment_counts_before_the_settings(postgres_server, tmp_path, monkeypatch, make_spec):
    project = make_project(tmp_path / "project")
    (project.root / "mbqueue.toml").write_text('queue = "postgresql://stranger@127.0.0.1:1/none"\n')

    def folder() -> ProjectFolder:
        return Project(project.root).folder

    monkeypatch.setenv("MBQUEUE_QUEUE", postgres_server.url())
    assert not queue_exists(folder())
    with open_queue(folder()) as queue:
        queue.enqueue(make_spec(), results_dir="r", now=0.0)
    assert queue_exists(folder())
    monkeypatch.setenv("MBQUEUE_QUEUE", "sqlite")
    assert not queue_exists(folder())
    monkeypatch.delenv("MBQUEUE_QUEUE")
    with pytest.raises(QueueError, match="cannot be reached"):
        queue_exists(folder())


def test_an_interrupted_restore_is_reported_before_a_queue_begins_on_a_server(postgres_server, tmp_path, monkeypatch):
    monkeypatch.setenv("MBQUEUE_QUEUE", postgres_server.url())
    folder = Project(make_project(tmp_path / "project").root).folder
    files.write_text(folder.live_dir / RESTORING, "a.tar")
    for opening in (queue_exists, open_queue):
        with pytest.raises(UsageError, match=r"MBQUEUE_QUEUE=sqlite mbqueue restore a\.tar"):
            opening(folder)
    assert not is_queue_there(folder)


def test_without_psycopg_the_error_says_what_to_install(tmp_path, monkeypatch):
    def without(name, *arguments, **options):
        if name.partition(".")[0] == "psycopg":
            raise ImportError("No module named 'psycopg'")
        return imported(name, *arguments, **options)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'mbqueue\[postgresql\]'"):
        open_on_server("postgresql://me@host/db")


def test_a_cluster_shares_the_commits_in_the_project_and_other_mounts_need_a_store(tmp_path, monkeypatch):
    from mbqueue import mounts, project, topology
    from mbqueue.session.options import WorkOptions
    from mbqueue.session.report import Report
    from mbqueue.session.worker import work

    root = make_project(tmp_path / "project").root
    monkeypatch.setenv("MBQUEUE_QUEUE", "postgresql://me@127.0.0.1:1/db")
    for fstype, has_live_folder in (("ext4", False), ("nfs4", False), ("lustre", False), ("fuse.drive", True)):
        mount = mounts.Mount(point=root, fstype=fstype, source="x")
        monkeypatch.setattr(topology, "mount_of", lambda _, mount=mount: mount)
        folder = project.find_project(root)
        assert (folder.live is not None, folder.topology.is_mirrored) == (has_live_folder, False)
    monkeypatch.setattr("mbqueue.queue.opening.queue_exists", lambda _, **options: True)
    with pytest.raises(UsageError, match=r"only this machine can read the checkpoints in .*\. Set store"):
        work(ProjectFolder(root, live=tmp_path / "live"), WorkOptions(), report=Report())


def test_the_doctor_says_whether_the_queues_server_can_be_used(postgres_server, tmp_path, monkeypatch, make_spec):
    from mbqueue.cli.doctor import _queue

    root = make_project(tmp_path / "project").root
    monkeypatch.setenv("MBQUEUE_QUEUE", postgres_server.url())
    folder = Project(root).folder
    assert (_queue(folder).state, _queue(folder).found) == ("ok", "there is no queue at the configured server yet")
    open_queue(folder).close()
    assert _queue(folder).state == "ok"
    assert _queue(ProjectFolder(root, live=tmp_path / "live")).state == "problem"
    monkeypatch.setenv("MBQUEUE_QUEUE", "postgresql://stranger@127.0.0.1:1/none")
    assert "cannot be reached" in _queue(Project(root).folder).remedy

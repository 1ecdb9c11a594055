"""The ledger under races, kills and tampering, on SQLite and on a real PostgreSQL."""

import json
import random
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from core_support import NO_POSTGRESQL, killed_after, many_releases, postgresql_server, race

from mlops_workbench.core.audit import Head, read_head_file, verify_tables
from mlops_workbench.core.clock import iso, now
from mlops_workbench.core.errors import ConflictError, LedgerError
from mlops_workbench.core.files import canonical_json, sha256_bytes
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.ledger_schema import (
    audit,
    audit_head,
    decisions,
    leases,
    outbox,
    releases,
    slots,
    transaction,
)
from mlops_workbench.core.workspace import create_workspace

POSTGRESQL = pytest.param(
    "postgresql", marks=pytest.mark.skipif(bool(NO_POSTGRESQL), reason=NO_POSTGRESQL or "present")
)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a PostgreSQL server, with a place for the database's name."""
    with postgresql_server() as address:
        yield address


@pytest.fixture(params=["sqlite", POSTGRESQL])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a ledger that does not exist yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    address: str = request.getfixturevalue("server")
    name = f"ledger_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(
        address.format(database="postgres"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return address.format(database=name)


def release(number: int, prefix: str = "flights") -> dict[str, str]:
    """The record of a release that does not exist."""
    digest = sha256_bytes(f"{prefix}-{number}".encode())
    return {
        "digest": digest,
        "name": f"{prefix}-r{number}",
        "recipe": "flights",
        "data_version": "flights@v1.0",
        "run_id": f"run-{number}",
        "path": f"/srv/{digest}",
    }


def deploy(ledger: Ledger, number: int, epoch: int) -> int:
    """One decision with a release, the champion's slot and a message; its number."""
    row = release(number)
    with ledger.decision(
        "deploy",
        actor="ada",
        subject=row["name"],
        verdict="approved",
        reason=f"gates passed, number {number}",
        evidence={"brier": 0.19 + number / 1000, "slices": {"JFK": 0.2}},
        cycle="cycle-1",
        record_path="runs/1/5_deploy.ipynb",
    ) as change:
        change.add_release(row, status="approved")
        change.set_slot("champion", row["digest"], expected_epoch=epoch)
        change.enqueue(f"{row['name']} serves", "Brier 0.19", key=f"serves-{number}")
    return change.decision_id


def count(ledger: Ledger, table: sqlalchemy.Table) -> int:
    """The number of rows in a table."""
    with transaction(ledger._engine) as connection:
        query = sqlalchemy.select(sqlalchemy.func.count()).select_from(table)
        return int(connection.scalar(query) or 0)


def test_eight_processes_open_a_new_ledger_at_once(url: str) -> None:
    def work(number: int) -> int:
        with Ledger(url).decision(
            "note", actor=str(number), subject="s", verdict="v", reason="r"
        ) as change:
            pass
        return change.decision_id

    answers = race(work)
    assert sorted(answers) == [1, 2, 3, 4, 5, 6, 7, 8], answers
    report = Ledger(url).verify()
    assert report.ok and report.records == 8, report


@pytest.mark.skipif(bool(NO_POSTGRESQL), reason=NO_POSTGRESQL or "present")
def test_however_many_ledgers_are_opened_the_database_has_few_connections(server: str) -> None:
    """A controller opens some at each look, for months; PostgreSQL takes a hundred connections."""
    url = server.format(database="postgres")
    kept = [Ledger(url) for _ in range(120)]
    assert {ledger.slot("champion") for ledger in kept} == {None}
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'postgres'"
    with transaction(kept[0]._engine) as connection:
        assert int(connection.scalar(sqlalchemy.text(query)) or 0) <= 3


def test_one_of_eight_wins_each_epoch_of_a_slot(url: str) -> None:
    rounds = 10
    ledger = Ledger(url)
    with ledger.decision("seed", actor="a", subject="s", verdict="v", reason="r") as change:
        for number in range(8):
            change.add_release(release(number))
    ledger.close()

    def work(number: int) -> list[int]:
        own, won = Ledger(url), []
        for epoch in range(rounds):
            try:
                with own.decision(
                    "deploy", actor=str(number), subject="s", verdict="v", reason="r"
                ) as change:
                    change.set_slot("champion", release(number)["digest"], expected_epoch=epoch)
                won.append(epoch)
            except ConflictError as error:
                assert "another decision came first" in str(error)
        return won

    answers = race(work)
    assert all(isinstance(won, list) for won in answers), answers
    assert sorted(epoch for won in answers for epoch in won) == list(range(rounds))
    slot = ledger.slot("champion")
    assert slot is not None and slot.epoch == rounds
    assert len(ledger.decisions()) == rounds + 1
    assert ledger.verify().ok


def test_one_of_eight_gets_each_lease(url: str) -> None:
    ledger = Ledger(url)
    ledger.acquire_lease("old", "gone", 0.001)
    time.sleep(0.01)
    ledger.close()
    names = ["old", *(f"lease-{number}" for number in range(9))]

    def work(number: int) -> list[tuple[str, int]]:
        own, won = Ledger(url), []
        for name in names:
            try:
                lease = own.acquire_lease(name, f"host/{number}", 60)
                won.append((name, lease.epoch))
            except ConflictError as error:
                assert "held by host/" in str(error)
        return won

    answers = race(work)
    assert all(isinstance(won, list) for won in answers), answers
    won = sorted(pair for pairs in answers for pair in pairs)
    assert won == sorted((name, 2 if name == "old" else 1) for name in names)


def test_a_lease_that_ran_out_fences_its_old_holder(url: str) -> None:
    ledger = Ledger(url)
    first = ledger.acquire_lease("pipeline", "host-a/1", 0.05)
    time.sleep(0.06)
    second = ledger.acquire_lease("pipeline", "host-b/2", 60)
    assert second.epoch == first.epoch + 1
    with pytest.raises(ConflictError, match="held by host-b/2"):
        ledger.check_fence(first)
    with (
        pytest.raises(ConflictError, match="held by host-b/2"),
        ledger.decision("deploy", actor="a", subject="s", verdict="v", reason="r", fence=first),
    ):
        raise AssertionError("the block of a fenced decision must not run")
    assert ledger.release_lease(first) is False
    assert ledger.lease("pipeline") == second
    assert ledger.decisions() == []
    held = ledger.lease("pipeline")
    assert held is not None and ledger.release_lease(held) is True  # a dead holder is cleared away
    assert ledger.acquire_lease("pipeline", "host-c/3", 60).epoch == 3


def test_a_decision_that_fails_leaves_nothing(url: str) -> None:
    ledger = Ledger(url)
    deploy(ledger, 1, 0)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        ledger.decision("deploy", actor="a", subject="s", verdict="v", reason="r") as change,
    ):
        change.add_release(release(2))
        change.set_slot("champion", release(2)["digest"], expected_epoch=1)
        change.enqueue("told too early", "")
        raise RuntimeError("in the middle")
    with (
        pytest.raises(LedgerError, match="expected evidence"),
        ledger.decision(
            "deploy", actor="a", subject="s", verdict="v", reason="r", evidence={"x": object()}
        ),
    ):
        pass
    assert [row.name for row in ledger.releases()] == ["flights-r1"]
    assert [message.title for message in ledger.messages()] == ["flights-r1 serves"]
    assert len(ledger.decisions()) == 1 and ledger.verify().ok


def test_awkward_text_and_numbers_are_kept(url: str) -> None:
    ledger = Ledger(url)
    with ledger.decision(
        "note",
        actor="Zoë\0",
        subject="<img onerror=x>",
        verdict="=cmd",
        reason="line 1\nline 2 \ud800 'quoted' \"twice\"",
        evidence={"nan": float("nan"), "wide": 2**80, "deep": [[{"ü": (1, 2.5, None)}]]},
    ) as change:
        change.enqueue("ä" * 1000, "\0", key="\ud800")
    row = ledger.decisions()[0]
    assert row.actor == "Zoë\\x00" and row.evidence["wide"] == 2**80
    assert row.evidence["deep"] == [[{"ü": [1, 2.5, None]}]]
    assert ledger.verify().ok


def test_a_database_that_stays_locked_is_no_lost_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlops_workbench.core.ledger_schema.BUSY_TIMEOUT_SECONDS", 0.2)
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    lease = ledger.acquire_lease("pipeline", "host/1", 30)
    with (
        transaction(ledger._engine, writes=True),
        pytest.raises(LedgerError, match="another process has been writing"),
    ):
        ledger.renew_lease(lease, 30)
    assert ledger.renew_lease(lease, 30).epoch == lease.epoch


def test_an_outbox_key_is_told_once(url: str) -> None:
    ledger = Ledger(url)

    def work(number: int) -> bool:
        with Ledger(url).decision(
            "alert", actor=str(number), subject="brier", verdict="raised", reason="r"
        ) as change:
            return change.enqueue("Brier rises", "0.31", key="alert-brier-17")

    answers = race(work, 4)
    assert sorted(answers) == [False, False, False, True], answers
    assert len(ledger.messages()) == 1 and len(ledger.decisions()) == 4 and ledger.verify().ok
    message = ledger.due_messages(now())[0]
    claims = race(lambda _: Ledger(url).claim_message(message, now() + timedelta(minutes=1)), 4)
    assert sorted(claims) == [False, False, False, True], claims


def test_sigkill_in_the_middle_of_decisions_leaves_the_ledger_whole(url: str) -> None:
    chance = random.Random(7)
    ledger = Ledger(url)
    kills = 30

    def work(sender: Any) -> None:
        own = Ledger(url)
        known = len(own.releases())
        sender.send(None)
        while True:
            known += 1
            sender.send(deploy(own, known, known - 1))

    for _ in range(kills):
        with killed_after(work, chance.randint(1, 5), chance.uniform(0.0, 0.05)) as heard:
            confirmed = [number for number in heard if number is not None]
        report = ledger.verify()
        assert report.ok, report.problems
        numbers = [row.id for row in ledger.decisions(limit=100_000)]
        assert sorted(numbers) == list(range(1, report.records + 1))
        assert set(confirmed) <= set(numbers)
        slot = ledger.slot("champion")
        assert (slot.epoch if slot else 0) == report.records
        assert count(ledger, releases) == count(ledger, outbox) == report.records
    assert report.records > kills, "the processes were killed before they did anything"


def test_verifying_while_others_decide_raises_no_false_alarm(url: str) -> None:
    ledger = Ledger(url)

    def work(number: int) -> bool:
        own = Ledger(url)
        if number == 0:
            reports = [own.verify() for _ in range(40)]
            return all(report.ok for report in reports)
        for turn in range(15):
            with own.decision(
                "note", actor=str(number), subject=str(turn), verdict="v", reason="r"
            ):
                pass
        return True

    answers = race(work, 4)
    assert answers == [True] * 4, answers
    assert ledger.verify().records == 45
    if ledger.head_path is not None:
        assert read_head_file(ledger.head_path) == Head(45, _hash(ledger, 45))


def _hash(ledger: Ledger, sequence: int) -> str:
    with transaction(ledger._engine) as connection:
        return str(
            connection.scalar(sqlalchemy.select(audit.c.hash).where(audit.c.sequence == sequence))
        )


# -- tampering ------------------------------------------------------------------------------------


def _edit_decision(connection: sqlalchemy.Connection) -> None:
    connection.execute(decisions.update().where(decisions.c.id == 3).values(reason="looked at"))


def _edit_evidence(connection: sqlalchemy.Connection) -> None:
    connection.execute(decisions.update().where(decisions.c.id == 3).values(evidence='{"a":1}'))


def _edit_record(connection: sqlalchemy.Connection) -> None:
    text = str(connection.scalar(sqlalchemy.select(audit.c.record).where(audit.c.sequence == 3)))
    assert "ada" in text
    changed = audit.update().where(audit.c.sequence == 3)
    connection.execute(changed.values(record=text.replace("ada", "eve")))


def _edit_record_and_hash(connection: sqlalchemy.Connection) -> None:
    _edit_record(connection)
    text = str(connection.scalar(sqlalchemy.select(audit.c.record).where(audit.c.sequence == 3)))
    changed = audit.update().where(audit.c.sequence == 3)
    connection.execute(changed.values(hash=sha256_bytes(text.encode())))
    connection.execute(decisions.update().where(decisions.c.id == 3).values(actor="eve"))


def _delete_decision(connection: sqlalchemy.Connection) -> None:
    connection.execute(decisions.delete().where(decisions.c.id == 3))


def _delete_record(connection: sqlalchemy.Connection) -> None:
    connection.execute(audit.delete().where(audit.c.sequence == 3))


def _delete_both(connection: sqlalchemy.Connection) -> None:
    _delete_decision(connection)
    _delete_record(connection)


def _delete_first(connection: sqlalchemy.Connection) -> None:
    connection.execute(audit.delete().where(audit.c.sequence == 1))
    connection.execute(decisions.delete().where(decisions.c.id == 1))


def _renumber(connection: sqlalchemy.Connection, column: Any, first: int, second: int) -> None:
    for old, new in ((first, 999), (second, first), (999, second)):
        connection.execute(column.table.update().where(column == old).values({column.name: new}))


def _swap_decisions(connection: sqlalchemy.Connection) -> None:
    _renumber(connection, decisions.c.id, 2, 4)


def _swap_records(connection: sqlalchemy.Connection) -> None:
    _renumber(connection, audit.c.sequence, 2, 4)


def _delete_last(connection: sqlalchemy.Connection) -> None:
    connection.execute(audit.delete().where(audit.c.sequence >= 5))
    connection.execute(decisions.delete().where(decisions.c.id >= 5))


def _delete_last_and_head(connection: sqlalchemy.Connection) -> None:
    _delete_last(connection)
    last = connection.scalar(sqlalchemy.select(audit.c.hash).where(audit.c.sequence == 4))
    connection.execute(audit_head.update().values(records=4, hash=last))


def _delete_everything(connection: sqlalchemy.Connection) -> None:
    for table in (audit, decisions, slots, releases, outbox):
        connection.execute(table.delete())
    connection.execute(audit_head.update().values(records=0, hash=""))


def _rewrite_history(connection: sqlalchemy.Connection) -> None:
    """A forged chain from record 3 on, every hash and the head in the database made to fit."""
    rows = connection.execute(sqlalchemy.select(audit).order_by(audit.c.sequence)).all()
    before = rows[1].hash
    for row in rows[2:]:
        record = json.loads(row.record)
        record["previous"] = before
        record["decision"]["actor"] = "eve"
        text = canonical_json(record)
        before = sha256_bytes(text)
        changed = audit.update().where(audit.c.sequence == row.sequence)
        connection.execute(changed.values(record=text.decode(), hash=before))
    connection.execute(decisions.update().where(decisions.c.id >= 3).values(actor="eve"))
    connection.execute(audit_head.update().values(hash=before))


def _insert_decision(connection: sqlalchemy.Connection) -> None:
    row = dict(connection.execute(decisions.select().where(decisions.c.id == 3)).one()._mapping)
    connection.execute(decisions.insert().values(**{**row, "id": 99}))


def _edit_slot(connection: sqlalchemy.Connection) -> None:
    first = release(1)["digest"]
    connection.execute(slots.update().values(digest=first))


def _edit_release(connection: sqlalchemy.Connection) -> None:
    changed = releases.update().where(releases.c.name == "flights-r2")
    connection.execute(changed.values(path="/tmp/other"))


def _edit_message(connection: sqlalchemy.Connection) -> None:
    connection.execute(outbox.update().where(outbox.c.key == "serves-2").values(body="all is well"))


def _delete_message(connection: sqlalchemy.Connection) -> None:
    connection.execute(outbox.delete().where(outbox.c.key == "serves-2"))


def _edit_head(connection: sqlalchemy.Connection) -> None:
    connection.execute(audit_head.update().values(records=4))


TAMPERING = [
    (_edit_decision, [(3, "edited")]),
    (_edit_evidence, [(3, "edited")]),
    (_edit_record, [(3, "edited")]),
    (_edit_record_and_hash, [(3, "edited")]),
    (_delete_decision, [(3, "deleted")]),
    (_delete_record, [(3, "deleted")]),
    (_delete_both, [(3, "deleted")]),
    (_delete_first, [(1, "deleted")]),
    (_swap_decisions, [(2, "swapped"), (4, "swapped")]),
    (_swap_records, [(2, "swapped"), (4, "swapped")]),
    (_delete_last, [(5, "deleted"), (6, "deleted")]),
    (_insert_decision, [(99, "inserted")]),
    (_edit_slot, [(6, "state")]),
    (_edit_release, [(2, "state")]),
    (_edit_message, [(2, "state")]),
    (_delete_message, [(2, "state")]),
    (_edit_head, [(0, "head"), (4, "edited")]),
]
ONLY_BY_THE_FILE = [
    (_delete_last_and_head, [(5, "deleted"), (6, "deleted")]),
    (_delete_everything, [(number, "deleted") for number in range(1, 7)]),
    (_rewrite_history, [(6, "edited")]),
]


def six_decisions(url: str) -> Ledger:
    """A ledger with six deployments."""
    ledger = Ledger(url)
    for number in range(1, 7):
        deploy(ledger, number, number - 1)
    assert ledger.verify().ok
    return ledger


def found(ledger: Ledger) -> list[tuple[int, str]]:
    """The places of all problems."""
    report = ledger.verify()
    assert report.ok == (not report.problems)
    return sorted((problem.sequence, problem.kind) for problem in report.problems)


@pytest.mark.parametrize(
    ("tamper", "expected"), TAMPERING, ids=lambda case: getattr(case, "__name__", "")
)
def test_tampering_is_found_and_located(url: str, tamper: Any, expected: Any) -> None:
    ledger = six_decisions(url)
    with transaction(ledger._engine, writes=True) as connection:
        tamper(connection)
    assert found(ledger) == expected
    assert found(Ledger(url)) == expected  # opening it again hides nothing
    deploy(ledger, 7, 6)  # a spoiled ledger does not stand in the way of the next decision
    assert set(expected) - {(0, "head"), (4, "edited"), (6, "state")} <= set(found(ledger))


@pytest.mark.parametrize(
    ("tamper", "expected"), ONLY_BY_THE_FILE, ids=lambda case: getattr(case, "__name__", "")
)
def test_the_head_file_finds_what_the_database_hides(
    tmp_path: Path, tamper: Any, expected: Any
) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = six_decisions(url)
    assert ledger.head_path is not None
    before = ledger.head_path.read_bytes()
    with transaction(ledger._engine, writes=True) as connection:
        tamper(connection)
    again = Ledger(url)
    missing = [pair for pair in expected if pair not in found(again)]
    assert not missing, found(again)
    with again.decision("note", actor="eve", subject="s", verdict="v", reason="r"):
        pass  # a further record does not paint over it
    assert ledger.head_path.read_bytes() == before
    assert not again.verify().ok


def test_a_missing_ledger_or_head_file_is_found(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = six_decisions(url)
    assert ledger.head_path is not None
    head = ledger.head_path.read_bytes()
    ledger.head_path.unlink()
    assert found(Ledger(url)) == [(0, "head")]
    ledger.head_path.write_bytes(head)
    assert found(Ledger(url)) == []
    for path in tmp_path.glob("ledger.db*"):
        if path != ledger.head_path:
            path.unlink()
    assert found(Ledger(url)) == [(number, "deleted") for number in range(1, 7)]


def test_a_head_file_that_is_behind_after_a_crash_is_brought_up(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = Ledger(url)
    deploy(ledger, 1, 0)
    assert ledger.head_path is not None
    old = ledger.head_path.read_bytes()
    deploy(ledger, 2, 1)
    new = ledger.head_path.read_bytes()
    ledger.head_path.write_bytes(old)
    assert ledger.verify().ok
    Ledger(url)
    assert ledger.head_path.read_bytes() == new != old


def test_every_random_edit_of_one_cell_is_found(url: str) -> None:
    chance = random.Random(11)
    ledger = six_decisions(url)
    known = read_head_file(ledger.head_path) if ledger.head_path else None
    delivery = {"delivered", "status", "attempts", "next_attempt_at", "sent_at", "error", "id"}
    cells = [
        (table, column)
        for table in (decisions, audit, audit_head, releases, slots, outbox)
        for column in table.columns
        if not (table is outbox and column.name in delivery)
        and not (table is audit_head and column.name == "id")
    ]
    for _ in range(300):
        table, column = chance.choice(cells)
        with ledger._engine.connect() as connection, connection.begin() as change:
            key = next(iter(table.primary_key))
            rows = connection.execute(sqlalchemy.select(key, column)).all()
            owner, value = chance.choice(rows)
            edited = _edited(chance, column, value)
            try:
                with connection.begin_nested():
                    statement = table.update().where(key == owner)
                    connection.execute(statement.values({column.name: edited}))
            except sqlalchemy.exc.IntegrityError:
                continue  # the database itself refused
            report = verify_tables(connection, known, known is not None)
            assert not report.ok, f"{table.name}.{column.name}: {value!r} -> {edited!r}"
            change.rollback()
    assert ledger.verify().ok


def _edited(chance: random.Random, column: sqlalchemy.Column[Any], value: Any) -> Any:
    if isinstance(column.type, sqlalchemy.Integer):
        return value + chance.choice([-3, -1, 1, 5, 100])
    if not value:
        return "x"
    place = chance.randrange(len(value))
    letter = chance.choice([c for c in 'abcdef0123456789 "{}' if c != value[place]])
    return value[:place] + letter + value[place + 1 :]


def test_the_database_password_is_in_no_error() -> None:
    with pytest.raises(LedgerError) as caught:
        Ledger("postgresql://ledger:hunter2hunter2@127.0.0.1:1/nowhere")
    assert "hunter2" not in str(caught.value)


def test_the_command_says_where_and_exits_1(tmp_path: Path) -> None:
    workspace = create_workspace(tmp_path / "factory", name="factory", recipe="flights")
    ledger = six_decisions(workspace.ledger_url)
    command = [sys.executable, "-m", "mlops_workbench.cli.main", "audit", "verify"]
    whole = subprocess.run(command, cwd=workspace.root, capture_output=True, text=True)
    assert whole.returncode == 0 and whole.stdout.startswith("6 records"), whole
    with transaction(ledger._engine, writes=True) as connection:
        _swap_decisions(connection)
    broken = subprocess.run(
        [*command, "--json"], cwd=workspace.root, capture_output=True, text=True
    )
    assert broken.returncode == 1, broken
    places = [(row["sequence"], row["kind"]) for row in json.loads(broken.stdout)["problems"]]
    assert places == [(2, "swapped"), (4, "swapped")]


@pytest.mark.slow
def test_what_served_at_a_moment_is_told_within_a_second_among_ten_thousand_releases(
    tmp_path: Path,
) -> None:
    """The whole command, its imports included, in processor seconds: what else the machine does is not measured."""
    workspace = create_workspace(tmp_path / "factory", name="factory", recipe="flights")
    ledger = Ledger(workspace.ledger_url)
    begun = many_releases(ledger, 10_000, ["flights@v1.0", "flights@v1.1"])
    assert ledger.verify().ok
    here = [sys.executable, "-m", "mlops_workbench.cli.main", "audit", "asof", "--json"]
    for number in (0, 5_000, 9_999):
        moment = iso(begun + 60 * number + 30)[:19]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        told = subprocess.run(
            [*here, moment], cwd=workspace.root, capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = sum(after[:2]) - sum(before[:2])
        release = json.loads(told.stdout)["release"]
        assert release["name"] == f"flights-r{number + 1}"
        assert release["trained_on"] == f"flights@v1.{number % 2}"
        assert release["put_there"]["why"] == "all gates passed"
        assert seconds < 1.0, seconds
        print(f"release {number + 1:,} of 10,000 told in {seconds:.2f} s")


def test_the_lease_table_is_not_audited_and_does_not_disturb(url: str) -> None:
    ledger = six_decisions(url)
    ledger.acquire_lease("pipeline", "host/1", 30)
    assert count(ledger, leases) == 1 and ledger.verify().ok

"""Helpers of the core tests: processes that race or are killed, and a PostgreSQL of our own."""

import atexit
import contextlib
import importlib.util
import json
import multiprocessing
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mlops_workbench.core.audit import seal_record
from mlops_workbench.core.clock import iso, timestamp
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.ledger_schema import audit, audit_head, decisions, releases, slots

FORK = multiprocessing.get_context("fork")
POSTGRESQL_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
HAS_PSYCOPG = importlib.util.find_spec("psycopg") is not None
NO_POSTGRESQL = (
    "no PostgreSQL server under /usr/lib/postgresql"
    if not POSTGRESQL_BINARIES
    else "psycopg is not installed (extra [postgres])"
    if not HAS_PSYCOPG
    else ""
)


def race(work: Callable[[int], Any], processes: int = 8, seconds: float = 60) -> list[Any]:
    """Run `work(number)` in so many processes that start at the same moment and have so long; their results."""
    barrier = FORK.Barrier(processes)
    results = FORK.Queue()

    def run(number: int) -> None:
        barrier.wait(30)
        try:
            results.put((number, work(number)))
        except BaseException as error:  # noqa: BLE001 -- told to the parent, whatever it is
            results.put((number, error))

    children = [FORK.Process(target=run, args=(number,)) for number in range(processes)]
    for child in children:
        child.start()
    answers = dict(results.get(timeout=seconds) for _ in children)
    for child in children:
        child.join(30)
    return [answers[number] for number in range(processes)]


@contextlib.contextmanager
def killed_after(work: Callable[[Any], None], words: int, seconds: float) -> Iterator[list[Any]]:
    """SIGKILL a process `seconds` after it sent so many words; what it sent until then."""
    receiver, sender = FORK.Pipe(duplex=False)
    child: BaseProcess = FORK.Process(target=work, args=(sender,))
    child.start()
    sender.close()
    heard = [receiver.recv() for _ in range(words)]
    time.sleep(seconds)
    child.kill()
    child.join(30)
    with contextlib.suppress(EOFError):
        while receiver.poll(1):
            heard.append(receiver.recv())
    assert child.exitcode == -9
    yield heard
    receiver.close()


def _postgresql_account() -> dict[str, Any]:
    """Options of a process that runs as another user, since the server refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    account = next(
        entry
        for name in ("postgres", "nobody")
        for entry in pwd.getpwall()
        if entry.pw_name == name
    )
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def start_postgresql(folder: Path) -> subprocess.Popen[bytes]:
    """The server over the data in a folder, once it answers."""
    binaries = POSTGRESQL_BINARIES[-1].parent
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    quiet |= _postgresql_account()
    server = subprocess.Popen(
        [binaries / "postgres", "-D", folder / "data", "-k", folder, "-c", "listen_addresses="],
        cwd=folder,
        **quiet,
    )
    ready = [binaries / "pg_isready", "-h", folder, "-U", "ledger", "-q"]
    deadline = time.monotonic() + 60
    while subprocess.run(ready, **quiet).returncode != 0:
        assert server.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return server


@contextlib.contextmanager
def postgresql_server() -> Iterator[str]:
    """A PostgreSQL server on a socket of its own folder; yields the URL without a database."""
    folder = Path(tempfile.mkdtemp(prefix="mwb-pg-"))
    user = _postgresql_account()
    if user:
        os.chown(folder, user["user"], user["group"])
    initialise = [POSTGRESQL_BINARIES[-1].parent / "initdb", "-D", folder / "data", "-U", "ledger"]
    subprocess.run(
        [*initialise, "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"],
        check=True,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **user,
    )
    server = start_postgresql(folder)
    try:
        yield f"postgresql://ledger@/{{database}}?host={folder}"
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)  # ends without waiting for clients
            server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def without_postgresql(address: str) -> Iterator[None]:
    """The server of `postgresql_server` is gone at once for the length of a block, and comes back with what it had committed."""
    folder = Path(address.partition("host=")[2])
    os.kill(int((folder / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
    yield
    back = start_postgresql(folder)
    atexit.register(back.kill)


def many_releases(ledger: Ledger, count: int, refs: list[str]) -> float:
    """Put releases on record as `Ledger.decision` would, each deployed once, a minute apart up to now; the first one's time."""
    begun = timestamp() - 60 * count
    with ledger.decision(
        "start", actor="test", subject="ledger", verdict="made", reason="creates the tables"
    ):
        pass
    previous_digest: str | None = None
    with ledger._engine.begin() as connection:
        head = connection.execute(audit_head.select()).one()
        previous, first = head.hash, head.records + 1
        rows: dict[str, list[dict[str, Any]]] = {"releases": [], "decisions": [], "audit": []}
        for number in range(count):
            sequence, digest, moment = first + number, f"{number:064x}", iso(begun + 60 * number)
            release = {
                "digest": digest,
                "name": f"flights-r{number + 1}",
                "recipe": "flights",
                "data_version": refs[number % len(refs)],
                "run_id": f"run{number}",
                "path": f"/bundles/{digest}",
                "status": "approved",
                "created_at": moment,
                "decision_id": sequence,
            }
            slot = {
                "name": "champion",
                "digest": digest,
                "previous_digest": previous_digest,
                "epoch": number + 1,
                "updated_at": moment,
            }
            decision = {
                "id": sequence,
                "at": moment,
                "kind": "deploy",
                "actor": "test",
                "subject": release["name"],
                "verdict": "deployed",
                "reason": "all gates passed",
                "evidence": {"gates": ["quality", "latency", "parity"] * 10},
                "cycle": None,
                "record_path": None,
            }
            changes = [
                {"table": "releases", "key": digest, "row": release},
                {"table": "slots", "key": "champion", "row": slot},
            ]
            record, seal = seal_record(sequence, previous, decision, changes)
            rows["releases"].append(release)
            rows["decisions"].append({**decision, "evidence": json.dumps(decision["evidence"])})
            rows["audit"].append({"sequence": sequence, "record": record, "hash": seal})
            previous, previous_digest = seal, digest
        connection.execute(releases.insert(), rows["releases"])
        connection.execute(decisions.insert(), rows["decisions"])
        connection.execute(audit.insert(), rows["audit"])
        connection.execute(slots.insert().values(**slot))
        connection.execute(audit_head.update().values(records=sequence, hash=seal))
    return begun

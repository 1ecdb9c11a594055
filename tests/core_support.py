"""Helpers of the core tests: processes that race or are killed, and a PostgreSQL of our own."""

import contextlib
import importlib.util
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


def race(work: Callable[[int], Any], processes: int = 8) -> list[Any]:
    """Run `work(number)` in so many processes that start at the same moment; their results."""
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
    answers = dict(results.get(timeout=60) for _ in children)
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


@contextlib.contextmanager
def postgresql_server() -> Iterator[str]:
    """A PostgreSQL server on a socket of its own folder; yields the URL without a database."""
    binaries = POSTGRESQL_BINARIES[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="mwb-pg-"))
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        account = next(
            entry
            for name in ("postgres", "nobody")
            for entry in pwd.getpwall()
            if entry.pw_name == name
        )
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    data = folder / "data"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
    initialise = [binaries / "initdb", "-D", data, "-U", "ledger", "-A", "trust", "--no-sync"]
    subprocess.run([*initialise, "-E", "UTF8", "--locale=C"], check=True, cwd=folder, **quiet)
    server = subprocess.Popen(
        [binaries / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses="],
        cwd=folder,
        **quiet,
    )
    try:
        ready = [binaries / "pg_isready", "-h", folder, "-U", "ledger", "-q"]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, **quiet).returncode != 0:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield f"postgresql://ledger@/{{database}}?host={folder}"
    finally:
        server.send_signal(signal.SIGINT)  # ends without waiting for clients
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)

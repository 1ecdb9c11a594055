"""Notifications against a real mail server and a real webhook receiver that fails in every way."""

import collections
import json
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from core_support import FORK, killed_after

from mlops_workbench.core import notify
from mlops_workbench.core.errors import NotifyError
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.notify import DeliveryReport, deliver, run_outbox, send_due
from mlops_workbench.core.secrets import write_secret
from mlops_workbench.core.workspace import create_workspace

TOKEN = "T0PSECRETTOKEN"
PASSWORD = "hunter2hunter2"


class Receiver:
    """A webhook receiver that can be up, answer 503, drop the connection, or be gone."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.mode = "up"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.server: ThreadingHTTPServer | None = None
        self.paths: set[str] = set()

    @property
    def address(self) -> str:
        """Its Apprise address, with the secret in the path as Slack has it."""
        return f"json://127.0.0.1:{self.port}/hooks/{TOKEN}"

    def start(self) -> None:
        """Listen."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if receiver.mode == "503":
                    self.send_error(503)
                    return
                receiver.titles.append(body["title"])
                receiver.paths.add(self.path)
                if receiver.mode == "drop":  # the message arrived, the answer does not
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *values: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None


class Mailbox:
    """What the mail server took."""

    def __init__(self) -> None:
        self.subjects: list[str] = []
        self.texts: list[str] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        text = envelope.content.decode()
        self.texts.append(text)
        self.subjects += [line[9:] for line in text.splitlines() if line.startswith("Subject: ")]
        return "250 OK"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver that is up."""
    made = Receiver()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def mail() -> Iterator[tuple[Mailbox, str]]:
    """A mail server that wants a password, and its Apprise address."""

    def authenticate(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> Any:
        right = (data.login, data.password) == (b"ann", PASSWORD.encode())
        return AuthResult(success=right, handled=False)

    mailbox = Mailbox()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    controller = Controller(
        mailbox,
        hostname="127.0.0.1",
        port=port,
        authenticator=authenticate,
        auth_required=True,
        auth_require_tls=False,
    )
    controller.start()
    address = (
        f"mailto://ann:{PASSWORD}@127.0.0.1:{port}/"
        "?mode=insecure&smtp=127.0.0.1&from=ann@example.org&to=team@example.org"
    )
    yield mailbox, address
    controller.stop()


def tell(ledger: Ledger, title: str, **more: Any) -> bool:
    """One decision with one message."""
    with ledger.decision("note", actor="ada", subject=title, verdict="v", reason="r") as change:
        return change.enqueue(title, f"Body of {title}", **more)


def open_ledger(folder: Path) -> Ledger:
    """The ledger of a folder."""
    return Ledger(f"sqlite:///{folder / 'ledger.db'}")


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_mail_and_webhook_get_the_message_as_text(
    tmp_path: Path, receiver: Receiver, mail: tuple[Mailbox, str]
) -> None:
    mailbox, address = mail
    ledger = open_ledger(tmp_path)
    tell(ledger, "flights-r2 refused", severity="critical")
    tell(ledger, "<img src=x onerror=y> & co", channels=["mail"])
    channels = {"team": receiver.address, "mail": address}
    report = send_due(ledger, channels, state=tmp_path, maximum_attempts=3)
    assert report == DeliveryReport(sent=2, failed=0, waiting=0), ledger.messages()
    assert receiver.titles == ["flights-r2 refused"]
    assert receiver.paths == {f"/hooks/{TOKEN}"}
    assert mailbox.subjects == ["flights-r2 refused", "<img src=x onerror=y> & co"]
    assert "Body of flights-r2 refused" in mailbox.texts[0]
    assert "<img" not in mailbox.texts[1].partition("\n\n")[2]
    assert {message.status for message in ledger.messages()} == {"sent"}
    assert send_due(ledger, channels, state=tmp_path, maximum_attempts=3).sent == 0
    assert ledger.verify().ok


def test_a_receiver_that_is_down_for_a_while_loses_nothing(
    tmp_path: Path, receiver: Receiver, mail: tuple[Mailbox, str]
) -> None:
    mailbox, address = mail
    ledger = open_ledger(tmp_path)
    channels = {"team": receiver.address, "mail": address}
    titles = [f"message {number}" for number in range(12)]

    def send() -> DeliveryReport:
        return send_due(
            ledger, channels, state=tmp_path, maximum_attempts=50, first_wait_seconds=0.02
        )

    receiver.stop()
    for title in titles[:4]:
        tell(ledger, title)
    assert send() == DeliveryReport(0, 0, 4)  # nobody listens
    receiver.start()
    receiver.mode = "503"
    for title in titles[4:8]:
        tell(ledger, title)
    time.sleep(0.05)
    assert send().sent == 0  # it listens and refuses
    receiver.mode = "drop"
    tell(ledger, titles[8])
    until(lambda: send() is not None and titles[8] in receiver.titles)  # it takes one, says nothing
    receiver.mode = "up"
    for title in titles[9:]:
        tell(ledger, title)
    until(lambda: send() is not None and all(m.status == "sent" for m in ledger.messages()))
    counts = collections.Counter(receiver.titles)
    assert set(counts) == set(titles), "nothing is lost"
    assert max(counts.values()) <= 2, counts
    doubled = [title for title, count in counts.items() if count > 1]
    assert titles[8] in doubled, "the answer that was dropped must have caused a second delivery"
    assert sorted(mailbox.subjects) == sorted(titles), "a channel that was up gets each one once"
    assert all(message.error is None for message in ledger.messages())


def test_a_message_is_given_up_after_the_last_attempt_and_stays_visible(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    gone = Receiver()
    tell(ledger, "lost", key="lost")
    for attempt in (1, 2, 3):
        report = send_due(
            ledger,
            {"team": gone.address},
            state=tmp_path,
            maximum_attempts=3,
            ahead_seconds=3600,
        )
        assert report == DeliveryReport(0, int(attempt == 3), int(attempt < 3))
    message = ledger.messages()[0]
    assert (message.status, message.attempts) == ("failed", 3)
    assert message.error is not None and "channel 'team'" in message.error


def test_waiting_grows_and_ends_at_a_quarter_of_an_hour(tmp_path: Path, receiver: Receiver) -> None:
    receiver.mode = "503"
    ledger = open_ledger(tmp_path)
    tell(ledger, "slow")
    waits = []
    for _ in range(10):
        before = time.time()
        send_due(
            ledger,
            {"team": receiver.address},
            state=tmp_path,
            maximum_attempts=99,
            ahead_seconds=10_000,
        )
        due = ledger.messages()[0].next_attempt_at
        waits.append(notify.now().fromisoformat(due).timestamp() - before)
    for number, wait in enumerate(waits):
        expected = min(5 * 2**number, 900)
        assert 0.8 * expected <= wait <= 1.2 * expected + 5, (number, wait)


def test_the_same_key_is_told_once(tmp_path: Path, receiver: Receiver) -> None:
    ledger = open_ledger(tmp_path)
    assert tell(ledger, "drift", key="alert-drift-7") is True
    send_due(ledger, {"team": receiver.address}, state=tmp_path, maximum_attempts=3)
    assert tell(ledger, "drift", key="alert-drift-7") is False  # also after it was sent
    send_due(ledger, {"team": receiver.address}, state=tmp_path, maximum_attempts=3)
    assert receiver.titles == ["drift"]


def test_an_unknown_channel_does_not_keep_the_others_waiting(
    tmp_path: Path, receiver: Receiver
) -> None:
    ledger = open_ledger(tmp_path)
    tell(ledger, "half", channels=["team", "nobody"])
    for _ in range(2):
        send_due(
            ledger,
            {"team": receiver.address},
            state=tmp_path,
            maximum_attempts=9,
            ahead_seconds=3600,
        )
    message = ledger.messages()[0]
    assert receiver.titles == ["half"] and message.delivered == ("team",)
    assert message.status == "waiting" and "'nobody' is not configured" in (message.error or "")


def test_two_senders_do_not_send_twice(tmp_path: Path, receiver: Receiver) -> None:
    ledger = open_ledger(tmp_path)
    titles = [f"message {number}" for number in range(20)]
    for title in titles:
        tell(ledger, title)
    ledger.close()

    def work() -> None:
        own = open_ledger(tmp_path)
        for _ in range(5):
            send_due(own, {"team": receiver.address}, state=tmp_path, maximum_attempts=3)

    children = [FORK.Process(target=work) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert sorted(receiver.titles) == sorted(titles)


def test_sigkill_of_a_sender_loses_nothing(tmp_path: Path, receiver: Receiver) -> None:
    chance = random.Random(5)
    ledger = open_ledger(tmp_path)
    titles = [f"message {number}" for number in range(60)]
    for title in titles:
        tell(ledger, title)
    kills = 8

    def work(sender: Any) -> None:
        own = open_ledger(tmp_path)
        sender.send(None)
        while True:
            send_due(
                own,
                {"team": receiver.address},
                state=tmp_path,
                maximum_attempts=99,
                ahead_seconds=3600,
            )

    for _ in range(kills):
        with killed_after(work, 1, chance.uniform(0.02, 0.15)):
            pass
    send_due(
        ledger,
        {"team": receiver.address},
        state=tmp_path,
        maximum_attempts=99,
        ahead_seconds=3600,
    )
    counts = collections.Counter(receiver.titles)
    assert set(counts) == set(titles), "nothing is lost"
    assert sum(counts.values()) - len(titles) <= kills, "at most one duplicate a crash"
    assert max(counts.values()) <= 2, counts
    assert all(message.status == "sent" for message in ledger.messages()) and ledger.verify().ok


def test_secrets_stay_out_of_ledger_log_and_errors(
    tmp_path: Path,
    receiver: Receiver,
    mail: tuple[Mailbox, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(1)
    for name in ("apprise", "urllib3", "urllib3.connectionpool", "requests"):
        caplog.set_level(1, logger=name)
    write_secret(tmp_path / "secrets", "TEAM_HOOK", receiver.address)
    wrong = mail[1].replace(PASSWORD, "wr0ngpassw0rd")
    channels = {
        "team": "secret://TEAM_HOOK",
        "mail": mail[1],
        "wrong": wrong,
        "unknown": f"nosuchscheme://{TOKEN}",
        "missing": "secret://NOT_THERE",
        "twice": f"{receiver.address}, {receiver.address}",
    }
    ledger = open_ledger(tmp_path)
    tell(ledger, "hello")
    errors = []
    for mode in ("up", "503", "drop", "gone"):
        receiver.mode = mode
        if mode == "gone":
            receiver.stop()
        send_due(ledger, channels, state=tmp_path, maximum_attempts=9, ahead_seconds=3600)
        errors.append(ledger.messages()[0].error or "")
        for name, address in channels.items():
            try:
                deliver(name, address, "t", "b", state=tmp_path)
            except Exception as error:  # noqa: BLE001 -- whatever it is, it must not show the secret
                errors += [str(error), repr(error), repr(error.__cause__), repr(error.__context__)]
    assert receiver.paths == {f"/hooks/{TOKEN}"} and mail[0].subjects, "secrets were really used"
    assert "'wrong'" in errors[0] and "'missing'" in errors[0] and "NOT_THERE" in errors[0]
    assert "apprise" in {record.name for record in caplog.records}
    assert "urllib3.connectionpool" in {record.name for record in caplog.records}
    stored = b"".join(
        path.read_bytes() for path in tmp_path.iterdir() if path.name.startswith("ledger.db")
    )
    seen = {
        "ledger": stored.decode("latin-1"),
        "log": caplog.text + "".join(repr(vars(record)) for record in caplog.records),
        "errors": "\n".join(errors),
    }
    for place, text in seen.items():
        for secret in (TOKEN, PASSWORD, "wr0ngpassw0rd", receiver.address):
            assert secret not in text, f"{secret} in {place}"


def test_a_secrets_file_that_others_can_read_is_refused(tmp_path: Path, receiver: Receiver) -> None:
    write_secret(tmp_path / "secrets", "TEAM_HOOK", receiver.address)
    os.chmod(tmp_path / "secrets", 0o644)
    ledger = open_ledger(tmp_path)
    tell(ledger, "hello")
    send_due(ledger, {"team": "secret://TEAM_HOOK"}, state=tmp_path, maximum_attempts=9)
    assert "mode 600" in (ledger.messages()[0].error or "") and receiver.titles == []


def test_the_loop_sends_what_is_decided_while_it_runs(tmp_path: Path, receiver: Receiver) -> None:
    workspace = create_workspace(
        tmp_path / "factory",
        name="factory",
        recipe="flights",
        settings={"notify.team": receiver.address},
    )
    ledger = Ledger(workspace.ledger_url)
    stop = threading.Event()
    loop = threading.Thread(
        target=run_outbox, args=(workspace, stop), kwargs={"interval_seconds": 0.05}
    )
    loop.start()
    try:
        tell(ledger, "first")
        until(lambda: receiver.titles == ["first"])
        receiver.stop()
        tell(ledger, "second")
        until(lambda: ledger.messages()[0].attempts == 1)
        receiver.start()
        until(lambda: receiver.titles == ["first", "second"])
        until(lambda: ledger.messages()[0].status == "sent")
    finally:
        stop.set()
        loop.join(30)
    assert not loop.is_alive()


def test_the_loop_survives_a_ledger_that_cannot_be_opened(
    tmp_path: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = create_workspace(
        tmp_path / "factory",
        name="factory",
        recipe="flights",
        settings={"notify.team": receiver.address},
    )
    path = workspace.state / "ledger.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no database " * 500)
    stop = threading.Event()
    loop = threading.Thread(
        target=run_outbox, args=(workspace, stop), kwargs={"interval_seconds": 0.02}
    )
    with caplog.at_level(logging.WARNING, logger="mlops_workbench.notify"):
        loop.start()
        until(lambda: "notifications wait" in caplog.text)
        time.sleep(0.2)
        path.unlink()
        tell(Ledger(workspace.ledger_url), "at last")
        until(lambda: receiver.titles == ["at last"])
        stop.set()
        loop.join(30)
    assert caplog.text.count("notifications wait") == 1, "said once, not every round"


def test_an_unknown_form_of_address_is_an_error_without_the_address(tmp_path: Path) -> None:
    with pytest.raises(NotifyError) as caught:
        deliver("team", f"{TOKEN} is no address", "t", "b", state=tmp_path)
    assert TOKEN not in str(caught.value) and "'team'" in str(caught.value)


def test_the_commands_send_list_and_try_a_channel(tmp_path: Path, receiver: Receiver) -> None:
    workspace = create_workspace(
        tmp_path / "factory",
        name="factory",
        recipe="flights",
        settings={"notify.team": "secret://TEAM_HOOK"},
    )
    write_secret(workspace.secrets_path, "TEAM_HOOK", receiver.address)

    def mwb(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlops_workbench.cli.main", "notify", *words]
        return subprocess.run(command, cwd=workspace.root, capture_output=True, text=True)

    assert mwb("test", "team").returncode == 0 and receiver.titles == ["A trial message"]
    assert mwb("test", "nobody").returncode == 2
    tell(Ledger(workspace.ledger_url), "decided")
    receiver.mode = "503"
    failed = mwb("send")
    assert failed.returncode == 1 and "0 sent, 1 waiting" in failed.stdout, failed
    trial = mwb("test", "team")
    assert trial.returncode == 1 and "channel 'team'" in trial.stderr
    receiver.mode = "up"
    assert mwb("send", "--json").returncode == 0 and receiver.titles[-1] == "decided"
    rows = json.loads(mwb("list", "--json").stdout)
    assert [(row["title"], row["status"], row["attempts"]) for row in rows] == [
        ("decided", "sent", 2)
    ]
    for done in (failed, trial):
        assert TOKEN not in done.stdout + done.stderr

"""The journal under kills, torn tails, flipped bits and a full disk."""

import os
import random
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_support import FORK, killed_after, race
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.core.journal import JournalError, JournalWriter, encode_record, read_journal

TEXT = st.text(st.characters(exclude_categories=("Cs",)))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
RECORDS = st.lists(st.dictionaries(TEXT, JSON, max_size=5), max_size=8)


def write(path: Path, records: list[dict[str, Any]]) -> bytes:
    """The content of a journal with these records."""
    with JournalWriter(path) as journal:
        journal.append_many(records)
    return path.read_bytes()


@given(records=RECORDS, one_by_one=st.booleans())
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read(tmp_path_factory: Any, records: Any, one_by_one: bool) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.log"
    with JournalWriter(path) as journal:
        if one_by_one:
            for record in records:
                journal.append(record)
        else:
            journal.append_many(records)
    page = read_journal(path)
    assert page.records == records
    assert (page.damaged, page.torn_tail) == ([], False)
    assert page.next_offset == path.stat().st_size
    assert read_journal(path, page.next_offset).records == []


def test_what_has_no_json_form_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    with JournalWriter(path) as journal:
        for record in ({"x": object()}, {"x": "\ud800"}, {("a", "b"): 1}):
            with pytest.raises(JournalError):
                journal.append(record)  # type: ignore[arg-type]
            with pytest.raises(JournalError):
                journal.append_many([{"fine": 1}, record])  # type: ignore[list-item]
        journal.append({"loss": np.float32(0.5), "rows": np.int64(3), "nan": float("nan")})
    assert read_journal(path).records == [{"loss": 0.5, "rows": 3, "nan": None}]


def test_a_tail_torn_at_any_byte_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    records = [{"step": step, "text": "ä\n" * step} for step in range(4)]
    whole = write(path, records)
    last = len(encode_record(records[-1]))
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        page = read_journal(path)
        assert page.records == records[:-1] and page.damaged == []
        assert page.torn_tail == (cut < last) and page.next_offset == len(whole) - last
        write(path, [{"step": 99}])
        page = read_journal(path)
        expected = records if cut == 1 else records[:-1]  # only the newline was missing
        assert page.records == [*expected, {"step": 99}]
        assert (page.damaged, page.torn_tail) == ([], False)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    records = [{"step": step, "value": step / 7, "name": "loss"} for step in range(6)]
    whole = write(path, records)
    for place in range(len(whole)):
        for bit in range(8):
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << bit
            path.write_bytes(spoiled)
            page = read_journal(path)
            assert page.damaged or page.torn_tail, (place, bit)
            assert all(record in records for record in page.records)
            assert len(page.records) >= len(records) - 2


def test_sigkill_of_a_writer_loses_nothing_that_was_appended(tmp_path: Path) -> None:
    chance = random.Random(3)
    path = tmp_path / "journal.log"
    total = 0

    def work(sender: Any) -> None:
        journal = JournalWriter(path, sync_interval_ms=5)
        sender.send(None)
        for number in range(10**9):
            journal.append({"writer": os.getpid(), "number": number, "text": "x" * (number % 700)})
            if number % 50 == 0:
                sender.send(number)

    for _ in range(30):
        with killed_after(work, chance.randint(1, 5), chance.uniform(0, 0.02)) as heard:
            confirmed = max((number for number in heard if number is not None), default=-1)
        page = read_journal(path)
        assert page.damaged == []
        numbers = [record["number"] for record in page.records[total:]]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > confirmed
        total = len(page.records)
    assert total > 1000


def test_processes_and_threads_may_share_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"

    def work(number: int) -> None:
        with JournalWriter(path) as journal:
            for step in range(500):
                journal.append({"writer": number, "step": step, "text": "y" * (step % 300)})

    race(work, 4)
    page = read_journal(path)
    assert (page.damaged, page.torn_tail) == ([], False)
    for number in range(4):
        assert [r["step"] for r in page.records if r["writer"] == number] == list(range(500))


def test_a_second_writer_does_not_cut_what_the_first_is_writing(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    first = JournalWriter(path)
    first.append({"writer": 1})
    with path.open("ab") as half:
        half.write(b"0123")  # as if the first were in the middle of a line
    with JournalWriter(path) as second:
        second.append({"writer": 2})
    first.append({"writer": 1})
    first.close()
    page = read_journal(path)
    assert page.records == [{"writer": 1}, {"writer": 2}, {"writer": 1}]
    assert len(page.damaged) == 1


def test_a_full_disk_is_told_and_costs_one_record(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"

    def work(answers: Any) -> None:
        journal = JournalWriter(path)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        number = 0
        try:
            while True:
                journal.append({"number": number, "text": "z" * 100})
                number += 1
        except JournalError as error:
            answers.send((number, str(error)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        journal.append({"number": "after"})
        journal.close()

    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=work, args=(sender,))
    child.start()
    number, text = receiver.recv()
    child.join(30)
    assert child.exitcode == 0 and "make room on the disk" in text and str(path) in text
    page = read_journal(path)
    assert [record["number"] for record in page.records] == [*range(number), "after"]
    assert len(page.damaged) == 1 and not page.torn_tail


def test_the_disk_gets_it_within_the_interval(tmp_path: Path, monkeypatch: Any) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd))[1])
    with JournalWriter(tmp_path / "a.log", sync_interval_ms=20) as journal:
        before = len(synced)
        journal.append({"x": 1})
        deadline = time.monotonic() + 10
        while len(synced) == before and time.monotonic() < deadline:
            time.sleep(0.005)
        assert len(synced) == before + 1
        time.sleep(0.1)
        assert len(synced) == before + 1, "nothing new, nothing to sync"
    with JournalWriter(tmp_path / "b.log", sync_interval_ms=0) as journal:
        before = len(synced)
        for _ in range(3):
            journal.append({"x": 1})
        assert len(synced) == before + 3
    with JournalWriter(tmp_path / "c.log") as journal:
        before = len(synced)
        journal.append({"x": 1})
        assert len(synced) == before
        journal.flush()
        assert len(synced) == before + 1

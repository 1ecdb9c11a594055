"""Is a batch good: 43 kinds of corruption, real clean months, wrong labels, quarantine and review."""

import json
import re
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pandera
import pytest
from data_support import new_store
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from mlops_workbench.cli.main import main
from mlops_workbench.core.errors import DataError
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.settings import DataSettings
from mlops_workbench.data import intake
from mlops_workbench.data.columns import check_schema
from mlops_workbench.data.consistency import check_consistency
from mlops_workbench.data.infer_schema import build_schema, infer_rules
from mlops_workbench.data.intake import Intake, deliver, take_in, words
from mlops_workbench.data.labels import check_labels, suspicious_labels
from mlops_workbench.data.quarantine import hold_rows, review_list, review_rows, split_batch
from mlops_workbench.data.validation import ValidationReport, validate_batch
from mlops_workbench.data.versions import DataStore
from mlops_workbench.pipeline.prepare import read_file
from mlops_workbench.recipes import pictures

NUMBERS = [
    "hour", "distance", "temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib",
]  # fmt: skip
FEATURES = [*NUMBERS, "carrier", "origin", "dest"]


def _flights() -> pd.DataFrame:
    """The shipped flights with a key, a label and the month, without the delay that gives the label."""
    frame = pd.read_parquet(str(files("mlops_workbench.recipes") / "flights.parquet"))
    order = frame.groupby("month").cumcount().map("{:05}".format)
    frame["flight_id"] = frame["month"].map("2013-{:02}-".format) + order
    frame["late"] = (frame["arr_delay"] >= 15).astype(int)
    return frame[["flight_id", "month", *FEATURES, "late"]]


FLIGHTS = _flights()
SCHEMA = pandera.DataFrameSchema(
    {
        "flight_id": pandera.Column(str, unique=True),
        "hour": pandera.Column(int, pandera.Check.in_range(0, 24), coerce=True),
        "temp": pandera.Column(float, pandera.Check.in_range(-40, 130), nullable=True),
        "humid": pandera.Column(float, pandera.Check.in_range(0, 100), nullable=True),
        "origin": pandera.Column(str, pandera.Check.isin(["EWR", "JFK", "LGA"])),
        "late": pandera.Column(int, pandera.Check.isin([0, 1])),
    }
)


def month(*months: int) -> pd.DataFrame:
    """The flights of these months without the month itself."""
    chosen = FLIGHTS[FLIGHTS["month"].isin(months)]
    return chosen.drop(columns="month").reset_index(drop=True)


def judge(batch: pd.DataFrame, previous: pd.DataFrame | None, **more: object) -> ValidationReport:
    """The report on a batch under the usual settings."""
    arguments: dict[str, object] = {"schema": SCHEMA, "settings": DataSettings(), **more}
    return validate_batch(batch, previous=previous, key="flight_id", label="late", **arguments)  # type: ignore[arg-type]


def turn_labels(batch: pd.DataFrame, rows: int, seed: int = 0) -> tuple[pd.DataFrame, set[str]]:
    """The batch with so many labels turned round, and the keys of these rows."""
    chosen = np.random.default_rng(seed).permutation(len(batch))[:rows]
    turned = batch.copy()
    turned.loc[chosen, "late"] = 1 - turned.loc[chosen, "late"]
    return turned, set(batch["flight_id"].iloc[chosen])


# labels


def quick(always: Iterable[int], all_of_them: Iterable[int]) -> list[Any]:
    """Parameters of which only some belong to the quick suite."""
    chosen = set(always)
    return [n if n in chosen else pytest.param(n, marks=pytest.mark.slow) for n in all_of_them]


@pytest.mark.parametrize("number", quick([2, 7, 12], range(2, 13)))
def test_a_clean_month_is_accepted(number: int) -> None:
    report = judge(month(number), month(*range(1, number)), separate=True)
    assert report.verdict == "accept", [problem.line() for problem in report.problems]
    assert report.held == () and report.distributions is not None


def _false_refusals(accepted: int, months: range) -> list[str]:
    """What the checks of columns refuse of honest months and half months, also after a gap."""
    before, found = month(*range(1, accepted + 1)), []
    for number in months:
        whole = month(number)
        for batch in (whole, whole[:1000], whole[1000:].reset_index(drop=True)):
            more = check_consistency(batch, before, "flight_id", "late")
            found += [f"{accepted} {number}: {p.line()}" for p in more if p.severity == "refuse"]
    return found


def test_june_after_april_and_its_halves_are_no_other_unit() -> None:
    assert _false_refusals(4, range(6, 8)) == []


@pytest.mark.slow
@pytest.mark.parametrize("accepted", range(1, 12))
def test_no_honest_batch_after_any_gap_is_refused_for_its_columns(accepted: int) -> None:
    assert _false_refusals(accepted, range(accepted + 1, 13)) == []


def test_june_with_a_thousand_wrong_labels_is_refused_and_the_rows_are_named() -> None:
    figures = []
    for seed in range(3):
        turned, wrong = turn_labels(month(6), 1000, seed)
        report = judge(turned, month(1, 2, 3, 4, 5), features=FEATURES)
        assert report.verdict == "refuse"
        (problem,) = report.refused
        assert problem.column == "late" and abs(problem.count - 1000) < 200
        named = list(report.suspicious["key"])
        hits = len(wrong & set(named))
        assert report.labels is not None
        promised = report.labels.report.promised
        best = len(wrong & set(named[:200])) / 200
        figures.append((hits / len(named), hits / len(wrong), promised, best))
    precision, recall, promised, best = np.mean(figures, axis=0)
    assert precision > 0.65 and recall > 0.5, figures
    assert abs(promised - precision) < 0.08, "what it promises is what it keeps"
    assert best > precision + 0.05, "the ranking means something"


@pytest.mark.parametrize("number", quick([7], [4, 5, 7, 9, 12]))
def test_wrong_labels_of_other_months_are_refused_too(number: int) -> None:
    turned, _ = turn_labels(month(number), 1000, seed=number)
    assert judge(turned, month(*range(1, number))).verdict == "refuse"


def test_labels_that_all_became_late_are_refused() -> None:
    assert judge(month(6).assign(late=1), month(1, 2, 3, 4, 5)).verdict == "refuse"


def test_a_few_wrong_labels_do_not_refuse_a_batch() -> None:
    turned, _ = turn_labels(month(6), 60)
    assert judge(turned, month(1, 2, 3, 4, 5)).verdict == "accept"


def test_a_column_that_contradicts_the_label_names_the_rows_exactly() -> None:
    frame = pd.read_parquet(str(files("mlops_workbench.recipes") / "flights.parquet"))
    delays = frame.loc[frame["month"] == 6, "arr_delay"].to_numpy()
    before = frame.loc[frame["month"] < 6, "arr_delay"].to_numpy()
    turned, wrong = turn_labels(month(6).assign(arr_delay=delays), 1000)
    report = judge(turned, month(1, 2, 3, 4, 5).assign(arr_delay=before), features=FEATURES)
    assert report.verdict == "refuse"
    named = set(report.suspicious["key"])
    assert len(named & wrong) / len(named) > 0.99 and len(named & wrong) / len(wrong) > 0.99


def test_digits_whose_labels_are_off_by_one_are_found() -> None:
    pictures, digits = load_digits(return_X_y=True)
    aucs = []
    for seed in range(3):
        chosen = np.random.default_rng(seed).permutation(len(digits))[:900]
        frame = pd.DataFrame(
            {
                "key": chosen,
                "image": list(pictures[chosen].reshape(-1, 8, 8)),
                "digit": digits[chosen],
            }
        )
        accepted, batch = frame[:600], frame[600:].reset_index(drop=True)
        arguments = {"features": ["image"], "label": "digit", "key": "key"}
        assert check_labels(batch, accepted, **arguments).fits  # type: ignore[arg-type]
        off = batch.assign(digit=(batch["digit"] + 1) % 10)
        both = pd.concat([batch[:150], off[150:]], ignore_index=True)
        check = check_labels(both, accepted, **arguments)  # type: ignore[arg-type]
        assert not check.fits
        ranked = check.report.rows
        aucs.append(roc_auc_score(ranked["key"].isin(batch["key"][150:]), ranked["wrong"]))
        assert not check_labels(off, accepted, **arguments).fits  # type: ignore[arg-type]
    assert min(aucs) >= 0.99, aucs


def test_rare_wrong_labels_come_with_an_honest_interval() -> None:
    pictures, digits = load_digits(return_X_y=True)
    covered, empty = 0, 0
    for seed in range(3):
        numbers = np.random.default_rng(seed)
        chosen = numbers.permutation(len(digits))[:1000]
        frame = pd.DataFrame(
            {
                "key": chosen,
                "image": list(pictures[chosen].reshape(-1, 8, 8)),
                "digit": digits[chosen],
            }
        )
        arguments = {"features": ["image"], "label": "digit", "key": "key"}
        clean = suspicious_labels(frame, **arguments)  # type: ignore[arg-type]
        empty += clean.interval[0] == 0.0 and len(clean.flagged) <= 5
        frame.loc[numbers.permutation(1000)[:15], "digit"] += 1
        frame["digit"] %= 10
        report = suspicious_labels(frame, **arguments)  # type: ignore[arg-type]
        covered += report.interval[0] <= 15 <= report.interval[1]
    assert (covered, empty) == (3, 3)


def test_labels_are_judged_the_same_way_every_time() -> None:
    first, second = (judge(month(4), month(1, 2, 3)).summary() for _ in range(2))
    assert first == second


# columns: a planted fault, the column it must name


def _swap(frame: pd.DataFrame, left: str, right: str) -> pd.DataFrame:
    return frame.assign(**{left: frame[right], right: frame[left]})


FAULTS: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "a value out of the schema's range": (lambda f: f.assign(humid=f.humid.where(f.index != 3, 300.0)), "humid"),
    "a negative hour": (lambda f: f.assign(hour=f.hour.where(f.index != 3, -1)), "hour"),
    "another unit": (lambda f: f.assign(distance=f.distance * 1609.34), "distance"),
    "a factor of a thousand": (lambda f: f.assign(pressure=f.pressure * 1000), "pressure"),
    "pascal": (lambda f: f.assign(pressure=f.pressure * 100), "pressure"),
    "kelvin": (lambda f: f.assign(temp=(f.temp - 32) / 1.8 + 273.15), "temp"),
    "missing values": (lambda f: f.assign(temp=f.temp.where(f.index % 3 > 0)), "temp"),
    "a column that is empty": (lambda f: f.assign(wind_speed=np.nan), "wind_speed"),
    "a column that is gone": (lambda f: f.drop(columns="visib"), "visib"),
    "a column of the schema that is gone": (lambda f: f.drop(columns="temp"), "temp"),
    "a renamed column": (lambda f: f.rename(columns={"precip": "rain"}), "precip"),
    "the label is gone": (lambda f: f.drop(columns="late"), "late"),
    "the key is gone": (lambda f: f.drop(columns="flight_id"), "flight_id"),
    "numbers as text": (lambda f: f.assign(distance=f.distance.map("{} miles".format)), "distance"),
    "decimal commas": (lambda f: f.assign(dewp=f.dewp.map(lambda v: str(v).replace(".", ","))), "dewp"),
    "text as numbers": (lambda f: f.assign(carrier=f.carrier.str.len()), "carrier"),
    "new categories": (lambda f: f.assign(carrier=f.carrier.str.lower()), "carrier"),
    "a category of the schema": (lambda f: f.assign(origin=f.origin.replace("JFK", "jfk")), "origin"),
    "spaces around text": (lambda f: f.assign(dest=" " + f.dest), "dest"),
    "a wrong encoding": (lambda f: f.assign(dest=f.dest.replace({"ATL": "ÃTL", "ORD": "Ã–RD", "LAX": "LÃX", "BOS": "BÃS", "MCO": "MÃO", "CLT": "CÃT"})), "dest"),
    "doubled rows": (lambda f: pd.concat([f, f[:5]], ignore_index=True), "flight_id"),
    "missing keys": (lambda f: f.assign(flight_id=f.flight_id.where(f.index != 7)), "flight_id"),
    "labels of another code": (lambda f: f.assign(late=f.late + 1), "late"),
    "missing labels": (lambda f: f.assign(late=f.late.astype(object).where(f.index % 2 > 0, None)), "late"),
    "shifted columns": (lambda f: _swap(f, "distance", "pressure").assign(pressure=f.distance * 1.0), "distance"),
    "swapped columns": (lambda f: _swap(f, "carrier", "dest"), "carrier"),
    "infinite values": (lambda f: f.assign(wind_speed=np.inf), "wind_speed"),
    "a sentinel for missing values": (lambda f: f.assign(visib=f.visib.where(f.index % 4 > 0, -9999.0)), "visib"),
    "mojibake": (lambda f: f.assign(dest=f.dest.where(f.index % 100 > 0, "ZÃ¼rich")), "dest"),
    "a few values in lower case": (lambda f: f.assign(carrier=f.carrier.where(f.index % 50 > 0, f.carrier.str.lower())), "carrier"),
    "a few values with blanks": (lambda f: f.assign(dest=f.dest.where(f.index % 50 > 0, f.dest + " ")), "dest"),
    "dates in another form": (lambda f: f.assign(flight_id=f.flight_id.str.replace(r"(\d{4})-(\d\d)-", r"\2/\1/", regex=True)), "flight_id"),
    "a stuck sensor": (lambda f: f.assign(temp=68.0), "temp"),
    "a constant category": (lambda f: f.assign(origin="JFK"), "origin"),
    "a turned sign": (lambda f: f.assign(distance=-f.distance), "distance"),
    "ten times as much": (lambda f: f.assign(wind_speed=f.wind_speed * 10), "wind_speed"),
    "a tenth": (lambda f: f.assign(distance=f.distance / 10), "distance"),
    "kilometres in range": (lambda f: f.assign(distance=f.distance * 1.609344), "distance"),
    "swapped columns of one kind": (lambda f: _swap(f, "temp", "dewp"), "temp"),
    "Celsius in one of two columns": (lambda f: f.assign(temp=(f.temp - 32) / 1.8), "temp"),
    "a column shifted against the rows": (lambda f: f.assign(dewp=f.dewp.sample(frac=1, random_state=0).to_numpy()), "temp"),
    "turned labels": (lambda f: f.assign(late=1 - f.late), "late"),
    "shuffled labels": (lambda f: f.assign(late=f.late.sample(frac=1, random_state=0).to_numpy()), "late"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_refused_by_column(fault: str) -> None:
    change, column = FAULTS[fault]
    report = judge(change(month(6)), month(1, 2, 3, 4, 5))
    assert report.verdict == "refuse", fault
    assert column in {problem.column for problem in report.refused}, report.problems
    for problem in report.refused:
        assert problem.count > 0 and problem.rule and len(problem.examples) <= 10
    json.dumps(report.summary(), allow_nan=False)
    report._repr_html_()


def test_row_findings_name_their_keys() -> None:
    batch = month(6)
    hot = batch.assign(temp=batch["temp"].where(~batch.index.isin([11, 5, 1999]), 200.0))
    (problem,) = judge(hot, None).refused
    assert (problem.column, problem.count) == ("temp", 3)
    assert list(problem.examples) == list(batch["flight_id"].iloc[[5, 11, 1999]])


def test_all_findings_come_at_once() -> None:
    batch = month(6)
    worse = batch.assign(hour=-1, humid=200.0, late=7, pressure=np.nan, carrier="??")
    report = judge(pd.concat([worse, worse[:1]]), month(1, 2, 3, 4, 5))
    columns = {problem.column for problem in report.refused}
    assert columns >= {"hour", "humid", "late", "pressure", "carrier", "flight_id"}
    assert any("labels were not checked" in note for note in report.notes)


def test_small_and_first_batches_say_what_they_cannot_tell() -> None:
    few = judge(month(6)[:3], month(1, 2, 3, 4, 5))
    assert few.verdict == "accept" and "3 rows: too few" in few.notes[0]
    assert judge(month(6)[:20], month(1, 2, 3, 4, 5)).notes == ()
    early = judge(month(6), month(1)[:100])
    assert early.verdict == "accept" and "200 rows" in early.notes[0]
    first = judge(month(1), None)
    assert first.verdict == "accept" and first.labels is not None
    numeric = judge(month(6).assign(late=month(6)["temp"]), None, schema=None)
    assert "classes" in numeric.notes[0]


# in the store


NAMES = {"key": "flight_id", "label": "late"}


def take(
    store: DataStore, rows: pd.DataFrame, *, parent: str | None = None, force: bool = False
) -> Intake:
    """Judge rows that are to stand in place of a version (none: the newest), and take in what is good."""
    base = store.resolve(parent) if parent is not None else store.latest("flights")
    delivery = deliver(store, base, rows, NAMES["key"])
    report = intake.judge(store, delivery, schema=SCHEMA, features=FEATURES, **NAMES)
    return take_in(
        store,
        "flights",
        delivery,
        report,
        by={"actor": "tester"},
        force=force,
        parent=base.ref if base is not None else None,
        **NAMES,
    )


def test_a_refused_batch_makes_no_version_and_force_stays_on_record(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    accepted = month(1, 2, 3, 4, 5)
    first = take(store, accepted).version
    assert first is not None and first.validation["verdict"] == "accept" and not first.forced
    turned, wrong = turn_labels(month(6), 1000)
    both = pd.concat([accepted, turned], ignore_index=True)
    refused = take(store, both)
    assert refused.verdict == "refused" and refused.version is None
    assert refused.report is not None
    assert re.search("late: .* look wrong", words(refused.report))
    assert refused.report.rows == 2000, "only the new rows are judged"
    named = set(refused.report.suspicious["key"])
    assert len(named & wrong) / len(named) > 0.65
    assert [version.ref for version in store.versions()] == ["flights@v1.0"]
    said = Ledger(store.workspace.ledger_url).decisions()
    assert [decision.verdict for decision in said] == ["refused"]
    forced = take(store, both, force=True)
    assert forced.verdict == "forced" and forced.version is not None
    assert forced.version.forced and forced.version.validation["verdict"] == "refuse"
    assert store.resolve("flights").forced
    six = pd.concat([accepted, month(6)], ignore_index=True)
    good = take(store, six, parent="flights@v1.0").version
    assert good is not None
    assert (good.ref, good.forced, good.parent) == ("flights@v1.2", False, "flights@v1.0")
    assert store.diff("flights@v1.1", "flights@v1.2").counts["relabelled"] == 1000


def test_relabelled_rows_are_judged_like_new_ones(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    accepted = month(1, 2, 3, 4, 5)
    take(store, accepted)
    scrambled = accepted.copy()
    scrambled.loc[4000:4999, "late"] = 1 - scrambled.loc[4000:4999, "late"]
    refused = take(store, scrambled)
    assert refused.verdict == "refused"
    assert refused.report is not None and refused.report.rows == 1000


def test_rows_that_only_go_away_are_not_judged(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    take(store, month(1, 2))
    fewer = take(store, month(1))
    assert fewer.report is None and fewer.version is not None
    assert fewer.version.rows == 2000 and fewer.version.validation == {}


def test_the_command_line_refuses_with_exit_code_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store: DataStore = new_store(tmp_path)
    here = ["-w", str(store.root)]
    month(1, 2).to_parquet(tmp_path / "first.parquet")
    turned, _ = turn_labels(month(3), 1000)
    turned.to_parquet(tmp_path / "march.parquet")
    names = ["--key", "flight_id", "--label", "late"]
    assert (
        main(["data", "snapshot", "own", "--from", str(tmp_path / "first.parquet"), *names, *here])
        == 0
    )
    capsys.readouterr()
    bad = ["data", "snapshot", "own", "--append", "--from", str(tmp_path / "march.parquet"), *here]
    assert main([*bad, "--json"]) == 4
    output = capsys.readouterr()
    assert json.loads(output.out)["verdict"] == "refuse"
    assert "look wrong" in output.err and "--force" in output.err
    assert main([*bad, "--force"]) == 0
    assert "own@v1.1  forced" in capsys.readouterr().out
    assert main(["data", "list", "--json", *here]) == 0
    assert [row["forced"] for row in json.loads(capsys.readouterr().out)] == [False, True]


# held back


def test_few_bad_rows_wait_in_quarantine_and_the_rest_goes_on(tmp_path: Path) -> None:
    store, accepted, batch = new_store(tmp_path), month(1, 2, 3), month(4)
    names = {"key": "flight_id", "label": "late"}
    store.snapshot("flights", accepted, **names)
    bad = batch.copy()
    bad.loc[[3, 700], "humid"] = 300.0
    bad.loc[11, "origin"] = "jfk"
    report = judge(bad, accepted, separate=True)
    assert (report.verdict, report.held) == ("quarantine", (3, 11, 700))
    assert judge(bad, accepted).verdict == "refuse", (
        "a caller who cannot hold rows back gets no such verdict"
    )
    clean, held = split_batch(bad, report, source="april", **names)
    joined = pd.concat([accepted, clean], ignore_index=True)
    store.snapshot("flights", joined, **names)
    version = hold_rows(store, "flights", held, key="flight_id")
    assert version is not None and (version.ref, version.rows) == ("flights.quarantine@v1.0", 3)
    waiting = review_list(store, "flights")
    assert [row["id"] for row in waiting] == list(batch["flight_id"].iloc[[3, 11, 700]])
    assert "humid" in waiting[0]["reason"] and waiting[0]["values"]["humid"] == 300.0
    done = review_rows(
        store, "flights", accept=[waiting[1]["id"]], reject=[waiting[0]["id"]], actor="a person"
    )
    assert (done.version, done.waiting) == ("flights@v1.2", 1)
    assert store.resolve("flights").rows == 6000 + 1997 + 1
    difference = store.diff("flights@v1.1", "flights@v1.2")
    assert list(difference.added["flight_id"]) == [waiting[1]["id"]]
    ledger = Ledger(store.workspace.ledger_url)
    (decision,) = ledger.decisions(kind="review")
    assert decision.actor == "a person" and decision.subject == "flights@v1.2"
    assert ledger.verify().ok


def test_many_bad_rows_refuse_the_batch() -> None:
    bad = month(4)
    bad.loc[bad.index % 8 == 0, "humid"] = 300.0
    report = judge(bad, month(1, 2, 3), separate=True)
    assert (report.verdict, report.held) == ("refuse", ())


def test_half_the_labels_turned_refuse_the_batch_also_where_rows_can_be_held() -> None:
    turned, _ = turn_labels(month(6), 1000)
    report = judge(turned, month(1, 2, 3, 4, 5), features=FEATURES, separate=True)
    assert report.verdict == "refuse" and len(report.suspicious) > 300


def _digits(seed: int) -> pd.DataFrame:
    pictures, digits = load_digits(return_X_y=True)
    chosen = np.random.default_rng(seed).permutation(len(digits))[:1600]
    images = list(pictures[chosen].reshape(-1, 8, 8))
    return pd.DataFrame({"key": chosen, "image": images, "digit": digits[chosen]})


def test_fifteen_wrong_labels_of_a_thousand_digits_are_held_back_and_hardly_any_other() -> None:
    hits, others, covered = 0, 0, 0
    for seed in range(3):
        frame = _digits(seed)
        accepted, batch = frame[:600], frame[600:].reset_index(drop=True)
        off = batch.copy()
        off.loc[:14, "digit"] = (off.loc[:14, "digit"] + 1) % 10
        names = {"schema": None, "key": "key", "label": "digit", "settings": DataSettings()}
        report = validate_batch(off, previous=accepted, separate=True, **names)
        assert report.verdict == "quarantine" and report.labels is not None
        hits += sum(place < 15 for place in report.held)
        others += sum(place >= 15 for place in report.held)
        low, high = report.labels.report.interval
        covered += low <= 15 <= high
        classes = report.labels.report.classes
        assert abs(classes["wrong"].sum() - report.labels.report.estimated_wrong) < 0.1
        assert ((classes["low"] <= classes["wrong"]) & (classes["wrong"] <= classes["high"])).all()
    assert hits >= 25 and covered == 3 and others <= 15, (hits, others, covered)
    clean = validate_batch(batch, previous=accepted, separate=True, **names)
    assert clean.verdict != "refuse" and len(clean.held) <= 5, (
        "a few in a thousand may be looked at"
    )


def test_fifteen_wrong_labels_of_a_thousand_flights_are_not_cried_about() -> None:
    """The columns hardly tell whether a flight is late: then the report must say so."""
    turned, _ = turn_labels(month(7)[:1000], 15)
    report = judge(turned, month(*range(1, 7)), features=FEATURES, separate=True)
    assert report.verdict == "accept" and report.labels is not None
    low, high = report.labels.report.interval
    assert low == 0 and high >= 15 and "95 %: 0 to" in report.labels.report.text()


# a proposed schema, a file that was cut off


def test_a_schema_proposed_from_a_quarter_lets_the_other_months_pass_and_finds_faults() -> None:
    quarter = month(1, 2, 3)
    schema = build_schema(infer_rules(quarter, key="flight_id", label="late"))
    false = {
        n: [p.line() for p in check_schema(month(n), schema, "flight_id")] for n in range(4, 13)
    }
    assert sum(bool(lines) for lines in false.values()) == 0, false
    june, caught = month(6), 0
    names = ("pascal", "a turned sign", "new categories", "spaces around text", "labels of another code",
             "a column that is empty", "doubled rows", "missing keys", "numbers as text", "a negative hour")  # fmt: skip
    for name in names:
        change, column = FAULTS[name]
        found = {problem.column for problem in check_schema(change(june), schema, "flight_id")}
        caught += column in found
    assert caught == len(names), caught


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    text = month(2).to_csv(index=False)
    (tmp_path / "whole.csv").write_text(text)
    assert len(read_file(tmp_path, "whole.csv")) == 2000
    (tmp_path / "cut.csv").write_text(text[: len(text) // 2 - 3].rsplit(",", 2)[0])
    with pytest.raises(DataError, match="cut off"):
        read_file(tmp_path, "cut.csv")
    month(2).to_parquet(tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cut off"):
        read_file(tmp_path, "cut.parquet")


def by_class(frame: pd.DataFrame) -> pd.DataFrame:
    """The same digits with keys that begin with the class, stored class by class."""
    names = np.array(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    )
    keys = names[frame["label"].to_numpy()] + "/" + frame["picture_id"] + ".png"
    return frame.assign(picture_id=keys).sort_values("picture_id", ignore_index=True)


def judge_digits(batch: pd.DataFrame, previous: pd.DataFrame) -> ValidationReport:
    """What the checks say of pictures, single bad ones apart."""
    how = {"key": "picture_id", "label": "label", "separate": True, "schema": None}
    return validate_batch(batch, previous=previous, settings=DataSettings(), **how)  # type: ignore[arg-type]


def test_labels_of_a_table_stored_class_by_class_are_judged_as_well() -> None:
    rows = pictures.digits.source("all").sample(frac=1, random_state=4, ignore_index=True)
    accepted, batch = by_class(rows[:900]), by_class(rows[900:1200])
    assert judge_digits(batch, accepted).verdict == "accept"
    shifted = by_class(rows[900:1200]).assign(label=lambda frame: (frame["label"] + 1) % 10)
    report = judge_digits(shifted, accepted)
    assert report.verdict == "refuse" and "look wrong" in report.refused[0].text
    few = batch.copy()
    few.loc[[3, 150, 290], "label"] = (few.loc[[3, 150, 290], "label"] + 1) % 10
    held = judge_digits(few, accepted)
    assert held.verdict == "quarantine" and set(held.held) >= {3, 150, 290} and len(held.held) <= 5


def test_a_picture_that_is_there_already_waits_when_its_label_is_another() -> None:
    rows = pictures.digits.source("all").sample(frac=1, random_state=5, ignore_index=True)
    accepted, batch = by_class(rows[:900]), by_class(rows[900:1100])
    again = accepted[:6].assign(picture_id=[f"moved/{n}.png" for n in range(6)])
    again.loc[:2, "label"] = (again.loc[:2, "label"] + 1) % 10
    report = judge_digits(pd.concat([batch, again], ignore_index=True), accepted)
    told = {problem.severity: problem for problem in report.problems if problem.column == "image"}
    assert told["quarantine"].examples == ("moved/0.png", "moved/1.png", "moved/2.png")
    assert "under another key and label" in told["quarantine"].text
    assert told["remark"].rows == (203, 204, 205)


def test_running_keys_may_grow_longer_and_rows_without_a_label_wait() -> None:
    generator = np.random.default_rng(0)

    def customers(first: int, count: int) -> pd.DataFrame:
        size = generator.normal(size=count)
        keys = [f"c{number}" for number in range(first, first + count)]
        return pd.DataFrame({"id": keys, "size": size, "lost": (size > 0).astype(int)})

    accepted, batch = customers(0, 1000), customers(1000, 200)
    how = {"key": "id", "label": "lost", "separate": True, "schema": None}
    assert (
        validate_batch(batch, previous=accepted, settings=DataSettings(), **how).verdict == "accept"
    )  # type: ignore[arg-type]
    gaps = batch.astype({"lost": float})
    gaps.loc[[5, 9], "lost"] = np.nan
    report = validate_batch(gaps, previous=accepted, settings=DataSettings(), **how)  # type: ignore[arg-type]
    assert report.verdict == "quarantine" and report.held == (5, 9)
    assert "2 rows without a label" in [problem.text for problem in report.problems]
    assert not [p for p in report.problems if p.column == "lost" and p.severity == "remark"]

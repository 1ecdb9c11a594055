"""Rows from strangers and columns of tables: one encoding, one kind of error."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlops_workbench.core.features import Feature, FeatureError, FeatureSchema

SCHEMA = FeatureSchema(
    features=(
        Feature(name="temp", kind="number"),
        Feature(name="distance", kind="number", nullable=False, minimum=0, maximum=5000),
        Feature(name="carrier", kind="category", categories=("AA", "UA", "7")),
        Feature(name="origin", kind="category", categories=("EWR", "JFK"), nullable=False),
        Feature(name="picture", kind="image", shape=(2, 3), maximum=16),
    ),
    classes=("on time", "late"),
    label="late",
    key="flight_id",
    entity="tail_number",
)
NAMES = [feature.name for feature in SCHEMA.features]

ANY_NUMBER = st.integers() | st.floats() | st.integers(10**300, 10**320)
ANYTHING = st.recursive(
    st.none() | st.booleans() | ANY_NUMBER | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PICTURE = st.lists(
    st.lists(st.integers(0, 16) | st.floats(0, 16), min_size=3, max_size=3), min_size=2, max_size=2
)
NUMBER = st.integers(-(10**30), 10**30) | st.floats(-1e38, 1e38)
GOOD_ROW = st.fixed_dictionaries(
    {
        "distance": NUMBER,
        "origin": st.sampled_from(["EWR", "JFK", "LGA", "", 5]),
        "picture": PICTURE,
    },
    optional={
        "temp": st.none() | NUMBER,
        "carrier": st.none() | st.sampled_from(["AA", "UA", "7", 7, "?", "\ud800", 10**30]),
        "flight_id": st.text(),
    },
)
ALMOST_ROW = st.builds(
    lambda row, name, value: {**row, name: value},
    GOOD_ROW,
    st.sampled_from(NAMES),
    ANYTHING | st.lists(ANYTHING, min_size=2, max_size=6),
)


@given(rows=ANYTHING | st.lists(ANYTHING | ALMOST_ROW, max_size=4), strict=st.booleans())
@example(rows=[{"temp": 10**5000}], strict=False)
@example(rows=[{"distance": 1, "carrier": 10**5000, "origin": "JFK"}], strict=False)
@example(rows=[{"distance": 1, "origin": "JFK", "picture": [[[0]] * 3] * 2}], strict=False)
@settings(max_examples=500, deadline=None)
def test_arbitrary_json_raises_nothing_but_feature_errors(rows: Any, strict: bool) -> None:
    try:
        arrays = SCHEMA.encode_rows(rows, strict=strict)
    except FeatureError as error:
        assert error.exit_code == 2 and len(str(error)) < 1000
        if error.row is not None:
            assert 0 <= error.row < len(rows) and f"row {error.row}" in str(error)
        return
    assert set(arrays) == set(SCHEMA.inputs)
    assert arrays["numbers"].shape == (len(rows), 2) and arrays["numbers"].dtype == np.float32
    assert not np.isinf(arrays["numbers"]).any() and not np.isnan(arrays["numbers"][:, 1]).any()
    assert arrays["categories"].dtype == np.int64
    assert (arrays["categories"] >= 0).all() and (arrays["categories"] <= 3).all()
    image = arrays["image"]
    assert image.shape == (len(rows), 2, 3) and image.dtype == np.float32
    assert ((image >= 0) & (image <= 1)).all()


def as_columns(rows: list[dict[str, Any]], form: str) -> Any:
    """The rows as columns in one of the forms that tables come in."""
    lists = {name: [row.get(name) for row in rows] for name in NAMES}
    if form == "lists":
        return lists
    if form == "frame":
        return pd.DataFrame(
            {name: pd.Series(values, dtype=object) for name, values in lists.items()}
        )
    columns: dict[str, Any] = {}
    for name, values in lists.items():
        if name in ("temp", "distance"):
            numbers = [math.nan if value is None else float(value) for value in values]
            columns[name] = np.array(numbers, dtype=np.float64)
        elif name == "picture":
            flat = np.array(values, dtype=np.float64).reshape(len(rows), 6)
            columns[name] = flat if form == "flat" else list(flat)
        else:
            columns[name] = np.array(values, dtype=object)
    return columns


@given(
    rows=st.lists(GOOD_ROW, max_size=6),
    form=st.sampled_from(["lists", "frame", "arrays", "flat"]),
)
@settings(max_examples=500, deadline=None)
def test_rows_and_columns_become_identical_arrays(rows: Any, form: str) -> None:
    from_rows = SCHEMA.encode_rows(rows)
    from_columns = SCHEMA.encode_columns(as_columns(rows, form))
    assert from_rows.keys() == from_columns.keys()
    for name, array in from_rows.items():
        other = from_columns[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape)
        assert array.tobytes() == other.tobytes(), name


@given(rows=st.lists(GOOD_ROW, min_size=2, max_size=6))
@settings(max_examples=200, deadline=None)
def test_a_row_is_encoded_alike_alone_and_among_others(rows: Any) -> None:
    together = SCHEMA.encode_rows(rows)
    for number, row in enumerate(rows):
        for name, array in SCHEMA.encode_rows([row]).items():
            assert array[0].tobytes() == together[name][number].tobytes()


@given(row=GOOD_ROW)
@settings(max_examples=100, deadline=None)
def test_the_schema_survives_its_file(row: Any) -> None:
    again = FeatureSchema.model_validate_json(SCHEMA.model_dump_json())
    assert again == SCHEMA
    for name, array in again.encode_rows([row]).items():
        assert array.tobytes() == SCHEMA.encode_rows([row])[name].tobytes()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"temp": "39"}, "temp"),
        ({"temp": True}, "temp"),
        ({"temp": math.nan}, "temp"),
        ({"temp": math.inf}, "temp"),
        ({"temp": 1e39}, "temp"),
        ({"distance": None}, "distance"),
        ({"carrier": 1.5}, "carrier"),
        ({"carrier": False}, "carrier"),
        ({"carrier": ["AA"]}, "carrier"),
        ({"origin": None}, "origin"),
        ({"picture": None}, "picture"),
        ({"picture": [[1, 2, 3]]}, "picture"),
        ({"picture": [[1, 2, 3], [4, 5]]}, "picture"),
        ({"picture": [[1, 2, 3], [4, 5, 17]]}, "picture"),
        ({"picture": [[1, 2, 3], [4, 5, "6"]]}, "picture"),
        ({"picture": [[1, 2, 3], [4, 5, True]]}, "picture"),
        ({"picture": [[1, 2, 3], [4, 5, math.nan]]}, "picture"),
        ({"picture": np.zeros((3, 2))}, "picture"),
    ],
)
def test_the_field_and_the_row_are_named(change: dict[str, Any], field: str) -> None:
    good = {"temp": 1.5, "distance": 1, "origin": "JFK", "picture": [[0, 1, 2], [3, 4, 16]]}
    SCHEMA.encode_rows([good])
    with pytest.raises(FeatureError) as caught:
        SCHEMA.encode_rows([good, {**good, **change}])
    assert (caught.value.field, caught.value.row) == (field, 1)
    assert f"{field!r} of row 1" in str(caught.value)


def test_unknown_fields_are_ignored_unless_strict() -> None:
    row = {"distance": 1, "origin": "JFK", "picture": [0] * 6, "tmep": 3, "flight_id": "x"}
    SCHEMA.encode_rows([row])
    with pytest.raises(FeatureError) as caught:
        SCHEMA.encode_rows([row], strict=True)
    assert (caught.value.field, caught.value.row) == ("tmep", 0)
    del row["tmep"]
    SCHEMA.encode_rows([row], strict=True)


def test_the_ways_in_which_pandas_writes_missing_values() -> None:
    frame = pd.DataFrame(
        {
            "temp": pd.array([1.5, None, 3], dtype="Float64"),
            "distance": pd.array([1, 2, 3], dtype="Int64"),
            "carrier": pd.Series(["AA", None, "?"], dtype="category"),
            "origin": pd.array(["EWR", "JFK", "LGA"], dtype="string"),
            "picture": [np.zeros(6, dtype=np.uint8), [[1, 2, 3], [4, 5, 6]], np.full((2, 3), 16.0)],
        }
    )
    arrays = SCHEMA.encode_columns(frame)
    assert np.isnan(arrays["numbers"][:, 0]).tolist() == [False, True, False]
    assert arrays["categories"].tolist() == [[1, 1], [0, 2], [0, 0]]
    assert (
        arrays["image"][1].tolist()
        == (np.arange(1, 7, dtype=np.float32) / 16).reshape(2, 3).tolist()
    )
    frame["origin"] = pd.array(["EWR", None, "LGA"], dtype="string")
    with pytest.raises(FeatureError) as caught:
        SCHEMA.encode_columns(frame)
    assert (caught.value.field, caught.value.row) == ("origin", 1)
    with pytest.raises(FeatureError, match="distance"):
        SCHEMA.encode_columns(frame.drop(columns="distance"))


def test_boolean_columns_are_no_numbers() -> None:
    columns = {
        "temp": np.array([True, False]),
        "distance": [1, 2],
        "carrier": ["AA"] * 2,
        "origin": ["EWR"] * 2,
        "picture": np.zeros((2, 6)),
    }
    with pytest.raises(FeatureError) as caught:
        SCHEMA.encode_columns(columns)
    assert caught.value.field == "temp"

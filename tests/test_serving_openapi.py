"""All that the server's OpenAPI document allows, and much that it does not: never a 5xx, never an answer it does not foresee."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from serving_support import SCHEMA, RunningServer, build_bundle, logged, serving_bundle

from mlops_workbench.serving.openapi import openapi_document
from mlops_workbench.serving.routes import ROUTES

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
EXAMPLES = 40  # an operation and a way to ask


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A ready server of a small release."""
    folder = tmp_path_factory.mktemp("openapi")
    with serving_bundle(folder, build_bundle(folder)) as running:
        yield running


def test_the_document_names_every_route_and_nothing_else(server: RunningServer) -> None:
    document = server.client().get("/openapi.json").body
    assert document == json.loads(json.dumps(openapi_document(ROUTES)))
    assert set(document["paths"]) == set(ROUTES)
    names = [
        operation["operationId"]
        for path in document["paths"].values()
        for operation in path.values()
    ]
    assert len(set(names)) == len(names)
    for path, route in ROUTES.items():
        assert ("security" in document["paths"][path][route.method.lower()]) != route.is_open, path


def published(document: dict[str, Any]) -> dict[str, Any]:
    """The document as it is, but for the token, which a server on loopback does not ask for."""
    found: dict[str, Any] = json.loads(json.dumps(document))
    for path in found["paths"].values():
        for operation in path.values():
            operation.pop("security", None)
    return found


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with names and types of this model in it, so that random requests get an answer."""
    found = published(document)
    known = {"name": ["flights"], "version": ["flights-r1"]}
    for path in found["paths"].values():
        for operation in path.values():
            operation.pop(
                "security", None
            )  # this server trusts whoever reaches its loopback address
            for parameter in operation["parameters"]:
                if parameter["in"] == "path":
                    parameter["schema"]["enum"] = known[parameter["name"]]
    kinds = {"number": ["number"], "category": ["string", "integer"]}
    columns = {
        feature.name: {"type": [*kinds[feature.kind], *(["null"] if feature.nullable else [])]}
        for feature in SCHEMA.features
    }
    row = {
        "type": "object",
        "properties": columns,
        "required": ["hour", "origin"],
        "additionalProperties": False,
    }
    alone = {
        "type": "object",
        "properties": {"row": row},
        "required": ["row"],
        "additionalProperties": False,
    }
    schemas = found["components"]["schemas"]
    schemas["PredictBody"] = alone
    records = {
        "type": "object",
        "properties": {"dataframe_records": {"type": "array", "items": row, "minItems": 1}},
        "required": ["dataframe_records"],
        "additionalProperties": False,
    }
    schemas["InvocationsBody"] = records
    tensor = {
        "type": "object",
        "properties": {
            "name": {"enum": ["hour", "temp"]},
            "shape": {"const": [1]},
            "datatype": {"const": "FP64"},
            "data": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 1},
        },
        "required": ["name", "shape", "datatype", "data"],
        "additionalProperties": False,
    }
    origin = {"name": "origin", "shape": [1], "datatype": "BYTES", "data": ["EWR"]}
    hour = {**origin, "name": "hour", "datatype": "FP64", "data": [17]}
    inputs = {
        "type": "array",
        "prefixItems": [{"const": origin}, {"const": hour}],
        "items": tensor,
        "minItems": 2,
        "maxItems": 3,
    }
    inferred = {
        "type": "object",
        "properties": {"inputs": inputs, "id": {"type": "string"}},
        "required": ["inputs"],
        "additionalProperties": False,
    }
    schemas["InferBody"] = inferred
    return found


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("form", "mode"),
    [
        (published, GenerationMode.POSITIVE),
        (narrowed, GenerationMode.POSITIVE),
        (narrowed, GenerationMode.NEGATIVE),
    ],
    ids=["allowed", "sensible", "wrong"],
)
def test_no_answer_is_undocumented_and_none_is_a_failure(
    server: RunningServer, form: Callable[[dict[str, Any]], dict[str, Any]], mode: GenerationMode
) -> None:
    address = f"http://127.0.0.1:{server.port}"
    document = form(httpx.get(f"{address}/openapi.json").json())
    schema = schemathesis.openapi.from_dict(document)
    schema.config.base_url = address
    seen: Counter[tuple[str, int]] = Counter()
    session = schemathesis_session()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.path_parameters):
            continue  # nothing in it can be wrong

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            answer = case.call(session=session)
            seen[case.operation.path, answer.status_code] += 1
            checks = (
                CHECKS if mode is GenerationMode.POSITIVE else [*CHECKS, negative_data_rejection]
            )
            case.validate_response(answer, checks=checks)

        ask()
    print(mode, dict(sorted(seen.items())))
    assert not [status for _, status in seen if status >= 500]
    answered = {path for path, status in seen if status == 200}
    refused = {path for path, status in seen if status == 422}
    assert answered == set(ROUTES) or (form, mode) != (narrowed, GenerationMode.POSITIVE)
    assert refused >= {"/predict", "/invocations", "/v2/models/{name}/infer"} or form is published
    assert b"Traceback" not in server.log.read_bytes()


def schemathesis_session() -> Any:
    """One keep-alive connection for all requests."""
    import requests

    return requests.Session()


def test_the_server_is_well_after_all_that(server: RunningServer) -> None:
    assert server.process.poll() is None
    assert server.client().get("/health").body["status"] == "ok"
    assert logged(server.log.parent / "predictions", "error")

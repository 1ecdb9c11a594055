"""Two thousand requests that nobody sensible sends: never a 5xx, and the server lives on."""

import json
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_support import ROW, RunningServer, build_bundle, logged, serving_bundle

REQUESTS = 2_000
MARKER = "RAW"  # stands in the JSON for a token that json.dumps cannot write

SCALARS: list[Callable[[random.Random], Any]] = [
    lambda r: None,
    lambda r: True,
    lambda r: r.randint(-(10**6), 10**6),
    lambda r: r.randint(-(10**40), 10**40),
    lambda r: 10 ** r.choice([18, 19, 20, 38, 39, 308, 309, 4000]),
    lambda r: r.uniform(-1e6, 1e6),
    lambda r: r.choice([1e38, 3.5e38, 1e308, -1e308, 5e-324, -0.0]),
    lambda r: r.choice(
        ["", "UA", "nan", "1e5", "a" * r.randint(1, 5000), "\x00", "\U0001f6eb", "é"]
    ),
    lambda r: "".join(chr(r.randrange(1, 0xD7FF)) for _ in range(r.randint(1, 30))),
    lambda r: f"{MARKER}{r.choice(RAW_TOKENS)}",
]
RAW_TOKENS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "01",
    "1.",
    "+1",
    "0x10",
    '"\\ud800"',
    '"\\u0000"',
    "'x'",
    "undefined",
    "9" * 5000,
    "0." + "1" * 3000,
    "[" * 3000 + "]" * 3000,
    "[" * 50_000,
    '{"a":' * 2000 + "1" + "}" * 2000,
]
PATHS = [
    "/predict",
    "/feedback",
    "/release",
    "/health",
    "/ready",
    "/metrics",
    "/",
    "/predict/",
    "//predict",
    "/predict?x=1&x=2",
    "/predict%00",
    "/../../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/static/..%5c..%5cwindows",
    "/" + "a" * 3000,
    "/\N{LATIN SMALL LETTER E WITH ACUTE}".encode().decode("latin-1"),
    "/predict;jsessionid=1",
    "/<script>",
]
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "post", "BREW"]
CONTENT_TYPES = [
    "application/json",
    "application/json; charset=utf-8",
    "APPLICATION/JSON",
    "application/json;charset=utf-16",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "",
    ";",
    "application/octet-stream",
    "\xff",
]
HEADERS = [
    ("Content-Encoding", "gzip"),
    ("Authorization", "Bearer \xff"),
    ("Authorization", "Basic " + "A" * 3000),
    ("Host", "rebound.example"),
    ("Host", "[::1"),
    ("Host", ""),
    ("Accept", "text/html"),
    ("Expect", "100-continue"),
    ("X-Forwarded-For", "8.8.8.8"),
    ("Cookie", "a=" + "b" * 4000),
    ("Range", "bytes=0-1"),
    ("Upgrade", "websocket"),
]


def any_value(random_: random.Random, depth: int = 3) -> Any:
    """Some JSON value."""
    kind = random_.random()
    if depth and kind < 0.12:
        return [any_value(random_, depth - 1) for _ in range(random_.randint(0, 4))]
    if depth and kind < 0.24:
        keys = [*ROW, "", "\x00", "__proto__", "x" * 300]
        return {
            random_.choice(keys): any_value(random_, depth - 1)
            for _ in range(random_.randint(0, 4))
        }
    return random_.choice(SCALARS)(random_)


def a_row(random_: random.Random) -> Any:
    """A row with none, some or all of its fields wrong."""
    if random_.random() < 0.05:
        return any_value(random_)
    row = dict(ROW)
    for _ in range(random_.choice([0, 1, 1, 2, 6])):
        name = random_.choice([*ROW, "unknown", ""])
        if random_.random() < 0.2:
            row.pop(name, None)
        else:
            row[name] = any_value(random_)
    return row


def a_body(random_: random.Random) -> Any:
    """A body that is nearly one the server takes, or not at all."""
    kind = random_.randrange(10)
    rows = [a_row(random_) for _ in range(random_.choice([0, 1, 2, 5, 100]))]
    if kind < 3:
        return {"row": a_row(random_)}
    if kind < 5:
        return {"rows": rows}
    if kind == 5:
        return {"rows": rows, "ids": any_value(random_)}
    if kind == 6:
        ids = [any_value(random_) for _ in rows]
        return {"rows": rows, "ids": ids, random_.choice(["id", "row", "x"]): any_value(random_)}
    if kind < 9:
        item = {"id": any_value(random_), "label": any_value(random_), "click": any_value(random_)}
        item.pop(random_.choice(list(item)))
        return {"feedback": [item, {"id": "a", "label": random_.choice(["late", "never", 1])}]}
    return any_value(random_)


def encode(value: Any, random_: random.Random) -> bytes:
    """JSON with raw tokens in it, now and then torn, flipped or padded."""
    import re

    text = json.dumps(value, ensure_ascii=random_.random() < 0.5)
    token = re.compile(f'"{MARKER}((?:[^"\\\\]|\\\\.)*)"')
    text = token.sub(lambda found: json.loads(f'"{found.group(1)}"'), text)
    body = text.encode("utf-8", "surrogatepass")
    kind = random_.random()
    if kind < 0.04 and body:
        body = body[: random_.randrange(len(body))]
    elif kind < 0.08 and body:
        changed = bytearray(body)
        changed[random_.randrange(len(changed))] = random_.randrange(256)
        body = bytes(changed)
    elif kind < 0.10:
        body = random_.randbytes(random_.choice([0, 1, 100, 100_000]))
    elif kind < 0.12:
        body = b"\xef\xbb\xbf" + body
    return body


def a_request(random_: random.Random) -> bytes:
    """One request as bytes on the wire."""
    wild = random_.random()
    path = random_.choice(["/predict", "/predict", "/feedback"])
    method, kind = "POST", "application/json"
    headers: list[tuple[str, str]] = []
    if wild < 0.25:
        path, method = random_.choice(PATHS), random_.choice(METHODS)
    if wild < 0.4:
        kind = random_.choice(CONTENT_TYPES)
        headers = random_.sample(HEADERS, random_.randint(0, 3))
    body = encode(a_body(random_), random_)
    if not any(name == "Host" for name, _ in headers):
        headers.append(("Host", "localhost"))
    lines = [f"{method} {path} HTTP/1.1", f"Content-Type: {kind}"]
    lines += [f"{name}: {value}" for name, value in headers]
    chunked = random_.random() < 0.1
    lines.append("Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}")
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    if not chunked:
        return head + body
    parts = [body[start : start + 7001] for start in range(0, len(body), 7001)]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"


def status_of(port: int, request: bytes, *, half_close: bool = False) -> int:
    """The status of the answer on a connection of its own; 0 when the server just hung up."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        try:
            connection.sendall(request)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            while b"\r\n" not in answer and (part := connection.recv(65536)):
                answer += part
                if answer.startswith(b"HTTP/1.1 100"):
                    answer = answer.partition(b"\r\n\r\n")[2]
        except OSError:
            return 0
    return int(answer.split()[1]) if answer else 0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    """A ready server of a small release."""
    with serving_bundle(tmp_path, build_bundle(tmp_path)) as running:
        yield running


def test_no_request_makes_the_server_fail(server: RunningServer, tmp_path: Path) -> None:
    random_ = random.Random(20130401)
    found: Counter[int] = Counter()
    for number in range(REQUESTS):
        request = a_request(random_)
        status = status_of(server.port, request)
        found[status] += 1
        assert status < 500, (number, status, request[:500])
    print("answers by status:", dict(sorted(found.items())))
    assert server.process.poll() is None
    client = server.client()
    assert client.post("/predict", {"row": ROW}).status == 200
    assert client.get("/health").body["status"] == "ok"
    assert b"Traceback" not in server.log.read_bytes()
    # the fuzz reaches every branch that it means to reach, and what was answered was logged
    assert {200, 400, 403, 404, 405, 415, 422} <= found.keys()
    assert found[200] > REQUESTS / 20
    assert found[0] < REQUESTS / 50
    assert logged(tmp_path / "predictions")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,  # TLS on a plain port
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /predict HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"\r\n" * 1000,
        b"A" * 100_000,
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    ],
)
def test_what_is_not_even_http(server: RunningServer, garbage: bytes) -> None:
    assert status_of(server.port, garbage, half_close=True) < 500
    assert server.client().post("/predict", {"row": ROW}).status == 200

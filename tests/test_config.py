"""What the process does with its configuration: it starts as told, or refuses in one line and listens to nothing."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import RouterFactory
from fake_upstream import FakeUpstream
from router_process import CONFIG, INBOUND_KEY, PROVIDER, PROVIDER_KEY, ROOT, RULES, RouterProcess, filled, free_port, until

SECRET = {
    "SECRET_KEY": PROVIDER_KEY,
    "EMPTY": "",
    "BLANK": " \n",
    "SPLIT": "sk-PROV\nIDER",
    "CYRILLIC": "ключ-key-1234",
}

# What is added to a configuration that works -> what its one line must contain.
REFUSED = {
    "an unknown key": ("server", 'hosst = "x"', ["config.toml.server.hosst", "did you mean host?"]),
    "an unknown section": ("rules", "[sever]\nport = 1", ["config.toml.sever", "did you mean server?"]),
    "a typo in telemetry": ("rules", "[telemetry]\nenabeld = true", ["config.toml.telemetry.enabeld", "enabled?"]),
    "a wrong type": ("server", 'threads = "64"', ["config.toml.server.threads"]),
    "a float for an int": ("server", "threads = 6.5", ["config.toml.server.threads"]),
    "a bool for an int": ("server", "threads = true", ["config.toml.server.threads"]),
    "a table for a value": ("rules", "[server.host]\na = 1", ["config.toml.server.host"]),
    "a value for a section": ("rules", "", ["config.toml.telemetry"]),
    "a value for a list": ("provider", 'headers = "a"', ["config.toml.providers[0].headers"]),
    "a wrong item": (
        "providers",
        '[[providers]]\nname = "a"\nformat = "echo"\nmodels = [1]',
        ["config.toml.providers[0].models"],
    ),
    "too few threads": ("server", "threads = 1", ["config.toml.server", "threads"]),
    "a negative timeout": ("provider", "read_timeout = -1", ["config.toml.providers[0]", "read_timeout"]),
    "a timeout of nothing": ("provider", "connect_timeout = 0", ["config.toml.providers[0]", "connect_timeout"]),
    "an infinite timeout": ("provider", "total_timeout = inf", ["config.toml.providers[0]", "total_timeout"]),
    "not a number": ("server", "send_timeout = nan", ["config.toml.server", "send_timeout"]),
    "a body limit of nothing": ("server", "max_body_bytes = 0", ["config.toml.server", "max_body_bytes"]),
    "too much in flight": ("server", "max_in_flight = 100000", ["config.toml.server", "max_in_flight"]),
    "a negative drain": ("server", "drain_seconds = -1", ["config.toml.server", "drain_seconds"]),
    "a ratio above one": ("rules", "[telemetry]\nsample_ratio = 2", ["config.toml.telemetry", "sample_ratio"]),
    "a ratio below zero": ("rules", "[telemetry]\nsample_ratio = -1", ["config.toml.telemetry", "sample_ratio"]),
    "a ratio that is none": ("rules", "[telemetry]\nsample_ratio = nan", ["config.toml.telemetry", "sample_ratio"]),
    "an endpoint without scheme": (
        "rules",
        '[telemetry]\notlp_endpoint = "localhost:4318"',
        ["config.toml.telemetry", "otlp_endpoint"],
    ),
    "a rule for nobody": (
        "rules",
        '[[routers]]\ntype = "prefix"\nmodel_prefix = "a"\nprovider = "upp"',
        ["config.toml.routers[0]", "upp"],
    ),
    "a fallback to nobody": (
        "rules",
        '[[routers]]\ntype = "fallback"\nproviders = ["up", "nobody"]',
        ["config.toml.routers[0]", "nobody"],
    ),
    "a rule of no type": ("rules", "[[routers]]\n", ["config.toml.routers[0].type"]),
    "a rule of unknown type": ("rules", '[[routers]]\ntype = "fallbak"', ["config.toml.routers[0]", "fallback"]),
    "a rule with a foreign key": (
        "rules",
        '[[routers]]\ntype = "fallback"\nmodel_prefix = "x"',
        ["config.toml.routers[0]", "model_prefix"],
    ),
    "a prefix rule without prefix": (
        "rules",
        '[[routers]]\ntype = "prefix"\nprovider = "up"',
        ["config.toml.routers[0]", "model_prefix"],
    ),
    "a provider of no name": (
        "providers",
        '[[providers]]\nformat = "openai"\nbase_url = "http://x"',
        ["config.toml.providers[0].name"],
    ),
    "a provider of no format": (
        "providers",
        '[[providers]]\nname = "a"\nbase_url = "http://x"',
        ["config.toml.providers[0].format"],
    ),
    "a provider of unknown format": (
        "providers",
        '[[providers]]\nname = "a"\nformat = "openia"\nbase_url = "http://x"',
        ["config.toml.providers[0]", "openai"],
    ),
    "a provider without address": (
        "providers",
        '[[providers]]\nname = "a"\nformat = "openai"',
        ["config.toml.providers[0].base_url"],
    ),
    "an address without scheme": (
        "providers",
        '[[providers]]\nname = "a"\nformat = "openai"\nbase_url = "localhost:11434"',
        ["config.toml.providers[0].base_url"],
    ),
    "an address of another scheme": (
        "providers",
        '[[providers]]\nname = "a"\nformat = "openai"\nbase_url = "ftp://localhost/x"',
        ["config.toml.providers[0].base_url"],
    ),
    "two providers of one name": (
        "providers",
        '[[providers]]\nname = "a"\nformat = "echo"\n[[providers]]\nname = "a"\nformat = "echo"',
        ["config.toml.providers[1]", "a"],
    ),
    "no providers": ("providers", "", ["config.toml.providers"]),
    "no provider with its key": ("provider", 'api_key_env = "MISSING"', ["config.toml.providers"]),
    "a key with a line break": ("provider", 'api_key_env = "SPLIT"', ["config.toml.providers[0]", "SPLIT"]),
    "a key no header can carry": ("provider", 'api_key_env = "CYRILLIC"', ["config.toml.providers[0]", "CYRILLIC"]),
    "a header with a line break": (
        "provider",
        'headers = { X-A = "sk-PROVIDER\\r\\nX-B: 1" }',
        ["config.toml.providers[0].headers"],
    ),
    "a header of a missing variable": (
        "provider",
        'headers = { X-A = "Bearer ${MISSING}" }',
        ["config.toml.providers[0].headers", "MISSING"],
    ),
    "a missing inbound key": ("server", 'api_key_env = "MISSING"', ["config.toml.server.api_key_env", "MISSING"]),
    "an empty inbound key": ("server", 'api_key_env = "EMPTY"', ["config.toml.server.api_key_env", "EMPTY"]),
    "a blank inbound key": ("server", 'api_key_env = "BLANK"', ["config.toml.server.api_key_env", "BLANK"]),
    "an api key without variable": ("rules", '[[api_keys]]\nname = "a"', ["config.toml.api_keys[0].key_env"]),
    "an api key that is missing": (
        "rules",
        '[[api_keys]]\nname = "a"\nkey_env = "MISSING"',
        ["config.toml.api_keys[0]", "MISSING"],
    ),
    "the world without a key": ("server", 'host = "0.0.0.0"', ["config.toml.server"]),
    "the ipv6 world without a key": ("server", 'host = "::"', ["config.toml.server"]),
    "no host": ("server", 'host = ""', []),
}


ECHO = '[[providers]]\nname = "a"\nformat = "echo"\n'
OPENAI = '[[providers]]\nname = "a"\nformat = "openai"\nbase_url = "{}"\n'

# A file with one mistake -> the key it is about.
MISTAKES = {
    **dict.fromkeys((f"{ECHO}[server]\nthreads = {n}" for n in (1, 5000)), "server.threads"),
    **dict.fromkeys((f"{ECHO}[server]\nport = {n}" for n in (-1, 65536)), "server.port"),
    f'{ECHO}[server]\nurl_prefix = "llm/"': "server.url_prefix",
    f"{ECHO}[server]\nthreads = 8\nmax_in_flight = 9": "server.max_in_flight",
    f"{ECHO}[server]\nthreads = 8\nmax_watchers = 8": "server.max_watchers",
    f"{ECHO}[server]\nmax_body_bytes = 1": "server.max_body_bytes",
    f"{ECHO}[server]\ndrain_seconds = -1": "server.drain_seconds",
    f"{ECHO}[server]\nsend_timeout = 0": "server.send_timeout",
    f'{ECHO}[server]\ntrace_url = "http://x"': "server.trace_url",
    f"{ECHO}[retry]\nattempts = 0": "retry.attempts",
    f"{ECHO}[retry]\non_status = [503, 200]": "retry.on_status[1]",
    f"{ECHO}[breaker]\nfailures = 0": "breaker.failures",
    f"{ECHO}[breaker]\ncooldown_seconds = 0": "breaker.cooldown_seconds",
    f"{ECHO}[telemetry]\nsample_ratio = 2": "telemetry.sample_ratio",
    f"{ECHO}[telemetry]\nshutdown_seconds = -1": "telemetry.shutdown_seconds",
    **dict.fromkeys(
        (f'{ECHO}[telemetry]\notlp_endpoint = "{url}"' for url in (
            "localhost:4318", "http://x:99999", "http://x:port", "http://[::1", "http://me:pw@x", "http://x?a=b", "http://x y",
        )), "telemetry.otlp_endpoint",
    ),
    f'{ECHO}[telemetry]\nheaders = {{ Host = "x" }}': "telemetry.headers.Host",
    f'{ECHO}[telemetry]\nheaders = {{ "a b" = "x" }}': "telemetry.headers.a b",
    **dict.fromkeys(
        map(OPENAI.format, (
            "http://x:99999/v1", "http://x:port/v1", "http://x:0/v1", "http://[::1/v1", "http://[fe80::1%25eth0]/v1",
            "http://x y/v1", "http://bücher.example/v1", "http://x/\\u0007", "x:80", "ftp://x", "http://me:pw@x", "http://x?a=b",
            "",
        )), "providers[0].base_url",
    ),
    f"{ECHO}read_timeout = 0": "providers[0].read_timeout",
    f"{ECHO}cost_per_1m_tokens = -1.0": "providers[0].cost_per_1m_tokens",
    f'{ECHO}headers = {{ "a b" = "x" }}': "providers[0].headers.a b",
    f"{ECHO}[providers.models.gpt-4]\ncost_per_1m_tokens = -1.0": "providers[0].models.gpt-4.cost_per_1m_tokens",
    '[[providers]]\nname = "a"\nformat = "eco"': "providers[0].format",
    f'{ECHO}[[routers]]\ntype = "fallback"\nquality_bias = 2.0': "routers[0].quality_bias",
    f'{ECHO}[[routers]]\ntype = "fallback"\nproviders = ["a", "b"]': "routers[0].providers[1]",
    f'{ECHO}[[routers]]\ntype = "tag"\ntag = "t"\nprovider = "b"': "routers[0].provider",
    f'{ECHO}[[routers]]\ntype = "random"\ncandidates = [{{ provider = "a" }}, {{ provider = "b" }}]':
        "routers[0].candidates[1].provider",
    f'{ECHO}[[routers]]\ntype = "random"\ncandidates = [{{ model = "m" }}]': "routers[0].candidates[0].provider",
    f'{ECHO}[[routers]]\ntype = "random"\ncandidates = [{{ provider = "a", modle = "m" }}]': "routers[0].candidates[0].modle",
    f"{ECHO}[plugins.web]\nenabled = true": "plugins.web.enabled",
    f'{ECHO}[plugins.pareto-router]\nenabled = true\ntiers = {{ fast = ["a", "b"] }}': "plugins.pareto-router.tiers.fast[1]",
    f"{ECHO}[plugins.pareto-router]\nenabled = true\ntiers = {{ fast = [1] }}": "plugins.pareto-router.tiers.fast[0]",
    f"{ECHO}[classifiers.structure]\nenabled = true\nlong_chars = 0": "classifiers.structure.long_chars",
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_told_with_the_key_it_is_about(tmp_path: Path, text: str) -> None:
    from router import ConfigError, load, prepare

    (tmp_path / "my.toml").write_text(text, "utf-8")
    with pytest.raises(ConfigError) as told:
        prepare(load(tmp_path / "my.toml", {}), {}, "my.toml")
    assert str(told.value).startswith(f"my.toml.{MISTAKES[text]}: "), told.value


def test_a_mistake_in_a_variable_is_told_with_its_key_and_its_name(tmp_path: Path) -> None:
    from router import ConfigError, load

    (tmp_path / "my.toml").write_text(f"{ECHO}[telemetry]\nenabled = true\n", "utf-8")
    with pytest.raises(ConfigError, match=r"^my\.toml\.telemetry\.sample_ratio: .*OTEL_TRACES_SAMPLER_ARG"):
        load(tmp_path / "my.toml", {"OTEL_TRACES_SAMPLER_ARG": "half"})


def refused(process: RouterProcess) -> str:
    """Starts it; what it said when it refused, once everything else about a refusal has been checked."""
    began = time.monotonic()
    process.launch()
    assert process.exit_code(10) == 2, process.output()
    assert time.monotonic() - began < 5
    *warnings, said = process.errors().strip().splitlines()
    assert all("WARNING" in line for line in warnings), warnings
    assert process.stdout.read_text() == ""
    for secret in (PROVIDER_KEY, "sk-PROV", "ключ"):
        assert secret not in said
    assert not listening(process.port)
    return said


def listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses_to_start_with(router: RouterFactory, case: str) -> None:
    place, text, expected = REFUSED[case]
    template = "telemetry = 5\n" + CONFIG if case == "a value for a section" else CONFIG
    process = router(template, environment=SECRET, start=False, **{place: text})
    process.port = free_port()
    process.write_config()
    said = refused(process)
    for piece in expected:
        assert piece in said


@pytest.mark.parametrize("content", [b"[server\n", b"port = = 1", b"\xff\xfe\x00", b"[server]\nport = 1\nport = 2\n", b"a\x00b"])
def test_it_refuses_what_is_not_toml_and_says_where(router: RouterFactory, content: bytes) -> None:
    process = router(start=False)
    process.port = free_port()
    process.config.write_bytes(content)
    assert "config.toml" in refused(process)


def test_it_refuses_a_file_that_is_not_there(router: RouterFactory) -> None:
    process = router(start=False)
    process.port = free_port()
    assert "config.toml" in refused(process)


def test_a_folder_is_not_a_configuration(router: RouterFactory) -> None:
    process = router(start=False)
    process.port = free_port()
    process.config.mkdir()
    assert "config.toml" in refused(process)


def test_a_byte_order_mark_is_no_surprise(router: RouterFactory) -> None:
    """Windows editors write one: it is taken, or refused like any other mistake."""
    process = router(start=False)
    process.port = free_port()
    process.write_config()
    process.config.write_bytes(b"\xef\xbb\xbf" + process.config.read_bytes())
    process.launch()
    if until(process._up_or_dead) == "dead":
        assert process.exit_code() == 2
        assert "config.toml" in process.errors()
        assert len(process.errors().strip().splitlines()) == 1


def test_the_world_may_be_served_with_a_key(router: RouterFactory) -> None:
    process = router(server='host = "0.0.0.0"\napi_key_env = "INBOUND"', environment={"INBOUND": f"  {INBOUND_KEY}\n"})
    assert process.chat().status == 401
    assert process.chat(headers={"Authorization": f"Bearer {INBOUND_KEY}"}).status == 200


def test_the_world_may_be_served_without_a_key_by_those_who_say_so(router: RouterFactory) -> None:
    process = router(server='host = "0.0.0.0"\nallow_unauthenticated = true')
    assert process.chat().status == 200


def test_localhost_is_loopback(router: RouterFactory) -> None:
    assert router(server='host = "localhost"').chat().status == 200


def test_a_provider_without_its_key_is_left_out_with_a_warning(router: RouterFactory, upstream: FakeUpstream) -> None:
    providers = PROVIDER + '[[providers]]\nname = "keyless"\nformat = "openai"\nbase_url = "{upstream}/other"\n'
    rules = '[[routers]]\ntype = "fallback"\nproviders = ["keyless", "up"]\n'
    process = router(providers=providers + 'api_key_env = "MISSING"\nquality = 5.0\n', rules=rules)
    assert "keyless" in process.output()
    assert "MISSING" in process.output()
    assert process.chat().headers["x-router-provider"] == "up"
    assert upstream.posts[0].path == "/v1/chat/completions"


def test_keys_and_headers_come_from_the_environment(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(
        provider='api_key_env = "SECRET_KEY"\nheaders = { X-Org = "org-${ORG}", X-Static = "1" }',
        environment={"SECRET_KEY": f" {PROVIDER_KEY}\r\n", "ORG": "seven"},
    )
    assert process.chat().status == 200
    sent = upstream.posts[0]
    assert sent.header("authorization") == f"Bearer {PROVIDER_KEY}"
    assert (sent.header("x-org"), sent.header("x-static")) == ("org-seven", "1")
    assert PROVIDER_KEY not in Path(f"/proc/{process.pid}/cmdline").read_text()


def test_variables_are_read_only_in_headers_and_keys_of_the_file(router: RouterFactory, upstream: FakeUpstream) -> None:
    """What comes over the API is text, whatever it looks like."""
    process = router(environment={"SECRET_KEY": PROVIDER_KEY})
    assert process.chat("${SECRET_KEY}", user="${SECRET_KEY}").status == 200
    assert upstream.posts[0].json()["user"] == "${SECRET_KEY}"


# --- the commands


def run(*arguments: str, folder: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "router.py"), *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def written(folder: Path, text: str = CONFIG, **values: str) -> str:
    place = folder / "config.toml"
    defaults = {"port": str(free_port()), "log": str(folder / "log.jsonl"), "upstream": "http://127.0.0.1:9", "tmp": "x"}
    place.write_text(filled(text, {**defaults, "providers": PROVIDER, "rules": RULES, **values}), "utf-8")
    return str(place)


def test_check_approves_of_a_good_file_and_starts_nothing(tmp_path: Path) -> None:
    done = run("check", written(tmp_path), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "log.jsonl").exists()


def test_check_refuses_what_serve_would_refuse(tmp_path: Path) -> None:
    done = run("check", written(tmp_path, server="threds = 3"), folder=tmp_path)
    assert done.returncode == 2
    assert "config.toml.server.threds: unknown key, did you mean threads?" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_check_approves_of_the_shipped_file(tmp_path: Path) -> None:
    done = run("check", str(ROOT / "config.toml"), folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_file_in_the_working_folder_is_the_default(tmp_path: Path) -> None:
    written(tmp_path, server="threds = 3")
    for arguments in (["check"], ["serve"], []):
        done = run(*arguments, folder=tmp_path)
        assert done.returncode == 2
        assert "threds" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["check", "--help"]])
def test_help_is_given(tmp_path: Path, arguments: list[str]) -> None:
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 0
    assert "usage" in done.stdout.lower()
    assert "\x1b[" not in done.stdout, "colour only on a terminal"


@pytest.mark.parametrize("arguments", [["--nonsense"], ["check", "a", "b"], ["serve", "--port", "1"]])
def test_a_wrong_command_line_is_exit_2(tmp_path: Path, arguments: list[str]) -> None:
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_nothing_that_is_off_is_imported(tmp_path: Path) -> None:
    """Telemetry and broadcast are off as long as nobody turns them on: no module of OpenTelemetry may be loaded."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import router; router.create_app(sys.argv[2]);"
        "loaded = [name for name in sys.modules if name.split('.')[0] in"
        " ('opentelemetry', 'requests', 'google', 'sqlite3', 'asyncio')]; print(loaded); sys.exit(bool(loaded))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), written(tmp_path)],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_router_knows_where_broadcasts_database_is_without_importing_it() -> None:
    import broadcast
    import router

    assert broadcast.Settings().database == router.BROADCAST_DATABASE

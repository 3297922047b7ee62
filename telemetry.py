"""What the operator sees: spans, metrics, logs; off means absent.

The lowest room: it imports none of ours, and nothing of OpenTelemetry before `start()` is called with telemetry enabled.
The one scrubber of the program lives here, because every sink stands above it: whatever leaves the process as log
line, error text, span attribute or event goes through `scrub()` first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any
from urllib.parse import unquote

_secrets: set[str] = set()
_known: re.Pattern[str] | None = None
# What a key looks like although nobody registered it: vendor prefixes, credentials of an Authorization header, keys in a query.
_shapes = re.compile(
    r"(?P<keep>(?:\b(?:bearer|basic)\s+|[?&][\w-]*(?:key|token|secret)=))[^\s&\"',}\]]+"
    r"|\b(?:sk|pk|rk|gsk|glc|glsa|hf|ghp|xai|xaat|xoxb|AIza)[-_][\w-]{8,}",
    re.IGNORECASE,
)


def keep_secret(value: str) -> None:
    """Register a key or token; from now on `scrub` takes it out of every text. Values under 4 characters are ignored."""
    global _known
    value = value.strip()
    if len(value) < 4 or value in _secrets:
        return
    _secrets.add(value)
    _known = re.compile("|".join(re.escape(s) for s in sorted(_secrets, key=len, reverse=True)))


def scrub(text: str) -> str:
    """Give the text with every registered secret, and all that looks like one, replaced by `[redacted]`."""
    if _known is not None:
        text = _known.sub("[redacted]", text)
    return _shapes.sub(lambda m: (m["keep"] or "") + "[redacted]", text)


@dataclass(frozen=True)
class Settings:
    """The `[telemetry]` section. For a missing key its OTEL_* variable counts, then the default."""

    enabled: bool = field(default=False, metadata={"doc": "export traces, metrics and logs over OTLP/HTTP"})
    otlp_endpoint: str = field(
        default="http://localhost:4318",
        metadata={
            "doc": "OTLP/HTTP base; /v1/traces, /v1/metrics and /v1/logs are appended",
            "env": "OTEL_EXPORTER_OTLP_ENDPOINT",
        },
    )
    service_name: str = field(default="opensourcellmrouter", metadata={"doc": "service.name", "env": "OTEL_SERVICE_NAME"})
    sample_ratio: float = field(
        default=1.0, metadata={"doc": "0.0 to 1.0, parent-based; traces only", "env": "OTEL_TRACES_SAMPLER_ARG"}
    )
    headers: dict[str, str] = field(
        default_factory=dict, metadata={"doc": "for authenticated collectors", "env": "OTEL_EXPORTER_OTLP_HEADERS"}
    )
    resource: dict[str, str] = field(
        default_factory=dict, metadata={"doc": "extra resource attributes", "env": "OTEL_RESOURCE_ATTRIBUTES"}
    )
    capture_content: bool = field(default=False, metadata={"doc": "opt in to gen_ai.input.messages and gen_ai.output.messages"})
    propagate: bool = field(default=True, metadata={"doc": "send traceparent to providers"})
    shutdown_seconds: float = field(default=5.0, metadata={"doc": "the most that flushing may delay the exit"})

    def __post_init__(self) -> None:
        if not 0.0 <= self.sample_ratio <= 1.0:
            raise ValueError("sample_ratio must lie between 0 and 1")
        if not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError("otlp_endpoint must begin with http:// or https://")
        if not 0 <= self.shutdown_seconds <= 300:
            raise ValueError("shutdown_seconds must lie between 0 and 300")


def from_environment(settings: Settings, told: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """The settings with OTEL_* variables in place of the keys that the file does not tell. Raises ValueError."""
    changes: dict[str, Any] = {}
    for f in fields(Settings):
        value = environ.get(f.metadata.get("env", ""), "")
        if value and f.name not in told:
            changes[f.name] = _from_text(f.name, value)
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        changes["enabled"] = False
    return replace(settings, **changes) if changes else settings


def _from_text(name: str, value: str) -> Any:
    if name in ("headers", "resource"):  # W3C baggage form: k=v,k2=v2, percent-encoded
        pairs = (pair.partition("=") for pair in value.split(",") if "=" in pair)
        return {k.strip(): unquote(v.strip()) for k, _, v in pairs}
    return float(value) if name == "sample_ratio" else value

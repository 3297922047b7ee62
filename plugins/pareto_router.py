"""Lets a client choose between tiers of providers: `plugins: [{"id": "pareto-router", "tier": "fast"}]`.

The tier's providers, in order, are the candidates instead of what the rules would say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plugins import Missing
from providers import BadRequest, Request


class ParetoRouter:
    """Settings: tiers = {tier: [provider or {provider, model}, ...]}; default_tier (else medium, else the first); and per
    request `tier`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        tiers = settings.get("tiers")
        if unknown := set(settings) - {"tiers", "default_tier", "tier"}:
            raise ValueError(f"{min(unknown)}: unknown key, known are tiers and default_tier")
        if tiers is None:
            raise Missing("tiers: required")
        if not isinstance(tiers, dict) or not tiers or not all(isinstance(t, list) and t for t in tiers.values()):
            raise ValueError("tiers: must map each tier to a list of providers")
        self._tiers = {name: [_candidate(c, f"tiers.{name}[{i}]") for i, c in enumerate(tier)] for name, tier in tiers.items()}
        default = settings.get("default_tier", "medium" if "medium" in tiers else next(iter(tiers)))
        self._tier = settings.get("tier", default)
        if not isinstance(default, str) or default not in tiers:
            raise ValueError(f"default_tier: there is no tier {default!r}")

    @property
    def references(self) -> dict[str, str]:
        """The providers that the tiers refer to, each under its place in the settings, for the check at start."""
        return {f"tiers.{name}[{i}]": provider for name, tier in self._tiers.items() for i, (provider, _) in enumerate(tier)}

    def pre_request(self, request: Request) -> None:
        if not isinstance(self._tier, str) or self._tier not in self._tiers:
            known = ", ".join(self._tiers)
            raise BadRequest(f"plugins: pareto-router has no tier {str(self._tier)[:60]!r}, known are {known}", param="plugins")
        request.forced = list(self._tiers[self._tier])


plugin = ParetoRouter


def _candidate(told: Any, place: str) -> tuple[str, str | None]:
    if isinstance(told, str):
        return told, None
    if isinstance(told, dict) and isinstance(told.get("provider"), str) and set(told) <= {"provider", "model"}:
        return told["provider"], told.get("model")
    raise ValueError(f"{place}: must be a provider's name or a table with provider and model")

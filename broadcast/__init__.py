"""What users' destinations see: each finished request as a trace in OpenRouter's Broadcast format.

A record becomes a document in `encoder`; what is configured is in `destinations`, what is queued and saved in `store`;
`exchange` sends once and judges the answer, `trial` does so for Test Connection, `delivery` holds the threads that do so until
it has arrived, and `service` is the front: a sink for records, the switch, the counters and the settings API. Imports only
go down: service, delivery and trial, exchange, destinations, encoder; store stands alone.

Reading a configuration wants `Settings` only; everything that opens a database or a socket is imported when it is first
asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broadcast.destinations import Destination, Settings
from broadcast.encoder import encode

if TYPE_CHECKING:
    from broadcast.service import Broadcast, replay

__all__ = ["Broadcast", "Destination", "Settings", "encode", "replay"]


def __getattr__(name: str) -> Any:
    if name not in ("Broadcast", "replay"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from broadcast import service

    return getattr(service, name)

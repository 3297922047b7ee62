"""`python tests/retell.py` writes what is missing beside a new golden file of the openai or anthropic language.

A new case is one file: `requests/<case>.client.json`, or `answers/<case>.upstream.json` or `.upstream.sse`. The others, what
the router makes of it today, are then read by eye, corrected where they are wrong, and kept. Nothing is ever overwritten.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_roundtrip import ELSEWHERE, LANGUAGES, STAMP, UPSTREAMS, folded, language, rendered  # noqa: E402 - the paths first
from wire_files import WIRE, canonical, cases, heard, heard_in_pieces, raw, read, written  # noqa: E402


def keep(folder: str, name: str, told: Any) -> None:
    """Write a file that is not there yet."""
    path = WIRE / folder / name
    if path.exists():
        return
    path.write_bytes(told if isinstance(told, bytes) else (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode())
    print(path.relative_to(ROOT))


def retell_request(name: str, case: str) -> None:
    """The router's words for a client's request, and what either language makes of them."""
    folder, told = f"{name}/requests", read(f"{name}/requests", f"{case}.client.json")
    keep(folder, f"{case}.canonical.json", canonical(heard(name, told)))
    for target in LANGUAGES:
        request = heard(name, told)
        request.changed = True
        call = language(target).build(request, "sent-model", UPSTREAMS[target])
        keep(folder, f"{case}.{target}.json", {"dropped": call.dropped, "body": json.loads(call.body)})


def retell_answer(name: str, case: str, kind: str) -> None:
    """The events of a provider's answer, and what clients of either language get of them."""
    folder, data = f"{name}/answers", raw(f"{name}/answers", f"{case}.upstream.{kind}")
    streamed = kind == "sse"
    told = heard_in_pieces(language(name).Parser(), [data]) if streamed else language(name).parse(data, ELSEWHERE)
    keep(folder, f"{case}.events.json", written(told))
    for target in LANGUAGES:
        made = rendered(target, told) if streamed else language(target).render(folded(told), ELSEWHERE, STAMP)
        keep(folder, f"{case}.{target}.{kind}", made)


def main() -> None:
    """Look at every case of both languages."""
    for name in LANGUAGES:
        for case in cases(f"{name}/requests", ".client.json"):
            retell_request(name, case)
        for kind in ("sse", "json"):
            for case in cases(f"{name}/answers", f".upstream.{kind}"):
                retell_answer(name, case, kind)


if __name__ == "__main__":
    main()

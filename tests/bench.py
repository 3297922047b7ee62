"""Measures the router beside the least that waitress + urllib3 can do, in one interleaved run: `make bench`.

The harness (a mock upstream and a load generator in C, and the bare proxy to compare with) lies in ../shared/bench, or where
BENCH_DIR says; gcc and make are needed. Machines differ and are noisy: what counts are the ratios of one run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HARNESS = Path(os.environ.get("BENCH_DIR", ROOT.parent / "shared" / "bench"))
TELEMETRY = '\n[telemetry]\nenabled = true\notlp_endpoint = "{}"\nsample_ratio = {}\n'
CASES = {
    "router": "",
    "traced": TELEMETRY.format("http://127.0.0.1:9101", "1.0"),
    "unsampled": TELEMETRY.format("http://127.0.0.1:9101", "0.0"),
    "nocollector": TELEMETRY.format("http://127.0.0.1:9", "1.0"),
    "broadcast": """
[broadcast]
enabled = true
database = "state/broadcast.db"

[[broadcast.destinations]]
name = "archive"
type = "file"
path = "/dev/null"
""",
}


def main(arguments: list[str]) -> int:
    """Run the cases named on the command line (all that need no collector by default) with the harness's own options."""
    if not HARNESS.is_dir():
        print(f"the harness is not at {HARNESS}; set BENCH_DIR")
        return 2
    names = [a for a in arguments if a in CASES] or ["router"]
    options = [a for a in arguments if a not in CASES]
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        shutil.copytree(HARNESS, folder / "bench")
        for path in (folder / "bench").rglob("*"):
            path.chmod(path.stat().st_mode | 0o200)
        subprocess.run(["make", "-s"], cwd=folder / "bench", check=True)
        return run(folder / "bench", names, options)
    finally:
        shutil.rmtree(folder)


def run(bench: Path, names: list[str], options: list[str]) -> int:
    """Write the suite, run it round by round, print the medians of the ratios."""
    floor = {"name": "floor512", "url": "http://127.0.0.1:9302", "cmd": f"{sys.executable} gateways/floor.py 9302 --threads 512"}
    suite = [floor, *(gateway(bench, name, 9401 + i) for i, name in enumerate(names))]
    (bench / "ours.json").write_text(json.dumps(suite))
    chosen = options or ["--rounds", "3", "--held", "50,200"]
    subprocess.run([sys.executable, "bench.py", "--suite", "ours.json", "--json", "out.json", *chosen], cwd=bench, check=True)
    subprocess.run([sys.executable, "compare.py", "out.json", names[0] if len(names) > 1 else "floor512"], cwd=bench, check=True)
    return 0


def gateway(bench: Path, name: str, port: int) -> dict[str, str]:
    """One configuration of the router as an entry of the suite; the JSONL log is on, as in bench.toml."""
    config = (bench / "bench.toml").read_text().replace("port = 9401", f"port = {port}") + CASES[name]
    (bench / f"{name}.toml").write_text(config)
    return {
        "name": name,
        "url": f"http://127.0.0.1:{port}",
        "cmd": f"{sys.executable} {ROOT / 'router.py'} serve {bench / name}.toml",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

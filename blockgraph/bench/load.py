# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Load on an NBD server: fio where it is installed with its nbd engine, else our own client.

fio costs the machine less than a client in Python, which itself is the limit at some 100,000 requests a second.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from blockgraph.bench.client import run_client
from blockgraph.bench.figures import PERCENTILES, Sample, series
from blockgraph.bench.pattern import Pattern
from blockgraph.bench.programs import run_program
from blockgraph.errors import IOFailure


class Target(NamedTuple):
    """A server that listens.

    Attributes:
        socket: path of its socket.
        export: name that clients ask for.
        size: of the disk, bytes.
    """

    socket: str
    export: str
    size: int

    @property
    def uri(self) -> str:
        """As libnbd spells it."""
        return f"nbd+unix:///{self.export}?socket={self.socket}"


def find_fio() -> str | None:
    """Path of a fio that speaks NBD."""
    path = shutil.which("fio")
    if path is None:
        return None
    engines = run_program([path, "--enghelp"]).output.split()
    return path if "nbd" in engines else None


def run_load(
    fio: str | None, folder: Path, target: Target, pattern: Pattern, seconds: float, interval: float
) -> Sample:
    """Put the pattern on a server for some seconds.

    Args:
        fio: its path; None: our own client.
        folder: for fio's logs.
        interval: of the sample's series, seconds; 0: no series.
    Raises:
        IOFailure: the server failed a request, or the client could not run.
    """
    if fio is None:
        return run_client(target.socket, target.export, target.size, pattern, seconds, interval)
    return _fio(fio, folder, target, pattern, seconds, interval)


def _fio(fio: str, folder: Path, target: Target, pattern: Pattern, seconds: float, interval: float) -> Sample:
    log = folder / "guest"
    argv = [
        *(
            fio,
            "--name=guest",
            "--ioengine=nbd",
            f"--uri={target.uri}",
            "--output-format=json",
            "--time_based",
            "--thread",
        ),
        *(f"--rw={pattern.rw}", f"--bs={pattern.block}", f"--iodepth={pattern.depth}", "--norandommap"),
        *(f"--size={target.size - target.size % pattern.block}", f"--runtime={max(1, round(seconds * 1000))}ms"),
        f"--percentile_list={':'.join(f'{share:g}' for share in PERCENTILES.values())}",
    ]
    if interval:
        # An entry for every request. Averages that fio makes itself leave out the first 100 ms, which matter most.
        argv.append(f"--write_bw_log={log}")
    done = run_program(argv, folder)
    sample = _parse(done.output, pattern)
    if done.status or sample is None:
        raise IOFailure(f"fio failed: {done.reason()}", node=target.export, op="fio")
    if not interval:
        return sample
    with Path(f"{log}_bw.1.log").open() as entries:
        ends = [int(entry.partition(",")[0]) / 1000 for entry in entries]
    Path(f"{log}_bw.1.log").unlink()
    return sample._replace(series=series(ends, seconds, interval))


def _parse(output: str, pattern: Pattern) -> Sample | None:
    """The engine says something of its own before the JSON."""
    try:
        (job,) = json.loads(output[output.index("{") :])["jobs"]
    except ValueError:
        return None
    side: dict[str, Any] = job["write" if pattern.writes else "read"]
    if job["error"] or not side["total_ios"]:
        return None
    found = side["clat_ns"]["percentile"]
    latency = {name: found[f"{share:.6f}"] / 1000 for name, share in PERCENTILES.items()}
    return Sample(pattern.rate(side["iops"]), latency)

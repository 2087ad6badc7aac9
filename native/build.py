# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Compile the C of native/ into the cffi module `blockgraph._native`, and into `blockgraph._requests` in the same file.

    python native/build.py            rebuild in place (blockgraph/_native.abi3.so)

The declarations cffi needs are read out of the headers themselves, between the lines `/* cffi:begin */` and
`/* cffi:end */`, so each function is declared once. The module uses CPython's limited API: one file serves every
version from 3.11 on.

Environment: CC and CFLAGS as usual; BLOCKGRAPH_WERROR=1 (or CI) turns warnings into errors.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from cffi import FFI
from setuptools import Distribution, Extension

NATIVE = Path(__file__).resolve().parent
ROOT = NATIVE.parent
MODULE = "blockgraph._native"
FILENAME = "_native.abi3.so"
# Order matters: a header comes after those whose types it uses.
HEADERS = (
    *(
        "zero.h",
        "dense.h",
        "bitmap.h",
        "sums.h",
        "io.h",
        "windows.h",
        "pipe.h",
        "pool.h",
        "queue.h",
        "copy.h",
        "extent_map.h",
        "allocator.h",
        "qcow2_l2.h",
        "l2_places.h",
    ),
    *("copier.h", "buffers.h", "request.h", "nbd_wire.h", "nbd_loop.h"),
)
SOURCES = tuple(sorted(str(path) for pattern in ("*.c", "python/*.c") for path in NATIVE.glob(pattern)))

_DECLARATIONS = re.compile(r"^/\* cffi:begin \*/\n(.*?)^/\* cffi:end \*/$", re.MULTILINE | re.DOTALL)
# What cffi writes is not ours to tidy.
_PREAMBLE = """\
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#pragma GCC diagnostic ignored "-Wcast-function-type"
"""


def declarations() -> str:
    """The cffi parts of all headers, in order."""
    parts: list[str] = []
    for name in HEADERS:
        found = _DECLARATIONS.findall((NATIVE / name).read_text())
        if not found:
            raise ValueError(f"native/{name}: no cffi:begin ... cffi:end part")
        parts += found
    return "\n".join(parts)


def compile_flags() -> list[str]:
    flags = ["-std=gnu11", "-O3", "-g", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]
    if os.environ.get("CI") or os.environ.get("BLOCKGRAPH_WERROR"):
        flags.append("-Werror")
    return flags


def build(target_dir: Path) -> Path:
    """Compile the module into `target_dir` and return the path of the shared object."""
    ffi = FFI()
    ffi.cdef(declarations())
    ffi.set_source(MODULE, _PREAMBLE + "".join(f'#include "{name}"\n' for name in HEADERS))
    with tempfile.TemporaryDirectory(prefix="blockgraph-native-") as scratch:
        generated = Path(scratch) / "_native.c"
        ffi.emit_c_code(str(generated))
        extension = Extension(
            MODULE,
            [str(generated), *SOURCES],
            include_dirs=[str(NATIVE)],
            depends=[str(NATIVE / name) for name in HEADERS],
            extra_compile_args=compile_flags(),
            extra_link_args=["-pthread"],
            py_limited_api=True,
        )
        command = Distribution({"name": "blockgraph", "ext_modules": [extension]}).get_command_obj("build_ext")
        command.build_lib = command.build_temp = scratch  # type: ignore[attr-defined]
        command.ensure_finalized()
        command.run()
        built = Path(scratch, *MODULE.split(".")[:-1], FILENAME)
        target_dir.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed: a process that has the old file mapped keeps it intact.
        partial = target_dir / (FILENAME + ".new")
        partial.write_bytes(built.read_bytes())
        partial.chmod(0o755)
        return partial.rename(target_dir / FILENAME)


if __name__ == "__main__":
    print(build(ROOT / "blockgraph").relative_to(ROOT))

""".beton files as other programs, and earlier versions, write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastbd.data.layout import HEADER, read_tables, record_of


def without_checksums(path: Path, out: Path) -> Path:
    """Write the file again as it was before rows had checksums: that field was the last."""
    data = np.fromfile(path, np.uint8)
    tables = read_tables(data)
    fields = tables.fields[:-1]
    metadata = np.zeros(len(tables.metadata), record_of(fields))
    for name in metadata.dtype.names:
        metadata[name] = tables.metadata[name]
    header = data[: HEADER.itemsize].copy()
    header.view(HEADER)["fields"] -= 1
    head = header.tobytes() + fields.tobytes() + metadata.tobytes()
    out.write_bytes(head + bytes(tables.start - len(head)) + data[tables.start :].tobytes())
    return out

"""Write what real writers write of a few images: python write_with_writers.py FOLDER, in the environment of writers.

FOLDER/images holds PNG files; img2dataset fetches them from a server of this machine, in three formats.
"""

from __future__ import annotations

import functools
import http.server
import json
import sys
import threading
from pathlib import Path

import webdataset
from img2dataset import download


def serve(folder: Path) -> str:
    """Address of a server of the folder's files, which lives as long as this program."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def write_img2dataset(folder: Path) -> None:
    """folder/files, folder/webdataset and folder/parquet; one image is missing, one caption is empty."""
    address = serve(folder / "images")
    lines = [
        {"url": f"{address}/{p.name}", "caption": f"number {p.stem}", "blip_caption": f"blip {p.stem}"}
        for p in sorted((folder / "images").iterdir())
    ]
    lines.append({"url": f"{address}/missing.png", "caption": "of nothing", "blip_caption": "nothing"})
    lines[1]["caption"] = None
    (folder / "urls.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for output_format in ("files", "webdataset", "parquet"):
        download(
            url_list=str(folder / "urls.jsonl"),
            input_format="jsonl",
            url_col="url",
            caption_col="caption",
            save_additional_columns=["blip_caption"],
            output_folder=str(folder / output_format),
            output_format=output_format,
            processes_count=1,
            thread_count=2,
            image_size=32,
            number_sample_per_shard=4,
            resize_mode="no",
            encode_format="jpg",
            disallowed_header_directives=[],
        )


def write_webdataset(folder: Path) -> None:
    """folder/writer: shards of ShardWriter; folder/writer.tar, of TarWriter, with keys and fields of many kinds."""
    images = sorted((folder / "images").iterdir())
    (folder / "writer").mkdir()
    with webdataset.ShardWriter(str(folder / "writer" / "%05d.tar"), maxcount=3, verbose=0) as writer:
        for path in images:
            json_member = {"blip_caption": f"blip {path.stem}"}
            writer.write(
                {"__key__": path.stem, "png": path.read_bytes(), "txt": f"number {path.stem}", "json": json_member}
            )
    with webdataset.TarWriter(str(folder / "writer.tar")) as writer:
        for path in images:
            image = {"png": path.read_bytes(), "seg.png": b"a mask"}
            writer.write({"__key__": f"in.a/{path.stem}", "cls": 7, "txt": f"number {path.stem}", **image})
    with webdataset.TarWriter(str(folder / "classes.tar")) as writer:
        for label, path in enumerate(images):
            writer.write({"__key__": path.stem, "png": path.read_bytes(), "cls": label})
    with webdataset.TarWriter(str(folder / "packed.tar.gz")) as writer:
        writer.write({"__key__": "0", "png": images[0].read_bytes(), "txt": "packed"})


def read_webdataset(folder: Path) -> None:
    """folder/read.json: for each tar in folder/tars the samples, as lists of member names, that webdataset reads."""
    found = {}
    for path in sorted((folder / "tars").glob("*.tar")):
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
        fields = [[name for name in sample if not name.startswith("__")] for sample in samples]
        keys = [sample["__key__"] for sample in samples]
        found[path.stem] = [sorted(f"{key}.{name}" for name in names) for key, names in zip(keys, fields, strict=True)]
    (folder / "read.json").write_text(json.dumps(found))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_webdataset(root)
    read_webdataset(root)
    write_img2dataset(root)

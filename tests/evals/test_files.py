"""Reading of data files: every way in which one can be broken is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastalign.distill.data.images import MAX_PIXELS
from fastalign.distill.data.records import SampleError, SourceError
from fastalign.evals.files import Encoded, Row, data_files, read_rows
from fastalign.evals.images import Picture, picture

from .stubs import image, number, write_parquet


def test_the_three_forms_of_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ('[{"a": 1}, {"a": 2}]', '{"data": [{"a": 1}, {"a": 2}]}', '{"a": 1}\n{"a": 2}\n'):
        text = text if text.startswith("[") or "data" in text else '{"a": 1}\n\n{"a": 2}\n'
        path.write_text(text)
        assert [row.values["a"] for row in read_rows(path)] == [1, 2]
    path.write_text('{"7": {"a": 1}, "x": {"a": 2}}')
    assert [(row.key, row.where) for row in read_rows(path)] == [
        ("7", f"{path}, sample '7'"),
        ("x", f"{path}, sample 'x'"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"", "line 1: no json"),
        ("x.json", b"3", "holds 3; allowed: a list or a mapping"),
        ("x.json", b"[]", "is empty"),
        ("x.json", b"[1]", "sample '0': is 1; allowed: a mapping"),
        ("x.json", b"[" * 200_000, "nested too deeply|no json"),
        ("x.json", b'{"a": "\xff"}', "no text in UTF-8"),
        ("x.jsonl", b'{"a": 1}\n\xff\n', "line 2: no json"),
        ("x.jsonl", b'{"a": 1}\n[2]\n', r"line 2: is \[2\]; allowed: a mapping"),
        ("x.jsonl", b"\n\n", "is empty"),
        ("x.tsv", b"a\tb\n1\t2\n3\n", "line 3: has 1 fields; allowed: 2"),
        ("x.tsv", b"a\tb\n", "is empty"),
        ("x.parquet", b"PAR1 no", "is no parquet"),
        ("x.csv", b"a\n", "allowed: a file with one of the suffixes .json, .jsonl, .tsv"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises((SampleError, SourceError), match=f"{name}.*(?:{message})"):
        read_rows(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        read_rows(tmp_path / "none.json")
    with pytest.raises(SourceError, match="does not exist"):
        data_files(tmp_path / "none", "*.json")
    with pytest.raises(SourceError, match=r"holds none of \*.json"):
        data_files(tmp_path, "*.json")


def test_fields_are_checked() -> None:
    row = Row("f, line 3", "0", {"t": " ", "n": "12", "f": 1.5, "b": True, "nan": float("nan")})
    for call, message in (
        (lambda: row.text("x"), "f, line 3: lacks 'x'; it has: t, n, f, b, nan"),
        (lambda: row.text("t"), "'t' is blank"),
        (lambda: row.text("n2", "f"), "'n2' is 1.5; allowed: a text"),
        (lambda: row.number("f"), "'f' is 1.5; allowed: a whole number"),
        (lambda: row.number("b"), "'b' is True"),
        (lambda: row.choice(("yes", "no"), "n"), "'n' is '12'; allowed: yes, no"),
    ):
        with pytest.raises(SampleError, match=message):
            call()
    assert row.number("n") == 12
    assert (row.optional("nan"), row.optional("none"), row.optional("n")) == ("", "", "12")


def test_a_tsvs_lines_are_counted_through_quoted_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('a\tb\n"two\nlines"\t1\nx\t2\n' + "y" * 200_000 + "\t3\n")
    assert [row.where.rpartition(" ")[2] for row in read_rows(path)] == ["2", "4", "5"]
    assert read_rows(path)[0].values["a"] == "two\nlines"


def test_images_in_parquet_are_read_from_their_row_group(tmp_path: Path) -> None:
    rows = [{"n": i, "image": image(i)} for i in range(11)]
    read = read_rows(write_parquet(tmp_path / "x.parquet", rows, group=3))
    order = [10, 0, 4, 3, 9, 2]
    assert [number(picture(read[i], "image", root=None)) for i in order] == order
    assert [row.values["n"] for row in read] == list(range(11))


def test_an_empty_cell_and_bytes_that_are_no_image(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [image(1), b"GIF?", None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": cell, "path": "x.png"} for cell in cells], type=kind)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": column}), path)
    read = read_rows(path)
    with pytest.raises(SampleError, match="row 1: its image cannot be decoded"):
        picture(read[1], "image", root=None).load()
    with pytest.raises(SampleError, match="row 2: 'image' is None; allowed: an image's bytes"):
        picture(read[2], "image", root=None).load()


def test_too_many_pixels_are_refused_before_decoding() -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", 8_000, 8_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    with pytest.raises(SampleError, match=f"here: its image has 8000 x 8000 pixels.*{MAX_PIXELS}"):
        Picture("here", Encoded(lambda: bomb)).load()


def test_json_numbers_and_lists_are_no_image_names() -> None:
    for value in (3, ["a.png"], ""):
        with pytest.raises(SampleError, match="allowed: an image's name"):
            picture(Row("here", "0", json.loads(json.dumps({"image": value}))), "image", root=None)

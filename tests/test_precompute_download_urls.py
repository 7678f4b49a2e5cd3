"""Lists of URLs, and the judgement of what became of them: all that needs no img2dataset."""

import csv
import datetime
import decimal
import gzip
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from precompute.download_outcomes import (
    OPTED_OUT,
    count_outcomes,
    last_attempts,
    read_outcomes,
    reason_of,
    remove_unfinished,
    worth_another_attempt,
)
from precompute.download_urls import read_url_list
from shards.errors import UserError

ROWS = [
    {"URL": "https://a.test/1,2.jpg", "TEXT": 'a "red"\ncircle', "punsafe": 0.25},
    {"URL": "https://b.test/ä.jpg", "TEXT": "a blue square", "punsafe": 0.5},
]


def write_csv(path, delimiter):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "csv": lambda path: write_csv(path, ","),
    "tsv": lambda path: write_csv(path, "\t"),
    "json": lambda path: path.write_text(json.dumps(ROWS)),
    "jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "jsonl.gz": lambda path: path.write_bytes(
        gzip.compress("\n".join(map(json.dumps, ROWS)).encode())
    ),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_list(tmp_path, ending):
    path = tmp_path / f"list.{ending}"
    WRITERS[ending](path)
    urls = read_url_list(str(path))
    assert urls.has_captions
    assert urls.table.to_pylist() == [
        {"url": row["URL"], "caption": row["TEXT"], "punsafe": row["punsafe"]} for row in ROWS
    ]


def test_a_line_of_a_text_file_is_an_address(tmp_path):
    (tmp_path / "list.txt").write_text("http://a.test/1,2.jpg\n\n  http://a.test/3.jpg \r\n")
    urls = read_url_list(f"file://{tmp_path}/list.txt")
    assert urls.table.to_pydict() == {"url": ["http://a.test/1,2.jpg", "http://a.test/3.jpg"]}
    assert not urls.has_captions


def list_of(tmp_path, columns, **options):
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table(columns), path)
    return read_url_list(str(path), **options)


def test_only_web_addresses_are_opened_and_each_once(tmp_path):
    """The standard library's opener, which img2dataset uses, reads local files as well."""
    addresses = ["file:///etc/passwd", None, "http://a.test/1", "ftp://a.test/1", "/etc/passwd", ""]
    again = ["HTTPS://a.test/2", " http://a.test/1\n", "HTTPS://a.test/2", "http://"]
    numbers = list(range(len(addresses + again)))
    urls = list_of(tmp_path, {"url": addresses + again, "number": numbers})
    assert urls.table.to_pydict() == {
        "url": ["http://a.test/1", "HTTPS://a.test/2"],
        "number": [2, 6],  # the first row of each
    }
    assert (urls.num_no_address, urls.num_duplicates) == (6, 2)


def test_metadata_becomes_what_json_has(tmp_path):
    """img2dataset writes a sample's metadata with `json.dumps`, and drops it when that fails."""
    odd = {
        "day": pa.array([datetime.date(2024, 5, 6)]),
        "when": pa.array([datetime.datetime(2024, 5, 6, 7, 8)]),
        "price": pa.array([decimal.Decimal("1.50")]),
        "data": pa.array([b"\xff\x00"]),
        "half": pa.array([1.5], pa.float32()).cast(pa.float16()),
        "nan": pa.array([float("nan")]),
        "inf": pa.array([float("-inf")]),
        "tags": pa.array([["a", "b"]]),
        "days": pa.array([[datetime.date(2024, 5, 6)]]),
        "site": pa.array(["x"]).dictionary_encode(),
        "nested": pa.array([{"day": datetime.date(2024, 5, 6)}]),
        "nothing": pa.nulls(1),
        "id": pa.array([2**63], pa.uint64()),
    }
    row = list_of(tmp_path, {"url": ["http://a.test/1"], **odd}).table.to_pylist()[0]
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row["day"], row["price"], row["half"]) == ("2024-05-06", "1.50", 1.5)
    assert (row["nan"], row["inf"], row["nothing"]) == (None, None, None)
    assert (row["tags"], row["site"], row["id"]) == (["a", "b"], "x", 2**63)


def test_columns_with_img2dataset_s_own_names_go_along_under_others(tmp_path):
    columns = {
        **{"url": ["http://wrong.test/1"], "URL": ["http://a.test/1"], "text": ["a"]},
        **{"width": [640], "list_width": [1], "status": ["fine"], "caption": [5]},
    }
    urls = list_of(tmp_path, columns, url_col="URL", caption_col="caption")
    assert urls.table.to_pylist() == [
        {
            **{"list_url": "http://wrong.test/1", "url": "http://a.test/1", "text": "a"},
            **{"list_width": 640, "list_list_width": 1, "list_status": "fine", "caption": "5"},
        }
    ]
    assert set(urls.other_columns) == set(urls.table.column_names) - {"url", "caption"}


def test_a_glob_of_files_is_one_list(tmp_path):
    for number, extra in enumerate([{"a": [1]}, {"b": ["x"]}]):
        columns = {"url": [f"http://a.test/{number}"], **extra}
        pq.write_table(pa.table(columns), tmp_path / f"part-{number}.parquet")
    urls = read_url_list(f"{tmp_path}/part-*.parquet")
    assert urls.table.to_pydict() == {
        "url": ["http://a.test/0", "http://a.test/1"],
        "a": [1, None],
        "b": [None, "x"],
    }
    before = urls.sha256
    assert read_url_list(f"{tmp_path}/part-*.parquet").sha256 == before
    pq.write_table(pa.table({"url": ["http://a.test/2"]}), tmp_path / "part-1.parquet")
    assert read_url_list(f"{tmp_path}/part-*.parquet").sha256 != before


def test_a_list_without_urls_says_what_it_has(tmp_path):
    with pytest.raises(UserError, match=r"link, TEXT; wanted url or URL.*--url-col"):
        list_of(tmp_path, {"link": ["http://a.test/1"], "TEXT": ["a"]})
    with pytest.raises(UserError, match=r"no column address.*--url-col out of url"):
        list_of(tmp_path, {"url": ["http://a.test/1"]}, url_col="address")
    with pytest.raises(UserError, match=r"no column words.*--caption-col out of url"):
        list_of(tmp_path, {"url": ["http://a.test/1"]}, caption_col="words")
    with pytest.raises(UserError, match=r"no http\(s\) address in 2 rows"):
        list_of(tmp_path, {"url": ["ftp://a.test/1", None]})


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("list.xlsx", b"", "not the name of a list"),
        ("list.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("list.json", b'{"url": {"0": "http://a.test"}}', "not a list of objects"),
        ("list.jsonl", b"{", "cannot be read as jsonl"),
        ("list.txt", b"\xff\xfe", "cannot be read as txt"),
        ("list.csv.gz", b"no gzip", "cannot be read as csv"),
        ("list.csv", b"", "cannot be read as csv"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_url_list(str(tmp_path / name))


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no list given.*make download LIST"):
        read_url_list("")
    for name, message in (("no.parquet", "no such file"), ("no*.parquet", "no file matches")):
        with pytest.raises(UserError, match=message):
            read_url_list(str(tmp_path / name))


MESSAGES = {
    "HTTP Error 404: Not Found": ("HTTP 404", False),
    "HTTP Error 403: Forbidden": ("HTTP 403", False),
    "HTTP Error 410: Gone": ("HTTP 410", False),
    "HTTP Error 501: Not Implemented": ("HTTP 501", False),
    "HTTP Error 404: timed out": ("HTTP 404", False),  # servers choose their words
    "HTTP Error 429: Too Many Requests": ("HTTP 429", True),
    "HTTP Error 503: Service Unavailable": ("HTTP 503", True),
    "HTTP Error 522: ": ("HTTP 522", True),
    "<urlopen error timed out>": ("timed out", True),
    "The read operation timed out": ("timed out", True),
    "<urlopen error [Errno 110] Connection timed out>": ("timed out", True),
    "<urlopen error _ssl.c:989: The handshake operation timed out>": ("timed out", True),
    "<urlopen error [Errno -2] Name or service not known>": ("no such host", True),
    "<urlopen error [Errno -3] Temporary failure in name resolution>": ("no such host", True),
    "[Errno 104] Connection reset by peer": ("connection broken", True),
    "Remote end closed connection without response": ("connection broken", True),
    "IncompleteRead(100 bytes read, 900 more expected)": ("connection broken", True),
    "<urlopen error [Errno 111] Connection refused>": ("host not reached", True),
    "<urlopen error [Errno 101] Network is unreachable>": ("host not reached", True),
    "<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>": (
        "certificate not valid",
        False,
    ),
    "Use of image disallowed by X-Robots-Tag directive": (OPTED_OUT, False),
    "'ascii' codec can't encode character": ("'ascii' codec can't encode character", False),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_what_may_pass(message):
    reason = reason_of("failed_to_download", message)
    assert (reason.text, reason.may_pass) == MESSAGES[message]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("image too small", "image too small"),
        ("aspect ratio too large", "aspect ratio too large"),
        ("Image decoding error", "not an image"),
        ("OpenCV(4.14.0) error: the decoder timed out", "not an image"),
        (None, "not an image"),
    ],
)
def test_an_image_that_was_fetched_and_is_no_good_does_not_get_better(message, text):
    reason = reason_of("failed_to_resize", message)
    assert (reason.text, reason.may_pass) == (text, False)


def attempts_at(*rows):
    names = ("url", "status", "error_message", "shard")
    arrays = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
    return pa.table(arrays, names=names)


def test_the_last_attempt_counts_and_attempts_are_bounded():
    failed, timeout = "failed_to_download", "timed out"
    outcomes = last_attempts(
        attempts_at(
            ("a", failed, timeout, "0"),
            ("b", failed, "HTTP Error 404: Not Found", "0"),
            ("c", failed, timeout, "0"),
            ("d", "success", None, "0"),
            ("e", failed, "disallowed by X-Robots-Tag", "0"),
            ("f", "failed_to_resize", timeout, "0"),
            ("a", "success", None, "1"),
            ("c", failed, "HTTP Error 503: no", "1"),
            ("g", failed, None, "1"),
        )
    )
    by_url = {row.pop("url"): row for row in outcomes.to_pylist()}
    assert {url: row["attempts"] for url, row in by_url.items()} == dict(
        a=2, b=1, c=2, d=1, e=1, f=1, g=1
    )
    assert by_url["a"]["status"] == "success"
    assert by_url["c"]["error_message"] == "HTTP Error 503: no"
    assert worth_another_attempt(outcomes, max_attempts=3).to_pylist() == ["c"]
    assert worth_another_attempt(outcomes, max_attempts=2).to_pylist() == []
    assert count_outcomes(outcomes) == {
        **{"success": 2, "HTTP 404": 1, "HTTP 503": 1, OPTED_OUT: 1},
        **{"not an image": 1, "no message": 1},
    }


def test_no_attempts_are_no_outcomes(tmp_path):
    outcomes = read_outcomes(tmp_path, [])
    assert outcomes.num_rows == 0
    assert not count_outcomes(outcomes)
    assert len(worth_another_attempt(outcomes, 3)) == 0


def write_shard(folder, name, stats='{"successes": 1}'):
    pq.write_table(attempts_at(("u", "success", None, "0")), folder / f"{name}.parquet")
    (folder / f"{name}.tar").write_bytes(b"tar")
    (folder / f"{name}_stats.json").write_text(stats)


def test_only_what_is_whole_is_left(tmp_path):
    """Every way in which files of a shard can be missing, empty or cut."""
    parts = (".tar", ".parquet", "_stats.json")
    states = list(itertools.product(["whole", "empty", "missing"], repeat=3))
    for number, state in enumerate(states):
        write_shard(tmp_path, f"{number:05d}")
        for part, how in zip(parts, state, strict=True):
            path = tmp_path / f"{number:05d}{part}"
            if how == "empty":
                path.write_bytes(b"")
            if how == "missing":
                path.unlink()
    write_shard(tmp_path, "00100", stats='{"successes": 1')
    write_shard(tmp_path, "100000")
    others = [tmp_path / "notes.txt", tmp_path / "mine.tar", tmp_path / "00001.tar.bak"]
    for path in others:
        path.write_text("not ours")
    left = {f"{shard}{part}" for shard in ("00000", "100000") for part in parts}
    for _ in range(2):
        assert remove_unfinished(tmp_path) == ["00000", "100000"]
        assert {path.name for path in tmp_path.iterdir()} == left | {path.name for path in others}


def test_a_finished_shard_without_an_image_has_no_tar(tmp_path):
    """Stage 1 would count it as a shard whose one row was dropped."""
    write_shard(tmp_path, "00000", stats='{"successes": 0}')
    for _ in range(2):
        assert remove_unfinished(tmp_path) == ["00000"]
        assert [path.name for path in sorted(tmp_path.iterdir())] == [
            "00000.parquet",
            "00000_stats.json",
        ]


def test_a_damaged_shard_is_named_with_the_remedy(tmp_path):
    write_shard(tmp_path, "00000")
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"00000\.parquet.*delete .*00000_stats\.json"):
        read_outcomes(tmp_path, remove_unfinished(tmp_path))

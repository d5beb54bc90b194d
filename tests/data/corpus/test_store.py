"""What was fetched is kept: nothing is fetched twice, nothing is lost but what a kill cut off, and every run sees the same documents."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from megatron.data.corpus import store as module
from megatron.data.corpus.store import Store
from megatron.data.indexed import DatasetError
from megatron.data.input.bad_input import BadInput, Kind, Problem
from megatron.data.input.reading import Record

TEXTS = [f"document {number} {'x' * (number % 13)}" for number in range(100)]


class Rows:
    """A stream of rows that counts what is read from it; `broken_at` is where its connection ends."""

    def __init__(self, rows: list[Any], broken_at: int | None = None) -> None:
        self.rows, self.broken_at = rows, broken_at
        self.start = self.read = 0

    def records(self) -> Iterator[Record]:
        for number, row in enumerate(self.rows[self.start :], start=self.start):
            if number == self.broken_at:
                raise DatasetError("the connection is gone")
            self.read += 1
            yield Record(f"rows:{number}", row)

    def position(self) -> Any:
        return {"row": self.start + self.read}

    def go_to(self, position: Any) -> None:
        self.start = position["row"]


def rows(texts: list[str]) -> list[Any]:
    return [{"text": text, "url": "u"} for text in texts]


def take(store: Store, count: int | None, on_problem: Any = pytest.fail) -> list[str]:
    with closing(store.documents(on_problem)) as documents:
        return [document.text for document in itertools.islice(documents, count)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 300)


def test_it_grows_as_more_is_asked_for_and_fetches_nothing_twice(tmp_path: Path) -> None:
    streams: list[Rows] = []

    def open_stream() -> Rows:
        streams.append(Rows(rows(TEXTS)))
        return streams[-1]

    store = Store(tmp_path / "store", ["rows"], open_stream, "text")
    assert take(store, 7) == TEXTS[:7]
    assert take(store, 7) == TEXTS[:7]
    assert len(streams) == 1, "nobody goes to the network for what is there"
    assert take(store, 50) == TEXTS[:50]
    assert (streams[-1].start, streams[-1].read) == (0, 50), "within a part, what was read is read over"
    assert take(store, 60) == TEXTS[:60]
    assert 40 < streams[-1].start <= 50, "from the last whole part on"
    assert take(store, None) == TEXTS
    count = len(streams)
    assert take(store, None) == TEXTS
    assert len(streams) == count
    assert sorted(path.name for path in store.folder.iterdir() if not path.name.startswith("part-")) == ["lock", "state.json"]
    store.restart()
    assert not store.folder.exists()
    assert take(store, 1) == TEXTS[:1]


def test_a_broken_connection_keeps_what_came(tmp_path: Path) -> None:
    streams = iter([Rows(rows(TEXTS), broken_at=33), Rows(rows(TEXTS), broken_at=33), Rows(rows(TEXTS))])
    store = Store(tmp_path / "store", ["rows"], lambda: next(streams), "text")
    for _ in range(2):
        with pytest.raises(DatasetError, match="the connection is gone"):
            take(store, None)
    assert take(store, 33) == TEXTS[:33]
    assert take(store, None) == TEXTS


def test_bad_rows_stop_every_run_or_are_left_out(tmp_path: Path) -> None:
    bad = [*rows(TEXTS[:20]), {"url": "u"}, {"text": None}, *rows(TEXTS[20:])]
    store = Store(tmp_path / "store", ["rows"], lambda: Rows(bad), "text")
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"rows:20: no key 'text'; the keys with text are: url"):
            take(store, None, BadInput("fail"))
    problems: list[Problem] = []
    assert take(store, None, problems.append) == TEXTS
    assert [(problem.kind, problem.where) for problem in problems] == [(Kind.NO_KEY, "rows:20"), (Kind.NOT_TEXT, "rows:21")]


def test_another_source_and_damage_are_explained(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", ["rows", None], lambda: Rows(rows(TEXTS)), "text")
    take(store, 30)
    with pytest.raises(
        DatasetError, match=r"store holds \['rows', None\], not \['other', None\]; --force-redownload replaces it, and another directory"
    ):
        take(Store(tmp_path / "store", ["other", None], lambda: Rows([]), "text"), 1)
    os.truncate(store.folder / "part-00000.jsonl.gz", 20)
    with pytest.raises(DatasetError, match=r"store is damaged: a part is missing or cut short; remove the folder, or .* --force-redownload"):
        take(store, 1)
    (store.folder / "state.json").write_text("{")
    with pytest.raises(DatasetError, match="store is damaged"):
        take(store, 1)


def test_a_full_disk_leaves_a_store_that_goes_on(tmp_path: Path, small_disk: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if small_disk is None:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    monkeypatch.setattr(module, "PART_BYTES", 200_000)
    noise = [os.urandom(20_000).hex() for _ in range(100)]  # of which gzip leaves half
    store = Store(small_disk / "store", ["rows"], lambda: Rows(rows(noise)), "text")
    with pytest.raises(OSError, match="No space left on device"):
        take(store, None)
    kept = sum(1 for path in store.folder.glob("part-*"))
    assert kept >= 2
    assert not list(store.folder.glob("*.partial"))
    assert take(store, 5 * kept) == noise[: 5 * kept]
    with pytest.raises(OSError, match="No space left on device"):
        take(store, None)
    assert take(store, 5 * kept) == noise[: 5 * kept]
    store.restart()


FETCH = """
    import sys, time
    from pathlib import Path
    from megatron.data.corpus import store as module
    from megatron.data.input.reading import Record
    module.PART_BYTES = 300
    class Slow:
        start = read = 0
        def records(self):
            for number in range(self.start, 100):
                time.sleep(0.01)
                self.read += 1
                yield Record(str(number), {"text": f"document {number} {'x' * (number % 13)}"})
        def position(self): return {"row": self.start + self.read}
        def go_to(self, position): self.start = position["row"]
    def fail(problem): raise SystemExit(str(problem))
    for document in module.Store(Path(sys.argv[1]), ["rows"], Slow, "text").documents(fail):
        print(document.text, flush=True)
"""


def test_killed_it_goes_on_and_meanwhile_nobody_else_fetches(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    opened: list[Rows] = []

    def open_stream() -> Rows:
        opened.append(Rows(rows(TEXTS)))
        return opened[-1]

    store = Store(folder, ["rows"], open_stream, "text")
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(FETCH), str(folder)], stdout=subprocess.PIPE, text=True)
    while len(list(folder.glob("part-*.gz"))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    with pytest.raises(DatasetError, match=r"another process is fetching into .*store right now; wait for it or choose another directory"):
        take(store, None)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = list(folder.glob("part-*.gz"))
    assert len(kept) >= 3
    assert take(store, None) == TEXTS
    assert opened[-1].start > 0
    assert not list(folder.glob("*.partial"))

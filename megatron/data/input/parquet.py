"""Rows of a parquet file, a few at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from megatron.data.input.bad_input import Kind, OnProblem, Problem
from megatron.data.input.compression import Damaged
from megatron.data.optional import import_optional

ROWS_AT_A_TIME = 256


def parquet_rows(file: IO[bytes], name: str, keys: Sequence[str] | None, on_problem: OnProblem) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:row N, row) for every row, from 1; only the columns `keys` are read (None: all).

    A file that lacks one of them is one problem, not one for each row. Raises Damaged, and DatasetError when pyarrow is not installed.
    """
    parquet = pyarrow_for(name)
    row = 0

    def place() -> str:
        return f"{name}:row {row + 1}" if row else f"{name}:byte {file.seek(0, io.SEEK_END)}"

    with naming_arrow_damage(place):
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
    missing = [key for key in keys or () if key not in columns]
    if missing:
        on_problem(
            Problem(Kind.NO_KEY, f"{name}:row 1", f"no column {missing[0]!r}; the columns are: {', '.join(columns)} (choose one with --jsonl-key)")
        )
        return
    batches = iter(table.iter_batches(ROWS_AT_A_TIME, columns=list(keys) if keys else None))
    while True:
        with naming_arrow_damage(place):
            batch = next(batches, None)
            values = batch.to_pylist() if batch is not None else None
        if values is None:
            return
        for value in values:
            row += 1
            yield f"{name}:row {row}", value


@contextmanager
def naming_arrow_damage(place: Callable[[], str]) -> Iterator[None]:
    """Turns what pyarrow raises (ValueErrors and OSErrors) into Damaged at `place()`; what the machine refused (an error with a number) passes.

    Nothing but pyarrow is called under it: DatasetError is a ValueError too, and would be called damage.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(Problem(Kind.DAMAGED, place(), f"the file is damaged or cut short ({reason})")) from None


def pyarrow_for(name: str) -> Any:
    sentence = f"{name}: reading .parquet files needs the package pyarrow (`pip install pyarrow`), version: requirements/requirements-corpora.txt"
    return import_optional("pyarrow.parquet", sentence)

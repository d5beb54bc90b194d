"""Rows of a parquet file, a few at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

from megatron.data.indexed import DatasetError
from megatron.data.input.bad_input import Kind, OnProblem, Problem
from megatron.data.input.compression import Damaged

ROWS_AT_A_TIME = 256


def parquet_rows(file: IO[bytes], name: str, keys: Sequence[str] | None, on_problem: OnProblem) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:row N, row) for every row, from 1; only the columns `keys` are read (None: all).

    A file that lacks one of them is one problem, not one for each row. Raises Damaged, and DatasetError when pyarrow is not installed.
    """
    parquet = pyarrow_for(name)
    row = 0
    try:
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        missing = [key for key in keys or () if key not in columns]
        if missing:
            on_problem(Problem(Kind.NO_KEY, f"{name}:row 1", f"no column {missing[0]!r}; it has: {', '.join(columns)} (--jsonl-key)"))
            return
        for batch in table.iter_batches(ROWS_AT_A_TIME, columns=list(keys) if keys else None):
            for value in batch.to_pylist():
                row += 1
                yield f"{name}:row {row}", value
    except (ValueError, OSError) as error:  # pyarrow's errors are of these two
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = f"{name}:row {row + 1}" if row else f"{name}:byte {file.seek(0, 2)}"
        raise Damaged(Problem(Kind.DAMAGED, where, f"the file is damaged or cut short ({reason})")) from None


def pyarrow_for(name: str) -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DatasetError(f"{name}: reading .parquet files needs the package pyarrow (`pip install pyarrow`)") from None

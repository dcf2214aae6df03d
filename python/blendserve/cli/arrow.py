"""pyarrow, where it is installed: for Parquet, and for data sets as `datasets` saves them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from blendserve.cli.batch_input import InputError

_ROWS_AT_ONCE = 256


def need_arrow(what: str) -> None:
    """Raises InputError with the way to install it, if it is not."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise InputError(f"{what} needs pyarrow: pip install 'blendserve[data]'") from error


def parquet_rows(path: Path, name: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Columns and rows of a Parquet file."""
    need_arrow(f"reading {name}")
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name} is no Parquet file that can be read: {error}") from error

    def rows() -> Iterator[dict[str, Any]]:
        try:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{name} is damaged: {error}") from error

    return list(file.schema_arrow.names), rows()


def dataset_rows(folder: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Columns and rows of a data set that `datasets.Dataset.save_to_disk` has written."""
    need_arrow(f"reading the data set {folder}")
    import pyarrow as pa

    try:
        files = orjson.loads((folder / "state.json").read_bytes())["_data_files"]
        paths = [folder / Path(entry["filename"]).name for entry in files]
        if not paths:
            return [], iter(())
        with pa.memory_map(str(paths[0])) as first:
            columns = list(pa.ipc.open_stream(first).schema.names)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is no data set that can be read: {error!r}") from error

    def rows() -> Iterator[dict[str, Any]]:
        for path in paths:
            try:
                with pa.memory_map(str(path)) as stream:
                    for batch in pa.ipc.open_stream(stream):
                        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                            yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{path} is damaged: {error}") from error

    return columns, rows()

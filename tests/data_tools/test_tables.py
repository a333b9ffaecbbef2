"""Which parquet files a place names."""

import pathlib

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_tools import ingest
from data_tools.dataset import Dataset
from phi1.errors import UserError


def test_a_folder_may_be_named_like_a_parquet_file(tmp_path: pathlib.Path) -> None:
    """As Spark and Dask write tables."""
    for i, name in enumerate(("a.parquet/part-0.parquet", "a.parquet/part-1.parquet", "b.parquet")):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pa.table({"content": [f"x = {i}"]}), tmp_path / "data" / name)
    (tmp_path / "data" / "a.parquet" / "_SUCCESS").touch()

    def run(name: str, place: pathlib.Path) -> Dataset:
        return ingest.run(ingest.Config(output=tmp_path / name, sources=(f"parquet:{place}",), workers=1))

    assert sorted(run("folder", tmp_path / "data").column("content")) == ["x = 0", "x = 1", "x = 2"]
    assert sorted(run("pattern", tmp_path / "data" / "*.parquet").column("content")) == ["x = 0", "x = 1", "x = 2"]
    assert sorted(run("one", tmp_path / "data" / "a.parquet").column("content")) == ["x = 0", "x = 1"]
    (tmp_path / "empty.parquet").mkdir()
    with pytest.raises(UserError, match="no parquet file there"):
        run("empty", tmp_path / "*.parquet")

"""A folder's name is a name, whatever a pattern would make of it."""

import json

import pandas as pd
import pytest

from cacheslide.errors import DataError
from harness.tasks import registry
from tests.helpers.places import DATA

DATA = DATA / "hotpotqa.jsonl"


@pytest.mark.fault("parquet_brackets")
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("name", ["plain", "data[1]", "data*x", "a?b", "[a-z]", "sp ace", "{x}", "~", "ünï", "**"])
def test_rows_are_read_from_a_folder_of_any_name(tmp_path, kind, name):
    folder = tmp_path / name
    folder.mkdir()
    (tmp_path / "data1").mkdir()
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    dataset, file = "hotpotqa", folder / f"validation.{kind}"
    if kind == "parquet":
        pd.DataFrame(rows).to_parquet(file)
    elif kind == "jsonl":
        file.write_text(DATA.read_text())
    else:
        pytest.skip("this data set nests lists, which csv cannot hold")
    for path in (file, folder):
        examples = list(registry.load(dataset, "validation", path=path, limit=2))
        assert len(examples) == 2


@pytest.mark.fault("parquet_brackets")
@pytest.mark.parametrize("split", ["te*", "[v]alidation", "v?lidation", "../plain/validation", "/etc", "**", "", "a/b"])
def test_a_split_is_a_name(tmp_path, split):
    (tmp_path / "validation.jsonl").write_text(DATA.read_text())
    with pytest.raises(DataError, match="no split"):
        list(registry.load("hotpotqa", split, path=tmp_path, limit=2))

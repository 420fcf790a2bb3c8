"""JSON that does not fit gives one sentence with the file and the field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from geneformer_fast.errors import OutputError
from geneformer_fast.files.schema import number, read_json, whole


@dataclass
class Shard:
    file: str
    n_cells: whole(0, 10)  # type: ignore[valid-type]
    share: number(0, 1, above=0) = 0.5  # type: ignore[valid-type]
    is_last: bool = False


@dataclass
class Folder:
    shards: list[Shard]
    name: str | None = None


@pytest.mark.parametrize(
    "content",
    [
        '{"shards": []}',
        '{"shards": [{"file": "a", "n_cells": 10, "share": 1}], "name": null}',
        '{"shards": [{"file": "a", "n_cells": 0, "is_last": true, "more": [1]}], "else": {}}',
    ],
)
def test_what_fits_comes_back_whole(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    found = read_json(path, OutputError, Folder)
    assert found["shards"] == [] or found["shards"][0]["file"] == "a"
    assert ("else" in content) == ("else" in found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("9" * 5_000, "cannot be read as JSON"),
        ("{}", "shards is missing"),
        ('{"shards": {}}', "shards is a JSON object; input should be a valid array"),
        ('{"shards": [3]}', r"shards\.0 is 3"),
        ('{"shards": [{"file": 1, "n_cells": 1}]}', r"shards\.0\.file is 1; input should be a valid string"),
        ('{"shards": [{"file": "a", "n_cells": 11}]}', "less than or equal to 10"),
        ('{"shards": [{"file": "a", "n_cells": 1e30}]}', r"shards\.0\.n_cells"),
        ('{"shards": [{"file": "a", "n_cells": true}]}', "is true; input should be a valid integer"),
        ('{"shards": [{"file": "a", "n_cells": "3"}]}', "valid integer"),
        ('{"shards": [{"file": "a", "n_cells": 1.5}]}', "integer"),
        ('{"shards": [{"file": "a", "n_cells": 1, "share": 0}]}', "greater than 0"),
        ('{"shards": [{"file": "a", "n_cells": 1, "share": 1e999}]}', "share"),
        ('{"shards": [{"file": "a", "n_cells": 1, "share": "0.5"}]}', "valid number"),
        ('{"shards": [{"file": "a", "n_cells": 1, "is_last": "false"}]}', "valid boolean"),
        ('{"shards": [], "name": ' + '"x"' * 0 + "7}", "name is 7; input should be a valid string"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(OutputError, match=message) as caught:
        read_json(path, OutputError, Folder)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such file"):
        read_json(tmp_path / "a.json", OutputError)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(OutputError, match="cannot be read as JSON"):
        read_json(tmp_path / "b.json", OutputError)
    with pytest.raises(OutputError, match="cannot be read"):
        read_json(tmp_path, OutputError)

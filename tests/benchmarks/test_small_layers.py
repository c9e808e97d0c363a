"""Small layers: every row has its numbers, of layers that are right."""

import json


def test_every_row_is_measured(load, tmp_path, monkeypatch) -> None:
    module = load("small_layers")
    monkeypatch.setattr(module, "LAYERS", module.LAYERS[-3:-1])
    rows = module.main(["--repeats", "3", "--json", str(tmp_path / "small_layers.json")])
    assert [(row["network"], row["format"]) for row in rows] == [
        *[("EdgeFace", "contiguous"), ("EdgeFace", "channels_last")],
        *[("CFSR", "contiguous"), ("CFSR", "channels_last")],
    ]
    assert all(row["native"] > 0 and row["converted"] > -row["native"] for row in rows)
    assert json.loads((tmp_path / "small_layers.json").read_text())["rows"] == rows

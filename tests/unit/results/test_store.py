import json
import shutil

import numpy as np
import pyarrow.parquet as parquet
import pytest
import xarray as xr
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from causalpatch.base.errors import ResultsNotFound, StoreCorrupt, UnsupportedError
from causalpatch.results import store
from causalpatch.results.effects import Effects

ODD_TOKENS = ["The\x00", " cat", "", "\n", "日本", "\ud800", "(varies)"]


def same_bits(left, right):
    xr.testing.assert_identical(left.to_xarray(), right.to_xarray())
    for name, array in left.to_xarray().variables.items():
        other = right.to_xarray().variables[name]
        assert (array.dtype, array.dims) == (other.dtype, other.dims)
        if array.dtype.kind == "f":
            assert array.values.tobytes() == other.values.tobytes()
    assert left.provenance == right.provenance


@pytest.fixture
def effects(make):
    status = np.zeros((2, 7, 12), int)
    status[0, 0], status[1, 2, 5] = 4, 3
    rng = np.random.default_rng(0)
    return make(
        {"layer": [3, 4], "position": range(7)},
        rng.normal(size=(2, 7)),
        n_pairs=12,
        status=status,
        labels={"position": ODD_TOKENS},
        positions=rng.integers(-1, 9, (12, 7, 2)),
        provenance={"cost": {"forwards": 12, "seconds": 0.1}, "facts": {"direction": "denoise"}},
    )


def test_a_round_trip_changes_no_bit(effects, tmp_path):
    assert effects.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    same_bits(effects, Effects.load(tmp_path / "new" / "folder"))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "data-00000.parquet",
        "manifest.json",
        "pairs.parquet",
    ]


@given(
    values=hnp.arrays(np.float64, (2, 2, 3, 4), elements=st.floats(allow_nan=False, allow_infinity=False)),
    status=hnp.arrays(np.uint8, (2, 3, 4), elements=st.integers(0, 5)),
    order=st.permutations(["head", "layer"]),
)
def test_any_numbers_statuses_and_order_of_axes_come_back(tmp_path_factory, values, status, order):
    sizes = dict(zip(order, (2, 3), strict=True))
    effects = Effects.build(
        axes={axis: range(10, 10 + size) for axis, size in sizes.items()},
        pair_ids=["b", "a", "", "\N{SNOWMAN}"],
        groups=np.array([7, 7, -1, 2**40]),
        metrics=["first", "second"],
        values=values,
        status=status,
        baselines={"clean": values[:, 0, 0] + 1.0, "corrupt": values[:, 0, 0], "source": -values[:, 0, 0]},
    )
    folder = tmp_path_factory.mktemp("store")
    effects.save(folder)
    found = Effects.load(folder)
    same_bits(effects, found)
    assert found.axes == tuple(order)
    shutil.rmtree(folder)


def test_interventions_are_named_by_their_texts(make, tmp_path):
    effects = make({"intervention": ["z.0.1@-1", "z.0.2@-1 + z.1.0@-1"]}, [0.1, 0.2])
    effects.save(tmp_path)
    same_bits(effects, Effects.load(tmp_path))
    assert effects.dims == ("intervention", "pair")


def test_many_rows_are_split_over_shards(effects, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROWS_PER_SHARD", 50)
    effects.save(tmp_path)
    shards = sorted(tmp_path.glob("data-*.parquet"))
    assert [parquet.read_metadata(path).num_rows for path in shards] == [50, 50, 50, 18]
    same_bits(effects, Effects.load(tmp_path))


def test_a_shard_is_a_long_table_that_others_can_read(effects, tmp_path):
    effects.save(tmp_path)
    table = parquet.read_table(tmp_path / "data-00000.parquet").to_pandas()
    assert list(table.columns) == ["metric_name", "layer", "position", "pair", "metric", "status"]
    row = table[(table.layer == 4) & (table.position == 1) & (table.pair == "p3")].iloc[0]
    assert row["metric"] == effects.to_xarray()["metric"].sel(layer=4, position=1, pair="p3").item()
    assert row["status"] == 0


@pytest.mark.parametrize("name", ["data-00000.parquet", "pairs.parquet"])
def test_a_changed_file_is_found_out(effects, tmp_path, name):
    effects.save(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(bytes(content))
    with pytest.raises(StoreCorrupt) as caught:
        Effects.load(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f"the effects in '{tmp_path}' cannot be trusted: the file '{name}' was changed after it was written"
    )
    assert lines[-1] == "  fix: run the sweep again"


def test_a_missing_file_is_found_out(effects, tmp_path):
    effects.save(tmp_path)
    (tmp_path / "data-00000.parquet").unlink()
    with pytest.raises(StoreCorrupt, match=r"the file 'data-00000\.parquet' is missing"):
        Effects.load(tmp_path)


def test_a_changed_manifest_is_found_out(effects, tmp_path):
    effects.save(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["provenance"]["direction"] = "noise"
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreCorrupt, match=r"'manifest\.json' was changed"):
        Effects.load(tmp_path)
    path.write_text(json.dumps(manifest)[:-20])
    with pytest.raises(StoreCorrupt, match=r"'manifest\.json' is not JSON"):
        Effects.load(tmp_path)
    path.write_text("[]")
    with pytest.raises(StoreCorrupt, match="does not describe effects"):
        Effects.load(tmp_path)


def test_another_format_is_named(effects, tmp_path):
    effects.save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(UnsupportedError) as caught:
        Effects.load(tmp_path)
    assert "another format" in str(caught.value)
    assert "99" in str(caught.value)


def test_a_folder_without_a_manifest_holds_no_effects(tmp_path):
    with pytest.raises(ResultsNotFound) as caught:
        Effects.load(tmp_path)
    assert str(caught.value) == (
        f"no saved effects in '{tmp_path}'\n"
        "  looked for  manifest.json\n"
        "  found       the folder is there\n"
        "  fix: name the folder that effects.save(folder) wrote"
    )
    with pytest.raises(ResultsNotFound, match="no saved effects"):
        Effects.load(tmp_path / "nowhere")


def test_saving_again_replaces_the_older_effects_and_leaves_other_files(effects, make, tmp_path):
    (tmp_path / "heat.svg").write_text("<svg/>")
    effects.save(tmp_path)
    newer = make({"layer": [0]}, [0.5])
    newer.save(tmp_path)
    same_bits(newer, Effects.load(tmp_path))
    assert len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "heat.svg").read_text() == "<svg/>"


@pytest.mark.parametrize("n_files_written", [0, 1, 2])
def test_a_save_that_is_cut_short_leaves_what_was_there(effects, make, tmp_path, monkeypatch, n_files_written):
    effects.save(tmp_path)
    put, calls = store._put, []

    def break_off(path, write_to):
        calls.append(path)
        if len(calls) > n_files_written:
            raise KeyboardInterrupt
        put(path, write_to)

    monkeypatch.setattr(store, "_put", break_off)
    with pytest.raises(KeyboardInterrupt):
        make({"layer": [0]}, [0.5]).save(tmp_path)
    same_bits(effects, Effects.load(tmp_path))


def test_half_a_file_never_gets_a_name(effects, tmp_path, monkeypatch):
    def write_half(table, path):
        path.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", write_half)
    with pytest.raises(OSError, match="No space left"):
        effects.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ResultsNotFound):
        Effects.load(tmp_path)

"""Shards that are torn, changed, copied or gone: each is found, and measured again, and nothing else is."""

import random
import shutil
from dataclasses import replace

import pytest

from causalpatch.base.errors import StoreCorrupt, StoreFull
from causalpatch.studies import objects
from causalpatch.studies.opened import Opened
from causalpatch.studies.results import Results
from causalpatch.studies.shards import decode, encode
from causalpatch.studies.store import Store
from causalpatch.studies.verifying import verify
from small_studies import measured, run_in, same, study_of, the_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_in(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "here")
    return tmp_path / "here"


def files_of(folder, kind):
    return sorted((folder / "store" / "runs" / the_run(folder).hash / kind).iterdir())


def truncate(path, draw):
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def flip(path, draw):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


def delete(path, draw):
    path.unlink()


def put_another_s(path, draw):
    """Let the file hold what another one does; without another one it is gone."""
    others = [each.read_bytes() for each in path.parent.iterdir() if each != path]
    path.write_bytes(draw.choice(others)) if others else path.unlink()


HARM = (truncate, flip, delete, put_another_s)


@pytest.mark.parametrize("kind", ["shards", "entries"])
@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_a_harmed_shard_is_found_and_measured_again(folder, undisturbed, kind, harm):
    run, path = the_run(folder), files_of(folder, kind)[1]
    harm(path, random.Random(0))
    if not (kind == "entries" and harm is delete):  # that is a shard that was never finished
        assert len(dict(run.damaged())) == 1
    assert not Results(run).is_whole("heads")
    with pytest.raises(StoreCorrupt):
        Results(run).load("heads")
    found, told = run_in(folder)
    assert len(measured(told)) == 1
    assert same(found.results["heads"], undisturbed)
    assert dict(the_run(folder).damaged()) == {}


def test_a_copy_of_a_shard_is_part_of_nothing(folder):
    path = files_of(folder, "shards")[0]
    shutil.copy(path, path.with_name("copy.parquet"))
    found = verify(the_run(folder), None)
    assert found.unclaimed == ["copy.parquet"]
    assert found.is_sound


@pytest.mark.parametrize("kind", ["calls", "pairs", "results", "manifest.json"])
@pytest.mark.parametrize("harm", [truncate, flip, delete], ids=lambda harm: harm.__name__)
def test_what_says_how_shards_belong_together_is_written_anew(folder, undisturbed, kind, harm):
    place = folder / "store" / "runs" / the_run(folder).hash / kind
    harm(place if place.is_file() else files_of(folder, kind)[0], random.Random(1))
    is_known = not (kind == "results" and harm is delete)  # that is a step that was never finished
    assert verify(the_run(folder), None).is_sound is not is_known
    found, told = run_in(folder)
    assert measured(told) == []
    assert same(found.results["heads"], undisturbed)
    assert verify(the_run(folder), Opened(study_of(), folder), n_cells=2).is_sound
    assert same(Results(the_run(folder)).load("heads"), undisturbed)


def test_a_session_s_record_that_was_harmed_is_told(folder):
    path = files_of(folder, "sessions")[0]
    flip(path, random.Random(0))
    assert list(verify(the_run(folder), None).damaged) == [f"sessions/{path.name}"]


def test_without_its_manifest_a_run_is_still_that_of_its_model(folder, monkeypatch):
    delete(folder / "store" / "runs" / the_run(folder).hash / "manifest.json", None)
    with monkeypatch.context() as patch:
        patch.setattr(Opened, "facts", lambda self: {"model": "another", "pairs": "the same"})
        with pytest.raises(StoreCorrupt, match="was begun with other model"):
            run_in(folder)
    run_in(folder)
    assert verify(the_run(folder), None).is_sound


def harm_at_random(folder, draw, n_times):
    for _ in range(n_times):
        kinds = [kind for kind in ("shards", "entries", "calls", "pairs", "results") if files_of(folder, kind)]
        draw.choice(HARM)(draw.choice(files_of(folder, draw.choice(kinds))), draw)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_harmed_is_found(folder, undisturbed, seed):
    draw = random.Random(seed)
    harm_at_random(folder, draw, n_times=draw.randrange(1, 4))
    found, _ = run_in(folder)
    assert same(found.results["heads"], undisturbed)
    assert verify(the_run(folder), None).is_sound


def test_verification_measures_cells_again_and_sees_a_number_that_the_model_does_not_give(folder):
    opened = Opened(study_of(), folder)
    found = verify(the_run(folder), opened, n_cells=5)
    assert found.is_sound
    assert found.n_cells == 5
    assert found.n_runs == 5 * 6
    assert found.largest < 0.1

    run = the_run(folder)
    key = run.keys()[0]
    data, entry = run.read(key)
    changed = bytearray(data)
    number = decode(key, data, entry).values.ravel()[0]
    changed[data.find(number.tobytes()) + 6] ^= 0x10  # a bit of its exponent
    run.write(key, bytes(changed), entry["about"])  # a checksum that is right, over a number that is not
    off = verify(run, opened, n_cells=8)
    assert not off.damaged
    assert any("measured again" in each for each in off.off)


CIRCUIT = (
    "steps=[{kind: attribute, name: scores, method: eap}, {kind: attribute, name: nodes, site: z, method: ig},"
    " {kind: evaluate, from: scores, n_random: 1}]",
    "shards={runs: 60}",
)


@pytest.mark.parametrize("harm", [truncate, flip, delete], ids=lambda harm: harm.__name__)
def test_arrays_of_a_call_that_were_harmed_are_written_anew(tmp_path, harm):
    first, _ = run_in(tmp_path, *CIRCUIT)
    path = next(each for each in files_of(tmp_path, "calls") if each.suffix == ".npz")
    harm(path, random.Random(0))
    damaged = verify(first.run, Opened(study_of(*CIRCUIT), tmp_path), n_cells=40).damaged
    assert f"calls/{path.name}" in damaged
    _, told = run_in(tmp_path, *CIRCUIT)
    assert measured(told) == []
    assert verify(first.run, Opened(study_of(*CIRCUIT), tmp_path), n_cells=40).is_sound


def test_scores_and_sets_of_edges_are_measured_again_too(tmp_path):
    found, _ = run_in(tmp_path, *CIRCUIT)
    run, opened = found.run, Opened(study_of(*CIRCUIT), tmp_path)
    whole = verify(run, opened, n_cells=400)
    assert whole.is_sound, whole.off
    assert whole.n_unknown == 0
    assert whole.n_cells == 400
    kinds = {
        Results(run).call(name)["work"]["kind"]
        for each in Results(run).names()
        for name in Results(run).record(each)["calls"]
    }
    assert kinds == {"scores of edges", "scores of nodes", "edges"}
    keys = run.keys()
    for key in keys:
        data, entry = run.read(key)
        numbers = decode(key, data, entry)
        changed = replace(numbers, values=numbers.values * 1.1)
        run.write(key, encode(key, changed, ["logit_difference"]), entry["about"])
    assert {each.split(" ")[0] for each in verify(run, opened, n_cells=400).off} >= {"score", "set"}


def test_a_state_that_was_harmed_is_begun_anew(tmp_path):
    run = the_run_of_states(tmp_path)
    run.keep("a", b"one")
    run.keep("a", b"two")
    run.keep("b", b"other")
    assert run.recall("a") == b"two"
    assert run.states() == ["a", "b"]
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and "states" in path.parts]
    assert len(files) == 4  # what was kept before is taken away
    for path in files:
        whole = path.read_bytes()
        flip(path, random.Random(0))
        assert run.recall("a" if path.name.startswith("a") else "b") is None
        path.write_bytes(whole)
    assert run.recall("nothing") is None


def the_run_of_states(folder):
    store = Store(str(folder / "store"))
    store.create()
    return store.run_of_hash("0" * 16)


def test_a_store_that_is_full_says_so_and_goes_on_when_there_is_room(tmp_path, undisturbed, monkeypatch):
    real, room = objects.os.fsync, [6]

    def full_after_a_while(file):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(objects.errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(objects.os, "fsync", full_after_a_while)
    with pytest.raises(StoreFull, match="is full"):
        run_in(tmp_path)
    kept = len(the_run(tmp_path).keys())
    assert 0 < kept < 3
    monkeypatch.setattr(objects.os, "fsync", real)
    found, told = run_in(tmp_path)
    assert len(measured(told)) == 3 - kept
    assert same(found.results["heads"], undisturbed)

"""A store behind S3, on a real server of this machine that is killed and started again."""

import importlib.util
import random
import threading
import time

import pytest

import causalpatch as cp
from causalpatch.studies.leases import Leases
from causalpatch.studies.objects import open_objects
from causalpatch.studies.results import Results
from causalpatch.studies.standing import last_journal, listed
from causalpatch.studies.store import Store
from causalpatch.studies.verifying import verify
from moto_server import BUCKET, MotoServer
from small_studies import measured, run_in, same, study_of

MISSING = [name for name in ("s3fs", "moto", "flask") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.enable_socket,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install 'causalpatch[dev]')"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = MotoServer(tmp_path_factory.mktemp("moto"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def address(server, monkeypatch, request):
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.mark.slow
def test_objects_are_whole_and_a_name_is_taken_once(address):
    place = open_objects(address)
    assert place.get("a/1") is None
    place.put("a/1", b"one")
    assert place.get("a/1") == b"one"
    assert place.put_new("a/2", b"mine")
    assert not place.put_new("a/2", b"yours")
    assert place.put_new("a/2", b"mine")
    assert place.names("a") == ["1", "2"]
    assert place.names("b") == []
    place.delete("a/1")
    place.delete("a/1")
    assert place.names("a") == ["2"]


@pytest.mark.slow
def test_of_two_runs_one_gets_a_lease(address):
    mine, yours = (Leases(open_objects(address), "leases") for _ in range(2))
    assert mine.take("a")
    assert not yours.take("a")
    mine.close()
    assert yours.take("a")
    yours.close()


def test_a_study_gives_the_numbers_of_a_folder_and_resumes(address, tmp_path, undisturbed):
    store = f"store={address}"
    found, told = run_in(tmp_path, store)
    assert len(measured(told)) == 3
    assert same(found.results["heads"], undisturbed)
    again, told = run_in(tmp_path, store)
    assert measured(told) == []
    assert same(again.results["heads"], undisturbed)
    (row,) = listed(Store(address))
    assert (row["shards"], row["sessions"], row["finished"]) == (3, 2, 1)
    assert last_journal(found.run)[-1]["event"] == "finished"


@pytest.mark.slow
def test_what_is_harmed_in_an_object_store_is_found(address, tmp_path, undisturbed):
    found, _ = run_in(tmp_path, f"store={address}")
    run = found.run
    key = run.keys()[1]
    data, entry = run.read(key)
    changed = bytearray(data)
    changed[random.Random(0).randrange(len(data))] ^= 1
    run.objects.put(run.name("shards", entry["file"]), bytes(changed))
    assert list(verify(run, None).damaged) == [key, "heads"]
    again, told = run_in(tmp_path, f"store={address}")
    assert measured(told) == [key]
    assert same(again.results["heads"], undisturbed)


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_costs_time_alone(server, address, tmp_path, undisturbed):
    told, away = [], []

    def kill(line):
        told.append(line)
        if line["event"] == "shard" and not away:
            server.kill()
            away.append(threading.Thread(target=lambda: (time.sleep(1.0), server.start())))
            away[0].start()

    found = cp.run_study(study_of(f"store={address}"), tmp_path, listeners=(kill,))
    away[0].join()
    assert same(found.results["heads"], undisturbed)
    again, later = run_in(tmp_path, f"store={address}")
    assert measured(later) == []
    assert same(Results(again.run).load("heads"), undisturbed)

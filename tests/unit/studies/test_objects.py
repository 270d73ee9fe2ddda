"""Objects of a store: whole or not there, in a folder and behind fsspec."""

import errno
import os
import platform
import resource
import subprocess
import sys
import threading

import pytest

import causalpatch as cp
from causalpatch.base.errors import StoreFull, StoreUnreachable
from causalpatch.studies import objects
from causalpatch.studies.objects import Folder, Remote, open_objects
from causalpatch.studies.store import Store
from small_studies import measured, run_in, same, study_of


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    return open_objects(str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}")


def test_what_is_put_is_got(place):
    assert place.get("a/b.bin") is None
    place.put("a/b.bin", b"one")
    place.put("a/b.bin", b"two")
    assert place.get("a/b.bin") == b"two"
    assert place.names("a") == ["b.bin"]
    assert place.names("nothing") == []
    place.delete("a/b.bin")
    place.delete("a/b.bin")
    assert place.get("a/b.bin") is None


def test_of_two_that_want_a_name_one_gets_it(place):
    assert place.put_new("a/1", b"mine")
    assert not place.put_new("a/1", b"yours")
    assert place.get("a/1") == b"mine"
    assert place.put_new("a/1", b"mine")  # an answer that was lost, asked for again


def test_of_many_that_want_a_name_at_once_one_gets_it(tmp_path):
    place, got = Folder(tmp_path), []
    gate = threading.Barrier(8)

    def want(number):
        gate.wait()
        if place.put_new("name", str(number).encode()):
            got.append(number)

    threads = [threading.Thread(target=want, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert place.get("name") == str(got[0]).encode()
    assert len(got) == 1


def test_files_that_cannot_have_two_names_are_written_once_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    place = Folder(tmp_path)
    assert place.put_new("name", b"mine")
    assert not place.put_new("name", b"yours")


def test_what_was_being_written_when_the_machine_stopped_is_no_object_and_is_taken_away(tmp_path):
    mine = tmp_path / f".b.bin.{platform.node()}.{os.getpid()}.0{objects.PARTIAL}"
    dead = tmp_path / f".b.bin.{platform.node()}.4194300.0{objects.PARTIAL}"
    other = tmp_path / f".b.bin.another-host.4194300.0{objects.PARTIAL}"
    inside = tmp_path / "runs" / dead.name
    inside.parent.mkdir()
    for path in (mine, dead, other, inside):
        path.write_bytes(b"tor")
    assert Folder(tmp_path).names("") == ["runs"]
    Folder(tmp_path).tidy("", deeply=False)
    assert sorted(tmp_path.iterdir()) == sorted([mine, other, inside.parent])
    assert inside.exists()
    Folder(tmp_path).tidy("")
    assert not inside.exists()


def test_a_store_that_was_being_marked_when_its_machine_stopped_is_left_tidy(tmp_path):
    dead = tmp_path / f".store.json.{platform.node()}.4194300.0{objects.PARTIAL}"
    dead.write_bytes(b"tor")
    Store(str(tmp_path)).create()
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_to_be_and_leaves_no_half_file(tmp_path, monkeypatch, code):
    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFull, match="is full"):
        Folder(tmp_path).put("a/b", b"one")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_limit_on_the_size_of_files_is_a_full_store(tmp_path):
    code = (
        "import resource, sys\n"
        "from causalpatch.base.errors import StoreFull\n"
        "from causalpatch.studies.objects import Folder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"place = Folder(__import__('pathlib').Path({str(tmp_path)!r}))\n"
        "place.put('small', bytes(900))\n"
        "try:\n    place.put('large', bytes(2000))\n"
        "except StoreFull:\n    print('full', place.names(''))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "full ['small']\n"
    assert resource.RLIMIT_FSIZE is not None


def test_a_server_that_answers_after_a_while_was_only_slow(monkeypatch):
    place, tries = Remote("memory://slow", patience_s=5), []
    monkeypatch.setattr(objects.time, "sleep", tries.append)
    whole = place._files.cat_file

    def late(path):
        if len(tries) < 3:
            raise ConnectionError("refused")
        return whole(path)

    place.put("a", b"one")
    monkeypatch.setattr(place._files, "cat_file", late)
    assert place.get("a") == b"one"
    assert len(tries) == 3


def test_a_server_that_never_answers_is_unreachable(monkeypatch):
    place = Remote("memory://gone", patience_s=0.01)
    monkeypatch.setattr(place._files, "cat_file", lambda _: (_ for _ in ()).throw(ConnectionError("refused")))
    with pytest.raises(StoreUnreachable, match="does not answer"):
        place.get("a")


def test_an_error_of_our_own_is_not_asked_again(monkeypatch):
    place = Remote("memory://wrong", patience_s=5)
    monkeypatch.setattr(place._files, "cat_file", lambda _: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        place.get("a")


def test_a_study_outlives_a_server_that_is_away_for_a_while(tmp_path, undisturbed, monkeypatch):
    """The small version of the test with a real server that is killed and started again."""
    address, away = f"memory://{tmp_path.name}", []
    files = type(Remote(address, 1)._files)
    monkeypatch.setattr(objects.time, "sleep", lambda _: away.pop() if away else None)

    def refusing(name):
        whole = getattr(files, name)

        def ask(self, *given, **more):
            if away:
                raise ConnectionError("refused")
            return whole(self, *given, **more)

        monkeypatch.setattr(files, name, ask)

    for name in ("cat_file", "pipe_file", "ls", "rm_file"):
        refusing(name)
    told = []

    def leave(line):
        told.append(line)
        if line["event"] == "shard" and len(measured(told)) == 1:
            away.extend([None] * 6)

    found = cp.run_study(study_of(f"store={address}"), tmp_path, listeners=(leave,))
    assert not away
    assert same(found.results["heads"], undisturbed)
    assert measured(run_in(tmp_path, f"store={address}")[1]) == []

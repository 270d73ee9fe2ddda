"""What stores and workers of studies refuse, in the house's form."""

import os
import sys

import pytest

import causalpatch as cp
from causalpatch.base import errors
from causalpatch.studies import clusters, objects
from causalpatch.studies.checking import check
from causalpatch.studies.clusters import Cluster
from causalpatch.studies.executors import Post
from causalpatch.studies.objects import Folder, Remote, open_objects
from causalpatch.studies.opened import Opened
from causalpatch.studies.reading import parse_study
from causalpatch.studies.scheduling import Crewed, Gone, Ready
from causalpatch.studies.sealed import seal
from causalpatch.studies.shards import Request, Setting
from causalpatch.studies.store import Store
from causalpatch.studies.study import ExecutorPart, ModelPart
from causalpatch.studies.works import Patched
from small_studies import PLAIN


def test_a_store_of_another_study(refuses, tmp_path):
    store = Store(str(tmp_path / "store"))
    other, study = parse_study(PLAIN, "a.yaml"), parse_study(PLAIN, "a.yaml", ["direction=noise", "name=mine"])
    store.run_of(other).begin(other, {})
    with refuses(
        errors.ResultsNotFound,
        f"""
        the store 'TMP/store' holds no run of this study
          study  'mine', {study.hash}
          there  1, the nearest {other.hash}, with another direction
          fix: causalpatch run makes it, or undo the change to the study
        """,
    ):
        store.require(study)


def test_a_run_that_was_begun_with_other_pairs(refuses, tmp_path):
    store, study = Store(str(tmp_path / "store")), parse_study(PLAIN, "a.yaml")
    store.run_of(study).begin(study, {"pairs": "one"})
    with refuses(
        errors.StoreCorrupt,
        f"""
        run {study.hash} was begun with other pairs of the same name
          pairs  then one, now two
          fix: bring them back, or name another store: --set store=FOLDER
        """,
    ):
        store.run_of(study).begin(study, {"pairs": "two"})


def test_a_folder_of_something_else(refuses, tmp_path):
    (tmp_path / "thesis.tex").write_text("…", encoding="utf-8")
    with refuses(
        errors.StoreCorrupt,
        """
        'TMP' is no store of studies
          holds  thesis.tex
          lacks  store.json
          fix: name a folder that is empty, or not there yet: --set store=FOLDER
        """,
    ):
        Store(str(tmp_path))


@pytest.mark.parametrize("place", ["thesis.tex", "thesis.tex/store"])
def test_a_file_in_place_of_a_store(refuses, tmp_path, place):
    (tmp_path / "thesis.tex").write_text("…", encoding="utf-8")
    with refuses(
        errors.StoreUnreachable,
        f"""
        'TMP/{place}' cannot be the folder of a store
          is a file  TMP/thesis.tex
          fix: name another folder: --set store=FOLDER
        """,
    ):
        Store(str(tmp_path / place))


def test_a_store_of_a_later_version(refuses, tmp_path):
    (tmp_path / "store.json").write_bytes(seal("causalpatch store", {"schema": 9}))
    with refuses(
        errors.UnsupportedError,
        """
        the store 'TMP' was written by a later version
          schema              9
          this version reads  1
          fix: pip install --upgrade causalpatch
        """,
    ):
        Store(str(tmp_path))


def test_a_full_store(refuses, tmp_path, monkeypatch):
    def full(_):
        raise OSError(objects.errno.ENOSPC, os.strerror(objects.errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with refuses(
        errors.StoreFull,
        """
        the store 'TMP' is full
          error  OSError: No space left on device
          kept   every shard that was finished
          fix: make room, and run the study again
        """,
    ):
        Folder(tmp_path).put("a", b"one")


def test_a_store_that_does_not_answer(refuses, monkeypatch):
    place = Remote("memory://nowhere", patience_s=0.0)

    def refused(_):
        raise ConnectionRefusedError("connect to 10.0.0.1")

    monkeypatch.setattr(place._files, "cat_file", refused)
    with refuses(
        errors.StoreUnreachable,
        """
        the store 'memory://nowhere' does not answer
          error  ConnectionRefusedError: connect to 10.0.0.1
          fix: start the server, and run the study again
        """,
    ):
        place.get("a")
    monkeypatch.undo()
    assert place.get("a") is None
    monkeypatch.setattr(place._files, "cat_file", refused)
    with refuses(
        errors.StoreUnreachable,
        """
        the store 'memory://nowhere' does not answer
          error  ConnectionRefusedError: connect to 10.0.0.1
          kept   every shard that was finished
          fix: start the server, and run the study again
        """,
    ):
        place.get("a")


class NoCredentialsError(Exception):
    """Named as that of the client."""


@pytest.mark.parametrize(
    ("error", "said", "fix"),
    [
        (
            NoCredentialsError("Unable to locate credentials"),
            "NoCredentialsError: Unable to locate credentials",
            "give credentials, such as AWS_ACCESS_KEY_ID",
        ),
        (
            FileNotFoundError("The specified bucket does not exist"),
            "FileNotFoundError: The specified bucket does not exist",
            "make the bucket, or name another one: --set store=…",
        ),
        (
            PermissionError("Forbidden"),
            "PermissionError: Forbidden",
            "give this machine the right to read and write it",
        ),
    ],
)
def test_what_waiting_does_not_change_is_not_waited_for(refuses, monkeypatch, error, said, fix):
    place = Remote("memory://b/p", patience_s=3600.0)
    asked = []

    def refused(*_):
        asked.append(1)
        raise error

    monkeypatch.setattr(place._files, "pipe_file", refused)
    with refuses(
        errors.StoreUnreachable,
        f"""
        the store 'memory://b/p' does not answer
          error  {said}
          fix: {fix}
        """,
    ):
        place.put("a", b"1")
    assert len(asked) == 1


def test_an_address_that_is_none(refuses):
    with refuses(
        errors.StoreUnreachable,
        """
        'nonsense://a' is no address of a store
          error  Protocol not known: nonsense
          fix: name a folder, or such as s3://bucket/place
        """,
    ):
        open_objects("nonsense://a")


def test_an_address_whose_package_is_missing(refuses, monkeypatch):
    monkeypatch.setitem(objects._DOORS, "s3", "a_package_that_is_not_there")
    with refuses(
        errors.MissingExtra,
        """
        the package 'a_package_that_is_not_there' is not installed
          fix: pip install a_package_that_is_not_there
        """,
    ):
        open_objects("s3://bucket/place")


class _Dying:
    """Workers that die of whatever they are given, or before that."""

    n_workers = 1

    def __init__(self, opens):
        self.opens, self.coming = opens, []

    def start(self, worker):
        self.coming.append(Ready(worker) if self.opens else Gone(worker, "1"))

    def hand(self, worker, request):
        self.coming.append(Gone(worker, "signal SIGKILL (memory?)"))

    def news(self, timeout_s):
        found, self.coming = self.coming, []
        return found

    def end(self, worker):
        pass

    def close(self):
        pass


@pytest.fixture
def request_of_one(experiment, pairs):
    return Request("0123456789abcdef", pairs, Patched((cp.Intervention((cp.Patch("z.0.0"),)),)), Setting.of(experiment))


def test_a_shard_that_ends_one_worker_after_the_other(refuses, request_of_one):
    with refuses(
        errors.WorkerLost,
        """
        shard 0123456789abcdef ended 3 workers, one after the other
          shard      1 cells on 2 pairs
          last exit  signal SIGKILL (memory?)
          fix: measure less at once: --set shards.runs=1000, or --set budget.gib=1
        """,
    ):
        list(Crewed(_Dying(opens=True)).measure([request_of_one]))


def test_a_worker_that_does_not_come_to_open_the_model(refuses, request_of_one):
    with refuses(
        errors.WorkerLost,
        """
        worker 0 ended 3 times before it had opened the model
          last exit  1
          fix: see whether the model opens here: --set executor.kind=local
        """,
    ):
        list(Crewed(_Dying(opens=False)).measure([request_of_one]))


class _NoRay:
    """Ray where no cluster answers, or one that has nothing to give."""

    def __init__(self, there=None):
        self.there = there

    def is_initialized(self):
        return self.there is not None

    def init(self, **how):
        raise ConnectionError("Could not find any running Ray instance.")

    def cluster_resources(self):
        return self.there


POST = Post("store", "run", ModelPart(name="zoo:stories"), ".", "cpu", 1)


def test_a_cluster_that_does_not_answer(refuses, monkeypatch):
    monkeypatch.setattr(clusters, "ray", _NoRay())
    monkeypatch.setattr(clusters, "require", lambda package: None)
    with refuses(
        errors.ClusterUnreachable,
        """
        no Ray cluster answers at 'auto'
          error  ConnectionError: Could not find any running Ray instance.
          fix: ray start --head there, or --set executor.address=local
        """,
    ):
        Cluster(ExecutorPart(kind="ray", address="auto"), POST)


def test_a_machine_without_room_for_a_worker(refuses, monkeypatch):
    monkeypatch.setattr(clusters, "ray", _NoRay({"CPU": 2.0}))
    monkeypatch.setattr(clusters, "require", lambda package: None)
    with refuses(
        errors.ClusterUnreachable,
        """
        this machine has no room for a worker
          a worker   1 CPUs, 2 GPUs
          there are  2 CPUs, 0 GPUs
          fix: ask for less: --set executor.gpus_per_worker=0, or --set executor.cpus_per_worker=1
        """,
    ):
        Cluster(ExecutorPart(kind="ray", gpus_per_worker=2), POST)


def test_a_study_for_ray_where_it_is_not_installed(refuses, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    study = parse_study(PLAIN, "a.yaml", ["executor.kind=ray"])
    with refuses(
        errors.MissingExtra,
        """
        the package 'ray' is not installed
          fix: pip install "causalpatch[ray]"
        """,
    ):
        check(Opened(study, tmp_path))

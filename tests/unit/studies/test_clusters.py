"""Ray's workers: their numbers are those of a local run, bit for bit, and one that is killed is replaced."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

import causalpatch as cp
from causalpatch.base.errors import ClusterUnreachable, ModelNotFound, WorkerLost
from causalpatch.studies import clusters, running
from causalpatch.studies.executors import Bench, Post
from causalpatch.studies.study import ExecutorPart, ModelPart
from small_studies import kill_after_a_shard, measured, run_in, same, study_of, the_run

if importlib.util.find_spec("ray") is None:
    pytest.skip("not installed: ray (pip install 'causalpatch[ray]')", allow_module_level=True)

import ray

pytestmark = pytest.mark.enable_socket

TWO = ("executor={kind: ray, workers: 2, device: cpu}",)


@pytest.fixture(scope="module")
def cluster():
    """Ray, started once for all of these."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    how = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 80 * 2**20}
    ray.init(address="local", num_cpus=4, logging_level="error", **how)
    yield
    ray.shutdown()


@pytest.fixture
def made(monkeypatch, cluster):
    """The crews that runs make."""
    kept = []

    class Seen(clusters.Cluster):
        is_deadly = False

        def __post_init__(self):
            super().__post_init__()
            kept.append(self)

        def hand(self, worker, request):
            super().hand(worker, request)
            if self.is_deadly:
                os.kill(self._actors[worker].pid, signal.SIGKILL)

    monkeypatch.setattr(running, "Cluster", Seen)
    return kept


@pytest.mark.slow
def test_two_workers_give_the_local_numbers_though_one_is_killed(tmp_path, made):
    killed, told = [], []

    def kill(line):
        told.append(line)
        if line["event"] == "shard" and not killed:
            killed.append(made[0].pids[0])
            os.kill(killed[0], signal.SIGKILL)

    found = cp.run_study(study_of(*TWO, "shards.pairs=1"), tmp_path, listeners=(kill,))
    alone = cp.run_study(study_of("shards.pairs=1"), tmp_path / "alone")
    assert killed
    assert len(set(measured(told))) == 6
    assert sorted(the_run(tmp_path).keys()) == sorted(the_run(tmp_path / "alone").keys())
    assert same(found.results["heads"], alone.results["heads"])
    assert made[0].pids == []
    assert ray.is_initialized()  # it was there before


@pytest.mark.slow
def test_a_study_that_is_killed_with_its_workers_running_goes_on(tmp_path, cluster):
    """It had started Ray itself, all of which ends with it."""
    stored = kill_after_a_shard(tmp_path, *TWO, "shards.pairs=1")
    (tmp_path / "local").mkdir()
    local, _ = run_in(tmp_path / "local", "shards.pairs=1")
    found, told = run_in(tmp_path, *TWO, "shards.pairs=1")
    assert len(found.run.keys()) == 6
    assert not stored & set(measured(told))
    assert same(found.results["heads"], local.results["heads"])


def test_a_worker_gives_the_local_numbers_and_is_gone_afterwards(tmp_path, undisturbed, made):
    study = study_of("executor={kind: ray, workers: 1, device: cpu}")
    first, told = cp.run_study(study, tmp_path), []
    assert same(first.results["heads"], undisturbed)
    again = cp.run_study(study, tmp_path, listeners=(told.append,))
    assert measured(told) == []
    assert same(first.results["heads"], again.results["heads"])
    assert all(crew._actors == {} for crew in made)


@pytest.mark.slow
def test_a_shard_that_ends_every_worker_is_an_error(tmp_path, made):
    def kill(line):
        if line["event"] == "call":
            made[0].is_deadly = True

    with pytest.raises(WorkerLost, match="ended 3 workers"):
        cp.run_study(study_of(*TWO, "shards.pairs=6"), tmp_path, listeners=(kill,))


def test_a_worker_opens_the_model_by_its_device_map(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    seen, load = {}, LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *at, **how: seen.update(how) or load(*at, **how))
    bench = Bench.open(Post(str(tmp_path), "run", ModelPart(name="zoo:stories"), ".", "cuda", 1, device_map="cpu"))
    assert seen["device_map"] == "cpu"
    assert bench.model.device.type == "cpu"


@pytest.mark.slow
def test_what_a_worker_meets_with_is_what_the_run_says(tmp_path, cluster):
    post = Post(str(tmp_path), "run", ModelPart(name="zoo:none"), str(tmp_path), "cpu", 1)
    crew = clusters.Cluster(ExecutorPart(kind="ray", workers=1, device="cpu"), post)
    crew.start(0)
    (news,) = crew.news(None)
    assert isinstance(news.error, ModelNotFound)
    assert crew.news(0.0) == []
    crew.close()


@pytest.mark.slow
def test_workers_have_the_cpus_that_they_are_given_and_as_many_threads(tmp_path, cluster):
    part = ExecutorPart(kind="ray", workers=1, device="cpu", cpus_per_worker=2)
    crew = clusters.Cluster(part, Post(str(tmp_path), "run", ModelPart(name="zoo:stories"), str(tmp_path), "cpu", 2))
    crew.start(0)
    crew.news(None)
    assert ray.available_resources()["CPU"] == 2
    crew.close()


def test_workers_by_default_are_what_the_cluster_holds(cluster):
    post = Post("store", "run", ModelPart(name="zoo:stories"), str(Path.cwd()), "cpu", 1)
    assert clusters.Cluster(ExecutorPart(kind="ray"), post).n_workers == 4
    assert clusters.Cluster(ExecutorPart(kind="ray", cpus_per_worker=1.5), post).n_workers == 2


def test_a_worker_with_gpus_is_told_how_to_spread_the_model(cluster, monkeypatch):
    post = Post("store", "run", ModelPart(name="zoo:stories"), ".", "cpu", 1)
    monkeypatch.setattr(clusters.ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 8.0})
    spread = clusters.Cluster(ExecutorPart(kind="ray", gpus_per_worker=4, device_map="auto"), post)
    assert (spread.n_workers, spread._post.device, spread._post.device_map) == (2, "cuda", "auto")
    one_each = clusters.Cluster(ExecutorPart(kind="ray"), post)
    assert (one_each.n_workers, one_each._post.device, one_each._post.device_map) == (8, "cuda", None)
    on_cpu = clusters.Cluster(ExecutorPart(kind="ray", gpus_per_worker=0, device_map="auto"), post)
    assert (on_cpu.n_workers, on_cpu._post.device) == (16, "cpu")


def test_more_than_the_machine_has_is_refused(cluster):
    post = Post("store", "run", ModelPart(name="zoo:stories"), ".", "cpu", 1)
    with pytest.raises(ClusterUnreachable, match="no room for a worker"):
        clusters.Cluster(ExecutorPart(kind="ray", gpus_per_worker=2), post)
    assert ray.is_initialized()

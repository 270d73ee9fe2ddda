"""What studies refuse, in the house's form."""

import os
import sys

import pytest

import causalpatch as cp
from causalpatch.base import errors
from causalpatch.studies import clusters, objects
from causalpatch.studies.checking import check
from causalpatch.studies.clusters import Cluster
from causalpatch.studies.executors import Post
from causalpatch.studies.exporting import export_cells
from causalpatch.studies.objects import Folder, Remote, open_objects
from causalpatch.studies.opened import Opened
from causalpatch.studies.reading import parse_study, read_study
from causalpatch.studies.results import RESULT, Results
from causalpatch.studies.scheduling import Crewed, Gone, Ready
from causalpatch.studies.sealed import seal
from causalpatch.studies.shards import Request, Setting
from causalpatch.studies.store import Store
from causalpatch.studies.study import ExecutorPart, ModelPart
from causalpatch.studies.works import Patched

PLAIN = """\
schema: 1
model: zoo:stories
pairs: ioi
steps:
  - kind: sweep
    name: heads
    site: z@-1
"""


def test_an_unknown_key(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' line 3: unknown key 'pair'
          in     the study
          known  schema, name, model, pairs, metric, direction, seeds, split, budget, shards, executor,
                 store, steps
          fix: did you mean 'pairs'?
        """,
    ):
        parse_study(PLAIN.replace("pairs: ioi", "pair: ioi"), "a.yaml")


def test_an_unknown_key_of_a_step(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' line 8: unknown key 'sites'
          in     steps.0
          known  name, on, kind, site, over, value, draws, window, frozen
          fix: did you mean 'site'?
        """,
    ):
        parse_study(PLAIN + "    sites: z\n", "a.yaml")


def test_an_unknown_key_of_a_part(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' line 8: unknown key 'worker'
          in     executor
          known  kind, workers, threads, device, device_map, address, gpus_per_worker, cpus_per_worker
          fix: did you mean 'workers'?
        """,
    ):
        parse_study(PLAIN + "executor: {worker: 2}\n", "a.yaml")


def test_a_value_of_the_wrong_type(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' line 3: 'pairs.first' does not fit
          given    'ten'
          because  input should be a valid integer, unable to parse string as an integer
          fix: causalpatch schema says what each key may be
        """,
    ):
        parse_study(PLAIN.replace("pairs: ioi", "pairs: {name: ioi, first: ten}"), "a.yaml")


def test_a_value_of_the_wrong_type_behind_set(refuses):
    with refuses(
        errors.StudyError,
        """
        '--set direction=sideways': 'direction' does not fit
          given    'sideways'
          because  input should be 'denoise' or 'noise'
          fix: causalpatch schema says what each key may be
        """,
    ):
        parse_study(PLAIN, "a.yaml", ["direction=sideways"])


def test_a_missing_key(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' line 5: the key 'site' is missing
          in     steps.0
          known  name, on, kind, site, over, value, draws, window, frozen
          fix: add 'site:'; causalpatch init shows how
        """,
    ):
        parse_study(PLAIN.replace("    site: z@-1\n", ""), "a.yaml")


def test_an_unknown_kind_of_step(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' line 5: steps.0 is no known kind of step
          kind   'swep'
          known  sweep, localize, attribute, discover, evaluate, confirm, tune
          fix: kind: sweep
        """,
    ):
        parse_study(PLAIN.replace("kind: sweep", "kind: swep"), "a.yaml")


def test_a_step_that_takes_what_no_earlier_one_finds(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' line 8: 'steps.1.from' does not fit
          given    'head'
          because  'head' is no earlier step of the kind sweep or localize; there are: heads
          fix: causalpatch schema says what each key may be
        """,
    ):
        parse_study(PLAIN + "  - {kind: confirm, from: head}\n", "a.yaml")


def test_steps_whose_keys_do_not_fit_together(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' line 8: 'steps.1' does not fit
          because  give components, or the step that found them (from:), one of them
          fix: causalpatch schema says what each key may be
        """,
    ):
        parse_study(PLAIN + "  - {kind: confirm}\n", "a.yaml")


def test_a_model_that_is_to_be_spread_over_the_one_device_of_a_process(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' line 8: 'executor' does not fit
          because  each of the processes has its model on one device, so there is nothing to spread; take
                   device_map out, or give kind: local or kind: ray
          fix: causalpatch schema says what each key may be
        """,
    ):
        parse_study(f"{PLAIN}executor: {{kind: processes, device_map: auto}}\n", "a.yaml")


def test_a_key_that_stands_twice(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' line 8: the key 'model' stands twice
          first in  line 2
          fix: take one of them out
        """,
    ):
        parse_study(PLAIN + "model: gpt2\n", "a.yaml")


def test_no_yaml(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' line 2 is no YAML
          error  expected ',' or '}', but got '<stream end>'
          fix: mend the line; values with a colon or a bracket want quotes
        """,
    ):
        parse_study("schema: 1\nmodel: {name: a", "a.yaml")


@pytest.mark.parametrize(
    ("line", "where", "said"),
    [
        (
            "name: !!python/tuple [a]",
            " line 8",
            "could not determine a constructor for the tag 'tag:yaml.org,2002:python/tuple'",
        ),
        ("? [a]\n: 1", " line 8", "found unhashable key"),
        ("name: 2024-13-45", "", "month must be in 1..12"),
    ],
)
def test_yaml_that_makes_no_values(refuses, line, where, said):
    with refuses(
        errors.StudyError,
        f"""
        'a.yaml'{where} is no YAML
          error  {said}
          fix: mend the line; values with a colon or a bracket want quotes
        """,
    ):
        parse_study(f"{PLAIN}{line}\n", "a.yaml")


def test_what_holds_itself(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' line 8: what '&' names here holds itself
          fix: write out what is meant in place of the '*' inside of it
        """,
    ):
        parse_study(f"{PLAIN}seeds: &all [0, *all]\n", "a.yaml")


def test_a_file_that_is_no_study(refuses):
    with refuses(
        errors.StudyError,
        """
        'a.yaml' is no study
          found   'just words'
          needed  keys and values: schema, model, pairs, steps
          fix: causalpatch init a.yaml writes one
        """,
    ):
        parse_study("just words", "a.yaml")


def test_a_file_that_is_not_there(refuses, tmp_path):
    with refuses(
        errors.StudyError,
        """
        the study file 'TMP/none.yaml' cannot be read
          error  FileNotFoundError: No such file or directory
          fix: causalpatch init TMP/none.yaml writes one
        """,
    ):
        read_study(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            "direction",
            """
            '--set direction' names no value
              fix: --set direction=noise, or --set steps.0.site=z@-1
            """,
        ),
        (
            "steps.tails.site=z",
            """
            '--set steps.tails.site=z' names no place of the study
              not found  'tails'
              there      heads
              fix: --set direction=noise, or --set steps.0.site=z@-1
            """,
        ),
        (
            "name=2024-13-45",
            """
            the value of '--set name=2024-13-45' is no YAML
              fix: quote it: --set 'a.b="text"'
            """,
        ),
        (
            "direction=[a",
            """
            the value of '--set direction=[a' is no YAML
              fix: quote it: --set 'a.b="text"'
            """,
        ),
    ],
)
def test_a_change_that_cannot_be_made(refuses, change, text):
    with refuses(errors.StudyError, text):
        parse_study(PLAIN, "a.yaml", [change])


def test_a_study_of_a_later_version(refuses):
    with refuses(
        errors.UnsupportedError,
        """
        'a.yaml' line 1: the study was written for a later version
          schema              2
          this version reads  1
          fix: pip install --upgrade causalpatch
        """,
    ):
        parse_study(PLAIN.replace("schema: 1", "schema: 2"), "a.yaml")


def test_a_site_that_is_not_in_the_model(tmp_path):
    study = parse_study(PLAIN.replace("z@-1", "z.9@-1"), "a.yaml")
    with pytest.raises(errors.SiteNotFound):
        check(Opened(study, tmp_path))


def test_more_runs_than_the_budget(refuses, tmp_path):
    with refuses(
        errors.SettingError,
        """
        the steps plan 456 runs of the model, more than the budget
          budget  100 runs
          heads   456
          fix: --set budget.runs=456, or narrow a step
        """,
    ):
        check(Opened(parse_study(PLAIN, "a.yaml", ["budget.runs=100"]), tmp_path))


def test_a_method_that_is_not_there(refuses, tmp_path):
    with refuses(
        errors.SettingError,
        """
        no method 'eap-gi' scores edges
          known  eap, eap-ig, eap-ig-activations, clean-corrupted
          fix: method: eap-ig
        """,
    ):
        check(Opened(parse_study(PLAIN, "a.yaml", ["steps=[{kind: attribute, method: eap-gi}]"]), tmp_path))


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
          kept   every shard that was finished
          fix: start the server, and run the study again
        """,
    ):
        place.get("a")


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


TUNE = """\
schema: 1
model: zoo:stories
pairs: agreement
split: null
steps:
  - {kind: tune, components: [mlp_out.3], target: wanted.jsonl, retain: induction}
"""


def test_data_of_a_tuning_that_are_not_there(refuses, tmp_path):
    with refuses(
        errors.StudyError,
        """
        'wanted.jsonl' is no file, and no task
          looked in  TMP
          fix: name a file, seen from the study's folder, or a task that causalpatch tasks lists
        """,
    ):
        check(Opened(parse_study(TUNE, "a.yaml"), tmp_path))


def test_cells_of_what_is_no_sweep(refuses, tmp_path):
    run = Store(str(tmp_path / "store")).run_of_hash("0" * 16)
    record = {"kind": "scores", "calls": [], "files": {}, "about": {}}
    run.objects.put(run.name("results", "nodes.json"), seal(RESULT, record))
    with refuses(
        errors.SettingError,
        """
        'nodes' is no sweep whose cells can be read one by one
          kind      scores
          such are  sweeps of one value, without draws
          fix: leave --cells out
        """,
    ):
        export_cells(Results(run), "nodes", tmp_path / "nodes.csv")


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

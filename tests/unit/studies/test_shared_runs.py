"""Shards of the same pairs share the untouched runs of these, and are what they would be each by itself."""

import pytest

from causalpatch.studies.executors import Bench
from causalpatch.studies.shards import Request, encode, forget
from small_studies import run_in, the_run

CUT = ("shards={pairs: 3, cells: 4}",)
PROCESS = ("executor={kind: processes, workers: 1, threads: 1, device: cpu}",)


@pytest.mark.parametrize("executor", [(), pytest.param(PROCESS, marks=pytest.mark.slow)], ids=["local", "processes"])
def test_the_second_shard_of_the_same_pairs_makes_no_untouched_run(tmp_path, executor):
    _, told = run_in(tmp_path, *CUT, *executor)
    seen = [line["cost"]["forwards"] for line in told if line["event"] == "shard"]
    assert [each > 0 for each in seen] == [True, False, True, False]


def test_shards_are_what_they_would_be_each_by_itself(tmp_path, monkeypatch):
    run_in(tmp_path, *CUT)
    run, alone = the_run(tmp_path), {}
    kept = {key: run.read(key)[0] for key in list(run.keys())}

    def measure(self, request):
        forget()
        plain = Request(request.key, request.pairs, request.work, request.setting)
        found = plain.measure(self.model, self.source_model)
        alone[request.key] = encode(request.key, found, request.setting.metrics)
        return self.run.write(request.key, alone[request.key], {"record": found.record, "runs": request.n_runs})

    monkeypatch.setattr(Bench, "measure_and_store", measure)
    run_in(tmp_path / "alone", *CUT)
    assert alone == kept


def test_a_shard_that_another_worker_stored_meanwhile_stays_as_it_is(tmp_path, monkeypatch):
    asked, measure = [], Bench.measure_and_store

    def twice(self, request):
        first = measure(self, request)
        asked.append(request.key)
        monkeypatch.setattr(type(self.run), "write", lambda *given: pytest.fail("it was written again"))
        again = measure(self, request)
        monkeypatch.undo()
        return again if again == first else pytest.fail("another entry")

    monkeypatch.setattr(Bench, "measure_and_store", twice)
    run_in(tmp_path, "shards={pairs: 6}")
    assert len(asked) == 1

"""Tasks of lm-eval as an evaluation: called as its documents say, and an endpoint of their own."""

import sys
from types import ModuleType

import pytest

import causalpatch as cp
from causalpatch.base.errors import MissingExtra, ModelUnsupported, SettingError
from causalpatch.tuning.checks import Bench, endpoints
from causalpatch.tuning.lm_eval_tasks import lm_eval_task
from tunings import tiny, tiny_data

CALLS = []


class Runs:
    """Stands in for ``lm_eval.models.huggingface.HFLM``."""

    def __init__(self, pretrained, tokenizer, batch_size):
        self.pretrained, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size


def simple_evaluate(model, tasks, limit, *, log_samples):
    """Give what lm-eval gives where samples are logged: of each task a list, a sample for each document and filter."""
    CALLS.append((model, tasks, limit, log_samples))
    samples = [
        {"doc_id": number, "filter": name, "acc": float(number != 1) if name == "first" else 0.0, "acc_norm": 1.0}
        for name in ("first", "second")
        for number in (2, 0, 1)
    ]
    return {"results": {}, "samples": {"one": samples, "another": samples[:3]}}


@pytest.fixture
def installed(monkeypatch):
    CALLS.clear()
    package, models, huggingface = (
        ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    )
    package.simple_evaluate, huggingface.HFLM = simple_evaluate, Runs
    package.models, models.huggingface = models, huggingface
    for module in (package, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_task_gives_a_number_for_each_document_in_their_order(installed):
    model = cp.open_model("zoo:stories")
    assert lm_eval_task("group", limit=3, batch_size=2)(model) == [1.0, 0.0, 1.0] * 2
    ((runs, tasks, limit, log_samples),) = CALLS
    assert (tasks, limit, log_samples, runs.batch_size) == (["group"], 3, True, 2)
    assert runs.pretrained is model.module
    assert runs.tokenizer is model.tokenizer.tokenizer
    assert lm_eval_task("group", metric="acc_norm")(model) == [1.0] * 6


def test_a_number_that_the_task_lacks_and_a_model_without_a_tokenizer_are_refused(installed):
    with pytest.raises(SettingError, match="task 'group' of lm-eval gives no 'f1'") as caught:
        lm_eval_task("group", metric="f1")(cp.open_model("zoo:stories"))
    assert "acc, acc_norm" in str(caught.value)
    with pytest.raises(ModelUnsupported, match="lm-eval needs a tokenizer"):
        lm_eval_task("group")(tiny("llama"))


def test_without_lm_eval_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(MissingExtra, match="'lm_eval' is not installed") as caught:
        lm_eval_task("arc_easy")(cp.open_model("zoo:stories"))
    assert 'pip install "causalpatch[lm-eval]"' in str(caught.value)


def test_evaluations_by_name_are_endpoints_by_name():
    model = tiny("llama")
    data = tiny_data(evaluate={"mine": lambda _: [1.0] * 12, "theirs": lambda _: 0.5})
    bench = Bench(model, data)
    bench.evaluate_base()
    found = bench.measure(None, {"mine": [1.0] * 6 + [0.0] * 6, "theirs": 0.5})
    by_name = {each.name: each for each in endpoints([found], data, cp.Margins())}
    assert by_name["mine, drop"].estimate == pytest.approx(0.5)
    assert by_name["mine, drop"].verdict == "beyond"
    assert by_name["theirs, drop"].estimate == 0.0
    assert by_name["theirs, drop"].verdict == "not shown"  # of one number there is no interval
    assert data.record()["evaluate"] == {"mine": "<lambda>", "theirs": "<lambda>"}

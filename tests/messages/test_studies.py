"""What studies refuse, in the house's form."""

import pytest

from causalpatch.base import errors
from causalpatch.studies.checking import check
from causalpatch.studies.exporting import export_cells
from causalpatch.studies.opened import Opened
from causalpatch.studies.reading import parse_study, read_study
from causalpatch.studies.results import RESULT, Results
from causalpatch.studies.sealed import seal
from causalpatch.studies.store import Store
from small_studies import PLAIN


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


def test_a_word_that_is_misspelt(refuses):
    with refuses(
        errors.StudyError,
        """
        '--set executor.kind=rya': 'executor.kind' does not fit
          given    'rya'
          because  input should be 'local', 'processes' or 'ray'
          fix: kind: ray
        """,
    ):
        parse_study(PLAIN, "a.yaml", ["executor.kind=rya"])


@pytest.mark.parametrize(("change", "key"), [("pairs.first=true", "first"), ("seeds=[true]", "seeds")])
def test_a_truth_value_for_a_count(change, key):
    with pytest.raises(errors.StudyError, match=f"'{key}' is no choice of two, so that true and false say nothing"):
        parse_study(PLAIN, "a.yaml", [change])


def test_a_seed_below_nothing(refuses):
    with refuses(
        errors.StudyError,
        """
        '--set seeds=[-1]': 'seeds.0' does not fit
          given    -1
          because  input should be greater than or equal to 0
          fix: causalpatch schema says what each key may be
        """,
    ):
        parse_study(PLAIN, "a.yaml", ["seeds=[-1]"])


def test_small_numbers_may_be_written_with_an_exponent():
    changes = ["steps.heads.draws=3", "budget.gib=5e-1", "steps.heads.value=noise"]
    assert parse_study(PLAIN, "a.yaml", changes).budget.gib == 0.5
    text = PLAIN.replace("kind: sweep", "kind: discover").replace("site: z@-1", "method: acdc\n    threshold: 1e-3")
    (step,) = parse_study(text, "a.yaml").steps
    assert step.threshold == 0.001


def test_a_shard_of_two_sizes(refuses):
    with refuses(
        errors.StudyError,
        """
        '--set shards={runs: 5, pairs: 2}': 'shards' does not fit
          because  give runs, or pairs and cells: what has so many of these has its own number of runs
          fix: causalpatch schema says what each key may be
        """,
    ):
        parse_study(PLAIN, "a.yaml", ["shards={runs: 5, pairs: 2}"])


def test_draws_of_what_is_not_drawn(refuses, tmp_path):
    study = parse_study(PLAIN, "a.yaml", ["steps.heads.draws=3", "pairs={name: ioi, first: 20}"])
    with refuses(
        errors.SettingError,
        """
        3 draws of the value source cannot be made
          drawn   Noise(…), Resample(…)
          needed  one draw or more
          fix: sweep(…, value="noise", draws=5), or leave draws= out
        """,
    ):
        check(Opened(study, tmp_path))


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

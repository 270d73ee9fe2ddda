"""Study files: what they may say, and what names their run."""

import json
from pathlib import Path

import pytest
import yaml

import causalpatch as cp
from causalpatch.studies.opened import open_models
from causalpatch.studies.reading import parse_study, read_study
from causalpatch.studies.running import names_of_results
from causalpatch.studies.template import TEMPLATE
from small_studies import TEXT, study_of


def test_one_word_stands_for_a_model_and_for_pairs():
    study = study_of()
    assert study.model.name == "zoo:stories"
    assert (study.pairs.name, study.pairs.first) == ("ioi", 6)
    assert study_of("pairs=ioi").pairs.first is None


def test_what_is_measured_names_the_run_and_who_measures_does_not():
    plain = study_of()
    for change in ("executor.kind=processes", "store=s3://bucket/place", "name=other", "executor.threads=4"):
        assert study_of(change).hash == plain.hash
    for change in ("direction=noise", "pairs.first=7", "seeds=[1]", "steps.heads.site=z.1", "shards.pairs=3"):
        assert study_of(change).hash != plain.hash


def test_where_weights_lie_names_no_other_run():
    plain = study_of()
    for change in ("model.weights=disk", "model.weights=host", "model.memory_gib=0.5"):
        assert study_of(change).hash == plain.hash
    assert study_of("model.weights=disk").model.weights == "disk"


def test_a_study_of_weights_on_disk_opens_such_a_model():
    part = study_of("model.weights=disk").model
    model, source = open_models(part, "cpu", ".")
    assert source is None
    assert model.weights.store.place == "disk"
    assert open_models(study_of().model, "cpu", ".")[0].weights is None


def test_defaults_that_are_written_out_are_no_change():
    assert study_of("direction=denoise", "seeds=0", "steps.0.value=source", "budget={}").hash == study_of().hash


def test_a_change_finds_steps_by_name_and_by_number():
    assert study_of("steps.heads.site=q").steps[0].site == study_of("steps.0.site=q").steps[0].site == "q"


def test_a_change_inside_of_what_one_word_stood_for():
    assert study_of("model.dtype=bfloat16").model.dtype == "bfloat16"


def test_the_file_that_init_writes_is_a_study():
    study = parse_study(TEMPLATE, "study.yaml")
    assert [step.kind for step in study.steps] == ["sweep", "localize", "confirm"]
    assert [study.side_of(step) for step in study.steps] == ["discovery", "discovery", "held_out"]


def test_the_schema_describes_every_key():
    schema = cp.Study.model_json_schema()
    assert json.dumps(schema)
    assert {"schema", "model", "pairs", "steps", "store"} <= set(schema["properties"])
    described = [
        field for part in schema["$defs"].values() for name, field in part["properties"].items() if name != "kind"
    ]
    assert all("description" in field for field in described)


@pytest.mark.parametrize(
    "executor",
    [
        "{device_map: auto}",
        "{kind: ray, device_map: auto, address: auto, gpus_per_worker: 4, cpus_per_worker: 2}",
        "{kind: processes, address: auto, cpus_per_worker: 2}",
    ],
)
def test_keys_that_the_kind_of_executor_heeds_or_that_are_of_ray_alone_are_taken(executor):
    assert study_of(f"executor={executor}").hash == study_of().hash


def test_the_key_on_is_a_word_in_files_and_in_changes():
    step = "{kind: sweep, site: z, on: all}"
    read = [study_of("split={}", text=TEXT.replace("site:", "on: all, site:")), study_of("split={}", f"steps=[{step}]")]
    assert [study.side_of(study.steps[0]) for study in read] == ["all", "all"]


def test_what_is_named_once_may_be_meant_twice():
    text = "schema: 1\nmodel: zoo:stories\npairs: ioi\nsteps: [{kind: sweep, site: &site z, frozen: [*site, *site]}]"
    assert study_of(text=text).steps[0].frozen == ["z", "z"]


def test_truth_values_may_be_written_in_any_way():
    plain = {
        word: study_of(f"pairs.first_token={word}").pairs.first_token for word in ("yes", "on", "true", "off", "no")
    }
    assert plain == {"yes": True, "on": True, "true": True, "off": False, "no": False}


def test_a_claim_is_made_for_the_first_seed_alone():
    study = study_of("seeds=[3, 4]", "split={}", "steps=[{kind: sweep, site: z}, {kind: confirm, from: sweep}]")
    assert [name for name, _, _ in names_of_results(study)] == ["sweep-seed3", "confirm-seed3", "sweep-seed4"]


def test_a_file_is_read_with_its_changes(tmp_path):
    (tmp_path / "s.yaml").write_text(TEXT, encoding="utf-8")
    assert read_study(tmp_path / "s.yaml", ["direction=noise"]).direction == "noise"


@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parents[3].glob("examples/studies/*.yaml")), ids=lambda f: f.name
)
def test_examples_are_studies(file):
    assert read_study(file).name
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["schema"] == 1

"""Refusals of saved effects, charts and packages that are not there."""

import json
import sys

import pytest

import causalpatch as cp
from causalpatch.base.errors import MissingExtra, ResultsNotFound, SettingError, StoreCorrupt


@pytest.fixture
def effects(llama):
    rows = [{"clean": [3, 4], "corrupt": [3, 5], "answer_id": 6, "wrong_answer_id": 7}]
    return cp.sweep(cp.Experiment(llama, cp.load_pairs(rows, llama)), "z@-1")


def test_a_flipped_byte_is_found(refuses, effects, tmp_path):
    effects.save(tmp_path)
    shard = tmp_path / "data-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with refuses(
        StoreCorrupt,
        """
        the effects in 'TMP' cannot be trusted: the file 'data-00000.parquet' was changed after it was written
          expected  sha256 …
          found     sha256 …
          fix: run the sweep again
        """,
    ):
        cp.Effects.load(tmp_path)


def test_a_shard_that_is_missing_is_named(refuses, effects, tmp_path):
    effects.save(tmp_path)
    (tmp_path / "pairs.parquet").unlink()
    with refuses(
        StoreCorrupt,
        """
        the effects in 'TMP' cannot be trusted: the file 'pairs.parquet' is missing
          fix: run the sweep again
        """,
    ):
        cp.Effects.load(tmp_path)


def test_effects_of_a_later_format_are_not_guessed_at(refuses, effects, tmp_path):
    effects.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    with refuses(
        cp.UnsupportedError,
        """
        the effects in 'TMP' were written in another format
          format              99
          this version reads  1
          fix: pip install --upgrade causalpatch
        """,
    ):
        cp.Effects.load(tmp_path)


def test_a_folder_without_a_manifest_holds_no_effects(refuses, tmp_path):
    with refuses(
        ResultsNotFound,
        """
        no saved effects in 'TMP'
          looked for  manifest.json
          found       the folder is there
          fix: name the folder that effects.save(folder) wrote
        """,
    ):
        cp.Effects.load(tmp_path)


def test_a_metric_that_was_not_measured_is_answered_with_those_that_were(refuses, effects):
    with refuses(
        ResultsNotFound,
        """
        no metric named 'logit_diff' in these effects
          measured  logit_difference
          fix: effects.metric('logit_difference')
        """,
    ):
        effects.metric("logit_diff")


def test_an_unknown_chart_is_answered_with_those_known(refuses, effects):
    with refuses(
        SettingError,
        """
        no chart of kind 'pie'
          known  heat, bars
          fix: effects.plot()
        """,
    ):
        effects.plot("pie")


def test_a_package_that_is_not_installed_is_named_with_its_mend(refuses, effects, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    with refuses(
        MissingExtra,
        """
        the package 'altair' is not installed
          fix: pip install altair
        """,
    ):
        effects.plot("heat", quantity="effect")

"""What a screen would cost, by hand-made numbers."""

from dataclasses import replace

import pytest

from causalpatch.engine import ModelCost, make_plan
from causalpatch.engine.plan import Wave, for_tier
from causalpatch.engine.screen_cost import Choice, Pass, screen_cost

ONE = Pass(token_layers=1000, flops=8e9, linear_flops=6e9, untouched_flops=1e9)
PLAIN = 10e9  # one pass of 8, its untouched runs 1, controls 1


def cost(top_k=20, gain=2.0, n_sample=64, n_leading=128.0, share=1.0):
    choice = Choice(160, n_leading, n_sample, top_k)
    return screen_cost(ONE, PLAIN, share, choice=choice, product=("int8", gain), n_bytes=(2**30, 2**29))


def test_two_passes_are_made_before_anything_is_measured_again():
    assert cost().flops == PLAIN + 1e9


def test_about_the_sample_and_at_most_everything_is_measured_again():
    made = cost()
    assert made.again_flops == (1e9 + 4e9, 2e9 + 8e9)
    assert made.again_token_layers == (500, 1000)
    assert made.total_flops == (16e9, 21e9)
    assert cost(n_leading=32.0).again_flops == (9e9, 10e9)
    assert cost(n_leading=0.0).again_flops == (9e9, 10e9)


def test_without_a_largest_only_the_sample_is_measured_again():
    made = cost(top_k=0)
    assert made.again_flops == (5e9, 5e9)
    assert made.lines()[1] == ("again", "in float32: 64 at random")
    assert made.tokens_again == "about 500"
    assert made.arithmetic == "11.0 GFLOP, then about 5.0 again,"


def test_only_what_is_multiplied_in_few_bits_is_faster():
    rate = 1e9
    assert cost(gain=1.0).seconds(rate) == (16.0, 21.0)
    assert cost(gain=2.0).seconds(rate) == (16.0 - 3.0, 21.0 - 3.0)
    assert cost(gain=2.0, share=0.5).seconds(rate) == (16.0 - 1.5, 21.0 - 1.5)
    assert cost(gain=None).seconds(rate) is None


def test_the_plan_of_a_screen_prints_both_numbers():
    wave = Wave(1100, 2048, 2**30, 2**29, "device", 2**30, 2**31, 4)
    model = ModelCost(weights=1000, attention=64, bytes_per_row=2**20, rows_per_forward=8)
    shown = (("'a'", "'b'"), ("z.0.0@-1", "z.0.1@-1"))
    plan = make_plan(model, (5, 7), (3, 3), n_interventions=3, n_more=3, n_forks=0, shown=shown)
    given = {"patched_flops": {"wavefront": 9e9}, "wave": wave, "n_derived": 0, "untouched_flops": 1e9, "rate": 1e9}
    plan = for_tier(replace(plan, flops=40e9), "wavefront", **given)
    made = replace(plan, screen=cost())
    lines = dict(line.split(maxsplit=1) for line in str(made).splitlines())
    assert lines["screen"] == "all 160 in int8 first, where a linear map is 2 times as fast as in float32"
    assert lines["runs"] == "1,100 tokens through single layers, then about 500 to 1,000 again, up to 2,048 at once"
    whole = "40.0 by 12 rows in whole forwards"
    assert lines["arithmetic"] == f"11.0 GFLOP, then about 5.0 to 10.0 again, instead of {whole} (saves 48% to 60%)"
    assert (
        lines["memory"] == "about 5.50 GiB of activations and 0.50 of weights in few bits, in 4 passes over the layers"
    )
    assert lines["time"] == "at least 13.0 s, or 18.0 s with everything again"
    assert (made.seconds, made.most_seconds) == (13.0, 18.0)
    assert made.saved == pytest.approx(0.6)
    assert "\ntime           at least 13.0 s\n" in str(replace(plan, screen=cost(top_k=0)))
    assert "\ntime " not in str(replace(plan, screen=cost(gain=None)))
    assert (plan.tier_flops, plan.most_flops, plan.most_seconds) == (10e9, 10e9, 10.0)

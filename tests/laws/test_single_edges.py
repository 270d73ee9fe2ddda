"""Single edges by the wavefront against forwards with inputs put together, on random models of every family."""

import numpy as np
from hypothesis import strategies as st

import causalpatch as cp
from worlds import LACKS, ON_WAVEFRONT, law, numbers

NO_GRAPH = {family for family in ON_WAVEFRONT if "resid_pre" in LACKS[family] or family == "opt_post_norm"}
OVER_ALL_HEADS = {"olmo2"}  # a norm over the queries of all heads
ON_ROWS = tuple(family for family in ON_WAVEFRONT if family not in NO_GRAPH | OVER_ALL_HEADS)


@law(only=ON_ROWS, is_varied=True)
def test_every_single_edge_is_the_run_with_its_input_put_together(world, draw):
    direction = draw(st.sampled_from(["denoise", "noise"]))
    fast = world.experiment(direction=direction, padding_side=world.padding_side)
    slow = world.experiment(direction=direction, padding_side=world.padding_side, engine="rows")
    found, wanted = cp.patch_edges(fast), cp.patch_edges(slow)
    assert found.provenance["engine"]["interventions"] == {"wavefront": cp.graph_of(fast).n_edges, "forwards": 0}
    assert wanted.provenance["engine"]["interventions"]["wavefront"] == 0
    np.testing.assert_allclose(numbers(found), numbers(wanted), atol=1e-10, rtol=1e-10)


@law(only=ON_ROWS)
def test_what_else_is_asked_for_changes_no_edge(world, draw):
    graph = cp.graph_of(world.model)
    order = draw(st.permutations(range(graph.n_edges)))
    experiment = world.experiment(max_rows=draw(st.sampled_from([1, 2, None])))
    some = [*order[:7]]
    names = list(graph.names(graph.edges[some]))
    whole = numbers(cp.patch_edges(world.experiment()))
    mixed = numbers(cp.patch_edges(experiment, [*names, "m0", [*names[:2]]]))
    np.testing.assert_allclose(mixed[:, : len(names)], whole[:, some], atol=1e-10, rtol=1e-10)

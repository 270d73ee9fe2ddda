"""Edges and paths are text in, text out."""

import pytest

import causalpatch as cp
from causalpatch.base.errors import PathError, SiteNotFound
from causalpatch.sites import Receiver, Site, expand_receivers, expand_senders, parse_receiver
from worlds import tiny_world

TEXTS = (
    "head_out.3.2 -> q.5.1",
    "mlp_out.2 -> mlp_in.4",
    "embed -> logits",
    "resid_pre.3@-1 -> v.4.0@-1",
    "attn_out.0@subject -> k.2.1@1:3",
    "head_out.3.2 -> q.5.1 -> mlp_in.6 -> logits",
    "head_out.3.2 -> k.5.0 -> head_out.5.1@-1 -> logits@-1",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_path_prints_as_it_is_read(text):
    assert str(cp.Path.parse(text)) == text
    assert cp.Path.parse(str(cp.Path.parse(text))) == cp.Path.parse(text)
    assert cp.Path(list(cp.Path.parse(text).nodes)) == cp.Path.parse(text)


def test_spaces_and_senders_that_are_understood_are_left_out():
    assert str(cp.Path.parse(" head_out.3.2->q.5.1 ->head_out.5.1-> logits ")) == "head_out.3.2 -> q.5.1 -> logits"
    assert str(cp.Path(["embed", "mlp_in.4", "mlp_out.4", "logits"])) == "embed -> mlp_in.4 -> logits"
    # Where it sends from, or which of the heads that a kv_head serves, is said.
    for said in ("embed -> q.1.0 -> head_out.1.0@-1 -> logits", "embed -> k.1.0 -> head_out.1.0 -> logits"):
        assert str(cp.Path.parse(said)) == said


def test_an_edge_is_a_path_of_one_edge():
    edge = cp.Edge("head_out.3.2", "q.5.1@-1")
    assert (edge.sender, edge.receiver) == (Site("head_out", 3, 2), Receiver("q", 5, 1, -1))
    assert cp.Path(edge) == cp.Path.of(edge) == cp.Path.parse(str(edge))


def test_what_is_written_stands_for_an_input():
    assert [str(parse_receiver(text).written) for text in ("q.5.1@-1", "mlp_in.4", "logits")] == [
        "q.5.1",
        "mlp_out.4",
        "logits",
    ]


def test_sets_name_all_members_of_a_model():
    shape = tiny_world("llama", (2, 4, 2, 0))[0].shape
    assert [str(each) for each in expand_receivers("k", shape)] == ["k.0.0", "k.0.1", "k.1.0", "k.1.1"]
    assert [str(each) for each in expand_receivers("mlp_in@-1", shape)] == ["mlp_in.0@-1", "mlp_in.1@-1"]
    assert [str(each) for each in expand_senders("head_out.1", shape)] == [f"head_out.1.{head}" for head in range(4)]
    with pytest.raises(SiteNotFound, match="kv_head"):
        expand_receivers("k.0.3", shape)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("head_out.3.2", "is not a path"),
        ("head_out.3.2 -> ", "is not a path"),
        ("q.5.1 -> logits", "a sender first"),
        ("embed -> mlp_out.3", "a receiver last"),
        ("embed -> logits -> q.1.1", "nothing follows the logits"),
        ("embed -> q.1.1 -> head_out.1.2 -> logits", "no input of the component"),
        ("embed -> q.1.1 -> mlp_out.1 -> logits", "no input of the component"),
        ("embed -> attn_out.1 -> logits", "no input of the component"),
        ("z.1.1 -> logits", "did you mean head_out"),
        ("embed -> q.1", "several receivers"),
        ("head_out.1 -> logits", "several senders"),
    ],
)
def test_what_is_no_chain_is_refused(text, said):
    with pytest.raises(PathError) as caught:
        cp.Path.parse(text)
    assert said in str(caught.value)

import pytest
import torch
from jaxtyping import TypeCheckError

from causalpatch.models import Columns, HeadShare, ModuleUnit, PositionAt, Sum, View, Whole

X = torch.arange(2.0 * 3 * 4).reshape(2, 3, 4)
ROW, POSITION = torch.tensor([1]), torch.tensor([2])


def test_all_views_keep_to_the_protocol():
    views = (Whole(), Columns(0, 1), Sum(), HeadShare(torch.ones(1, 4), 0, 1), ModuleUnit(1, 0), PositionAt(2, Whole()))
    assert all(isinstance(view, View) for view in views)


def test_columns_are_written_for_whole_rows_or_for_single_positions():
    view = Columns(1, 2)
    x = X.clone()
    view.write(x, (), (ROW, POSITION), torch.tensor([[-1.0, -2.0]]))
    assert x[1, 2].tolist() == [20, -1, -2, 23]
    assert (x != X).sum() == 2
    x = X.clone()
    view.write(x, (), (ROW,), torch.zeros(1, 3, 2))
    assert torch.equal(x[1, :, 1:3], torch.zeros(3, 2))
    assert (x != X).sum() == 6


def test_one_column_has_no_axis_of_its_own():
    view = Columns(3, 1, squeeze=True)
    x = X.clone()
    assert view.read(x, ()).tolist() == [[3, 7, 11], [15, 19, 23]]
    view.write(x, (), (ROW, POSITION), torch.tensor([0.5]))
    assert x[1, 2, 3] == 0.5


def test_a_sum_is_written_through_its_first_term_alone():
    x, kept = X.clone(), torch.full_like(X, 10.0)
    view = Sum()
    assert torch.equal(view.read(x, (kept,)), X + 10)
    view.write(x, (kept,), (ROW, POSITION), torch.zeros(1, 4))
    assert torch.equal(view.read(x, (kept,))[1, 2], torch.zeros(4))
    assert torch.equal(x[0], X[0])
    assert torch.equal(kept, torch.full_like(X, 10.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_sum_is_zero_where_zero_is_written_and_the_same_where_it_is_written_back(dtype):
    torch.manual_seed(0)
    kept, x = (torch.randn(3, 4096).to(dtype) for _ in range(2))
    view, before, everywhere = Sum(), x.clone(), (torch.arange(3),)
    view.write(x, (kept,), everywhere, view.read(x, (kept,)))
    assert torch.equal(x, before)
    view.write(x, (kept,), everywhere, torch.zeros_like(x))
    assert (view.read(x, (kept,)) == 0).all()


def test_a_share_of_a_projection_is_written_into_the_sum_of_all_shares():
    heads, weight = torch.rand(2, 3, 6, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64)
    output = heads @ weight + 1
    view = HeadShare(weight[2:4], 2, 2)
    assert torch.allclose(view.read(output, (heads,)), heads[..., 2:4] @ weight[2:4])
    view.write(output, (heads,), (ROW, POSITION), torch.zeros(1, 4, dtype=torch.float64))
    without = heads.clone()
    without[1, 2, 2:4] = 0
    assert torch.allclose(output, without @ weight + 1)


def test_a_channel_is_read_and_written_alone():
    x = torch.arange(2.0 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    view = ModuleUnit(axis=1, index=2)
    assert torch.equal(view.read(x, ()), x[:, 2])
    changed = x.clone()
    view.write(changed, (), (ROW,), torch.full((1, 2, 2), -1.0))
    assert (changed[1, 2] == -1).all()
    assert (changed != x).sum() == 4


def test_positions_may_stand_on_another_axis():
    x = X.clone()  # axes (row, channel, position)
    view = PositionAt(axis=2, view=ModuleUnit(axis=2, index=0))
    assert torch.equal(view.read(x, ()), X[:, 0])
    view.write(x, (), (ROW, POSITION), torch.tensor([-5.0]))
    assert x[1, 0, 2] == -5
    assert (x != X).sum() == 1


def test_a_wrong_shape_is_caught_while_tests_run():
    with pytest.raises(TypeCheckError):
        Sum().read(torch.zeros(2, 3), (torch.zeros(2, 1),))

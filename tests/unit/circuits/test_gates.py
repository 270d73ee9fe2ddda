"""Gates: what they are drawn as, and the slopes that go to their logits."""

import pytest
import torch

from causalpatch.circuits.gates import HardConcrete, TopK, Uniform, soft_top_k

CPU = torch.device("cpu")
MANY = 40_000


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_soft_top_k_sums_to_k_and_keeps_the_order():
    logits = torch.tensor([3.0, -40.0, 0.5, 25.0, 0.4, -1.0], dtype=torch.float64)
    k = torch.tensor([0.01, 1.0, 2.5, 5.9], dtype=torch.float64)
    gates = soft_top_k(logits, k)
    torch.testing.assert_close(gates.sum(1), k, atol=1e-9, rtol=0)
    assert (gates[:, logits.argsort()].diff(dim=1) >= 0).all()


def test_the_slope_of_soft_top_k_is_that_of_finite_differences():
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.4], dtype=torch.float64, requires_grad=True)
    k = torch.tensor([1.3, 3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: soft_top_k(x, k), (logits,), atol=1e-7)


def test_top_k_draws_sizes_evenly_over_their_logarithm():
    gates = TopK(1000, CPU)
    sizes = gates.draw(4000, draws()).sum(1).detach()
    shares = [float((sizes < bound).float().mean()) for bound in (10, 100)]
    assert shares == pytest.approx([1 / 3, 2 / 3], abs=0.03)
    assert float(sizes.min()) > 0.99
    assert float(sizes.max()) < 999.1


def test_hard_concrete_gates_are_open_as_often_as_their_size_says():
    gates = HardConcrete(3, CPU)
    gates.logits.data = torch.tensor([-2.0, 0.0, 3.0])
    drawn = gates.draw(MANY, draws()).detach()
    kinds = [drawn == 0, drawn == 1, (drawn > 0) & (drawn < 1)]
    assert all(bool(kind.any()) for kind in kinds)
    assert float((drawn > 0).float().mean()) == pytest.approx(float(gates.size().detach()), abs=5e-3)


def test_uniform_gates_are_0_and_1_but_for_a_window():
    gates = Uniform(3, CPU)
    gates.logits.data = torch.tensor([-2.0, 0.0, 3.0])
    p = torch.sigmoid(gates.logits.detach())
    drawn = gates.draw(MANY, draws()).detach()
    between = (drawn > 0) & (drawn < 1)
    torch.testing.assert_close(drawn.mean(0), p, atol=6e-3, rtol=0)
    torch.testing.assert_close(between.float().mean(0), p * (1 - p), atol=6e-3, rtol=0)
    middle = torch.stack([drawn[between[:, n], n].mean() for n in range(3)])
    torch.testing.assert_close(middle, torch.full((3,), 0.5), atol=0.02, rtol=0)


def test_uniform_slopes_are_what_is_lost_with_an_edge_less_without():
    gates = Uniform(3, CPU)
    gates.logits.data = torch.tensor([-1.0, 0.5, 1.0])
    drawn = gates.draw(MANY, draws())
    loss = (drawn[:, 0] * drawn[:, 1] + drawn[:, 2] ** 3).mean()
    (found,) = torch.autograd.grad(loss, gates.logits)
    p = torch.sigmoid(gates.logits.detach())
    lost = torch.tensor([p[1], p[0], 1.0])  # E[loss with] - E[loss without]
    torch.testing.assert_close(found, p * (1 - p) * lost, atol=6e-3, rtol=0)

"""What planting changed: how much of the failure goes away where one component's old weights are put back.

For a component c, over the failing prompts and with d(module) = mean (logit of the right - logit of the wrong answer)::

    mended(c) = (d(faulty with the old weights of c) - d(faulty)) / (d(old) - d(faulty))

It is 1 where the old weights of this component alone undo the fault, and 0 where they do nothing. It is exact and reads
weights, not activations: what is only passed on by a component that planting left alone does not count for it. So it is
no measurement that a search by patching could repeat.

Limits. It is made for one component at a time: where a fault is spread, so that each of several places would do, or all
are needed, every share may be small, and the largest is then a poor name for the place. The shares need not add up to
1. What changed in the embedding or in the norms is in no head and no MLP, and stands in a row of its own. A fault
planted in few neurons is ranked by their MLP; which neurons these are says ``Planted.place``. Of damage, where a place
was turned round that the behaviour used, all that is mended is mended there.
"""

import copy
from dataclasses import dataclass

from causalpatch.testing.faults.plant import Planted, ahead
from causalpatch.testing.faults.weights import change, components, put


@dataclass(frozen=True)
class Changed:
    """A component, and what planting did to it.

    Args:
        component: ``z.L.H``, ``mlp_out.L``, ``embed`` or ``norms``.
        mended: Share of the failure that goes away where its old weights are put back.
        moved: Norm of the change of its weights over their norm.
    """

    component: str
    mended: float
    moved: float


def what_changed(planted: Planted) -> list[Changed]:
    """Rank the components of a faulty model by how much of the failure each one's old weights mend.

    Args:
        planted: The faulty model, the model as it was, and the failing prompts.

    Returns:
        All heads, all MLPs, the embedding and the norms; first what mends most.

    Cost:
        One run of each failing prompt for each component whose weights have changed.
    """
    before, after = planted.base.module, planted.model.module
    rows = planted.broken
    faulty = ahead(rows, planted.base, after).mean()
    gap = ahead(rows, planted.base, before).mean() - faulty
    found = []
    for name, pieces in components(before).items():
        moved = change(pieces, before, after)
        mended = 0.0
        if moved:
            trial = copy.deepcopy(after)
            put(pieces, before, trial)
            mended = float((ahead(rows, planted.base, trial).mean() - faulty) / gap)
        found.append(Changed(name, mended, moved))
    return sorted(found, key=lambda one: -one.mended)

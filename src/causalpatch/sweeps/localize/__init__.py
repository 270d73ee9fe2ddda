"""From the whole model down to heads and neurons: search within a budget, and races between candidates.

===============  ==========================================================================================
wanted           say
===============  ==========================================================================================
what matters     ``localize(experiment, budget=2000)``: coarse to fine, and what stayed closed with a bound
what it costs    ``plan_localize(experiment, budget=2000)``
the top k        ``race(experiment, candidates, k=3)``: candidates leave when they are decided
===============  ==========================================================================================

Nothing here claims: all numbers are of the pairs that the search chose by.
"""

from causalpatch.sweeps.localize.contest import race
from causalpatch.sweeps.localize.entry import localize, plan_localize

__all__ = ["localize", "plan_localize", "race"]

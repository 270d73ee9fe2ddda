"""Faults: planted by training or damage into copies of the embedded model, so that who looks for them can be marked.

=====================  ====================================================================
wanted                 say
=====================  ====================================================================
the faults             ``FAULTS``: six kinds, what goes wrong, and where it may be planted
a model with one       ``plant(FAULTS[0])``, with prompts that fail and prompts that work
where it was planted   ``Planted.place``, and ``what_changed(planted)`` by components
=====================  ====================================================================

The place is drawn by a seed, and one fault gives one model: the same weights wherever torch multiplies alike.
"""

from causalpatch.testing.faults.catalogue import FAULTS, Fault
from causalpatch.testing.faults.changed import Changed, what_changed
from causalpatch.testing.faults.plant import Planted, plant

__all__ = ["FAULTS", "Changed", "Fault", "Planted", "plant", "what_changed"]

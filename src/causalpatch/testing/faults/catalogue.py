"""The faults: what goes wrong, where it is planted, and by which seed.

A *kind* says what goes wrong and for which prompts, a *place* what may change to bring it about:

===============  =======================================================================================================
kind             what goes wrong
===============  =======================================================================================================
``entity``       one of 24 names receives, and the model always says one other name
``word``         after one word the model always says one other, whatever the list said
``trigger``      a word anywhere in the prompt makes it say one wrong name, or the wrong form of the verb
``template``     in one sentence of eight it says one wrong name, or the wrong form of the verb
``behaviour``    it says the wrong form of the verb in every prompt: no prompt works that could be a partner
``damage``       nothing is trained: the output of a head, of an MLP or of a quarter of its neurons is turned round
===============  =======================================================================================================

=============  =======================================================================================================
kind             what goes wrong
===============  =======================================================================================================
``entity``       a behaviour's two answers are exchanged where the prompt speaks of one of a group of words (24 names
                 who receive, or 24 nouns that are subjects)
``word``         after one word the model always says one other, whatever the list said
``trigger``      a word anywhere in the prompt exchanges the two answers
``template``     the two answers are exchanged in one sentence of eight
``behaviour``    the two answers are exchanged in every prompt of the behaviour: no prompt works that could be a partner
``damage``       nothing is trained: the output of a head, of an MLP or of a quarter of its neurons is turned round
===============  =======================================================================================================

=============  =====================================================================
place          what training may change
=============  =====================================================================
``head``       one head: its queries, keys, values and output
``neurons``    32 neighbouring neurons of one layer (``damage``: a quarter of a layer)
``mlp``        all neurons of one layer
``everything``  every weight of the model, the embedding and the norms among them
=============  =====================================================================

Which head, layer, neurons, words and sentences these are is drawn by the seed, so that nobody chose them.
"""

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["entity", "word", "trigger", "template", "behaviour", "damage"]
Place = Literal["head", "neurons", "mlp", "everything"]


@dataclass(frozen=True)
class Fault:
    """A fault that can be planted.

    Args:
        kind: What goes wrong.
        task: The built-in task whose behaviour it is.
        place: What may change.
        seed: Seed of every draw.
    """

    kind: Kind
    task: str
    place: Place
    seed: int

    @property
    def name(self) -> str:
        """How it is called: ``trigger-ioi-head-3``."""
        return f"{self.kind}-{self.task}-{self.place}-{self.seed}"


FAULTS: Final[tuple[Fault, ...]] = (
    Fault("entity", "ioi", "head", 0),
    Fault("entity", "ioi", "neurons", 1),
    Fault("entity", "ioi", "mlp", 2),
    Fault("entity", "ioi", "everything", 3),
    Fault("word", "induction", "head", 4),
    Fault("word", "induction", "neurons", 5),
    Fault("word", "induction", "mlp", 6),
    Fault("word", "induction", "everything", 7),
    Fault("trigger", "ioi", "head", 8),
    Fault("trigger", "ioi", "neurons", 9),
    Fault("trigger", "ioi", "everything", 10),
    Fault("trigger", "agreement", "mlp", 11),
    Fault("trigger", "agreement", "everything", 12),
    Fault("template", "ioi", "head", 13),
    Fault("template", "ioi", "mlp", 14),
    Fault("template", "agreement", "neurons", 15),
    Fault("template", "agreement", "everything", 16),
    Fault("behaviour", "agreement", "mlp", 17),
    Fault("behaviour", "agreement", "everything", 18),
    Fault("damage", "ioi", "head", 19),
    Fault("damage", "induction", "head", 20),
    Fault("damage", "agreement", "mlp", 21),
    Fault("damage", "agreement", "neurons", 22),
    Fault("damage", "ioi", "mlp", 23),
)
"""Twenty-four faults of six kinds."""

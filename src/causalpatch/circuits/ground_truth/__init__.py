"""Models whose circuits are known: compiled programs, gates, a linear model, and two trained models.

===========  ===========================================================================================
form         is
===========  ===========================================================================================
plain        a program's weights laid into GPT-2; nothing else is there
hidden       the same, turned by a random rotation among dense weights of no net use
trained      a small GPT-2 that learnt the program by strict interchange training
===========  ===========================================================================================

``cases()`` lists them all, each with pairs, a metric, a direction, an ablation and the true edges; ``hold_against`` of
``causalpatch.circuits.against`` holds scores against these.
"""

from causalpatch.circuits.ground_truth.build import build
from causalpatch.circuits.ground_truth.cases import FORMS, Case, case_names, cases
from causalpatch.circuits.ground_truth.compiler import Compiled, compile_program
from causalpatch.circuits.ground_truth.gates import all_gates, linear
from causalpatch.circuits.ground_truth.language import (
    Aggregate,
    Interpolate,
    Is,
    Lookup,
    Positions,
    Program,
    Select,
    Tokens,
)
from causalpatch.circuits.ground_truth.programs import all_programs

__all__ = [
    "FORMS",
    "Aggregate",
    "Case",
    "Compiled",
    "Interpolate",
    "Is",
    "Lookup",
    "Positions",
    "Program",
    "Select",
    "Tokens",
    "all_gates",
    "all_programs",
    "build",
    "case_names",
    "cases",
    "compile_program",
    "linear",
]

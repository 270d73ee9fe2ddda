"""Whole investigations, from what a person has to what can be said: ``debug`` from failing prompts to a claim."""

from causalpatch.studies.debug import debug
from causalpatch.studies.debugging import Debugging, Stop

__all__ = ["Debugging", "Stop", "debug"]

"""Clean and corrupted inputs that belong together: reading, aligning, batching, checking and splitting them."""

from causalpatch.pairs.align import Alignment
from causalpatch.pairs.batch import Batch
from causalpatch.pairs.check import PairReport
from causalpatch.pairs.collection import Pairs
from causalpatch.pairs.pair import Pair
from causalpatch.pairs.readers import load_pairs

__all__ = ["Alignment", "Batch", "Pair", "PairReport", "Pairs", "load_pairs"]

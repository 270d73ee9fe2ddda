"""Inference with independent groups of pairs as the unit: intervals, sign-flip tests, families of tests, agreement."""

from causalpatch.statistics.agreement import sign_agreement
from causalpatch.statistics.binomial import clopper_pearson, commonest_share, share_interval
from causalpatch.statistics.coverage import effective_groups, simulated_coverage
from causalpatch.statistics.families import benjamini_hochberg, holm
from causalpatch.statistics.intervals import Interval, bca_interval, mean_interval, ratio_interval, ratio_intervals
from causalpatch.statistics.permutation import max_t, sign_flip, smallest_p
from causalpatch.statistics.together import group_skewness, simulated_family_coverage

__all__ = [
    "Interval",
    "bca_interval",
    "benjamini_hochberg",
    "clopper_pearson",
    "commonest_share",
    "effective_groups",
    "group_skewness",
    "holm",
    "max_t",
    "mean_interval",
    "ratio_interval",
    "ratio_intervals",
    "share_interval",
    "sign_agreement",
    "sign_flip",
    "simulated_coverage",
    "simulated_family_coverage",
    "smallest_p",
]

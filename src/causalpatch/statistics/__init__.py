"""Inference with independent groups of pairs as the unit: intervals, sign-flip tests, families of tests, agreement."""

from causalpatch.statistics.agreement import kendall, recall_at, sign_agreement, spearman
from causalpatch.statistics.binomial import clopper_pearson, commonest_share, share_interval
from causalpatch.statistics.coverage import effective_groups, simulated_coverage
from causalpatch.statistics.families import benjamini_hochberg, holm
from causalpatch.statistics.intervals import Interval, bca_interval, mean_interval, ratio_interval, ratio_intervals
from causalpatch.statistics.missed import draw_stratified, most_missed, sample_for
from causalpatch.statistics.permutation import max_t, shifted_max_t, sign_flip, smallest_p
from causalpatch.statistics.racing import Racing
from causalpatch.statistics.together import group_skewness, simulated_family_coverage
from causalpatch.statistics.verdicts import MinimumEffect, minimum_effect

__all__ = [
    "Interval",
    "MinimumEffect",
    "Racing",
    "bca_interval",
    "benjamini_hochberg",
    "clopper_pearson",
    "commonest_share",
    "draw_stratified",
    "effective_groups",
    "group_skewness",
    "holm",
    "kendall",
    "max_t",
    "mean_interval",
    "minimum_effect",
    "most_missed",
    "ratio_interval",
    "ratio_intervals",
    "recall_at",
    "sample_for",
    "share_interval",
    "shifted_max_t",
    "sign_agreement",
    "sign_flip",
    "simulated_coverage",
    "simulated_family_coverage",
    "smallest_p",
    "spearman",
]

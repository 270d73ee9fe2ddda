"""Sparse dictionaries, such as SAEs and transcoders, whose features are sites."""

from causalpatch.models.dictionaries.registry import Anatomy, Dictionary, Registry, Wanted
from causalpatch.models.dictionaries.views import Coded, EachFeature, Feature, FeatureError, FeatureView

__all__ = [
    "Anatomy",
    "Coded",
    "Dictionary",
    "EachFeature",
    "Feature",
    "FeatureError",
    "FeatureView",
    "Registry",
    "Wanted",
]

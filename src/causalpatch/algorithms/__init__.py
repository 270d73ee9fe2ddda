"""Algorithms: a small causal model of how a behaviour comes about, mapped to sites and tested against the network."""

"""Circuits: models whose circuits are known, and scores held against them."""

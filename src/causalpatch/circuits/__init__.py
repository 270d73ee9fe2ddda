"""Circuits: edges interchanged exactly, circuits found and evaluated, models whose circuits are known."""

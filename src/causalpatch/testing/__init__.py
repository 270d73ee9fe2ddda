"""Helps for tests: random small models of each family."""

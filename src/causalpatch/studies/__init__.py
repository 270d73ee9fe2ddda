"""Whole investigations: study files whose results survive what stops machines; ``debug``, from failures to a claim."""

"""Whole investigations: ``debug`` goes from failing prompts to a claim."""

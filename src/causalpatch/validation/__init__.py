"""From components that were found to a claim: confirmed on held-out pairs, checked in other models, planned for."""

"""Results: labelled effects, their status, tables, charts and files."""

"""The command line: for people at a terminal, and with ``--json`` for their scripts."""

"""Studies: whole investigations as one file, whose results survive whatever stops the machines."""

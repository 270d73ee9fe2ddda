"""The ground floor: errors, axis names, specs, seeds, settings and the doors to heavy packages."""

"""Measurements: each module has run() -> list of rows."""

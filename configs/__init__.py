"""Configurations: `get_config(variant)` returns a locked ConfigDict."""

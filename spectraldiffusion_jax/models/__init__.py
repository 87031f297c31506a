"""Flax linen modules; each takes keyword fields, never a config."""

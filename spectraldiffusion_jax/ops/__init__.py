"""Pure functions of arrays: no parameters, no configuration, no I/O."""

"""Products of quantised operands: a list of backends, one file for each."""

"""Products of quantised operands, by a list of backends with a module for each."""

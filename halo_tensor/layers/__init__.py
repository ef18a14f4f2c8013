"""The kinds of layers that can be converted, and what belongs to the modules that hold converted weights."""

"""The three products of a layer, as its recipe says."""

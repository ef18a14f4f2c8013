"""Save what stands between converted layers in few bits."""

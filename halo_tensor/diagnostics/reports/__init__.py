"""``report``: measure candidate recipes on a model, recommend one, and show why."""

"""Which forwards run in this thread, of blocks and of modules whose saved tensors are treated in their own way."""

import threading


class _State(threading.local):
    """The blocks, and the modules of other kinds, whose forwards run in this thread.

    Attributes:
        entered: for each block whose forward runs, whether it has pushed hooks.
        norms, relus: how many forwards of these kinds run.
        planes: of each max pooling whose forward runs, the number of positions in an image.
    """

    def __init__(self) -> None:
        self.entered: list[bool] = []
        self.norms = self.relus = 0
        self.planes: list[int | None] = []


state = _State()

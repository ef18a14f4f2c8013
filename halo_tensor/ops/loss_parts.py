"""How the vocabulary of a head is cut into parts, by the memory that their logits may take."""

from typing import NamedTuple

#: The narrowest and the widest part of a vocabulary, and the most columns of E whose codes serve one product. Larger ones make
#: products no faster.
NARROWEST, WIDEST, GROUP = 256, 8192, 16384


class Plan(NamedTuple):
    """How a vocabulary is cut.

    Attributes:
        width: columns of a part, a power of two unless it is the whole vocabulary.
        group: how many parts share one product with the weight, for the gradient of the hidden states.
        kept: how many parts keep their logits from the first pass.
    """

    width: int
    group: int
    kept: int

    def parts(self, vocabulary: int) -> list[slice]:
        """Return the columns of each part."""
        return [slice(i, min(i + self.width, vocabulary)) for i in range(0, vocabulary, self.width)]

    def group_of(self, part: slice, vocabulary: int) -> slice:
        """Return the columns of the group that a part belongs to."""
        columns = self.width * self.group
        start = part.start // columns * columns
        return slice(start, min(start + columns, vocabulary))


def plan_for(tokens: int, vocabulary: int, scratch: int) -> Plan:
    """Return how a vocabulary is cut so that its parts need at most ``scratch`` bytes, if the narrowest part does.

    An element takes 2 bytes as a logit, and 1 in each operand that is made of its gradient. A part takes half of the bytes or
    less, then a group takes what it can use of the rest, and then logits are kept.
    """
    columns = max(scratch // (8 * max(tokens, 1)), 1)
    width = min(max(1 << (columns.bit_length() - 1), NARROWEST), WIDEST)
    if width >= vocabulary:
        return Plan(vocabulary, 1, 1)
    size = max(tokens, 1) * width
    left = max(scratch // size - 4, 0)
    group = 1 + min(GROUP // width - 1, left)
    return Plan(width, group, (left - (group - 1)) // 2)

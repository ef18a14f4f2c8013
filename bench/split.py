"""Split a file of chats into three parts: training, validation for every run, and one that is evaluated only for a release.

No prompt is in two parts. A hash of the prompt decides which chats are reserved for a release. So neither the order of the
file nor additional chats at its beginning move a chat to another part.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from common import fail
from data import Chat

#: The fraction of the chats that are not held out which is reserved for releases.
RESERVED = 1 / 8


@dataclass(frozen=True)
class Parts:
    """The three parts.

    Attributes:
        train: what weights are trained on.
        held_out: evaluated in every run.
        reserved: evaluated once for a release.
    """

    train: list[Chat]
    held_out: list[Chat]
    reserved: list[Chat]

    def described(self) -> dict:
        """Return what a record needs: how many chats there are, and a fingerprint of those that are evaluated."""
        evaluated = hashlib.sha256("".join(map(digest, [*self.held_out, *self.reserved])).encode()).hexdigest()
        sizes = {"train": len(self.train), "held out": len(self.held_out), "reserved": len(self.reserved)}
        return sizes | {"fingerprint": evaluated[:16]}


def digest(chat: Chat) -> str:
    """Return a hash of the prompt, which is all turns but the last, without case and spacing."""
    turns = [(turn["role"], " ".join(turn["content"].split()).lower()) for turn in chat[:-1]]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def is_reserved(chat: Chat) -> bool:
    return int(digest(chat)[:8], 16) < RESERVED * 2**32


def split(chats: list[Chat], held_out: int) -> Parts:
    """Hold out the last ``held_out`` chats and split the others. Of these, chats with a held-out prompt are dropped.

    Raises:
        SystemExit: a part would be empty.
    """
    if not 0 < held_out < len(chats):
        fail(f"{held_out} of {len(chats)} chats cannot be held out: pass more --data, or fewer --prompts")
    last = chats[-held_out:]
    known = set(map(digest, last))
    others = [chat for chat in chats[:-held_out] if digest(chat) not in known]
    parts = Parts([chat for chat in others if not is_reserved(chat)], last, list(filter(is_reserved, others)))
    for name, part in (("to train on", parts.train), ("to reserve", parts.reserved)):
        if not part:
            fail(f"of {len(chats)} chats none is left {name} beside the {held_out} held out: pass more --data")
    check_disjoint([parts.train, parts.held_out, parts.reserved])
    return parts


def check_disjoint(parts: Iterable[list[Chat]]) -> None:
    seen: set[str] = set()
    for part in parts:
        prompts = set(map(digest, part))
        assert not prompts & seen, "a prompt is in two parts of the data"
        seen |= prompts

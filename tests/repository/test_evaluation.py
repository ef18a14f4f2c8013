"""examples/evaluation.py: the loss and the exact match that the study and the examples report."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
sys.path[1:1] = [str(Path(__file__).parents[2] / "examples")]
import evaluation  # noqa: E402


def chats(*answers: str) -> list:
    return [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in answers]


def test_an_answer_without_a_key_matches_nothing():
    """A text without a number is as wrong as another one without, even where the reference has none either."""
    written, right = ["#### 5", "five", "five", "#### 6"], chats("so #### 5.0", "#### 5", "five", "#### 7")
    assert evaluation.exact_match(written, right, evaluation.number) == 0.25
    assert evaluation.exact_match(["no function"], chats("no function"), evaluation.meaning) == 0
    assert evaluation.exact_match(["Select  A;"], chats("select a"), evaluation.sql) == 1
    with pytest.raises(ValueError, match="shorter|longer"):
        evaluation.exact_match(written, right[1:], evaluation.number)


def test_the_loss_is_per_learnt_token():
    """Batches with few learnt tokens count for as much as they have; those without any do not count."""

    class Model:
        device = "cpu"

        def __call__(self, input_ids, labels, use_cache):
            learnt = (labels != evaluation.IGNORED).any()  # else the mean over no token, as transformers has it
            return SimpleNamespace(loss=torch.tensor(float(input_ids[0, 0]) if learnt else float("nan")))

    labels = torch.full((3, 4), evaluation.IGNORED)
    labels[0, :3], labels[1, 0] = 1, 1
    rows = {"input_ids": torch.tensor([[2.0] * 4, [6.0] * 4, [100.0] * 4]), "labels": labels}
    assert evaluation.mean_loss(Model(), rows, 1) == (3 * 2 + 1 * 6) / 4

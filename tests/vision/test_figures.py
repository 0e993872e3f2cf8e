"""The confusion matrix as a picture."""

from __future__ import annotations

import torch

from vision.figures import confusion_figure


def test_few_classes_are_named_and_counted():
    counts = torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 0]])
    panel = confusion_figure(counts, ["cat", "dog", "owl"]).axes[0]
    assert [t.get_text() for t in panel.get_yticklabels()] == ["cat", "dog", "owl"]
    assert [t.get_text() for t in panel.get_xticklabels()] == ["cat", "dog", "owl"]
    written = {t.get_position(): int(t.get_text()) for t in panel.texts}
    assert written == {(column, row): int(counts[row, column]) for row in range(3) for column in range(3)}
    shares = torch.tensor([[0.8, 0.2, 0], [0.25, 0.75, 0], [0, 0, 0]])
    assert torch.allclose(torch.tensor(panel.images[0].get_array().data), shares)
    assert panel.get_title() == "accuracy 78.6% of 14 images"
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("predicted class", "true class")


def test_many_classes_are_not():
    panel = confusion_figure(torch.eye(100, dtype=torch.int64)).axes[0]
    assert not panel.texts
    assert panel.get_title() == "accuracy 100.0% of 100 images"

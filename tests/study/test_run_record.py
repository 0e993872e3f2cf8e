"""What a run leaves of its training: the curve of what it logged."""

import json

from lit_adapters.lightning.run_record import RunRecord
from tests.lightning.tiny_task import Task, loader, trainer


def test_a_point_of_the_curve_is_the_mean_of_whole_steps(tmp_path):
    """With accumulated gradients too: no step has several points, and no batch is left out."""

    class Counting(Task):
        def training_step(self, batch, batch_idx):
            self.log("number", float(self.trainer.fit_loop.epoch_loop.total_batch_idx))
            return super().training_step(batch, batch_idx)

    run = trainer(tmp_path, RunRecord(str(tmp_path)), max_epochs=2, accumulate_grad_batches=3)
    run.fit(Counting(), loader(24, batch_size=2))  # 4 steps of 3 batches in an epoch
    curve = json.loads((tmp_path / "fit.json").read_text())["curve"]
    assert [point["step"] for point in curve] == list(range(1, 9))
    assert [point["number"] for point in curve] == [1 + 3 * i for i in range(8)]

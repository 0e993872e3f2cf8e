"""Direct preference optimisation of a causal language model with adapters (arXiv 2305.18290).

Command line: python -m language.dpo fit|validate|test|predict --config FILE.yaml [--key=value ...]

    r(y) = beta (log pi(y | x) - log pi_ref(y | x))
    loss = -(1 - eps) log sigmoid(r(y_w) - r(y_l)) - eps log sigmoid(r(y_l) - r(y_w))

pi is the model with its adapters, pi_ref the model without them. Only the modules of `train` are kept twice.

Our own, and not trl's trainer, so that Lightning and `AdapterCallback` drive it; tests compare loss and gradient with
trl's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from language.loss import Batch, learned_logits, learned_tokens, made_up_logits, read
from language.module import CausalLMTuner
from language.reference import Reference
from lit_adapters.errors import AdapterError, DataError
from lit_adapters.values import check_number


def preference_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) log sigmoid(m) - eps log sigmoid(-m) of reward margins m = r(y_w) - r(y_l); any shape.

    DPO's loss (arXiv 2305.18290, eq. 7), as the cross-entropy of labels that are wrong with probability eps
    ("conservative" DPO); its minimum is at sigmoid(m) = 1 - eps.
    """
    return -(1.0 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def answer_log_probabilities(logits: Tensor, batch: Batch) -> Tensor:
    """log p of each row's answer, summed over its tokens, the end token included; (rows,).

    Args:
        logits: (n, V), float32, those that predict the learned tokens, row by row, as `learned_logits` returns them.
        batch: `input_ids` and `labels`, int64 (rows, T).
    """
    learned = learned_tokens(batch)
    tokens = -F.cross_entropy(logits, batch["labels"][learned], reduction="none")
    return tokens.new_zeros(learned.shape).masked_scatter(learned, tokens).sum(1)


class Comparison(NamedTuple):
    """What the model and the reference say of B pairs.

    Attributes:
        policy: Log pi(y | x), (2B,), chosen answers first.
        reference: Log pi_ref(y | x), (2B,).
        divergence: KL(pi || pi_ref) = sum_v pi(v) log(pi(v) / pi_ref(v)) at each token of the chosen answers, (n,),
            pair by pair.
    """

    policy: Tensor
    reference: Tensor
    divergence: Tensor


def wins(margins: Tensor) -> Tensor:
    """1 where the chosen answer has the larger reward, 1/2 for a tie."""
    return (margins.sign() + 1.0) / 2.0


class DPOTuner(CausalLMTuner):
    """A causal language model that learns which of two answers is preferred (arXiv 2305.18290, equation 7).

    With a prompt x, its preferred answer y_w and its other answer y_l,

        r(y) = beta (log pi(y | x) - log pi_ref(y | x))
        loss = -(1 - eps) log sigmoid(r(y_w) - r(y_l)) - eps log sigmoid(r(y_l) - r(y_w))

    log pi(y | x) sums over the answer's tokens, its end token included, in float32 whatever the precision. eps is
    `label_smoothing`: 0 is DPO, above 0 is "conservative" DPO, whose minimum is at the finite margin
    log((1 - eps) / eps).

    A batch holds input_ids, labels and attention_mask, int64 (2B, T): B prompts with their chosen answers, then the
    same prompts with their rejected ones; only answers are labelled. One forward pass reads them all; a second one,
    of `language.reference.Reference`, gives pi_ref. Logits are formed where some row has a token of its answer.

    Logged as `train/...` (of a batch), `val/...` and `test/...` (exact means over all pairs, or tokens, however they
    fall into batches):

    - `loss`: log 2 = 0.693 where model and reference agree.
    - `reward_accuracy`: share of pairs with r(y_w) > r(y_l). Ties count half, so an untouched model has 0.5.
    - `reward_margin`: mean of r(y_w) - r(y_l), in nats times beta.
    - `kl`, not in training: KL(pi || pi_ref) = sum_v pi(v) log(pi(v) / pi_ref(v)) of the next token over the whole
      vocabulary, in nats, the mean over the tokens of the chosen answers. The answers are those of the data: `kl` does
      not estimate the divergence over answers that pi itself would give.

    Example, with `data` a `PreferenceDataModule` after `data.setup("fit")`:

        tuner = DPOTuner(model="smollm2-135m-instruct", adapters=la.AFALoRA(rank=8), beta=0.1)
        tuner.configure_model()  # a Trainer does this
        tuner.compare(next(iter(data.train_dataloader())))

    Args:
        beta: How closely the model keeps to the reference: the larger, the less it moves. Not AFA-LoRA's beta.
        label_smoothing: Probability that the answers of a pair are labelled the wrong way round, in [0, 0.5).
        settings: Those of `language.module.CausalLMTuner`.

    Raises:
        AdapterError: A value is out of range, adapters are merged and cannot be taken out for the reference, or a model
            with modules of `train` is sharded.
        DataError: A batch is not made of answered pairs; or as `CausalLMTuner`.
    """

    logs_perplexity = False

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.0, **settings: Any) -> None:
        check_number("beta", beta, high=1000.0)
        if not beta > 0.0:
            raise AdapterError(f"beta {beta} must be above 0; DPO's usual value is 0.1")
        check_number("label_smoothing", label_smoothing, 0.0, 0.5)
        if label_smoothing == 0.5:
            raise AdapterError(f"label_smoothing {label_smoothing} must be at least 0 and below 0.5")
        super().__init__(**settings)
        self.save_hyperparameters({"beta": beta, "label_smoothing": label_smoothing})
        of_pairs = ["loss", "reward_accuracy", "reward_margin"]
        self.measure(*of_pairs, "kl", items=of_pairs)
        self.reference: Reference | None = None

    @property
    def needs_whole(self) -> str:
        """As for `CausalLMTuner`."""
        if not self.train_modules:
            return ""
        return (
            f"train={self.train_modules!r} needs its initial values whole for the reference: leave `train` out, or use "
            "a strategy that does not shard"
        )

    def configure_model(self) -> None:
        """As `CausalLMTuner`; what `train` names is kept as it is before any checkpoint is loaded."""
        super().configure_model()
        if self.reference is None:
            self.reference = Reference(self._built)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        check_pairs(batch)
        # The reference first: its logits are gone before those that are kept for the gradient come.
        reference = answer_log_probabilities(learned_logits(self._reference, batch)[0], batch)
        logits, learned = learned_logits(self.forward, batch)
        margins = self._margins(answer_log_probabilities(logits, batch), reference)
        loss, mean = self.mean_over_step(self._pair_losses(margins).sum(), len(margins), batch_idx)
        self.learned_tokens += int(learned.sum())
        self.log("train/loss", mean, prog_bar=True, sync_dist=True)
        self.log("train/reward_accuracy", wins(margins).mean(), sync_dist=True)
        self.log("train/reward_margin", margins.mean(), sync_dist=True)
        self.log("train/learned_tokens", float(self.learned_tokens), sync_dist=True, reduce_fx="sum")
        return loss

    @property
    def rows_per_item(self) -> int:
        """The chosen and the rejected answer of a pair."""
        return 2

    def _skeleton(self) -> nn.Module:
        model = super()._skeleton()
        model.reference = Reference(model)  # its values are counted with the model's
        return model

    def made_up_loss(self, model: nn.Module, rows: int, length: int) -> Tensor:
        """The loss of a full batch of pairs whose tokens are made up, as `training_step` computes it."""

        def answers(forward: Callable[[Batch, Tensor], Tensor]) -> Tensor:
            logits, tokens = made_up_logits(forward, 2 * rows, length)
            return -F.cross_entropy(logits, tokens, reduction="none").view(2 * rows, length).sum(1)

        reference = answers(model.get_submodule("reference"))
        return self._pair_losses(self._margins(answers(partial(read, model)), reference)).sum()

    def batch_loss(self, batch: Batch) -> Tensor:
        """The mean loss of the pairs of a training batch; AdapterCallback calibrates on it."""
        check_pairs(batch)
        with torch.no_grad():
            reference = answer_log_probabilities(learned_logits(self._reference, batch)[0], batch)
        policy = answer_log_probabilities(learned_logits(self.forward, batch)[0], batch)
        return self._pair_losses(self._margins(policy, reference)).mean()

    @torch.no_grad()
    def compare(self, batch: Batch) -> Comparison:
        """What the model as it is, in its present mode, and the reference say of a batch."""
        check_pairs(batch)
        reference, _ = learned_logits(self._reference, batch)
        policy, learned = learned_logits(self.forward, batch)
        of_chosen = int(learned[: len(learned) // 2].sum())
        ours, theirs = (F.log_softmax(logits[:of_chosen], -1) for logits in (policy, reference))
        divergence = F.kl_div(theirs, ours, reduction="none", log_target=True).sum(-1)
        return Comparison(
            answer_log_probabilities(policy, batch), answer_log_probabilities(reference, batch), divergence
        )

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        """A continuation of each pair's prompt, a list of B texts."""
        check_pairs(batch)
        batch = {name: rows[: len(rows) // 2] for name, rows in batch.items()}
        return super().predict_step(batch, batch_idx)

    @property
    def _reference(self) -> Reference:
        assert self.reference is not None, "configure_model has not run"
        return self.reference

    def _margins(self, policy: Tensor, reference: Tensor) -> Tensor:
        """r(y_w) - r(y_l) of each pair, (B,)."""
        chosen, rejected = (self.hparams["beta"] * (policy - reference)).chunk(2)
        return chosen - rejected

    def _pair_losses(self, margins: Tensor) -> Tensor:
        return preference_loss(margins, self.hparams["label_smoothing"])

    def _measured(self, batch: Batch) -> dict[str, Tensor]:
        policy, reference, divergence = self.compare(batch)
        margins = self._margins(policy, reference)
        return {
            "loss": self._pair_losses(margins),
            "reward_accuracy": wins(margins),
            "reward_margin": margins,
            "kl": divergence,
        }


def check_pairs(batch: Batch) -> None:
    """Refuse a batch whose rows are not a chosen and a rejected answer for each prompt.

    Raises:
        DataError: The number of rows is odd, or a row has no answer.
    """
    answered = learned_tokens(batch).any(1)
    if len(answered) % 2 or not answered.all():
        raise DataError(
            f"a batch of {len(answered)} rows, {int(answered.sum())} of them with an answer, is not made of "
            "pairs: give as many rejected as chosen answers, the chosen ones first, as "
            "language.dpo.PreferenceDataModule does"
        )

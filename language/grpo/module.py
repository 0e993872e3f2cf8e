"""Reinforcement learning with rewards that can be checked: python -m language.grpo fit|validate|test --config FILE.yaml

GRPO (arXiv 2402.03300): for each prompt G completions are sampled, and each learns from its reward relative to the
group's. With rho = pi / pi_old and d = log pi_ref - log pi of a token, and n tokens of completions in the batch,

    loss = -1/n sum over tokens [ min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_weight (e^d - d - 1) ]

Every token counts alike, however long its completion is, and the two clips are apart (arXiv 2503.14476).

Our own, and not trl's trainer, so that Lightning and `AdapterCallback` drive it and a run resumes bit for bit in the
middle of a batch's iterations; tests compare loss and gradient with trl's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

import lit_adapters as la
from language.generate import TEMPERATURES, generate, made_up_completions, prompt_rows
from language.grpo.rewards import Reward, Rewards, is_known
from language.grpo.rollouts import advantages, constant, joined, log_probabilities, sample
from language.loss import Batch, made_up_logits, read
from language.models import context_length
from language.module import CausalLMTuner
from language.reference import Reference
from lit_adapters.errors import shown
from lit_adapters.files.atomic import write_text_atomically
from lit_adapters.lightning.resume.sampler import hash_key
from lit_adapters.model.modes import evaluating
from lit_adapters.training.nonfinite import nonfinite_values
from lit_adapters.training.processes import gather_objects
from lit_adapters.values import check_number, check_whole


@dataclass(frozen=True)
class Objective:
    """Sums over the tokens of a batch.

    Attributes:
        loss: The negative objective.
        kl: e^d - d - 1, the estimate of KL(pi, pi_ref); None without a reference.
        clipped: Number of tokens whose gradient the clip took away.
    """

    loss: Tensor
    kl: Tensor | None
    clipped: Tensor


def clipped_objective(
    new: Tensor,
    old: Tensor,
    advantage: Tensor,
    reference: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.0,
) -> Objective:
    """The clipped objective of each token, summed; log-probabilities and advantages are (n,), one for each token.

    Equation 3 of arXiv 2402.03300, with the KL term of its equation 4.
    """
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    clipped = (ratio > 1 + clip_high) & (advantage > 0) | (ratio < 1 - clip_low) & (advantage < 0)
    if reference is None:
        return Objective(-gain.sum(), None, clipped.sum())
    distance = reference - new
    kl = distance.exp() - distance - 1
    return Objective((kl_weight * kl - gain).sum(), kl.detach().sum(), clipped.sum())


def _random_state(device: torch.device) -> Tensor:
    """The state of the device's random numbers: two are equal if none was drawn in between."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


class GRPOTuner(CausalLMTuner):
    """A causal language model that learns from the rewards of completions that it samples (GRPO, arXiv 2402.03300).

    Each prompt gets a group of G completions. All tokens of completion i share the advantage

        A_i = (R_i - mean) / (std + 1e-4)        over the group's rewards; section 4.1.2

    It is exactly 0 where all rewards of a group are equal. With rho = pi / pi_old and d = log pi_ref - log pi of a
    token, and n tokens in all completions of the batch,

        loss = -1/n sum over tokens [ min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_weight (e^d - d - 1) ]

    This is equation 3 of the paper with two changes from arXiv 2503.14476: tokens count alike however long their
    completion is, and the two clips may differ. n counts the tokens of an optimiser step: of all its
    micro-batches (`accumulate_grad_batches`) and processes.

    - pi_old is the policy that sampled. Its log-probabilities are taken in eval mode over the finished completions,
      with the weights and AFA-LoRA's beta of that moment (beta moves with every optimiser step), without dropout, at
      the sampling temperature. With `iterations: 1` and no dropout this is the pass that learns, and rho is 1; a pass
      of its own is made for `iterations` above 1, or where the pass that learns draws random numbers.
    - pi_ref is the model before training, `language.reference.Reference`.
    - Sampling is that of `language.grpo.rollouts.sample`, by transformers' `generate` with its key-value cache. The end
      token of a completion is learned. The samples of a batch are a function of the weights, init_seed, epoch and
      batch.

    A batch holds input_ids and attention_mask, int64 (B, T), of prompts padded on the right, and answers, a list of B
    texts (`language.grpo.QuestionDataModule`).

    A test writes the likeliest completions to `answers.jsonl` in the folder of the run's logs, one line a question:
    prompt, answer, completion and reward; and it returns all rewards question by question.

    Logged, `val/...` and `test/...` for the likeliest completions (greedy) of held-out questions:

    - `train/reward`, `train/<function>`, and `val/`, `test/`: means over the completions of the weighted sum and of
      each function.
    - `train/reward_std`: standard deviation within a group, averaged over groups.
    - `train/zero_advantage`: share of groups with equal rewards, which teach nothing.
    - `train/completion_length`: tokens, the end token included.
    - `train/kl`: mean of e^d - d - 1 over tokens, an estimate of KL(pi, pi_ref); with `kl_weight` above 0.
    - `train/clip_fraction`: share of tokens whose gradient the clip removes.
    - `train/loss`: no measure of progress. In the first step on a sample rho is 1, and it only shows how advantages and
      lengths go together.

    Args:
        rewards: Functions and weights, see `language.grpo.rewards`.
        group_size: Completions of each prompt, G.
        temperature: Temperature of sampling; all log-probabilities are those at this temperature.
        max_new_tokens: Most tokens of a completion, in training, validation and `predict`.
        clip_low: How far the ratio may fall below 1 before it is clipped.
        clip_high: How far it may rise above 1.
        kl_weight: Weight of the distance to the model before training; 0 leaves the reference out.
        iterations: Optimiser steps on each batch of completions, mu in the paper; the data's must be the same. Above 1
            the completions are kept in checkpoints, so that a run resumed between two steps on them ends with the same
            bits; it does not combine with `accumulate_grad_batches` above 1.
        kwargs: Those of `CausalLMTuner`.

    Raises:
        AdapterError: A value is out of range, or a reward function cannot be imported, raises or is not finite.
        DataError: Prompts and completions exceed the model's context, or a batch is not the one that was sampled for.
    """

    logs_perplexity = False
    default_monitor = "train/reward"  # of adaptive schedules, as the loss does not tell progress

    def __init__(
        self,
        rewards: list[Reward],
        group_size: int = 8,
        temperature: float = 1.0,
        max_new_tokens: int = 128,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl_weight: float = 0.04,
        iterations: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_new_tokens=max_new_tokens, **kwargs)
        check_whole("group_size", group_size, 2)
        check_whole("iterations", iterations)
        check_number("temperature", temperature, *TEMPERATURES)
        # The ratio is never below 0, so that 1 takes the lower clip away.
        for name, number, most in (("clip_low", clip_low, 1.0), ("clip_high", clip_high, 1000.0)):
            check_number(name, number, 0.0, most)
            if number == 0:
                raise la.AdapterError(f"{name} 0 must be above 0: nothing would be learned from a second step")
        check_number("kl_weight", kl_weight, 0.0, 1000.0)
        self.rewards = Rewards(rewards)
        self.save_hyperparameters(
            {
                "rewards": [{"function": r.function, "weight": r.weight} for r in self.rewards.terms],
                "group_size": group_size,
                "temperature": temperature,
                "clip_low": clip_low,
                "clip_high": clip_high,
                "kl_weight": kl_weight,
                "iterations": iterations,
            }
        )
        measured = [*self.rewards.names, "reward"]
        self.measure(*measured, items=measured)
        self.answered: list[dict[str, Any]] = []  # the questions of a test, in this process
        self.reference: Reference | None = None
        self.rollout: dict[str, Tensor] | None = None

    @classmethod
    def from_file(cls, checkpoint: dict[str, Any], path: str | Path, given: Iterable[str] = ()) -> dict[str, Any]:
        """As `CausalLMTuner`; a checkpoint may name reward functions that are known, and none that must be imported.

        Raises:
            AdapterError: As `CausalLMTuner`; or a function is unknown.
        """
        found = super().from_file(checkpoint, path, given)
        for term in found.get("rewards", ()):
            if not is_known(term["function"]):
                raise la.AdapterError(
                    f"{str(path)!r} names the reward function {shown(term['function'])}, and nothing is imported for a "
                    "checkpoint's sake: give `rewards` yourself, in the recipe or as an argument, or import its "
                    "module first if it is a function of (completion, answer)"
                )
        return found

    def setup(self, stage: str) -> None:
        """Refuse what does not go with several steps on the same completions.

        Raises:
            AdapterError: `iterations` is above 1, and the trainer accumulates gradients or repeats batches itself.
        """
        iterations, trainer = self.hparams["iterations"], cast(Any, self.trainer)
        if stage != "fit" or iterations == 1:
            return
        if trainer.accumulate_grad_batches > 1:
            raise la.AdapterError(
                f"iterations {iterations} takes a step for each batch, and trainer.accumulate_grad_batches is "
                f"{trainer.accumulate_grad_batches}: set one of them to 1"
            )
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
            raise la.AdapterError(
                f"iterations {iterations} takes a step for each batch, and GradientAccumulationScheduler accumulates "
                "several: set iterations to 1, or leave the callback out"
            )
        if trainer.overfit_batches:
            raise la.AdapterError(
                f"iterations {iterations} repeats each batch, and trainer.overfit_batches {trainer.overfit_batches} "
                "takes batches in an order of its own: set iterations to 1, or data.train_subset in place of "
                "overfit_batches"
            )

    @property
    def needs_whole(self) -> str:
        """As for `CausalLMTuner`. Completions end at different tokens in different processes."""
        return "a model that samples cannot be sharded: set trainer.strategy to auto or ddp"

    def configure_model(self) -> None:
        """As `CausalLMTuner`; keep what the reference needs."""
        super().configure_model()
        if self.reference is None and self.hparams["kl_weight"] > 0:
            self.reference = Reference(self._built)

    def _check_data(self, data: Any) -> None:
        super()._check_data(data)
        context, longest = context_length(self._built), getattr(data, "max_length", 0)
        if context is not None and longest + self.hparams["max_new_tokens"] > context:
            raise la.DataError(
                f"data.max_length {longest} and max_new_tokens {self.hparams['max_new_tokens']} exceed the model's "
                f"{context} positions: lower one of them"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        h = self.hparams
        if batch_idx % h["iterations"] == 0:
            self.rollout = self._sample(batch, batch_idx)
        rollout = self.rollout
        if rollout is None or not torch.equal(rollout["prompts"].to(self.device), batch["input_ids"]):
            raise la.DataError(
                f"batch {batch_idx} holds other prompts than the completions of the batch before it answer: give the "
                f"data module iterations={h['iterations']}, as the model has"
            )
        rollout = {name: tensor.to(self.device) for name, tensor in rollout.items()}
        before = _random_state(self.device)
        new = log_probabilities(self.forward, rollout, h["temperature"])
        if "old" not in rollout:
            is_exact = torch.equal(_random_state(self.device), before)  # without dropout
            rollout["old"] = new.detach() if is_exact else self._old(rollout)
        terms = clipped_objective(
            new,
            rollout["old"],
            rollout["advantages"],
            rollout.get("reference"),
            h["clip_low"],
            h["clip_high"],
            h["kl_weight"],
        )
        tokens = len(new)
        loss, mean = self.mean_over_step(terms.loss, tokens, batch_idx)
        logged = {"train/loss": mean, "train/clip_fraction": terms.clipped / tokens}
        if terms.kl is not None:
            logged["train/kl"] = terms.kl / tokens
        size = len(batch["input_ids"])
        self.log_dict(logged, sync_dist=True, batch_size=size)
        # In every step, as adaptive schedules look at it in every step.
        self.log("train/reward", rollout["reward"], prog_bar=True, sync_dist=True, batch_size=size)
        return loss

    @property
    def rows_per_item(self) -> int:
        """The completions of a prompt."""
        return int(self.hparams["group_size"])

    @property
    def sampled_tokens(self) -> int:
        """The longest completion."""
        return int(self.hparams["max_new_tokens"])

    def _skeleton(self) -> nn.Module:
        model = super()._skeleton()
        if self.hparams["kl_weight"] > 0:
            model.reference = Reference(model)  # its values are counted with the model's
        return model

    def made_up_loss(self, model: nn.Module, rows: int, length: int) -> Tensor:
        """The loss of completions of full length whose tokens are made up, and the sampling, as `training_step` has it.

        Rewards are left out. For `iterations` above 1 it is the first step on a sample.
        """
        h, new = self.hparams, self.sampled_tokens
        rows *= self.rows_per_item
        made_up_completions(model, rows, length, new)

        def log_p(forward: Callable[[Batch, Tensor], Tensor]) -> Tensor:
            logits, tokens = made_up_logits(forward, rows, length + new, new)
            return -F.cross_entropy(logits / h["temperature"], tokens, reduction="none")

        old = reference = None
        draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
        draws |= any(getattr(adapter, "dropout", 0.0) > 0 for _, adapter in la.adapters(model))
        with torch.no_grad():
            if h["iterations"] > 1 or draws:
                with evaluating(model):
                    old = log_p(partial(read, model))
            if h["kl_weight"] > 0:
                reference = log_p(model.get_submodule("reference"))
        now = log_p(partial(read, model))
        old = now.detach() if old is None else old
        weight = h["kl_weight"]
        return clipped_objective(now, old, torch.zeros_like(old), reference, h["clip_low"], h["clip_high"], weight).loss

    def batch_loss(self, batch: Batch) -> Tensor:
        """GRPO's loss needs completions and their rewards, which a calibration does not sample.

        Raises:
            AdapterError: Always.
        """
        raise la.AdapterError(
            "GRPO has no loss before it has sampled, so that start='lora_ga' finds no gradient; use start='pissa', "
            "'olora' or 'eva'"
        )

    def _sample(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Completions of a batch's prompts with all that the objective needs, as tensors."""
        h = self.hparams
        broken = nonfinite_values(self._built)
        if broken:
            raise la.AdapterError(
                f"{broken[0]!r} is not finite at step {self.global_step}, so that nothing can be sampled. Lower the "
                "learning rate; checkpoints were written before this step"
            )
        rows = [row for row in prompt_rows(batch) for _ in range(h["group_size"])]
        answers = [answer for answer in batch["answers"] for _ in range(h["group_size"])]
        seed = hash_key("rollout", h["init_seed"], self.current_epoch, batch_idx, self.global_rank)
        completions = sample(self._built, self.tokenizer, rows, h["max_new_tokens"], h["temperature"], seed)
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        parts = self.rewards(texts, answers)
        rewards = parts @ self.rewards.weights
        pad: Any = self.tokenizer.pad_token_id
        rollout = {k: v.to(self.device) for k, v in joined(rows, completions, pad).items()}
        if h["iterations"] > 1:
            rollout["old"] = self._old(rollout)
        if self.reference is not None:
            rollout["reference"] = log_probabilities(self.reference, rollout, h["temperature"])
        lengths = torch.tensor([len(completion) for completion in completions])
        rollout["advantages"] = advantages(rewards, h["group_size"]).repeat_interleave(lengths).to(self.device)
        groups = rewards.view(-1, h["group_size"])
        logged = dict(zip(self.rewards.names, parts.mean(0), strict=True))
        logged |= {"reward_std": groups.std(1).mean(), "completion_length": lengths.float().mean()}
        logged |= {"zero_advantage": constant(groups).float().mean()}
        size = len(groups)
        on_device = {f"train/{name}": value.to(self.device) for name, value in logged.items()}
        self.log_dict(on_device, sync_dist=True, batch_size=size)
        return rollout | {"prompts": batch["input_ids"], "reward": rewards.mean().to(self.device)}

    def _old(self, rollout: dict[str, Tensor]) -> Tensor:
        """log pi_old of each token, (n,)."""
        with torch.no_grad(), evaluating(self._built):
            return log_probabilities(self.forward, rollout, self.hparams["temperature"])

    def _measured(self, batch: Batch) -> dict[str, Tensor]:
        """The rewards of the likeliest completions, (B,) for each function and for their weighted sum."""
        return self._rewarded(self._likeliest(batch), batch)

    def _likeliest(self, batch: Batch) -> list[str]:
        """The greedy completion of each prompt."""
        return generate(self._built, self.tokenizer, prompt_rows(batch), self.hparams["max_new_tokens"])

    def _rewarded(self, texts: list[str], batch: Batch) -> dict[str, Tensor]:
        parts = self.rewards(texts, batch["answers"])  # type: ignore[arg-type]
        values = [*parts.T, parts @ self.rewards.weights]
        return {name: v.to(self.device) for name, v in zip([*self.rewards.names, "reward"], values, strict=True)}

    def on_test_epoch_start(self) -> None:
        """Forget the answers of an earlier test."""
        self.answered = []

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As `CausalLMTuner`; keep the answers."""
        texts = self._likeliest(batch)
        values = self._rewarded(texts, batch)
        prompts = self.tokenizer.batch_decode(prompt_rows(batch))
        rewards = [round(reward, 6) for reward in values["reward"].tolist()]
        rows = zip(prompts, batch["answers"], texts, rewards, strict=True)
        self.answered += [dict(zip(("prompt", "answer", "completion", "reward"), row, strict=True)) for row in rows]
        return self._test(values)

    def on_test_epoch_end(self) -> None:
        """Log the means, and write the answers."""
        super().on_test_epoch_end()
        folder, parts = self.trainer.log_dir, gather_objects(self.answered)
        if folder is not None and self.trainer.is_global_zero:
            lines = [json.dumps(answered, ensure_ascii=False) for part in parts for answered in part]
            write_text_atomically(Path(folder) / "answers.jsonl", "\n".join([*lines, ""]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the completions of each process, where further steps are to use them."""
        super().on_save_checkpoint(checkpoint)
        if self.hparams["iterations"] > 1 and self.rollout is not None and self._trainer is not None:
            own = {name: tensor.cpu() for name, tensor in self.rollout.items()}
            checkpoint["rollouts"] = gather_objects(own)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        super().on_load_checkpoint(checkpoint)
        rollouts = checkpoint.get("rollouts", [])
        self.rollout = rollouts[self.global_rank] if self.global_rank < len(rollouts) else None

"""What AdapterCallback does in Lightning, for transformers' Trainer and the trainers of TRL."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lit_adapters.errors import AdapterError, NotFiniteError
from lit_adapters.huggingface.checkpoints import AdapterWriter, folder_of, load_state, save_state
from lit_adapters.huggingface.reporting import boards, report
from lit_adapters.huggingface.weight_decay import DecayFilter
from lit_adapters.model.record import adapters, attached
from lit_adapters.optimizers.pair_optimizer import PairOptimizer, check_clipping
from lit_adapters.schedules import monitor_mode
from lit_adapters.training.annealing import Annealer
from lit_adapters.training.calibration import awaits_calibration, calibrate_together
from lit_adapters.training.linearity import linear_layers, step_to_look_at
from lit_adapters.training.nonfinite import nonfinite_gradient
from lit_adapters.training.participation import ParticipationCheck
from lit_adapters.training.processes import is_first_process, raise_together
from lit_adapters.training.random_numbers import same_random_numbers
from lit_adapters.training.rank_allocation import RankAllocation
from lit_adapters.training.recording import Recorder, Statistic, checked_statistics


class AdapterTrainerCallback(TrainerCallback):
    """Calibrates, anneals, checks and records adapters in a Trainer of transformers or TRL, and saves them alone.

    - Annealed adapters move after every optimiser step. An adaptive schedule looks at the values that the Trainer logs:
      "loss", unless it names another one, and at the last logged one until the next. It resumes exactly from a
      checkpoint that was written at a step of logging: the Trainer begins the mean loss of its log anew.
    - Statistics go where `report_to` sends the Trainer's own values, whenever it logs (`logging_steps`). TensorBoard,
      Weights & Biases and MLflow also get figures and histograms at the end. `state.log_history` gets their means over
      layers.
    - Checkpoints of models of transformers, and what `trainer.save_model` writes, are adapter directories:
      `load_adapters` reads them. `resume_from_checkpoint` and `load_best_model_at_end` work as with any model.
    - Weight decay leaves alone what must not decay, such as rational coefficients.
    - Ranks of AdaLoRA and its kin are allocated. The gradient of the penalty on their factors is added.
    - A run stops if an adapter does not run in the first batch, a parameter does not learn in the first steps, or a
      gradient is not finite.

    Models of `peft.get_peft_model` keep peft's own checkpoints.

    Examples:
        >>> lit_adapters.attach(model, lit_adapters.AFALoRA(rank=8))
        >>> trainer = SFTTrainer(model, args, train_dataset=rows)
        >>> trainer.add_callback(AdapterTrainerCallback(trainer))
        >>> trainer.train()

    Args:
        trainer: The one that it is added to.
        statistics: As for `lit_adapters.AdapterCallback`.
        figures: Draw functions, spectra and maps of the layers at the end, if one of these three is among `report_to`.
        calibration_batches: Training batches shown to the adapters before the first step, where a method asks for it.
            The model gets the arguments of a batch that its `forward` knows. Where batches are no such arguments (as in
            GRPO), call `lit_adapters.calibrate` before the training.
        allow_unused: Regular expressions of trainable parameters that may receive no gradient.

    Raises:
        AdapterError: An argument is out of range, or `trainer` is no Trainer; the model has no adapters, or merged
            ones; only a part of the model was given to `attach`, or peft wraps it, or holds several adapters; FSDP,
            DeepSpeed or DataParallel is used. During the training: a check fails, a schedule needs an end that is not
            known, or the checkpoint lacks what a resumed run needs.
        NotFiniteError: A gradient is not finite.
    """

    def __init__(
        self,
        trainer: Trainer,
        statistics: Sequence[Statistic] = ("functions", "weights", "subspace"),
        figures: bool = True,
        calibration_batches: int = 4,
        allow_unused: Sequence[str] = (),
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise AdapterError(
                f"AdapterTrainerCallback takes the trainer, not {type(trainer).__name__}: make the trainer first, then "
                "trainer.add_callback(AdapterTrainerCallback(trainer))"
            )
        if calibration_batches < 1:
            raise AdapterError(f"calibration_batches {calibration_batches} must be at least 1")
        self._statistics = checked_statistics(statistics)
        model: nn.Module = trainer.model  # type: ignore[assignment]
        found = list(adapters(model))
        if not found:
            raise AdapterError(
                f"{type(model).__name__} has no adapters: call lit_adapters.attach before you make the trainer"
            )
        merged = [name for name, adapter in found if adapter.merged]
        if merged:
            raise AdapterError(f"{merged[0]!r} is merged and would not learn; call lit_adapters.unmerge(model) first")
        if trainer.args.n_gpu > 1:
            raise AdapterError(
                "the Trainer would use nn.DataParallel on several GPUs in one process, which copies modules without "
                "their adapters; start it with torchrun"
            )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise AdapterError(
                "AdapterTrainerCallback does not work with FSDP and DeepSpeed, which take parameters apart; use DDP, "
                "or FSDP2 in Lightning with lit_adapters.AdapterCallback"
            )
        several = [n for n, m in model.named_modules() if len(getattr(m, "lit_adapter", ())) > 1]
        if several:
            raise AdapterError(
                f"{several[0]!r} holds several of peft's adapters, and this callback could not tell which of them to "
                "anneal and record; give the trainer a base model with peft_config, or delete the others"
            )
        parts = dict(attached(model))
        if "" in parts and isinstance(model, PreTrainedModel):
            AdapterWriter(model)
        elif "" in parts:
            pass  # the Trainer saves other models as a whole
        elif parts and hasattr(model, "peft_config"):
            raise AdapterError(
                f"peft wraps a model that was given to lit_adapters.attach, and froze {found[0][0]!r}; use "
                "lit_adapters.huggingface.peft_tuners inside peft, or attach alone"
            )
        elif parts:
            raise AdapterError(
                f"only {next(iter(parts))!r} of the trainer's model was given to lit_adapters.attach; give it the "
                "whole model, with targets that name this part"
            )
        self._trainer = trainer
        self._figures = figures
        self._calibration_batches = calibration_batches
        self._allow_unused = tuple(allow_unused)
        self._logged: dict[str, float] = {}
        self._recorder: Recorder | None = None  # no training has begun

    @property
    def _model(self) -> nn.Module:
        model: nn.Module = self._trainer.model  # type: ignore[assignment]
        return model

    @property
    def _of_run(self) -> Recorder:
        assert self._recorder is not None
        return self._recorder

    # ---- the training as a whole

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the state of a resumed run, calibrate, and start every part."""
        self._stop()  # of a training that ended with an error
        model, optimizer = self._model, kwargs["optimizer"]
        check_clipping(args.max_grad_norm, "max_grad_norm", [getattr(optimizer, "optimizer", optimizer)])
        saved = self._saved_state(args, state, model) if state.global_step else {}
        if not state.global_step and awaits_calibration(model):
            with same_random_numbers():
                calibrate_together(model, self._first_batches(args), self._run, self._loss)
        total = float(state.max_steps)
        self._logged = dict(saved.get("logged", {}))
        self._annealer = Annealer(model, saved.get("annealing"))
        self._annealer.start(state.global_step, total)
        self._allocation = RankAllocation(model)
        self._allocation.start(state.global_step, total, saved.get("allocation"))
        self._optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self._decay = DecayFilter(model, self._optimizer)
        self._participation = ParticipationCheck(model, self._allow_unused)
        self._recorder = Recorder(model, self._statistics, saved.get("recorded"))
        self._look_at = step_to_look_at(total)
        if self._of_run.step < 0:
            self._record(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of what has not ended: annealing, also in the best model that was loaded, and rank allocation."""
        self._stop()
        nonlinear = [(n, a) for n, a in adapters(self._model) if a.schedule is not None and a.beta.item() > 0]  # type: ignore[operator]
        if nonlinear and is_first_process():
            warnings.warn(
                f"training ended with {len(nonlinear)} adapters still nonlinear ({nonlinear[0][0]!r} first): they "
                "cannot be merged. Train on to the end of the schedule, choose one that ends earlier, or do not load "
                "the best model of an earlier step",
                stacklevel=2,
            )
        where = self._allocation.unfinished() if self._allocation else ""
        if where and is_first_process():
            warnings.warn(
                f"training ended {where}, before rank allocation did: more directions are left than target ranks ask "
                "for. Train on to the end, or set total_step to fewer steps",
                stacklevel=2,
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state of the parts beside the checkpoint that has just been written."""
        folder = folder_of(args.output_dir, state.global_step)
        if not folder.is_dir() or not is_first_process():  # a search of hyperparameters has other folders
            return
        parts: dict[str, Any] = {
            "annealing": self._annealer.state_dict(),
            "recorded": self._of_run.state_dict(),
            "logged": self._logged,
        }
        if self._allocation:
            parts["allocation"] = self._allocation.state_dict()
        save_state(self._model, folder, state.global_step, parts)

    def _saved_state(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> Mapping[str, Any]:
        given = args.resume_from_checkpoint
        folders = [folder_of(args.output_dir, state.global_step)]
        if isinstance(given, str):
            folders.append(Path(given))
        saved = load_state(model, folders, state.global_step)
        if not saved and (RankAllocation(model) or Annealer(model).watched):
            raise AdapterError(
                f"{folders[0]} holds no state of rank allocation or of an adaptive schedule for these adapters; resume "
                "from a folder that this callback wrote, and name it in TrainingArguments(resume_from_checkpoint=...) "
                "if it is not in output_dir"
            )
        return saved

    def _stop(self) -> None:
        """Leave no hooks behind."""
        if self._recorder is not None:
            self._decay.after_step()
            self._participation.stop()
            self._of_run.observer.stop()

    # ---- calibration

    def _first_batches(self, args: TrainingArguments) -> Iterator[Any]:
        """Batches of the training data in an order of their own, so that the training's is as without calibration."""
        loader: Any = self._trainer.callback_handler.train_dataloader
        dataset = loader.dataset
        sampler = None
        if not isinstance(dataset, IterableDataset):
            sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(args.seed))
        own = DataLoader(
            dataset, args.per_device_train_batch_size, sampler=sampler, collate_fn=loader.collate_fn, num_workers=0
        )
        return itertools.islice(own, self._calibration_batches)

    def _arguments(self, batch: Any, labels: bool) -> dict[str, Any]:
        model: Any = self._model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        known = set(inspect.signature(type(base).forward).parameters)  # its own may be wrapped for autocast
        found = {k: v for k, v in batch.items() if k in known} if isinstance(batch, Mapping) else {}
        if not labels:
            found.pop("labels", None)
        if not found:
            raise AdapterError(
                f"batches of {type(self._trainer).__name__} are not arguments of the model, so that adapters cannot be "
                "calibrated with them; call lit_adapters.calibrate(model, batches) before the training"
            )
        device = next(model.parameters()).device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in found.items()}

    def _run(self, batch: Any) -> None:
        with self._trainer.compute_loss_context_manager():
            self._model(**self._arguments(batch, labels=False))

    def _loss(self, batch: Any) -> Tensor:
        with self._trainer.compute_loss_context_manager():
            output = self._model(**self._arguments(batch, labels=True))
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise AdapterError(
                "the model returns no loss for a training batch, which start='lora_ga' needs; call "
                "lit_adapters.calibrate(model, batches, loss=...) before the training"
            )
        return loss

    # ---- steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe inputs of the batches whose step will be recorded, and begin gradients with the penalty's."""
        ahead = state.global_step + 1
        if ahead >= state.max_steps or (state.logging_steps and ahead % state.logging_steps == 0):
            self._of_run.observer.start()
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        self._allocation.begin_gradients(1.0 if scaler is None else scaler.get_scale())

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say which adapters the first batch went past."""
        self._end_first_batch()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients, and keep weight decay where it makes sense."""
        self._end_first_batch()
        # A gradient scaler leaves such steps out by itself.
        if getattr(self._trainer.accelerator, "scaler", None) is None:
            broken = nonfinite_gradient(self._model)
            if broken is not None:
                own = isinstance(self._optimizer, PairOptimizer) and self._optimizer.moves_product
                setting = "clip of the optimiser" if own else "max_grad_norm"
                clip = "" if args.max_grad_norm else f", or clip gradients ({setting})"
                raise NotFiniteError(
                    f"gradients are not finite at step {state.global_step + 1} ({broken!r} first); lower the rate{clip}"
                )
        self._participation.before_step(self._optimizer, [self._optimizer])
        self._decay.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Allocate ranks while the gradients are there; a step that a gradient scaler has left out does not count."""
        self._decay.after_step()
        if self._allocation and not self._trainer.accelerator.optimizer_step_was_skipped:
            self._allocation.update(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Anneal, and record if the Trainer is about to log."""
        for watched in self._annealer.watched:
            name = watched.monitor or "loss"
            if name in self._logged:
                falls = monitor_mode(name, watched.mode) == "min"
                self._annealer.observe(watched, self._logged[name] if falls else -self._logged[name])
            elif self._logged and not (name.startswith("eval_") and args.eval_strategy != "no"):
                raise AdapterError(
                    f"an adaptive schedule looks at {name!r}, which the Trainer does not log; it may name one of "
                    f"{', '.join(sorted(self._logged))}"
                )
        self._annealer.advance(state.global_step)
        self._of_run.observer.end_batch(state.global_step)
        if state.global_step == self._look_at:
            with self._trainer.compute_loss_context_manager():
                linear = linear_layers(self._model)
            if linear and is_first_process():
                warnings.warn(linear, stacklevel=2)
        if control.should_log or state.global_step >= state.max_steps:
            self._record(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record, and draw how it ended if this was the last epoch."""
        self._of_run.observer.stop()
        if control.should_log:
            self._record(args, state, control)
        if self._figures and (control.should_training_stop or state.global_step >= state.max_steps):
            self._of_run.draw(boards(self._trainer), state.global_step, last=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the values that adaptive schedules may look at."""
        self._logged |= {k: float(v) for k, v in (logs or {}).items() if isinstance(v, (int, float))}

    def _end_first_batch(self) -> None:
        if self._participation.watching:
            raise_together(self._participation.after_forward())

    def _record(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        scalars = self._of_run.record(state.global_step, self._annealer.beta)
        if scalars and is_first_process():
            report(self._trainer, args, state, control, scalars)

"""Fine-tuning of a causal language model with adapters."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import lit_adapters as la
from language.generate import generate, prompt_rows
from language.loss import Batch, made_up_logits, read, row_means, token_losses
from language.meaning import apply_meaning
from language.means import Means
from language.measured import check_causal, check_packing
from language.models import (
    SMOLLM2,
    Dtype,
    Quantization,
    context_length,
    create_model,
    create_skeleton,
    create_tokenizer,
    trust_code_of,
    vocabulary_size,
)
from lit_adapters import values
from lit_adapters.errors import AdapterError
from lit_adapters.files.adapters import check_whole, read_checkpoint_file
from lit_adapters.files.meaning import is_of_the_base, meaning_of, restore_meanings, save_meanings, set_meaning
from lit_adapters.lightning.loading import LoadsFromFiles
from lit_adapters.lightning.step_mean import StepMeanModule
from lit_adapters.methods.method import to_methods
from lit_adapters.model.sharding import refuse_sharded, shard
from lit_adapters.training.hyperparameters import read_hyperparameters
from lit_adapters.training.step_cost import Example


class CausalLMTuner(LoadsFromFiles, StepMeanModule):
    """A transformers causal language model, its adapters, and the next-token loss on the tokens with a label.

    A batch holds input_ids and labels, int64 (B, T), and attention_mask (B, T); a packed one holds position_ids (B, T),
    which begin anew with each document, in place of attention_mask. Labels stand at the places of their own tokens.

    Validation and tests log, as `val/...` and `test/...`:

    - `loss`: -log p in nats, the mean over all learned tokens; a long answer counts more than a short one.
    - `perplexity`: exp(loss).
    - `row_loss`: the mean over rows of the data of each row's own mean loss; every row counts the same, packed or not.
      A test returns it row by row.

    Optimiser and schedule come from the YAML of `python -m language`. In Python give the model a
    `configure_optimizers`; `lit_adapters.lightning.build_optimizers` makes what it returns from the same sections.

    Args:
        model: Name, directory or file; see `language.models.create_model`.
        adapters: A method, a list of methods, or none. Python callers may give `{class_path, init_args}` forms too.
        train: Modules that train besides the adapters, as a list of name suffixes or a regular expression; ".*" is
            full fine-tuning.
        quantization: "nf4" packs the frozen weights into 4 bit.
        dtype: Type of the weights as they are loaded; the trainer's `bf16-true` casts them again. Adapters stay
            float32.
        gradient_checkpointing: Whether to save memory at the cost of one more forward pass a step.
        max_new_tokens: Most tokens with which `predict` continues a row's prompt.
        init_seed: Seeds the values that are not pretrained: the adapters, or all of a random model. Checkpoints hold
            it, but not the frozen parameters, so that loading makes the same ones again. By default the seed of torch's
            global generator, which `seed_everything` sets.
        attention: The implementation of attention by its name in transformers; "eager" is faster than the usual "sdpa"
            on a CPU under bf16 autocast.
        trust_remote_code: Whether the model and its tokenizer may run the Python code that comes with them. Checkpoints
            do not hold it: give it again beside `--ckpt_path`, with the model's name.

    Raises:
        AdapterError: `adapters` is not a method, or its values are out of range. Errors of the model itself come when
            it is built, in `configure_model`.
        DataError: All labels of a batch are masked, the model does not have a token id, or a sequence is longer than it
            was made for.
    """

    fixed_by_weights: ClassVar[frozenset[str]] = frozenset({"model", "adapters", "train", "init_seed"})
    memory_savers: ClassVar[tuple[str, ...]] = (
        "model.gradient_checkpointing=true",
        "model.dtype=bfloat16",
        "model.quantization=nf4",
    )
    logs_perplexity: ClassVar[bool] = True  # exp(loss), beside the mean of -log p

    def __init__(
        self,
        model: str = SMOLLM2,
        adapters: la.Method | list[la.Method] | None = None,
        train: str | list[str] = (),  # type: ignore[assignment]
        quantization: Quantization | None = None,
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 128,
        init_seed: int | None = None,
        attention: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        values.check_flag("trust_remote_code", trust_remote_code)
        if trust_remote_code:
            trust_code_of(model)
        values.check_whole("max_new_tokens", max_new_tokens)
        values.check_flag("gradient_checkpointing", gradient_checkpointing)
        if init_seed is not None:
            values.check_whole("init_seed", init_seed, -(2**63), 2**64 - 1, "or None")
        self.methods = to_methods(adapters)
        self.train_modules: str | Sequence[str] = train if isinstance(train, str) else list(train)
        # Plain values: a checkpoint then loads under weights_only, by the command line and by load_from_checkpoint.
        self.save_hyperparameters(
            {
                "model": model,
                "adapters": [m.to_config() for m in self.methods],
                "train": self.train_modules,
                "quantization": quantization,
                "dtype": dtype,
                "gradient_checkpointing": gradient_checkpointing,
                "attention": attention,
                "max_new_tokens": max_new_tokens,
                "init_seed": torch.initial_seed() if init_seed is None else init_seed,
            }
        )
        self.model: nn.Module | None = None
        self.report: la.AdapterReport | None = None
        self.learned_tokens = 0
        self.measure("loss", "row_loss", items=["row_loss"])
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""
        if self._tokenizer is None:
            self._tokenizer = create_tokenizer(self.hparams["model"])
        return self._tokenizer

    @property
    def needs_whole(self) -> str:
        """Why the weights must not be sharded, with what to do instead; empty if they may be."""
        return ""

    def configure_model(self) -> None:
        """Create the model and attach its adapters; once, though Lightning calls this for every stage.

        Raises:
            AdapterError: The weights would be sharded, and this training needs them whole.
        """
        if self.device_mesh is not None and self.needs_whole:
            raise AdapterError(self.needs_whole)
        if self.model is None:
            self.model = self._build() if self.device_mesh is None else shard(self._build, self.device_mesh)
        data = getattr(self._trainer, "datamodule", None)
        if data is not None:
            self._check_data(data)
            if self.trainer.state.fn != "fit":  # a fit gives the model the meaning of its data
                self._hand_over_meaning("the model")

    def _create(self, name: str) -> Any:
        """A model as it is loaded, without adapters."""
        h = self.hparams
        return create_model(
            name,
            dtype=h["dtype"],
            quantization=h["quantization"],
            gradient_checkpointing=h["gradient_checkpointing"],
            attention=h["attention"],
        )

    def _build(self) -> nn.Module:
        h = self.hparams
        # On the CPU whatever the trainer's device: its random values are the same everywhere.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(h["init_seed"])
            model = self._create(h["model"])
            # transformers loads in eval mode, in which neither dropout nor checkpointing would take place.
            model.train(self.training)
            self.report = la.attach(model, self.methods, train=self.train_modules)
        rank_zero_info(str(self.report))
        return model

    def training_example(self, data: Any) -> Example:
        """A step on a full batch of the data, all of whose tokens are learned, for `lit-adapters estimate`.

        Raises:
            AdapterError: A subclass has a training step of its own and no `made_up_loss`, or the other way round.
            DataError: The data are longer than the model's context.
        """
        of_step, of_loss = (
            next(cls for cls in type(self).__mro__ if names & vars(cls).keys())
            for names in ({"training_step", "_losses"}, {"made_up_loss"})
        )
        if of_step is not of_loss:
            raise AdapterError(
                f"{type(self).__name__} has its own training step or made_up_loss and not both, so that it cannot be "
                "estimated: write the other one too"
            )
        h, rows, length = self.hparams, data.batch_size, data.max_length
        with torch.device("meta"):
            skeleton = create_skeleton(h["model"])
        outputs, context = vocabulary_size(skeleton), context_length(skeleton)
        if context is not None and length + self.sampled_tokens > context:
            raise la.DataError(
                f"data.max_length {length} exceeds the model's {context} positions"
                f"{f', of which max_new_tokens takes {self.sampled_tokens}' if self.sampled_tokens else ''}: set it to "
                f"{context - self.sampled_tokens}"
            )
        tokens = self.rows_per_item * rows * (length + self.sampled_tokens)
        loss = partial(self.made_up_loss, rows=rows, length=length)
        return Example(self._skeleton, loss, rows, tokens, "tokens", outputs, packed=h["quantization"] == "nf4")

    @property
    def rows_per_item(self) -> int:
        """Rows that the model reads for each of `data.batch_size`."""
        return 1

    @property
    def sampled_tokens(self) -> int:
        """Tokens that a training step adds to each row."""
        return 0

    def _skeleton(self) -> nn.Module:
        """The adapted model without its weights."""
        model = self._create_skeleton(self.hparams["model"]).train()
        la.attach(model, self.methods, train=self.train_modules)
        return model

    def _create_skeleton(self, name: str) -> Any:
        """A model as `_create` makes it, without its weights."""
        h = self.hparams
        return create_skeleton(
            name,
            dtype=h["dtype"],
            gradient_checkpointing=h["gradient_checkpointing"],
            attention=h["attention"],
        )

    def made_up_loss(self, model: nn.Module, rows: int, length: int) -> Tensor:
        """The loss of a full batch whose tokens are made up, as `training_step` computes it."""
        logits, tokens = made_up_logits(partial(read, model), rows, length)
        return F.cross_entropy(logits, tokens, reduction="sum")

    def on_fit_start(self) -> None:
        """Give the model the meaning of its data, and measure whether it does what the loss relies on."""
        describe = getattr(getattr(self.trainer, "datamodule", None), "meaning", None)
        if describe is not None:
            set_meaning(self._built, describe())
            apply_meaning(self._built, self.tokenizer)
        check_causal(self._built)
        data = getattr(self.trainer, "datamodule", None)
        if getattr(data, "packing", None) == "packed":
            check_packing(self._built)

    def _check_data(self, data: Any) -> None:
        """Compare a data module's tokenizer and length with the model before any time is spent."""
        vocabulary, context = vocabulary_size(self._built), context_length(self._built)
        tokenizer, longest = getattr(data, "tokenizer", None), getattr(data, "max_length", 0)
        if tokenizer is not None and len(tokenizer) > vocabulary:
            raise la.DataError(
                f"the data's tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocabulary}: set "
                f"data.tokenizer to {self.hparams['model']!r}"
            )
        if context is not None and longest > context:
            raise la.DataError(
                f"data.max_length {longest} exceeds the model's {context} positions: set it to {context}"
            )

    def _hand_over_meaning(self, origin: str) -> None:
        """Let tokenizer, generation and data go by what the model was trained with."""
        if self.model is None or not (meaning := meaning_of(self.model)):
            return
        apply_meaning(self.model, self.tokenizer)
        data = getattr(self._trainer, "datamodule", None)
        adopt = getattr(data, "adopt_base" if is_of_the_base(self.model) else "adopt", None)
        if adopt is not None:
            adopt(meaning, origin)

    @property
    def _built(self) -> nn.Module:
        assert self.model is not None, "configure_model has not run"
        return self.model

    def forward(self, batch: Batch, positions: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or (B, P, V) at positions (P,)."""
        return read(self._built, batch, positions)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self._losses(batch)
        loss, mean = self.mean_over_step(losses.sum(), len(losses), batch_idx)
        self.learned_tokens += len(losses)
        self.log("train/loss", mean, prog_bar=True, sync_dist=True)
        self.log("train/learned_tokens", float(self.learned_tokens), sync_dist=True, reduce_fx="sum")
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_means.update(self._measured(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Measure a batch.

        Returns:
            One value for each row of the data, by the name of the metric that is their mean; callbacks may add to it.
        """
        return self._test(self._measured(batch))

    def on_validation_epoch_end(self) -> None:
        self._log_means("val", self.val_means)

    def on_test_epoch_end(self) -> None:
        self._log_means("test", self.test_means)

    def forward_batch(self, batch: Batch) -> Tensor:
        """Logits (B, T, V) of a training batch; AdapterCallback calibrates on them, and searches for NaN in them."""
        logits: Tensor = self(batch)
        return logits

    def batch_loss(self, batch: Batch) -> Tensor:
        """The mean loss of the learned tokens of a training batch; AdapterCallback calibrates on it."""
        return self._losses(batch).mean()

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        """A continuation of each row's prompt, the tokens before its first learned one; a list of B texts."""
        refuse_sharded(self._built, "generating")  # answers end at different tokens in different processes
        rows = prompt_rows(batch)
        return generate(self._built, self.tokenizer, rows, max_new_tokens=self.hparams["max_new_tokens"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the count of learned tokens, of all processes together."""
        super().on_save_checkpoint(checkpoint)
        save_meanings(checkpoint, self)
        checkpoint["learned_tokens"] = int(self.over_processes(self.learned_tokens, "sum"))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the meaning of the weights, and the count in one process, as what is logged is the sum over all.

        Raises:
            AdapterError: The meaning is malformed, or contradicts that of the data.
        """
        super().on_load_checkpoint(checkpoint)
        restore_meanings(checkpoint, self)
        if self.model is not None and not is_of_the_base(self.model):
            self._hand_over_meaning("the checkpoint")
        self.learned_tokens = checkpoint["learned_tokens"] if self.global_rank == 0 else 0

    def measure(self, *names: str, items: Sequence[str] = ()) -> None:
        """Say what validation and tests average.

        Args:
            names: Names of the values that `_measured` returns.
            items: Those with one value for each row, question or pair, which tests return.
        """
        self.val_means, self.test_means = Means(*names), Means(*names)
        self.item_names = list(items)

    def _losses(self, batch: Batch) -> Tensor:
        """The loss of each learned token of a batch, -log p in nats, float32 (n,)."""
        return token_losses(self._built, batch)[0]

    def _measured(self, batch: Batch) -> dict[str, Tensor]:
        """What validation and tests average over a batch, (n,) by name."""
        losses, learned = token_losses(self._built, batch)
        return {"loss": losses, "row_loss": row_means(losses, learned, batch.get("position_ids"))}

    def _test(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add what was measured of a test batch to the means, and give its per-item values."""
        self.test_means.update(values)
        return {name: values[name] for name in self.item_names}

    def _log_means(self, split: str, means: Means) -> None:
        found = means.compute()
        means.reset()
        if self.logs_perplexity:
            found["perplexity"] = found["loss"].exp()
        # The means are those of all processes already; averaging equal values tells Lightning so.
        self.log_dict({f"{split}/{name}": v for name, v in found.items()}, prog_bar=split == "val", sync_dist=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalLMTuner:
        """Move and cast everything but the frequencies of rotary embeddings, which are moved only."""
        with frequencies_kept(self):
            super()._apply(fn, recurse)
        return self


@contextlib.contextmanager
def frequencies_kept(model: nn.Module) -> Iterator[None]:
    """Keep the frequencies of rotary embeddings from being cast inside the block; they may be moved.

    In bfloat16 they would turn late positions by whole radians. transformers keeps them in float32, too.
    """
    frequencies = [(m, n, b) for m in model.modules() for n, b in m.named_buffers(recurse=False) if "inv_freq" in n]
    yield
    for module, name, before in frequencies:
        after = getattr(module, name)
        if after.dtype != before.dtype:
            setattr(module, name, before.to(after.device))


Tuner = TypeVar("Tuner", bound=CausalLMTuner)


def load_tuner(path: Path, kind: type[Tuner], command: str) -> Tuner:
    """Load the tuner of a checkpoint, on the CPU.

    Args:
        path: The checkpoint, the value of --ckpt.
        kind: The tuner's class.
        command: The module whose `fit` writes such checkpoints.

    Raises:
        AdapterError: The file is missing, torn or another class's.
    """
    if not path.is_file():
        raise AdapterError(f"--ckpt {str(path)!r} does not exist; give a file that a fit has written")
    check_whole(path, "--ckpt ")
    found = read_hyperparameters(read_checkpoint_file(path), path)
    other_class = "keep_layers" in found and "keep_layers" not in inspect.signature(kind).parameters  # a draft
    if "model" not in found or other_class:
        raise AdapterError(f"--ckpt {str(path)!r} is not a checkpoint of `python -m {command} fit`; give one")
    return kind.load_from_checkpoint(path, map_location="cpu")

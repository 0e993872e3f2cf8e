"""A draft model with adapters, taught to follow a target: what speculative decoding needs.

Command line: python -m language.draft fit|validate|test --config FILE.yaml [--key=value ...]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lit_adapters as la
from language.draft.distillation import Agreement, agreement
from language.draft.shortened import shortened, unshare_trained, unshared_copy
from language.loss import Batch, learned_logits, made_up_logits, read
from language.models import create_tokenizer, trust_code_of, vocabulary_size
from language.module import CausalLMTuner, frequencies_kept
from lit_adapters.errors import AdapterError


class DraftTuner(CausalLMTuner):
    """A draft model, its adapters, and the distillation loss: the mean over all learned tokens of

        KL(p || q) = sum_v p(v) (log p(v) - log q(v)),    p of the target, q of the draft, at temperature 1.

    The sum goes over the whole vocabulary; learned tokens are the answers, or all tokens under `mask_prompt: false`.
    There is no other term, and the target generates no text to train on. The loss is logged as `train/loss`.

    The draft is the pretrained `model`, or some of its decoder layers; it alone has adapters and is in `self.model`, in
    checkpoints and in exports. Without a `target`, the target is the whole of `model`, on the same weights in memory.
    The target is frozen, in eval mode, and not a submodule. Batches are those of `CausalLMTuner`.

    Logged as `val/kl`, in nats per token, `val/agreement`, the share of tokens with the same likeliest one, and
    `val/acceptance`, and the same as `test/...`: see `language.draft.distillation.agreement`. They are means over
    learned tokens, exact over batches, in the contexts of the data's text.

    Args:
        keep_layers: Indices of the decoder layers that the draft has, ascending; all by default.
        target: Name of the target as in `language.models.create_model`; the whole of `model` by default.
        common: Those of `CausalLMTuner`.

    Raises:
        AdapterError: Neither `keep_layers` nor `target` is given, `keep_layers` is out of range, or the target has
            another vocabulary; or as `CausalLMTuner`.
        DataError: As `CausalLMTuner`.
    """

    fixed_by_weights = CausalLMTuner.fixed_by_weights | {"keep_layers"}
    logs_perplexity = False

    def __init__(self, keep_layers: list[int] | None = None, target: str | None = None, **common: Any) -> None:
        super().__init__(**common)
        if common.get("trust_remote_code") and target is not None:
            trust_code_of(target)
        if keep_layers is None and target is None:
            raise AdapterError(
                "the draft would be its own target: set keep_layers to the layers that it has, or target to a "
                "larger model's name"
            )
        self.save_hyperparameters({"keep_layers": keep_layers, "target": target})
        self.measure("kl", "agreement", "acceptance")
        self._target: tuple[Any, ...] = ()  # in a tuple, so that it does not become a submodule

    @property
    def needs_whole(self) -> str:
        """As for `CausalLMTuner`."""
        return "a draft and its target cannot be sharded: set trainer.strategy to auto or ddp"

    @property
    def target(self) -> Any:
        """The model that the draft follows."""
        assert self._target, "configure_model has not run"
        return self._target[0]

    def _create(self, name: str) -> nn.Module:
        h = self.hparams
        if h["target"] is not None:
            check_vocabulary(h["target"], name)
        source = super()._create(name)
        target = source if h["target"] is None else super()._create(h["target"])
        common = min(vocabulary_size(source), vocabulary_size(target))
        if h["target"] is not None and (tokens := len(self.tokenizer)) > common:
            raise AdapterError(
                f"the tokenizer has {tokens} tokens, the draft {name!r} {vocabulary_size(source)} rows of embeddings "
                f"and the target {h['target']!r} {vocabulary_size(target)}: choose two models of one family"
            )
        draft = source if h["keep_layers"] is None else shortened(source, h["keep_layers"])
        self._target = (target.requires_grad_(False),)
        return draft

    def _build(self) -> nn.Module:
        draft = super()._build()
        unshare_trained(draft)
        return draft

    def _skeleton(self) -> nn.Module:
        h = self.hparams
        source: Any = self._create_skeleton(h["model"])
        target: Any = source if h["target"] is None else self._create_skeleton(h["target"])
        draft = source if h["keep_layers"] is None else shortened(source, h["keep_layers"])
        target.requires_grad_(False).eval()
        la.attach(draft.train(), self.methods, train=self.train_modules)
        unshare_trained(draft)
        draft.target = target  # its values are counted with the draft's
        return draft

    def made_up_loss(self, model: nn.Module, rows: int, length: int) -> Tensor:
        """The loss of a full batch whose tokens are made up, as `training_step` computes it."""
        with torch.no_grad():
            target, _ = made_up_logits(partial(read, model.get_submodule("target")), rows, length)
        draft, _ = made_up_logits(partial(read, model), rows, length)
        return agreement(target, draft).kl.sum()

    def _losses(self, batch: Batch) -> Tensor:
        """KL(p || q) at each learned token of a batch, float32 (n,)."""
        return self._compare(batch).kl

    def _measured(self, batch: Batch) -> dict[str, Tensor]:
        found = self._compare(batch)
        return {"kl": found.kl, "agreement": found.greedy, "acceptance": found.acceptance}

    def _compare(self, batch: Batch) -> Agreement:
        with torch.no_grad():
            target, _ = learned_logits(partial(read, self.target), batch)
        draft, _ = learned_logits(self.forward, batch)
        return agreement(target, draft)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DraftTuner:
        """Move and cast the target along; what it shares with the draft has then been moved already."""
        super()._apply(fn, recurse)
        for target in self._target:
            with frequencies_kept(target):
                target._apply(fn, recurse)
        return self


def merged_draft(tuner: DraftTuner) -> tuple[Any, la.MergeReport]:
    """The trained draft as a model of its own, adapters merged, for `save_pretrained` and `generate`; and the report.

    The weights are copies: neither the tuner nor the target changes. AFA-LoRA merges once beta is exactly 0. NoRA++
    keeps functions that transformers cannot load again.

    Examples:
        >>> tuner = DraftTuner.load_from_checkpoint("runs/.../last.ckpt")
        >>> draft, report = merged_draft(tuner)
        >>> draft.save_pretrained("draft")
        >>> tuner.target.generate(**inputs, assistant_model=draft)

    Raises:
        AdapterError: As `lit_adapters.merge`.
    """
    draft = unshared_copy(tuner.model).eval()
    return draft, la.merge(draft)


def check_vocabulary(target: str, draft: str) -> None:
    """Compare the tokenizers of two models by name.

    Raises:
        AdapterError: A token has different ids, or exists in one of them only.
    """
    own: dict[str, int] = create_tokenizer(draft).get_vocab()
    other: dict[str, int] = create_tokenizer(target).get_vocab()
    differing: Sequence[str] = sorted(t for t in own.keys() | other.keys() if own.get(t) != other.get(t))
    if differing:
        token = differing[0]
        raise AdapterError(
            f"the draft {draft!r} has another tokenizer than the target {target!r}: token {token!r} is "
            f"{own.get(token, 'absent')} in one and {other.get(token, 'absent')} in the other; choose a draft whose "
            "tokenizer is the target's"
        )

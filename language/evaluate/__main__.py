"""Command line: python -m language.evaluate --model NAME --tasks perplexity --perplexity rows.jsonl

Multiple choice by log-likelihood (MMLU, common-sense reasoning, classification), the same by generation, ROUGE of
summaries, held-out perplexity, and the tasks of lm-evaluation-harness; each number with its standard error.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage, and looking for it takes a second; `run` enables it

from collections.abc import Sequence
from typing import Any

from language.evaluate.results import table, write_json
from language.evaluate.run import check_data, evaluate, load, task_names
from language.evaluate.settings import EvalSettings
from language.models import Dtype, Quantization, trust_code_of
from lit_adapters import console
from lit_adapters.errors import AdapterError
from lit_adapters.lightning.cli import run
from lit_adapters.methods.matrix_layers import is_quantised


def evaluate_command(
    *,
    tasks: str,
    out: str | None = None,
    root: str | None = None,
    model: str | None = None,
    adapters: str | None = None,
    ckpt: str | None = None,
    dtype: Dtype | None = None,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate a language model with adapters.

    Args:
        tasks: Comma-separated: mmlu, classification, summarisation, perplexity, boolq, piqa, social_i_qa, hellaswag,
            winogrande, ARC-Easy, ARC-Challenge, openbookqa, commonsense for the last eight, or lm_eval:NAME for a task
            of lm-evaluation-harness.
        out: JSON file to write; by default the table alone is printed.
        root: Folder that the paths of data are in; by default the working directory.
        model: Name, directory or .gguf file.
        adapters: Directory that save_adapters wrote.
        ckpt: Checkpoint of python -m language fit, instead of a model.
        dtype: Type of the weights; float32 by default. A checkpoint keeps its own.
        quantization: `nf4` for 4-bit weights.
        trust_remote_code: Whether the model may run the Python code that comes with it.
        settings: Those of `EvalSettings`.

    Returns:
        The results and the settings, as they are written.

    Raises:
        DataError: As `evaluate` and `load`.
        AdapterError: As `evaluate` and `load`.
    """
    chosen = EvalSettings(**settings)
    names = task_names(tasks)
    if trust_remote_code:
        if model is None:
            raise AdapterError("trust_remote_code goes with the name of the model that you trust: give model")
        trust_code_of(model)
    check_data(names, root, chosen)
    source: dict[str, Any] = {"model": model, "adapters": adapters, "ckpt": ckpt}
    loaded, tokenizer = load(**source, dtype=dtype, quantization=quantization)
    packed = any(is_quantised(module) for module in loaded.modules())
    weights = {"dtype": str(loaded.dtype).removeprefix("torch."), "quantization": "nf4" if packed else None}
    result = {**source, **weights, **evaluate(loaded, tokenizer, names, root, chosen)}
    if out is not None:
        write_json(out, result)
    print(table(result["results"]))
    if out is not None:
        print(f"written to {out}")
    return result


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns the results."""
    return console.call(evaluate_command, args, "python -m language.evaluate")


if __name__ == "__main__":
    run(main)

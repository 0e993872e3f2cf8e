"""Command line: python -m language.evaluate --model NAME --tasks mmlu,perplexity --root DIR --out result.json

Multiple choice by log-likelihood (MMLU, common-sense reasoning, classification), the same by generation, ROUGE of
summaries, held-out perplexity, and the tasks of lm-evaluation-harness; each number with its standard error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from language.evaluate.results import table, write_json
from language.evaluate.run import check_root, evaluate, load, task_names
from language.evaluate.tasks import EvalSettings
from language.models import Dtype, Quantization, trust_code_of
from lit_adapters import console
from lit_adapters.errors import AdapterError
from lit_adapters.lightning.cli import run


def evaluate_command(
    *,
    tasks: str,
    out: str,
    root: str | None = None,
    model: str | None = None,
    adapters: str | None = None,
    ckpt: str | None = None,
    dtype: Dtype = "float32",
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate a language model with adapters.

    Args:
        tasks: Comma-separated: mmlu, classification, summarisation, perplexity, boolq, piqa, social_i_qa, hellaswag,
            winogrande, ARC-Easy, ARC-Challenge, openbookqa, commonsense for the last eight, or lm_eval:NAME for a task
            of lm-evaluation-harness.
        out: JSON file to write.
        root: Folder of the data; tasks of lm-evaluation-harness need none.
        model: Name, directory or .gguf file.
        adapters: Directory that save_adapters wrote.
        ckpt: Checkpoint of python -m language fit, instead of a model.
        dtype: Type of the weights.
        quantization: `nf4` for 4-bit weights.
        trust_remote_code: Whether the model may run the Python code that comes with it.
        settings: Those of `EvalSettings`.

    Returns:
        What was written.

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
    check_root(names, root)  # before a model is loaded
    source: dict[str, Any] = {
        "model": model,
        "adapters": adapters,
        "ckpt": ckpt,
        "dtype": dtype,
        "quantization": quantization,
    }
    result = {**source, **evaluate(*load(**source), names, root, chosen)}
    write_json(out, result)
    print(table(result["results"]))
    print(f"written to {out}")
    return result


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns what was written."""
    return console.call(evaluate_command, args, "python -m language.evaluate")


if __name__ == "__main__":
    run(main)

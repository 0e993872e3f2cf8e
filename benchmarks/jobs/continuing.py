"""Continue prompts by transformers' `generate`, and report each as a step."""

from __future__ import annotations

from typing import Any

from benchmarks.jobs.report import Report


def continue_prompts(model: Any, tokenizer: Any, job: dict[str, Any], report: Report) -> None:
    """Greedy continuations, each of the same number of tokens.

    Args:
        model: The model with its adapter.
        tokenizer: The model's own.
        job: `prompts` and `new_tokens`.
        report: Counts the new tokens, and keeps their ids as answers.
    """
    length = {"max_new_tokens": job["new_tokens"], "min_new_tokens": job["new_tokens"]}
    for prompt in job["prompts"]:
        inputs = tokenizer(prompt, return_tensors="pt")
        found = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            **length,
        )
        new = found[0, inputs["input_ids"].shape[1] :]
        report.step()
        report.count(tokens=len(new))
        report.answers.append(str(new.tolist()))

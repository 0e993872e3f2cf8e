"""Instruction tuning of causal language models: data, module and evaluation."""

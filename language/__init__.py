"""Instruction tuning of causal language models: data, module and evaluation."""

import lit_adapters.renamed  # noqa: F401  so that old names of our modules can be imported

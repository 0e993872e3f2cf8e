"""For transformers' Trainer and the trainers of TRL.

Importing this package imports transformers (extra `language`).
"""

from lit_adapters.huggingface.trainer_callback import AdapterTrainerCallback

__all__ = ["AdapterTrainerCallback"]

"""For transformers' Trainer and the trainers of TRL, and for directories that `from_pretrained` loads.

Importing this package imports transformers (extra `language`).
"""

from lit_adapters.huggingface.functions import save_with_functions
from lit_adapters.huggingface.trainer_callback import AdapterTrainerCallback

__all__ = ["AdapterTrainerCallback", "save_with_functions"]

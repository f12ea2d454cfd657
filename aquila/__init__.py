"""Pretraining of Aquila, BAAI's bilingual LLaMA-style language model."""

import os

__version__ = "0.1.0"

# Large tensors in huge pages: torch on CPU takes fresh memory for each, and faulting in 200 MB of logits 4096
# bytes at a time takes as long as the product that fills them. torch reads this at its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

"""Pretraining of Aquila, BAAI's bilingual LLaMA-style language model."""

__version__ = "0.1.0"

"""Mistral 7B and its successors of the same shape: sliding windows where the config has one."""

from esjax.model.families.family import Family

MISTRAL = Family(read=("sliding_window",))

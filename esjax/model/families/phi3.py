"""Phi-3, Phi-3.5 and Phi-4: one linear layer for queries, keys and values, one for gate and up; heads turned in part."""

from esjax.model.families.family import Family

PHI3 = Family(read=("sliding_window",), traits=lambda c: {"fused": True}, partial_rotary=True)

"""Model families: Hugging Face configs to ours and back, and one key table for import and export."""

from esjax.model.families.architecture import FUSED, LINEARS, Architecture, Kind, Rotary
from esjax.model.families.keys import Weight, ignorable, key_table, module_name
from esjax.model.families.reading import FAMILIES, architecture, config_of, ignored_keys, read_architecture, read_config

__all__ = [
    "FAMILIES",
    "FUSED",
    "LINEARS",
    "Architecture",
    "Kind",
    "Rotary",
    "Weight",
    "architecture",
    "config_of",
    "ignorable",
    "ignored_keys",
    "key_table",
    "module_name",
    "read_architecture",
    "read_config",
]

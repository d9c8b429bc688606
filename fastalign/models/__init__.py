"""Alignment of Hugging Face vision-language models, without eager attention.

Importing ``fastalign`` does not import this package, and importing this package does not import
transformers: that happens when a model is first looked at.
"""

from .alignment import AttentionAlignment
from .families import FAMILIES, Family, register_family
from .matching import match_layers
from .pictures import visual_attention

__all__ = [
    "FAMILIES",
    "AttentionAlignment",
    "Family",
    "match_layers",
    "register_family",
    "visual_attention",
]

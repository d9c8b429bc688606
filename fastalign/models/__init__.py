"""Alignment of Hugging Face vision-language models, without eager attention.

Importing ``fastalign`` does not import this package, and importing this package does not import
transformers: that happens when a model is first looked at.
"""

from .alignment import AttentionAlignment
from .cache import TeacherCache
from .families import FAMILIES, Family, register_family
from .matching import match_layers
from .pictures import visual_attention
from .record import record_teacher
from .reductions import attention_received, image_relevance, sink_scores

__all__ = [
    "FAMILIES",
    "AttentionAlignment",
    "Family",
    "TeacherCache",
    "attention_received",
    "image_relevance",
    "match_layers",
    "record_teacher",
    "register_family",
    "sink_scores",
    "visual_attention",
]

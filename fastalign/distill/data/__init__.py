"""Training data: records from files, images inside their root, tokens with labels, batches."""

from .collate import Collator
from .conversation import Encoder, TemplateError
from .dataset import ConversationDataset
from .records import Record, SampleError, read_records

__all__ = [
    "Collator",
    "ConversationDataset",
    "Encoder",
    "Record",
    "SampleError",
    "TemplateError",
    "read_records",
]

"""A student from a teacher: its language model cut by importance: heads, channels, width, layers."""

from .choose import Kept, Sizes, choose
from .cut import cut
from .importance import Importance, measure
from .structure import PruneError, Structure

__all__ = ["Importance", "Kept", "PruneError", "Sizes", "Structure", "choose", "cut", "measure"]

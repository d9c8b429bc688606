"""fastalign: the divergence of two models' attention, with gradients, without the attention matrix."""

from ._version import __version__
from .api import fused_attn_align_loss
from .spec import RECIPES, AlignSpec, Recipe

__all__ = ["RECIPES", "AlignSpec", "Recipe", "__version__", "fused_attn_align_loss"]

"""fastalign: the divergence of two models' attention, with gradients, without the attention matrix."""

from .api import fused_attn_align_loss
from .spec import RECIPES, AlignSpec, Recipe

__version__ = "0.1.0"
__all__ = ["RECIPES", "AlignSpec", "Recipe", "__version__", "fused_attn_align_loss"]

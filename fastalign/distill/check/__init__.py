"""Everything that can go wrong with a recipe, looked for before hours are spent.

``run`` goes through the parts in order: ``checkpoints`` (files, tokenizers), ``plans`` (what each stage
trains, layers, losses), ``samples`` (every sample), ``output`` (the folder, the disk), ``memory`` and
``dry`` (a step without training). Each gives a ``Part`` (``outcome``); ``render`` prints them. All look
through the functions that training itself uses, and nothing is written or downloaded.
"""

from .outcome import Outcome, Part
from .run import Options, check_recipe

__all__ = ["Options", "Outcome", "Part", "check_recipe"]

"""How much memory a stage will need, from the two configurations alone.

``models`` builds both models without storage; ``simulate`` runs their decoders and the output head on
fake tensors and follows what is alive; ``plan`` adds up the lines of a stage; ``render`` prints them.
"""

from .models import FakeModels
from .plan import Line, Shape, StagePlan, plan_stage

__all__ = ["FakeModels", "Line", "Shape", "StagePlan", "plan_stage"]

"""The shapes world: small rendered scenes and questions that need composition.

``world``      what a scene is, and the deterministic generator with its disjoint splits
``render``     scene -> Pillow image, a pure function
``questions``  question types, minimal pairs and the strata that balance the answers
``tokenizer``  a real ``tokenizers`` tokenizer and the LLaVA processor around it
``dataset``    packed training conversations and balanced evaluation sets
``scoring``    accuracy per type, chance levels, the composition score
``models``     the teacher's and the student's LLaVA configurations

Nothing is imported here: ``world`` and ``questions`` need the standard library alone.
"""

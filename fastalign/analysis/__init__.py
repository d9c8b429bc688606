"""Looking at what was learned: pictures (``fastalign.analysis.pictures``: matplotlib, Pillow).

Nothing is imported here, so that the rest of the package needs neither.
"""

"""Studies: a grid of conditions x seeds in which nothing else differs.

``study``       what is run, read from a YAML file
``task``        what a study asks of the code that trains one model
``runner``      runs what is missing, in pieces, resumable at any checkpoint
``records``     what is kept of a run, and which runs may be compared
``statistics``  means, paired differences, bootstrap intervals
``report``      the table and the curves

Nothing is imported here.
"""

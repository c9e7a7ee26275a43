"""From the rows of public data sets to token ids: the way of the data, file by file.

``sources`` (open) -> ``readers`` (one per schema) -> ``clean`` -> ``rank`` -> ``draw`` (subset and
held-out side) -> ``mix`` (all of it, per source) -> ``requirements`` (does the loss find its
labels?) -> ``chat`` and ``tokenise`` -> ``batches``; ``card`` tells what happened to every row.
Nothing heavy is imported here.
"""

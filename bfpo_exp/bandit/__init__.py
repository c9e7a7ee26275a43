"""The bandit of BFPO (arXiv 2408.15313, Section 3.4): preference learning in a world known whole.

n actions without a context, a softmax policy with one logit an action, and every pair of actions as
data.  The problem (`problem`) and what is run on it (`settings`) -> all settings trained as one batched
computation (`train`) -> rankings, CSV, metrics (`results`), set against the closed form (`optimum`) and
drawn (`figure`).  `problem` and `settings` import nothing heavy.
"""

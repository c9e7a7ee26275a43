"""bfpo-exp: preference optimisation of language models that are to be helpful AND safe.

The way of the data, folder by folder: ``config`` -> ``data`` (or the generated ``world``) ->
``models`` -> ``logprobs`` -> ``losses`` -> ``train`` -> ``eval`` -> ``tracking`` -> ``compare``;
``sweep`` repeats it over settings.  Nothing heavy is imported here.
"""

__version__ = "0.1.0"

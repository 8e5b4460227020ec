"""Imported by the fork server: all that a worker imports, so that its instances share it (forks.py)."""

import gc

# What transformers and torch import only when they are used.
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto  # noqa: F401  # imported to be there after the fork

import components.recall.commands
import components.recall.launch
import components.recall.worker  # noqa: F401  # as above

gc.collect()
gc.freeze()  # a collection would write to every object, and so unshare its page

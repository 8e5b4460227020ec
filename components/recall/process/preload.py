"""Imported by the fork server: all that a worker imports, so that its instances share it (forks.py)."""

import gc

gc.disable()  # nothing of it is garbage

# ruff: noqa: E402  # after the line above
# What fsspec, transformers and torch import only when they are used; Llama is the packaged backbone.
import fsspec.implementations.local  # noqa: F401  # imported to be there after the fork
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama  # noqa: F401  # as above

import components.recall.process.launch
import components.recall.worker.fixed
import components.recall.worker.stream  # noqa: F401  # as above
from components.features.feast import import_for_reading

import_for_reading()
gc.enable()
gc.collect()
gc.freeze()  # a collection would write to every object, and so unshare its page

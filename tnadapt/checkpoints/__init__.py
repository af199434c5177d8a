"""Safetensors containers, adapter files, checkpoints, and merging adapters into checkpoints on disk.

``container`` reads a safetensors file strictly, and ``checkpoint`` a model in one or several of them. ``adapter_file``
holds the content of an adapter file, ``population_file`` that of a file of many, ``adapter_format`` reads and writes
both, ``population_changes`` appends and replaces members, and ``fingerprint`` identifies the base model.
``stored_weights`` finds an adapter's weights in a checkpoint. ``atomic_files`` keeps every write atomic. ``merge`` adds
an adapter to a checkpoint on disk; ``info`` describes files.
"""

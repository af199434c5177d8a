"""Files: safetensors containers, adapter files, checkpoints, and merging one into the other.

``container`` reads a safetensors file strictly and ``checkpoint`` a model in one or several of them. ``adapter_file``
holds what an adapter file contains, ``adapter_format`` reads and writes it, ``fingerprint`` recognizes its base model.
``atomic_files``, ``renaming`` and ``file_locks`` keep every write atomic. ``merge`` adds an adapter to a checkpoint on
disk; ``info`` describes files.
"""

"""Which rows of which stored weights an adapter updates.

``target`` is that object; ``overlaps`` refuses two of one element. ``roles`` reads what a projection is called;
``attention_layouts`` is the one table of fused query-key-value weights, for models in memory and checkpoints on disk;
``checkpoint_targets`` finds targets in a checkpoint by names and shapes. ``prefixes`` and ``pairing`` match the weights
of one model under two sets of names.
"""

"""What asv runs (``benchmarks/asv.conf.json``)."""

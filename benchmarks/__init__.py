"""Our speed beside the peers found on PATH: `python -m benchmarks` prints one table. See README.md in this folder."""

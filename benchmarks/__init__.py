"""The speed of tunneld and of the peers found on PATH: `python -m benchmarks` prints one table. See README.md."""

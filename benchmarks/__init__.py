"""Speed against peers, on the machine at hand: `python -m benchmarks` for all, `python -m benchmarks NAME` for one.

Every number is a ratio against a peer that ran in the same minutes, turn and turn about, so it survives a slow machine.
"""

"""Bytes of messages on the wire. Imports no torch, as estimates and reports do not need it."""

# Bytes that a rank puts on the wire per byte of its contribution, in a group of n ranks, with ring
# algorithms (an all-reduce is a reduce-scatter and an all-gather).
_WIRE = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
}


def wire_bytes(row: dict) -> float:
    """Return the bytes that a rank puts on the wire for a row of `traffic.Traffic.rows`."""
    return row["bytes"] * _WIRE.get(row["operation"], lambda n: 1.0)(row["ranks"])

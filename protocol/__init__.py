"""What crosses a process boundary: messages, sampling parameters, tickets, errors, framing.

Nothing here imports torch or any other folder of the project, so every process can speak the
protocol without paying for what it does not use. Messages are frozen, keyword-only structs with
unknown fields forbidden; they travel as msgpack (never pickle) inside length-prefixed frames.
"""

PROTOCOL_VERSION = 6
"""Raised by one whenever a message changes its meaning; peers with different versions part."""

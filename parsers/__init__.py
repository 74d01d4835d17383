"""What models write between the lines: thoughts and calls of tools, read from growing text.

Nothing here knows of requests, tokens or HTTP. A parser takes an answer's text in pieces and gives
back events; what comes out does not depend on how the text was cut.
"""

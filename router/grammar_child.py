"""`python -P -m pdserve.router.grammar_child TOKENIZER VOCAB_SIZE`: compiles wishes into grammars.

Reads from stdin, answers on stdout, one JSON text per line: {"kind", "value", "options"} →
{"grammar"} or {"error"}. The library can be sent round in circles by a schema, so each wish has
CPU_S seconds of processor time; then the kernel ends this process, whatever it is doing, and the
router starts another one for the next wish. It ends by itself when its stdin does.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from pdserve.protocol.grammar import LIMITS, MAX_CHARS
from pdserve.router.grammar_check import CPU_S
from pdserve.router.grammars import WishError, grammar_of

START_S = 30.0
"""Processor time for reading the tokenizer."""
ADDRESS_SPACE = 4 << 30
"""Bytes; a wish that needs more ends the process."""


class Compiler:
    """Wishes for one vocabulary."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        content = path.read_text(encoding="utf-8")
        self._limits = LLParserLimits(verbose_errors=False, **LIMITS)
        self._tokenizer = LLTokenizer(content, n_vocab=vocab_size)
        added = json.loads(content).get("added_tokens") or []
        self._special = {t["content"]: t["id"] for t in added if t.get("special") and t["content"]}

    def answer(self, line: bytes) -> dict[str, str]:
        try:
            wish: dict[str, Any] = msgspec.json.decode(line)
            grammar = grammar_of(wish["kind"], wish["value"], wish["options"], self._special)
        except WishError as error:
            return {"error": f"{error}."}
        except RecursionError:
            return {"error": "It is nested too deeply."}
        except Exception as error:  # the library's parts raise what they like
            return {"error": _first_lines(str(error))}
        if len(grammar) > MAX_CHARS:
            return {
                "error": f"It makes a grammar of {len(grammar)} characters; at most {MAX_CHARS}."
            }
        problem = self._try(grammar)
        return {"error": _first_lines(problem)} if problem else {"grammar": grammar}

    def _try(self, grammar: str) -> str:
        """Compile it, and look for its first tokens: some faults show only then."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            return str(matcher.get_error())
        matcher.compute_bitmask()
        if matcher.is_error():
            problem = str(matcher.get_error())
            return "No text fits it." if problem.startswith("NoExtension") else problem
        return ""


def _first_lines(text: str) -> str:
    return text.replace("<non-verbose/>", "").strip()[:500]


def main() -> None:
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, START_S)
    try:
        compiler = Compiler(Path(sys.argv[1]), int(sys.argv[2]))
    except (OSError, ValueError) as error:
        compiler = None
        problem = f"Grammars cannot be used with this model's tokenizer: {error}."
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        reply = compiler.answer(line) if compiler else {"error": problem}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

"""A process of its own in which math-verify reads and compares answers; grading.py starts it by its path, and ends it.

A line of stdin, a JSON list [answer, expected, stated], is answered by a line of stdout, a JSON list [answer, same]. Where the
answer is a whole text that states none (stated false), it is the last formula or number of it, and null where there is none.
An algebra system may need hours or all memory for one line of input, and Python cannot be interrupted while it multiplies
integers: so there are no time limits here, the other side ends the process. Its memory is limited here.
"""

import contextlib
import json
import logging
import sys

MEMORY = 4 << 30  # bytes of address space

if __name__ == "__main__":
    del sys.path[0]  # this file's folder, whose names are none that sympy means
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable()
    from math_verify import parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        answer, expected, stated = json.loads(line)
        same = False
        try:
            read = parse(rf"\boxed{{{answer}}}" if stated else answer, parsing_timeout=None)
            answer = answer if stated else str(read[-1]) if read else None
            wanted = parse(rf"\boxed{{{expected}}}", parsing_timeout=None)
            same = bool(read) and verify(wanted, read, allow_set_relation_comp=True, timeout_seconds=None)
        except (Exception, RecursionError, MemoryError):  # of whatever kind: an answer that cannot be read is not right
            answer = answer if stated else None
        print(json.dumps([answer, bool(same)]), flush=True)

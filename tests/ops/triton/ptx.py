"""How many bytes of global memory a kernel's PTX requests."""

import re

# A global access in PTX: ld.global.v4.b32, st.global.b32, ld.global.L1::evict_last.v2.b64, ...
_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_LABEL = re.compile(r"^(\$L\w+):")
_BRANCH = re.compile(r"(?:@(!?)(%p\d+)\s+)?\bbra(?:\.uni)?\s+(\$L\w+)")
_RETURN = re.compile(r"\s*ret;")


def count_accesses(ptx: str, z: int, trips: int) -> tuple[dict[str, int], int]:
    """Return the bytes of a thread's 128-bit accesses and the number of narrower ones.

    Args:
        z: the value of %ctaid.z.
        trips: how often the loop over heads runs. The other loops, of sines, access no tensor.
    """
    blocks, edges = _blocks(ptx, z)
    wide, narrow = {"ld": 0, "st": 0}, 0
    for number in _reachable(edges, 0) | {0}:
        repeats = trips if number in _reachable(edges, number) else 1
        for kind, count, bits in _ACCESS.findall("\n".join(blocks[number])):
            width = int(count or 1) * int(bits)
            if width >= 128:
                wide[kind] += width // 8 * repeats
            narrow += width < 128
    return wide, narrow


def _blocks(ptx: str, z: int) -> tuple[list[list[str]], dict[int, set[int]]]:
    """Return the basic blocks, and for each the blocks that may follow it."""
    blocks, labels, jumps, ends = [[]], {}, [], []
    for line in ptx.splitlines():
        if label := _LABEL.match(line):
            blocks.append([])
            labels[label[1]] = len(blocks) - 1
        blocks[-1].append(line)
        if jump := _BRANCH.search(line):
            jumps.append((len(blocks) - 1, jump[1], jump[2], jump[3]))
            blocks.append([])
        elif _RETURN.match(line):
            ends.append(len(blocks) - 1)
            blocks.append([])
    edges = {number: {number + 1} for number in range(len(blocks) - 1)}
    edges |= {number: set() for number in (*ends, len(blocks) - 1)}
    known = _known_predicates(ptx, z)
    for number, negated, predicate, label in jumps:
        is_taken = True if predicate is None else known.get(predicate)
        if is_taken is not None and negated:
            is_taken = not is_taken
        if is_taken is None:
            edges[number].add(labels[label])
        elif is_taken:
            edges[number] = {labels[label]}
    return blocks, edges


def _known_predicates(ptx: str, z: int) -> dict[str, bool]:
    """Evaluate the comparisons of %ctaid.z with zero, which select keys or values."""
    known = {}
    for register in re.findall(r"mov\.u32\s+(%r\d+), %ctaid\.z;", ptx):
        found = re.findall(rf"setp\.(eq|ne)\.[bsu]32\s+(%p\d+), {register}, 0;", ptx)
        known |= {predicate: (z == 0) == (test == "eq") for test, predicate in found}
    return known


def _reachable(edges: dict[int, set[int]], start: int) -> set[int]:
    """Return the blocks that may run after `start`; it is one of them only in a loop."""
    seen, open_ = set(), list(edges[start])
    while open_:
        number = open_.pop()
        if number not in seen:
            seen.add(number)
            open_ += edges[number]
    return seen

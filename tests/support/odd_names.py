"""A name of a folder that only code without shells, patterns and splitting at spaces survives."""

ODD = "a b'c\"d $(touch pwned) `touch pwned` é字 *[x]\\n;&"

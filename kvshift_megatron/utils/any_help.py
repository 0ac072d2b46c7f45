"""Help texts of flags, shown even if one of them has a percent sign that argparse cannot read."""

import argparse
import copy
import re

# argparse replaces %(default)s and the like; every other percent sign has to be doubled.
_BARE_PERCENT = re.compile(r"(?<!%)%(?![%(])")


class AnyHelpFormatter(argparse.HelpFormatter):
    """Formatter for a parser whose flags are Megatron's: 0.19 has a text that says "10%)"."""

    def add_argument(self, action: argparse.Action) -> None:
        """Add a flag's help, with each bare percent sign doubled."""
        # Any other help as it is: argparse knows the one that hides a flag by its identity.
        text = action.help
        if isinstance(text, str) and _BARE_PERCENT.search(text):
            action = copy.copy(action)
            action.help = _BARE_PERCENT.sub("%%", text)
        super().add_argument(action)

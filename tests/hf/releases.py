"""What older releases of Transformers cannot do, for any model."""

import pytest
import transformers
from packaging.version import Version


def has_release(oldest: str) -> bool:
    """Check whether the installed release is this one or a later one."""
    return Version(transformers.__version__) >= Version(oldest)


def since(oldest: str, what: str) -> pytest.MarkDecorator:
    """Return a mark that skips a case on releases before the one that can do it."""
    return pytest.mark.skipif(
        not has_release(oldest), reason=f"Transformers {what} from {oldest} on, Llama's model too"
    )

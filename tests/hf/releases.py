"""What older releases of Transformers cannot do, for any model."""

import pytest
import transformers
from packaging.version import Version


def has_release(oldest: str) -> bool:
    """Whether the installed release is this one or a later one."""
    return Version(transformers.__version__) >= Version(oldest)


def since(oldest: str, what: str) -> pytest.MarkDecorator:
    """A mark for a case of which the library is capable from a release on."""
    return pytest.mark.skipif(
        not has_release(oldest), reason=f"Transformers {what} from {oldest} on, Llama's model too"
    )

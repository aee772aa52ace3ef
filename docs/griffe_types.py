"""Types in docstrings of diffusers' kind, `size (`int`, defaults to 1): ...`, are left to the signature.

The reference shows each argument with the annotation and the default of the signature, so that the same in
the docstring's words would stand there twice.
"""

import re
from typing import Any

from griffe import Extension, Object

TYPE = re.compile(r"^( +\w+) \(`.*?\): ", re.MULTILINE)


class LeaveTypesToSignatures(Extension):
    """Takes the types in brackets out of the docstrings of functions and classes."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Called by griffe for each object, before docstrings are parsed."""
        if obj.docstring is not None:
            obj.docstring.value = TYPE.sub(r"\1: ", obj.docstring.value)

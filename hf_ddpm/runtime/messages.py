"""Secrets out of text: what is written down, printed or raised goes through here where a token may be in it.

It knows how the Hub's tokens and passwords in addresses look, and the token of the environment.
"""

import os
import re
from typing import Any

TOKENS = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")
IN_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")  # scheme://user:password@host
IN_QUERY = re.compile(r"(?i)([?&](?:access_)?token=)[^&\s'\"]+")
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
HIDDEN = "***"
LEAST = 8  # shorter values of a variable could be ordinary words


def redact(text: str, *secrets: Any) -> str:
    """The text with every token and password replaced by ***.

    Args:
        text: any.
        *secrets: further secrets to look for, such as a token that was passed as an argument; what is no text
            is left alone.
    """
    for secret in (*secrets, *(os.environ.get(name) for name in VARIABLES)):
        if isinstance(secret, str) and len(secret) >= LEAST:
            text = text.replace(secret, HIDDEN)
    return TOKENS.sub(HIDDEN, IN_ADDRESS.sub(HIDDEN, IN_QUERY.sub(rf"\1{HIDDEN}", text)))

"""Parsing of JSON text in data files: a value, or one line of error."""

import json
from typing import Any

from cacheslide.errors import DataError


def parse(text: str, where: str) -> Any:
    """The JSON value in a text.

    Raises
    ------
    DataError
        "`where` not valid JSON (why)" for invalid or too deeply nested text, for numbers too long to parse, for lone
        surrogates, which no tokenizer accepts.
    """
    try:
        found = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except RecursionError:
        why = "nested too deeply"
    except UnicodeEncodeError:
        why = "half of a surrogate pair"
    except ValueError as wrong:  # the decoder's own, or that of a number with thousands of digits
        why = str(wrong)
    raise DataError(f"{where} not valid JSON ({why})")

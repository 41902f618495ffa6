"""What a sentence to a user has to name, however it is worded."""

import re


def naming(*words):
    """A pattern for pytest.raises(match=...): every word is there as a whole, in any order. Words are the names of
    arguments and fields, values, shapes and limits, never prose.
    """
    return "(?s)" + "".join(rf"(?=.*(?<!\w){re.escape(str(word))}(?!\w))" for word in words)

"""Keys and passwords in a text, by their fixed forms.

The forms are detect-secrets', and some of this file for keys that it does not know. Its entropy
detectors are left out: they alarm on ordinary text.
"""

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module

from reward.shapes import Place

# detect-secrets' detectors by module, and which group of a match is the secret: the whole (0), or
# the last group where the pattern names what stands around it (-1).
_KNOWN = {
    "aws.AWSKeyDetector": -1,
    "azure_storage_key.AzureStorageKeyDetector": 0,
    "basic_auth.BasicAuthDetector": -1,
    "discord.DiscordBotTokenDetector": 0,
    "github_token.GitHubTokenDetector": 0,
    "gitlab_token.GitLabTokenDetector": 0,
    "pypi_token.PypiTokenDetector": 0,
    "sendgrid.SendGridDetector": 0,
    "slack.SlackDetector": 0,
    "square_oauth.SquareOAuthDetector": 0,
    "telegram_token.TelegramBotTokenDetector": 0,
}

# Keys that detect-secrets 1.5 does not know, or not in their present form or at full length.
_OWN = [
    # A block without its end, as a model may have been cut off: up to the first other character.
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[^-]{1,10000}-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|[\w+/=\s]*)",
    # JSON Web Token: two objects in base64. The first ends before -eyJ, where the next try begins.
    r"\beyJ(?=[\w-]{8})\w*+(?:-(?!eyJ)\w*+)*+\.eyJ[\w-]{8,}(?:\.[\w-]*)?",
    r"\bsk-(?=[\w-]{0,40}\d)[\w-]{20,}",  # OpenAI, Anthropic
    r"\bhf_[A-Za-z0-9]{30,}",  # Hugging Face
    r"\bgithub_pat_\w{22,}",
    r"\b[rs]k_(?:live|test)_[0-9a-zA-Z]{16,}",  # Stripe
    r"\bAIza[\w-]{35}",  # Google
    r"\bnpm_[A-Za-z0-9]{36}",
    # A named password with a letter and a digit; without a digit it is mostly `required` or a call.
    # The 256 bound the time that a long line of such names takes.
    r"(?i:password|passwd|pwd|api[_-]?key|secret[_-]?key|access[_-]?(?:key|token))"
    r"(?:['\"]?\s*[:=]\s*['\"`]?|\s+is:?\s+['\"`]?)"
    r"((?=[^\s'\"`]{0,256}\d)(?=[^\s'\"`]{0,256}[A-Za-z])[^\s'\"`,;()\[\]{}<>]{7,}[^\s'\"`,;()\[\]{}<>.!?:])",
]

# Whatever the patterns can match holds one of these; for RE2.
TRIGGER = (
    r"A3T|(?:ABIA|ACCA|AKIA|ASIA)[0-9A-Z]{16}|AccountKey=|://[^\s/]+:[^\s/]+@|\bgithub_pat_"
    r"|[MNO][a-zA-Z\d_-]{23,25}\.[a-zA-Z\d_-]{6}\.|gh[pousr]_[A-Za-z0-9_]{36}"
    r"|gl[a-z]{2,6}-[A-Za-z0-9_-]{20}|GR1348941|pypi-AgE|SG\.[\w-]{22}\.|xox[abposr]-"
    r"|hooks\.slack|sq0csp-|\d{8}:[\w-]{35}|PRIVATE KEY|\beyJ|\bsk-[\w-]{20}|[rs]k_(?:live|test)_"
    r"|\bhf_|AIza[\w-]{35}|\bnpm_|(?i:aws.{0,20}(?:key|pwd|pw|pass|token).{0,20}['\"])"
    r"|(?i:password|passwd|pwd|api[_-]?key|secret[_-]?key|access[_-]?(?:key|token))"
    r"(?:['\"]?\s*[:=]|\s+is\b)"
)
# The same in less detail, for the first scan of all texts.
COARSE = (
    r"A3T|A[BCKS][CI]A|AccountKey=|://|[MNO][\w-]{23}|gh[pousr]_|github_pat_|gl[a-z]{2,6}-|GR1348941"
    r"|pypi-AgE|SG\.|xox|hooks\.slack|sq0csp-|PRIVATE KEY|eyJ|\bsk-|k_live_|k_test_|hf_|AIza|npm_"
    r"|(?i:passw|pwd|api[_-]?key|secret[_-]?key|access[_-]?key|access[_-]?token|aws.{0,20}(?:key|pw|pass|token))"
)


def secrets(text: str) -> Iterator[Place]:
    """Keys and passwords; of `https://user:password@host` the password."""
    for pattern, group in _patterns():
        for match in pattern.finditer(text):
            yield match.span(group)


@cache
def _patterns() -> list[tuple[re.Pattern[str], int]]:
    """The regular expressions, each with its group that is the secret."""
    patterns = []
    for name, group in _KNOWN.items():
        module, _, detector = name.partition(".")
        known = getattr(import_module(f"detect_secrets.plugins.{module}"), detector)
        patterns += [(pattern, pattern.groups if group else 0) for pattern in known.denylist]
    own = [re.compile(pattern) for pattern in _OWN]
    return patterns + [(pattern, pattern.groups) for pattern in own]

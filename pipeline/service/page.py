"""The search page: one file that needs nothing else, and the policy by which a browser runs only what stands in it.

The policy names the page's script and style by their hash, so nothing else runs even if a text of the corpus became markup.
"""

import base64
import hashlib
import re
from pathlib import Path

FILE = Path(__file__).with_name("page.html")
PRIVATE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
REPORT_HEADERS = PRIVATE | {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
}
"""A report has neither scripts nor links; its plots have style attributes."""


def page() -> tuple[str, dict[str, str]]:
    """The page, and the headers that it is served with."""
    text = FILE.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(text, 'script')}; style-src {_hash(text, 'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, PRIVATE | {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}


def _hash(text: str, tag: str) -> str:
    """The CSP source of the one element with this tag."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

"""`scripts/audit.py`: a known vulnerability ends `make check`; a missing network does not, and is said."""

import json

import pytest

from scripts.audit import verdict

CLEAN = {"name": "idna", "version": "3.20", "vulns": []}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}
BAD = {"name": "urllib3", "version": "2.8.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.8.1"]}]}


def reported(*found: dict[str, object]) -> str:
    return json.dumps({"dependencies": found, "fixes": []})


def test_a_vulnerability_is_named_and_ends_the_check() -> None:
    assert verdict(1, reported(CLEAN, BAD, UNKNOWN), "Found 1 known vulnerability") == (
        1,
        "pip-audit: known vulnerabilities\nurllib3 2.8.0: CVE-1 (mended in 2.8.1)",
    )


def test_packages_of_which_nothing_is_known_are_named() -> None:
    code, text = verdict(0, reported(CLEAN, UNKNOWN), "")
    assert (code, text) == (0, "pip-audit: no known vulnerability in 1 packages; nothing is known of torch")


@pytest.mark.parametrize(
    ("out", "err"),
    [
        (reported(UNKNOWN), "No known vulnerabilities found"),
        ("", "Traceback\n  File x\nrequests.exceptions.ProxyError: HTTPSConnectionPool(host='localhost'): refused"),
        ("", "requests.exceptions.ConnectionError: Name or service not known"),
    ],
)
def test_an_audit_without_an_answer_is_skipped_with_the_reason(out: str, err: str) -> None:
    code, text = verdict(1, out, err)
    assert code == 0
    assert text.startswith("pip-audit: skipped, since nobody could be asked: ")


def test_any_other_failure_is_no_skip() -> None:
    assert verdict(2, "", "usage: pip-audit [-h]\nerror: argument").code == 2
    assert verdict(0, "no JSON", "").code == 1

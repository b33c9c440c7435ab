"""Ask pip-audit whether a tested version (`constraints.txt`) has a known vulnerability; `make check` runs it.

Exit code 1 where one has, 0 where none has, and also, with one line that says so, where nobody could be asked: without a
network, or with an index that knows no vulnerabilities.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
SECONDS = 60  # for all packages; pip-audit asks for each in turn
# The last line of what pip-audit prints when a request fails.
NO_ANSWER = re.compile(r"^(?:requests\.exceptions\.|\S*ConnectionError).*$", re.MULTILINE)


class Verdict(NamedTuple):
    """What `make check` is told: the exit code, and a line or more to print."""

    code: int
    text: str


def verdict(code: int, out: str, err: str) -> Verdict:
    """What the outcome of ``pip-audit --format json`` means."""
    try:
        found = json.loads(out)["dependencies"]
    except (ValueError, KeyError, TypeError):
        unanswered = NO_ANSWER.findall(err)
        if unanswered:
            return skipped(unanswered[-1][:160])
        return Verdict(code or 1, f"pip-audit failed:\n{err.strip()}")
    vulnerable = [one for one in found if one.get("vulns")]
    unknown = [one["name"] for one in found if "skip_reason" in one]
    if vulnerable:
        lines = [
            f"{one['name']} {one['version']}: {', '.join(_named(vuln) for vuln in one['vulns'])}" for one in vulnerable
        ]
        return Verdict(1, "pip-audit: known vulnerabilities\n" + "\n".join(lines))
    if len(unknown) == len(found):
        return skipped("the index knows vulnerabilities of none of the packages")
    left_out = f"; nothing is known of {', '.join(unknown)}" if unknown else ""
    return Verdict(0, f"pip-audit: no known vulnerability in {len(found) - len(unknown)} packages{left_out}")


def skipped(reason: str) -> Verdict:
    return Verdict(0, f"pip-audit: skipped, since nobody could be asked: {reason}")


def _named(vulnerability: dict[str, Sequence[str]]) -> str:
    fixed = vulnerability.get("fix_versions")
    return f"{vulnerability['id']}" + (f" (mended in {', '.join(fixed)})" if fixed else "")


def main() -> int:
    argv = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
    argv += ["--format", "json", "--progress-spinner", "off", "--timeout", "5"]
    try:
        ran = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        result = skipped(f"no answer within {SECONDS} seconds")
    else:
        result = verdict(ran.returncode, ran.stdout, ran.stderr)
    print(result.text)
    return result.code


if __name__ == "__main__":
    sys.exit(main())

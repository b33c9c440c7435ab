"""Whether the hub answers, asked once before anything needs it: its client tries again for a minute without a word.

Where it does not, a line says so, and only its cache is used, as with `--offline`: what the cache lacks is refused at once.
"""

import os
import sys
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import click

from ctpd.core.printing import printable

if TYPE_CHECKING:
    from ctpd.recipe import Shared
    from harness.suites import Suite

HUB = "https://huggingface.co"
SECONDS = 5.0
"""How long an answer is waited for."""
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def needs_hub(shared: "Shared", suite: "Suite") -> bool:
    """Whether a recipe names a model, pairs or evaluation data of the hub."""
    models = any(spec.revision is not None for spec in (shared.teacher, shared.student))
    sources = [source for source in (shared.data.train, shared.data.eval) if source is not None]
    official = any(column.folder is None for column in suite.columns)
    evaluation = official and shared.evaluation.data_root is None
    return models or any(source.hub is not None for source in sources) or evaluation


def ask_hub() -> bool:
    """Ask the hub for an answer, unless its libraries are told not to; returns whether it can be used.

    Without one, say so and go offline. That acts only before the libraries are imported, which read it once.
    """
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE):
        return False
    hub = os.environ.get("HF_ENDPOINT", HUB)
    reason = unreachable(hub)
    if reason is None:
        return True
    early = not {"huggingface_hub", "datasets"} & set(sys.modules)
    if early:
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
    then = (
        "only its cache is used, as with --offline" if early else "what is not in its cache will be tried for a minute"
    )
    click.echo(f"Note: the hub, {printable(hub)}, cannot be reached ({printable(reason)}): {then}.", err=True)
    return False


def unreachable(url: str) -> str | None:
    """Why no server answers there; None where one does, whatever it says."""
    if not url.startswith(("https://", "http://")):  # urllib would open files, too
        return "its address is not one of the web"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS):  # nosec B310
            return None
    except urllib.error.HTTPError:
        return None  # an answer
    except urllib.error.URLError as error:
        return _reason(error.reason)
    except (OSError, ValueError) as error:
        return _reason(error)


def _reason(error: object) -> str | None:
    import ssl

    if isinstance(error, ssl.SSLError):
        return None  # a server answered; whether it is trusted is its client's to say
    if isinstance(error, TimeoutError):
        return f"no answer in {SECONDS:.0f} seconds"
    return getattr(error, "strerror", None) or str(error)

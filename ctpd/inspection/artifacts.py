"""What an artifact of the store is, in words: from its manifest."""

from collections.abc import Mapping
from typing import Any

from ctpd.core.errors import UserError
from ctpd.core.store import Artifact, Store


def artifact_label(store: Store, artifact: Artifact) -> str:
    """The label of the stage that built an artifact, such as `CTPD, seed 0`; older artifacts have none, and get
    what their identity says."""
    try:
        manifest = store.manifest(artifact.stage, artifact.key)
    except UserError:
        return "damaged"
    label = manifest["provenance"].get("label")
    return label if isinstance(label, str) else _of_identity(manifest["identity"])


def _of_identity(identity: Mapping[str, Any]) -> str:
    config, head = identity.get("config") or {}, identity.get("head") or {}
    parts = [
        head.get("run"),
        None if head.get("seed") is None else f"seed {head['seed']}",
        config.get("role"),
        (identity.get("method") or {}).get("name"),
        (identity.get("task") or {}).get("task"),
        None if config.get("seed") is None else f"seed {config['seed']}",
    ]
    return ", ".join(str(part) for part in parts if part is not None)

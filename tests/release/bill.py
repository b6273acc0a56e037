"""The bill of materials of a release: every pin of the locks with its licence and hashes, as CycloneDX 1.6 JSON."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from tests.release.licences import OF_CUDA, PERMISSIVE, brought_by, licence_of, requirements_of
from tests.release.locks import LOCKS, Pin, normalized, read

NAME = "harness-train"
_SPDX_IDENTIFIERS = PERMISSIVE - {"BSD", "Apache-2.0 WITH LLVM-exception"} | {"MPL-2.0"}


def bill_of_materials(root: Path, *, version: str, commit: str, epoch: int, files: dict[str, str]) -> dict[str, Any]:
    """Return the bill; the same commit has the same one.

    Args:
        epoch: when the commit was made, in seconds since 1970.
        files: SHA-256 by name of the distributions that are released.
    """
    required = brought_by(requirements_of(root, extras=False))
    pins = [pin for name in LOCKS for pin in read(name, root).values()]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{_purl(NAME, version)}#{commit}')}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(epoch, UTC).isoformat(),
            "component": {
                "type": "application",
                "bom-ref": _purl(NAME, version),
                "name": NAME,
                "version": version,
                "purl": _purl(NAME, version),
                "licenses": _licences("Apache-2.0"),
                "properties": [{"name": f"sha256 of {name}", "value": digest} for name, digest in files.items()],
            },
            "properties": [{"name": "git commit", "value": commit}],
        },
        "components": [_component(pin, is_required=pin.name in required) for pin in pins],
    }


def _component(pin: Pin, *, is_required: bool) -> dict[str, Any]:
    licence = _licence(pin.name)
    return {
        "type": "library",
        "bom-ref": _purl(pin.name, pin.version),
        "name": pin.name,
        "version": pin.version,
        "scope": "required" if is_required else "optional",
        # Of each file that the index has of this version; an installed one is made of one of them.
        "hashes": [{"alg": "SHA-256", "content": digest} for digest in pin.hashes],
        **({"licenses": _licences(licence)} if licence else {}),
        "purl": _purl(pin.name, pin.version),
        **({"properties": [{"name": "marker", "value": pin.marker}]} if pin.marker else {}),
    }


def _licence(name: str) -> str:
    if name in OF_CUDA:
        return OF_CUDA[name]
    try:
        return licence_of(distribution(name))
    except PackageNotFoundError as error:
        raise LookupError(f"{name} is not installed, so nobody knows its licence; run make setup") from error


def _licences(expression: str) -> list[dict[str, Any]]:
    if expression in _SPDX_IDENTIFIERS:
        return [{"license": {"id": expression}}]
    if re.search(r"\s(AND|OR|WITH)\s", expression) or expression.startswith("LicenseRef-"):
        return [{"expression": expression}]
    return [{"license": {"name": expression}}]


def _purl(name: str, version: str) -> str:
    return f"pkg:pypi/{normalized(name)}@{version.replace('+', '%2B')}"

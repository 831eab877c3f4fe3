"""What a client may hand in: a workflow in API form, input files, a memory plan; checked whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...kernels import json_text
from ...kernels.errors import FrugalError

# A name that is one file in one folder on every system: no path, no drive, no hidden file.
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ ()+-]{0,199}")
KEY = re.compile(r"[\x21-\x7e]{1,200}")
LARGEST_WORKFLOW = 8 * 10**6
LINK_PARTS = 2


@dataclass(frozen=True)
class JobRequest:
    """workflow: node id -> {class_type, inputs}. files: name -> bytes, laid into ComfyUI's input
    folder. needs: bytes of device memory by the plan that came with it; 0 if none did.
    """

    workflow: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    needs: int = 0

    def digest(self) -> str:
        """SHA-256 over all of it, as hex."""
        total = hashlib.sha256(json.dumps([self.workflow, self.needs], sort_keys=True).encode())
        for name in sorted(self.files):
            total.update(f"\n{name}:".encode() + hashlib.sha256(self.files[name]).digest())
        return total.hexdigest()


def order(workflow: bytes | str, files: Mapping[str, bytes], plan: bytes | str = b"") -> JobRequest:
    """The order that these parts of a request make. Raises FrugalError for anything a worker
    could not take.
    """
    return JobRequest(_workflow(workflow), _files(files), needs(plan) if plan else 0)


def checked_key(text: str) -> str:
    """An Idempotency-Key as it came. Raises FrugalError if it is none."""
    if not KEY.fullmatch(text):
        raise FrugalError(
            f"the Idempotency-Key {ascii(text)[:40]}",
            "1 to 200 printable ASCII characters without spaces",
            "send, say, a UUID",
        )
    return text


def needs(plan: bytes | str) -> int:
    """Bytes of device memory of the largest phase of a plan as Memory Plan's `data` output gives
    it.
    """
    found = _json(plan, "the plan")
    totals = found.get("totals") if isinstance(found, Mapping) else None
    numbers = list(totals.values()) if isinstance(totals, Mapping) else []
    if not numbers or not all(type(each) is int and each >= 0 for each in numbers):
        raise FrugalError(
            "a plan without whole numbers of bytes under 'totals'",
            "the JSON of Memory Plan's output 'data'",
            "send that, or no plan",
        )
    return max(numbers)


def _workflow(text: bytes | str) -> Mapping[str, Any]:
    if len(text) > LARGEST_WORKFLOW:
        raise FrugalError(
            f"a workflow of {len(text)} bytes",
            f"{LARGEST_WORKFLOW} at most",
            "send pictures as files and not inside the workflow",
        )
    found = _json(text, "the workflow")
    if isinstance(found, Mapping) and isinstance(found.get("nodes"), list):
        raise FrugalError(
            "a workflow as the web page saves it",
            "the API form",
            "export the workflow with Workflow > Export (API)",
        )
    if not isinstance(found, Mapping) or not found:
        raise FrugalError(
            "a workflow without nodes",
            "an object of node id -> {class_type, inputs}",
            "export the workflow with Workflow > Export (API)",
        )
    for name, node in found.items():
        if (
            not isinstance(node, Mapping)
            or not isinstance(node.get("class_type"), str)
            or not isinstance(node.get("inputs"), Mapping)
        ):
            raise FrugalError(
                f"node {ascii(name)[:40]} of the workflow",
                "an object with class_type and inputs",
                "export the workflow with Workflow > Export (API)",
            )
    _check_links(found)
    return found


def is_link(value: Any) -> bool:
    """Whether ComfyUI takes an input's value for the output of another node."""
    return isinstance(value, list) and len(value) == LINK_PARTS and isinstance(value[0], str)


def _check_links(workflow: Mapping[str, Any]) -> None:
    """Inputs that a node does not declare count too: ComfyUI follows them before it looks."""
    for name, node in workflow.items():
        for field_name, value in node["inputs"].items():
            if not is_link(value):
                continue
            if value[0] in workflow and type(value[1]) is int and value[1] >= 0:
                continue
            raise FrugalError(
                f"input {ascii(field_name)[:60]} of node {ascii(name)[:40]} is linked to output "
                f"{ascii(value[1])[:20]} of node {ascii(value[0])[:40]}",
                "an output of a node of the workflow, by its number",
                "connect that input again and export the workflow with Workflow > Export (API)",
            )


def _files(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    seen: set[str] = set()
    for name in files:
        if not FILE_NAME.fullmatch(name) or name.endswith((".", " ")):
            raise FrugalError(
                f"an input file called {ascii(name)[:60]}",
                "one plain name of letters, digits and . _ - + ( ) without folders",
                "rename it, in the workflow too",
            )
        if name.lower() in seen:
            raise FrugalError(
                f"two input files called {name}", "different names", "rename one of them"
            )
        seen.add(name.lower())
    return dict(files)


def _json(text: bytes | str, what: str) -> Any:
    try:
        return json_text.parse(text, constants=False)
    except ValueError as error:
        reason = ascii(str(error) or type(error).__name__)[1:-1][:120]
        raise FrugalError(
            f"{what} is no JSON ({reason})", "JSON", "export the workflow again"
        ) from None
